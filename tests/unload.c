/* A program without OpenMP that loads the shared library, evaluates on two threads, unloads the
 * library and goes on, twice: unload LIBRARY MODEL.  OpenMP's threads are still there then, so
 * their code must be.  tests/install.sh runs it. */
#define _DEFAULT_SOURCE
#include "gemma2.h"

#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

static void *library;

#define CALL(name) (__extension__(__typeof__(name) *)find(#name))

static void *find(const char *name)
{
    void *p = dlsym(library, name);
    if (!p)
        fprintf(stderr, "%s\n", dlerror());
    return p;
}

static int evaluate(const char *path)
{
    static int32_t ids[100];
    static float logits[300000];
    char err[256] = "";
    gemma2_session_params params;
    gemma2_model *model = CALL(gemma2_open)(path, NULL, err, sizeof err);
    if (!model)
        return printf("%s\n", err), 0;
    CALL(gemma2_session_params_init)(&params);
    params.n_threads = 2;
    gemma2_session *session = CALL(gemma2_session_new)(model, &params, err, sizeof err);
    int ok = session && CALL(gemma2_eval)(session, ids, 100, logits) == GEMMA2_OK;
    CALL(gemma2_session_free)(session);
    CALL(gemma2_close)(model);
    return ok;
}

int main(int argc, char **argv)
{
    for (int i = 0; i < 2 && argc == 3; i++) {
        library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (!library || !evaluate(argv[2]))
            return printf("cannot use %s\n", argv[1]), 1;
        dlclose(library);
        usleep(300000);
    }
    printf("goes on\n");
    return argc != 3;
}
