/* A conversation: each line of standard input is a turn, the reply streams as it is made.
 *
 *   cc -O3 -ffp-contract=off -fopenmp example_chat.c gemma2.c -lm
 *   ./a.out MODEL */
#include "gemma2.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 4096, TURN_IDS = LINE + 32, REPLY = 40 };

struct chat {
    const gemma2_model *model;
    gemma2_session *session;
    gemma2_sampler sampler;
    float *logits; /* after the last token */
    void *scratch;
    size_t scratch_bytes;
    int32_t ids[TURN_IDS]; /* of a turn */
    size_t n;
};

static void add_id(struct chat *c, int32_t id)
{
    if (c->n < TURN_IDS)
        c->ids[c->n++] = id;
}

/* Text of a stranger: GEMMA2_ENCODE_PLAIN spells out what looks like a turn marker. */
static void add_text(struct chat *c, const char *text)
{
    int64_t n = gemma2_encode(c->model, text, -1, GEMMA2_ENCODE_PLAIN, c->ids + c->n,
                              TURN_IDS - c->n, c->scratch, c->scratch_bytes);
    c->n += n > 0 && (size_t)n <= TURN_IDS - c->n ? (size_t)n : 0;
}

/* The template of Gemma 2:
 *   <bos><start_of_turn>user\nTEXT<end_of_turn>\n<start_of_turn>model\n
 * where a later turn first closes the reply before it. */
static int read_turn(struct chat *c, const char *line)
{
    const gemma2_config *config = gemma2_get_config(c->model);
    char text[LINE + 8];
    snprintf(text, sizeof text, "user\n%s", line);
    c->n = 0;
    if (gemma2_position(c->session) == 0) {
        add_id(c, config->bos);
    } else {
        add_id(c, config->end_of_turn);
        add_text(c, "\n");
    }
    add_id(c, config->start_of_turn);
    add_text(c, text);
    add_id(c, config->end_of_turn);
    add_text(c, "\n");
    add_id(c, config->start_of_turn);
    add_text(c, "model\n");
    return gemma2_prefill(c->session, c->ids, c->n, c->logits);
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
            break;
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
    char err[256] = "usage: example_chat MODEL", line[LINE];
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.exact_prefill = 1; /* the same replies on every machine */
    gemma2_model *model = argc == 2 ? gemma2_open(argv[1], &params, err, sizeof err) : NULL;
    c.model = model;
    c.session = model ? gemma2_session_new(model, NULL, err, sizeof err) : NULL;
    if (!c.session)
        return fprintf(stderr, "%s\n", err), 1;
    c.logits = (float *)malloc(sizeof *c.logits * (size_t)gemma2_get_config(model)->n_vocab);
    c.scratch_bytes = gemma2_encode_scratch(LINE + 8);
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
