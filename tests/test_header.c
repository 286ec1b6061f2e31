/* gemma2.h as a stranger uses it: nothing else is included from the engine, and gemma2.c is
 * linked, not included.  The program in the header's first comment stands below, letter for
 * letter but for the header's path (a check compares them), and is run on the demo model.
 *
 *   cc -O2 -ffp-contract=off tests/test_header.c gemma2.c -lm && ./a.out
 *
 * From the repository's root. */
#define _POSIX_C_SOURCE 200809L /* dup2, unlink, for the checks */
#define main example
/* example */
#include "../gemma2.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    char err[256], text[1024];
    if (argc < 3)
        return fprintf(stderr, "usage: prog MODEL TEXT\n"), 2;
    gemma2_model *model = gemma2_open(argv[1], NULL, err, sizeof err);
    if (!model)
        return fprintf(stderr, "%s\n", err), 3;
    gemma2_session *session = gemma2_session_new(model, NULL, err, sizeof err);
    if (!session)
        return fprintf(stderr, "%s\n", err), 1;
    float *logits = (float *)malloc(sizeof *logits * gemma2_get_config(model)->n_vocab);
    size_t scratch_bytes = gemma2_encode_scratch(4096);
    void *scratch = malloc(scratch_bytes);
    int32_t ids[4096];
    if (!logits || !scratch)
        return 1;

    int64_t n = gemma2_encode(model, argv[2], -1, GEMMA2_ENCODE_BOS, ids, 4096,
                              scratch, scratch_bytes);
    int status = n > 4096 ? (int)GEMMA2_ERR_CONTEXT : (int)n;
    if (n >= 0 && n <= 4096)
        status = gemma2_prefill(session, ids, n, logits);
    gemma2_sampler sampler;
    gemma2_sampler_init(&sampler, 42);
    gemma2_utf8 hold = {{0}, 0};
    for (int i = 0; status >= 0 && i < 100; i++) {
        int32_t id = gemma2_sample(session, &sampler, logits);
        if (id < 0 || gemma2_is_stop(model, id))
            break;
        int bytes = gemma2_decode(model, &hold, id, text, sizeof text);
        if (bytes > 0)
            fwrite(text, 1, bytes, stdout);
        status = gemma2_eval(session, &id, 1, logits);
    }
    printf("\n");
    if (status < 0)
        fprintf(stderr, "%s\n", gemma2_error_string(status));
    free(scratch), free(logits);
    gemma2_session_free(session), gemma2_close(model);
    return status < 0;
}
/* end */
#undef main

#include <string.h>
#include <unistd.h>

static int n_passed, n_failed;

static int check(int ok, const char *what)
{
    ok ? n_passed++ : n_failed++;
    if (!ok)
        printf("FAIL %s\n", what);
    return ok;
}

/* Reads lines up to the one that is `before`. */
static int skip_to(FILE *f, const char *before)
{
    char line[256];
    while (fgets(line, sizeof line, f))
        if (!strcmp(line, before))
            return 1;
    return 0;
}

/* The lines between the marks above are the header's, less their " *   ". */
static void test_same_text(void)
{
    FILE *header = fopen("gemma2.h", "r"), *here = fopen("tests/test_header.c", "r");
    char in_header[256], in_test[256];
    int n = 0;
    if (!check(header && here, "gemma2.h and tests/test_header.c can be read"))
        return;
    check(skip_to(header,
                  " * A complete program (cc -O3 -ffp-contract=off prog.c gemma2.c -lm):\n") &&
              skip_to(header, " *\n") && skip_to(here, "/* example */\n"), "both have the example");
    while (fgets(in_test, sizeof in_test, here) && strcmp(in_test, "/* end */\n") &&
           fgets(in_header, sizeof in_header, header)) {
        const char *line = strlen(in_header) > 5 ? in_header + 5 : "\n";
        if (n == 0 && !strcmp(in_test, "#include \"../gemma2.h\"\n"))
            check(!strcmp(line, "#include \"gemma2.h\"\n"), "the example includes the header");
        else if (strcmp(line, in_test))
            check(0, in_header);
        n++;
    }
    check(n > 40 && fgets(in_header, sizeof in_header, header) && !strcmp(in_header, " *\n"),
          "the whole example is compared");
    fclose(header), fclose(here);
}

/* Runs the example with standard output in a file; its text, or NULL. */
static char *run_example(char *text, size_t size, int *status)
{
    char *argv[] = {(char[]){"example"}, (char[]){"tests/demo/story-q8.bin"},
                    (char[]){"Once upon a time"}, NULL};
    FILE *file = tmpfile();
    fflush(stdout);
    int old = dup(1);
    if (!file || old < 0 || dup2(fileno(file), 1) < 0)
        return NULL;
    *status = example(3, argv);
    fflush(stdout);
    dup2(old, 1), close(old);
    rewind(file);
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
    return text;
}

static void test_example(void)
{
    char first[4096] = "", second[4096] = "", *argv[] = {first, second, NULL};
    int status = -1;
    check(run_example(first, sizeof first, &status) && status == 0, "the example runs");
    check(strlen(first) > 100 && first[strlen(first) - 1] == '\n', "the example tells a story");
    run_example(second, sizeof second, &status);
    check(!strcmp(first, second), "and the same one again");
    check(example(1, argv) == 2, "the example without arguments");
}

/* The header alone is warning-free C.  (C++ needs its compiler: tests/install.sh.) */
static void test_languages(void)
{
    static const char *const languages[] = {"c99", "c11"};
    for (size_t i = 0; i < sizeof languages / sizeof *languages; i++) {
        char command[256];
        snprintf(command, sizeof command, "echo '#include \"gemma2.h\"' | cc -x c -std=%s -I. "
                 "-Wall -Wextra -Wpedantic -Wshadow -Werror -fsyntax-only -", languages[i]);
        check(system(command) == 0, languages[i]);
    }
}

int main(void)
{
    test_same_text();
    test_example();
    test_languages();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
