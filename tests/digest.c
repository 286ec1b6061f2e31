/* Digests of what the engine computes, by gemma2.h alone: one line "CLASS MODEL DIGEST" for
 * each model here and each numeric class.  Builds and machines are compared by these lines:
 * "exact" ones are the same everywhere, "matrix" ones (gemma2_prefill) for one GEMMA2_ISA.
 *
 *   cc -ffp-contract=off tests/digest.c gemma2.c -lm && ./a.out */
#include "../gemma2.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_IDS = 150, N_STEPS = 20 };

static uint64_t digest; /* FNV-1a, over whole words */

static void add(uint64_t word) { digest = (digest ^ word) * 0x100000001b3u; }

static void add_floats(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        union { float x; uint32_t bits; } u = {x[i]};
        add(u.bits);
    }
}

/* A prompt in pieces, log-probabilities, then what a sampler makes of it. */
static int run(const gemma2_model *m, int32_t cache, float *logits)
{
    gemma2_session_params params;
    gemma2_sampler sampler;
    float logprobs[10];
    int32_t ids[N_IDS], n_vocab = gemma2_get_config(m)->n_vocab;
    for (int32_t i = 0; i < N_IDS; i++)
        ids[i] = (i * 131 + i * i * 7) % n_vocab;
    gemma2_session_params_init(&params);
    params.n_batch = 33, params.n_threads = 2, params.cache_type = cache;
    params.n_context = N_IDS + N_STEPS + 10;
    gemma2_session *s = gemma2_session_new(m, &params, NULL, 0);
    gemma2_sampler_init(&sampler, 5);
    int status = s ? gemma2_prefill(s, ids, N_IDS, logits) : -1;
    for (int i = 0; i < N_STEPS && status >= 0; i++) {
        int32_t id = gemma2_sample(s, &sampler, logits);
        add((uint32_t)id);
        add_floats(logits, (size_t)n_vocab);
        status = id < 0 ? id : gemma2_eval(s, &id, 1, logits);
    }
    if (status >= 0)
        status = gemma2_score(s, ids, 10, 3, logprobs);
    add_floats(logprobs, 10);
    gemma2_session_free(s);
    return status;
}

static int print_digest(const char *path, uint32_t exact)
{
    char err[256] = "a call failed";
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.exact_prefill = exact;
    gemma2_model *m = gemma2_open(path, &params, err, sizeof err);
    float *logits = m ? malloc(sizeof *logits * (size_t)gemma2_get_config(m)->n_vocab) : NULL;
    int ok = logits != NULL;
    digest = 0xcbf29ce484222325u;
    for (int32_t cache = GEMMA2_CACHE_F32; cache <= GEMMA2_CACHE_Q8 && ok; cache++)
        ok = run(m, cache, logits) >= 0;
    if (ok)
        printf("%s %s %08lx%08lx\n", exact ? "exact" : "matrix", path,
               (unsigned long)(digest >> 32), (unsigned long)(digest & 0xffffffff));
    else
        printf("%s: %s\n", path, err);
    free(logits);
    gemma2_close(m);
    return ok;
}

int main(void)
{
    static const char *const models[] = {
        "tests/golden/both.bin", "tests/golden/untied.bin", "tests/golden/final.bin",
        "tests/golden/long.bin", "tests/golden/mixed.bin", "tests/demo/story-q8.bin"};
    int ok = 1;
    for (size_t i = 0; i < 2 * sizeof models / sizeof *models; i++)
        ok &= print_digest(models[i / 2], i % 2 == 0);
    return !ok;
}
