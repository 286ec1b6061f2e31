/* Unit tests of gemma2.c, section by section: it is included here, so that its statics are
 * in reach.  What transformers and SentencePiece say is in test_golden.c.
 *
 *   cc -O2 -ffp-contract=off -fopenmp tests/test.c -lm && ./a.out [SECTION...]
 *
 * From the repository's root; a few seconds.  Names of sections (at the end of this file) run
 * these alone.  GEMMA2_TEST_FULL=1 sweeps exp and tanh over
 * every float and prints their largest errors, and tries more hostile files: two minutes.
 * -DGEMMA2_EMULATE builds the tests of the "amx" and "avxvnni" rows alone, for CPUs with AVX-512. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>
#ifdef _WIN32
#include "on_windows.h"
#else
#include <sys/mman.h>
#endif

/* ---- The engine, with an allocator that can fail and counts what is not given back ---- */

static int alloc_calls, alloc_fails_at, alloc_live; /* fails_at 0: never */

static void *count_alloc(void *p)
{
    alloc_live += p != NULL;
    return p;
}

static int alloc_denied(void) { return ++alloc_calls == alloc_fails_at; }

static void *test_malloc(size_t n) { return count_alloc(alloc_denied() ? NULL : malloc(n)); }

static void *test_calloc(size_t n, size_t size)
{
    return count_alloc(alloc_denied() ? NULL : calloc(n, size));
}

static void test_free(void *p)
{
    alloc_live -= p != NULL;
    free(p);
}

#ifdef _WIN32
static void *test_map(HANDLE section, DWORD access, DWORD high, DWORD low, size_t n)
{
    int denied = alloc_denied();
    if (denied)
        SetLastError(ERROR_NOT_ENOUGH_MEMORY);
    return count_alloc(denied ? NULL : MapViewOfFile(section, access, high, low, n));
}

static int test_unmap(const void *p)
{
    alloc_live--;
    return UnmapViewOfFile(p);
}
#define MapViewOfFile test_map
#define UnmapViewOfFile test_unmap
#else
static void *test_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    if (alloc_denied()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *p = mmap(at, n, protection, flags, fd, offset);
    alloc_live += p != MAP_FAILED;
    return p;
}

static int test_munmap(void *p, size_t n)
{
    alloc_live--;
    return munmap(p, n);
}
#define mmap test_mmap
#define munmap test_munmap
#endif

#ifdef GEMMA2_EMULATE
#include "emulate.h"
enum { EMULATED = 1 };
#else
enum { EMULATED = 0 };
#endif
#define malloc test_malloc
#define calloc test_calloc
#define free test_free
#include "../gemma2.c"
#undef malloc
#undef calloc
#undef free
#ifdef _WIN32
#include "on_windows.h"
#endif

#include "model.h"

static float *random_floats(size_t n, float scale)
{
    float *x = fresh(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform(-scale, scale);
    return x;
}

static const float SPECIAL[] = {
    0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 0.625f, -0.625f, 0.62499994f, 87.3f, -87.3f, -87.300003f,
    -87.29999f, 88.4f, 88.40001f, 1e-30f, -1e-30f, 9.99e-31f, 1e-38f, 1e-45f, -1e-45f, 1e-40f,
    65504.0f, 65519.996f, 65520.0f, -65536.0f, 1e13f, -1e13f, 3.4e38f, -3.4e38f, 20.0f, 127.0f,
    -127.0f, 126.5f, 2.5f, -3.5f, INFINITY, -INFINITY, NAN};
enum { N_SPECIAL = sizeof SPECIAL / sizeof *SPECIAL };

/* Random floats with a special one now and then. */
static void mix_in_special(float *x, size_t n, int finite)
{
    for (size_t i = 0; i < n; i++)
        if (below(3) == 0)
            x[i] = SPECIAL[below(N_SPECIAL - (finite ? 3 : 0))];
}

/* ===================================================================================
 * 1. Ground
 * =================================================================================== */

static int is_digest(const uint8_t digest[32], const char *hex)
{
    char text[65];
    for (int i = 0; i < 32; i++)
        snprintf(text + 2 * i, 3, "%02x", digest[i]);
    return !strcmp(text, hex);
}

/* FIPS 180-4 examples, and n letters 'a' around the padding's edges (by sha256sum). */
static void test_sha256(void)
{
    static const struct {
        const char *text;
        size_t repeat;
        const char *hex;
    } cases[] = {
        {"", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"a", 55, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318"},
        {"a", 56, "b35439a4ac6f0948b6d6f9e3c6af0f5f590ce20f1bde7090ef7970686ec6738a"},
        {"a", 63, "7d3e74a05d7db15bce4ad9ec0658ea98e3f06eeecf16b4c6fff2da457ddc2f34"},
        {"a", 64, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb"},
        {"a", 65, "635361c48bb9eab14198e76ea8ab7f1a41685d6ad62aa9146d301d4f17eb0ae0"},
        {"a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t unit = strlen(cases[i].text), n = unit * cases[i].repeat;
        uint8_t digest[32], *text = fresh(n);
        for (size_t k = 0; k < n; k++)
            text[k] = (uint8_t)cases[i].text[k % unit];
        sha256_of(text, n, n + 1, digest);
        check(is_digest(digest, cases[i].hex), "SHA-256 of %zu bytes", n);
        free(text);
    }
}

static void test_sha256_in_parts(void)
{
    uint8_t text[300], whole[32], parts[32];
    int bad = 0;
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (uint8_t)rnd();
    for (size_t n = 0; n <= sizeof text; n++)
        for (size_t step = 1; step < 130; step += 1 + step / 9) {
            sha256_of(text, n, n + 1, whole);
            sha256_of(text, n, step, parts);
            bad += !!memcmp(whole, parts, 32);
        }
    check_none(bad, "SHA-256 added in parts");
}

static void test_ground(void)
{
    static const uint8_t bytes[8] = {1, 2, 3, 0x84, 5, 6, 7, 0x88};
    char text[8] = "?";
    struct errbuf err = {text, 4}, none = {NULL, 0};
    check(get_u32(bytes) == 0x84030201, "get_u32");
    check(get_u64(bytes) == 0x8807060584030201, "get_u64");
    check(fail(&err, "%d", 12345) == 0 && !strcmp(text, "123"), "a long message is cut");
    check(fail(&none, "nothing") == 0, "no buffer for a message");
    check(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(32, 16) == 32, "round_up");
    check(is_zero(bytes, 0) && !is_zero(bytes, 8), "is_zero");
    test_sha256();
    test_sha256_in_parts();
}

/* ===================================================================================
 * 2. The weight file
 * =================================================================================== */

/* Uses a model in every way, with whatever its file says: nothing may crash or hang. */
static void exercise(const gemma2_model *m)
{
    const gemma2_config *c = gemma2_get_config(m);
    struct gemma2_session *s;
    gemma2_session_params p;
    gemma2_plan plan;
    gemma2_section section;
    gemma2_utf8 hold = {{0}, 0};
    int32_t ids[16];
    size_t size, scratch_bytes = gemma2_encode_scratch(16), room = (size_t)c->max_piece_bytes + 12;
    char *scratch = fresh(scratch_bytes), *text = fresh(room);
    gemma2_encode(m, "a <eot>\xc3\xa9\xff<sot>bc", 16, 0, ids, 16, scratch, scratch_bytes);
    for (int32_t id = 0; id < min_i32(c->n_vocab, 300); id++)
        gemma2_decode(m, &hold, id, text, room);
    for (size_t i = 0; gemma2_get_section(m, i, &section); i++)
        gemma2_check(m, i, NULL, 0);
    gemma2_fact(m, "license", &size);
    gemma2_session_params_init(&p);
    p.n_context = 12, p.n_batch = 3, p.n_threads = 1;
    if (gemma2_session_plan(m, &p, &plan) == GEMMA2_OK && plan.total < 1 << 26 &&
        (s = gemma2_session_new(m, &p, NULL, 0)) != NULL) {
        float *logits = fresh((size_t)c->n_vocab * 4), logprobs[4];
        gemma2_sampler sampler;
        gemma2_sampler_init(&sampler, 1);
        for (int i = 0; i < 4; i++)
            ids[i] = (int32_t)below((uint32_t)c->n_vocab);
        gemma2_prefill(s, ids, 4, logits);
        gemma2_score(s, ids, 4, 0, logprobs);
        gemma2_sample(s, &sampler, logits);
        gemma2_session_free(s);
        free(logits);
    }
    free(scratch), free(text);
}

/* Opens; uses what opens.  Returns whether it opened. */
static int opens(const struct image *m)
{
    char err[256] = "";
    gemma2_model *model = gemma2_open_memory(m->data, m->size, NULL, err, sizeof err);
    if (!model) {
        if (!err[0])
            check(0, "a refusal without a sentence");
        return 0;
    }
    exercise(model);
    gemma2_close(model);
    return 1;
}

static void test_models_open(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        const gemma2_config *c = gemma2_get_config(x.m);
        const struct shape *s = &shapes[i];
        check(c->n_layers == (int)s->layers && c->d_model == (int)s->d && c->n_heads == (int)s->n &&
                  c->n_kv_heads == (int)s->k && c->head_dim == (int)s->h &&
                  c->d_ffn == (int)s->f && c->n_vocab == (int)s->v && c->window == 8,
              "%s: config", s->name);
        for (uint32_t l = 0; l < s->layers; l++) /* a bit a layer, not even and odd ones */
            check(c->is_local[l] == (s->local >> l & 1), "%s: layer %u local", s->name, l);
        check(c->n_stop == 2 && gemma2_is_stop(x.m, 5) && !gemma2_is_stop(x.m, 2), "stops");
        check(c->file_bytes == x.image.size && !memcmp(c->identity, x.image.data + 480, 32),
              "%s: identity", s->name);
        for (size_t k = 0; k < x.m->n_sections; k++)
            check(gemma2_check(x.m, k, NULL, 0) == 1, "%s: section %zu", s->name, k);
        check(gemma2_check(x.m, x.m->n_sections, NULL, 0) == 0, "check past the end");
        exercise(x.m);
        unmake(&x);
    }
}

/* Every prefix, and the file with a byte more; then the same with a header that agrees. */
static void test_truncated(void)
{
    struct image m = build(&tiny_shape), cut;
    int opened = 0, opened_sealed = 0;
    for (size_t n = 1; n <= m.size + 1; n++) {
        if (n == m.size)
            continue;
        cut.size = n, cut.data = fresh(n);
        memcpy(cut.data, m.data, n < m.size ? n : m.size);
        opened += opens(&cut);
        if (n >= 512 + 96) {
            put_u64(cut.data + 32, n);
            seal(&cut);
            opened_sealed += opens(&cut);
        }
        free(cut.data);
    }
    check(!opened, "%d truncated files open", opened);
    check(!opened_sealed, "%d truncated files with a new checksum open", opened_sealed);
    free(m.data);
}

/* Every bit of header and directory counts. */
static void test_flipped(void)
{
    struct image m = build(&tiny_shape);
    int opened = 0;
    size_t end = 512 + 96 * get_u32(m.data + 48);
    for (size_t i = 0; i < end; i++)
        for (int bit = 0; bit < 8; bit += 1 + (i > 512)) {
            m.data[i] ^= (uint8_t)(1 << bit);
            opened += opens(&m);
            m.data[i] ^= (uint8_t)(1 << bit);
        }
    check(!opened, "%d files with a flipped bit open", opened);
    free(m.data);
}

/* A value in a sealed header: legal or not, by the byte table. */
static void test_header_limits(void)
{
    static const struct {
        uint32_t at, value;
        int legal;
    } cases[] = {
        {8, 0, 0}, {8, 2, 0}, {12, 511, 0}, {16, 1, 0}, {20, 1u << 31, 0}, {24, ~0u, 1},
        {40, 511, 0}, {44, 1, 0}, {48, 0, 0}, {48, 65537, 0}, {48, ~0u, 0}, {52, 95, 0},
        {56, 0, 0}, {56, 32, 0}, {56, 96, 0}, {56, 1u << 22, 0}, {60, 1, 0}, {64, 0, 0},
        {64, 2, 0}, {64, 1025, 0}, {68, 0, 0}, {68, 3, 0}, {72, 0, 0}, {72, 3, 0}, {76, 0, 0},
        {76, 3, 0}, {80, 0, 0}, {80, 1, 0}, {80, 3, 0}, {84, 0, 0}, {88, 0, 0}, {88, 6, 0},
        {92, 0, 0}, {92, 1, 1}, {92, 1u << 30, 1}, {92, (1u << 30) + 1, 0}, {92, 1u << 31, 0},
        {96, 0, 0}, {96, 1, 1}, {96, 1u << 30, 1}, {96, ~0u, 0},
        {100, 0, 1}, {100, 0x80000001, 0}, {100, 0x7fc00000, 0}, {100, 0x7f800000, 0},
        {108, 0, 0}, {108, 0x7ff80000, 0}, {108, 0x7ff00000, 0}, {108, 0xc0c38800, 0},
        {112, 0, 1}, {112, 0x42480000, 1}, {112, 0xc2480000, 0}, {112, 0x7fc00000, 0},
        {112, 0x7f800000, 0}, {112, 1, 0}, {116, 0x461c4000, 1}, {116, 0x461c4001, 0},
        {116, 0x7fc00000, 0}, {120, 0, 0}, {120, 0xbf800000, 0}, {120, 0x7f800000, 0},
        {124, 0, 0}, {124, 0x7fc00000, 0}, {124, 0xff800000, 0}, {128, 2, 0}, {252, 1, 0},
        {256, 0, 0}, {256, 3, 1}, {256, 15, 1}, {256, 16, 0}, {256, ~0u, 0}, {260, 7, 0},
        {260, 6, 1}, {268, 1, 0}, {320, 1, 0}, {476, 1, 0},
    };
    struct image m = build(&tiny_shape);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t was = get_u32(m.data + cases[i].at);
        put_u32(m.data + cases[i].at, cases[i].value);
        seal(&m);
        check(opens(&m) == cases[i].legal, "header value %#x at %u is %s", cases[i].value,
              cases[i].at, cases[i].legal ? "refused" : "accepted");
        put_u32(m.data + cases[i].at, was);
    }
    free(m.data);
}

static char said[160]; /* by the last refusal of may_be */

/* Whether the header's field at `at` may be x, in a file of so many layers. */
static int may_be(size_t at, char kind, double x, int32_t layers)
{
    uint8_t header[HEADER_BYTES] = {0};
    gemma2_config c = {.n_layers = layers};
    struct errbuf err = {said, sizeof said};
    uint64_t bits;
    memcpy(&bits, &x, 8);
    if (kind == 'd')
        put_u64(header + at, bits);
    else
        put_u32(header + at, kind == 'i' ? (uint32_t)x : bits_of((float)x));
    for (int i = 0; i < N_HEADER_FIELDS; i++)
        if (header_fields[i].at == at)
            return read_field(header, &header_fields[i], &c, &err);
    return -1;
}

/* The ends of each field's range in the byte table, which no file of a test could reach. */
static void test_field_limits(void)
{
    static const struct {
        size_t at;
        char kind;
        double low, high;
        int zero; /* is legal: 1 also, 2 only, in a file without layers */
    } fields[] = {
        {64, 'i', 0, 1024, 1}, {68, 'i', 1, 1 << 20, 2}, {72, 'i', 1, 4096, 2},
        {76, 'i', 1, 4096, 2}, {80, 'i', 2, 1024, 2}, {84, 'i', 1, 1 << 22, 2},
        {88, 'i', 1, (1 << 22) - 1, 0}, {92, 'i', 1, 1 << 30, 2}, {96, 'i', 1, 1 << 30, 2},
        {100, 'f', 0, 1, 2}, {104, 'd', 1e-3, 1e12, 2}, {112, 'c', 0.01, 10000, 1},
        {116, 'c', 0.01, 10000, 1}, {120, 'f', 1e-9, 1e9, 2}, {124, 'f', 1e-9, 1e9, 2}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        size_t at = fields[i].at;
        char kind = fields[i].kind;
        double low = fields[i].low, high = fields[i].high, step = kind == 'i' ? 0 : 1e-6;
        check(may_be(at, kind, low + low * step, 1) == 1 &&
                  may_be(at, kind, high - high * step, 1) == 1, "field %zu: its ends", at);
        check(!may_be(at, kind, kind == 'i' ? high + 1 : high + high * step, 1), "field %zu above",
              at);
        check(kind == 'i' && low == 0 ? 1 : !may_be(at, kind, kind == 'i' ? low - 1 :
              low > 0 ? low - low * step : -1e-30, 1), "field %zu below", at);
        check(may_be(at, kind, 0, 0) == (fields[i].zero > 0), "field %zu: zero, no layers", at);
        check(fields[i].zero < 2 || !may_be(at, kind, high, 0), "field %zu, no layers", at);
        check(may_be(at, kind, 0, 1) == (fields[i].zero == 1 || low == 0), "field %zu: zero", at);
    }
    static const struct { size_t at; char kind; int layers; const char *range; } sentences[] = {
        {68, 'i', 1, "is 4000000000, not 1 to 1048576"}, {68, 'i', 0, "not 0 to 0"},
        {112, 'c', 1, "not 0 or 0.01 to 10000"}};
    for (int i = 0; i < 3; i++)
        check(!may_be(sentences[i].at, sentences[i].kind, 4e9, sentences[i].layers) &&
                  strstr(said, sentences[i].range), "not '%s': %s", sentences[i].range, said);
}

static const uint32_t HOSTILE[] = {0, 1, 2, 3, 15, 16, 17, 64, 255, 256, 1024, 4096, 1u << 20,
                                   1u << 22, 1u << 30, 0x7fffffff, 0x80000000, 0xfffffff0, ~0u,
                                   0x7fc00000, 0x7f800000, 0xbf800000, 0x3f800000, 0x00000001};
enum { N_HOSTILE = sizeof HOSTILE / sizeof *HOSTILE };

/* Every word of header, directory, facts and tokenizer, set to hostile values under
 * a right checksum, then several at once: refused, or harmless. */
static void test_hostile_words(void)
{
    struct image m = build(&tiny_shape), copy = {fresh(m.size), m.size};
    size_t end = (size_t)(section_of(&m, 2) - m.data);
    int full = full_test();
    for (size_t at = 8; at + 4 <= end; at += 4)
        for (int i = full ? 0 : (int)(at / 4 % 3); i < N_HOSTILE; i += full ? 1 : 3) {
            memcpy(copy.data, m.data, m.size);
            put_u32(copy.data + at, HOSTILE[i]);
            seal(&copy);
            opens(&copy);
        }
    for (int i = 0; i < (full ? 100000 : 2000); i++) {
        memcpy(copy.data, m.data, m.size);
        for (uint32_t k = 0; k <= below(3); k++)
            if (below(2))
                put_u32(copy.data + 8 + below((uint32_t)end / 4 - 2) * 4,
                        HOSTILE[below(N_HOSTILE)]);
            else
                copy.data[8 + below((uint32_t)end - 8)] = (uint8_t)rnd();
        seal(&copy);
        opens(&copy);
    }
    free(m.data), free(copy.data);
}

/* Directory entries that lie.  Entry 0 is facts, 1 the tokenizer, 2 attn_norm, 3 q. */
static void test_directory(void)
{
    static const struct {
        int entry;
        uint32_t at, value;
        int legal;
    } cases[] = {
        {0, 0, 2, 0}, {0, 0, 300, 0}, {1, 0, 300, 0}, {0, 4, 1, 0}, {0, 8, 1, 0}, {0, 12, 1, 1},
        {0, 12, 2, 0}, {0, 16, 1, 0}, {0, 24, 1, 0}, {0, 80, 1, 0}, {0, 92, 1, 0}, {1, 40, 1, 0},
        {3, 0, 34, 0}, {3, 0, 36, 0}, {3, 4, 1, 0}, {3, 4, ~0u, 0}, {3, 8, 0, 0}, {3, 8, 6, 0},
        {3, 8, ~0u, 0}, {3, 16, 5, 0}, {3, 20, 1, 0}, {3, 24, 3, 0}, {3, 28, 1, 0}, {3, 32, 0, 0},
        {3, 36, 1, 0}, {3, 36, ~0u, 0}, {3, 40, 0, 0}, {3, 44, 1, 0}, {3, 44, ~0u, 0},
        {2, 8, 2, 0}, {13, 4, 1, 0}, {14, 4, 1, 0},
    };
    struct image m = build(&tiny_shape);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *p = entry_of(&m, cases[i].entry) + cases[i].at;
        uint32_t was = get_u32(p);
        put_u32(p, cases[i].value);
        seal(&m);
        check(opens(&m) == cases[i].legal, "entry %d with %#x at %u is %s", cases[i].entry,
              cases[i].value, cases[i].at, cases[i].legal ? "refused" : "accepted");
        put_u32(p, was);
    }
    free(m.data);
}

/* Files that agree with themselves and are illegal all the same; and a second embedding,
 * which nothing would miss, in the place of the head. */
static void test_consistent_lies(void)
{
    struct shape heads = tiny_shape, odd = tiny_shape, untied = tiny_shape, align = tiny_shape;
    heads.n = 3, heads.k = 2, odd.h = 3, align.align = 32, untied.untied = 1;
    const struct shape *lies[] = {&heads, &odd, &align};
    struct image m;
    for (int i = 0; i < 3; i++) {
        m = build(lies[i]);
        check(!opens(&m), "consistent lie %d", i);
        free(m.data);
    }
    m = build(&untied);
    check(opens(&m), "an untied head");
    put_u32(entry_of(&m, (int)get_u32(m.data + 48) - 1), 16);
    seal(&m);
    check(!opens(&m), "two embeddings");
    free(m.data);
    m = build(&tiny_shape); /* as many bytes as tile_bytes would say */
    struct image x = {fresh(m.size + 64), m.size + 64};
    uint8_t *last = entry_of(&x, (int)get_u32(m.data + 48) - 1);
    memcpy(x.data, m.data, m.size), memset(x.data + m.size, 0, 64);
    put_u32(last + 8, TYPE_BYTES), put_u64(last + 40, 64 + 128), put_u64(x.data + 32, x.size);
    seal(&x);
    check(!opens(&x), "a matrix of bytes");
    free(x.data), free(m.data);
}

/* A tokenizer and nothing else, or with as many sections behind it as there may be. */
static void test_section_counts(void)
{
    static const uint64_t counts[] = {1, 2, 65536, 65537};
    static struct pieces p;
    plain_pieces(&p, 30);
    struct image m = build_tokenizer_file(&p);
    for (int i = 0; i < 4; i++) {
        uint64_t n = counts[i], at = (512 + 96 * n + 63) / 64 * 64, end = at + pieces_bytes(&p);
        struct image c = {NULL, n == 1 ? end : (end + 63) / 64 * 64};
        c.data = fresh(c.size);
        memset(c.data, 0, c.size);
        memcpy(c.data, m.data, 512);
        memcpy(entry_of(&c, 0), entry_of(&m, 1), 96);
        memcpy(c.data + at, section_of(&m, 1), end - at);
        put_u64(c.data + 32, c.size), put_u32(c.data + 48, (uint32_t)n);
        put_u64(entry_of(&c, 0) + 32, at);
        for (uint32_t k = 1; k < n; k++) { /* optional, empty */
            put_u32(entry_of(&c, (int)k), 300), put_u32(entry_of(&c, (int)k) + 4, k);
            put_u32(entry_of(&c, (int)k) + 12, 1), put_u64(entry_of(&c, (int)k) + 32, c.size);
        }
        seal(&c);
        check(opens(&c) == (n <= 65536), "%llu sections", (unsigned long long)n);
        free(c.data);
    }
    free(m.data);
}

/* A missing tensor: its entry becomes a kind unknown but optional.  Only facts can go. */
static void test_missing(void)
{
    struct image m = build(&tiny_shape);
    for (int i = 0; i < (int)get_u32(m.data + 48); i++) {
        uint32_t was = get_u32(entry_of(&m, i));
        put_u32(entry_of(&m, i), 300);
        put_u32(entry_of(&m, i) + 12, 1);
        seal(&m);
        check(opens(&m) == (i == 0), "without section %d (role %u)", i, was);
        put_u32(entry_of(&m, i), was);
        put_u32(entry_of(&m, i) + 12, 0);
    }
    free(m.data);
    struct shape untied = tiny_shape;
    untied.untied = 1;
    m = build(&untied);
    int last = (int)get_u32(m.data + 48) - 1;
    put_u32(entry_of(&m, last), 300), put_u32(entry_of(&m, last) + 12, 1);
    memset(section_of(&m, last), 0xff, 4); /* NaN is no fault in what is not known */
    seal_section(&m, last);
    gemma2_model *x = open_image(&m);
    check(gemma2_check(x, (size_t)last, NULL, 0) == 1, "an optional section is checked");
    gemma2_close(x);
    free(m.data);
}

/* A word in the tokenizer section of a sealed file. */
static void tokenizer_word(struct image *m, size_t at, uint32_t value, int legal, const char *what)
{
    uint8_t *p = section_of(m, 1) + at;
    uint32_t was = get_u32(p);
    put_u32(p, value);
    seal_section(m, 1);
    check(opens(m) == legal, "tokenizer: %s", what);
    put_u32(p, was);
}

/* Whether a file opens whose second section, so many bytes of it, is the last. */
static int opens_cut(const struct image *m, size_t bytes)
{
    size_t size = (size_t)(section_of(m, 1) - m->data) + bytes;
    struct image cut = {fresh(size), size};
    memcpy(cut.data, m->data, size);
    put_u64(entry_of(&cut, 1) + 40, bytes);
    put_u64(cut.data + 32, size);
    seal(&cut);
    int opened = opens(&cut);
    free(cut.data);
    return opened;
}

static void test_tokenizer_section(void)
{
    static struct pieces p;
    plain_pieces(&p, 20);
    add_bytes_pieces(&p);
    struct image m = build_tokenizer_file(&p);
    size_t scores = 64, ends = 64 + 4 * p.n, kinds = 64 + 8 * p.n, blob = 64 + 9 * p.n;
    tokenizer_word(&m, 0, p.n - 1, 0, "another count than the header's");
    tokenizer_word(&m, 0, ~0u, 0, "a huge count");
    tokenizer_word(&m, 4, p.n, 0, "bos outside the vocabulary");
    tokenizer_word(&m, 4, ~0u, 1, "no bos");
    tokenizer_word(&m, 16, ~0u, 1, "no unk, but all bytes");
    tokenizer_word(&m, 20, 0xfffffffe, 0, "a negative turn marker");
    tokenizer_word(&m, 28, p.blob_bytes + 1, 0, "too large a blob");
    tokenizer_word(&m, 32, 1, 0, "reserved bytes");
    tokenizer_word(&m, 60, 1, 0, "reserved bytes");
    tokenizer_word(&m, scores, 0x7fc00000, 0, "a NaN score");
    tokenizer_word(&m, scores + 4, 0xff800000, 0, "an infinite score");
    tokenizer_word(&m, ends + 4, p.ends[2] + 1, 0, "ends that do not ascend");
    tokenizer_word(&m, ends + 4, ~0u, 0, "an end far away");
    tokenizer_word(&m, ends + 4, p.ends[0], 0, "an empty piece");
    tokenizer_word(&m, ends + 4 * (p.n - 1), p.ends[p.n - 1] - 1, 0, "bytes left over");
    tokenizer_word(&m, kinds, 0, 0, "kind 0");
    tokenizer_word(&m, kinds, 0x03030308, 0, "kind 8");
    tokenizer_word(&m, kinds + 8, 0x01010106, 0, "a letter that calls itself a byte");
    tokenizer_word(&m, blob, 0xff, 0, "a piece that is no UTF-8");
    tokenizer_word(&m, blob, 0x80c1, 0, "an overlong piece");
    for (size_t cut = 0; cut <= 64; cut += cut == 62 ? 1 : 62) /* it ends in its head */
        check(!opens_cut(&m, cut), "a tokenizer of %zu bytes", cut);
    put_u32(entry_of(&m, 0), ROLE_TOKENIZER), put_u32(entry_of(&m, 1), ROLE_FACTS);
    for (size_t cut = 0; cut < 12; cut++)
        check(!opens_cut(&m, cut), "facts of %zu bytes", cut);
    free(m.data);
    static const char *const bad[] = {"<0x-1>", "<0xZZ>", "<0x1>", "<0x0a>", "<0x001>", "<0xGG>",
                                      "<0x41>>"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        plain_pieces(&p, 8);
        add_piece(&p, bad[i], GEMMA2_PIECE_BYTE, 0);
        m = build_tokenizer_file(&p);
        check(!opens(&m), "the byte piece %s is accepted", bad[i]);
        free(m.data);
    }
    plain_pieces(&p, 8);
    p.special[3] = -1;
    m = build_tokenizer_file(&p);
    check(!opens(&m), "neither unk nor bytes");
    free(m.data);
    add_bytes_pieces(&p);
    p.n--, p.blob_bytes = p.ends[p.n - 1];
    m = build_tokenizer_file(&p);
    check(!opens(&m), "neither unk nor the last byte");
    free(m.data);
}

/* A vocabulary made to collide: more pieces want one place of the index than it searches. */
static void test_colliding_pieces(void)
{
    static struct pieces p;
    static uint32_t slots[2048];
    struct tokenizer t = {.slots = slots, .mask = 2047};
    char text[16];
    uint32_t tag;
    memset(slots, 0xff, sizeof slots);
    for (int n = MAX_PROBES; n <= MAX_PROBES + 1; n++) {
        start_pieces(&p);
        for (int made = 0, i = 0; made < n; i++) {
            snprintf(text, sizeof text, "%x", (unsigned)i);
            struct text piece = {(const uint8_t *)text, (uint32_t)strlen(text)};
            if (find_slot(&t, piece, &tag) != slots + 1024)
                continue;
            add_piece(&p, text, GEMMA2_PIECE_NORMAL, 0);
            made++;
        }
        while (p.n < 600)
            add_piece(&p, "<0x00>", GEMMA2_PIECE_USER, 0);
        struct image m = build_tokenizer_file(&p);
        char err[256] = "";
        gemma2_model *model = gemma2_open_memory(m.data, m.size, NULL, err, sizeof err);
        check(n > MAX_PROBES ? !model && strstr(err, "alike") : model != NULL,
              "%d colliding pieces: %s", n, err);
        gemma2_close(model);
        free(m.data);
    }
}

static void test_facts(void)
{
    struct model x = make(&tiny_shape);
    size_t size = 9;
    const char *value = gemma2_fact(x.m, "name", &size);
    check(value && size == 4 && !memcmp(value, "test", 4), "fact: name");
    check(gemma2_fact(x.m, "empty", &size) && size == 0, "fact: an empty one");
    check(!gemma2_fact(x.m, "nam", &size) && !gemma2_fact(x.m, "", &size), "facts not there");
    static const struct {
        uint32_t at, value;
    } lies[] = {{0, 2}, {0, 4}, {0, ~0u}, {4, 5}, {4, ~0u}, {8, 3}, {8, ~0u}, {20, 1u << 31}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint8_t *p = section_of(&x.image, 0) + lies[i].at;
        uint32_t was = get_u32(p);
        put_u32(p, lies[i].value);
        seal_section(&x.image, 0);
        check(!opens(&x.image), "facts with %#x at %u", lies[i].value, lies[i].at);
        put_u32(p, was);
    }
    unmake(&x);
}

/* gemma2_check finds every changed byte behind the directory, padding included. */
static int sections_fail(const gemma2_model *m)
{
    int n = 0;
    for (size_t i = 0; i < m->n_sections; i++)
        n += gemma2_check(m, i, NULL, 0) == GEMMA2_ERR_CORRUPT;
    return n;
}

static void check_says(const gemma2_model *m, size_t i, const char *sentence)
{
    char err[128] = "";
    check(gemma2_check(m, i, err, sizeof err) == GEMMA2_ERR_CORRUPT &&
              !strncmp(err, sentence, strlen(sentence)), "'%s', not '%s'", err, sentence);
}

static void test_check(void)
{
    struct model x = make(&tiny_shape);
    int missed = 0;
    check(sections_fail(x.m) == 0, "a sound file has faults");
    for (size_t i = 512 + 96 * x.m->n_sections; i < x.image.size; i++) {
        x.image.data[i] ^= (uint8_t)(1 << i % 8);
        missed += sections_fail(x.m) != 1;
        x.image.data[i] ^= (uint8_t)(1 << i % 8);
    }
    check(!missed, "--check misses %d changed bytes", missed);
    section_of(&x.image, 2)[-1] ^= 1;
    check_says(x.m, 2, "the padding before attn_norm of layer 0 is not zero");
    *section_of(&x.image, 3) ^= 1;
    check_says(x.m, 3, "q of layer 0 does not match");
    *section_of(&x.image, 1) ^= 1;
    check_says(x.m, 1, "tokenizer does not match");
    unmake(&x);
}

/* Values that are not finite, under a right digest: in each type, first row and last. */
static void test_check_values(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct image m = build(&shapes[i]);
        for (int at_end = 0; at_end < 2; at_end++) {
            uint8_t *e = entry_of(&m, 3), *data = section_of(&m, 3);
            uint32_t type = get_u32(e + 8), rows = (uint32_t)get_u64(e + 16);
            uint64_t tile = tensor_bytes(type, 1, get_u64(e + 24));
            uint32_t lane = at_end ? (rows - 1) % 16 : 0, row = at_end ? rows - 1 : 0;
            uint8_t *p = data + row / 16 * tile + lane * 4; /* input 0, or S */
            uint32_t was = get_u32(p);
            put_u32(p, type == BF16 ? 0x7f80 : at_end ? 0x7fc00000 : 0xff800000);
            seal_section(&m, 3);
            gemma2_model *model = open_image(&m);
            check_says(model, 3, "q of layer 0 holds values that are not finite");
            exercise(model);
            gemma2_close(model);
            put_u32(p, was);
        }
        free(m.data);
    }
}

