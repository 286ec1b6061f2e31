/* Fuzzing: thirteen targets, each a function from bytes to a use of the library or the program, in
 * which nothing may crash, leak, hang or break a promise of gemma2.h.
 *
 *   weights    a file image: open, check, encode, plan, sessions, every way to evaluate
 *   tokenizer  a vocabulary and a text: what is encoded comes back, for any vocabulary
 *   encode     a text, by the real vocabulary and by a small one
 *   decode     ids, by the same
 *   chat       facts of a template, then messages: no text forges a mark of the vocabulary
 *   session    a saved session: restored and used, or refused and nothing changed
 *   ahead      calls of one session with guesses and of one without: the same results
 *   grammar    a grammar: refused, or every reply that masks allow is taken and ends in time
 *   schema     a JSON Schema: refused, or a grammar
 *   json       a text: refused, or what its nodes say is what it says
 *   cli        arguments and standard input of ./run
 *   editor     keys of a conversation: the cursor is where the editor takes it to be
 *   batch      lines of run --batch: JSON, requests, and going on after an earlier run
 *
 * Mutation alone would die at magic numbers and digests.  So mutate_weights and mutate_session
 * change fields, entries and sections of a sound file, or build another, and then seal it
 * again; tokenizer and cli read their bytes as a grammar that makes something sensible of all.
 *
 * make fuzz SECONDS=n runs libFuzzer on each (tests/fuzz.sh); GEMMA2_FUZZ names the target.
 * -DREPLAY makes a program of it that needs no libFuzzer: every file of tests/fuzz/TARGET, and
 * mutants of each.  A file there that is named after what it broke was a crash once.
 * run.c comes with tests/fuzz_run.c and main renamed to run_main: name no main before it here. */
#undef main
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include "../gemma2.c"
#include "model.h"
#include "text.h"

#include <dirent.h>

int run_main(int argc, char **argv);                 /* run.c */
void edit_bytes(const uint8_t *data, size_t size); /* fuzz_run.c */
void read_json(const uint8_t *data, size_t size);

/* libFuzzer's own mutation, or REPLAY's below. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);

static const char *input_name = "input";

static void holds(int promise, const char *what)
{
    if (promise)
        return;
    fprintf(stderr, "%s: broken promise: %s\n", input_name, what);
    abort();
}

/* ---- Text that any vocabulary must bring back --------------------------------------------- */

enum { MOST_TEXT = 2000, MOST_IDS = 3 * MOST_TEXT + 1 };

/* U+2581 and the space are one in pieces. */
static size_t with_spaces(char *text, size_t n)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++)
        if (n - i >= 3 && !memcmp(text + i, "\xe2\x96\x81", 3)) {
            text[at++] = ' ';
            i += 2;
        } else
            text[at++] = text[i];
    return at;
}

/* Every id may come from text under the flags.  Returns whether one is unk. */
static int ids_are_legal(const gemma2_model *m, const int32_t *ids, int64_t n, unsigned flags)
{
    int unknown = 0;
    for (int64_t i = 0; i < n; i++) {
        int kind = 0;
        holds(gemma2_piece(m, ids[i], NULL, &kind) != NULL, "ids lie in the vocabulary");
        if (ids[i] == gemma2_get_config(m)->unk) /* of whatever kind */
            unknown = 1;
        else
            holds(kind != GEMMA2_PIECE_CONTROL && kind != GEMMA2_PIECE_UNUSED &&
                      kind != GEMMA2_PIECE_UNKNOWN, "no control piece comes from text");
        holds(!(flags & GEMMA2_ENCODE_PLAIN) || kind != GEMMA2_PIECE_MARKER ||
                  ids[i] == gemma2_get_config(m)->unk, "PLAIN gives no marker");
    }
    return unknown;
}

static void text_comes_back(const gemma2_model *m, const char *text, size_t n, unsigned flags)
{
    static int32_t ids[MOST_IDS], some[MOST_IDS];
    size_t room = (size_t)gemma2_get_config(m)->max_piece_bytes + 12;
    int64_t count = encode(m, text, n, flags, ids, MOST_IDS);
    holds(count >= 0 && count <= (int64_t)(3 * n), "a text has a bounded number of ids");
    holds(encode(m, text, n, flags, NULL, 0) == count, "counting gives the same count");
    size_t half = (size_t)count / 2;
    memset(some, 0x55, ((size_t)count + 1) * sizeof *some);
    holds(encode(m, text, n, flags, some, half) == count &&
              !memcmp(some, ids, half * sizeof *ids) && some[half] == 0x55555555,
          "a short buffer takes the first ids and no more");
    if (ids_are_legal(m, ids, count, flags))
        return;
    char *want = malloc(3 * n + 1), *got = malloc(room * ((size_t)count + 1));
    if (!want || !got)
        printf("out of memory\n"), exit(1);
    size_t n_want = with_spaces(want, repaired((const uint8_t *)text, n, want));
    size_t n_got = with_spaces(got, decode_all(m, ids, count, got));
    holds(n_want == n_got && !memcmp(want, got, n_got), "a text comes back");
    free(want), free(got);
}

/* ---- Using a model ------------------------------------------------------------------------ */

/* Sums of squares over one more token, in exactly the memory they need. */
static void weigh_inputs(gemma2_session *s, uint8_t wish)
{
    static const uint32_t blocks[] = {1, 32, 96, 1024, 0, 33};
    uint32_t block = blocks[wish % 6];
    int legal = wish % 6 < 4;
    gemma2_input input = {0};
    int32_t id = wish % s->model->config.n_vocab, at = gemma2_position(s);
    for (size_t i = 0; gemma2_get_input(s->model, i, &input); i++)
        ;
    size_t n = (size_t)(input.first + input.cols) * block;
    double *sums = fresh(n * sizeof *sums);
    memset(sums, 0, n * sizeof *sums);
    int status = gemma2_importance(s, &id, 1, block, sums);
    holds(status == (at == gemma2_context(s) ? GEMMA2_ERR_CONTEXT
                     : legal ? GEMMA2_OK : GEMMA2_ERR_ARGUMENT), "importance");
    for (size_t i = 0; status == GEMMA2_OK && block == 1 && i < n; i++)
        holds(!(sums[i] < 0), "a square is not negative");
    free(sums);
}

/* A session as the bytes p[8] want it, or NULL; what it takes is what the plan says.  Contexts
 * of 300 have two blocks of positions.  The number of threads, even 1, decides how these are shared
 * out. */
