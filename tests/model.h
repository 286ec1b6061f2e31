/* What tests of gemma2.c share: counted checks, random numbers, memory that ends where it
 * ends, files, and a builder of small models and sessions.  Include gemma2.c before it.  Not every
 * test uses all of it. */
#ifndef MODEL_H
#define MODEL_H
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef __GNUC__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

/* ---- Checks, random numbers, memory --------------------------------------------------- */

#include "check.h"

/* Loops count what goes wrong and report once. */
static void check_none(int bad, const char *what) { check(bad == 0, "%s: %d wrong", what, bad); }

static int full_test(void) { return getenv("GEMMA2_TEST_FULL") != NULL; }

static uint64_t rnd_state = 1;

static uint32_t rnd(void)
{
    rnd_state ^= rnd_state << 13;
    rnd_state ^= rnd_state >> 7;
    rnd_state ^= rnd_state << 17;
    return (uint32_t)(rnd_state >> 16);
}

static uint32_t below(uint32_t n) { return (uint32_t)((uint64_t)rnd() * n >> 32); }

static float uniform(float low, float high)
{
    return low + (high - low) * ((float)(rnd() >> 8) * 0x1p-24f);
}

/* Exactly n bytes, aligned to 64, so that AddressSanitizer sees the first one beyond. */
static void *fresh(size_t n)
{
    void *p;
    if (posix_memalign(&p, 64, n ? n : 1))
        printf("out of memory\n"), exit(1);
    return p;
}

/* ---- Files, in a folder that main makes -------------------------------------------------- */

static char scratch_dir[64];

static const char *in_dir(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", scratch_dir, name);
    return path;
}

static const char *write_file(const char *name, const void *p, size_t n)
{
    const char *path = in_dir(name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(p, 1, n, f) != n || fclose(f))
        printf("cannot write %s\n", path), exit(1);
    return path;
}

static void sha256_of(const void *p, size_t n, size_t step, uint8_t digest[32])
{
    struct sha256 s;
    sha256_init(&s);
    for (size_t at = 0; at < n; at += step)
        sha256_add(&s, (const uint8_t *)p + at, n - at < step ? n - at : step);
    sha256_end(&s, digest);
}

/* ===================================================================================
 * A builder of small models: the test's own reading of the byte table in section 2
 * =================================================================================== */

static void put_u32(uint8_t *p, uint32_t x)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(x >> 8 * i);
}

static void put_u64(uint8_t *p, uint64_t x)
{
    put_u32(p, (uint32_t)x);
    put_u32(p + 4, (uint32_t)(x >> 32));
}

/* A vocabulary in the making. */
enum { MAX_PIECES = 18500 };
struct pieces {
    uint32_t n, blob_bytes, ends[MAX_PIECES];
    int32_t special[6]; /* bos, eos, pad, unk, start of turn, end of turn */
    float scores[MAX_PIECES];
    uint8_t kinds[MAX_PIECES], blob[1 << 17];
};

static void add_piece(struct pieces *p, const char *text, int kind, float score)
{
    size_t n = strlen(text);
    memcpy(p->blob + p->blob_bytes, text, n);
    p->blob_bytes += (uint32_t)n;
    p->ends[p->n] = p->blob_bytes;
    p->kinds[p->n] = (uint8_t)kind;
    p->scores[p->n++] = score;
}

static void add_bytes_pieces(struct pieces *p)
{
    char text[8];
    for (int i = 0; i < 256; i++) {
        snprintf(text, sizeof text, "<0x%02X>", (unsigned)i);
        add_piece(p, text, GEMMA2_PIECE_BYTE, 0);
    }
}

static void start_pieces(struct pieces *p)
{
    static const int32_t special[6] = {2, 1, 0, 3, -1, -1};
    p->n = p->blob_bytes = 0;
    memcpy(p->special, special, sizeof special);
    add_piece(p, "<pad>", GEMMA2_PIECE_CONTROL, 0);
    add_piece(p, "<eos>", GEMMA2_PIECE_CONTROL, 0);
    add_piece(p, "<bos>", GEMMA2_PIECE_CONTROL, 0);
    add_piece(p, "<unk>", GEMMA2_PIECE_UNKNOWN, 0);
}

/* v pieces: the special ones, then words. */
static void plain_pieces(struct pieces *p, uint32_t v)
{
    char text[16];
    start_pieces(p);
    add_piece(p, "<sot>", GEMMA2_PIECE_MARKER, 0);
    add_piece(p, "<eot>", GEMMA2_PIECE_MARKER, 0);
    p->special[4] = 4, p->special[5] = 5;
    while (p->n < v) {
        snprintf(text, sizeof text, p->n < 32 ? "%c" : "w%u", p->n < 32 ? 'a' + p->n - 6 : p->n);
        add_piece(p, text, GEMMA2_PIECE_NORMAL, -(float)p->n);
    }
}