/* ---- files on disk ---- */

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

static void refused(const char *path, const char *needle)
{
    char err[256] = "";
    gemma2_model *m = gemma2_open(path, NULL, err, sizeof err);
    check(!m && strstr(err, needle), "%s: \"%s\" does not say \"%s\"", path, err, needle);
    gemma2_close(m);
}

static void test_foreign(void)
{
    static const struct {
        const char *bytes;
        size_t n;
        const char *needle;
    } cases[] = {
        {"", 0, "is empty"}, {"<!DOCTYPE html>", 15, "web page"}, {"<", 1, "web page"},
        {"\x1f\x8b\x08\0\0\0\0\0", 8, "gzip"}, {"GGUF\3\0\0\0\0\0\0\0", 12, "GGUF"},
        {"\xfd" "7zXZ\0\0\0", 8, "xz"}, {"PK\3\4\0\0\0\0", 8, "zip"},
        {"\x10\0\0\0\0\0\0\0{\"a\":1}       ", 22, "safetensors"},
        {"version https://git-lfs.github.com/spec/v1\n", 43, "LFS"},
        {"\x89GEMMA2\n", 8, "cut short"}, {"\x89GEMMA2\n\1\0\0\0", 12, "cut short"},
        {"\x89GEMMA", 6, "not a gemma2.c model"}, {"hello", 5, "not a gemma2.c model"},
        {"x", 1, "not a gemma2.c model"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(write_file("foreign", cases[i].bytes, cases[i].n), cases[i].needle);
    refused(in_dir("nothing"), "cannot open");
    refused(scratch_dir, "is a directory");
#ifdef _WIN32
    refused("NUL", "device");
    refused("\xff.bin", "UTF-8");
#else
    check(mkfifo(in_dir("fifo"), 0600) == 0, "mkfifo");
    refused(in_dir("fifo"), "pipe");
    refused("/dev/zero", "device");
    remove(in_dir("fifo"));
#endif
    remove(in_dir("foreign"));
}

/* By path, mapped and read, and from memory: the same model; sizes are named when wrong. */
static void test_open_ways(void)
{
    struct image m = build(&tiny_shape);
    char needle[64];
    gemma2_open_params p;
    gemma2_open_params_init(&p);
    for (p.read_into_memory = 0; p.read_into_memory < 2; p.read_into_memory++) {
        const char *path = write_file("model", m.data, m.size);
        gemma2_model *x = gemma2_open(path, &p, NULL, 0);
        check(x && sections_fail(x) == 0, "open, read_into_memory %u", p.read_into_memory);
        if (x)
            exercise(x);
        gemma2_close(x);
    }
    snprintf(needle, sizeof needle, "has %zu bytes, but should have %zu", m.size - 1, m.size);
    refused(write_file("model", m.data, m.size - 1), needle);
    check(!gemma2_open_memory(m.data + 32, m.size, NULL, NULL, 0), "memory not aligned to 64");
    check(!gemma2_open_memory(NULL, 100, NULL, NULL, 0) && !gemma2_open(NULL, NULL, NULL, 0),
          "NULLs");
    p.read_into_memory = 1;
    check(!gemma2_open_memory(m.data, m.size, &p, needle, sizeof needle) &&
              strstr(needle, "params not from"), "memory to be read into memory: %s", needle);
    p.struct_size = 4;
    check(!gemma2_open(in_dir("model"), &p, NULL, 0) &&
              !gemma2_open_memory(m.data, m.size, &p, NULL, 0), "open params of a wrong size");
    remove(in_dir("model"));
    gemma2_close(NULL);
    free(m.data);
}

static void test_weight_file(void)
{
    test_models_open();
    test_truncated();
    test_flipped();
    test_header_limits();
    test_field_limits();
    test_hostile_words();
    test_directory();
    test_consistent_lies();
    test_section_counts();
    test_missing();
    test_tokenizer_section();
    test_colliding_pieces();
    test_facts();
    test_check();
    test_check_values();
    test_foreign();
    test_open_ways();
}

/* ===================================================================================
 * 3. Number formats, read bit by bit as the table in section 3 has them
 * =================================================================================== */

static void test_bf16(void)
{
    int bad = 0;
    for (uint32_t h = 0; h < 1 << 16; h++) {
        int e = h >> 7 & 255, m = h & 127;
        double x = e == 0 ? ldexp(m, -133) : ldexp(128 + m, e - 134);
        float y = from_bf16((uint16_t)h);
        if (e == 255)
            bad += m ? !isnan(y) : !isinf(y);
        else
            bad += (double)y != (h >> 15 ? -x : x) || (signbit(y) != 0) != (int)(h >> 15);
    }
    check_none(bad, "bf16 values");
}

/* Weight [row][col] of a quantised tensor, exactly: S and s * v. */
static int32_t weight_at(uint32_t type, const uint8_t *data, uint32_t cols, uint32_t row,
                         uint32_t col, float *scale)
{
    static const int code[16] = {-31, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 28};
    uint32_t group_bytes = type == Q8 ? 512 : type == Q6 ? 384 : 256, lane = row % 16;
    const uint8_t *tile = data + row / 16 * tensor_bytes(type, 1, cols);
    const uint8_t *block = tile + 64 + col / 256 * (128 + 8 * group_bytes);
    const uint8_t *group = block + 128 + col % 256 / 32 * group_bytes;
    int s = block[col % 256 / 32 * 16 + lane], step = col % 32 / 4, input = lane * 4 + col % 4;
    *scale = float_of(get_u32(tile + lane * 4));
    if (type == Q8)
        return s * (group[step * 64 + input] ^ 128) - s * 128;
    int byte = group[step / 2 * 64 + input], low = step % 2 ? byte / 16 : byte % 16;
    int sign = s > 127 ? s - 256 : s;
    if (type == Q6)
        return sign * ((group[256 + step / 4 * 64 + input] >> 2 * (step % 4) & 3) * 16 + low - 32);
    return (sign - (s & 1)) / 2 * (code[low] + 4 * (s & 1));
}

static struct matrix random_matrix(uint32_t type, uint32_t rows, uint32_t cols)
{
    uint8_t *data = fresh(tensor_bytes(type, rows, cols));
    struct matrix w = {data, type, rows, cols, (size_t)tensor_bytes(type, 1, cols)};
    memset(data, 0, tensor_bytes(type, rows, cols));
    fill_tensor(data, type, rows, cols);
    return w;
}

static void test_unpack(void)
{
    static const uint32_t cols[] = {1, 31, 256, 257, 300};
    for (uint32_t type = Q8; type <= Q4; type++)
        for (int i = 0; i < 5; i++) {
            struct matrix w = random_matrix(type, 19, cols[i]);
            float *y = fresh(cols[i] * sizeof *y), scale;
            int bad = 0;
            for (uint32_t r = 0; r < 19; r++) {
                read_row(&w, r, y);
                for (uint32_t k = 0; k < cols[i]; k++) {
                    int32_t v = weight_at(type, w.data, cols[i], r, k, &scale);
                    bad += y[k] != scale * (float)v;
                }
            }
            check(!bad, "%s, %u columns: %d weights wrong", types[type].name, cols[i], bad);
            free(y), free((void *)(uintptr_t)w.data);
        }
}

static struct input random_input(size_t rows, uint32_t cols)
{
    size_t ldq = round_up(cols, 256);
    struct input in = {fresh(rows * cols * 4), cols, fresh(rows * ldq), fresh(rows * ldq / 8),
                       fresh(rows * ldq / 8), fresh(round_up(rows, 16) * ldq * 2), ldq};
    return in;
}

static void quantise_input(const struct input *in, size_t rows, uint32_t cols)
{
    for (size_t t = 0; t < rows; t++)
        quantise(in->x + t * in->ldx, cols, in->q + t * in->ldq, in->scale + t * in->ldq / 32,
                 in->sum + t * in->ldq / 32);
}

static void free_input(const struct input *in)
{
    free(in->x), free(in->q), free(in->scale), free(in->sum), free(in->pairs);
}

/* A product with a unit vector is a column: the same weights that read_row sees. */
static void test_rows_are_columns(void)
{
    for (uint32_t type = F32; type < N_TYPES; type++) {
        uint32_t cols = 67;
        struct matrix w = random_matrix(type, 16, cols);
        struct input in = random_input(1, cols);
        float row[67], y[1][TILE];
        int bad = 0;
        for (uint32_t k = 0; k < cols; k++) {
            memset(in.x, 0, cols * sizeof *in.x);
            in.x[k] = 1;
            quantise_input(&in, 1, cols);
            scalar_kernels.product[type](w.data, cols, &in, 0, 1, y);
            for (uint32_t r = 0; r < 16; r++) {
                read_row(&w, r, row);
                bad += fabsf(y[0][r] - row[k]) > (type >= Q8 ? 1e-6f : 0) * fabsf(row[k]);
            }
        }
        check(!bad, "%s: %d products with a unit vector", types[type].name, bad);
        free_input(&in), free((void *)(uintptr_t)w.data);
    }
}

static void test_formats(void)
{
    test_bf16();
    test_unpack();
    test_rows_are_columns();
}

/* ===================================================================================
 * 4. Kernels: the specification against libm, then every row against the specification
 * =================================================================================== */

/* |y - x| in units of the last place of a float near x. */
static double ulps(float y, double x)
{
    int e;
    frexp(x, &e);
    return fabs((double)y - x) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

/* Largest error over the floats from `low` to `high` (bits), every step-th. */
static double sweep(float (*f)(float), double (*truth)(double), uint32_t low, uint32_t high,
                    uint32_t step)
{
    double worst = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(max : worst)
#endif
    for (uint32_t bits = low; bits <= high - step; bits += step) {
        float x = float_of(bits);
        double error = ulps(f(x), truth((double)x));
        worst = error > worst ? error : worst;
    }
    return worst;
}

static float call_exp(float x) { return exp_f32(x); }
static float call_tanh(float x) { return tanh_f32(x); }

static void test_exp_tanh_error(void)
{
    uint32_t step = full_test() ? 1 : 499;
    double up = sweep(call_exp, exp, bits_of(1e-30f), bits_of(88.4f), step);
    double down = sweep(call_exp, exp, bits_of(-1e-30f), bits_of(-87.3f), step);
    double near = sweep(call_tanh, tanh, 1, bits_of(0.625f), step);
    double far = sweep(call_tanh, tanh, bits_of(0.625f) - step, bits_of(20.0f), step);
    check(up < 1.5 && down < 1.5, "exp is off by %.3f and %.3f ulp", up, down);
    check(near < 3 && far < 3, "tanh is off by %.3f and %.3f ulp", near, far);
    if (full_test())
        printf("largest errors in ulp: exp %.4f above 0, %.4f below; tanh %.4f below 0.625, %.4f "
               "above\n", up, down, near, far);
}

static void test_exp_tanh_ends(void)
{
    check(exp_f32(0.0f) == 1 && exp_f32(-0.0f) == 1 && exp_f32(1e-45f) == 1, "exp near 0");
    check(exp_f32(-INFINITY) == 0 && exp_f32(-87.4f) == 0 && exp_f32(-3e38f) == 0, "exp far below");
    check(exp_f32(-87.3f) >= 0x1p-126f, "exp(-87.3) is no denormal");
    check(exp_f32(88.5f) >= 2.4e38f && exp_f32(INFINITY) >= 2.4e38f, "exp far above");
    check(isfinite(exp_f32(INFINITY)), "exp of infinity is finite");
    check(isnan(exp_f32(NAN)) && isnan(exp_f32(-NAN)), "exp of NaN");
    check(tanh_f32(INFINITY) == 1 && tanh_f32(-INFINITY) == -1 && tanh_f32(-3e38f) == -1,
          "tanh ends");
    check(tanh_f32(0.0f) == 0 && tanh_f32(-0.0f) == 0, "tanh of zeros");
    check(tanh_f32(1e-45f) == 1e-45f && tanh_f32(-1e-40f) == -1e-40f, "tanh of denormals");
    check(isnan(tanh_f32(NAN)) && isnan(tanh_f32(-NAN)), "tanh of NaN");
    int bad = 0;
    for (uint32_t i = 0; i < 200000; i++) {
        float x = uniform(-25, 25);
        bad += tanh_f32(-x) != -tanh_f32(x) || fabsf(tanh_f32(x)) > 1;
    }
    check_none(bad, "tanh is odd and within 1");
}

/* A half's value, in double. */
static double half_value(uint32_t h)
{
    int e = h >> 10 & 31, m = h & 1023;
    double x = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h >> 15 ? -x : x;
}

static void test_halves(void)
{
    int bad = 0, bad_ties = 0;
    for (uint32_t h = 0; h < 1 << 16; h++) {
        float x = from_half((uint16_t)h);
        if ((h & 0x7c00) == 0x7c00) {
            bad += h & 1023 ? !isnan(x) : !isinf(x);
            continue;
        }
        bad += (double)x != half_value(h) || half_of(x) != h;
        if ((h & 0x7fff) == 0x7bff)
            continue;
        float middle = (float)((half_value(h) + half_value(h + 1)) / 2); /* exact in float */
        float out = float_of(bits_of(middle) + 1), in = float_of(bits_of(middle) - 1);
        bad_ties += half_of(middle) != h + (h & 1) || half_of(out) != h + 1 || half_of(in) != h;
    }
    check_none(bad, "halves to float and back");
    check_none(bad_ties, "halves at their rounding boundaries");
    check(half_of(65519.9f) == 0x7bff && half_of(65520) == 0x7bff && half_of(1e30f) == 0x7bff &&
              half_of(-INFINITY) == 0xfbff, "halves saturate");
    check(isnan(from_half(half_of(NAN))), "half of NaN");
    check(half_of(0x1p-25f) == 0 && half_of(0x1.000002p-25f) == 1 && half_of(-1e-40f) == 0x8000,
          "halves near zero");
}

static void test_log_and_angles(void)
{
    int bad = 0;
    for (int i = 0; i < 100000; i++) {
        double x = ldexp(1 + (double)rnd() / 0x1p32, (int)below(1200) - 600);
        bad += fabs(log_f64(x) - log(x)) > 1e-15 + 4e-16 * fabs(log(x));
    }
    check(log_f64(1) == 0 && bad == 0, "log: %d wrong", bad);
    bad = 0;
    for (int i = 0; i < 200000; i++) {
        double x = i < 1000 ? i : ldexp((double)rnd(), (int)below(30) - 41);
        float c, s;
        cos_sin(x, &c, &s);
        bad += fabs(c - cos(x)) > 1e-14 + 0x1p-24 * 0.51 * fabs(cos(x)) * 2;
        bad += fabs(s - sin(x)) > 1e-14 + 0x1p-24 * 0.51 * fabs(sin(x)) * 2;
    }
    check_none(bad, "cos and sin");
}

/* Gemma scales by 1 + w: with w = 0 the row has mean square 1, with w = -1 it is zero. */
static void test_norm_and_gelu(void)
{
    float x[50], w[50], y[50], gate[3] = {1, -1, 0.5f}, up[3] = {1, 2, -3};
    double mean = 0;
    for (int i = 0; i < 50; i++)
        x[i] = uniform(-3, 3), w[i] = 0;
    rms_norm(x, w, 0, 50, y);
    for (int i = 0; i < 50; i++)
        mean += (double)y[i] * y[i] / 50, w[i] = -1;
    check(fabs(mean - 1) < 1e-6, "norm with w = 0");
    rms_norm(x, w, 0, 50, y);
    check(y[0] == 0 && y[49] == 0, "norm with w = -1");
    geglu(gate, up, 3); /* the tanh form: 0.841192, not the exact gelu's 0.841345 */
    check(fabsf(gate[0] - 0.8411920f) < 1e-6f && fabsf(gate[1] + 2 * 0.1588080f) < 1e-6f,
          "gelu, tanh form");
    float capped[2] = {5, -100};
    soft_cap(capped, 2, 30);
    check(fabs(capped[0] - 30 * tanh(5 / 30.0)) < 1e-6 && fabs(capped[1] + 29.9238) < 1e-3, "cap");
}

/* The soft-cap acts on scores before the mask: masked places weigh exactly nothing. */
static void test_weigh(void)
{
    struct kv_head kv = {.cap = 2};
    float s[32];
    for (int i = 0; i < 32; i++)
        s[i] = i == 5 ? NAN : (float)i;
    struct partial p = weigh(&scalar_kernels, &kv, s, 32, 7, 9);
    check(s[5] == 0 && s[6] == 0 && s[10] == 0 && s[9] == 1, "masked places weigh 0");
    check(p.max <= 2 && fabsf(s[7] - expf(2 * tanhf(3.5f) - 2 * tanhf(4.5f))) < 1e-6f, "capped");
    p = weigh(&scalar_kernels, &kv, s, 32, 20, 3);
    check(p.max == -INFINITY && p.sum == 0 && s[25] == 0, "a query that sees nothing here");
}

/* The specification's quantisation, in exact arithmetic. */
static int quantise_is_off(const float *x, uint32_t n, const int8_t *q, const float *scale,
                           const int32_t *sum)
{
    int bad = 0;
    for (size_t g = 0; g < round_up(n, 256) / 32; g++) {
        float max = 0, v;
        int total = 0;
        for (size_t i = g * 32; i < g * 32 + 32 && i < n; i++)
            max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
        for (size_t i = g * 32; i < g * 32 + 32; i++) {
            v = i < n && max >= 1e-30f ? x[i] * (127.0f / max) : 0;
            v = v > 127 ? 127 : v < -127 ? -127 : v;
            bad += q[i] != (int)nearbyint((double)v);
            total += q[i];
        }
        bad += scale[g] != (max >= 1e-30f ? max / 127.0f : 0) || sum[g] != total;
    }
    return bad;
}

static void test_quantise(void)
{
    int bad = 0;
    for (uint32_t n = 1; n < 600; n += 1 + n / 7)
        for (int kind = 0; kind < 4; kind++) {
            struct input in = random_input(1, n);
            for (uint32_t i = 0; i < n; i++)
                in.x[i] = kind == 0 ? uniform(-1, 1) : kind == 1 ? (float)below(255) - 127.0f
                        : kind == 2 ? (float)below(510) * 0.5f - 127 : uniform(-3e-30f, 3e-30f);
            if (kind == 2) /* ties: with a maximum of 127 halves stay halves */
                in.x[n / 2] = 127;
            quantise_input(&in, 1, n);
            bad += quantise_is_off(in.x, n, in.q, in.scale, in.sum);
            free_input(&in);
        }
    check_none(bad, "quantised inputs");
}

/* ---- rows of the table against scalar, every bit ---- */

enum { N_EXTREMES = 9 };

/* Bytes of a quantised tile, and S, driven to their limits. */
static void extreme_tile(uint8_t *tile, size_t bytes, int kind)
{
    static const float scales[] = {1, -1, 1e30f, -1e-38f, 1e-45f, 3e38f, -0.0f, 1e-3f, 0};
    static const uint8_t fill[] = {0x7f, 0x81, 0xff, 0x80, 0, 1, 0xf0, 0x0f, 0xfe};
    memset(tile, fill[kind], bytes);
    for (int lane = 0; lane < 16; lane++)
        put_u32(tile + 4 * lane, bits_of(scales[(kind + lane / 4) % 9]));
    for (size_t i = 64; i < bytes && kind % 2; i++)
        if (below(3) == 0)
            tile[i] = fill[below(9)];
}

static void extreme_input(const struct input *in, size_t rows, uint32_t cols, int kind)
{
    for (size_t t = 0; t < rows; t++)
        for (uint32_t i = 0; i < cols; i++)
            in->x[t * in->ldx + i] = kind < 5 ? (t % 2 ? -127.0f : 127.0f)
                                   : kind == 5 ? 1e30f * (float)(i % 3)
                                   : kind == 6 ? 1e-38f : uniform(-200, 200);
}

static int product_differs(const struct kernels *row, uint32_t type, uint32_t cols, int kind)
{
    struct matrix w = random_matrix(type, 16, cols);
    struct input in = random_input(9, cols);
    int bad = 0;
    if (type >= Q8 && kind)
        extreme_tile((uint8_t *)(uintptr_t)w.data, w.tile_bytes, kind - 1);
    extreme_input(&in, 9, cols, kind ? kind - 1 : 9);
    quantise_input(&in, 9, cols);
    for (int n = 1; n <= 8; n++) {
        float (*y)[TILE] = fresh(sizeof *y * (size_t)n), (*z)[TILE] = fresh(sizeof *z * (size_t)n);
        row->product[type](w.data, cols, &in, 1, n, y);
        scalar_kernels.product[type](w.data, cols, &in, 1, n, z);
        bad += !!memcmp(y, z, sizeof *y * (size_t)n);
        free(y), free(z);
    }
    free_input(&in), free((void *)(uintptr_t)w.data);
    return bad;
}

static void row_products(const struct kernels *row)
{
    static const uint32_t cols[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129,
                                    255, 256, 257, 287, 289, 300, 511, 512, 513, 599, 600};
    for (uint32_t type = F32; type < N_TYPES; type++) {
        int bad = 0;
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
            for (int kind = 0; kind < (type >= Q8 && i % 5 == 0 ? N_EXTREMES + 1 : 1); kind++)
                bad += product_differs(row, type, cols[i], kind);
        check(!bad, "%s: %d products of %s differ from scalar", row->name, bad, types[type].name);
    }
}

/* Two tiles for many tokens: the same sums as a tile for few. */
static int panel_differs(const struct kernels *row, uint32_t type, uint32_t cols, int n, int kind)
{
    struct matrix w = random_matrix(type, 32, cols);
    const uint8_t *tiles[2] = {w.data, w.data + w.tile_bytes};
    struct input in = random_input((size_t)n + 1, cols);
    float (*y)[2][TILE] = fresh(sizeof *y * (size_t)n), z[1][TILE];
    int bad = 0;
    for (int i = 0; i < 2 && kind; i++)
        extreme_tile((uint8_t *)(uintptr_t)tiles[i], w.tile_bytes, kind - 1);
    extreme_input(&in, (size_t)n + 1, cols, kind ? kind - 1 : 9);
    quantise_input(&in, (size_t)n + 1, cols);
    row->panel[type](tiles, cols, &in, 1, n, y);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < 2; i++) {
            scalar_kernels.product[type](tiles[i], cols, &in, 1 + (size_t)t, 1, z);
            bad += !!memcmp(y[t][i], z[0], sizeof z[0]);
        }
    free(y), free_input(&in), free((void *)(uintptr_t)w.data);
    return bad;
}

static void row_panels(const struct kernels *row)
{
    static const uint32_t cols[] = {1, 33, 256, 257, 600};
    for (uint32_t type = F32; type < N_TYPES; type++) {
        int bad = 0;
        for (int n = 1; n <= 18 && row->panel[type]; n++)
            for (int i = 0; i < 5; i++)
                for (int kind = 0; kind <= (n == 15 ? N_EXTREMES : 0); kind++)
                    bad += panel_differs(row, type, cols[i], n < 18 ? n : MAX_PANEL_ROWS, kind);
        check(!bad, "%s: %d panels of %s differ from scalar", row->name, bad, types[type].name);
    }
}

static int quantise_differs(const struct kernels *row, uint32_t n, int special)
{
    struct input a = random_input(1, n), b = random_input(1, n);
    for (uint32_t i = 0; i < n; i++)
        a.x[i] = uniform(-8, 8);
    if (special)
        mix_in_special(a.x, n, special == 1);
    memset(a.q, 99, a.ldq), memset(b.q, 77, b.ldq);
    quantise(a.x, n, a.q, a.scale, a.sum);
    row->quantise(a.x, n, b.q, b.scale, b.sum);
    int bad = memcmp(a.q, b.q, a.ldq) || memcmp(a.scale, b.scale, a.ldq / 8) ||
              memcmp(a.sum, b.sum, a.ldq / 8);
    free_input(&a), free_input(&b);
    return bad;
}

static int same_floats(float *a, float *b, size_t n)
{
    int same = !memcmp(a, b, n * sizeof *a);
    free(a), free(b);
    return same;
}

static float *copy_floats(const float *x, size_t n)
{
    float *y = fresh(n * sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

/* The element-wise kernels and sums on n elements; special: 1 finite ones, 2 all. */
static int vectors_differ(const struct kernels *row, uint32_t n, int special)
{
    float *x = random_floats(n, 12), *w = random_floats(n, 2), *y = copy_floats(x, n), *z;
    int bad = 0;
    if (special)
        mix_in_special(y, n, special == 1);
    z = copy_floats(y, n);
    row->soft_cap(y, n, 30), soft_cap(z, n, 30);
    bad += !same_floats(y, z, n);
    y = copy_floats(x, n), z = copy_floats(x, n);
    if (special)
        mix_in_special(y, n, special == 1), memcpy(z, y, n * 4);
    row->geglu(y, w, n), geglu(z, w, n);
    bad += !same_floats(y, z, n);
    y = copy_floats(x, n), z = copy_floats(x, n);
    if (special)
        y[n / 2] = z[n / 2] = -INFINITY, y[n / 3] = z[n / 3] = special == 1 ? -90.0f : NAN;
    float a = row->exp_sum(y, n, 11.5f), b = exp_sum(z, n, 11.5f);
    bad += bits_of(a) != bits_of(b) || !same_floats(y, z, n);
    y = copy_floats(x, n), z = copy_floats(x, n); /* the norm in place, the other apart */
    row->rms_norm(y, w, 1e-6f, n, y), rms_norm(x, w, 1e-6f, n, z);
    bad += !same_floats(y, z, n);
    free(x), free(w);
    return bad;
}

static int halves_differ(const struct kernels *row, uint32_t n)
{
    float *x = random_floats(n, 70000);
    uint16_t *y = fresh(n * 2), *z = fresh(n * 2);
    for (uint32_t i = 0; i < n; i++)
        if (below(2))
            x[i] = float_of(rnd());
    mix_in_special(x, n, 0);
    row->to_half(x, n, y), to_half(x, n, z);
    int bad = memcmp(y, z, n * 2) != 0;
    free(x), free(y), free(z);
    return bad;
}

static void row_vectors(const struct kernels *row)
{
    int bad[3] = {0, 0, 0};
    for (uint32_t n = 1; n <= 600; n += 1 + n / 20)
        for (int special = 0; special < 3; special++) {
            bad[0] += quantise_differs(row, n, special);
            bad[1] += vectors_differ(row, n, special);
            bad[2] += halves_differ(row, n);
        }
    check(!bad[0], "%s: %d quantised rows differ from scalar", row->name, bad[0]);
    check(!bad[1], "%s: %d vectors differ from scalar", row->name, bad[1]);
    check(!bad[2], "%s: %d rows of halves differ from scalar", row->name, bad[2]);
}

/* n_groups x 16 cached vectors, each group in memory of its own. */
static void random_cache(void **groups, int n_groups, size_t floats, int half)
{
    for (int g = 0; g < n_groups; g++) {
        float *x = random_floats(floats, 2);
        groups[g] = x;
        if (half) {
            groups[g] = fresh(floats * 2);
            to_half(x, floats, groups[g]);
            free(x);
        }
    }
}

static int attention_differs(const struct kernels *row, int half, int n, int head_dim, int groups)
{
    static float s[2][MAX_QUERIES][KEY_BLOCK];
    size_t width = round_up((size_t)head_dim, 16), used = (size_t)n * width;
    void *keys[16], *values[16];
    float *q[8], *o[2] = {fresh(used * 4), fresh(used * 4)};
    int last = groups * 16 - 1 - (int)below(16), first = (int)below((uint32_t)last + 1), bad = 0;
    random_cache(keys, groups, (size_t)head_dim * 16, half);
    random_cache(values, groups, width * 16, half);
    for (int j = 0; j < n; j++)
        q[j] = random_floats((size_t)head_dim, 1);
    memset(s, 0x55, sizeof s);
    scalar_kernels.scores[half]((const float *const *)q, n, head_dim, (const void *const *)keys,
                                groups, s[0]);
    row->scores[half]((const float *const *)q, n, head_dim, (const void *const *)keys, groups,
                      s[1]);
    bad += !!memcmp(s[0], s[1], sizeof s[0]);
    scalar_kernels.mix[half]((const float (*)[KEY_BLOCK])s[0], n, (int)width,
                             (const void *const *)values, first, last, o[0]);
    row->mix[half]((const float (*)[KEY_BLOCK])s[0], n, (int)width, (const void *const *)values,
                   first, last, o[1]);
    bad += !same_floats(o[0], o[1], used);
    for (int j = 0; j < n; j++)
        free(q[j]);
    for (int g = 0; g < groups; g++)
        free(keys[g]), free(values[g]);
    return bad;
}

static void row_attention(const struct kernels *row)
{
    static const int head_dims[] = {2, 4, 6, 10, 16, 18, 34, 64, 80, 128, 144, 256};
    for (int half = 0; half < 2; half++) {
        int bad = 0;
        for (size_t i = 0; i < sizeof head_dims / sizeof *head_dims; i++)
            for (int n = 1; n <= 8; n++)
                bad += attention_differs(row, half, n, head_dims[i], 1 + (int)below(16)) +
                       attention_differs(row, half, n, head_dims[i], 1 + n % 4);
        check(!bad, "%s: attention over an %s cache: %d differ from scalar", row->name,
              half ? "f16" : "f32", bad);
    }
}

/* a * b + c = 0 when the product is rounded first, 2^-24 when it is fused with the sum. */
static void row_rounds_products(const struct kernels *row)
{
    float a = 1 + 0x1p-7f, b = 1 + 0x1p-17f, c = -(1 + 0x1p-7f + 0x1p-17f), y[1][TILE];
    float x[2] = {c, b}, tile[32], s[1][KEY_BLOCK], p[1][KEY_BLOCK] = {{c, b}}, o[16];
    uint16_t half[32];
    struct input in = {.x = x, .ldx = 2};
    const void *group[1] = {tile};
    const float *q[1] = {x};
    for (int i = 0; i < 32; i++) {
        tile[i] = i < 16 ? 1 : a;
        half[i] = i % 2 ? (uint16_t)(bits_of(a) >> 16) : 0x3f80;
    }
    row->product[F32]((uint8_t *)tile, 2, &in, 0, 1, y);
    check(y[0][3] == 0, "%s: f32 products are fused with sums", row->name);
    row->product[BF16]((uint8_t *)half, 2, &in, 0, 1, y);
    check(y[0][3] == 0, "%s: bf16 products are fused with sums", row->name);
    row->scores[0](q, 1, 2, group, 1, s);
    check(s[0][3] == 0, "%s: scores are fused", row->name);
    row->mix[0]((const float (*)[KEY_BLOCK])p, 1, 16, group, 0, 1, o);
    check(o[3] == 0, "%s: the mix is fused", row->name);
}

/* ---- the matrix class of a row against the exact class, within its rounding ---- */

/* Relative error of one product of a sum: its input rounded to bf16, with quantised weights
 * both factors; or fused floats. */
static double matrix_epsilon(const struct matrix_kernels *m, uint32_t type)
{
    return m->cached_bytes == 4 ? 0x1p-20 : type == BF16 ? 0x1.02p-8 : 0x1.02p-7;
}

/* Largest deviation from sums in double, as a multiple of what rounding may cause. */
static double matrix_panel_error(const struct matrix_kernels *m, uint32_t type, uint32_t cols,
                                 int n)
{
    struct matrix w = random_matrix(type, 32, cols);
    const uint8_t *tiles[2] = {w.data, w.data + w.tile_bytes};
    struct input in = random_input((size_t)n, cols);
    float (*y)[2][TILE] = fresh(sizeof *y * (size_t)n), *row = fresh(cols * 4);
    double worst = 0;
    extreme_input(&in, (size_t)n, cols, 9);
    memset(in.pairs, 0xff, round_up((size_t)n, 16) * in.ldq * 2); /* NaN */
    for (int t = 0; t < n && m->pack_row; t++)
        m->pack_row(in.x + (size_t)t * in.ldx, cols, pairs_row(&in, (size_t)t));
    m->panel[type](tiles, cols, &in, 0, n, y);
    for (uint32_t r = 0; r < 32; r++) {
        read_row(&w, r, row);
        for (int t = 0; t < n; t++) {
            double sum = 0, size = 0, got = y[t][r / 16][r % 16];
            for (uint32_t k = 0; k < cols; k++) {
                double product = (double)row[k] * in.x[(size_t)t * in.ldx + k];
                sum += product, size += fabs(product);
            }
            double error = fabs(got - sum) / (size * matrix_epsilon(m, type) + 1e-30);
            worst = error <= worst ? worst : error; /* NaN counts */
        }
    }
    free(y), free(row), free_input(&in), free((void *)(uintptr_t)w.data);
    return worst;
}

/* Tokens in one call, and each alone: the same bits. */
static int matrix_panel_depends(const struct matrix_kernels *m, uint32_t type, uint32_t cols,
                                int n)
{
    struct matrix w = random_matrix(type, 32, cols);
    const uint8_t *tiles[2] = {w.data, w.data + w.tile_bytes}, *twice[2] = {w.data, w.data};
    struct input in = random_input((size_t)n, cols);
    float (*y)[2][TILE] = fresh(sizeof *y * (size_t)n), (*z)[2][TILE] = fresh(sizeof *z * 8);
    int bad = 0;
    extreme_input(&in, (size_t)n, cols, 9);
    for (int t = 0; t < n && m->pack_row; t++)
        m->pack_row(in.x + (size_t)t * in.ldx, cols, pairs_row(&in, (size_t)t));
    m->panel[type](tiles, cols, &in, 0, n, y);
    for (int t = 0; t < n; t += 8) {
        int some = n - t < 8 ? 1 + (int)below((uint32_t)(n - t)) : 8;
        m->panel[type](t % 16 ? tiles : twice, cols, &in, (size_t)t, some, z);
        for (int i = 0; i < some; i++)
            bad += !!memcmp(y[t + i][0], z[i][0], sizeof z[i][0]);
    }
    free(y), free(z), free_input(&in), free((void *)(uintptr_t)w.data);
    return bad;
}

static void row_matrix_panels(const struct kernels *row)
{
    static const uint32_t cols[] = {1, 2, 3, 16, 31, 32, 33, 100, 128, 129, 255, 256, 257, 600};
    static const int sizes[] = {1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 50};
    for (uint32_t type = F32; type < N_TYPES; type++)
        for (int i = 0; i < 14 && row->matrix->panel[type]; i++) {
            int n = sizes[(i * 5 + 3) % 14];
            double error = matrix_panel_error(row->matrix, type, cols[i], n);
            check(error < 1, "%s: matrix products of %s, %u x %d: %.2f of the allowed error",
                  row->name, types[type].name, cols[i], n, error);
            check(!matrix_panel_depends(row->matrix, type, cols[i], n),
                  "%s: matrix products of %s depend on their batch", row->name,
                  types[type].name);
        }
}

/* Scores of n queries with 16 * groups keys, and the mix of their values from `first` on,
 * both against sums in double. */
static double matrix_attention_error(const struct matrix_kernels *m, int n, int h, int groups)
{
    _Alignas(64) static uint8_t keys[CACHE_PANEL], values[CACHE_PANEL];
    static float s[MAX_QUERIES][KEY_BLOCK];
    void *key[16], *value[16];
    float *q[8], *o[8];
    double worst = 0;
    int n_keys = groups * 16, first = (int)below((uint32_t)groups) * 16, n_valid = n_keys - 5;
    random_cache(key, groups, (size_t)h * 16, 1);
    random_cache(value, groups, (size_t)h * 16, 1);
    ((uint16_t *)value[groups - 1])[15 * h] = 0x7e00; /* NaN where nothing was stored yet */
    for (int g = 0; g < groups; g++) {
        m->pack_keys(key[g], h, keys + (size_t)g * 16 * (size_t)h * m->cached_bytes);
        m->pack_values(value[g], h, n_valid - g * 16 < 16 ? n_valid - g * 16 : 16, g * 16, values);
    }
    for (int j = 0; j < n; j++)
        q[j] = random_floats((size_t)h, 1), o[j] = random_floats((size_t)h, 1);
    m->scores((const float *const *)q, n, h, keys, groups, s);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < n_keys; i++) {
            double sum = 0, size = 0;
            for (int d = 0; d < h; d++) {
                double x = q[j][d] * half_value(((uint16_t *)key[i / 16])[d * 16 + i % 16]);
                sum += x, size += fabs(x);
            }
            double error = fabs(s[j][i] - sum) / (size * matrix_epsilon(m, BF16));
            worst = error <= worst ? worst : error;
        }
    for (int j = 0; j < n; j++) /* weights, in the places from `first` on */
        for (int i = 0; i < n_keys - first; i++)
            s[j][i] = first + i < n_valid ? uniform(0, 1) : 0;
    float *before[8];
    for (int j = 0; j < n; j++)
        before[j] = copy_floats(o[j], (size_t)h);
    m->mix((const float (*)[KEY_BLOCK])s, n, h, values, first, n_keys - first, o);
    for (int j = 0; j < n; j++)
        for (int d = 0; d < h; d++) {
            double sum = before[j][d], size = fabs(sum);
            for (int i = first; i < n_valid; i++) {
                uint16_t v = ((uint16_t *)value[i / 16])[i % 16 * h + d];
                double x = s[j][i - first] * half_value(v);
                sum += x, size += fabs(x);
            }
            double error = fabs(o[j][d] - sum) / (size * matrix_epsilon(m, BF16));
            worst = error <= worst ? worst : error;
        }
    for (int j = 0; j < n; j++)
        free(q[j]), free(o[j]), free(before[j]);
    for (int g = 0; g < groups; g++)
        free(key[g]), free(value[g]);
    return worst;
}

static void row_matrix_attention(const struct kernels *row)
{
    static const int head_dims[] = {32, 64, 96, 128, 192, 256, 320, 512};
    for (int i = 0; i < 8; i++) {
        int most = panel_positions(head_dims[i], row->matrix->cached_bytes) / 16;
        for (int n = 1; n <= 8; n++) {
            int groups = n == 8 ? most : 1 + (int)below((uint32_t)most);
            double error = matrix_attention_error(row->matrix, n, head_dims[i], groups);
            check(error < 1, "%s: matrix attention, %d queries, %d dimensions: %.2f of the "
                  "allowed error", row->name, n, head_dims[i], error);
        }
    }
}

/* The emulation leaves the other rows to the program without it. */
static int is_tested(const struct kernels *row)
{
    return !EMULATED || !strcmp(row->name, "amx") || !strcmp(row->name, "avxvnni");
}

/* Whether a row's matrix class may be run here; asks for the permission it needs. */
static int has_matrix(const struct kernels *row)
{
    if (!is_tested(row) || !row->matrix || !row->available())
        return 0;
    if (permitted_matrix(row->matrix) == row->matrix)
        return 1;
    printf("not run: the matrix class of %s, this system refuses it\n", row->name);
    return 0;
}

static void test_rows(void)
{
    for (int i = 0; i < N_KERNELS; i++) {
        if (!is_tested(all_kernels[i]))
            continue;
        if (!all_kernels[i]->available()) {
            printf("not run: the %s kernels, this CPU lacks them\n", all_kernels[i]->name);
            continue;
        }
        row_rounds_products(all_kernels[i]);
        if (all_kernels[i] == &scalar_kernels)
            continue;
        row_products(all_kernels[i]);
        row_panels(all_kernels[i]);
        row_vectors(all_kernels[i]);
        row_attention(all_kernels[i]);
        if (has_matrix(all_kernels[i])) {
            row_matrix_panels(all_kernels[i]);
            row_matrix_attention(all_kernels[i]);
        }
    }
}

static void test_kernels(void)
{
    test_exp_tanh_error();
    test_exp_tanh_ends();
    test_halves();
    test_log_and_angles();
    test_norm_and_gelu();
    test_weigh();
    test_quantise();
    test_rows();
}

/* ===================================================================================
 * 5. Work sharing, and the floating-point environment
 * =================================================================================== */

/* Feeds ids in chunks; how many chunks end in other logits than steps did. */
static int chunks_differ(const gemma2_model *m, struct setup o, const int32_t *ids, size_t n,
                         size_t chunk, const float *truth)
{
    gemma2_session *s = start(m, o);
    float *logits = fresh(vocab(m) * sizeof *logits);
    int bad = 0;
    for (size_t at = 0; at < n;) {
        size_t size = n - at < chunk ? n - at : chunk;
        bad += gemma2_eval(s, ids + at, size, logits) != GEMMA2_OK;
        at += size;
        bad += logits_differ(m, logits, truth, at - 1);
    }
    bad += gemma2_position(s) != (int32_t)n || !!memcmp(gemma2_history(s), ids, n * sizeof *ids);
    gemma2_session_free(s);
    free(logits);
    return bad;
}

/* Every task once, in the environment of the specification, whatever the host has. */
struct shared_tasks {
    int runs[1000], wrong_environment;
};

static void count_task(void *context, size_t task)
{
    struct shared_tasks *tasks = context;
    volatile float tiny = 1e-38f;
    tasks->runs[task]++;
    if (tiny * 0.5f * 2 != tiny) /* flushed, or rounded otherwise */
        tasks->wrong_environment = 1;
}

static void test_share(void)
{
    static const int threads[] = {1, 2, 3, 5, 16, 1024};
    static struct shared_tasks tasks;
    for (int i = 0; i < 6; i++)
        for (size_t n = 0; n <= 1000; n += 1 + n * 3) {
            int bad = 0;
            memset(&tasks, 0, sizeof tasks);
            share(threads[i] < 1024 || n < 20 ? threads[i] : 20, n, SIZE_MAX / 2, count_task,
                  &tasks);
            for (size_t k = 0; k < 1000; k++)
                bad += tasks.runs[k] != (k < n);
            check(!bad && !tasks.wrong_environment, "%zu tasks on %d threads", n, threads[i]);
        }
}

/* A model large enough for teams, in two passes: where a team has more threads than the
 * machine, each hand-over costs milliseconds. */
static void test_threads(void)
{
    static const int threads[] = {2, 3, 5, 16};
    struct shape shape = {"wide", 2, 264, 8, 4, 32, 600, 700, 100, 300, 50, 30, 1, 0,
                          {Q8, F32, Q4, BF16, Q6}, 64};
    int32_t ids[270];
    struct model x = make(&shape);
    float scores[2][270], *logits = fresh(2 * vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, 270);
    for (int i = 0; i < 5; i++) {
        gemma2_session *s = start(x.m, (struct setup){270, 200, i ? threads[i - 1] : 1, 0, 0});
        float *to = logits + (i > 0) * vocab(x.m);
        int status = gemma2_prefill(s, ids, 200, NULL);
        status |= gemma2_score(s, ids + 200, 60, 1, scores[i > 0]);
        for (size_t k = 260; k < 265; k++)
            status |= gemma2_eval(s, ids + k, 1, to);
        check(status == GEMMA2_OK, "%d threads: %d", s->n_threads, status);
        check(!i || (!logits_differ(x.m, to, logits, 0) && !memcmp(scores[0], scores[1], 60 * 4)),
              "%d threads change results", s->n_threads);
        gemma2_session_free(s);
    }
    free(logits);
    unmake(&x);
}

#if defined(__SSE__) || defined(__aarch64__)
/* Everything with numbers in it, as a host would call it: opening, text, logits, scores. */
struct numbers {
    float logits[3][128], score[3], logprob;
    double sums[5000];
    int32_t id, text[8];
    char scratch[512];
};

static void compute_numbers(const struct image *image, int threads, struct numbers *out)
{
    int32_t ids[20];
    gemma2_sampler sampler;
    gemma2_model *m = open_image(image);
    gemma2_session *s = start(m, (struct setup){32, 8, threads, 0, 0});
    for (int i = 0; i < 20; i++)
        ids[i] = i * 7 % (int)vocab(m);
    memset(out, 0, sizeof *out);
    gemma2_sampler_init(&sampler, 7);
    gemma2_encode(m, "aw50bc", -1, 0, out->text, 8, out->scratch, sizeof out->scratch);
    memset(out->scratch, 0, sizeof out->scratch);
    gemma2_prefill(s, ids, 10, out->logits[0]);
    gemma2_eval(s, ids + 10, 5, out->logits[1]);
    gemma2_eval_rows(&(gemma2_row){s, ids[15], out->logits[2]}, 1);
    gemma2_score(s, ids + 16, 3, 5, out->score);
    gemma2_logprob(out->logits[0], vocab(m), 3, &out->logprob);
    out->id = gemma2_sample(s, &sampler, out->logits[2]);
    gemma2_importance(s, ids, 9, 1, out->sums);
    gemma2_session_free(s);
    gemma2_close(m);
}

#ifdef __SSE__
/* Rounding down, up and to zero; FTZ and DAZ, alone and rounding down; no exception masked, so
 * that any sum outside the engine's own environment ends the program. */
static const unsigned host[] = {0x1f80 | 0x2000, 0x1f80 | 0x4000, 0x1f80 | 0x6000,
                                0x1f80 | 0x8040, 0x1f80 | 0x8040 | 0x2000, 0};

/* The x87's control word beside it, in 32-bit programs: the same rounding and masks; floats of
 * 24 bits, as Direct3D wants them, in all settings but the usual one. */
static uint16_t x87_control(unsigned bits)
{
    return (uint16_t)((bits == 0x1f80 ? 0x300 : 0) | (bits >> 3 & 0xc00) | (bits >> 7 & 0x3f));
}

static unsigned get_environment(void)
{
    unsigned bits = _mm_getcsr() & ~0x3fu;
    uint16_t control = x87_control(bits);
#ifdef __i386__
    __asm__ volatile("fnstcw %0" : "=m"(control));
#endif
    return (control & 0xf3f) == x87_control(bits) ? bits : ~0u;
}

static void set_environment(unsigned bits)
{
#ifdef __i386__
    const uint16_t control = x87_control(bits);
    __asm__ volatile("fnclex\n\tfldcw %0" : : "m"(control));
#endif
    _mm_setcsr(bits);
}
#else
/* Rounding up, down and to zero; 1 << 24: FZ; 1 << 25: one NaN; 1 << 26: halves without
 * infinity. */
static const unsigned host[] = {1 << 22, 2 << 22, 3 << 22, 1 << 24 | 1 << 25,
                                1 << 24 | 1 << 26 | 2 << 22};

static unsigned get_environment(void)
{
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return (unsigned)bits;
}

static void set_environment(unsigned bits)
{
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)bits));
}
#endif
enum { N_HOSTS = sizeof host / sizeof *host };

