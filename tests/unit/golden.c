/* The engine against transformers and SentencePiece, from data that tests/make_golden.py
 * made and this repository holds: every traced activation of tiny random models, however
 * the prompt is cut into calls; token vectors; the demo model's story.
 * test.c has it as "golden" and "tale".  -DGOLDEN_ALONE makes a program of this file, which ends at
 * the first failure:
 *
 *   cc -O2 -ffp-contract=off -DGOLDEN_ALONE tests/unit/golden.c -lm && ./a.out [-v] [tests/golden]
 *
 * -v prints the largest deviations seen.  From the repository's root. */
#include "common.h"

/* ---- Files --------------------------------------------------------------------------- */

static int verbose;
static const char *golden_dir = "tests/golden";

/* The bytes of a golden file and a NUL, or the end of the test. */
static char *golden_file(const char *name, size_t *size)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", golden_dir, name);
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END))
        printf("cannot read %s\n", path), exit(1);
    *size = (size_t)ftell(f);
    rewind(f);
    char *bytes = malloc(*size + 1);
    if (!bytes || fread(bytes, 1, *size, f) != *size)
        printf("cannot read %s\n", path), exit(1);
    fclose(f);
    bytes[*size] = 0;
    return bytes;
}

/* ---- A trace made by transformers (the format is in make_golden.py) ------------------- */

typedef struct {
    char name[33];
    int32_t layer;
    uint32_t rows, cols;
    const float *data;
    float scale; /* largest absolute value; what deviations are measured against */
    int n_seen;  /* rows compared since the session began */
} record;

typedef struct {
    char *bytes;
    record records[256];
    int n_records;
    int32_t ids[1024];
    int n_ids;
    int rows[64]; /* positions that records have rows for */
    int n_rows;
} golden;

static void read_record(const char *at, record *r)
{
    memcpy(r->name, at, 32);
    r->name[32] = 0;
    memcpy(&r->layer, at + 32, 4);
    memcpy(&r->rows, at + 36, 4);
    memcpy(&r->cols, at + 40, 4);
    r->data = (const float *)(at + 44);
    r->scale = 0;
    r->n_seen = 0;
    for (size_t i = 0; i < (size_t)r->rows * r->cols; i++)
        r->scale = fmaxf(r->scale, fabsf(r->data[i]));
}

static void load_golden(golden *g, const char *model)
{
    char name[64];
    size_t size;
    snprintf(name, sizeof name, "%s.trace", model);
    memset(g, 0, sizeof *g);
    g->bytes = golden_file(name, &size);
    for (size_t at = 8; at + 44 <= size && g->n_records < 256;) {
        record *r = &g->records[g->n_records++];
        read_record(g->bytes + at, r);
        at += 44 + (size_t)r->rows * r->cols * sizeof(float);
    }
    g->n_ids = (int)g->records[0].cols;
    g->n_rows = (int)g->records[1].cols;
    for (int i = 0; i < g->n_ids; i++)
        g->ids[i] = (int32_t)g->records[0].data[i];
    for (int i = 0; i < g->n_rows; i++)
        g->rows[i] = (int)g->records[1].data[i];
}

static record *find_record(golden *g, const char *name, int layer)
{
    for (int i = 2; i < g->n_records; i++)
        if (!strcmp(g->records[i].name, name) && g->records[i].layer == layer)
            return &g->records[i];
    return NULL;
}

/* ---- Comparing what the engine traces ------------------------------------------------- */

/* What goes on while a prompt is evaluated.  A pass begins with its embedding; the rows
 * of a pass stand at positions first .. next - 1. */
static struct {
    golden *golden;
    const char *model, *way;
    float tolerance;
    int first, next;
    float worst; /* deviation of an activation, in units of its record's scale */
} watch;

static float deviation(const float *a, const float *b, size_t n)
{
    float worst = 0;
    for (size_t i = 0; i < n; i++) {
        float d = fabsf(a[i] - b[i]);
        if (!(d <= worst)) /* NaN counts */
            worst = d;
    }
    return worst;
}

static void compare_row(record *r, const float *data, int position)
{
    for (int i = 0; i < watch.golden->n_rows; i++) {
        if (watch.golden->rows[i] != position)
            continue;
        float d = deviation(data, r->data + (size_t)i * r->cols, r->cols) / r->scale;
        if (!(d <= watch.worst))
            watch.worst = d;
        check(d <= watch.tolerance, "%s, %s: %s of layer %d at position %d is off by %g",
              watch.model, watch.way, r->name, (int)r->layer, position, d);
        r->n_seen++;
    }
}

/* What gemma2_importance should find, summed up from the trace, the plain way. */
static struct {
    const gemma2_model *model;
    double *sums; /* NULL: not wanted */
    size_t block;
} traced;

