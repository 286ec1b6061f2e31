/* What tests/schemas.py asks: does a schema or grammar become a machine, and which texts does the
 * machine take?  run.c is included for its schemas; the rest is the public library.
 *
 *   cc -O2 tests/schemas.c gemma2.c -lm -o build/schemas && build/schemas tokenizer.bin < frames
 *
 * A frame is a letter, a size, a newline and that many bytes: S schema, G grammar, T text to take
 * byte by byte, M text to take token by token with a mask before each, R two numbers: the most
 * tokens of a reply, and a seed.  Every frame is answered by a line: "ok MICROSECONDS" or "refused
 * SENTENCE" for S and G; 1, or 0 and the bytes that were taken, for T; for M 1 or 0 and the
 * microseconds of each mask; for R a reply of tokens drawn from the masks, empty where the shortest
 * is longer. */
#define main run_main
#include "../run.c"
#undef main

static const gemma2_model *words;
static constraint machine;
static int32_t of_byte[256];

static double microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

static void compile(const char *text, size_t n, int is_schema)
{
    char err[400];
    array gbnf = {0};
    output out = {.memory = &gbnf};
    close_constraint(&machine);
    double start = microseconds(), took = 0;
    int ok = !is_schema || read_schema(&gbnf, text, n, 0, err, sizeof err);
    if (!is_schema)
        put_bytes(&out, text, n);
    if (getenv("SHOW") && ok)
        fprintf(stderr, "%.*s\n", (int)gbnf.n, (char *)gbnf.items);
    gemma2_grammar *g = ok ? gemma2_grammar_new(words, gbnf.items, (int64_t)gbnf.n, err,
                                                sizeof err) : NULL;
    took = microseconds() - start;
    gemma2_grammar_free(g);
    if (g && open_constraint(&machine, words, gbnf.items, gbnf.n, 0, err, sizeof err))
        printf("ok %.0f\n", took);
    else
        printf("refused %s\n", err);
    free(gbnf.items);
}

static void take_bytes(const char *text, size_t n)
{
    size_t i = 0;
    gemma2_matcher_start(machine.matcher, &machine.state);
    while (i < n && gemma2_matcher_accept(machine.matcher, &machine.state,
                                          of_byte[(unsigned char)text[i]]) == GEMMA2_OK)
        i++;
    if (i == n && may_end(&machine))
        printf("1\n");
    else
        printf("0 %zu\n", i);
}

static void take_tokens(const char *text, size_t n)
{
    size_t room = gemma2_encode_scratch((int64_t)n);
    void *scratch = malloc(room);
    int32_t *ids = malloc((n + 1) * sizeof *ids);
    int64_t count = gemma2_encode(words, text, (int64_t)n, GEMMA2_ENCODE_PLAIN, ids, n + 1, scratch,
                                  room);
    int ok = gemma2_matcher_start(machine.matcher, &machine.state) == 0;
    array line = {0};
    output out = {.memory = &line};
    for (int64_t i = 0; i < count && ok; i++) {
        double start = microseconds();
        ok = gemma2_matcher_allowed(machine.matcher, &machine.state, -1, machine.mask) == GEMMA2_OK;
        put_format(&out, " %.1f", microseconds() - start);
        ok = ok && machine.mask[ids[i] / 32] >> ids[i] % 32 & 1 &&
             gemma2_matcher_accept(machine.matcher, &machine.state, ids[i]) == GEMMA2_OK;
    }
    printf("%d%.*s\n", ok && may_end(&machine), (int)line.n, (char *)line.items);
    free(line.items), free(ids), free(scratch);
}

/* Draws from the tokens of the mask, half of the time from those of at most two bytes. */
static int32_t draw_token(uint32_t *random)
{
    int32_t chosen = -1, n = 0, n_vocab = gemma2_get_config(words)->n_vocab;
    for (int only_short = (*random >> 16) % 2; chosen < 0 && only_short >= 0; only_short--)
        for (int32_t id = 0; id < n_vocab; id++) {
            if (!(machine.mask[id / 32] >> id % 32 & 1) ||
                (only_short && gemma2_piece_bytes(words, id, NULL, 0) > 2))
                continue;
            *random = *random * 1664525 + 1013904223;
            chosen = (int)((*random >> 8) % (uint32_t)++n) ? chosen : id;
        }
    return chosen;
}

static void make_one(const char *asked)
{
    char *end, bytes[256];
    int64_t left = strtoll(asked, &end, 10);
    uint32_t random = (uint32_t)strtoul(end, NULL, 10);
    array line = {0};
    output out = {.memory = &line};
    gemma2_matcher_start(machine.matcher, &machine.state);
    for (int32_t id = -1; left > 0 && !gemma2_is_stop(words, id); left--) {
        if (gemma2_matcher_allowed(machine.matcher, &machine.state, left, machine.mask) < 0 ||
            (id = draw_token(&random)) < 0 ||
            gemma2_matcher_accept(machine.matcher, &machine.state, id) < 0)
            break;
        int64_t n = gemma2_piece_bytes(words, id, bytes, sizeof bytes);
        put_bytes(&out, bytes, (size_t)n);
    }
    printf("%.*s%s\n", (int)line.n, line.n ? (char *)line.items : "",
           may_end(&machine) ? "" : line.n ? " <NO END>" : "");
    free(line.items);
}

int main(int argc, char **argv)
{
    char err[256], letter;
    size_t n;
    words = gemma2_open(argc > 1 ? argv[1] : "tokenizer.bin", NULL, err, sizeof err);
    for (int32_t id = 0; words && id < gemma2_get_config(words)->n_vocab; id++) {
        int piece_kind;
        const char *piece = gemma2_piece(words, id, NULL, &piece_kind);
        if (piece_kind == GEMMA2_PIECE_BYTE)
            of_byte[strtoul(piece + 3, NULL, 16)] = id;
    }
    while (words && scanf(" %c %zu", &letter, &n) == 2 && getchar() == '\n') {
        char *text = calloc(n + 1, 1);
        if (!text || fread(text, 1, n, stdin) != n)
            return 1;
        if (letter == 'S' || letter == 'G')
            compile(text, n, letter == 'S');
        else if (letter == 'R' && machine.matcher)
            make_one(text);
        else if (letter == 'T' || !machine.matcher)
            take_bytes(text, n);
        else
            take_tokens(text, n);
        fflush(stdout);
        free(text);
    }
    close_constraint(&machine);
    gemma2_close((gemma2_model *)words);
    return words == NULL;
}