/* The same on every thread of a team.  Some OpenMPs put the caller's back at a region's end. */
static void set_environments(int threads, unsigned bits)
{
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    set_environment(bits);
#endif
    set_environment(bits);
}

static int environments_differ(int threads, unsigned bits)
{
    int differ = 0;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(+ : differ)
#endif
    differ += get_environment() != bits;
    return differ;
}

/* Workers compute in the engine's environment whatever theirs was, and find theirs again. */
static void worker_environments(void)
{
    static struct shared_tasks tasks;
    unsigned old = get_environment();
    for (int k = 0; k < N_HOSTS; k++) {
        memset(&tasks, 0, sizeof tasks);
        set_environments(3, host[k]);
        float_env caller = float_env_enter();
        share(3, 1000, SIZE_MAX / 2, count_task, &tasks);
        float_env_leave(caller);
        int lost = environments_differ(3, host[k]);
        set_environments(3, old);
        check(!lost, "environment %#x: lost on %d threads", host[k], lost);
        check(!tasks.wrong_environment, "environment %#x: workers compute in it", host[k]);
    }
}

/* A host that flushes denormals, rounds in its own way or traps exceptions gets the same bits,
 * and finds its setting again. */
static void host_environments(const struct shape *shape, int threads)
{
    struct model x = make(shape);
    struct numbers truth, other;
    unsigned old = get_environment();
    compute_numbers(&x.image, 1, &truth);
    for (int k = 0; k < N_HOSTS; k++) {
        set_environment(host[k]);
        compute_numbers(&x.image, threads, &other);
        unsigned after = get_environment();
        set_environment(old);
        check(after == host[k], "%s, %d threads: environment %#x lost", shape->name, threads,
              host[k]);
        check(!memcmp(&truth, &other, sizeof truth), "%s, %d threads: environment %#x changes "
              "results", shape->name, threads, host[k]);
    }
    unmake(&x);
}