static void add_traced(const char *name, int layer, const float *x, size_t rows, size_t cols)
{
    static const char *const traces[] = {"attn_norm", "attn", "ffn_norm", "geglu", "final_norm"};
    int which = 0;
    while (which < 5 && strcmp(name, traces[which]))
        which++;
    gemma2_input input;
    size_t i = which == 4 ? (size_t)traced.model->config.n_layers * 4 : (size_t)(layer * 4 + which);
    if (which == 5 || !gemma2_get_input(traced.model, i, &input))
        return;
    check(input.cols == cols, "importance: %s has %zu columns", name, cols);
    double *sums = traced.sums + traced.block * input.first;
    for (size_t t = 0; t < rows; t++, x += cols)
        for (size_t c = 0; c < cols; c++)
            for (size_t r = 0; r < traced.block && c - c % traced.block + r < cols; r++)
                sums[r * cols + c] += (double)x[c] * (double)x[c - c % traced.block + r];
}

static void on_trace(void *context, const gemma2_activation *a)
{
    const char *name = a->name;
    size_t rows = a->rows, cols = a->cols;
    (void)context;
    if (traced.sums)
        add_traced(name, a->layer, a->data, rows, cols);
    if (!watch.golden)
        return;
    if (!strcmp(name, "embedding"))
        watch.first = watch.next, watch.next += (int)rows;
    record *r = find_record(watch.golden, name, a->layer);
    if (!r || !strcmp(name, "logits")) /* logits are compared where the caller gets them */
        return;
    if (cols != r->cols) {
        check(0, "%s: %s has %zu columns", watch.model, name, cols);
        return;
    }
    /* Where only some rows go on to the head, they are the last ones. */
    int position = watch.next - (int)rows;
    for (size_t i = 0; i < rows; i++)
        compare_row(r, a->data + i * cols, position + (int)i);
}

static void begin_watch(golden *g, const char *model, const char *way, float tolerance)
{
    watch.golden = g;
    watch.model = model;
    watch.way = way;
    watch.tolerance = tolerance;
    watch.first = watch.next = 0;
    for (int i = 0; i < g->n_records; i++)
        g->records[i].n_seen = 0;
}

/* Every row of every record must have been seen, of the last norm only what was asked for. */
static void end_watch(int all_logits)
{
    golden *g = watch.golden;
    watch.golden = NULL;
    for (int i = 2; i < g->n_records; i++) {
        record *r = &g->records[i];
        int expected = strcmp(r->name, "final_norm") || all_logits ? (int)r->rows : 1;
        if (strcmp(r->name, "logits"))
            check(r->n_seen == expected, "%s, %s: %s of layer %d traced %d times, not %d",
                  watch.model, watch.way, r->name, (int)r->layer, r->n_seen, expected);
    }
}

/* ---- Models, whichever way their prompt is evaluated ---------------------------------- */

/* With prefill in the exact class, so that the same bits come out on every CPU. */
static gemma2_model *open_exact(const char *path)
{
    char err[256];
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.exact_prefill = 1;
    gemma2_model *m = gemma2_open(path, &params, err, sizeof err);
    check(m != NULL, "%s: %s", path, m ? "" : err);
    return m;
}

static gemma2_model *open_golden(const char *model)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.bin", golden_dir, model);
    return open_exact(path);
}

/* transformers rounds no keys, nor does the f32 cache that most tests ask for. */
static gemma2_session *new_session(const gemma2_model *m, int n_batch, int n_threads, int cache)
{
    char err[256];
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_batch = n_batch;
    params.n_threads = n_threads;
    params.cache_type = cache;
    gemma2_session *s = gemma2_session_new(m, &params, err, sizeof err);
    check(s != NULL, "session: %s", s ? "" : err);
    gemma2_set_hook(s, on_trace, NULL);
    return s;
}

/* Appends ids[0 .. n) in one shared pass and receives all their logits [n, V]. */
static int eval_all(gemma2_session *s, const int32_t *ids, size_t n, float *logits, size_t V)
{
    gemma2_row rows[1024];
    for (size_t i = 0; i < n; i++) {
        gemma2_row row = {.session = s, .id = ids[i], .logits = logits + i * V};
        rows[i] = row;
    }
    return gemma2_eval_rows(rows, n);
}

/* Ways to cut a prompt, as sizes of passes, repeated to its end.  The window is 8. */
typedef struct {
    const char *name;
    int n_batch, n_threads, chunks[8];
} cutting;
static const cutting CUTS[] = {
    {"one pass", 300, 1, {300}},
    {"single steps", 1, 1, {1}},
    {"odd chunks", 17, 1, {3, 1, 7, 17, 2, 9, 8, 5}},
    {"chunks of 8", 8, 3, {8}},
};