static uint64_t pieces_bytes(const struct pieces *p) { return 64 + 9 * p->n + p->blob_bytes; }

static void write_pieces(const struct pieces *p, uint8_t *to)
{
    put_u32(to, p->n);
    for (int i = 0; i < 6; i++)
        put_u32(to + 4 + 4 * i, (uint32_t)p->special[i]);
    put_u32(to + 28, p->blob_bytes);
    for (uint32_t i = 0; i < p->n; i++) {
        put_u32(to + 64 + 4 * i, bits_of(p->scores[i]));
        put_u32(to + 64 + 4 * p->n + 4 * i, p->ends[i]);
    }
    memcpy(to + 64 + 8 * p->n, p->kinds, p->n);
    memcpy(to + 64 + 9 * p->n, p->blob, p->blob_bytes);
}

struct shape {
    const char *name;
    uint32_t layers, d, n, k, h, f, v, window, context;
    float attn_cap, final_cap;
    uint32_t local; /* bit l: layer l is local */
    int untied;
    uint32_t types[5], align; /* tensors take the types in turn */
};

enum { F32 = TYPE_F32, BF16 = TYPE_BF16, Q8 = TYPE_Q8, Q6 = TYPE_Q6, Q4 = TYPE_Q4, Q3 = TYPE_Q3 };

/* No size is a multiple of what kernels like.  A kv head serves 9, 3 or 1 query heads. */
static const struct shape shapes[] = {
    {"f32", 3, 24, 4, 2, 6, 40, 83, 8, 64, 5, 10, 5, 0, {F32, F32, F32, F32, F32}, 64},
    {"bf16", 4, 37, 6, 2, 10, 51, 90, 8, 64, 0, 0, 6, 1, {BF16, BF16, BF16, BF16, BF16}, 64},
    {"q8", 3, 40, 9, 1, 4, 300, 83, 8, 64, 50, 30, 1, 0, {Q8, Q8, Q8, Q8, Q8}, 64},
    {"q6", 2, 264, 4, 4, 16, 70, 100, 8, 64, 0, 30, 2, 0, {Q6, Q6, Q6, Q6, Q6}, 4096},
    {"q4", 2, 48, 8, 2, 18, 33, 131, 8, 64, 50, 0, 3, 1, {Q4, Q4, Q4, Q4, Q6}, 64},
    {"q3", 2, 48, 8, 2, 18, 270, 131, 8, 64, 0, 30, 1, 0, {Q3, Q3, Q3, Q3, Q3}, 64},
    {"mixed", 5, 33, 4, 2, 22, 37, 77, 8, 64, 20, 15, 19, 1, {F32, Q8, BF16, Q4, Q6}, 128},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes, MIXED = N_SHAPES - 1 };

static const struct shape tiny_shape = {
    "tiny", 1, 2, 2, 1, 2, 3, 7, 8, 16, 0, 0, 1, 0, {F32, BF16, F32, BF16, F32}, 64};
static const struct shape long_shape = {
    "long", 2, 20, 6, 2, 8, 24, 40, 300, 1100, 30, 20, 1, 0, {BF16, F32, Q8, F32, BF16}, 64};

struct image {
    uint8_t *data;
    size_t size;
};

static uint64_t tensor_bytes(uint32_t type, uint64_t rows, uint64_t cols)
{
    uint64_t tiles = (rows + 15) / 16, blocks = (cols + 255) / 256;
    switch (type) {
    case F32: return tiles * cols * 16 * 4;
    case BF16: return tiles * (cols + cols % 2) * 16 * 2;
    case Q8: return tiles * (64 + blocks * (128 + 4096));
    case Q6: return tiles * (64 + blocks * (128 + 3072));
    case Q4: return tiles * (64 + blocks * (128 + 2048));
    default: return tiles * (64 + blocks * (128 + 1536));
    }
}