/* Scores so small that a host's setting makes them zero still rank the merges. */
static void host_encodes(void)
{
    static struct pieces p;
    unsigned old = get_environment();
    start_pieces(&p);
    add_piece(&p, "a", GEMMA2_PIECE_NORMAL, -3);
    add_piece(&p, "b", GEMMA2_PIECE_NORMAL, -3);
    add_piece(&p, "c", GEMMA2_PIECE_NORMAL, -3);
    add_piece(&p, "ab", GEMMA2_PIECE_NORMAL, float_of(1));
    add_piece(&p, "bc", GEMMA2_PIECE_NORMAL, float_of(2));
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    for (int k = 0; k < N_HOSTS; k++) {
        char scratch[512];
        int32_t ids[3] = {0};
        set_environment(host[k]);
        int64_t n = gemma2_encode(m, "abc", 3, 0, ids, 3, scratch, sizeof scratch);
        set_environment(old);
        check(n == 2 && ids[0] == 4 && ids[1] == 8, "environment %#x: a text's ids", host[k]);
    }
    gemma2_close(m);
    free(image.data);
}

static void test_float_environment(void)
{
    struct shape wide = {"wide", 2, 264, 8, 4, 32, 600, 100, 100, 300, 50, 30, 1, 0,
                         {Q8, F32, Q4, BF16, Q6}, 64};
    for (int i = 0; i < N_SHAPES; i++)
        host_environments(&shapes[i], 1);
    host_environments(&wide, 3);
    worker_environments();
    host_encodes();
}
#else
static void test_float_environment(void) { printf("not run: floating-point environments\n"); }
#endif

static void test_work_sharing(void)
{
    test_share();
    test_threads();
    test_float_environment();
}

/* ===================================================================================
 * 6. The model and its sessions
 * =================================================================================== */

/* Chunks of every kind, with rings of window 8 + n_batch slots, to the context's last place. */
static void test_chunks(void)
{
    static const size_t chunks[] = {2, 3, 5, 7, 8, 9, 10, 13, 16, 17, 40};
    int32_t ids[40];
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        random_ids(x.m, ids, 40);
        float *truth = step_by_step(x.m, (struct setup){40, 1, 1, 0, 0}, ids, 40);
        for (int batch = 1; batch <= 9; batch++)
            for (size_t k = (size_t)batch % 2; k < 11; k += 2)
                check(!chunks_differ(x.m, (struct setup){40, batch, 1, 0, 0}, ids, 40, chunks[k],
                                     truth),
                      "%s: n_batch %d, chunks of %zu", shapes[i].name, batch, chunks[k]);
        check(!chunks_differ(x.m, (struct setup){0, 0, 1, 0, 0}, ids, 40, 40, truth),
              "%s: default context and batch", shapes[i].name);
        free(truth);
        unmake(&x);
    }
}

/* Whole models on every row of kernels. */
static void test_models_on_rows(void)
{
    int32_t ids[30];
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        random_ids(x.m, ids, 30);
        x.m->isa = &scalar_kernels;
        float *truth = step_by_step(x.m, (struct setup){30, 1, 1, 0, 0}, ids, 30);
        for (int k = 0; k < N_KERNELS; k++) {
            x.m->isa = all_kernels[k];
            if (all_kernels[k]->available())
                check(!chunks_differ(x.m, (struct setup){30, 11, 1, 0, 0}, ids, 30, 12, truth) &&
                          !chunks_differ(x.m, (struct setup){30, 4, 1, 0, 0}, ids, 30, 1, truth),
                      "%s on %s differs from scalar", shapes[i].name, all_kernels[k]->name);
        }
        free(truth);
        unmake(&x);
    }
}

/* ---- gemma2_prefill in the matrix class ---- */

