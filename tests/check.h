/* Checks and their counts, for tests in C. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef PRINTF_FORMAT
#define PRINTF_FORMAT printf
#endif

static int n_passed, n_failed;

__attribute__((format(PRINTF_FORMAT, 2, 3)))
static int check(int ok, const char *format, ...)
{
    ok ? n_passed++ : n_failed++;
    if (!ok) {
        va_list args;
        va_start(args, format);
        printf("FAIL ");
        vprintf(format, args);
        printf("\n");
        va_end(args);
#ifdef GOLDEN_ALONE /* the first failure says where the mistake is */
        exit(1);
#endif
    }
    return ok;
}