static gemma2_session *any_session(const gemma2_model *m, const uint8_t *p)
{
    gemma2_session_params params;
    gemma2_plan plan = {0, 0, 0, 0};
    gemma2_session_params_init(&params);
    params.n_context = p[0] < 250 ? 1 + p[0] % 40 : 300;
    params.n_batch = p[1] % 12;
    params.n_threads = p[1] / 64 ? 1 : 3;
    params.window = p[2] % 4 || !m->config.window ? 0 : 1 + p[2] / 4 % m->config.window;
    params.cache_type = p[3] % 4;
    if (gemma2_session_plan(m, &params, &plan) != GEMMA2_OK || plan.total > 1 << 23)
        return NULL;
    void *memory = fresh(plan.total);
    memset(memory, 0xff, plan.total);
    gemma2_session *s = gemma2_session_place(m, &params, memory, plan.total, NULL, 0);
    holds(s != NULL, "a session that has a plan can be had");
    return s;
}

static void any_sampler(gemma2_sampler *p, const uint8_t *bytes)
{
    static const float reals[] = {1, 0, 0.5f, 1e-30f, 1e6f, 0.999f, -1, 2};
    static const float biases[] = {0, 1, -INFINITY, INFINITY, NAN, 3e38f, -3e38f, 1e-45f};
    static gemma2_bias bias[2];
    gemma2_sampler_init(p, bytes[0]);
    p->temperature = reals[bytes[1] % 8];
    p->top_k = bytes[2] % 9;
    p->top_p = reals[bytes[3] % 8];
    p->min_p = reals[bytes[4] % 8];
    p->repetition_penalty = 1 + reals[bytes[5] % 8] / 4;
    p->presence_penalty = reals[bytes[6] % 8] - 1;
    bias[0] = (gemma2_bias){bytes[6] / 64, biases[bytes[6] / 8 % 8]};
    bias[1] = (gemma2_bias){bytes[7] / 16 - 1, biases[bytes[7] / 2 % 8]};
    p->bias = bias, p->n_bias = bytes[7] % 3;
}

static void sample_soundly(gemma2_session *s, const float *logits, const uint8_t *bytes)
{
    const gemma2_model *m = s->model;
    gemma2_sampler sampler;
    any_sampler(&sampler, bytes);
    int finite = all_finite(logits, vocab(m));
    int32_t id = gemma2_sample(s, &sampler, logits);
    holds(id < m->config.n_vocab && (id >= 0 || id == GEMMA2_ERR_ARGUMENT ||
                                     id == GEMMA2_ERR_NONFINITE || id == GEMMA2_ERR_TOKEN),
          "a sample is an id or a code");
    holds(finite || id < 0, "logits that are not finite give no token");
    float logprob = 0;
    int status = gemma2_logprob(logits, vocab(m), 0, &logprob);
    holds(finite ? status == GEMMA2_OK && logprob <= 1e-5f : status < 0, "log-probability");
}

/* Another session, restored or copied to, goes on with the same bits, on its own or in the same
 * pass. */
static void moves(gemma2_session *s, const uint8_t *p, float *logits)
{
    int64_t n = gemma2_session_save(s, NULL, 0);
    int32_t id = p[7] % s->model->config.n_vocab;
    gemma2_session *t = any_session(s->model, p);
    uint8_t *saved = fresh((size_t)n);
    float *again = fresh(vocab(s->model) * sizeof *again);
    gemma2_row rows[2] = {row_of(s, id, logits), row_of(t, id, again)};
    holds(gemma2_session_save(s, saved, (size_t)n) == n, "a session takes what it says");
    holds((p[6] % 2 ? gemma2_session_copy(t, s) : gemma2_session_restore(t, saved, (size_t)n)) ==
              GEMMA2_OK, "and is restored or copied");
    int together = p[6] / 2 % 2 && s->n_batch > 1;
    int status = together ? gemma2_eval_rows(rows, 2) : gemma2_eval(s, &id, 1, logits);
    holds(together || gemma2_eval(t, &id, 1, again) == status, "and goes on");
    holds(gemma2_position(s) == gemma2_position(t), "to the same place");
    holds(status < 0 || !memcmp(again, logits, vocab(s->model) * sizeof *again), "the same way");
    free(t), free(saved), free(again);
}

static void use_session(const gemma2_model *m, const uint8_t *p)
{
    gemma2_session *s = any_session(m, p);
    if (!s)
        return;
    float *logits = fresh(vocab(m) * sizeof *logits), logprobs[8];
    int32_t ids[300];
    for (int i = 0; i < 300; i++)
        ids[i] = (int32_t)((p[i % 8] * 31u + (unsigned)i * 7) % (unsigned)vocab(m));
    int32_t room = gemma2_context(s), n = min_i32(room, (room > 256 ? 250 : 1) + p[4] % 12);
    holds(gemma2_prefill(s, ids, (size_t)n, logits) == GEMMA2_OK, "a prompt that fits");
    sample_soundly(s, logits, p);
    holds(gemma2_position(s) == n && !memcmp(gemma2_history(s), ids, (size_t)n * 4), "history");
    int32_t back = p[5] % (n + 1);
    int status = gemma2_rewind(s, back);
    holds(status == GEMMA2_OK || (status == GEMMA2_ERR_REWIND && back), "a rewind");
    int32_t at = gemma2_position(s), k = min_i32(room - at, 1 + p[6] % 8);
    if (k > 0) {
        status = gemma2_score(s, ids, (size_t)k, ids[0], logprobs);
        holds(status == GEMMA2_OK || status == GEMMA2_ERR_NONFINITE, "scores");
        holds(gemma2_position(s) == at + k, "scored tokens are held");
    }
    gemma2_row row = row_of(s, ids[1], logits);
    gemma2_cancel(s, 1);
    status = gemma2_eval_rows(&row, 1);
    holds(status == (at + max_i32(k, 0) < room ? GEMMA2_ERR_CANCELLED : GEMMA2_ERR_CONTEXT) &&
              gemma2_position(s) == at + max_i32(k, 0), "a row that is cancelled");
    gemma2_cancel(s, 0);
    status = gemma2_eval_rows(&row, 1);
    holds(status == (at + max_i32(k, 0) < room ? GEMMA2_OK : GEMMA2_ERR_CONTEXT), "a row");
    if (gemma2_position(s) && gemma2_rewind(s, gemma2_position(s) - 1) == GEMMA2_OK)
        weigh_inputs(s, p[1]);
    moves(s, p, logits);
    free(s), free(logits);
}