/* Feeds ids in chunks: logits after every multiple of 10 tokens that ends a chunk. */
static void prefill_chunks(const gemma2_model *m, struct setup o, const int32_t *ids, size_t n,
                           size_t chunk, float *logits)
{
    gemma2_session *s = start(m, o);
    for (size_t at = 0; at < n; at += chunk)
        check(gemma2_prefill(s, ids + at, n - at < chunk ? n - at : chunk,
                             logits + at / chunk * vocab(m)) == GEMMA2_OK, "prefill at %zu", at);
    gemma2_session_free(s);
}

static double largest_difference(const float *a, const float *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        worst = d <= worst ? worst : d;
    }
    return worst;
}

/* Logits after n tokens, in chunks, each of which is taken back and read again where `twice`. */
static int repeats_differ(const gemma2_model *m, struct setup o, const int32_t *ids, size_t n,
                          size_t chunk, int twice, const float *truth)
{
    gemma2_session *s = start(m, o);
    float *logits = fresh(vocab(m) * sizeof *logits);
    int bad = 0;
    for (size_t at = 0, size; at < n; at += size) {
        size = n - at < chunk ? n - at : chunk;
        for (int i = 0; i <= twice; i++) {
            bad += gemma2_rewind(s, (int32_t)at) != GEMMA2_OK;
            bad += gemma2_prefill(s, ids + at, size, logits) != GEMMA2_OK;
        }
    }
    bad += logits_differ(m, logits, truth, 0);
    gemma2_session_free(s);
    free(logits);
    return bad;
}

/* One model on one row: near the exact class, but not equal to it (it has been used); and
 * equal to itself however tokens are cut and shared. */
static void matrix_model(const struct model *x, const struct shape *shape, const int32_t *ids)
{
    static const struct setup setups[] = {{170, 1, 1, 0, 0}, {170, 7, 1, 0, 0},
                                          {170, 16, 3, 0, 0}, {170, 170, 2, 0, 0},
                                          {170, 100, 3, 0, 0}};
    size_t floats = 17 * vocab(x->m);
    float *truth = step_by_step(x->m, (struct setup){170, 1, 1, 0, 0}, ids, 170);
    float *first = fresh(floats * 4), *logits = fresh(floats * 4);
    double worst = 0;
    for (size_t i = 0; i < 5; i++) {
        prefill_chunks(x->m, setups[i], ids, 170, 10, i ? logits : first);
        check(!i || !memcmp(first, logits, floats * 4), "%s on %s: prefill in batches of %d, "
              "%d threads, differs", shape->name, x->m->isa->name, setups[i].batch,
              setups[i].threads);
    }
    prefill_chunks(x->m, setups[3], ids, 170, 170, logits);
    check(!logits_differ(x->m, logits, first, 16), "%s on %s: prefill at once differs",
          shape->name, x->m->isa->name);
    for (size_t chunk = 1; chunk <= 64; chunk = chunk * 5 - 1)
        for (int twice = 0; twice < 2; twice++)
            check(!repeats_differ(x->m, (struct setup){170, 64, 1, 0, 0}, ids, 170, chunk, twice,
                                  first + 16 * vocab(x->m)),
                  "%s on %s: prefill by %zu, %s, differs", shape->name, x->m->isa->name, chunk,
                  twice ? "each twice" : "once");
    for (size_t k = 0; k < 17; k++) {
        double d = largest_difference(first + k * vocab(x->m),
                                      truth + (k * 10 + 9) * vocab(x->m), vocab(x->m));
        worst = d <= worst ? worst : d;
    }
    check(worst > 0, "%s on %s: prefill is the exact class", shape->name, x->m->isa->name);
    /* four times the largest seen: inputs rounded to bf16, or to int8 at a small difference */
    double most = x->m->matrix->cached_bytes == 2 ? 0.25 : shape->types[0] >= Q8 ? 0.035 : 1e-3;
    check(worst < most, "%s on %s: prefill is off by %g", shape->name, x->m->isa->name, worst);
    free(truth), free(first), free(logits);
}

static void test_matrix_models(void)
{
    static const struct shape shape[] = {
        {"bf16 heads of 32", 3, 64, 4, 2, 32, 96, 70, 37, 300, 50, 30, 5, 0,
         {BF16, BF16, BF16, BF16, BF16}, 64},
        {"bf16 heads of 64", 2, 50, 3, 1, 64, 70, 71, 100, 300, 20, 0, 1, 1,
         {BF16, BF16, BF16, BF16, BF16}, 64},
        {"quantised heads of 32", 3, 300, 4, 2, 32, 520, 70, 37, 300, 50, 30, 5, 0,
         {Q8, Q6, Q4, Q8, Q4}, 64}};
    int32_t ids[170];
    for (int i = 0; i < 3; i++) {
        struct model x = make(&shape[i]);
        random_ids(x.m, ids, 170);
        for (int k = 0; k < N_KERNELS; k++)
            if (has_matrix(all_kernels[k])) {
                x.m->isa = all_kernels[k], x.m->matrix = all_kernels[k]->matrix;
                matrix_model(&x, &shape[i], ids);
            }
        unmake(&x);
    }
}

/* f32 weights never meet the matrix class, nor do the sessions of a model opened so, be it
 * from a path or from memory. */
static void test_matrix_declined(void)
{
    struct shape shape = {"exact", 2, 64, 4, 2, 32, 96, 70, 37, 64, 50, 30, 1, 0,
                          {F32, F32, F32, F32, F32}, 64};
    int32_t ids[40];
    float *logits = fresh(100 * 4);
    for (int i = 0; i < 3; i++) {
        struct model x = {build(&shape), NULL};
        const char *path = write_file("exact", x.image.data, x.image.size);
        gemma2_open_params params;
        gemma2_open_params_init(&params);
        params.exact_prefill = i > 0;
        x.m = i < 2 ? gemma2_open(path, &params, NULL, 0) :
              gemma2_open_memory(x.image.data, x.image.size, &params, NULL, 0);
        check(x.m && !x.m->matrix, "%s: the matrix class is in use", i ? "declined" : "f32");
        random_ids(x.m, ids, 40);
        float *truth = step_by_step(x.m, (struct setup){40, 1, 1, 0, 2}, ids, 40);
        prefill_chunks(x.m, (struct setup){40, 40, 2, 0, 2}, ids, 40, 40, logits);
        check(!logits_differ(x.m, logits, truth, 39), "%s: prefill is not exact",
              i ? "declined" : "f32");
        free(truth);
        unmake(&x);
        for (int k = 0; k < 5; k++)
            shape.types[k] = BF16;
    }
    remove(in_dir("exact"));
    free(logits);
}

/* Rows of several unlike sessions in shared passes, against each one alone. */
enum { N_SHARING = 5 };

static void share_passes(const gemma2_model *m, gemma2_session **s, int32_t (*ids)[30],
                         float **truth, int *bad)
{
    gemma2_row rows[8];
    float *logits = fresh(8 * vocab(m) * sizeof *logits);
    int32_t position[8], owner[8];
    for (int pass = 0; pass < 25; pass++) {
        size_t n = 0;
        for (int i = 0; i < N_SHARING; i++) {
            int k = (i + pass) % N_SHARING; /* each leads in turn */
            for (uint32_t r = below(4); r > 0 && n < 8; r--) {
                int32_t at = gemma2_position(s[k]), before = 0;
                for (size_t j = 0; j < n; j++)
                    before += owner[j] == k;
                if (at + before >= 30)
                    break;
                rows[n] = (gemma2_row){s[k], ids[k][at + before], logits + n * vocab(m)};
                position[n] = at + before, owner[n++] = k;
            }
        }
        if (!n)
            continue;
        *bad += gemma2_eval_rows(rows, n) != GEMMA2_OK;
        for (size_t j = 0; j < n; j++)
            *bad += logits_differ(m, rows[j].logits, truth[owner[j]], (size_t)position[j]);
    }
    free(logits);
}

static void test_shared_passes(void)
{
    static const struct setup setups[N_SHARING] = {{30, 8, 1, 8, 0}, {64, 9, 1, 3, 0},
                                                   {30, 8, 1, 8, 1}, {50, 16, 1, 5, 2},
                                                   {30, 8, 1, 1, 0}};
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        gemma2_session *s[N_SHARING];
        int32_t ids[N_SHARING][30];
        float *truth[N_SHARING];
        int bad = 0;
        for (int k = 0; k < N_SHARING; k++) {
            random_ids(x.m, ids[k], 30);
            s[k] = start(x.m, setups[k]);
            truth[k] = step_by_step(x.m, setups[k], ids[k], 30);
        }
        share_passes(x.m, s, ids, truth, &bad);
        check(!bad, "%s: %d rows differ in shared passes", shapes[i].name, bad);
        for (int k = 0; k < N_SHARING; k++)
            gemma2_session_free(s[k]), free(truth[k]);
        unmake(&x);
    }
}

/* Far into a context: attention split over blocks of 256 keys for 1 to 4 rows, windows that
 * cross the blocks' edges.  `at` are chunks that end at or around those edges. */
static int far_differs(const gemma2_model *m, struct setup o, const int32_t *ids,
                       const float *truth, const int *sizes)
{
    gemma2_session *s = start(m, o);
    float *logits = fresh(vocab(m) * sizeof *logits);
    size_t at = 0;
    int bad = 0;
    for (int i = 0; sizes[i]; i++) {
        bad += gemma2_eval(s, ids + at, (size_t)sizes[i], logits) != GEMMA2_OK;
        at += (size_t)sizes[i];
        bad += logits_differ(m, logits, truth, at - 1);
    }
    gemma2_session_free(s);
    free(logits);
    return bad;
}

static void test_far(void)
{
    static const int sizes[] = {253, 1, 1, 1, 1, 1, 1, 2, 3, 4, 3, 240, 1, 1, 1, 2,
                                1, 4, 100, 1, 0};
    static const int32_t windows[] = {1, 8, 100, 255, 256, 257, 300};
    int32_t ids[640];
    struct model x = make(&long_shape);
    random_ids(x.m, ids, 640);
    for (int cache = 1; cache <= 2; cache++)
        for (int k = cache - 1; k < 7; k += 2) {
            struct setup o = {640, 1, 1, windows[k], cache};
            float *truth = step_by_step(x.m, o, ids, 640);
            for (o.batch = 4; o.batch <= 64; o.batch += 60)
                for (o.threads = 1; o.threads <= 16; o.threads += 15)
                    check(!far_differs(x.m, o, ids, truth, sizes),
                          "window %d, n_batch %d, %d threads, cache %d: far logits differ",
                          o.window, o.batch, o.threads, cache);
            free(truth);
        }
    unmake(&x);
}

/* Two long sessions of unlike contexts share a pass that the shorter or longer one leads. */
static void test_far_shared(void)
{
    int32_t ids[500];
    struct model x = make(&long_shape);
    float *logits = fresh(4 * vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, 500);
    float *truth = step_by_step(x.m, (struct setup){500, 1, 1, 0, 0}, ids, 500);
    for (int lead = 0; lead < 2; lead++) {
        gemma2_session *s[2] = {start(x.m, (struct setup){300, 16, 16, 0, 0}),
                                start(x.m, (struct setup){500, 16, 16, 0, 0})};
        gemma2_eval(s[0], ids, 280, NULL);
        gemma2_eval(s[1], ids, 480, NULL);
        gemma2_row rows[4];
        for (int i = 0; i < 4; i++)
            rows[i] = (gemma2_row){s[(i / 2 + lead) % 2], 0, logits + (size_t)i * vocab(x.m)};
        for (int i = 0; i < 4; i++)
            rows[i].id = ids[(rows[i].session == s[0] ? 280 : 480) + i % 2];
        check(gemma2_eval_rows(rows, 4) == GEMMA2_OK, "far rows");
        for (int i = 0; i < 4; i++)
            check(!logits_differ(x.m, rows[i].logits, truth,
                                 (rows[i].session == s[0] ? 280u : 480u) + (unsigned)i % 2),
                  "far rows, lead %d, row %d", lead, i);
        gemma2_session_free(s[0]), gemma2_session_free(s[1]);
    }
    free(logits), free(truth);
    unmake(&x);
}

/* ---- traps of Gemma 2, where a direct test is cheap (the others: test_golden.c) ---- */

/* In one local layer of window W, position p sees p - W + 1 and not p - W; a global one sees
 * all. */
static void window_edge(uint32_t window, uint32_t local)
{
    struct shape shape = shapes[0];
    shape.layers = 1, shape.local = local, shape.window = window, shape.context = window + 4;
    struct model x = make(&shape);
    int32_t n = (int32_t)window + 4, *ids = fresh((size_t)n * 4);
    float *truth = NULL, *logits = fresh(5 * vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, (size_t)n);
    for (int changed = -1; changed < 3; changed++) {
        int32_t was = changed < 0 ? 0 : ids[changed];
        if (changed >= 0)
            ids[changed] = (was + 1) % (int)vocab(x.m);
        gemma2_session *s = start(x.m, (struct setup){n, 256, 1, 0, 0});
        gemma2_eval(s, ids, (size_t)n - 5, NULL);
        for (int i = 0; i < 5; i++)
            gemma2_eval(s, ids + n - 5 + i, 1, logits + (size_t)i * vocab(x.m));
        gemma2_session_free(s);
        for (int i = 0; i < 5 && changed >= 0; i++) {
            int p = n - 5 + i; /* W - 1 .. W + 3 */
            check(logits_differ(x.m, logits + (size_t)i * vocab(x.m), truth, (size_t)i) ==
                      (!local || p - changed < (int)window),
                  "window %u, local %u: position %d, change at %d", window, local, p, changed);
        }
        if (changed >= 0)
            ids[changed] = was;
        else
            truth = logits, logits = fresh(5 * vocab(x.m) * sizeof *logits);
    }
    free(truth), free(logits), free(ids);
    unmake(&x);
}

static void test_window_edge(void)
{
    for (uint32_t local = 0; local < 2; local++) {
        window_edge(8, local);
        window_edge(4096, local);
    }
}

/* Contexts that end at, before and behind a window of 4096: filled to the last place, one
 * token more is refused and changes nothing, whichever call brings it. */
static void context_edge(const struct model *x, const int32_t *ids, int32_t context,
                         const float *truth)
{
    float *logits = fresh(vocab(x->m) * sizeof *logits), *logprobs = fresh(5000 * 4);
    gemma2_session *s = start(x->m, (struct setup){context, 100, 1, 0, 1});
    size_t n = (size_t)context;
    gemma2_row rows[2] = {{s, ids[n - 1], logits}, {s, ids[n], logits}};
    int bad = gemma2_prefill(s, ids, n + 1, logits) != GEMMA2_ERR_CONTEXT;
    bad += gemma2_eval(s, ids, n + 1, logits) != GEMMA2_ERR_CONTEXT;
    bad += gemma2_score(s, ids, n + 1, -1, logprobs) != GEMMA2_ERR_CONTEXT;
    check(!bad && gemma2_position(s) == 0, "context %d: a token more at once", context);
    bad = gemma2_eval(s, ids, n - 1, logits) != GEMMA2_OK;
    bad += logits_differ(x->m, logits, truth, n - 2);
    check(!bad, "context %d: all but the last place", context);
    bad = gemma2_eval(s, ids + n - 1, 2, logits) != GEMMA2_ERR_CONTEXT;
    bad += gemma2_eval_rows(rows, 2) != GEMMA2_ERR_CONTEXT || gemma2_position(s) != context - 1;
    check(!bad, "context %d: two tokens for the last place", context);
    bad = gemma2_eval_rows(rows, 1) != GEMMA2_OK || logits_differ(x->m, logits, truth, n - 1);
    check(!bad, "context %d: the last place", context);
    bad = gemma2_eval(s, ids + n, 1, logits) != GEMMA2_ERR_CONTEXT;
    bad += gemma2_prefill(s, ids + n, 1, logits) != GEMMA2_ERR_CONTEXT;
    bad += gemma2_score(s, ids + n, 1, -1, logprobs) != GEMMA2_ERR_CONTEXT;
    bad += gemma2_eval_rows(rows + 1, 1) != GEMMA2_ERR_CONTEXT;
    check(!bad && gemma2_position(s) == context && gemma2_history(s)[n - 1] == ids[n - 1],
          "context %d: it is full", context);
    check(gemma2_rewind(s, context - 9) == GEMMA2_OK &&
              gemma2_eval(s, ids + n - 9, 9, logits) == GEMMA2_OK &&
              !logits_differ(x->m, logits, truth, n - 1), "context %d: its end again", context);
    gemma2_session_free(s);
    free(logits), free(logprobs);
}

/* Chunks that end around position 4096 of a window of 4096, where rings of every size wrap. */
static void test_wide_window(void)
{
    static const struct shape shape = {"wide window", 2, 9, 2, 1, 4, 16, 40, 4096, 4200, 5, 10, 1,
                                       0, {F32, BF16, F32, F32, F32}, 64};
    static const int sizes[][9] = {{4095, 1, 1, 1, 1, 1, 90, 0}, {4096, 1, 1, 92, 0},
                                   {4097, 1, 1, 91, 0}, {4094, 5, 3, 88, 0}, {4090, 90, 10, 0},
                                   {1000, 1000, 1000, 1000, 94, 1, 1, 94, 0}};
    struct model x = make(&shape);
    int32_t *ids = fresh(4200 * 4);
    random_ids(x.m, ids, 4200);
    float *truth = step_by_step(x.m, (struct setup){4200, 1, 1, 0, 1}, ids, 4190);
    for (int i = 0; i < 6; i++)
        check(!far_differs(x.m, (struct setup){4200, i % 2 ? 16 : 250, 1, 0, 1}, ids,
                           truth, sizes[i]), "chunks %d around position 4096", i);
    for (int32_t context = 4095; context <= 4097; context++)
        context_edge(&x, ids, context, truth);
    free(truth), free(ids);
    unmake(&x);
}

static void scale_f32(const struct image *m, int section, float factor)
{
    uint8_t *p = section_of(m, section);
    for (uint64_t i = 0; i < get_u64(entry_of(m, section) + 40); i += 4)
        put_u32(p + i, bits_of(get_f32(p + i) * factor));
}

/* Twice the query scale undoes half the q weights, twice the embedding scale half the
 * embedding, to the bit: both scales are applied, once, and to nothing else. */
static void test_scales(void)
{
    struct shape shape = shapes[0];
    int32_t ids[20];
    shape.untied = 1;
    struct model x = make(&shape);
    random_ids(x.m, ids, 20);
    float *truth = step_by_step(x.m, (struct setup){20, 1, 1, 0, 0}, ids, 20);
    for (int which = 0; which < 2; which++) {
        size_t at = which ? 124 : 120;
        uint32_t was = get_u32(x.image.data + at);
        for (int step = 0; step < 2; step++) {
            if (step == 0)
                put_u32(x.image.data + at, bits_of(float_of(was) * 2));
            for (int l = 0; l < 3 && step; l++)
                if (which == 0)
                    scale_f32(&x.image, 3 + 11 * l, 0.5f);
            if (which && step)
                scale_f32(&x.image, 2 + 33 + 1, 0.5f);
            seal(&x.image);
            gemma2_model *m = open_image(&x.image);
            check(chunks_differ(m, (struct setup){20, 4, 1, 0, 0}, ids, 20, 20, truth) == !step,
                  "%s scale, step %d", which ? "embedding" : "query", step);
            gemma2_close(m);
        }
    }
    free(truth);
    unmake(&x);
}

/* Each layer's own bit decides: a global one holds the context, a local one its window. */
static void test_layer_kinds(void)
{
    struct model x = make(&shapes[5]);
    gemma2_session *s = start(x.m, (struct setup){64, 4, 1, 0, 0});
    for (uint32_t l = 0; l < shapes[5].layers; l++)
        check(s->cache[l].slots == (shapes[5].local >> l & 1 ? 16 : 64), "layer %u: slots", l);
    gemma2_session_free(s);
    unmake(&x);
}

/* Bytes of a cache: of a local layer the window and a batch, where the context is not less. */
static void test_plans(void)
{
    static const int32_t contexts[] = {1, 10, 17, 64};
    for (int i = 0; i < N_SHAPES * 4 * 2 * 2; i++) {
        const struct shape *s = &shapes[i % N_SHAPES];
        struct model x = make(s);
        gemma2_session_params p;
        gemma2_plan plan = {0, 0, 0, 0};
        gemma2_session_params_init(&p);
        p.n_context = contexts[i / N_SHAPES % 4], p.n_threads = 1;
        p.n_batch = i / (N_SHAPES * 8) ? 20 : 1;
        p.cache_type = i / (N_SHAPES * 4) % 2 ? GEMMA2_CACHE_F16 : GEMMA2_CACHE_F32;
        uint64_t want = 0, number = p.cache_type == GEMMA2_CACHE_F16 ? 2 : 4;
        for (uint32_t l = 0; l < s->layers; l++) {
            int32_t slots = s->local >> l & 1 ? min_i32(p.n_context, 8 + p.n_batch) : p.n_context;
            uint64_t heads = ((uint64_t)slots + 15) / 16 * 16 * s->k * number;
            want += (heads * s->h + 63) / 64 * 64 + heads * ((s->h + 15) / 16 * 16);
        }
        check(gemma2_session_plan(x.m, &p, &plan) == GEMMA2_OK && plan.cache == want,
              "%s, context %d: a cache of %llu bytes, not %llu", s->name, p.n_context,
              (unsigned long long)plan.cache, (unsigned long long)want);
        unmake(&x);
    }
}

/* ---- rewinding ---- */

