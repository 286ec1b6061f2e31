/* A sampler of one's own, over the logits: always the likeliest token that does not repeat
 * three tokens in a row.
 *
 *   cc -O3 -ffp-contract=off -fopenmp example_sampler.c gemma2.c -lm
 *   ./a.out MODEL "Once upon a time" */
#include "gemma2.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 400, REPLY = 150 };

/* Whether id after the n ids of the text would make three that stand there already. */
static int repeats(const int32_t *ids, int32_t n, int32_t id)
{
    for (int32_t i = 2; i < n; i++)
        if (ids[i] == id && ids[i - 1] == ids[n - 1] && ids[i - 2] == ids[n - 2])
            return 1;
    return 0;
}

/* The choice: only what is better than the best so far is worth the look back. */
static int32_t choose(const gemma2_session *session, const float *logits, int32_t n_vocab)
{
    const int32_t *ids = gemma2_history(session);
    int32_t n = gemma2_position(session), best = -1;
    for (int32_t id = 0; id < n_vocab; id++)
        if (isfinite(logits[id]) && (best < 0 || logits[id] > logits[best]) &&
            !repeats(ids, n, id))
            best = id;
    return best;
}

static int tell(gemma2_session *session, const gemma2_model *model, float *logits)
{
    gemma2_utf8 hold = {{0}, 0};
    char text[4096 + 12]; /* the longest piece there can be */
    for (int i = 0; i < REPLY; i++) {
        int32_t id = choose(session, logits, gemma2_get_config(model)->n_vocab);
        if (id < 0)
            return GEMMA2_ERR_NONFINITE;
        if (gemma2_is_stop(model, id))
            break;
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
    char err[256] = "usage: example_sampler MODEL TEXT";
    int32_t ids[CONTEXT - REPLY];
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_context = CONTEXT;
    gemma2_model *model = argc == 3 ? gemma2_open(argv[1], NULL, err, sizeof err) : NULL;
    gemma2_session *session = model ? gemma2_session_new(model, &params, err, sizeof err) : NULL;
    if (!session)
        return fprintf(stderr, "%s\n", err), 1;
    size_t scratch_bytes = gemma2_encode_scratch(strlen(argv[2]));
    void *scratch = malloc(scratch_bytes);
    float *logits = (float *)malloc(sizeof *logits * (size_t)gemma2_get_config(model)->n_vocab);
    int64_t n = GEMMA2_ERR_MEMORY;
    if (scratch && logits)
        n = gemma2_encode(model, argv[2], -1, GEMMA2_ENCODE_BOS, ids, CONTEXT - REPLY, scratch,
                          scratch_bytes);
    int status = n > CONTEXT - REPLY ? (int)GEMMA2_ERR_CONTEXT : (int)n;
    if (n >= 0 && n <= CONTEXT - REPLY)
        status = gemma2_eval(session, ids, (size_t)n, logits);
    if (status == GEMMA2_OK)
        status = tell(session, model, logits);
    printf("\n");
    if (status < 0)
        fprintf(stderr, "%s\n", gemma2_error_string(status));
    free(scratch), free(logits);
    gemma2_session_free(session), gemma2_close(model);
    return status < 0;
}