/* A byte of the input forces a row of kernels, mostly the scalar one.  To ask the CPU is slow
 * where it is a virtual one. */
static void force_kernels(uint8_t byte)
{
    static const struct kernels *rows[N_KERNELS];
    for (int i = 0; i < N_KERNELS && !rows[N_KERNELS - 1]; i++)
        rows[i] = all_kernels[i]->available() ? all_kernels[i] : &scalar_kernels;
    setenv("GEMMA2_ISA", rows[byte % 4 ? N_KERNELS - 1 : byte / 4 % N_KERNELS]->name, 1);
}

/* ---- Target: weights ------------------------------------------------------------------------ */

/* Bits 24 .. 31 of the header are free for any use: here, what is done with the model. */
static void fuzz_weights(const uint8_t *data, size_t size)
{
    static const char text[] = "a <eot>\xc3\xa9\xff<sot>bc w32 ";
    static const uint8_t no_wishes[8] = {0};
    const uint8_t *p = size >= 32 ? data + 24 : no_wishes;
    char err[200] = "";
    struct image image = {fresh(size), size};
    if (size)
        memcpy(image.data, data, size);
    force_kernels(p[7]);
    gemma2_model *m = gemma2_open_memory(image.data, size, NULL, err, 1 + p[6] % sizeof err);
    holds(m || p[6] % sizeof err == 0 || err[0], "a refusal has a sentence");
    if (m) {
        gemma2_section section;
        size_t n = 0;
        for (; gemma2_get_section(m, n, &section); n++)
            gemma2_check(m, n, err, sizeof err);
        gemma2_fact(m, "name", &n), gemma2_fact(m, "", &n);
        text_comes_back(m, text, sizeof text - 1, p[5] % 2 ? GEMMA2_ENCODE_PLAIN : 0);
        use_session(m, p);
    }
    gemma2_close(m);
    free(image.data);
}

static const uint32_t HOSTILE[] = {0, 1, 2, 3, 15, 16, 17, 64, 255, 256, 1024, 4096, 1u << 20,
                                   1u << 22, 1u << 30, 0x7fffffff, 0x80000000, 0xfffffff0, ~0u,
                                   0x7fc00000, 0x7f800000, 0xbf800000, 0x3f800000, 0x00000001};
enum { N_HOSTILE = sizeof HOSTILE / sizeof *HOSTILE };

/* A hostile value, a small value, or a value near what was there. */
static void change_word(uint8_t *p)
{
    uint32_t x = get_u32(p), kind = below(4);
    put_u32(p, kind == 0 ? HOSTILE[below(N_HOSTILE)] : kind == 1 ? below(40)
               : kind == 2 ? x + below(5) - 2 : x ^ 1u << below(32));
}

/* A sound file of a random small shape. */
static struct image any_image(void)
{
    static const uint32_t heads[][2] = {{1, 1}, {2, 1}, {2, 2}, {4, 2}, {9, 3}};
    const uint32_t *n = heads[below(5)];
    struct shape s = {"any", below(4), 1 + below(20), n[0], n[1], 2 + 2 * below(4), 1 + below(20),
                      7 + below(30), 1 + below(9), 1 + below(40), below(2) ? 50.0f : 0,
                      below(2) ? 30.0f : 0, below(16), below(2) != 0, {0}, 64u << below(2)};
    for (int i = 0; i < 5; i++)
        s.types[i] = below(4) ? F32 + below(2) : F32 + below(5);
    if (!below(8)) /* small, with heads that the matrix class takes */
        s.layers = 1, s.d = 1 + below(6), s.n = n[1], s.k = 1, s.h = 32, s.attn_cap = 50;
    s.local &= (1u << s.layers) - 1;
    if (!s.layers)
        s = (struct shape){.name = "none", .v = s.v, .align = s.align};
    return build(&s);
}

static int n_entries(const struct image *m)
{
    uint64_t n = get_u32(m->data + 48), room = (m->size - 512) / 96;
    return (int)(n < room ? n : room);
}

/* The bytes of section i; 0 where it does not lie in the file. */
static uint64_t section_bytes(const struct image *m, int i)
{
    uint64_t at = get_u64(entry_of(m, i) + 32), n = get_u64(entry_of(m, i) + 40);
    return at <= m->size && n <= m->size - at ? n : 0;
}

/* Where the bytes of section i are, or somewhere harmless for a section outside the file. */
static uint8_t *section_at(const struct image *m, int i)
{
    return section_bytes(m, i) ? section_of(m, i) : m->data;
}

/* Exchanges, repeats or drops entries, and gives section `grown` other bytes.  Sections then
 * follow one another again.  Returns the size, 0 where that is above max. */
static size_t lay_out(const struct image *m, const int *order, int n, int grown,
                      const uint8_t *bytes, size_t n_bytes, uint8_t *out, size_t max)
{
    uint64_t align = get_u32(m->data + 56) <= 4096 ? get_u32(m->data + 56) : 64;
    struct image o = {out, 512 + 96 * (size_t)n};
    if (o.size > max)
        return 0;
    memcpy(out, m->data, 512);
    for (int i = 0; i < n; i++) {
        const uint8_t *from = section_at(m, order[i]);
        uint64_t size = order[i] == grown ? n_bytes : section_bytes(m, order[i]);
        uint64_t at = align ? (o.size + align - 1) / align * align : o.size;
        if (at > max || size > max - at)
            return 0;
        memset(out + o.size, 0, at - o.size);
        memcpy(entry_of(&o, i), entry_of(m, order[i]), 96);
        put_u64(entry_of(&o, i) + 32, at), put_u64(entry_of(&o, i) + 40, size);
        if (size)
            memcpy(out + at, order[i] == grown ? bytes : from, size);
        o.size = at + size;
    }
    put_u32(out + 48, (uint32_t)n);
    put_u64(out + 32, o.size);
    return o.size;
}