/* A random walk of steps and rewinds, against sessions that never rewound. */
static void rewind_walk(const gemma2_model *m, struct setup o, int *n_refused, int *bad)
{
    gemma2_session *s = start(m, o);
    float *logits = fresh(vocab(m) * sizeof *logits);
    int32_t ids[40], position = 0, high = 0;
    for (int step = 0; step < 60; step++) {
        int32_t back = (int32_t)below(step % 3 ? 4 : 12), to = max_i32(0, position - back);
        if (step % 8 == 7)
            to = min_i32(position, step / 8 % 3);
        int status = gemma2_rewind(s, to);
        *bad += status != GEMMA2_OK && status != GEMMA2_ERR_REWIND;
        *bad += status == GEMMA2_ERR_REWIND && (!to || high <= o.window || high - to <= o.batch);
        *n_refused += status == GEMMA2_ERR_REWIND;
        position = status == GEMMA2_OK ? to : position;
        high = position ? high : 0;
        int32_t n = 1 + (int32_t)below(9);
        if (position + n > o.context)
            continue;
        random_ids(m, ids + position, (size_t)n);
        *bad += gemma2_eval(s, ids + position, (size_t)n, logits) != GEMMA2_OK;
        position += n, high = max_i32(high, position);
        *bad += gemma2_position(s) != position ||
                memcmp(gemma2_history(s), ids, (size_t)position * 4);
        gemma2_session *clean = start(m, o);
        float *truth = fresh(vocab(m) * sizeof *truth);
        gemma2_eval(clean, ids, (size_t)position, truth);
        *bad += logits_differ(m, logits, truth, 0);
        gemma2_session_free(clean), free(truth);
    }
    gemma2_session_free(s), free(logits);
}

static void test_rewind(void)
{
    for (int i = 0; i < N_SHAPES; i += 3) {
        struct model x = make(&shapes[i]);
        int refused = 0, bad = 0;
        for (int32_t batch = 1; batch <= 9; batch += 2)
            rewind_walk(x.m, (struct setup){40, batch, 1, 8, 0}, &refused, &bad);
        check(!bad, "%s: %d wrong after rewinds", shapes[i].name, bad);
        check(refused > 0, "%s: no rewind was too deep", shapes[i].name);
        unmake(&x);
    }
}

static void test_rewind_edges(void)
{
    struct model x = make(&shapes[0]);
    int32_t ids[40], before;
    random_ids(x.m, ids, 40);
    float *truth = step_by_step(x.m, (struct setup){40, 4, 1, 0, 0}, ids, 40);
    float *logits = fresh(vocab(x.m) * sizeof *logits);
    gemma2_session *s = start(x.m, (struct setup){40, 4, 1, 0, 0});
    gemma2_eval(s, ids, 39, NULL);
    check(gemma2_rewind(s, 40) == GEMMA2_ERR_ARGUMENT &&
              gemma2_rewind(s, -1) == GEMMA2_ERR_ARGUMENT, "rewind outside what is held");
    check(gemma2_rewind(s, 5) == GEMMA2_ERR_REWIND, "a rewind too deep");
    before = gemma2_position(s);
    check(before == 39 && gemma2_eval(s, ids + 39, 1, logits) == GEMMA2_OK &&
              !logits_differ(x.m, logits, truth, 39), "a refused rewind changes nothing");
    check(gemma2_rewind(s, 36) == GEMMA2_OK && gemma2_eval(s, ids + 36, 4, logits) == GEMMA2_OK &&
              !logits_differ(x.m, logits, truth, 39), "n_batch back");
    check(gemma2_rewind(s, 0) == GEMMA2_OK && gemma2_eval(s, ids, 14, logits) == GEMMA2_OK &&
              !logits_differ(x.m, logits, truth, 13), "back to 0");
    check(gemma2_rewind(s, 14) == GEMMA2_OK && gemma2_rewind(s, 1) == GEMMA2_OK, "before the wrap");
    gemma2_session_free(s);
    free(truth), free(logits);
    unmake(&x);
}

/* ---- refusals leave the session as it was ---- */

static void test_refused_calls(void)
{
    struct model x = make(&shapes[0]), y = make(&shapes[1]);
    int32_t v = (int32_t)vocab(x.m), ids[12], bad_ids[3] = {1, 2, 0};
    float *logits = fresh(vocab(x.m) * sizeof *logits), logprobs[12];
    random_ids(x.m, ids, 12);
    float *truth = step_by_step(x.m, (struct setup){12, 3, 1, 0, 0}, ids, 12);
    gemma2_session *s = start(x.m, (struct setup){12, 3, 1, 0, 0});
    gemma2_session *t = start(x.m, (struct setup){12, 2, 1, 0, 0});
    gemma2_session *u = start(y.m, (struct setup){12, 3, 1, 0, 0});
    gemma2_row rows[4] = {{s, 1, NULL}, {s, 1, NULL}, {s, 1, NULL}, {s, 1, NULL}};
    gemma2_eval(s, ids, 11, NULL);
    check(gemma2_eval(s, ids, 2, logits) == GEMMA2_ERR_CONTEXT, "two tokens for one place");
    check(gemma2_prefill(s, ids, SIZE_MAX, logits) == GEMMA2_ERR_CONTEXT, "SIZE_MAX tokens");
    check(gemma2_score(s, ids, 2, -1, logprobs) == GEMMA2_ERR_CONTEXT, "score: context");
    check(gemma2_eval_rows(rows, 2) == GEMMA2_ERR_CONTEXT, "rows: context");
    check(gemma2_eval(s, ids, 0, logits) == GEMMA2_ERR_ARGUMENT, "no tokens");
    check(gemma2_eval(s, NULL, 1, logits) == GEMMA2_ERR_ARGUMENT, "no ids");
    for (int i = 0; i < 3; i++) {
        bad_ids[2] = i == 0 ? -1 : i == 1 ? v : INT32_MAX;
        check(gemma2_eval(t, bad_ids, 3, logits) == GEMMA2_ERR_TOKEN, "id %d", bad_ids[2]);
        check(gemma2_score(t, bad_ids, 3, 1, logprobs) == GEMMA2_ERR_TOKEN, "score: id");
        check(gemma2_eval_rows(&(gemma2_row){t, bad_ids[2], NULL}, 1) == GEMMA2_ERR_TOKEN,
              "row id");
    }
    check(gemma2_score(s, ids, 1, v, logprobs) == GEMMA2_ERR_TOKEN, "score: next");
    check(gemma2_score(s, ids, 1, -2, logprobs) == GEMMA2_ERR_ARGUMENT, "score: next -2");
    check(gemma2_score(s, ids, 1, 1, NULL) == GEMMA2_ERR_ARGUMENT, "score: no room");
    check(gemma2_eval_rows(rows, 0) == GEMMA2_ERR_ARGUMENT, "no rows");
    check(gemma2_eval_rows(NULL, 1) == GEMMA2_ERR_ARGUMENT, "NULL rows");
    check(gemma2_eval_rows(rows, 4) == GEMMA2_ERR_ARGUMENT, "more rows than n_batch");
    rows[1].session = u;
    check(gemma2_eval_rows(rows, 2) == GEMMA2_ERR_ARGUMENT, "rows of two models");
    rows[1].session = NULL;
    check(gemma2_eval_rows(rows, 2) == GEMMA2_ERR_ARGUMENT, "a row of no session");
    gemma2_session *wide = start(x.m, (struct setup){12, 8, 1, 0, 0});
    gemma2_row many[4] = {{wide, 1, NULL}, {t, 1, NULL}, {t, 1, NULL}, {t, 1, NULL}};
    check(gemma2_eval_rows(many, 4) == GEMMA2_ERR_ARGUMENT, "3 rows of a session of n_batch 2");
    check(gemma2_position(t) == 0 && gemma2_position(wide) == 0, "refused rows count");
    check(gemma2_position(s) == 11 && gemma2_context(s) == 12, "position after refusals");
    check(gemma2_eval(s, ids + 11, 1, logits) == GEMMA2_OK &&
              !logits_differ(x.m, logits, truth, 11), "logits after refusals");
    check(gemma2_eval(s, ids, 1, logits) == GEMMA2_ERR_CONTEXT, "the context is full");
    gemma2_session_free(s), gemma2_session_free(t), gemma2_session_free(u);
    gemma2_session_free(wide);
    free(truth), free(logits);
    unmake(&x), unmake(&y);
}

static void test_session_params(void)
{
    static const struct {
        gemma2_session_params p;
        int legal;
    } cases[] = {
        {{24, -1, 0, 0, 0, 0}, 0}, {{24, (1 << 30) + 1, 1, 0, 0, 0}, 0}, {{24, 1, 0, 0, 0, 0}, 1},
        {{24, 8, -1, 0, 0, 0}, 0}, {{24, 8, 4097, 0, 0, 0}, 0}, {{24, 8, 4096, 0, 0, 0}, 1},
        {{24, 8, 0, -1, 0, 0}, 0}, {{24, 8, 0, 1025, 0, 0}, 0}, {{24, 8, 0, 1024, 0, 0}, 1},
        {{24, 8, 0, 0, -1, 0}, 0}, {{24, 8, 0, 0, 9, 0}, 0}, {{24, 8, 0, 0, 8, 0}, 1},
        {{24, 8, 0, 0, 0, 3}, 0}, {{24, 8, 0, 0, 0, -1}, 0}, {{24, 8, 0, 0, 0, 2}, 1},
        {{0, 8, 0, 0, 0, 0}, 0}, {{~0u, 8, 0, 0, 0, 0}, 0}, {{8, 8, -1, -1, -1, -1}, 1},
        {{22, 8, 0, 0, 0, 0}, 0}, {{24, 0, 0, 0, 0, 0}, 1}, {{24, 100, 0, 0, 0, 0}, 1},
    };
    struct model x = make(&shapes[0]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char err[256] = "";
        gemma2_plan plan;
        int status = gemma2_session_plan(x.m, &cases[i].p, &plan);
        gemma2_session *s = gemma2_session_new(x.m, &cases[i].p, err, sizeof err);
        check(status == (cases[i].legal ? GEMMA2_OK : GEMMA2_ERR_ARGUMENT), "params %zu: plan", i);
        check(!!s == cases[i].legal && !!err[0] == !s, "params %zu: session", i);
        if (s)
            check(gemma2_context(s) == (cases[i].p.n_context ? cases[i].p.n_context : 64) &&
                      plan.total == plan.cache + plan.scratch && plan.weights == x.image.size,
                  "params %zu: context and plan", i);
        gemma2_session_free(s);
    }
    unmake(&x);
}

/* In memory of the caller: exactly plan.total bytes, whatever they held before. */
static void test_placed(void)
{
    int32_t ids[20];
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        gemma2_session_params p;
        gemma2_plan plan;
        gemma2_session_params_init(&p);
        p.n_context = 20, p.n_batch = 5, p.n_threads = 1;
        random_ids(x.m, ids, 20);
        float *truth = step_by_step(x.m, (struct setup){20, 1, 1, 0, 0}, ids, 20);
        float *logits = fresh(vocab(x.m) * sizeof *logits);
        check(gemma2_session_plan(x.m, &p, &plan) == GEMMA2_OK, "plan");
        char *memory = fresh(plan.total);
        memset(memory, 0xff, plan.total); /* NaN, in both cache types */
        check(!gemma2_session_place(x.m, &p, memory, plan.total - 1, NULL, 0), "a byte too few");
        check(!gemma2_session_place(x.m, &p, memory + 32, plan.total, NULL, 0), "misaligned");
        check(!gemma2_session_place(x.m, &p, NULL, plan.total, NULL, 0), "placed at NULL");
        gemma2_session *s = gemma2_session_place(x.m, &p, memory, plan.total, NULL, 0);
        if (check(s != NULL, "%s: place", shapes[i].name)) {
            gemma2_eval(s, ids, 13, NULL);
            gemma2_eval(s, ids + 13, 7, logits);
            check(!logits_differ(x.m, logits, truth, 19), "%s: a placed session", shapes[i].name);
            gemma2_session_free(s);
        }
        free(memory), free(truth), free(logits);
        unmake(&x);
    }
}

/* gemma2_score says what logits and gemma2_logprob say, however it is cut. */
static void test_score(void)
{
    int32_t ids[20];
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        float truth[20], scores[20];
        int32_t next = (int32_t)vocab(x.m) - 1;
        random_ids(x.m, ids, 20);
        float *logits = step_by_step(x.m, (struct setup){20, 1, 1, 0, 0}, ids, 20);
        for (size_t k = 0; k < 20; k++)
            gemma2_logprob(logits + k * vocab(x.m), vocab(x.m), k < 19 ? ids[k + 1] : next,
                           truth + k);
        for (size_t cut = 1; cut <= 20; cut += 3)
            for (int32_t batch = 1; batch < 8; batch += 3) {
                gemma2_session *s = start(x.m, (struct setup){20, batch, 1, 0, 0});
                scores[19] = 77;
                int status = gemma2_score(s, ids, cut, cut < 20 ? ids[cut] : next, scores);
                if (cut < 20)
                    status |= gemma2_score(s, ids + cut, 20 - cut, batch == 1 ? -1 : next,
                                           scores + cut);
                check(status == GEMMA2_OK && !memcmp(scores, truth, 19 * sizeof *truth),
                      "%s: score, %zu first, n_batch %d", shapes[i].name, cut, batch);
                check(scores[19] == (cut < 20 && batch == 1 ? 77 : truth[19]), "score of next");
                gemma2_session_free(s);
            }
        free(logits);
        unmake(&x);
    }
}

/* Parts of an attention whose scores lie so far apart that exp of the distance overflows. */
static void test_far_apart(void)
{
    for (int first = 0; first < 2; first++) {
        struct partial parts[2] = {{first ? 100 : -100, 2}, {first ? -100 : 100, 2}};
        float out[2][2] = {{1, 2}, {3, 4}}, *o = out[first ? 0 : 1], want[2] = {o[0], o[1]};
        merge_partial(&parts[0], out[0], &parts[1], out[1], 2);
        check(parts[0].max == 100 && parts[0].sum == 2 && !memcmp(out[0], want, sizeof want),
              "far apart, the larger %s", first ? "first" : "last");
    }
}

/* More logits than a task caps and a log-sum takes at once, candidates than a small pass has
 * scratch for, and inputs one wider than attention's. */
static void test_large_vocabulary(void)
{
    enum { N = 4, V = 16384 + 2047 };
    static const struct shape shape = {"vocabulary", 1, 9, 2, 1, 4, 8, V, 8, 16, 50, 30, 1, 0,
                                       {F32, F32, F32, F32, F32}, 64};
    struct model x = make(&shape);
    int32_t ids[N + 1] = {0, V - 1, 5, 16384, 2048}, same = 0;
    float *logits = step_by_step(x.m, (struct setup){N, 1, 1, 0, 0}, ids, N), truth[N], scores[N];
    float *got = fresh(N * V * sizeof *got);
    gemma2_session *small = start(x.m, (struct setup){N, 1, 1, 0, 0});
    gemma2_session *large = start(x.m, (struct setup){N, 256, 1, 0, 0});
    gemma2_row rows[N];
    for (int t = 0; t < N; t++) {
        gemma2_logprob(logits + t * V, V, ids[t + 1], truth + t);
        rows[t] = (gemma2_row){large, ids[t], got + t * V};
    }
    check(gemma2_eval_rows(rows, N) == GEMMA2_OK && !memcmp(got, logits, N * V * sizeof *got),
          "many logits of many rows");
    check(gemma2_score(small, ids, N, ids[N], scores) == GEMMA2_OK &&
              !memcmp(scores, truth, sizeof truth), "scores of a large vocabulary");
    for (uint64_t seed = 0; seed < 20; seed++) {
        gemma2_sampler a, b;
        gemma2_bias bias = {7, 0.5f};
        gemma2_sampler_init(&a, seed);
        a.bias = &bias, a.n_bias = 1, a.top_k = 0, a.top_p = 1;
        b = a;
        same += gemma2_sample(small, &a, logits) == gemma2_sample(large, &b, logits);
    }
    check(same == 20, "%d of 20 samples are the same", same);
    gemma2_session_free(small), gemma2_session_free(large);
    free(got), free(logits);
    unmake(&x);
}

static void test_model(void)
{
    test_matrix_models();
    test_matrix_declined();
    test_chunks();
    test_models_on_rows();
    test_shared_passes();
    test_scales();
    test_layer_kinds();
    test_plans();
    test_rewind();
    test_rewind_edges();
    test_refused_calls();
    test_session_params();
    test_placed();
    test_score();
    test_large_vocabulary();
    test_far_apart();
}

/* Hundreds and thousands of positions: the slow ones. */
static void test_far_positions(void)
{
    test_far();
    test_far_shared();
    test_window_edge();
    test_wide_window();
}

/* ===================================================================================
 * 7. Tokenizer
 * =================================================================================== */

static int64_t encode(const gemma2_model *m, const char *text, int64_t size, unsigned flags,
                      int32_t *ids, size_t max_ids)
{
    size_t n = gemma2_encode_scratch(size < 0 ? strlen(text) : (size_t)size);
    void *scratch = fresh(n); /* exactly what was asked for */
    int64_t count = gemma2_encode(m, text, size, flags, ids, max_ids, scratch, n);
    free(scratch);
    return count;
}

enum { BYTE_0 = 23 };

/* Ids 4 .. 22 of a vocabulary where every rule shows; the bytes come behind. */
static void rule_pieces(struct pieces *p, int with_bytes)
{
    static const struct {
        const char *text;
        int kind;
        float score;
    } list[] = {
        {"<s>", GEMMA2_PIECE_MARKER, 0},  {"<s", GEMMA2_PIECE_USER, 0},
        {"\n\n", GEMMA2_PIECE_USER, 0},   {"\n\n\n", GEMMA2_PIECE_USER, 0},
        {"a", GEMMA2_PIECE_NORMAL, -1},   {"b", GEMMA2_PIECE_NORMAL, -2},
        {"ab", GEMMA2_PIECE_NORMAL, -3},  {"ba", GEMMA2_PIECE_NORMAL, -3},
        {"aa", GEMMA2_PIECE_NORMAL, -4},  {"aaaa", GEMMA2_PIECE_NORMAL, -5},
        {"ab", GEMMA2_PIECE_NORMAL, -1},  {"\xe2\x96\x81", GEMMA2_PIECE_NORMAL, -6},
        {"\xe2\x96\x81" "a", GEMMA2_PIECE_NORMAL, -2.5f}, {"<", GEMMA2_PIECE_NORMAL, -7},
        {"s", GEMMA2_PIECE_NORMAL, -7},   {">", GEMMA2_PIECE_NORMAL, -7},
        {"c", GEMMA2_PIECE_CONTROL, 0},   {"s>", GEMMA2_PIECE_MARKER, 0},
        {"\xc3\xa9", GEMMA2_PIECE_MARKER, 0}};
    start_pieces(p);
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        add_piece(p, list[i].text, list[i].kind, list[i].score);
    if (with_bytes)
        add_bytes_pieces(p);
}

static const struct {
    const char *text;
    int size;
    unsigned flags;
    int32_t ids[8]; /* ends with 0; 1000 + b: byte b, or unk without bytes */
    const char *why;
} encodings[] = {
    {"", 0, 0, {0}, "nothing"},
    {"ab", 2, 0, {10}, "of equal pieces the lowest id, with its score"},
    {"aba", 3, 0, {10, 8}, "a tie goes to the left"},
    {"bab", 3, 0, {11, 9}, "a tie goes to the left"},
    {"aab", 3, 0, {8, 10}, "the better score first"},
    {"aaa", 3, 0, {12, 8}, "leftmost of aa"},
    {"aaaa", 4, 0, {13}, "merges of merges"},
    {"aaaaaaa", 7, 0, {13, 12, 8}, "merges of merges"},
    {" a", 2, 0, {16}, "a space is U+2581"},
    {"  a", 3, 0, {15, 16}, "no prefix, no stripping"},
    {"a ", 2, 0, {8, 15}, "no stripping at the end"},
    {"<s>", 3, 0, {4}, "longest user-defined piece"},
    {"<s>", 3, GEMMA2_ENCODE_PLAIN, {5, 19}, "under PLAIN a marker's shorter prefix"},
    {"<sb", 3, 0, {5, 9}, "user-defined pieces never merge"},
    {"\n\n\n\n\n", 5, 0, {7, 6}, "longest first"},
    {"\n\n\n\n\n", 5, GEMMA2_ENCODE_PLAIN, {7, 6}, "PLAIN is about markers only"},
    {"\n", 1, 0, {1010}, "a byte"},
    {"xax", 3, 0, {1000 + 'x', 8, 1000 + 'x'}, "unknown letters"},
    {"\xc3\xaa", 2, 0, {1195, 1170}, "a character's bytes"},
    {"s>\xc3\xa9", 4, 0, {21, 22}, "markers"},
    {"s>", 2, GEMMA2_ENCODE_PLAIN, {18, 19}, "under PLAIN merges make no marker"},
    {"\xc3\xa9", 2, GEMMA2_ENCODE_PLAIN, {1195, 1169}, "nor is a character one"},
    {"\xff", 1, 0, {1239, 1191, 1189}, "no UTF-8: U+FFFD"},
    {"\xe2\x82", 2, 0, {1239, 1191, 1189, 1239, 1191, 1189}, "each bad byte one U+FFFD"},
    {"a\0b", 3, 0, {8, 1000, 9}, "NUL is a character"},
    {"a\0b", -1, 0, {8}, "size -1 ends at NUL"},
    {"c", 1, 0, {1000 + 'c'}, "a control piece never comes from text"},
    {"ab", 2, GEMMA2_ENCODE_BOS, {2, 10}, "BOS once"},
    {"", 0, GEMMA2_ENCODE_BOS | GEMMA2_ENCODE_PLAIN, {2}, "BOS alone"},
};