/* Logits of all positions [n_ids, V]; 0 when a call failed. */
static int eval_cut(gemma2_session *s, const golden *g, const cutting *c, float *logits, size_t V)
{
    for (int at = 0, i = 0; at < g->n_ids; i = (i + 1) % 8) {
        int n = c->chunks[i] ? c->chunks[i] : c->chunks[i = 0];
        if (n > g->n_ids - at)
            n = g->n_ids - at;
        if (eval_all(s, g->ids + at, (size_t)n, logits + (size_t)at * V, V) < 0)
            return 0;
        at += n;
    }
    return 1;
}

typedef struct {
    const char *name;
    float logits, activations; /* tolerances: absolute; relative to the record's maximum */
} expectation;

static void compare_logits(golden *g, const expectation *e, const char *way,
                           const float *logits, size_t V)
{
    const record *r = find_record(g, "logits", 0);
    float worst = 0;
    for (int i = 0; i < g->n_rows; i++) {
        float d = deviation(logits + (size_t)g->rows[i] * V, r->data + (size_t)i * V, V);
        if (!(d <= worst))
            worst = d;
        check(d <= e->logits, "%s, %s: logits at position %d are off by %g", e->name, way,
              g->rows[i], d);
    }
    if (verbose)
        printf("%-7s %-13s logits off by %.2g, activations by %.2g\n", e->name, way, worst,
               watch.worst);
}

/* One way to evaluate a prompt.  Every way must give the bits of the first. */
static void test_cut(const gemma2_model *m, golden *g, const expectation *e, const cutting *c,
                     float *logits, const float *first)
{
    size_t V = (size_t)gemma2_get_config(m)->n_vocab;
    gemma2_session *s = new_session(m, c->n_batch, c->n_threads, GEMMA2_CACHE_F32);
    watch.worst = 0;
    begin_watch(g, e->name, c->name, e->activations);
    check(s && eval_cut(s, g, c, logits, V), "%s, %s: a call failed", e->name, c->name);
    end_watch(1);
    compare_logits(g, e, c->name, logits, V);
    check(!memcmp(logits, first, (size_t)g->n_ids * V * sizeof *logits),
          "%s: %s and %s differ", e->name, c->name, CUTS[0].name);
    gemma2_session_free(s);
}

/* Caches that round: the engine in odd chunks and the reference token by token, to the bit. */
static void test_caches(gemma2_model *m, const golden *g, const char *name, float *logits,
                        float *truth)
{
    size_t V = (size_t)gemma2_get_config(m)->n_vocab;
    for (int cache = GEMMA2_CACHE_F16; cache <= GEMMA2_CACHE_Q8; cache++) {
        for (int i = 0; i < 2; i++) {
            m->is_reference = i == 0;
            gemma2_session *s = new_session(m, 17, 1, cache);
            check(eval_cut(s, g, &CUTS[i ? 2 : 1], i ? logits : truth, V), "%s: cache", name);
            gemma2_session_free(s);
        }
        check(!memcmp(logits, truth, (size_t)g->n_ids * V * sizeof *logits),
              "%s, cache %d: the reference differs", name, cache);
    }
}

/* gemma2_prefill, in passes of 32, and a rewind over half a window. */
static void test_prefill(const gemma2_model *m, golden *g, const expectation *e,
                         float *logits, const float *first)
{
    size_t V = (size_t)gemma2_get_config(m)->n_vocab, last = (size_t)g->n_ids - 1;
    gemma2_session *s = new_session(m, 32, 1, GEMMA2_CACHE_F32);
    begin_watch(g, e->name, "prefill", e->activations);
    check(gemma2_prefill(s, g->ids, (size_t)g->n_ids, logits) >= 0, "%s: prefill", e->name);
    end_watch(0);
    check(deviation(logits, first + last * V, V) <= e->logits, "%s: prefill is off by %g",
          e->name, deviation(logits, first + last * V, V));
    check(gemma2_rewind(s, g->n_ids - 4) >= 0, "%s: rewind", e->name);
    check(gemma2_eval(s, g->ids + g->n_ids - 4, 4, logits) >= 0, "%s: eval", e->name);
    check(deviation(logits, first + last * V, V) <= e->logits, "%s: off after a rewind",
          e->name);
    gemma2_session_free(s);
}

/* Log-probabilities of the prompt's tokens, from transformers' logits in double. */
static void test_scores(const gemma2_model *m, golden *g, const expectation *e)
{
    const record *r = find_record(g, "logits", 0);
    float got[1024];
    gemma2_session *s = new_session(m, 24, 1, GEMMA2_CACHE_F32);
    check(gemma2_score(s, g->ids, (size_t)g->n_ids, -1, got) >= 0, "%s: score", e->name);
    for (int i = 0; i < g->n_rows && g->rows[i] + 1 < g->n_ids; i++) {
        const float *x = r->data + (size_t)i * r->cols;
        double sum = 0, id = x[g->ids[g->rows[i] + 1]];
        for (uint32_t v = 0; v < r->cols; v++)
            sum += exp((double)x[v]);
        check(fabs(got[g->rows[i]] - (id - log(sum))) <= 2 * (double)e->logits,
              "%s: score at %d is %g, not %g", e->name, g->rows[i], got[g->rows[i]],
              id - log(sum));
    }
    gemma2_session_free(s);
}

