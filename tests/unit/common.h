/* What the sections of tests/test.c share: gemma2.c, included with an allocator that can fail and
 * counts what is not given back, random floats, and a way to use a model whole. */
#ifndef UNIT_COMMON_H
#define UNIT_COMMON_H
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include "../on_windows.h"
#else
#include <sys/mman.h>
#endif

/* ---- The engine, with an allocator that can fail and counts what is not given back ---- */

static _Atomic int alloc_calls, alloc_fails_at, alloc_live; /* fails_at 0: never */

/* The nth allocation from now on fails. */
static void fail_allocation(int n)
{
    alloc_calls = 0;
    alloc_fails_at = n;
}

static void *count_alloc(void *p)
{
    alloc_live += p != NULL;
    return p;
}

static int alloc_denied(void) { return ++alloc_calls == alloc_fails_at; }

static void *test_malloc(size_t n) { return count_alloc(alloc_denied() ? NULL : malloc(n)); }

static void *test_calloc(size_t n, size_t size)
{
    return count_alloc(alloc_denied() ? NULL : calloc(n, size));
}

static void test_free(void *p)
{
    alloc_live -= p != NULL;
    free(p);
}

#ifdef _WIN32
static void *test_map(HANDLE section, DWORD access, DWORD high, DWORD low, size_t n)
{
    int denied = alloc_denied();
    if (denied)
        SetLastError(ERROR_NOT_ENOUGH_MEMORY);
    return count_alloc(denied ? NULL : MapViewOfFile(section, access, high, low, n));
}

static int test_unmap(const void *p)
{
    alloc_live--;
    return UnmapViewOfFile(p);
}
#define MapViewOfFile test_map
#define UnmapViewOfFile test_unmap
#else
static void *test_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    if (alloc_denied()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *p = mmap(at, n, protection, flags, fd, offset);
    alloc_live += p != MAP_FAILED;
    return p;
}

static int test_munmap(void *p, size_t n)
{
    alloc_live--;
    return munmap(p, n);
}
#define mmap test_mmap
#define munmap test_munmap
#endif

#ifdef GEMMA2_EMULATE
#include "../emulate.h"
#endif
/* A thread's comparisons of bytes: every look-up of a piece needs some, so they count its work. */
static _Thread_local unsigned long n_compared;

#define memcmp(a, b, n) (n_compared++, memcmp(a, b, n))
#define malloc test_malloc
#define calloc test_calloc
#define free test_free
#include "../../gemma2.c"
#undef memcmp
#undef malloc
#undef calloc
#undef free
#ifdef _WIN32
#include "../on_windows.h"
#endif

#include "../model.h"
#include "../team.h"
#include "../text.h"

static float *random_floats(size_t n, float scale)
{
    float *x = fresh(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform(-scale, scale);
    return x;
}

static const float SPECIAL[] = {
    0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 0.625f, -0.625f, 0.62499994f, 87.3f, -87.3f, -87.300003f,
    -87.29999f, 88.4f, 88.40001f, 1e-30f, -1e-30f, 9.99e-31f, 1e-38f, 1e-45f, -1e-45f, 1e-40f,
    65504.0f, 65519.996f, 65520.0f, -65536.0f, 1e13f, -1e13f, 3.4e38f, -3.4e38f, 20.0f, 127.0f,
    -127.0f, 126.5f, 2.5f, -3.5f, INFINITY, -INFINITY, NAN};
enum { N_SPECIAL = sizeof SPECIAL / sizeof *SPECIAL };

/* Random floats with a special one now and then. */
static void mix_in_special(float *x, size_t n, int finite)
{
    for (size_t i = 0; i < n; i++)
        if (below(3) == 0)
            x[i] = SPECIAL[below(N_SPECIAL - (finite ? 3 : 0))];
}

/* Whether a row's matrix class may be run here.  Asks for the permission that it needs. */
static int has_matrix(const struct kernels *row)
{
    if (!row->matrix || !row->available())
        return 0;
    if (permitted_matrix(row->matrix) == row->matrix)
        return 1;
    printf("not run: the matrix class of %s, this system refuses it\n", row->name);
    return 0;
}

/* Uses a model in every way, with whatever its file says: nothing may crash or hang. */
static void exercise(const gemma2_model *m)
{
    const gemma2_config *c = gemma2_get_config(m);
    struct gemma2_session *s;
    gemma2_session_params p;
    gemma2_plan plan;
    gemma2_section section;
    gemma2_utf8 hold = {{0}, 0};
    int32_t ids[16];
    size_t size, scratch_bytes = gemma2_encode_scratch(16), room = (size_t)c->max_piece_bytes + 12;
    char *scratch = fresh(scratch_bytes), *text = fresh(room);
    gemma2_encode(m, "a <eot>\xc3\xa9\xff<sot>bc", 16, 0, ids, 16, scratch, scratch_bytes);
    for (int32_t id = 0; id < min_i32(c->n_vocab, 300); id++)
        gemma2_decode(m, &hold, id, text, room);
    for (size_t i = 0; gemma2_get_section(m, i, &section); i++)
        gemma2_check(m, i, NULL, 0);
    gemma2_fact(m, "license", &size);
    gemma2_session_params_init(&p);
    p.n_context = 12, p.n_batch = 3, p.n_threads = 1;
    if (gemma2_session_plan(m, &p, &plan) == GEMMA2_OK && plan.total < 1 << 26 &&
        (s = gemma2_session_new(m, &p, NULL, 0)) != NULL) {
        float *logits = fresh((size_t)c->n_vocab * 4), logprobs[4];
        gemma2_sampler sampler;
        gemma2_sampler_init(&sampler, 1);
        for (int i = 0; i < 4; i++)
            ids[i] = (int32_t)below((uint32_t)c->n_vocab);
        gemma2_prefill(s, ids, 4, logits);
        gemma2_score(s, ids, 4, 0, logprobs);
        gemma2_sample(s, &sampler, logits);
        gemma2_session_free(s);
        free(logits);
    }
    free(scratch), free(text);
}

/* Opens; uses what opens.  Returns whether it opened. */
static int opens(const struct image *m)
{
    char err[256] = "";
    gemma2_model *model = gemma2_open_memory(m->data, m->size, NULL, err, sizeof err);
    if (!model) {
        if (!err[0])
            check(0, "a refusal without a sentence");
        return 0;
    }
    exercise(model);
    gemma2_close(model);
    return 1;
}

/* Opening a path fails with a sentence that says the needle. */
static void refused(const char *path, const char *needle)
{
    char err[256] = "";
    gemma2_model *m = gemma2_open(path, NULL, err, sizeof err);
    check(!m && strstr(err, needle), "%s: \"%s\" does not say \"%s\"", path, err, needle);
    gemma2_close(m);
}

#endif
