/* The least a program needs: text in, the likeliest continuation out, in memory of its own.
 *
 *   cc -O3 -ffp-contract=off example_minimal.c gemma2.c -lm
 *   ./a.out MODEL "Once upon a time" */
#include "gemma2.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_IDS = 512, REPLY = 60 };

static int fail(const char *why)
{
    fprintf(stderr, "%s\n", why);
    return 1;
}

/* Writes the reply.  Returns GEMMA2_OK or what went wrong. */
static int reply(gemma2_session *session, const gemma2_model *model, float *logits)
{
    gemma2_sampler greedy;
    gemma2_sampler_init(&greedy, 0);
    greedy.temperature = 0;
    gemma2_utf8 hold = {{0}, 0};
    char text[4096 + 12]; /* the longest piece there can be */
    for (int i = 0; i < REPLY; i++) {
        int32_t id = gemma2_sample(session, &greedy, logits);
        if (id < 0 || gemma2_is_stop(model, id))
            return id < 0 ? id : GEMMA2_OK;
        int bytes = gemma2_decode(model, &hold, id, text, sizeof text);
        fwrite(text, 1, bytes > 0 ? (size_t)bytes : 0, stdout);
        int status = gemma2_eval(session, &id, 1, logits);
        if (status < 0)
            return status;
    }
    return GEMMA2_OK;
}

int main(int argc, char **argv)
{
    char err[256];
    int32_t ids[MAX_IDS];
    if (argc != 3)
        return fail("usage: example_minimal MODEL TEXT");
    gemma2_model *model = gemma2_open(argv[1], NULL, err, sizeof err);
    if (!model)
        return fail(err);

    gemma2_session_params params;
    gemma2_plan plan;
    gemma2_session_params_init(&params);
    params.n_context = MAX_IDS + REPLY;
    if (gemma2_session_plan(model, &params, &plan) < 0)
        return fail("this file holds no model to run");
    void *memory = aligned_alloc(64, (size_t)plan.total); /* total is a multiple of 64 */
    gemma2_session *session = gemma2_session_place(model, &params, memory, (size_t)plan.total,
                                                   err, sizeof err);
    if (!session)
        return fail(err);

    size_t scratch_bytes = gemma2_encode_scratch(strlen(argv[2]));
    void *scratch = malloc(scratch_bytes);
    float *logits = (float *)malloc(sizeof *logits * (size_t)gemma2_get_config(model)->n_vocab);
    int64_t n = GEMMA2_ERR_MEMORY;
    if (scratch && logits)
        n = gemma2_encode(model, argv[2], -1, GEMMA2_ENCODE_BOS, ids, MAX_IDS, scratch,
                          scratch_bytes);
    int status = n > MAX_IDS ? (int)GEMMA2_ERR_CONTEXT : (int)n;
    if (n >= 0 && n <= MAX_IDS)
        status = gemma2_prefill(session, ids, (size_t)n, logits);
    if (status == GEMMA2_OK)
        status = reply(session, model, logits);
    printf("\n");
    free(logits), free(scratch);
    gemma2_session_free(session);
    free(memory); /* after the session that lies in it */
    gemma2_close(model);
    return status < 0 ? fail(gemma2_error_string(status)) : 0;
}