/* Text starts with one BOS, when asked for; both stop ids count, whatever config.json
 * says (Gemma's 9B and 27B name only <eos>). */
static void test_bos_and_stop(const gemma2_model *m, const char *name)
{
    const gemma2_config *c = gemma2_get_config(m);
    int32_t ids[16];
    char scratch[16384];
    size_t size = gemma2_encode_scratch(5);
    check(size <= sizeof scratch, "%s: scratch for 5 bytes: %zu", name, size);
    int64_t n = gemma2_encode(m, "a<b>c", 5, 0, ids, 16, scratch, sizeof scratch);
    check(n == 3 && ids[0] != 2 && ids[1] == 12, "%s: a<b>c has %d ids", name, (int)n);
    n = gemma2_encode(m, "a<b>c", 5, GEMMA2_ENCODE_BOS, ids, 16, scratch, sizeof scratch);
    check(n == 4 && ids[0] == 2 && ids[1] != 2, "%s: BOS is not there once", name);
    n = gemma2_encode(m, "", 0, GEMMA2_ENCODE_BOS, ids, 16, scratch, sizeof scratch);
    check(n == 1 && ids[0] == 2, "%s: empty text", name);
    check(c->bos == 2 && c->eos == 1 && c->pad == 0 && c->unk == 3, "%s: ids", name);
    check(c->start_of_turn == 4 && c->end_of_turn == 5, "%s: turn markers", name);
    check(gemma2_is_stop(m, 1) && gemma2_is_stop(m, 5), "%s: stop ids", name);
    check(!gemma2_is_stop(m, 2) && !gemma2_is_stop(m, 4) && !gemma2_is_stop(m, 0),
          "%s: ids that do not stop", name);
}

static void test_traces(const expectation *e)
{
    static golden g;
    gemma2_model *m = open_golden(e->name);
    if (!m)
        return;
    load_golden(&g, e->name);
    size_t V = (size_t)gemma2_get_config(m)->n_vocab, floats = (size_t)g.n_ids * V;
    float *first = malloc(floats * sizeof(float)), *logits = malloc(floats * sizeof(float));
    if (!first || !logits || find_record(&g, "logits", 0)->cols != V)
        printf("%s: %zu logits\n", e->name, V), exit(1);
    for (size_t i = 0; i < sizeof CUTS / sizeof *CUTS; i++)
        test_cut(m, &g, e, &CUTS[i], i ? logits : first, first);
    m->is_reference = 1;
    test_cut(m, &g, e, &(cutting){"reference", 1, 1, {1}}, logits, first);
    m->is_reference = 0;
    test_prefill(m, &g, e, logits, first);
    test_scores(m, &g, e);
    test_bos_and_stop(m, e->name);
    test_caches(m, &g, e->name, logits, first);
    free(first), free(logits), free(g.bytes);
    gemma2_close(m);
}

/* ---- Token vectors --------------------------------------------------------------------- */

/* One line of tokens.txt: kind, bytes, count, ids. */
typedef struct {
    char kind;
    uint8_t *bytes;
    size_t n_bytes, n_ids;
    int32_t *ids;
} vector;

static char *next_word(char **at)
{
    char *word = *at, *end = word + strcspn(word, " \n");
    *at = *end ? end + 1 : end;
    *end = 0;
    return word;
}

/* Decodes hexadecimal in place. */
static size_t unhex(uint8_t *bytes)
{
    size_t n = 0;
    const char *hex = (const char *)bytes;
    for (unsigned value; hex[0] != '-' && sscanf(hex + 2 * n, "%2x", &value) == 1; n++)
        bytes[n] = (uint8_t)value;
    return n;
}

static int next_vector(char **at, vector *v)
{
    if (!**at)
        return 0;
    v->kind = *next_word(at);
    v->bytes = (uint8_t *)next_word(at);
    v->n_bytes = unhex(v->bytes);
    v->n_ids = strtoul(next_word(at), NULL, 10);
    v->ids = malloc((v->n_ids + 1) * sizeof *v->ids);
    for (size_t i = 0; v->ids && i < v->n_ids; i++)
        v->ids[i] = (int32_t)strtol(next_word(at), NULL, 10);
    return v->ids != NULL;
}