/* Another order or number of entries, or another content of one of them. */
static size_t change_sections(const struct image *m, uint8_t *out, size_t max)
{
    int order[80], n = n_entries(m), grown = -1;
    uint8_t bytes[4096];
    size_t n_bytes = 0;
    if (n < 1 || n > 78)
        return 0;
    for (int i = 0; i < n; i++)
        order[i] = i;
    int a = (int)below((uint32_t)n), b = (int)below((uint32_t)n);
    switch (below(5)) {
    case 0: order[a] = b, order[b] = a; break;
    case 1: order[n++] = a; break;
    case 2: order[a] = order[--n]; break;
    default:
        grown = a % 3 ? (int)below(2) % n : a; /* facts and tokenizer have an inside */
        n_bytes = section_bytes(m, grown);
        if (n_bytes > sizeof bytes)
            return 0;
        memcpy(bytes, section_at(m, grown), n_bytes);
        n_bytes = LLVMFuzzerMutate(bytes, n_bytes, sizeof bytes);
    }
    return lay_out(m, order, n, grown, bytes, n_bytes, out, max);
}

/* Digests of all sections that lie in the file, then the identity. */
static void seal_all(const struct image *m)
{
    for (int i = 0; i < n_entries(m); i++) {
        uint64_t n = section_bytes(m, i);
        if (n)
            sha256_of(section_at(m, i), n, n + 1, entry_of(m, i) + 48);
    }
    seal(m);
}

static size_t mutate_weights(uint8_t *data, size_t size, size_t max)
{
    static uint8_t other[1 << 17];
    struct image m = {data, size};
    uint32_t kind = below(16);
    if (kind == 0 || size < 512 + 96) {
        struct image any = any_image();
        size = any.size <= max ? any.size : size;
        memcpy(data, any.data, size <= any.size ? size : any.size);
        free(any.data);
        return size;
    }
    if (kind == 1) /* and no seal */
        return LLVMFuzzerMutate(data, size, max);
    int n = n_entries(&m), i = n ? (int)below((uint32_t)n) : 0;
    uint64_t inside = n ? section_bytes(&m, i) : 0;
    if (kind < 4)
        change_word(data + 8 + 4 * below(118));
    else if (kind < 6 && n)
        change_word(entry_of(&m, i) + 4 * below(12));
    else if (kind < 8)
        LLVMFuzzerMutate(data + 24, 8, 8);
    else if (kind < 12) {
        size_t now = change_sections(&m, other, max < sizeof other ? max : sizeof other);
        if (now)
            memcpy(data, other, m.size = now);
    } else if (kind < 14 && inside >= 4)
        change_word(section_at(&m, i) + below((uint32_t)inside / 4) * 4);
    else if (inside)
        LLVMFuzzerMutate(section_at(&m, i), inside, inside);
    seal_all(&m);
    return m.size;
}

/* ---- Target: tokenizer ------------------------------------------------------------------- */

/* Bytes below 128 spell what matters in vocabularies.  Bytes above stand for themselves. */
static size_t spell(const uint8_t *from, size_t n, char *out)
{
    static const char *const letters[16] = {"a", "b", "c", "\xe2\x96\x81", " ", "<", ">", "\n",
                                            "\xc3\xa9", "<0x41>", "0", "\xf0\x9f\x98\x80", "aa",
                                            "\xe2\x96", "\xef\xbf\xbd", "d"};
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const char *letter = letters[from[i] % 16];
        if (from[i] & 0x80)
            out[at++] = (char)from[i];
        else {
            memcpy(out + at, letter, strlen(letter));
            at += strlen(letter);
        }
    }
    return at;
}

/* Reads one piece: a byte of kind and length, one of score, and its spelling. */
static size_t read_piece(struct pieces *p, const uint8_t *data, size_t size)
{
    static const int kinds[8] = {1, 1, 4, 7, 6, 3, 5, 2};
    char text[80];
    int kind = kinds[data[0] % 8];
    size_t n = data[0] / 8 % 8, at = n + 2 < size ? n + 2 : size;
    if (kind == GEMMA2_PIECE_BYTE && n % 4)
        n = (size_t)snprintf(text, sizeof text, "<0x%02X>", data[1]), at = 2;
    else
        n = spell(data + 2, at - 2, text);
    if (data[0] >= 0xfe)
        kind = data[0] == 0xff ? 0 : 8; /* which are none */
    memcpy(p->blob + p->blob_bytes, text, n);
    p->blob_bytes += (uint32_t)n;
    p->ends[p->n] = p->blob_bytes;
    p->kinds[p->n] = (uint8_t)kind;
    p->scores[p->n++] = data[1] == 0xff ? NAN : (float)(data[1] % 8);
    return at;
}

/* Byte 0: bit 0 all bytes, bit 1 no unk, bit 2 PLAIN, bit 3 a lie; byte 1: how many pieces;
 * pieces; then the text. */
static void fuzz_tokenizer(const uint8_t *data, size_t size)
{
    static struct pieces p;
    static char text[MOST_TEXT * 6];
    uint32_t wishes = size > 1 ? data[0] : 0, n = size > 1 ? data[1] : 0;
    size_t at = 2;
    start_pieces(&p);
    if (wishes & 1)
        add_bytes_pieces(&p);
    while (n-- && at + 2 < size && p.blob_bytes < sizeof p.blob - 100)
        at += read_piece(&p, data + at, size - at);
    if (wishes & 2)
        p.special[3] = -1;
    struct image m = build_tokenizer_file(&p);
    if (wishes & 8 && at + 3 < size) {
        size_t words = section_bytes(&m, 1) / 4;
        uint32_t word = (data[at] | (uint32_t)data[at + 1] << 8) % (uint32_t)words;
        put_u32(section_of(&m, 1) + 4 * word, HOSTILE[data[at + 2] % N_HOSTILE]);
        seal_section(&m, 1);
        at += 3;
    }
    force_kernels(1);
    gemma2_model *model = gemma2_open_memory(m.data, m.size, NULL, NULL, 0);
    if (model && at < size) {
        size_t rest = size - at < MOST_TEXT / 6 ? size - at : MOST_TEXT / 6;
        text_comes_back(model, text, spell(data + at, rest, text),
                        wishes & 4 ? GEMMA2_ENCODE_PLAIN : 0);
    }
    gemma2_close(model);
    free(m.data);
}

/* ---- Targets: encode, decode ------------------------------------------------------------- */

/* A small vocabulary with every kind of piece. */
static const struct image *vocabulary_image(void)
{
    static struct pieces p;
    static struct image m;
    if (!m.data) {
        plain_pieces(&p, 40);
        add_bytes_pieces(&p);
        add_piece(&p, "", GEMMA2_PIECE_UNUSED, 0);
        add_piece(&p, "\xe2\x96\x81" "a\xe2\x96\x81", GEMMA2_PIECE_NORMAL, 3);
        add_piece(&p, "\n\n", GEMMA2_PIECE_USER, 0);
        m = build_tokenizer_file(&p);
    }
    return &m;
}