/* Random weights of about 1 / sqrt(cols).  Padded rows are zero, padded inputs are not. */
static void fill_tensor(uint8_t *p, uint32_t type, uint32_t rows, uint32_t cols)
{
    uint64_t bytes = tensor_bytes(type, rows, cols), tile = tensor_bytes(type, 1, cols);
    float size = cols == 1 ? 0.5f : 1.7f / sqrtf((float)cols);
    for (uint64_t at = 0; at < bytes; at += tile)
        for (uint32_t lane = 0; lane < 16; lane++) {
            int real = at / tile * 16 + lane < rows;
            for (uint32_t i = 0; i < cols && real && type <= BF16; i++) {
                uint32_t w = bits_of(uniform(-size, size));
                if (type == F32)
                    put_u32(p + at + (i * 16 + lane) * 4, w);
                else
                    memcpy(p + at + i / 2 * 64 + lane * 4 + i % 2 * 2, (uint8_t *)&w + 2, 2);
            }
            if (type >= Q8 && real)
                put_u32(p + at + lane * 4, bits_of(uniform(-size, size) / 4000));
        }
    for (uint64_t i = 0; i < bytes && type >= Q8; i++)
        if (i % tile >= 64)
            p[i] = (uint8_t)rnd();
}

static const char FACTS[] = "\3\0\0\0" "\4\0\0\0" "\4\0\0\0" "nametest"
                            "\5\0\0\0" "\0\0\0\0" "empty" "\1\0\0\0" "\1\0\0\0" "kv";

static int list_sections(const struct shape *s, const struct pieces *p, uint64_t e[][6])
{
    uint32_t q = s->n * s->h, k = s->k * s->h, n = 2, i;
    uint64_t start[2][6] = {{1, 0, 0, 0, 0, sizeof FACTS - 1}, {2, 0, 0, 0, 0, pieces_bytes(p)}};
    const uint32_t layer[][3] = {{32, s->d, 1}, {33, q, s->d}, {34, k, s->d}, {35, k, s->d},
                                 {36, s->d, q}, {37, s->d, 1}, {40, s->d, 1}, {41, s->f, s->d},
                                 {42, s->f, s->d}, {43, s->d, s->f}, {44, s->d, 1}};
    const uint32_t outer[][3] = {{18, s->d, 1}, {16, s->v, s->d}, {17, s->v, s->d}};
    memcpy(e, start, sizeof start);
    for (i = 0; i < s->layers * 11; i++, n++)
        memcpy(e[n], ((uint64_t[]){layer[i % 11][0], i / 11, 0, layer[i % 11][1],
                                   layer[i % 11][2], 0}), sizeof *e);
    for (i = 0; i < (s->layers ? 2 + (uint32_t)s->untied : 0); i++, n++)
        memcpy(e[n], ((uint64_t[]){outer[i][0], 0, 0, outer[i][1], outer[i][2], 0}), sizeof *e);
    for (i = 2; i < n; i++) {
        e[i][2] = e[i][4] == 1 ? F32 : s->types[i % 5];
        e[i][5] = tensor_bytes((uint32_t)e[i][2], e[i][3], e[i][4]);
    }
    return (int)n;
}

static void write_header(uint8_t *h, const struct shape *s, int n_sections, uint64_t size)
{
    const uint32_t counts[] = {s->layers, s->d, s->n, s->k, s->h, s->f, s->v, s->window,
                               s->context};
    double theta = s->layers ? 10000 : 0;
    memcpy(h, "\x89GEMMA2\n", 8);
    put_u32(h + 8, 1), put_u32(h + 12, 512);
    put_u64(h + 32, size), put_u64(h + 40, 512);
    put_u32(h + 48, (uint32_t)n_sections), put_u32(h + 52, 96), put_u32(h + 56, s->align);
    for (int i = 0; i < 9; i++)
        put_u32(h + 64 + 4 * i, counts[i]);
    put_u32(h + 100, s->layers ? bits_of(1e-6f) : 0);
    memcpy(h + 104, &theta, 8);
    put_u32(h + 112, bits_of(s->attn_cap)), put_u32(h + 116, bits_of(s->final_cap));
    put_u32(h + 120, s->layers ? bits_of(0.4f) : 0);
    put_u32(h + 124, s->layers ? bits_of(sqrtf((float)s->d)) : 0);
    put_u32(h + 128, s->local);
    put_u32(h + 256, 2), put_u32(h + 260, 1), put_u32(h + 264, 5);
}

/* The identity again after a change of header or directory. */
static void seal(const struct image *m)
{
    struct sha256 s;
    sha256_init(&s);
    sha256_add(&s, m->data, 480);
    uint64_t n = get_u32(m->data + 48), room = (m->size - 512) / 96;
    sha256_add(&s, m->data + 512, (n < room ? n : room) * 96);
    sha256_end(&s, m->data + 480);
}

static uint8_t *entry_of(const struct image *m, int i) { return m->data + 512 + 96 * i; }

static uint8_t *section_of(const struct image *m, int i)
{
    return m->data + get_u64(entry_of(m, i) + 32);
}

