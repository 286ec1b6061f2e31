/* Holds a converted model against what others published about the same weights.
 *
 *   cc -O3 -fopenmp -ffp-contract=off tests/check_model.c gemma2.c -lm
 *   ./a.out MODEL.bin [base|it]
 *
 * Base models: greedy continuations of transformers' integration tests.  Instruction-tuned
 * ones: entropies and answers of gemma.cpp's tests.  The size is known by D and L.  Which
 * kind a file is, is known by its chat template, which only instruction-tuned checkpoints
 * carry; the second argument overrules that. */
#include "../gemma2.h"
#include "published.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 5120, ANSWER_TOKENS = 64 };

static int n_passed, n_failed;

/* Everything a check needs, allocated once. */
typedef struct {
    const gemma2_model *model;
    gemma2_session *session;
    const gemma2_config *config;
    float *logits;
    int32_t ids[CONTEXT];
    char text[32768], scratch[4 << 20];
} bench;

static void verdict(int ok, const char *what)
{
    ok ? n_passed++ : n_failed++;
    printf("%s  %s\n", ok ? "pass" : "FAIL", what);
    fflush(stdout);
}

/* Appends the text's ids.  Returns -1 where they do not fit. */
static int append_text(bench *b, int n, const char *text, unsigned flags)
{
    int64_t more = gemma2_encode(b->model, text, -1, flags, b->ids + n, (size_t)(CONTEXT - n),
                                 b->scratch, sizeof b->scratch);
    return more < 0 || more > CONTEXT - n ? -1 : n + (int)more;
}

static int32_t best_of(const bench *b)
{
    int32_t best = 0;
    for (int32_t v = 1; v < b->config->n_vocab; v++)
        if (b->logits[v] > b->logits[best])
            best = v;
    return best;
}

/* From an empty session, ids[0 .. n). */
static int start(bench *b, int n)
{
    return n > 0 && gemma2_rewind(b->session, 0) >= 0 &&
           gemma2_prefill(b->session, b->ids, (size_t)n, b->logits) >= 0;
}

/* ---- Greedy continuations ------------------------------------------------------------- */

/* Feeds the published ids; counts those that are ours too and finds how far the others
 * trail.  Following the published text keeps one near tie from spoiling the rest. */
static float follow(bench *b, const published_greedy *g, int *same)
{
    float worst = 0;
    *same = 0;
    for (int i = 0; i < g->n_ids; i++) {
        int32_t best = best_of(b), id = g->ids[i];
        if (id >= b->config->n_vocab)
            return INFINITY;
        *same += best == id;
        worst = fmaxf(worst, b->logits[best] - b->logits[id]);
        if (gemma2_eval(b->session, &id, 1, b->logits) < 0)
            return INFINITY;
    }
    return worst;
}

static void check_greedy(bench *b, const published_greedy *g)
{
    char line[256];
    b->text[0] = 0;
    for (int i = 0; i < g->repeat; i++)
        strcat(b->text, g->repeated);
    strcat(b->text, g->end);
    int n = append_text(b, 0, b->text, GEMMA2_ENCODE_BOS), same = 0;
    snprintf(line, sizeof line, "prompt \"%.30s\" has %d tokens, published %d", b->text, n,
             g->n_prompt);
    verdict(n == g->n_prompt, line);
    float gap = start(b, n) ? follow(b, g, &same) : INFINITY;
    snprintf(line, sizeof line,
             "%d of %d greedy tokens as published (%s), the others trail by %.3f at most, "
             "allowed %.2f: \"%.40s...\"",
             same, g->n_ids, g->origin, gap, g->margin, g->text);
    verdict(gap <= g->margin, line);
}

/* ---- Entropies ------------------------------------------------------------------------ */

/* gemma.cpp counts log2(256000) bits for the first token, then divides by bytes. */
static void check_entropy(bench *b, const published_entropy *e, int size)
{
    char line[256];
    float logprobs[512];
    double bits = log2(256000.0);
    int n = append_text(b, 0, e->text, GEMMA2_ENCODE_BOS);
    snprintf(line, sizeof line, "ids of \"%s\" as published", e->name);
    verdict(n == e->n_ids + 1 && !memcmp(b->ids + 1, e->ids, sizeof *e->ids * e->n_ids), line);
    if (n < 2 || n > 512 || gemma2_rewind(b->session, 0) < 0 ||
        gemma2_score(b->session, b->ids, (size_t)n, -1, logprobs) < 0) {
        verdict(0, "scoring failed");
        return;
    }
    for (int i = 0; i + 1 < n; i++)
        bits -= logprobs[i] / log(2.0);
    double value = bits / (double)strlen(e->text);
    snprintf(line, sizeof line, "entropy of \"%s\" %.4f bits a byte, published %.2f +- 0.02",
             e->name, value, e->value[size]);
    verdict(fabs(value - e->value[size]) <= 0.02, line);
}

/* ---- Answers -------------------------------------------------------------------------- */