static void test_encode(const gemma2_model *m, const vector *v, int line)
{
    size_t size = gemma2_encode_scratch(v->n_bytes), room = v->n_ids + 1;
    unsigned flags = v->kind == 'P' ? GEMMA2_ENCODE_PLAIN : 0;
    void *scratch = malloc(size);
    int32_t *ids = malloc(room * sizeof *ids);
    int64_t n = gemma2_encode(m, (const char *)v->bytes, (int64_t)v->n_bytes, flags, ids,
                              room, scratch, size);
    check(n == (int64_t)v->n_ids && !memcmp(ids, v->ids, v->n_ids * sizeof *ids),
          "tokens, line %d: encodes to %d ids, expected %zu", line, (int)n, v->n_ids);
    free(scratch), free(ids);
}

static void test_decode(const gemma2_model *m, const vector *v, int line)
{
    size_t piece = (size_t)gemma2_get_config(m)->max_piece_bytes + 12, used = 0;
    char *text = malloc((v->n_ids + 1) * piece);
    gemma2_utf8 hold = {{0}, 0};
    for (size_t i = 0; i <= v->n_ids; i++) {
        int32_t id = i < v->n_ids ? v->ids[i] : -1;
        int n = gemma2_decode(m, &hold, id, text + used, piece);
        check(n >= 0, "tokens, line %d: decode returns %d", line, n);
        used += n > 0 ? (size_t)n : 0;
    }
    check(used == v->n_bytes && !memcmp(text, v->bytes, used),
          "tokens, line %d: decodes to %zu bytes, expected %zu", line, used, v->n_bytes);
    free(text);
}

static void test_tokens(const char *tokenizer)
{
    char err[256];
    gemma2_model *m = gemma2_open(tokenizer, NULL, err, sizeof err);
    check(m != NULL, "%s: %s", tokenizer, m ? "" : err);
    if (!m)
        return;
    size_t size;
    char *file = golden_file("tokens.txt", &size), *at = file;
    vector v;
    for (int line = 1; next_vector(&at, &v); line++) {
        if (v.kind == 'D')
            test_decode(m, &v, line);
        else
            test_encode(m, &v, line);
        free(v.ids);
    }
    free(file);
    gemma2_close(m);
}

/* ---- The demo model's story -------------------------------------------------------------- */

/* Greedy: prompt v, then the ids of story. */
static void follow_story(const gemma2_model *m, const vector *v, const vector *story)
{
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_threads = 1;
    gemma2_session *s = gemma2_session_new(m, &params, NULL, 0);
    gemma2_sampler greedy;
    gemma2_sampler_init(&greedy, 1);
    greedy.temperature = 0;
    float *logits = malloc(sizeof(float) * (size_t)gemma2_get_config(m)->n_vocab);
    int32_t bos = gemma2_get_config(m)->bos;
    check(s && logits && gemma2_prefill(s, &bos, 1, NULL) >= 0, "story: session");
    check(gemma2_prefill(s, v->ids, v->n_ids, logits) >= 0, "story: prompt");
    size_t same = 0;
    while (same < story->n_ids && gemma2_sample(s, &greedy, logits) == story->ids[same] &&
           gemma2_eval(s, &story->ids[same], 1, logits) >= 0)
        same++;
    check(same == story->n_ids, "story: %zu tokens as expected, then another", same);
    gemma2_session_free(s);
    free(logits);
}

static void test_story(const char *path)
{
    gemma2_model *m = open_exact(path);
    if (!m)
        return;
    size_t size;
    char *file = golden_file("story.txt", &size), *at = file;
    vector prompt, story;
    if (next_vector(&at, &prompt) && next_vector(&at, &story)) {
        test_encode(m, &prompt, 1);
        test_decode(m, &story, 2);
        follow_story(m, &prompt, &story);
        free(prompt.ids), free(story.ids);
    }
    free(file);
    gemma2_close(m);
}

/* ---- The matrix class loses no more than the exact class ---------------------------------- */

enum { TALE_STEP = 2, TALE_PLACES = 400 };

/* A row as q4, the plain way: its scales from absolute maxima, then the nearest values. */
static void put_q4(uint8_t *tile, uint32_t lane, const float *row, uint32_t cols)
{
    float largest = 0;
    for (uint32_t i = 0; i < cols; i++)
        largest = fabsf(row[i]) > largest ? fabsf(row[i]) : largest;
    float *scale = (float *)tile + lane;
    *scale = largest / (63 * 28);
    for (uint32_t g = 0; g < cols / GROUP; g++) {
        const uint8_t *scale_bytes, *group = group_at(TYPE_Q4, tile, g, &scale_bytes);
        const float *x = row + g * GROUP;
        float most = 0;
        for (int i = 0; i < GROUP; i++)
            most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        float s = ceilf(most / (*scale * 28) - 0.01f);
        tile[scale_bytes - tile + lane] = (uint8_t)((int)s << 1);
        for (uint32_t i = 0; i < GROUP; i++) {
            int best = 0;
            for (int c = 1; c < 16; c++)
                if (fabsf(x[i] - *scale * s * CODEBOOK[c]) <
                    fabsf(x[i] - *scale * s * CODEBOOK[best]))
                    best = c;
            tile[group - tile + i / 8 * 64 + lane * 4 + i % 4] |= (uint8_t)(best << (i & 4));
        }
    }
}