/* The digest of section i, and the identity, after a change of its bytes. */
static void seal_section(const struct image *m, int i)
{
    uint8_t *e = entry_of(m, i);
    uint64_t n = get_u64(e + 40);
    sha256_of(section_of(m, i), n, n + 1, e + 48);
    seal(m);
}

static struct image build_with(const struct shape *s, const struct pieces *p)
{
    uint64_t e[64][6], offset[64], n, end;
    struct image m;
    n = (uint64_t)list_sections(s, p, e), end = 512 + 96 * n;
    for (uint64_t i = 0; i < n; i++) {
        offset[i] = (end + s->align - 1) / s->align * s->align;
        end = offset[i] + e[i][5];
    }
    m.size = end, m.data = fresh(end);
    memset(m.data, 0, end);
    write_header(m.data, s, (int)n, end);
    for (uint64_t i = 0; i < n; i++) {
        uint8_t *to = entry_of(&m, (int)i), *data = m.data + offset[i];
        put_u32(to, (uint32_t)e[i][0]), put_u32(to + 4, (uint32_t)e[i][1]);
        put_u32(to + 8, (uint32_t)e[i][2]);
        put_u64(to + 16, e[i][3]), put_u64(to + 24, e[i][4]);
        put_u64(to + 32, offset[i]), put_u64(to + 40, e[i][5]);
        if (i == 0)
            memcpy(data, FACTS, sizeof FACTS - 1);
        else if (i == 1)
            write_pieces(p, data);
        else
            fill_tensor(data, (uint32_t)e[i][2], (uint32_t)e[i][3], (uint32_t)e[i][4]);
        seal_section(&m, (int)i);
    }
    return m;
}

static struct image build(const struct shape *s)
{
    static struct pieces p;
    plain_pieces(&p, s->v);
    return build_with(s, &p);
}

static size_t put_fact(uint8_t *to, const char *key, const char *value)
{
    size_t n = strlen(key), n_value = strlen(value);
    put_u32(to, (uint32_t)n), put_u32(to + 4, (uint32_t)n_value);
    memcpy(to + 8, key, n);
    memcpy(to + 8 + n, value, n_value);
    return 8 + n + n_value;
}

/* The same file with other facts: keys and values in turn, NULL at the end. */
static struct image with_facts(const struct image *from, const char *const *facts)
{
    uint64_t align = get_u32(from->data + 56), at = 4, end = 0;
    int n = (int)get_u32(from->data + 48);
    uint32_t pairs = 0;
    struct image m = {NULL, from->size + 4};
    for (int i = 0; facts[i]; i++)
        m.size += 4 + strlen(facts[i]);
    m.size += align * (uint64_t)n;
    m.data = fresh(m.size);
    memset(m.data, 0, m.size);
    memcpy(m.data, from->data, 512 + 96 * (size_t)n);
    end = 512 + 96 * (uint64_t)n;
    for (int i = 0; i < n; i++) {
        end = (end + align - 1) / align * align;
        put_u64(entry_of(&m, i) + 32, end);
        if (i == 0) {
            for (; facts[2 * pairs]; pairs++)
                at += put_fact(m.data + end + at, facts[2 * pairs], facts[2 * pairs + 1]);
            put_u32(m.data + end, pairs);
            put_u64(entry_of(&m, 0) + 40, at);
        } else
            memcpy(m.data + end, section_of(from, i), get_u64(entry_of(from, i) + 40));
        end += get_u64(entry_of(&m, i) + 40);
    }
    m.size = end;
    put_u64(m.data + 32, end);
    seal_section(&m, 0);
    return m;
}

/* Row `from` of a tile to row `to` of another: each line of 64 bytes has 4 of a row, each of group
 * scales 4 times one. */
static void copy_row(uint8_t *to, uint32_t to_row, const uint8_t *from, uint32_t from_row,
                     uint32_t type, uint64_t tile)
{
    uint64_t block = tensor_bytes(type, 1, 256) - 64;
    for (uint64_t at = 0; at < tile; at += 64) {
        int is_scales = type >= Q8 && at >= 64 && (at - 64) % block < 128;
        for (uint64_t i = at; i < at + 64 && is_scales; i += 16)
            to[i + to_row] = from[i + from_row];
        if (!is_scales)
            memcpy(to + at + 4 * to_row, from + at + 4 * from_row, 4);
    }
}