static void test_encodings(int with_bytes)
{
    static struct pieces p;
    rule_pieces(&p, with_bytes);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    for (size_t i = 0; i < sizeof encodings / sizeof *encodings; i++) {
        int32_t want[8], got[8] = {0};
        int64_t n = 0, count;
        for (const int32_t *id = encodings[i].ids; *id; id++)
            if (*id < 1000 || with_bytes)
                want[n++] = *id < 1000 ? *id : BYTE_0 + *id - 1000;
            else if (!n || want[n - 1] != 3) /* a run of unknown text is one unk */
                want[n++] = 3;
        count = encode(m, encodings[i].text, encodings[i].size, encodings[i].flags, got, 8);
        check(count == n && !memcmp(got, want, (size_t)n * sizeof *got), "encode \"%s\", %s: %s",
              encodings[i].text, with_bytes ? "bytes" : "unk", encodings[i].why);
    }
    gemma2_close(m);
    free(image.data);
}

static void test_encode_arguments(void)
{
    static struct pieces p;
    rule_pieces(&p, 1);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    int32_t ids[4] = {77, 77, 77, 77};
    size_t n = gemma2_encode_scratch(6);
    char *scratch = fresh(n);
    check(gemma2_encode(m, "abbaab", 6, 0, ids, 2, scratch, n) == 3 && ids[1] != 77 && ids[2] == 77,
          "encode counts like snprintf");
    check(gemma2_encode(m, "abbaab", 6, 0, NULL, 0, scratch, n) == 3, "encode only counts");
    check(gemma2_encode(m, "abbaab", 6, 0, ids, 4, scratch, n - 1) == GEMMA2_ERR_SPACE, "scratch");
    check(gemma2_encode(m, "abbaab", 6, 0, ids, 4, NULL, n) == GEMMA2_ERR_SPACE, "no scratch");
    check(gemma2_encode(m, NULL, 6, 0, ids, 4, scratch, n) == GEMMA2_ERR_ARGUMENT, "NULL text");
    check(gemma2_encode(m, NULL, 0, 0, ids, 4, scratch, n) == 0, "no text");
    check(gemma2_encode(m, "a", -2, 0, ids, 4, scratch, n) == GEMMA2_ERR_ARGUMENT, "size -2");
    check(gemma2_encode(m, "a", 1, 4, ids, 4, scratch, n) == GEMMA2_ERR_ARGUMENT, "flag 4");
    check(gemma2_encode(m, "a", 1, 0, NULL, 4, scratch, n) == GEMMA2_ERR_ARGUMENT, "NULL ids");
    check(gemma2_encode(m, "a", INT64_MAX, 0, ids, 4, scratch, n) == GEMMA2_ERR_ARGUMENT,
          "too long");
    check(gemma2_encode(m, "a", (INT64_C(1) << 32) + 1, 0, ids, 4, scratch, n) ==
              GEMMA2_ERR_ARGUMENT, "too long, with low bits that are not");
    check(!gemma2_encode_scratch(SIZE_MAX) && !gemma2_encode_scratch((1u << 28) + 1) &&
              (SIZE_MAX >> 31 == 1 || gemma2_encode_scratch(1u << 28)), "limits of encode_scratch");
    int bad = 0; /* 31 bytes of scratch a byte of text, which 32 bits do not always hold */
    for (size_t text = 1; text <= 1u << 28; text += 1 + text / 9999) {
        size_t bytes = gemma2_encode_scratch(text);
        bad += bytes ? bytes / 31 < text : text < 1u << 25;
    }
    check_none(bad, "sizes of scratch");
    char *odd = fresh(n + 3); /* scratch of any alignment */
    check(gemma2_encode(m, "abbaab", 6, 0, ids, 4, odd + 3, n) == 3, "scratch at an odd address");
    gemma2_close(m);
    p.special[0] = -1;
    free(image.data);
    image = build_tokenizer_file(&p);
    m = open_image(&image);
    check(gemma2_encode(m, "a", 1, GEMMA2_ENCODE_BOS, ids, 4, scratch, n) == GEMMA2_ERR_ARGUMENT,
          "BOS where there is none");
    gemma2_close(m);
    free(image.data), free(scratch), free(odd);
}

/* BPE by its definition: again and again the best pair of neighbours, in quadratic time. */
struct naive {
    char text[40][48];
    int n;
};

static int piece_of(const struct pieces *p, const char *text)
{
    for (uint32_t i = 4; i < p->n; i++) {
        uint32_t from = p->ends[i - 1];
        if (p->ends[i] - from == strlen(text) && !memcmp(p->blob + from, text, strlen(text)))
            return (int)i;
    }
    return -1;
}

static void naive_merge(const struct pieces *p, struct naive *s)
{
    for (;;) {
        int best = -1, best_piece = -1;
        for (int i = 0; i + 1 < s->n; i++) {
            char both[100];
            snprintf(both, sizeof both, "%s%s", s->text[i], s->text[i + 1]);
            int id = piece_of(p, both);
            if (id >= 0 && (best < 0 || p->scores[id] > p->scores[best_piece]))
                best = i, best_piece = id;
        }
        if (best < 0)
            return;
        size_t at = strlen(s->text[best]);
        memmove(s->text[best] + at, s->text[best + 1], strlen(s->text[best + 1]) + 1);
        memmove(s->text[best + 1], s->text[best + 2], sizeof *s->text * (size_t)(s->n - best - 2));
        s->n--;
    }
}

/* Random vocabularies over three letters, scores with ties, against the definition. */
static void test_merges(void)
{
    static struct pieces p;
    for (int round = 0; round < 60; round++) {
        char text[33];
        int bad = 0;
        start_pieces(&p);
        for (int i = 0; i < 3; i++)
            add_piece(&p, (char[]){(char)('a' + i), 0}, GEMMA2_PIECE_NORMAL, 0);
        for (int i = 0; i < 40; i++) {
            uint32_t length = 2 + below(5), k = 0;
            for (; k < length; k++)
                text[k] = (char)('a' + below(3));
            text[k] = 0;
            add_piece(&p, text, GEMMA2_PIECE_NORMAL, -(float)below(round % 2 ? 5 : 1000));
        }
        struct image image = build_tokenizer_file(&p);
        gemma2_model *m = open_image(&image);
        for (int i = 0; i < 50; i++) {
            struct naive s = {.n = (int)below(33)};
            int32_t ids[40];
            for (int k = 0; k < s.n; k++) {
                text[k] = (char)('a' + below(3));
                s.text[k][0] = text[k], s.text[k][1] = 0;
            }
            int64_t n = encode(m, text, s.n, 0, ids, 40);
            naive_merge(&p, &s);
            bad += n != s.n;
            for (int k = 0; k < s.n && n == s.n; k++)
                bad += ids[k] != piece_of(&p, s.text[k]);
        }
        check(!bad, "%d texts are merged otherwise than defined", bad);
        gemma2_close(m);
        free(image.data);
    }
}

/* A megabyte of one letter, of spaces, of line ends: quadratic time would not end. */
static void test_long_runs(void)
{
    static struct pieces p;
    rule_pieces(&p, 1);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    size_t n = 1 << 20;
    char *text = fresh(n);
    memset(text, 'a', n);
    check(encode(m, text, (int64_t)n, 0, NULL, 0) == (int64_t)n / 4, "a megabyte of a");
    memset(text, ' ', n);
    check(encode(m, text, (int64_t)n, 0, NULL, 0) == (int64_t)n, "a megabyte of spaces");
    memset(text, '\n', n);
    check(encode(m, text, (int64_t)n, 0, NULL, 0) == (int64_t)(n + 2) / 3, "a megabyte of lines");
    memset(text, 0xff, n);
    check(encode(m, text, (int64_t)n, 0, NULL, 0) == (int64_t)n * 3, "a megabyte of 0xff");
    free(text);
    gemma2_close(m);
    free(image.data);
}

/* Random valid UTF-8 without U+2581, which would come back as a space. */
static size_t random_text(char *text, size_t max)
{
    size_t n = 0, length = below((uint32_t)max - 4);
    while (n < length) {
        uint32_t kind = below(8), c = kind < 5 ? 32 + below(95) : kind == 5 ? below(0x800)
                                    : kind == 6 ? below(0x10000) : below(0x110000);
        if ((c >= 0xd800 && c < 0xe000) || c == 0x2581)
            continue;
        if (c < 0x80)
            text[n++] = (char)c;
        else {
            int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
            text[n++] = (char)((0xff00u >> (more + 1)) | c >> 6 * more);
            while (more--)
                text[n++] = (char)(0x80 | (c >> 6 * more & 63));
        }
    }
    return n;
}

static size_t decode_all(const gemma2_model *m, const int32_t *ids, size_t n, char *out)
{
    gemma2_utf8 hold = {{0}, 0};
    size_t room = (size_t)gemma2_get_config(m)->max_piece_bytes + 12, at = 0;
    char *text = fresh(room);
    for (size_t i = 0; i <= n; i++) {
        int bytes = gemma2_decode(m, &hold, i < n ? ids[i] : -1, text, room);
        if (bytes < 0)
            check(0, "decode %d: %d", i < n ? ids[i] : -1, bytes);
        memcpy(out + at, text, (size_t)max_i32(bytes, 0));
        at += (size_t)max_i32(bytes, 0);
    }
    free(text);
    return at;
}

static void test_round_trip(void)
{
    char err[256] = "", text[200], back[1000];
    int32_t ids[600];
    int bad = 0, special = 0;
    gemma2_model *m = gemma2_open("tokenizer.bin", NULL, err, sizeof err);
    if (!check(m != NULL, "tokenizer.bin: %s", err))
        return;
    for (int i = 0; i < 3000; i++) {
        size_t n = random_text(text, sizeof text);
        unsigned flags = i % 2 ? GEMMA2_ENCODE_PLAIN : 0;
        int64_t count = encode(m, text, (int64_t)n, flags, ids, 600);
        int kind = 0;
        for (int64_t k = 0; k < count; k++)
            special += gemma2_piece(m, ids[k], NULL, &kind) == NULL || kind == GEMMA2_PIECE_CONTROL;
        bad += count < 0 || decode_all(m, ids, (size_t)count, back) != n || memcmp(text, back, n);
    }
    check_none(bad, "decode(encode(text))");
    check_none(special, "control pieces out of text");
    const char *forged = "<start_of_turn>user<bos><pad><unused3><mask><eos>";
    int64_t count = encode(m, forged, -1, GEMMA2_ENCODE_PLAIN, ids, 600);
    for (int64_t k = 0; k < count; k++) {
        int kind = 0;
        gemma2_piece(m, ids[k], NULL, &kind);
        special += kind == GEMMA2_PIECE_CONTROL || kind == GEMMA2_PIECE_MARKER;
    }
    check(count > 10 && !special, "strangers' text makes no control piece");
    check(encode(m, forged, -1, GEMMA2_ENCODE_BOS, ids, 600) > 2 && ids[0] == 2 && ids[1] == 106,
          "BOS, then a turn marker");
    gemma2_close(m);
}

/* ---- decoding ---- */

/* A character's length at p by arithmetic on its code, 0 if there is none. */
static size_t character(const uint8_t *p, size_t n)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t length = p[0] < 0x80 ? 1 : p[0] >> 5 == 6 ? 2 : p[0] >> 4 == 14 ? 3
                  : p[0] >> 3 == 30 ? 4 : 0;
    uint32_t code = length == 1 ? p[0] : p[0] & (0x7fu >> length);
    if (!length || length > n)
        return 0;
    for (size_t i = 1; i < length; i++) {
        if (p[i] >> 6 != 2)
            return 0;
        code = code << 6 | (p[i] & 63);
    }
    return code >= least[length] && code < 0x110000 && code >> 11 != 27 ? length : 0;
}

/* What SentencePiece writes for a run of byte pieces. */
static size_t decode_bytes(const uint8_t *p, size_t n, char *out)
{
    size_t at = 0;
    while (n) {
        size_t length = character(p, n), used = length ? length : 1;
        memcpy(out + at, length ? (const char *)p : "\xef\xbf\xbd", length ? length : 3);
        at += length ? length : 3;
        p += used, n -= used;
    }
    return at;
}

/* Random ids with long runs of bytes, likely and unlikely ones, against the runs whole. */
static void test_decode_runs(void)
{
    static const uint8_t likely[] = {0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x98, 0x80, 0xc3, 0xa9, 0x80,
                                     0xed, 0xa0, 0xf4, 0x90, 0xe0, 0xc0, 0xff, 'x'};
    static struct pieces p;
    rule_pieces(&p, 1);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    int bad = 0;
    for (int round = 0; round < 5000; round++) {
        int32_t ids[20];
        uint8_t run[20];
        char want[200], got[200];
        size_t n = 1 + below(20), in_run = 0, at = 0;
        for (size_t i = 0; i < n; i++) {
            int is_byte = below(8) > 0;
            uint8_t byte = below(3) ? likely[below(sizeof likely)] : (uint8_t)rnd();
            ids[i] = is_byte ? BYTE_0 + byte : below(2) ? 16 : 2; /* " a", or BOS: nothing */
            if (is_byte) {
                run[in_run++] = byte;
                continue;
            }
            at += decode_bytes(run, in_run, want + at), in_run = 0;
            memcpy(want + at, " a", 2);
            at += ids[i] == 16 ? 2 : 0;
        }
        at += decode_bytes(run, in_run, want + at);
        bad += decode_all(m, ids, n, got) != at || memcmp(got, want, at);
    }
    check_none(bad, "decoded runs of bytes");
    gemma2_close(m);
    free(image.data);
}

/* Bytes that another model's pieces left held take more room than a piece of one byte. */
static void test_decode_foreign_hold(void)
{
    static struct pieces p;
    memset(&p, -1, sizeof p);
    p.n = p.blob_bytes = 0, p.special[3] = 0;
    add_piece(&p, "u", GEMMA2_PIECE_UNKNOWN, 0);
    while (p.n < 6)
        add_piece(&p, "a", GEMMA2_PIECE_NORMAL, 0);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    for (uint8_t n = 0; n < 4; n++)
        for (int32_t id = -1; id < 2; id++) {
            gemma2_utf8 hold = {{0xf0, 0x9f, 0x98, 0}, n};
            char *text = fresh(13);
            int got = gemma2_decode(m, &hold, id, text, 13);
            check(got == GEMMA2_ERR_SPACE ? n == 3 : got == 3 * n + (id < 0 ? 0 : id ? 1 : 5),
                  "id %d with %u bytes held: %d", id, n, got);
            free(text);
        }
    gemma2_close(m);
    free(image.data);
}

static void test_decode_calls(void)
{
    static struct pieces p;
    rule_pieces(&p, 1);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    gemma2_utf8 hold = {{0}, 0}, broken = {{0}, 4};
    size_t room = (size_t)gemma2_get_config(m)->max_piece_bytes + 12, size;
    char text[64];
    int kind = 0;
    check(gemma2_decode(m, &hold, BYTE_0 + 0xe2, text, room) == 0 && hold.n == 1,
          "one byte is held");
    check(gemma2_decode(m, &hold, BYTE_0 + 0x82, text, room - 1) == GEMMA2_ERR_SPACE && hold.n == 1,
          "too small a buffer changes nothing");
    check(gemma2_decode(m, &hold, BYTE_0 + 0x82, text, room) == 0 && hold.n == 2, "two are held");
    check(gemma2_decode(m, &hold, BYTE_0 + 0xac, text, room) == 3 &&
              !memcmp(text, "\xe2\x82\xac", 3), "three make a character");
    gemma2_decode(m, &hold, BYTE_0 + 0xf0, text, room);
    check(gemma2_decode(m, &hold, -1, text, room) == 3 && hold.n == 0, "flush");
    check(gemma2_decode(m, &hold, -1, text, room) == 0, "flush of nothing");
    check(gemma2_decode(m, &hold, BYTE_0 + 0xf5, text, room) == 3 && hold.n == 0,
          "a byte that begins no character");
    check(gemma2_decode(m, &hold, 3, text, room) == 5 && !memcmp(text, " \xe2\x81\x87 ", 5), "unk");
    check(gemma2_decode(m, &hold, 2, text, room) == 0, "a control piece has no text");
    check(gemma2_decode(m, &hold, 4, text, room) == 3 && !memcmp(text, "<s>", 3), "a marker has");
    check(gemma2_decode(m, &hold, (int32_t)p.n, text, room) == GEMMA2_ERR_TOKEN, "id V");
    check(gemma2_decode(m, &hold, -2, text, room) < 0, "id -2");
    check(gemma2_decode(m, NULL, 8, text, room) == GEMMA2_ERR_ARGUMENT &&
              gemma2_decode(m, &hold, 8, NULL, room) == GEMMA2_ERR_ARGUMENT &&
              gemma2_decode(m, &broken, 8, text, room) == GEMMA2_ERR_ARGUMENT, "decode arguments");
    const char *piece = gemma2_piece(m, 16, &size, &kind);
    check(piece && size == 4 && !memcmp(piece, "\xe2\x96\x81" "a", 4) &&
              kind == GEMMA2_PIECE_NORMAL, "a piece as stored");
    check(gemma2_piece(m, 16, NULL, NULL) && !gemma2_piece(m, -1, &size, &kind) &&
              !gemma2_piece(m, (int32_t)p.n, NULL, NULL), "pieces outside");
    gemma2_close(m);
    free(image.data);
}

static void test_text(void)
{
    test_encodings(0);
    test_encodings(1);
    test_encode_arguments();
    test_merges();
    test_long_runs();
    test_round_trip();
    test_decode_runs();
    test_decode_calls();
    test_decode_foreign_hold();
}

/* ===================================================================================
 * 8. Sampler
 * =================================================================================== */

/* PCG32 as its author publishes it (pcg-random.org, pcg_basic.c), any stream. */
static uint32_t pcg_next(uint64_t *state, uint64_t increment)
{
    uint64_t old = *state;
    *state = old * 6364136223846793005u + increment;
    uint32_t shifted = (uint32_t)(((old >> 18) ^ old) >> 27), rot = (uint32_t)(old >> 59);
    return (shifted >> rot) | (shifted << ((32 - rot) & 31));
}

static uint64_t pcg_seed(uint64_t seed, uint64_t increment)
{
    uint64_t state = 0;
    pcg_next(&state, increment);
    state += seed;
    pcg_next(&state, increment);
    return state;
}

static void test_pcg(void)
{
    static const uint32_t demo[] = {0xa15c02b7, 0x7b47f409, 0xba1d3330, 0x83d2f293, 0xbfa4784b,
                                    0xcbed606e}; /* pcg32-demo, seeded with 42, 54 */
    static const uint64_t seeds[] = {0, 1, 42, UINT64_MAX};
    uint64_t state = pcg_seed(42, 54 << 1 | 1);
    for (int i = 0; i < 6; i++)
        check(pcg_next(&state, 54 << 1 | 1) == demo[i], "the test's own PCG32, draw %d", i);
    for (int i = 0; i < 4; i++) {
        gemma2_sampler sampler;
        gemma2_sampler_init(&sampler, seeds[i]);
        state = pcg_seed(seeds[i], 1442695040888963407u);
        for (int k = 0; k < 100; k++)
            if (pcg32(&sampler.rng) != pcg_next(&state, 1442695040888963407u))
                check(0, "PCG32, seed %d, draw %d", i, k);
        check(sampler.rng == state, "PCG32 state");
    }
}

/* What the header says, by sorting.  *unsure: rounding alone decides this draw. */
static int by_rank(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit) - (x->logit > y->logit) : x->id - y->id;
}

static int32_t sample_naively(const gemma2_sampler *p, const float *logits, int n, int *unsure)
{
    struct candidate list[256];
    double weight[256], total = 0, kept = 0, edge = 0;
    int n_kept = 0;
    for (int i = 0; i < n; i++)
        list[i] = (struct candidate){logits[i], i};
    qsort(list, (size_t)n, sizeof *list, by_rank);
    while (n > 1 && list[n - 1].logit == -INFINITY)
        n--;
    if (p->top_k && p->top_k < n)
        n = p->top_k;
    for (int i = 0; i < n; i++)
        total += weight[i] = exp_f32((list[i].logit - list[0].logit) * (1.0f / p->temperature));
    for (; n_kept < n && (!n_kept || kept < (double)p->top_p * total); n_kept++) {
        if (n_kept && weight[n_kept] < p->min_p)
            break;
        kept += weight[n_kept];
        *unsure |= n_kept + 1 < n && fabs(kept - (double)p->top_p * total) < 1e-12 * total &&
                   weight[n_kept + 1] > 1e-12 * total;
    }
    uint64_t state = p->rng;
    double u = pcg_next(&state, 1442695040888963407u) * 0x1p-32 * kept;
    for (int i = 0; i < n_kept; i++) {
        edge += weight[i];
        *unsure |= fabs(u - edge) < 1e-12 * total;
        if (u < edge)
            return list[i].id;
    }
    return list[n_kept - 1].id;
}

static gemma2_sampler random_sampler(void)
{
    static const int32_t top_k[] = {0, 1, 2, 5, 40, 83, 1000, INT32_MAX};
    static const float top_p[] = {1, 0.95f, 0.5f, 0.1f, 1e-6f}, min_p[] = {0, 0.05f, 0.5f, 1};
    static const float temperature[] = {1, 0.7f, 0.05f, 3, 1e-30f, 1e6f};
    gemma2_sampler p;
    gemma2_sampler_init(&p, rnd());
    p.top_k = top_k[below(8)];
    p.top_p = below(2) ? top_p[below(5)] : uniform(0.01f, 1);
    p.min_p = below(2) ? min_p[below(4)] : 0;
    p.temperature = below(2) ? temperature[below(6)] : uniform(0.2f, 2);
    return p;
}