/* Gemma's vocabulary and a small one. */
static const gemma2_model *vocabulary(int small)
{
    static gemma2_model *models[2];
    char err[256];
    if (!models[0]) {
        models[0] = gemma2_open("tokenizer.bin", NULL, err, sizeof err);
        if (!models[0])
            printf("%s; run this from the repository's root\n", err), exit(1);
        models[1] = open_image(vocabulary_image());
    }
    return models[small];
}

static void fuzz_encode(const uint8_t *data, size_t size)
{
    if (size < 1)
        return;
    size_t n = size - 1 < MOST_TEXT ? size - 1 : MOST_TEXT;
    char *text = malloc(n + 1);
    if (!text)
        exit(1);
    memcpy(text, data + 1, n);
    text_comes_back(vocabulary(data[0] & 1), text, n, data[0] & 2 ? GEMMA2_ENCODE_PLAIN : 0);
    free(text);
}

/* The next id of the input: two bytes, or three for the real vocabulary; some lie outside. */
static int32_t next_id(const gemma2_model *m, const uint8_t **p, const uint8_t *end)
{
    int32_t id = 0;
    for (int i = 0; i < 3 && *p < end; i++)
        id = id << 8 | *(*p)++;
    if (id % 16 == 15) /* bytes, so that characters form */
        return gemma2_get_config(m)->n_vocab > 1000 ? 217 + id / 16 % 256 : 40 + id / 16 % 256;
    return id % (gemma2_get_config(m)->n_vocab + 3) - 1;
}

static void fuzz_decode(const uint8_t *data, size_t size)
{
    const uint8_t *p = data + 1, *end = data + size;
    if (size < 1)
        return;
    const gemma2_model *m = vocabulary(data[0] & 1);
    int32_t n_vocab = gemma2_get_config(m)->n_vocab;
    size_t room = (size_t)gemma2_get_config(m)->max_piece_bytes + 12;
    char *text = malloc(room), *repaired_text = malloc(3 * room);
    gemma2_utf8 hold = {{0}, 0};
    if (!text || !repaired_text)
        exit(1);
    while (p < end) {
        int32_t id = next_id(m, &p, end);
        gemma2_utf8 before = hold;
        int n = gemma2_decode(m, &hold, id, text, room);
        holds(id < n_vocab ? n >= 0 && (size_t)n <= room : n == GEMMA2_ERR_TOKEN, "decode");
        holds(n >= 0 || !memcmp(&before, &hold, sizeof hold), "a refused id changes nothing");
        holds(n < 0 || (repaired((uint8_t *)text, (size_t)n, repaired_text) == (size_t)n &&
                        !memcmp(text, repaired_text, (size_t)n)), "text comes in whole characters");
        holds(hold.n < 4 && (id >= 0 || !hold.n), "what is held");
    }
    free(text), free(repaired_text);
}

/* ---- Target: chat -------------------------------------------------------------------------- */

/* Renders the messages in exactly the scratch they need; returns how many of the ids are marks
 * of the vocabulary. */
static int count_marks(const gemma2_model *m, const gemma2_message *messages, size_t n,
                       unsigned flags)
{
    char err[300] = "";
    size_t bytes = gemma2_chat_scratch(m, messages, n);
    void *scratch = fresh(bytes);
    int status = gemma2_chat_check(m, messages, n, flags, err, sizeof err), marks = 0, kind;
    int64_t count = gemma2_encode_chat(m, messages, n, flags, NULL, 0, scratch, bytes);
    holds(bytes > 0, "sizes are known");
    holds(status == GEMMA2_OK ? count >= 0 : count == status && err[0], "check and encode agree");
    int32_t *ids = fresh((size_t)max_i32(0, (int32_t)count) * sizeof *ids);
    if (count >= 0)
        holds(gemma2_encode_chat(m, messages, n, flags, ids, (size_t)count, scratch, bytes) ==
                  count, "counting gives the same count");
    for (int64_t i = 0; i < count; i++) {
        holds(gemma2_piece(m, ids[i], NULL, &kind) != NULL, "ids lie in the vocabulary");
        marks += kind == GEMMA2_PIECE_MARKER || kind == GEMMA2_PIECE_CONTROL;
    }
    free(scratch), free(ids);
    return marks;
}

/* Bytes 0 and 1: which parts there are; 2: flags, and whether system text comes first.  Then
 * strings that end with 0xfe: the parts, and messages in turn. */
static void fuzz_chat(const uint8_t *data, size_t size)
{
    enum { MOST_MESSAGES = 12 };
    static char text[MOST_TEXT + 1];
    const char *facts[2 * N_CHAT_PARTS + 1] = {NULL}, *at = text;
    gemma2_message messages[MOST_MESSAGES], empty[MOST_MESSAGES];
    size_t n_facts = 0, n = 0;
    if (size < 3)
        return;
    size_t n_text = size - 3 < MOST_TEXT ? size - 3 : MOST_TEXT;
    memcpy(text, data + 3, n_text);
    text[n_text] = 0;
    for (size_t i = 0; i < n_text; i++)
        text[i] = (char)(data[3 + i] == 0xfe ? 0 : data[3 + i]);
    for (int i = 0; i < N_CHAT_PARTS; i++)
        if ((data[0] | data[1] << 8) >> i & 1) {
            facts[n_facts++] = chat_keys[i];
            int is_flag = i == CHAT_BOS || i == CHAT_TRIM;
            facts[n_facts++] = is_flag ? data[2] & 64 ? "1" : "0" : at;
            at += is_flag ? 0 : strlen(at);
            at += !is_flag && at < text + n_text;
        }
    int system = data[2] & 4;
    for (; at < text + n_text && n < MOST_MESSAGES; n++) {
        int32_t role = system && n == 0 ? GEMMA2_ROLE_SYSTEM
                       : (n - (system != 0)) % 2 ? GEMMA2_ROLE_MODEL : GEMMA2_ROLE_USER;
        messages[n] = (gemma2_message){data[2] & 8 && n == 2 ? 0 : role, at, -1};
        empty[n] = (gemma2_message){messages[n].role, n == 0 && system ? at : "", -1};
        at += strlen(at) + 1;
    }
    struct image image = with_facts(vocabulary_image(), facts);
    gemma2_model *m = open_image(&image);
    int marks = count_marks(m, messages, n, data[2] & 3);
    if (!system)
        holds(marks == count_marks(m, empty, n, data[2] & 3), "no text forges a mark");
    gemma2_close(m);
    free(image.data);
}