/* Generates greedily up to a stop.  Returns the length of the answer in b->text. */
static size_t generate(bench *b)
{
    gemma2_utf8 hold = {{0}, 0};
    size_t used = 0;
    for (int i = 0; i < ANSWER_TOKENS; i++) {
        int32_t id = best_of(b);
        if (gemma2_is_stop(b->model, id))
            break;
        int n = gemma2_decode(b->model, &hold, id, b->text + used, sizeof b->text - used - 1);
        used += n > 0 ? (size_t)n : 0;
        if (gemma2_eval(b->session, &id, 1, b->logits) < 0)
            break;
    }
    b->text[used] = 0;
    return used;
}

/* Puts a user's turn after n ids, generates the reply.  Returns the ids there are. */
static int turn(bench *b, int n, const char *said)
{
    char text[512];
    snprintf(text, sizeof text, "%s<start_of_turn>user\n%s<end_of_turn>\n<start_of_turn>model\n",
             n ? "<end_of_turn>\n" : "", said);
    n = append_text(b, n, text, n ? 0 : GEMMA2_ENCODE_BOS);
    if (n < 0 || !start(b, n))
        return -1;
    generate(b);
    n = gemma2_position(b->session);
    memcpy(b->ids, gemma2_history(b->session), sizeof *b->ids * (size_t)n);
    return n;
}

static void check_answer(bench *b, const published_answer *a)
{
    char line[512];
    int n = a->first ? turn(b, 0, a->first) : 0, found = 0;
    n = n < 0 ? n : turn(b, n, a->question);
    for (int i = 0; n >= 0 && i < 2 && a->words[i]; i++)
        found |= strstr(b->text, a->words[i]) != NULL;
    snprintf(line, sizeof line, "\"%s\" is answered with \"%s\": %.200s", a->question,
             a->words[0], n < 0 ? "(failed)" : b->text);
    for (char *c = line; *c; c++)
        if (*c == '\n')
            *c = ' ';
    verdict(found, line);
}

/* --------------------------------------------------------------------------------------- */

/* 0, 1, 2: the 2B, 9B, 27B model; -1: none of them. */
static int size_of(const gemma2_config *c)
{
    static const int shapes[3][2] = {{2304, 26}, {3584, 42}, {4608, 46}};
    for (int i = 0; i < 3; i++)
        if (c->d_model == shapes[i][0] && c->n_layers == shapes[i][1])
            return i;
    return -1;
}

static void check_all(bench *b, int size, int tuned)
{
    for (size_t i = 0; !tuned && i < sizeof GREEDY / sizeof *GREEDY; i++)
        if (GREEDY[i].size == size)
            check_greedy(b, &GREEDY[i]);
    for (size_t i = 0; tuned && i < sizeof ENTROPIES / sizeof *ENTROPIES; i++)
        check_entropy(b, &ENTROPIES[i], size);
    for (size_t i = 0; tuned && i < sizeof ANSWERS / sizeof *ANSWERS; i++)
        check_answer(b, &ANSWERS[i]);
}

static int run_checks(const gemma2_model *model, int size, int tuned)
{
    char err[256];
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_context = CONTEXT;
    bench *b = calloc(1, sizeof *b);
    if (!b)
        return fprintf(stderr, "no memory\n"), 1;
    b->model = model;
    b->config = gemma2_get_config(model);
    b->logits = malloc(sizeof(float) * (size_t)b->config->n_vocab);
    b->session = gemma2_session_new(model, &params, err, sizeof err);
    if (b->logits && b->session)
        check_all(b, size, tuned);
    else
        fprintf(stderr, "%s\n", b->logits ? err : "no memory"), n_failed++;
    gemma2_session_free(b->session);
    free(b->logits), free(b);
    return 0;
}

int main(int argc, char **argv)
{
    static const char *names[] = {"2B", "9B", "27B"};
    char err[256];
    size_t size_of_template;
    if (argc < 2 || (argc > 2 && strcmp(argv[2], "base") && strcmp(argv[2], "it")))
        return fprintf(stderr, "usage: check_model MODEL.bin [base|it]\n"), 2;
    gemma2_model *model = gemma2_open(argv[1], NULL, err, sizeof err);
    if (!model)
        return fprintf(stderr, "%s\n", err), 3;
    int tuned = argc > 2 ? argv[2][0] == 'i'
                         : gemma2_fact(model, "chat_template", &size_of_template) != NULL;
    int size = size_of(gemma2_get_config(model));
    const char *forced = getenv("CHECK_MODEL_SIZE"); /* to try the checks on a small model */
    if (forced)
        size = atoi(forced);
    if (size < 0 || size > 2 || (size == 2 && !tuned)) {
        fprintf(stderr, "nothing is published for this model: D %d, %d layers, %s\n",
                (int)gemma2_get_config(model)->d_model, (int)gemma2_get_config(model)->n_layers,
                tuned ? "instruction-tuned" : "base");
        return gemma2_close(model), 2;
    }
    printf("Gemma 2 %s, %s (say \"base\" or \"it\" where that is wrong)\n", names[size],
           tuned ? "instruction-tuned" : "base");
    int status = run_checks(model, size, tuned);
    gemma2_close(model);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return status || n_failed;
}
