/* What test.c takes from POSIX, on Windows: included before the engine, and once more after
 * it, so that one kind of memory is given and freed: posix_memalign's. */
#ifndef ON_WINDOWS_H
#define ON_WINDOWS_H
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <direct.h>
#include <malloc.h>
#include <process.h>
#include <stdio.h>
#include <string.h>
#include <windows.h>
#undef near
#undef far

static void setenv(const char *name, const char *value, int overwrite)
{
    (void)overwrite;
    _putenv_s(name, value);
}

static void unsetenv(const char *name) { _putenv_s(name, ""); }

/* A directory of its own in the one for temporary files. */
static char *mkdtemp(char *path)
{
    snprintf(path, 60, "%.35s/gemma2-%lu-%d", getenv("TEMP") ? getenv("TEMP") : ".",
             GetTickCount(), _getpid());
    return _mkdir(path) ? NULL : path;
}

static int posix_memalign(void **p, size_t alignment, size_t n)
{
    *p = _aligned_malloc(n, alignment);
    return *p == NULL;
}
#else
#define malloc(n) _aligned_malloc(n, 16)
#define calloc(n, size) memset(_aligned_malloc((n) * (size), 16), 0, (n) * (size))
#define free _aligned_free
#endif