/* ---- Target: session ----------------------------------------------------------------------- */

static const gemma2_model *session_model(void)
{
    static const struct shape shape = {"saved", 3, 8, 2, 1, 4, 10, 30, 5, 40, 30, 20, 5, 0,
                                       {F32, BF16, F32, BF16, F32}, 64};
    static gemma2_model *m;
    if (!m) {
        rnd_state = 1; /* the same model, and identity, every time */
        struct image image = build(&shape);
        m = open_image(&image);
    }
    return m;
}

/* Bytes 0 .. 3 describe a session to restore to.  The saved session follows. */
static void fuzz_session(const uint8_t *data, size_t size)
{
    const gemma2_model *m = session_model();
    uint8_t wishes[8] = {39, 3, 1, 0, 5, 2, 3, 4};
    int32_t ids[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    float logits[30];
    if (size < 4)
        return;
    memcpy(wishes, data, 4);
    gemma2_session *s = any_session(m, wishes);
    gemma2_eval(s, ids, (size_t)min_i32(gemma2_context(s), 11), NULL);
    int64_t n = gemma2_session_save(s, NULL, 0), after;
    uint8_t *before = fresh((size_t)n), *now, *given = fresh(size - 4);
    gemma2_session_save(s, before, (size_t)n);
    memcpy(given, data + 4, size - 4);
    int status = gemma2_session_restore(s, given, size - 4);
    after = gemma2_session_save(s, NULL, 0);
    now = fresh((size_t)after);
    gemma2_session_save(s, now, (size_t)after);
    if (status < 0)
        holds(after == n && !memcmp(now, before, (size_t)n), "refused, and nothing changed");
    else {
        holds(gemma2_session_restore(s, now, (size_t)after) == GEMMA2_OK, "again");
        for (int32_t i = 0; i < gemma2_position(s); i++)
            holds(gemma2_history(s)[i] >= 0 && gemma2_history(s)[i] < 30, "ids of the past");
        gemma2_rewind(s, gemma2_position(s) * wishes[2] / 255);
        if (gemma2_eval(s, ids, 1, logits) == GEMMA2_OK)
            sample_soundly(s, logits, wishes);
        moves(s, wishes, logits);
    }
    free(s), free(before), free(now), free(given);
}

static void seal_saved(uint8_t *p, size_t size)
{
    if (size < SAVED_BYTES)
        return;
    if (below(4))
        put_u64(p + 16, size);
    saved_digest(session_model(), p, size, p + SAVED_DIGEST_AT);
}

static size_t mutate_session(uint8_t *data, size_t size, size_t max)
{
    uint32_t kind = below(8);
    if (size < 4 + SAVED_BYTES || kind == 0) { /* a session from somewhere else */
        int32_t ids[300];
        for (int i = 0; i < 4; i++)
            data[i] = (uint8_t)rnd();
        gemma2_session *s = any_session(session_model(), data);
        int32_t n = (int32_t)below((uint32_t)gemma2_context(s) + 1);
        random_ids(session_model(), ids, (size_t)n);
        if (n)
            gemma2_eval(s, ids, (size_t)n, NULL);
        int64_t bytes = gemma2_session_save(s, data + 4, max - 4);
        free(s);
        return bytes < 0 ? size : 4 + (size_t)bytes;
    }
    if (kind == 1)
        return LLVMFuzzerMutate(data, size, max);
    if (kind == 2)
        LLVMFuzzerMutate(data, 4, 4);
    else if (kind == 3)
        size = 4 + LLVMFuzzerMutate(data + 4, size - 4, max - 4);
    else if (kind < 6)
        change_word(data + 4 + 4 * below(16));
    else if (size >= 4 + SAVED_BYTES + 4)
        change_word(data + 4 + SAVED_BYTES + below((uint32_t)size - 4 - SAVED_BYTES - 3));
    seal_saved(data + 4, size - 4);
    return size;
}

/* ---- Target: ahead ------------------------------------------------------------------------- */

/* One call, by its byte: a token, a rewind, a save and restore, a cancellation. */
static int call_ahead(gemma2_session *s, gemma2_ahead *a, uint8_t call, float *logits)
{
    int32_t value = call / 8, id = value % 11;
    switch (call % 8) {
    case 5: return gemma2_rewind(s, max_i32(gemma2_position(s) - value, 0));
    case 6: {
        int64_t n = gemma2_session_save(s, NULL, 0);
        uint8_t *saved = fresh((size_t)n);
        gemma2_session_save(s, saved, (size_t)n);
        int status = gemma2_session_restore(s, saved, (size_t)n);
        free(saved);
        return status;
    }
    case 7: return gemma2_cancel(s, value % 2);
    default: return a ? gemma2_eval_ahead(s, a, id, logits) : gemma2_eval(s, &id, 1, logits);
    }
}

/* Bytes 0 .. 3 describe the sessions, byte 4 says how to guess.  A byte for each call follows. */
static void fuzz_ahead(const uint8_t *data, size_t size)
{
    const gemma2_model *m = session_model();
    gemma2_ahead_params p;
    float logits[2][30] = {{0}};
    if (size < 5)
        return;
    gemma2_session *s = any_session(m, data), *t = any_session(m, data);
    gemma2_ahead_params_init(&p);
    p.n_drafts = data[4] % 16, p.lookup = data[4] >> 4 & 1, p.n_context = data[4] & 32 ? 20 : 0;
    p.draft = data[4] & 64 ? any_session(m, data + 1) : NULL;
    gemma2_ahead *a = gemma2_ahead_new(m, &p, NULL, 0);
    holds(a != NULL, "guesses of any number");
    for (size_t i = 5; i < size; i++) {
        int status = call_ahead(s, NULL, data[i], logits[0]);
        holds(call_ahead(t, a, data[i], logits[1]) == status, "the same status");
        holds(s->position == t->position && s->oldest == t->oldest &&
                  !memcmp(s->ids, t->ids, (size_t)s->position * sizeof *s->ids), "the same past");
        holds(status < 0 || !memcmp(logits[0], logits[1], sizeof *logits), "the same logits");
    }
    gemma2_ahead_free(a);
    free(s), free(t), free(p.draft);
}

/* ---- Target: cli --------------------------------------------------------------------------- */

static char cli_dir[64];
static int home = -1; /* the directory to return to */

static void write_in(const char *name, const void *p, size_t n)
{
    FILE *f = fopen(name, "wb");
    if (!f || (n && fwrite(p, 1, n, f) != n) || fclose(f))
        printf("cannot write %s\n", name), exit(1);
}

/* Removes what the program left in the directory, or all. */
static void sweep(int all)
{
    DIR *dir = opendir(".");
    for (struct dirent *e; dir && (e = readdir(dir)) != NULL;)
        if (e->d_name[0] != '.' &&
            (all || (strcmp(e->d_name, "model") && strcmp(e->d_name, "words"))))
            unlink(e->d_name);
    if (dir)
        closedir(dir);
}

static void remove_cli_dir(void)
{
    if (chdir(cli_dir) == 0)
        sweep(1);
    rmdir(cli_dir);
}

static void make_cli_dir(void)
{
    static const struct shape shape = {"cli", 2, 8, 2, 1, 4, 10, 60, 5, 48, 30, 20, 1, 0,
                                       {F32, BF16, F32, BF16, F32}, 64};
    static struct pieces p;
    snprintf(cli_dir, sizeof cli_dir, "/tmp/gemma2-fuzz-XXXXXX");
    if (!mkdtemp(cli_dir))
        printf("cannot make %s\n", cli_dir), exit(1);
    atexit(remove_cli_dir);
    force_kernels(1);
    home = open(".", O_RDONLY);
    if (home < 0 || chdir(cli_dir))
        exit(1);
    struct image m = build(&shape);
    write_in("model", m.data, m.size);
    free(m.data);
    plain_pieces(&p, 60);
    m = build_tokenizer_file(&p);
    write_in("words", m.data, m.size);
    free(m.data);
}

static const char *const WORDS[] = {
    "model", "words", "in", "none", "", "-", "--", "-c", "-S", "-n", "5", "-t", "0", "1.5",
    "-s", "7", "-q", "-v", "-h", "--version", "-p", "-f", "--ids", "2 6 7", "--echo", "-k", "3",
    "-P", "0.5", "--min-p", "0.1", "--stop", "a", "w3", "--ignore-eos", "-C", "30", "-j", "1",
    "--window", "--kv", "f32", "f16", "--exact", "--in-memory", "--json", "--tokenize",
    "--detokenize", "--logits", "--score", "--perplexity", "--info", "--check", "--temprature",
    "-n5", "--seed=9", "--context=20", "--stop=", "\xff\xc2\x9b", "1e99", "-1", "<eot>\n", "w9",
    "--session", "--load", "kept", "-m", "--logit-bias", "5-inf", "--repeat-penalty",
    "--presence-penalty", "--repeat-last-n", "--num_ctx", "-fa", "--trace", "--trace-layer",
    "--importance", "--importance-block", "32", "--batch", "-o", "--parallel"};
enum { N_WORDS = sizeof WORDS / sizeof *WORDS };

/* Numbers of four digits could ask for more time or memory than a fuzzer has, and a path could
 * lead out of the directory to files that are written. */
static int asks_too_much(const char *word)
{
    if (strchr(word, '/'))
        return 1;
    for (size_t digits = 0; *word; word++) {
        digits = *word >= '0' && *word <= '9' ? digits + 1 : 0;
        if (digits > 3)
            return 1;
    }
    return 0;
}

/* Arguments: a byte above 127 is a word of the grammar; others, up to the next NUL or such a
 * byte, an argument by themselves.  127 ends them, and standard input follows. */
static void fuzz_cli(const uint8_t *data, size_t size)
{
    enum { MOST = 24, LONGEST = 120 };
    static char words[MOST][LONGEST + 8];
    static unsigned turn;
    char *argv[MOST + 2] = {"run"};
    int argc = 1;
    size_t at = 0;
    while (at < size && data[at] != 127 && argc <= MOST) {
        char *word = argv[argc] = words[argc - 1];
        size_t n = 0;
        argc++;
        if (data[at] >= 128) {
            snprintf(word, sizeof words[0], "%s", WORDS[data[at++] % N_WORDS]);
            continue;
        }
        while (at < size && data[at] < 127 && data[at] && n < LONGEST)
            word[n++] = (char)data[at++];
        word[n] = 0;
        at += at < size && data[at] == 0;
        if (asks_too_much(word))
            return;
    }
    at += at < size;
    if (!cli_dir[0])
        make_cli_dir();
    else if (chdir(cli_dir))
        exit(1);
    if (turn++ % 256 == 0)
        sweep(0);
    write_in("in", data + at, size - at < 3000 ? size - at : 3000);
    if (!freopen("in", "rb", stdin))
        exit(1);
    int status = run_main(argc, argv);
    holds(status >= 0 && status <= 3, "an exit code");
    if (fchdir(home))
        exit(1);
}

/* ---- Targets: grammar, schema ------------------------------------------------------------- */

static void fuzz_grammar(const uint8_t *data, size_t size)
{
    static uint32_t mask[8192];
    char err[256];
    if (size < 2)
        return;
    const gemma2_model *words = vocabulary(data[0] % 8 != 0);
    int32_t n = gemma2_get_config(words)->n_vocab, over = 0;
    gemma2_grammar *g = gemma2_grammar_new(words, (const char *)data + 1, (int64_t)size - 1, err,
                                           sizeof err);
    gemma2_matcher *m = gemma2_matcher_new(g);
    gemma2_grammar_state state;
    int64_t left = m && gemma2_matcher_start(m, &state) == GEMMA2_OK
                 ? gemma2_matcher_shortest(m, &state) + data[0] % 5 : 0;
    uint32_t draw = data[0];
    for (int step = 0; m && !over && left > 0 && step < 30; step++, left--) {
        int32_t chosen = -1, choices = 0;
        over = gemma2_matcher_allowed(m, &state, left, mask) != GEMMA2_OK; /* no room */
        for (int32_t id = 0; id < n && !over; id++)
            if (mask[id / 32] >> id % 32 & 1) {
                draw = draw * 1664525 + 1013904223;
                chosen = (draw >> 16) % (uint32_t)++choices ? chosen : id;
            }
        holds(over || chosen >= 0, "a reply ends in time");
        over |= chosen < 0 || gemma2_is_stop(words, chosen);
        if (!over) {
            int status = gemma2_matcher_accept(m, &state, chosen);
            holds(status == GEMMA2_OK || status == GEMMA2_ERR_SPACE, "what is allowed is taken");
            over = status != GEMMA2_OK;
        }
    }
    gemma2_matcher_free(m), gemma2_grammar_free(g);
}

/* -n 1 refuses most schemas once their grammar is compiled. */
static void fuzz_schema(const uint8_t *data, size_t size)
{
    static char story[4096];
    static char *argv[] = {"run", story, "-q", "-n", "1", "--schema", "in", "x", NULL};
    if (!story[0] && !realpath("tests/demo/story-q8.bin", story))
        exit(1);
    if (!cli_dir[0])
        make_cli_dir();
    else if (chdir(cli_dir))
        exit(1);
    write_in("in", data, size);
    int status = run_main(8, argv);
    holds(status == 0 || status == 2, "a schema is refused or obeyed");
    if (fchdir(home))
        exit(1);
}

/* ---- Target: batch ------------------------------------------------------------------------- */

static long size_of(const char *name)
{
    FILE *f = fopen(name, "rb");
    long size = f && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    if (f)
        fclose(f);
    return size;
}

/* The same command again does only what failed, and so leaves as many bytes. */
static void fuzz_batch(const uint8_t *data, size_t size)
{
    int status[2];
    long written[2];
    if (!cli_dir[0])
        make_cli_dir();
    else if (chdir(cli_dir))
        exit(1);
    write_in("in", data, size);
    unlink("out");
    for (int i = 0; i < 2; i++) {
        char *argv[] = {"run", "model", "--batch", "in", "-o", "out", "-q", "-s", "1", "-n", "3",
                        "-C", "40", "-j", "1", "--parallel", "3", NULL};
        status[i] = run_main((int)(sizeof argv / sizeof *argv) - 1, argv);
        written[i] = size_of("out");
    }
    holds((status[0] == 0 || status[0] == 1) && status[1] == status[0], "an exit code");
    holds(written[0] >= 0 && written[1] == written[0], "the results stay");
    if (fchdir(home))
        exit(1);
}

/* ---- The targets --------------------------------------------------------------------------- */

static const struct target {
    const char *name;
    void (*run)(const uint8_t *data, size_t size);
    size_t (*mutate)(uint8_t *data, size_t size, size_t max); /* NULL: byte by byte */
    size_t longest;
} targets[] = {
    {"weights", fuzz_weights, mutate_weights, 24 << 10},
    {"tokenizer", fuzz_tokenizer, NULL, 300},
    {"encode", fuzz_encode, NULL, 100},
    {"decode", fuzz_decode, NULL, 100},
    {"chat", fuzz_chat, NULL, 300},
    {"session", fuzz_session, mutate_session, 16 << 10},
    {"ahead", fuzz_ahead, NULL, 100},
    {"cli", fuzz_cli, NULL, 200},
    {"batch", fuzz_batch, NULL, 400},
    {"editor", edit_bytes, NULL, 300},
    {"json", read_json, NULL, 400},
    {"grammar", fuzz_grammar, NULL, 300},
    {"schema", fuzz_schema, NULL, 500},
};
enum { N_TARGETS = sizeof targets / sizeof *targets };

#ifndef REPLAY

static const struct target *target;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *name = getenv("GEMMA2_FUZZ");
    (void)argc, (void)argv;
    for (int i = 0; i < N_TARGETS && name; i++)
        if (!strcmp(targets[i].name, name))
            target = &targets[i];
    if (!target)
        fprintf(stderr, "GEMMA2_FUZZ names no target; see tests/fuzz.c\n"), exit(1);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    target->run(data, size);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed)
{
    if (!target->mutate)
        return LLVMFuzzerMutate(data, size, max);
    rnd_state = ((uint64_t)seed << 1 | 1) * 0x9e3779b97f4a7c15u;
    return target->mutate(data, size, max);
}