/* Logits with ties, floors and bans, all parameters: the same id from the same draw. */
static void test_cuts(gemma2_session *s, int v)
{
    float logits[256];
    int bad = 0, unsure = 0, drawn = 0, rounds = 20000;
    for (int round = 0; round < rounds; round++) {
        gemma2_sampler p = random_sampler();
        gemma2_bias ban[3] = {{0, -INFINITY}, {7, -INFINITY}, {v - 1, -INFINITY}};
        for (int i = 0; i < v; i++)
            logits[i] = round % 3 == 0 ? (float)below(6) : uniform(-8, 8);
        if (round % 4 == 0)
            p.bias = ban, p.n_bias = 3;
        float *adjusted = copy_floats(logits, (size_t)v), *before = copy_floats(logits, (size_t)v);
        for (uint32_t i = 0; i < p.n_bias; i++)
            adjusted[ban[i].id] = -INFINITY;
        int this_unsure = 0;
        int32_t want = sample_naively(&p, adjusted, v, &this_unsure);
        uint64_t state = p.rng;
        pcg_next(&state, 1442695040888963407u);
        int32_t id = gemma2_sample(s, &p, logits);
        unsure += this_unsure;
        bad += id != want && !this_unsure;
        drawn += p.rng == state;
        bad += !!memcmp(logits, before, (size_t)v * 4);
        free(adjusted), free(before);
    }
    check(!bad, "%d draws differ from the definition", bad);
    check(drawn == rounds, "%d of %d draws took one number", drawn, rounds);
    check(unsure < rounds / 50, "%d draws hang on rounding", unsure);
}

static void test_greedy(gemma2_session *s, int v)
{
    float logits[256];
    gemma2_sampler p;
    int bad = 0;
    for (int round = 0; round < 500; round++) {
        int best = 0;
        gemma2_sampler_init(&p, rnd());
        p.temperature = 0;
        for (int i = 0; i < v; i++) {
            logits[i] = (float)below(round % 2 ? 4 : 1000) - 2;
            best = logits[i] > logits[best] ? i : best;
        }
        bad += gemma2_sample(s, &p, logits) != best;
    }
    check_none(bad, "greedy choices, ties by lower id");
}

/* 30,000 draws of five ids: each within five standard deviations of its share. */
static void test_distribution(gemma2_session *s, int v)
{
    static const double share[5] = {0.5, 0.25, 0.15, 0.07, 0.03};
    float logits[256];
    int count[256] = {0}, n = 30000;
    gemma2_sampler p;
    gemma2_sampler_init(&p, 1234);
    p.top_p = 1, p.top_k = 0;
    for (int i = 0; i < v; i++)
        logits[i] = i < 5 ? (float)log(share[i]) : -100;
    for (int i = 0; i < n; i++)
        count[gemma2_sample(s, &p, logits)]++;
    for (int i = 0; i < 5; i++)
        check(fabs(count[i] - n * share[i]) < 5 * sqrt(n * share[i] * (1 - share[i])),
              "id %d drawn %d times of %d", i, count[i], n);
}

/* Greedy over logits of 10 for ids 10, 11, 12 after the history 9 .. 9, 10, 9, 10, 11. */
static void test_penalties(const gemma2_model *m)
{
    static const struct {
        int32_t last;
        float repetition, presence, frequency, logits[3];
        int32_t want;
        const char *what;
    } cases[] = {
        {64, 1, 0, 0, {10, 10, 10}, 10, "no penalty"},
        {64, 2, 0, 0, {10, 10, 6}, 12, "repetition divides"},
        {64, 2, 0, 0, {11, 10, 5.4f}, 10, "repetition divides once"},
        {64, 2, 0, 0, {-1, -1, -1.5f}, 12, "and multiplies negatives"},
        {64, 1, 3, 0, {10, 10, 8}, 12, "presence is taken off"},
        {64, 1, 3, 0, {10, 9.9f, 6}, 10, "presence is taken off once"},
        {64, 1, 0, 3, {10, 9, 4.5f}, 11, "frequency for each time"},
        {1, 1, 5, 0, {10, 11, 4}, 10, "only the last token"},
        {1, 1, 5, 0, {5, 11, 4}, 11, "only the last token"},
        {0, 9, 9, 9, {10, 11, 4}, 11, "a window of 0"},
        {64, 1, 0, -2, {10, 11, 10}, 10, "negative: a reward"},
        {INT32_MAX, 2, 0, 0, {10, 10, 6}, 12, "a window longer than history"},
    };
    static const int32_t ids[] = {9, 9, 9, 9, 9, 9, 10, 9, 10, 11};
    gemma2_session *s = start(m, (struct setup){20, 10, 1, 0, 0});
    gemma2_eval(s, ids, 10, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float logits[256];
        gemma2_sampler p;
        gemma2_sampler_init(&p, 1);
        p.temperature = 0, p.penalty_last = cases[i].last;
        p.repetition_penalty = cases[i].repetition, p.presence_penalty = cases[i].presence;
        p.frequency_penalty = cases[i].frequency;
        for (size_t k = 0; k < vocab(m); k++)
            logits[k] = k >= 10 && k < 13 ? cases[i].logits[k - 10] : -50;
        int32_t id = gemma2_sample(s, &p, logits);
        check(id == cases[i].want, "penalties, %s: %d, not %d", cases[i].what, id, cases[i].want);
    }
    gemma2_session_free(s);
}

static void test_sampler_refuses(gemma2_session *s, int v)
{
    static const struct {
        size_t member;
        float value;
    } bad[] = {
        {offsetof(gemma2_sampler, temperature), -1}, {offsetof(gemma2_sampler, temperature), NAN},
        {offsetof(gemma2_sampler, temperature), INFINITY}, {offsetof(gemma2_sampler, top_p), 0},
        {offsetof(gemma2_sampler, top_p), 1.01f}, {offsetof(gemma2_sampler, top_p), NAN},
        {offsetof(gemma2_sampler, min_p), -0.1f}, {offsetof(gemma2_sampler, min_p), NAN},
        {offsetof(gemma2_sampler, repetition_penalty), 0},
        {offsetof(gemma2_sampler, repetition_penalty), NAN},
        {offsetof(gemma2_sampler, presence_penalty), INFINITY},
        {offsetof(gemma2_sampler, frequency_penalty), NAN},
        {offsetof(gemma2_sampler, temperature), 1.001e6f},
        {offsetof(gemma2_sampler, min_p), 1.001f},
        {offsetof(gemma2_sampler, repetition_penalty), 1.001e6f},
        {offsetof(gemma2_sampler, presence_penalty), -1.001e6f},
        {offsetof(gemma2_sampler, frequency_penalty), 1.001e6f}};
    float logits[256] = {0};
    gemma2_sampler p, ok;
    gemma2_sampler_init(&ok, 1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        p = ok;
        memcpy((char *)&p + bad[i].member, &bad[i].value, sizeof(float));
        check(gemma2_sample(s, &p, logits) == GEMMA2_ERR_ARGUMENT, "sampler value %zu", i);
    }
    p = ok, p.top_k = -1;
    check(gemma2_sample(s, &p, logits) == GEMMA2_ERR_ARGUMENT, "top_k -1");
    p = ok, p.penalty_last = -1;
    check(gemma2_sample(s, &p, logits) == GEMMA2_ERR_ARGUMENT, "penalty_last -1");
    p = ok, p.struct_size = 8;
    check(gemma2_sample(s, &p, logits) == GEMMA2_ERR_ARGUMENT, "sampler struct_size");
    p = ok, p.n_bias = 1;
    check(gemma2_sample(s, &p, logits) == GEMMA2_ERR_ARGUMENT, "bias NULL");
    check(gemma2_sample(NULL, &ok, logits) == GEMMA2_ERR_ARGUMENT &&
              gemma2_sample(s, NULL, logits) == GEMMA2_ERR_ARGUMENT &&
              gemma2_sample(s, &ok, NULL) == GEMMA2_ERR_ARGUMENT, "sample NULLs");
    for (int i = 0; i < 3; i++) {
        float value[] = {NAN, INFINITY, -INFINITY}, logprob;
        logits[i * (v - 1) / 2] = value[i];
        check(gemma2_sample(s, &ok, logits) == GEMMA2_ERR_NONFINITE, "logits with %g", value[i]);
        check(gemma2_logprob(logits, (size_t)v, 0, &logprob) == GEMMA2_ERR_NONFINITE, "logprob");
        logits[i * (v - 1) / 2] = 0;
    }
}

/* One of two equal tokens has the half that top_p asks for; it is the lower id. */
static void test_half(gemma2_session *s, int v)
{
    gemma2_sampler p;
    float logits[256];
    int bad = 0;
    for (int i = 0; i < v; i++)
        logits[i] = i == 3 || i == 7 ? 0 : -1e30f;
    for (uint64_t seed = 0; seed < 50; seed++) {
        gemma2_sampler_init(&p, seed);
        p.top_p = 0.5f;
        bad += gemma2_sample(s, &p, logits) != 3;
    }
    check_none(bad, "halves");
}

/* A bias that is no number, or sums that overflow, must be an error and never a token. */
static void test_bias(gemma2_session *s, int v)
{
    float logits[256] = {0};
    gemma2_bias bias[256];
    gemma2_sampler p;
    for (int greedy = 0; greedy < 2; greedy++) {
        gemma2_sampler_init(&p, 1);
        p.bias = bias, p.n_bias = 2, p.temperature = greedy ? 0 : 1;
        bias[1] = bias[0] = (gemma2_bias){5, 20};
        check(gemma2_sample(s, &p, logits) == 5, "a bias of 20, twice");
        bias[1].id = v;
        check(gemma2_sample(s, &p, logits) == GEMMA2_ERR_TOKEN, "a bias outside the vocabulary");
        bias[1] = (gemma2_bias){5, -INFINITY};
        bias[0] = (gemma2_bias){6, 20};
        check(gemma2_sample(s, &p, logits) == 6, "a banned token");
        bias[1] = (gemma2_bias){6, NAN};
        check(gemma2_sample(s, &p, logits) < 0, "greedy %d: a bias of NaN", greedy);
        bias[1] = (gemma2_bias){6, INFINITY};
        check(gemma2_sample(s, &p, logits) < 0, "greedy %d: a bias of infinity", greedy);
        bias[0] = bias[1] = (gemma2_bias){6, 3e38f};
        check(gemma2_sample(s, &p, logits) < 0, "greedy %d: a bias that overflows", greedy);
        for (int i = 0; i < v; i++)
            bias[i] = (gemma2_bias){i, -INFINITY};
        p.n_bias = (uint32_t)v;
        check(gemma2_sample(s, &p, logits) < 0, "all tokens banned");
        p.n_bias = (uint32_t)v - 1;
        check(gemma2_sample(s, &p, logits) == v - 1, "all tokens but one banned");
    }
}

static void test_logprob(void)
{
    float logits[5001], logprob = 0;
    static const size_t sizes[] = {1, 2, 7, 100, 2047, 2048, 2049, 4095, 5000};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        size_t n = sizes[k];
        double total = 0;
        for (size_t i = 0; i < n; i++)
            logits[i] = uniform(-30, 30);
        for (size_t i = 0; i < n; i++)
            total += exp((double)logits[i]);
        logits[n] = 100; /* which is none of them */
        int32_t id = (int32_t)below((uint32_t)n);
        check(gemma2_logprob(logits, n, id, &logprob) == GEMMA2_OK, "logprob");
        check(fabs(logprob - ((double)logits[id] - log(total))) < 3e-6, "logprob of %zu: %g", n,
              logprob);
    }
    check(gemma2_logprob(logits, 5, 5, &logprob) == GEMMA2_ERR_TOKEN &&
              gemma2_logprob(logits, 5, -1, &logprob) == GEMMA2_ERR_TOKEN, "logprob ids");
    check(gemma2_logprob(NULL, 5, 1, &logprob) == GEMMA2_ERR_ARGUMENT &&
              gemma2_logprob(logits, 0, 0, &logprob) == GEMMA2_ERR_ARGUMENT &&
              gemma2_logprob(logits, 5, 1, NULL) == GEMMA2_ERR_ARGUMENT, "logprob arguments");
}

static void test_sampler(void)
{
    struct model x = make(&shapes[0]);
    gemma2_session *s = start(x.m, (struct setup){8, 1, 1, 0, 0});
    int v = (int)vocab(x.m);
    test_pcg();
    test_cuts(s, v);
    test_greedy(s, v);
    test_distribution(s, v);
    test_penalties(x.m);
    test_sampler_refuses(s, v);
    test_half(s, v);
    test_bias(s, v);
    test_logprob();
    gemma2_session_free(s);
    unmake(&x);
}

/* ===================================================================================
 * 9. Public API
 * =================================================================================== */

static void test_strings(void)
{
    static const int codes[] = {1, -11, 1000, -1000, INT32_MAX, INT32_MIN, INT32_MIN + 1};
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", GEMMA2_VERSION_MAJOR, GEMMA2_VERSION_MINOR,
             GEMMA2_VERSION_PATCH);
    check(!strcmp(gemma2_version(), version) && !strcmp(version, GEMMA2_VERSION_STRING), "version");
    int major = -1, minor = -1, patch = -1;
    sscanf(gemma2_version(), "%d.%d.%d", &major, &minor, &patch);
    check(gemma2_version_number() == GEMMA2_VERSION_NUMBER &&
              GEMMA2_VERSION_NUMBER == major * 10000 + minor * 100 + patch, "version number");
    for (int i = GEMMA2_ERR_MISMATCH; i <= 0; i++)
        for (int k = i + 1; k <= 0; k++)
            check(strcmp(gemma2_error_string(i), gemma2_error_string(k)) != 0, "codes %d, %d",
                  i, k);
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        check(!strcmp(gemma2_error_string(codes[i]), "unknown error"), "code %d", codes[i]);
}

static void test_sections(void)
{
    struct model x = make(&shapes[3]);
    gemma2_section s;
    size_t n = 0;
    for (; gemma2_get_section(x.m, n, &s); n++) {
        check(s.bytes == get_u64(entry_of(&x.image, (int)n) + 40), "section %zu: bytes", n);
        check((s.layer == -1) == (n < 2 || n > 23), "section %zu: layer %d", n, s.layer);
    }
    check(n == 26, "%zu sections", n);
    check(gemma2_get_section(x.m, 3, &s) && !strcmp(s.role, "q") && !strcmp(s.type, "q6") &&
              s.layer == 0 && s.rows == 64 && s.cols == 264, "section 3 is q");
    check(gemma2_get_section(x.m, 1, &s) && !strcmp(s.role, "tokenizer") &&
              !strcmp(s.type, "bytes"), "section 1 is the tokenizer");
    check(!gemma2_get_section(x.m, SIZE_MAX, &s), "a section far away");
    unmake(&x);
}

/* GEMMA2_ISA forces a row; a name unknown or not there fails the call. */
static void test_isa_choice(void)
{
    struct image m = build(&tiny_shape);
    char err[256];
    for (int i = 0; i < N_KERNELS + 2; i++) {
        const char *name = i < N_KERNELS ? all_kernels[i]->name : i == N_KERNELS ? "sse9" : "";
        int there = i < N_KERNELS ? all_kernels[i]->available() : i > N_KERNELS;
        setenv("GEMMA2_ISA", name, 1);
        gemma2_model *x = gemma2_open_memory(m.data, m.size, NULL, err, sizeof err);
        check(!!x == there, "GEMMA2_ISA=%s", name);
        if (x && i < N_KERNELS)
            check(!strcmp(gemma2_get_config(x)->isa, name), "GEMMA2_ISA=%s is heeded", name);
        if (!x)
            check(strstr(err, name) != NULL, "GEMMA2_ISA=%s is named in \"%s\"", name, err);
        gemma2_close(x);
    }
    unsetenv("GEMMA2_ISA");
    free(m.data);
}

/* Tiles are asked for once a model is opened whose prefill may use them, not before; where
 * they are refused, another matrix class stands in. */
static void test_permission(void)
{
#if defined(GEMMA2_EMULATE) && defined(HAVE_AMX)
    static const struct { uint32_t type, exact, refused, asked; } cases[] = {
        {Q8, 0, 0, 1}, {Q4, 0, 1, 1}, {BF16, 1, 0, 0}, {F32, 0, 0, 0}};
    struct shape shape = {"asking", 1, 64, 4, 2, 32, 96, 70, 37, 64, 50, 30, 1, 0, {0}, 64};
    if (!amx_kernels.available())
        return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int k = 0; k < 5; k++)
            shape.types[k] = cases[i].type;
        struct model x = {build(&shape), NULL};
        gemma2_open_params params;
        gemma2_open_params_init(&params);
        params.exact_prefill = cases[i].exact;
        tiles_refused = (int)cases[i].refused, tiles_asked_for = 0;
        x.m = gemma2_open(write_file("asking", x.image.data, x.image.size), &params, NULL, 0);
        check(x.m && x.m->isa == &amx_kernels, "the amx row comes first");
        check(tiles_asked_for == (int)cases[i].asked, "%s: asked for tiles %d times",
              types[cases[i].type].name, tiles_asked_for);
        const struct matrix_kernels *given = tiles_refused ? &avx512_matrix : &amx_matrix;
        check(x.m->matrix == (cases[i].asked ? given : NULL), "%s: the wrong matrix class",
              types[cases[i].type].name);
        unmake(&x);
    }
    tiles_refused = 0;
    remove(in_dir("asking"));
#endif
}

static void test_tokenizer_only(void)
{
    static struct pieces p;
    char err[256] = "";
    plain_pieces(&p, 30);
    struct image image = build_tokenizer_file(&p);
    gemma2_model *m = open_image(&image);
    gemma2_plan plan;
    check(gemma2_get_config(m)->n_layers == 0 && gemma2_get_config(m)->start_of_turn == 4,
          "config");
    check(gemma2_session_plan(m, NULL, &plan) == GEMMA2_ERR_ARGUMENT, "a plan without a model");
    check(!gemma2_session_new(m, NULL, err, sizeof err) && strstr(err, "tokenizer"), "no session");
    check(!gemma2_get_input(m, 0, &(gemma2_input){0}), "inputs without a model");
    gemma2_close(m);
    free(image.data);
}

/* Memory fails at the 1st, 2nd, 3rd ... place: an error each time, and nothing leaks. */
static int open_and_start(const char *path, int read_in)
{
    char err[256] = "";
    gemma2_open_params p;
    gemma2_open_params_init(&p);
    p.read_into_memory = (uint32_t)read_in;
    gemma2_model *m = gemma2_open(path, &p, err, sizeof err);
    gemma2_session *s = m ? gemma2_session_new(m, NULL, err, sizeof err) : NULL;
    if (!s)
        check(strstr(err, "memory") != NULL, "no memory, but '%s'", err);
    gemma2_session_free(s);
    gemma2_close(m);
    return s != NULL;
}

static void test_allocation_failures(void)
{
    struct image m = build(&tiny_shape);
    for (int read_in = 0; read_in < 2; read_in++) {
        const char *path = write_file("model", m.data, m.size);
        int live = alloc_live, ok = 0, at = 0;
        while (!ok && at < 100) {
            alloc_calls = 0, alloc_fails_at = ++at;
            ok = open_and_start(path, read_in);
            check(alloc_live == live, "failing at %d: %d not freed", at, alloc_live - live);
        }
        check(at == 4, "a model takes 2 allocations, a session 1; failed at %d places", at - 1);
        alloc_fails_at = 0;
    }
    remove(in_dir("model"));
    free(m.data);
}

/* Models and sessions that were closed above left nothing behind. */
static void test_no_leaks(void) { check(alloc_live == 0, "%d allocations live on", alloc_live); }

static void test_api(void)
{
    test_strings();
    test_sections();
    test_isa_choice();
    test_tokenizer_only();
    test_allocation_failures();
    test_no_leaks();
}

/* The sections of gemma2.c, and of this file. */
static const struct {
    const char *name;
    void (*run)(void);
} sections[] = {
    {"ground", test_ground}, {"file", test_weight_file}, {"formats", test_formats},
    {"kernels", test_kernels}, {"sharing", test_work_sharing}, {"model", test_model},
    {"far", test_far_positions},
    {"text", test_text}, {"sampler", test_sampler}, {"api", test_api}};
enum { N_SECTIONS = sizeof sections / sizeof *sections };

static int run_section(const char *name)
{
    for (int i = 0; i < N_SECTIONS; i++)
        if (!strcmp(sections[i].name, name)) {
            sections[i].run();
            return 1;
        }
    return check(0, "there is no section '%s'", name);
}

int main(int argc, char **argv)
{
    snprintf(scratch_dir, sizeof scratch_dir, "/tmp/gemma2-test-XXXXXX");
    if (!mkdtemp(scratch_dir))
        return printf("cannot make %s\n", scratch_dir), 1;
    unsetenv("GEMMA2_ISA"); /* the tests choose */
    if (EMULATED) {
        test_rows();
        test_matrix_models();
        test_permission();
    } else if (argc > 1) {
        for (int i = 1; i < argc; i++)
            run_section(argv[i]);
    } else {
        for (int i = 0; i < N_SECTIONS; i++)
            sections[i].run();
    }
    check(rmdir(scratch_dir) == 0, "files are left in %s", scratch_dir);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