/* The same model, of which n ids can be written. */
static struct image with_kept(const struct image *from, const uint32_t *ids, uint32_t n)
{
    uint64_t align = get_u32(from->data + 56), end;
    uint32_t v = get_u32(from->data + 88), n_sections = get_u32(from->data + 48) + 1;
    uint32_t kept[256] = {0};
    struct image m = {fresh(from->size + 3 * align + 1024), 0};
    memset(m.data, 0, from->size + 3 * align + 1024);
    memcpy(m.data, from->data, 512);
    put_u32(m.data + 48, n_sections);
    for (uint32_t i = 0; i < n; i++)
        kept[ids[i]] = 1;
    end = 512 + 96 * (uint64_t)n_sections;
    for (uint32_t i = 0; i < n_sections; i++) {
        int old = (int)(i - (i > 2)); /* the list of ids comes third */
        uint8_t *e = entry_of(&m, (int)i);
        const uint8_t *data = section_of(from, old);
        end = (end + align - 1) / align * align;
        memcpy(e, entry_of(from, old), 96);
        put_u64(e + 32, end);
        if (i == 2) {
            memset(e, 0, 32), put_u32(e, 3), put_u64(e + 40, 4 * n);
            memcpy(m.data + end, ids, 4 * n);
        } else if (get_u32(e) == 16 || get_u32(e) == 17) {
            uint32_t type = get_u32(e + 8), rows = get_u32(e) == 16 ? v : n, row = 0;
            uint64_t tile = tensor_bytes(type, 1, get_u64(e + 24));
            for (uint32_t pass = 1; pass < 2; pass--)
                for (uint32_t id = 0; id < v && row < rows; id++)
                    if (kept[id] == pass) {
                        copy_row(m.data + end + row / 16 * tile, row % 16, data + id / 16 * tile,
                                 id % 16, type, tile);
                        row++;
                    }
            put_u64(e + 16, rows), put_u64(e + 40, tensor_bytes(type, rows, get_u64(e + 24)));
        } else
            memcpy(m.data + end, data, get_u64(e + 40));
        end += get_u64(e + 40);
    }
    m.size = end;
    put_u64(m.data + 32, end);
    for (uint32_t i = 0; i < n_sections; i++)
        seal_section(&m, (int)i);
    return m;
}

/* A file with a tokenizer and nothing else. */
static struct image build_tokenizer_file(const struct pieces *p)
{
    struct shape s = {.name = "tokenizer", .v = p->n, .align = 64};
    return build_with(&s, p);
}

static gemma2_model *open_image(const struct image *m)
{
    char err[256] = "";
    gemma2_model *model = gemma2_open_memory(m->data, m->size, NULL, err, sizeof err);
    if (!check(model != NULL, "a sound model is refused: %s", err))
        exit(1);
    return model;
}

struct model {
    struct image image;
    gemma2_model *m;
};

static struct model make(const struct shape *s)
{
    struct model x = {build(s), NULL};
    x.m = open_image(&x.image);
    return x;
}

static void unmake(struct model *x)
{
    gemma2_close(x->m);
    free(x->image.data);
}

struct setup {
    int32_t context, batch, threads, window, cache;
};

static gemma2_session *start(const gemma2_model *m, struct setup o)
{
    char err[256] = "";
    gemma2_session_params p;
    gemma2_session_params_init(&p);
    p.n_context = o.context, p.n_batch = o.batch, p.n_threads = o.threads ? o.threads : 1;
    p.window = o.window, p.cache_type = o.cache;
    gemma2_session *s = gemma2_session_new(m, &p, err, sizeof err);
    if (!check(s != NULL, "no session: %s", err))
        exit(1);
    return s;
}

static gemma2_row row_of(gemma2_session *s, int32_t id, float *logits)
{
    gemma2_row row = {.session = s, .id = id, .logits = logits};
    return row;
}

static int eval_row(gemma2_session *s, int32_t id, float *logits)
{
    gemma2_row row = row_of(s, id, logits);
    return gemma2_eval_rows(&row, 1);
}

static size_t vocab(const gemma2_model *m) { return (size_t)gemma2_get_config(m)->n_vocab; }

static void random_ids(const gemma2_model *m, int32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)below((uint32_t)vocab(m));
}

/* Logits after every one of n tokens, fed one by one: [n][V].  What all else must equal. */
static float *step_by_step(const gemma2_model *m, struct setup o, const int32_t *ids, size_t n)
{
    float *logits = fresh(n * vocab(m) * sizeof *logits);
    gemma2_session *s = start(m, o);
    for (size_t i = 0; i < n; i++)
        if (gemma2_eval(s, ids + i, 1, logits + i * vocab(m)) != GEMMA2_OK)
            check(0, "step %zu", i);
    gemma2_session_free(s);
    return logits;
}

static int logits_differ(const gemma2_model *m, const float *logits, const float *truth, size_t i)
{
    return !!memcmp(logits, truth + i * vocab(m), vocab(m) * sizeof *logits);
}

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#endif