#else

enum { MUTANTS = 100 }; /* of each file */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max)
{
    uint32_t at = below((uint32_t)size + 1), n = 1 + below(4);
    switch (below(4)) {
    case 0: /* bytes put in */
        n = n < max - size ? n : (uint32_t)(max - size);
        memmove(data + at + n, data + at, size - at);
        for (uint32_t i = 0; i < n; i++)
            data[at + i] = (uint8_t)rnd();
        return size + n;
    case 1: /* bytes taken out */
        n = n < size - at ? n : (uint32_t)(size - at);
        memmove(data + at, data + at + n, size - at - n);
        return size - n;
    default:
        if (size)
            data[below((uint32_t)size)] ^= (uint8_t)(1 << below(8));
        return size;
    }
}

/* A file of the corpus as it is, and mutants of mutants of it. */
static void replay(const struct target *t, const char *path)
{
    static uint8_t data[1 << 17];
    FILE *f = fopen(path, "rb");
    if (!check(f != NULL, "cannot read %s", path))
        return;
    size_t size = fread(data, 1, t->longest, f);
    fclose(f);
    input_name = path;
    t->run(data, size);
    rnd_state = 1;
    for (int i = 0; i < MUTANTS; i++) {
        uint64_t state = rnd_state + (uint64_t)i;
        size = t->mutate ? t->mutate(data, size, t->longest)
                         : LLVMFuzzerMutate(data, size, t->longest);
        t->run(data, size);
        rnd_state = state * 0x9e3779b97f4a7c15u | 1; /* models are built from it, too */
    }
    check(1, "%s", path);
}

int main(int argc, char **argv)
{
    char path[512];
    FILE *said = fdopen(dup(STDOUT_FILENO), "w"); /* the cli target has standard output */
    if (!said || !freopen("/dev/null", "w", stdout))
        return 1;
    if (argc == 1 && !freopen("/dev/null", "w", stderr))
        return 1;
    for (int i = 0; i < N_TARGETS; i++) {
        int before = n_passed;
        snprintf(path, sizeof path, "tests/fuzz/%s", targets[i].name);
        DIR *dir = argc > 1 ? NULL : opendir(path);
        for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) {
            snprintf(path, sizeof path, "tests/fuzz/%s/%s", targets[i].name, e->d_name);
            if (e->d_name[0] != '.')
                replay(&targets[i], path);
        }
        if (dir)
            closedir(dir);
        for (int k = 2; k < argc && !strcmp(argv[1], targets[i].name); k++)
            replay(&targets[i], argv[k]);
        if (argc == 1 && n_passed == before)
            fprintf(said, "FAIL %s: no corpus\n", targets[i].name), n_failed++;
    }
    fprintf(said, "%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}

#endif