/* The weights of a matrix as another type: f32, rounded to bf16, or q4. */
static void retype(struct tensor *w, uint32_t type)
{
    size_t tile = tile_bytes(type, w->cols), tiles = (w->rows + TILE - 1) / TILE;
    uint8_t *data = calloc(tiles, tile);
    float *row = malloc(w->cols * sizeof *row);
    if (!data || !row)
        printf("out of memory\n"), exit(1);
    for (uint32_t r = 0; r < w->rows; r++) {
        uint8_t *to = data + r / TILE * tile;
        read_row(w, r, row);
        if (type == TYPE_Q4)
            put_q4(to, r % TILE, row, w->cols);
        for (uint32_t i = 0; i < w->cols && type != TYPE_Q4; i++)
            if (type == TYPE_F32)
                ((float *)to)[i * TILE + r % TILE] = row[i];
            else
                ((uint16_t *)to)[i / 2 * 32 + r % TILE * 2 + i % 2] =
                    (uint16_t)((bits_of(row[i]) + 0x8000) >> 16);
    }
    free(row);
    w->data = data, w->type = type, w->tile_bytes = tile;
}

/* The matrices of a tied model that a pass multiplies with: embedding first. */
static size_t list_matrices(gemma2_model *m, struct tensor **list)
{
    size_t n = 0;
    list[n++] = &m->embedding;
    for (int l = 0; l < m->config.n_layers; l++) {
        struct layer *w = &m->layers[l];
        struct tensor *all[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            list[n++] = all[i];
    }
    return n;
}

/* The demo model with every matrix retyped.  It shares all else with m. */
static gemma2_model *retyped(const gemma2_model *m, uint32_t type)
{
    struct tensor *list[64];
    size_t bytes = sizeof *m + sizeof(struct layer) * (size_t)m->config.n_layers;
    gemma2_model *copy = malloc(bytes);
    if (!copy)
        printf("out of memory\n"), exit(1);
    memcpy(copy, m, bytes);
    for (size_t i = list_matrices(copy, list); i-- > 0;)
        retype(list[i], type);
    copy->head = copy->embedding;
    return copy;
}

static void free_retyped(gemma2_model *copy)
{
    struct tensor *list[64];
    for (size_t i = list_matrices(copy, list); i-- > 0;)
        free((void *)(uintptr_t)list[i]->data);
    free(copy);
}

/* Logits after every second token of the tale, in the matrix class or the exact one. */
static float *read_tale(gemma2_model *m, const struct matrix_kernels *matrix, const int32_t *ids,
                        int32_t cache)
{
    size_t V = (size_t)gemma2_get_config(m)->n_vocab;
    float *logits = malloc(TALE_PLACES * V * sizeof *logits);
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_threads = 1, params.cache_type = cache;
    m->matrix = matrix;
    gemma2_session *s = gemma2_session_new(m, &params, NULL, 0);
    for (size_t i = 0; i < TALE_PLACES; i++)
        check(s && gemma2_prefill(s, ids + i * TALE_STEP, TALE_STEP, logits + i * V) >= 0, "tale");
    gemma2_session_free(s);
    return logits;
}

/* Mean divergence of the predictions in y from those in x, in nats.  Frees y. */
static double divergence(const float *x, float *y, size_t V)
{
    double total = 0;
    for (size_t i = 0; i < TALE_PLACES; i++, x += V) {
        double sums[2] = {0, 0}, kl = 0;
        for (size_t v = 0; v < V; v++)
            sums[0] += exp((double)x[v]), sums[1] += exp((double)y[i * V + v]);
        for (size_t v = 0; v < V; v++)
            kl += exp((double)x[v]) / sums[0] *
                  ((double)x[v] - y[i * V + v] - log(sums[0] / sums[1]));
        total += kl / TALE_PLACES;
    }
    free(y);
    return total;
}

/* Rows whose matrix class multiplies quantised weights, with q4: its inputs keep more bits. */
static void tale_q4(const gemma2_model *m, const struct kernels *row, const int32_t *ids, size_t V)
{
    gemma2_model *q4 = retyped(m, TYPE_Q4), *f32 = retyped(q4, TYPE_F32);
    float *truth = read_tale(f32, NULL, ids, GEMMA2_CACHE_F16);
    double exact = divergence(truth, read_tale(q4, NULL, ids, GEMMA2_CACHE_F16), V);
    double d4 = divergence(truth, read_tale(q4, row->matrix, ids, GEMMA2_CACHE_F16), V);
    if (verbose)
        printf("tale, %s: q4 %.3g, in the matrix class %.3g\n", row->name, exact, d4);
    check(d4 <= 0.4 * exact, "tale, %s: q4 diverges by %g, exact by %g", row->name, d4, exact);
    free(truth);
    free_retyped(q4), free_retyped(f32);
}

/* Divergence from f32 weights and exact arithmetic.  Next to what int8 inputs cost with q8
 * weights, the matrix class may add 5 %, or cost 40 % where it does not round to int8; with
 * bf16 weights it costs a fifth. */
static void test_tale(void)
{
    size_t size;
    char *text = golden_file("tale.txt", &size);
    gemma2_model *q8 = open_exact("tests/demo/story-q8.bin");
    if (!q8)
        return;
    size_t scratch_size = gemma2_encode_scratch(size), V = (size_t)q8->config.n_vocab;
    char *scratch = malloc(scratch_size);
    int32_t ids[TALE_STEP * TALE_PLACES];
    int64_t n = gemma2_encode(q8, text, (int64_t)size, GEMMA2_ENCODE_BOS, ids,
                              TALE_STEP * TALE_PLACES, scratch, scratch_size);
    check(n >= TALE_STEP * TALE_PLACES, "the tale has %d tokens", (int)n);
    gemma2_model *bf16 = retyped(q8, TYPE_BF16), *f32 = retyped(q8, TYPE_F32);
    float *truth = read_tale(f32, NULL, ids, GEMMA2_CACHE_F16);
    float *rounded = read_tale(bf16, NULL, ids, GEMMA2_CACHE_F16);
    double exact = divergence(truth, read_tale(q8, NULL, ids, GEMMA2_CACHE_F16), V);
    check(exact > 1e-6 && exact < 1e-3, "tale: q8 diverges by %g", exact);
    float *f16_cache = read_tale(q8, NULL, ids, GEMMA2_CACHE_F16);
    double d_cache = divergence(f16_cache, read_tale(q8, NULL, ids, GEMMA2_CACHE_Q8), V);
    if (verbose)
        printf("tale: 8-bit cache %.3g\n", d_cache);
    check(d_cache > 0 && d_cache <= 1e-3, "tale: the 8-bit cache diverges by %g", d_cache);
    for (int i = 0; i < N_KERNELS; i++)
        if (has_matrix(all_kernels[i])) {
            q8->isa = all_kernels[i];
            d_cache = divergence(f16_cache,
                                 read_tale(q8, q8->isa->matrix, ids, GEMMA2_CACHE_Q8), V);
            if (verbose)
                printf("tale, %s: 8-bit cache in the matrix class %.3g\n", q8->isa->name, d_cache);
            check(d_cache > 0 && d_cache <= 1e-3, "tale, %s: the 8-bit cache diverges by %g",
                  q8->isa->name, d_cache);
            int in_bf16 = all_kernels[i]->matrix->types >> TYPE_Q8 & 1;
            q8->isa = bf16->isa = all_kernels[i];
            double d8 = divergence(truth,
                                   read_tale(q8, q8->isa->matrix, ids, GEMMA2_CACHE_F16), V);
            double d16 = divergence(rounded,
                                    read_tale(bf16, bf16->isa->matrix, ids, GEMMA2_CACHE_F16), V);
            if (verbose)
                printf("tale, %s: q8 %.3g, in the matrix class %.3g; bf16 %.3g\n",
                       all_kernels[i]->name, exact, d8, d16);
            check(d8 <= (in_bf16 ? 0.4 : 1.05) * exact, "tale, %s: q8 diverges by %g, exact by %g",
                  all_kernels[i]->name, d8, exact);
            check(d16 <= 0.2 * exact, "tale, %s: bf16 diverges by %g", all_kernels[i]->name, d16);
            if (in_bf16)
                tale_q4(q8, all_kernels[i], ids, V);
        }
    free(truth), free(rounded), free(f16_cache), free(scratch), free(text);
    free_retyped(bf16), free_retyped(f32);
    gemma2_close(q8);
}

/* ------------------------------------------------------------------------------------------ */


/* Tolerances are about four times the largest deviation seen (-v prints them). */
static const expectation MODELS[] = {
    {"both", 1e-4f, 2e-5f},  {"untied", 7e-5f, 1e-5f}, {"final", 3e-5f, 6e-6f},
    {"long", 4e-5f, 1e-5f},  {"mixed", 2e-5f, 1e-5f},
    {"three", 2e-5f, 1e-5f},
};

/* ---- gemma2_importance ---------------------------------------------------------------- */

enum { IMPORTANT = 40 };

/* Layout of the entries; columns of all of them. */
static size_t check_inputs(const gemma2_model *m)
{
    const gemma2_config *c = gemma2_get_config(m);
    uint64_t first = 0;
    gemma2_input x;
    size_t n = 0;
    for (; gemma2_get_input(m, n, &x); n++) {
        int layer = (int)(n / 4) < c->n_layers ? (int)(n / 4) : -1, which = (int)(n % 4);
        const char *role = layer < 0 ? "head" : (const char *[]){"q", "o", "gate", "down"}[which];
        int cols = layer >= 0 && which == 1 ? c->n_heads * c->head_dim
                   : layer >= 0 && which == 3 ? c->d_ffn : c->d_model;
        check(x.layer == layer && !strcmp(x.role, role) && x.cols == (uint32_t)cols &&
                  x.first == first, "input %zu: %s of layer %d", n, x.role, (int)x.layer);
        first += x.cols;
    }
    check(n == (size_t)c->n_layers * 4 + 1, "%zu inputs", n);
    return (size_t)first;
}

/* The sums of a session with these settings, tokens in calls of some length. */
static void gather_as(const gemma2_model *m, const int32_t *ids, uint32_t block, int n_batch,
                      int n_threads, size_t step, double *sums)
{
    gemma2_session *s = new_session(m, n_batch, n_threads, GEMMA2_CACHE_F32);
    for (size_t at = 0; at < IMPORTANT; at += step) {
        size_t n = IMPORTANT - at < step ? IMPORTANT - at : step;
        int status = gemma2_importance(s, ids + at, n, block, sums);
        check(status == GEMMA2_OK, "importance: %s", gemma2_error_string(status));
    }
    check(gemma2_position(s) == IMPORTANT, "importance: position");
    gemma2_session_free(s);
}

/* Sums against the trace, to the bit, however tokens are cut and shared. */
static void test_block(const gemma2_model *m, const int32_t *ids, uint32_t block, size_t columns)
{
    static const struct { int n_batch, n_threads; size_t step; } ways[] = {
        {IMPORTANT, 1, IMPORTANT}, {1, 1, 7}, {9, 3, 20}, {IMPORTANT, 2, 11}};
    size_t n = columns * block, V = (size_t)gemma2_get_config(m)->n_vocab;
    double *want = calloc(n, sizeof *want), *got = malloc(n * sizeof *got);
    float *logits = malloc(IMPORTANT * V * sizeof *logits);
    gemma2_session *s = new_session(m, IMPORTANT, 1, GEMMA2_CACHE_F32);
    traced.model = m, traced.sums = want, traced.block = block;
    check(eval_all(s, ids, IMPORTANT, logits, V) == GEMMA2_OK, "importance: traced pass");
    traced.sums = NULL;
    check(want[0] > 0, "importance: nothing was traced");
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        memset(got, 0, n * sizeof *got);
        gather_as(m, ids, block, ways[w].n_batch, ways[w].n_threads, ways[w].step, got);
        check(!memcmp(want, got, n * sizeof *got), "importance, block %u: way %zu", block, w);
    }
    check(gemma2_importance(s, ids, 1, block + 1, got) == GEMMA2_ERR_ARGUMENT &&
              gemma2_importance(s, ids, 1, block, NULL) == GEMMA2_ERR_ARGUMENT &&
              gemma2_importance(s, ids, 0, block, got) == GEMMA2_ERR_ARGUMENT &&
              gemma2_position(s) == IMPORTANT, "importance: bad arguments");
    gemma2_session_free(s);
    free(want), free(got), free(logits);
}

static void test_importance(const char *path, uint32_t block)
{
    gemma2_model *m = open_exact(path);
    if (!m)
        return;
    int32_t ids[IMPORTANT];
    for (int i = 0; i < IMPORTANT; i++)
        ids[i] = i ? i * 97 % gemma2_get_config(m)->n_vocab : 2;
    size_t columns = check_inputs(m);
    test_block(m, ids, block, columns);
    gemma2_close(m);
}

static void test_golden(void)
{
    char mixed[1024]; /* dimensions that no block divides */
    snprintf(mixed, sizeof mixed, "%s/mixed.bin", golden_dir);
    for (size_t i = 0; i < sizeof MODELS / sizeof *MODELS; i++)
        test_traces(&MODELS[i]);
    test_importance(mixed, 1);
    test_importance(mixed, 96); /* more than any of its columns */
    test_importance("tests/demo/story-q8.bin", 96);
    test_tokens("tokenizer.bin");
    test_story("tests/demo/story-q8.bin");
}

#ifdef GOLDEN_ALONE
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "-v"))
            verbose = 1;
        else
            golden_dir = argv[i];
    test_golden();
    if (verbose)
        test_tale();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
#endif
