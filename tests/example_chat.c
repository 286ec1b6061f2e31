/* A conversation: each line of standard input is a turn, the reply streams as it is made.
 *
 *   cc -O3 -ffp-contract=off -fopenmp example_chat.c gemma2.c -lm
 *   ./a.out MODEL */
#include "gemma2.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 4096, TURN_IDS = 3 * LINE, REPLY = 40 };

struct chat {
    const gemma2_model *model;
    gemma2_session *session;
    gemma2_sampler sampler;
    float *logits; /* after the last token */
    void *scratch;
    size_t scratch_bytes;
    int32_t ids[TURN_IDS]; /* of a turn */
};

/* The line as the model's chat template has it.  A later turn first closes the reply before. */
static int read_turn(struct chat *c, const char *line)
{
    gemma2_message message = {GEMMA2_ROLE_USER, line, -1};
    unsigned flags = GEMMA2_CHAT_GENERATE;
    if (gemma2_position(c->session) > 0)
        flags |= GEMMA2_CHAT_CONTINUE;
    int64_t n = gemma2_encode_chat(c->model, &message, 1, flags, c->ids, TURN_IDS, c->scratch,
                                   c->scratch_bytes);
    if (n < 0 || n > TURN_IDS)
        return n < 0 ? (int)n : GEMMA2_ERR_SPACE;
    return gemma2_prefill(c->session, c->ids, (size_t)n, c->logits);
}

static int reply(struct chat *c)
{
    gemma2_utf8 hold = {{0}, 0};
    char text[4096 + 12]; /* the longest piece there can be */
    for (int i = 0; i < REPLY; i++) {
        int32_t id = gemma2_sample(c->session, &c->sampler, c->logits);
        if (id < 0)
            return id;
        if (gemma2_is_stop(c->model, id) || id == gemma2_get_config(c->model)->end_of_turn)
            break; /* not evaluated: the next turn closes this one */
        int bytes = gemma2_decode(c->model, &hold, id, text, sizeof text);
        fwrite(text, 1, bytes > 0 ? (size_t)bytes : 0, stdout);
        fflush(stdout);
        int status = gemma2_eval(c->session, &id, 1, c->logits);
        if (status < 0)
            return status;
    }
    int bytes = gemma2_decode(c->model, &hold, -1, text, sizeof text); /* a cut character */
    fwrite(text, 1, bytes > 0 ? (size_t)bytes : 0, stdout);
    printf("\n");
    return GEMMA2_OK;
}

int main(int argc, char **argv)
{
    static struct chat c;
    char err[256] = "usage: example_chat MODEL", line[LINE] = "";
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.exact_prefill = 1; /* the same replies on every machine */
    gemma2_model *model = argc == 2 ? gemma2_open(argv[1], &params, err, sizeof err) : NULL;
    c.model = model;
    if (model && gemma2_chat_check(model, NULL, 0, 0, err, sizeof err) == GEMMA2_OK)
        c.session = gemma2_session_new(model, NULL, err, sizeof err);
    if (!c.session)
        return fprintf(stderr, "%s\n", err), 1;
    c.logits = (float *)malloc(sizeof *c.logits * (size_t)gemma2_get_config(model)->n_vocab);
    memset(line, 'x', LINE - 1); /* the longest there can be */
    gemma2_message longest = {GEMMA2_ROLE_USER, line, LINE};
    c.scratch_bytes = gemma2_chat_scratch(model, &longest, 1);
    c.scratch = malloc(c.scratch_bytes);
    gemma2_sampler_init(&c.sampler, 1);
    c.sampler.temperature = 0;

    int status = c.logits && c.scratch ? GEMMA2_OK : GEMMA2_ERR_MEMORY;
    while (status == GEMMA2_OK && fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        status = read_turn(&c, line);
        if (status == GEMMA2_OK)
            status = reply(&c);
    }
    if (status < 0)
        fprintf(stderr, "%s\n", gemma2_error_string(status));
    free(c.logits), free(c.scratch);
    gemma2_session_free(c.session), gemma2_close(model);
    return status < 0;
}
