/* How fast, and how close to what the machine can do: bench MODEL | --shape 2b|9b|27b
 *
 *   bench model.bin [options]
 *   bench --shape 2b --type q8 [--head q6] [options]     random weights, made in memory; q4
 *                      and q3 keep v and head at q6, as export.py does
 *
 *   --kept N           the shape's head has only so many rows, as with export.py --keep-vocab
 *   --threads N[,N]    default: one a processor; of several counts a scaling line compares
 *                      the last with the first
 *   --prefill N[,N]    lengths of prompts, or none          (default 32,512,2048,8000)
 *   --decode N[,N]     tokens already there, or none        (default 0,4096,8000)
 *   --sessions N[,N]   sessions that decode in one pass      (default none)
 *   --busy N[,N]       one token at a time while so many other programs are busy, each on a
 *                      processor of its own, and what share of the idle speed that is
 *   --ahead            what guesses cost and gain: a row for each acceptance
 *   --draft SHAPE      the same, where each guess takes a draft model of that shape a token
 *   --states           saving, restoring and copying sessions of --decode's tokens
 *   --masks GRAMMAR    only what masks cost: in 20 replies of up to 200 random tokens, for which
 *                      tokenizer.bin will do as MODEL, and, with weights, of the speed of
 *                      generating, with and without masks in turns
 *   --told FILE        only what lookup guesses, four at a time, of a reply that is given: FILE
 *                      is a prompt, a line --, and the reply
 *   --plan             only the size of the file and the memory of sessions
 *   --quick            --prefill 512 --decode 0,4096
 *   --batch N          rows of one pass                     (default: the session's)
 *   --kv auto|f32|f16|q8  numbers of the cache
 *   --runs N           1..64, default 5; long prompts get a third
 *   --read             read the file into memory, huge pages where the system has them
 *   --no-limits        do not measure what the machine could do
 *   --json FILE        the same figures and more
 *
 * Per work: tokens a second as median over the runs (lowest .. highest), and its share of
 * what the machine could at best do, measured in the same process with as many threads:
 *
 *   prefill   2 FLOP x weights of the layers x tokens against the fastest product
 *             instruction of the row on registers alone.  The output head (one token of a
 *             prompt needs it) and attention are not counted, though they take time.
 *   decode    bytes of weights and cache read a second against the best of several ways to
 *             stream through the same mapping.
 *   sessions  tokens of all sessions together, and of each: short contexts, one row of each
 *             session in every pass.
 *
 * Depth is set by declaring positions of the cache filled with noise: speed does not depend
 * on the values. */
#define _GNU_SOURCE /* sched_setaffinity */
#include "../gemma2.c"

#include "team.h"

#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

enum { MAX_LIST = 16, MAX_RUNS = 64, DECODED = 16, MAX_IDS = 8192,
       MAX_SESSIONS = 256 };

struct list {
    int n, v[MAX_LIST];
};

struct options {
    const char *model, *shape, *draft, *type, *head, *json, *kv, *masks, *told;
    int kept, batch, runs, ahead, states, quick, read, no_limits, plan;
    struct list threads, prefill, decode, sessions, busy;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

/* ---- a model of a real shape with random weights ---- */

static const struct {
    const char *name;
    uint32_t l, d, n, k, h, f;
    float query_scale, embedding_scale;
} shapes[] = {{"2b", 26, 2304, 8, 4, 256, 9216, 1 / 16.0f, 48},
              {"9b", 42, 3584, 16, 8, 256, 14336, 1 / 16.0f, 59.75f},
              {"27b", 46, 4608, 32, 16, 128, 36864, 1 / 12.0f, 68}};

static void put_u32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }
static void put_u64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }
static void put_f32(uint8_t *p, float v) { memcpy(p, &v, 4); }

static uint32_t type_named(const char *name)
{
    for (uint32_t i = TYPE_F32; i < N_TYPES; i++)
        if (!strcmp(types[i].name, name))
            return i;
    die("unknown type");
    return 0;
}

/* The shape's header.  The vocabulary is Gemma's. */
static void put_header(uint8_t *p, size_t shape, uint64_t size, uint32_t n_sections)
{
    const uint32_t v[] = {shapes[shape].l, shapes[shape].d, shapes[shape].n, shapes[shape].k,
                          shapes[shape].h, shapes[shape].f, 256000, 4096, 8192};
    memcpy(p, "\x89GEMMA2\n", 8);
    put_u32(p + 8, 1), put_u32(p + 12, HEADER_BYTES), put_u64(p + 32, size);
    put_u64(p + 40, HEADER_BYTES), put_u32(p + 48, n_sections), put_u32(p + 52, ENTRY_BYTES);
    put_u32(p + 56, 4096);
    memcpy(p + 64, v, sizeof v);
    double theta = 10000;
    put_f32(p + 100, 1e-6f), memcpy(p + 104, &theta, 8);
    put_f32(p + 112, 50), put_f32(p + 116, 30);
    put_f32(p + 120, shapes[shape].query_scale), put_f32(p + 124, shapes[shape].embedding_scale);
    for (uint32_t l = 0; l < shapes[shape].l; l += 2)
        p[128 + l / 8] |= (uint8_t)(1 << l % 8);
}

/* Fills a tensor: random bytes where any are legal, small scales and floats elsewhere. */
static void fill_tensor(uint8_t *p, uint32_t type, uint64_t bytes, uint64_t tile)
{
    uint64_t x = 0x9e3779b97f4a7c15u ^ bytes;
    for (uint64_t i = 0; i + 8 <= bytes; i += 8) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        uint64_t r = x ^ x >> 29;
        if (type == TYPE_F32) /* +-0.03 */
            r = (r & 0x807fffff807fffffu) | 0x3c8000003c800000u;
        else if (type == TYPE_BF16)
            r = (r & 0x807f807f807f807fu) | 0x3c803c803c803c80u;
        put_u64(p + i, r);
    }
    for (uint64_t at = 0; is_quantised(type) && at < bytes; at += tile)
        for (int r = 0; r < TILE; r++)
            put_f32(p + at + 4 * r, type == TYPE_Q8 ? 2e-6f : 1e-5f);
}

static void put_entry(uint8_t *e, uint32_t role, uint32_t layer, uint32_t type, uint64_t rows,
                      uint64_t cols, uint64_t offset, uint64_t bytes)
{
    put_u32(e, role), put_u32(e + 4, layer), put_u32(e + 8, type);
    put_u64(e + 16, rows), put_u64(e + 24, cols), put_u64(e + 32, offset), put_u64(e + 40, bytes);
}

/* The tokenizer section of tokenizer.bin, Gemma's own: its size, and its bytes if p is not NULL. */
static uint64_t put_tokenizer(uint8_t *p)
{
    static uint8_t file[8 << 20];
    static size_t size;
    FILE *f = size ? NULL : fopen("tokenizer.bin", "rb");
    if (f)
        size = fread(file, 1, sizeof file, f), fclose(f);
    for (uint32_t i = 0; size > HEADER_BYTES && i < get_u32(file + 48); i++) {
        const uint8_t *e = file + HEADER_BYTES + (size_t)i * ENTRY_BYTES;
        if (get_u32(e) == ROLE_TOKENIZER) {
            if (p)
                memcpy(p, file + get_u64(e + 32), (size_t)get_u64(e + 40));
            return get_u64(e + 40);
        }
    }
    die("--shape takes its vocabulary from tokenizer.bin, which this folder lacks");
    return 0;
}

/* Lays out the sections at base, or only counts when base is NULL.  kept: the ids that the head
 * has rows for, spread over all, or 0 for all.  Returns the size. */
static uint64_t build_image(uint8_t *base, size_t shape, uint32_t type, uint32_t head,
                            uint32_t kept, int fill)
{
    gemma2_config c = {.n_vocab = 256000, .d_model = (int32_t)shapes[shape].d,
                       .n_heads = (int32_t)shapes[shape].n, .d_ffn = (int32_t)shapes[shape].f,
                       .n_kv_heads = (int32_t)shapes[shape].k,
                       .head_dim = (int32_t)shapes[shape].h};
    uint32_t n_sections = 3 + !!kept + shapes[shape].l * 11, at = 0;
    uint64_t end = HEADER_BYTES + (uint64_t)n_sections * ENTRY_BYTES;
    for (uint32_t l = 0; l <= shapes[shape].l; l++)
        for (int i = 0; i < N_ROLES; i++) {
            const struct role *r = &roles[i];
            int in_layer = r->id >= ROLE_LAYER_FIRST;
            if (r->id == ROLE_FACTS || r->id == ROLE_HEAD || r->id == ROLE_SCORE ||
                (r->id == ROLE_KEPT && !kept) || in_layer != (l < shapes[shape].l))
                continue;
            uint32_t t = r->rows == '-' ? TYPE_BYTES : r->cols == '1' ? TYPE_F32
                         : !in_layer ? head : has_group_bit(type) && !strcmp(r->name, "v") ? TYPE_Q6
                                     : type;
            uint64_t rows = dimension(&c, r->rows), cols = dimension(&c, r->cols);
            uint64_t tile = tile_bytes(t == TYPE_BYTES ? TYPE_F32 : t, cols);
            uint64_t bytes = t                    ? (rows + 15) / 16 * tile
                             : r->id == ROLE_KEPT ? 4 * (uint64_t)kept
                                                  : put_tokenizer(NULL);
            end = (end + 4095) / 4096 * 4096;
            if (base) {
                put_entry(base + HEADER_BYTES + (size_t)at * ENTRY_BYTES, r->id, in_layer ? l : 0,
                          t, t ? rows : 0, t ? cols : 0, end, bytes);
                if (t && fill)
                    fill_tensor(base + end, t, bytes, tile);
                else if (r->id == ROLE_TOKENIZER)
                    put_tokenizer(base + end);
                for (uint64_t k = 0; r->id == ROLE_KEPT && k < kept; k++)
                    put_u32(base + end + 4 * k, (uint32_t)(k * 256000 / kept));
            }
            at++;
            end += bytes;
        }
    if (base) {
        put_header(base, shape, end, n_sections);
        struct sha256 s;
        sha256_init(&s);
        sha256_add(&s, base, IDENTITY_AT);
        sha256_add(&s, base + HEADER_BYTES, (size_t)n_sections * ENTRY_BYTES);
        sha256_end(&s, base + IDENTITY_AT);
    }
    return end;
}

/* What can be had without swapping: Linux knows, elsewhere free pages must do. */
static uint64_t free_memory(void)
{
    unsigned long long kib = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f) && !sscanf(line, "MemAvailable: %llu", &kib))
        ;
    if (f)
        fclose(f);
    return kib ? kib << 10
               : (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
}

static gemma2_model *make_shape(const struct options *o)
{
    size_t i = 0, n = sizeof shapes / sizeof *shapes;
    while (i < n && strcmp(shapes[i].name, o->shape))
        i++;
    if (i == n)
        die("--shape is 2b, 9b or 27b");
    uint32_t type = type_named(o->type);
    uint32_t head = o->head ? type_named(o->head) : has_group_bit(type) ? TYPE_Q6 : type;
    uint32_t kept = (uint32_t)o->kept;
    uint64_t size = build_image(NULL, i, type, head, kept, 0);
    if (!o->plan && size + (2u << 30) > free_memory()) {
        fprintf(stderr, "bench: %s in %s needs %.1f GB and 2 more for the session; %.1f are free\n",
                o->shape, o->type, (double)size / 1e9, (double)free_memory() / 1e9);
        exit(1);
    }
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (o->plan ? MAP_NORESERVE : 0);
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED)
        die("cannot map the weights");
#ifdef MADV_HUGEPAGE
    madvise(p, size, o->read ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    build_image(p, i, type, head, kept, !o->plan);
    char err[256];
    gemma2_model *m = gemma2_open_memory(p, size, NULL, err, sizeof err);
    if (!m)
        die(err);
    return m;
}

/* The size of the file, and what sessions take beside it. */
static void print_plan(const struct options *o, const gemma2_model *m)
{
    gemma2_session_params params;
    gemma2_plan plan;
    gemma2_session_params_init(&params);
    printf("%s %s: file %.2f GB", o->shape ? o->shape : o->model, o->shape ? o->type : "",
           (double)gemma2_get_config(m)->file_bytes / 1e9);
    for (params.n_context = 4096; params.n_context <= 8192; params.n_context *= 2)
        if (gemma2_session_plan(m, &params, &plan) == GEMMA2_OK)
            printf(", a session of %d tokens %.2f GB", params.n_context, (double)plan.total / 1e9);
    printf("\n");
}

/* ---- medians ---- */

struct sample {
    double low, median, high;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct sample summarise(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    struct sample s = {x[0], x[n / 2], x[n - 1]};
    return s;
}

/* ---- what decoding could do: streaming through the weights ---- */

enum { READ_CHUNK = 1 << 20, READ_RUNS = 3 };

struct read_job {
    const uint8_t *p;
    size_t size;
    size_t ahead, streams; /* bytes to prefetch ahead, 0 for none; places read in turn */
    uint64_t sums[64];
};

static const struct read_way {
    const char *name;
    size_t ahead, streams;
} stream_ways[] = {{"plain loads", 0, 1},
                 {"prefetch 1 KB ahead", 1 << 10, 1},
                 {"prefetch 2 KB ahead", 2 << 10, 1},
                 {"two streams", 0, 2},
                 {"two streams, prefetch", 1 << 10, 2}};
enum { N_READ_WAYS = sizeof stream_ways / sizeof *stream_ways };

typedef uint64_t pair __attribute__((vector_size(16)));

/* sum += the 64 bytes at p */
INLINE void add_line(pair *sum, const uint8_t *p, size_t ahead)
{
    pair v;
    UNROLL for (int k = 0; k < 4; k++)
    {
        memcpy(&v, p + 16 * k, 16);
        sum[k] += v;
    }
    if (ahead)
        __builtin_prefetch(p + ahead);
}

/* Adds up n bytes at p, a multiple of 64, and as many at q unless it is NULL. */
INLINE uint64_t add_up(const uint8_t *p, const uint8_t *q, size_t n, size_t ahead)
{
    pair sum[4] = {{0}}, sum_q[4] = {{0}};
    for (size_t at = 0; at < n; at += 64) {
        add_line(sum, p + at, ahead);
        if (q)
            add_line(sum_q, q + at, ahead);
    }
    pair all = sum[0] + sum[1] + sum[2] + sum[3] + sum_q[0] + sum_q[1] + sum_q[2] + sum_q[3];
    return all[0] ^ all[1];
}

static void read_task(void *context, size_t i)
{
    struct read_job *job = context;
    const uint8_t *p = job->p + i * READ_CHUNK;
    size_t half = READ_CHUNK / 2, ahead = job->ahead;
    uint64_t sum = job->streams == 2 ? ahead ? add_up(p, p + half, half, ahead)
                                             : add_up(p, p + half, half, 0)
                   : ahead           ? add_up(p, NULL, READ_CHUNK, ahead)
                                     : add_up(p, NULL, READ_CHUNK, 0);
    job->sums[i % 64] ^= sum; /* so that it is computed; nobody reads it */
}

/* GB/s of one way, the median of a few runs. */
static double read_bandwidth(const gemma2_model *m, int threads, const struct read_way *way)
{
    static struct read_job job;
    double speed[READ_RUNS];
    size_t chunks = m->file.size / READ_CHUNK;
    job.p = m->file.data, job.size = m->file.size;
    job.ahead = way->ahead, job.streams = way->streams;
    for (int i = 0; i < READ_RUNS; i++) {
        double start = now();
        share_out(threads, chunks, read_task, &job);
        speed[i] = (double)(chunks * READ_CHUNK) / (now() - start) / 1e9;
    }
    return summarise(speed, READ_RUNS).median;
}

/* ---- what prefill could do: product instructions on registers ---- */

enum { PEAK_SUMS = 12, PEAK_RUNS = 4 };

#if defined(HAVE_X86) || defined(HAVE_NEON)

#ifdef HAVE_X86
#define PEAK_REGISTER "+x"
#define PEAK_TARGET(features) __attribute__((target(features)))
#else
#define PEAK_REGISTER "+w"
#define PEAK_TARGET(features)
#endif

/* n steps, each adding a product of a and b to every one of 12 sums, so that none waits for
 * another.  The empty assembly keeps the compiler from knowing the operands. */
#define PEAK_LOOP(name, features, sums, operands, step)                                   \
    PEAK_TARGET(features) static void name(size_t n)                                      \
    {                                                                                     \
        sums sum[PEAK_SUMS];                                                              \
        operands a, b;                                                                    \
        memset(&a, 1, sizeof a), memset(&b, 1, sizeof b);                                 \
        UNROLL for (int i = 0; i < PEAK_SUMS; i++)                                        \
            sum[i] = (sums){0};                                                           \
        for (; n; n--)                                                                    \
            UNROLL for (int i = 0; i < PEAK_SUMS; i++)                                    \
            {                                                                             \
                __asm__("" : PEAK_REGISTER(a), PEAK_REGISTER(b));                         \
                sum[i] = step;                                                            \
            }                                                                             \
        UNROLL for (int i = 0; i < PEAK_SUMS; i++)                                        \
            __asm__ volatile("" : PEAK_REGISTER(sum[i]));                                 \
    }
#endif

#ifdef HAVE_X86
PEAK_LOOP(peak_vpdpbusd_512, "avx512f,avx512vnni", __m512i, __m512i,
          _mm512_dpbusd_epi32(sum[i], a, b))
PEAK_LOOP(peak_fma_512, "avx512f", __m512, __m512, _mm512_fmadd_ps(a, b, sum[i]))
PEAK_LOOP(peak_fma_256, "avx2,fma", __m256, __m256, _mm256_fmadd_ps(a, b, sum[i]))
PEAK_LOOP(peak_maddubs_256, "avx2", __m256i, __m256i,
          _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b)))
#endif
#ifdef HAVE_AVXVNNI
PEAK_LOOP(peak_vpdpbusd_256, "avx2,avxvnni", __m256i, __m256i,
          _mm256_dpbusd_avx_epi32(sum[i], a, b))
#endif
#ifdef HAVE_AVX512BF16
PEAK_LOOP(peak_vdpbf16ps_512, "avx512f,avx512bf16", __m512, __m512i,
          _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b))
#endif
#ifdef HAVE_NEON
PEAK_LOOP(peak_fmla, "", float32x4_t, float32x4_t, vfmaq_f32(sum[i], a, b))
PEAK_LOOP(peak_smlal, "", int16x8_t, int8x16_t,
          vmlal_s8(sum[i], vget_low_s8(a), vget_low_s8(b)))
PEAK_LOOP(peak_sdot, "", int32x4_t, int8x16_t, sdot(sum[i], a, b, 0))
PEAK_LOOP(peak_smmla, "", int32x4_t, int8x16_t, smmla(sum[i], a, b))
#endif

#ifdef HAVE_AMX
static int has_tiles(void) { return has_amx() && may_use_tiles(); }

static void peak_tdpbf16ps(size_t n)
{
    config_amx(TILE);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_zero(4);
    tile_zero(5);
    tile_zero(6);
    tile_zero(7);
    for (; n; n--)
        UNROLL for (int i = 0; i < PEAK_SUMS; i += 4)
        {
            tile_dot_bf16(0, 4, 6);
            tile_dot_bf16(1, 4, 7);
            tile_dot_bf16(2, 5, 6);
            tile_dot_bf16(3, 5, 7);
        }
    tile_release();
}
#endif

/* What rows can multiply with.  A row that is not here gets no limit for prefill. */
struct peak {
    const char *rows, *name;
    enum { INTEGERS = 1, FLOATS = 2, BF16S = 4 } kinds; /* of weights that it can serve */
    int (*available)(void);
    int ops; /* of one instruction, or group of them; a product and a sum are two */
    void (*loop)(size_t n);
};

static const struct peak peaks[] = {
#ifdef HAVE_AMX
    {"amx", "tdpbf16ps", INTEGERS | BF16S, has_tiles, 16384, peak_tdpbf16ps},
#endif
#ifdef HAVE_AVX512BF16
    {"avx512bf16", "vdpbf16ps", BF16S, has_avx512bf16, 64, peak_vdpbf16ps_512},
#endif
#ifdef HAVE_X86
    {"amx avx512bf16 avx512", "vpdpbusd", INTEGERS, has_avx512, 128, peak_vpdpbusd_512},
    {"amx avx512bf16 avx512", "FMA", FLOATS | BF16S, has_avx512, 32, peak_fma_512},
    {"avxvnni avx2", "FMA", FLOATS | BF16S, has_avx2, 16, peak_fma_256},
    {"avx2", "maddubs+madd+add", INTEGERS, has_avx2, 64, peak_maddubs_256},
#endif
#ifdef HAVE_AVXVNNI
    {"avxvnni", "vpdpbusd", INTEGERS, has_avxvnni, 64, peak_vpdpbusd_256},
#endif
#ifdef HAVE_NEON
    {"i8mm", "smmla", INTEGERS, has_i8mm, 64, peak_smmla},
    {"dotprod", "sdot", INTEGERS, has_dotprod, 32, peak_sdot},
    {"neon", "smlal", INTEGERS, always, 16, peak_smlal},
    {"i8mm dotprod neon", "fmla", FLOATS | BF16S, always, 8, peak_fmla},
#endif
    {"", "", 0, NULL, 0, NULL},
};
enum { N_PEAKS = sizeof peaks / sizeof *peaks - 1 };

static int is_of_row(const struct peak *k, const char *row)
{
    size_t n = strlen(row);
    for (const char *p = k->rows; (p = strstr(p, row)) != NULL; p += n)
        if ((p == k->rows || p[-1] == ' ') && (p[n] == ' ' || !p[n]))
            return 1;
    return 0;
}

struct peak_job {
    const struct peak *peak;
    size_t steps;
};

static void peak_task(void *context, size_t i)
{
    struct peak_job *job = context;
    (void)i;
    job->peak->loop(job->steps);
}

/* Operations a second of all threads, in units of 1e9; the best of a few runs, each long
 * enough for the threads to wake up and find a core. */
static double measure_peak(const struct peak *k, int threads)
{
    struct peak_job job = {k, 1 << 12};
    double best = 0, seconds = 0;
    for (; seconds < 0.02; job.steps *= 2) {
        double start = now();
        k->loop(job.steps);
        seconds = now() - start;
    }
    for (int i = 0; i < PEAK_RUNS; i++) {
        double start = now(), ops = (double)k->ops * PEAK_SUMS * (double)job.steps * threads;
        share_out(threads, (size_t)threads, peak_task, &job);
        double speed = ops / (now() - start) / 1e9;
        best = speed > best ? speed : best;
    }
    return best;
}

/* ---- the limits of one number of threads ---- */

struct limits {
    int threads;
    double read[N_READ_WAYS], best_read;         /* GB/s */
    double peak[N_PEAKS + 1], peak_1[N_PEAKS + 1]; /* GOP/s, 0 where not of the row */
};

static void measure_limits(const gemma2_model *m, struct limits *l)
{
    for (int i = 0; i < N_READ_WAYS; i++) {
        l->read[i] = read_bandwidth(m, l->threads, &stream_ways[i]);
        l->best_read = l->read[i] > l->best_read ? l->read[i] : l->best_read;
    }
    for (int i = 0; i < N_PEAKS; i++)
        if (is_of_row(&peaks[i], m->isa->name) && peaks[i].available()) {
            l->peak_1[i] = measure_peak(&peaks[i], 1);
            l->peak[i] = l->threads == 1 ? l->peak_1[i] : measure_peak(&peaks[i], l->threads);
        }
}

static void print_limits(const struct limits *l)
{
    printf("%d thread%s\n", l->threads, l->threads == 1 ? "" : "s");
    if (l->best_read > 0) {
        printf("  read %9.1f GB/s  (", l->best_read);
        for (int i = 0; i < N_READ_WAYS; i++)
            printf("%s%s %.1f", i ? ", " : "", stream_ways[i].name, l->read[i]);
        printf(")\n");
    }
    for (int i = 0; i < N_PEAKS; i++)
        if (l->peak[i] > 0)
            printf("  peak %9.1f GOP/s  (%s, %.1f with one thread)\n", l->peak[i],
                   peaks[i].name, l->peak_1[i]);
}

/* The fastest product for weights of this type, 0 if none is known. */
static double peak_for(const struct limits *l, const char *type)
{
    int kind = !strcmp(type, "f32") ? FLOATS : !strcmp(type, "bf16") ? BF16S : INTEGERS;
    double best = 0;
    for (int i = 0; i < N_PEAKS; i++)
        if (peaks[i].kinds & kind && l->peak[i] > best)
            best = l->peak[i];
    return best;
}

/* Tokens a second at which a prompt would keep the product instructions busy. */
static double prefill_limit(const gemma2_model *m, const struct limits *l)
{
    double seconds = 0;
    gemma2_section e;
    for (size_t i = 0; gemma2_get_section(m, i, &e); i++)
        if (e.layer >= 0 && e.cols > 1) {
            double peak = peak_for(l, e.type);
            if (peak <= 0)
                return 0;
            seconds += 2 * (double)(e.rows * e.cols) / peak / 1e9;
        }
    return 1 / seconds;
}

/* Bytes of weights read for a token: all but an embedding that is not the head as well. */
static size_t weight_bytes(const gemma2_model *m)
{
    size_t all = (m->head.rows + TILE - 1) / TILE * m->head.tile_bytes;
    gemma2_section e;
    for (size_t i = 0; gemma2_get_section(m, i, &e); i++)
        if (strcmp(e.type, "bytes") && strcmp(e.role, "embedding") && strcmp(e.role, "head"))
            all += (size_t)e.bytes;
    return all;
}

static const char *const cache_names[] = {"auto", "f32", "f16", "q8"};

static int cache_type(const char *name)
{
    int i = GEMMA2_CACHE_Q8;
    while (i >= 0 && strcmp(name, cache_names[i]))
        i--;
    return i;
}

static size_t cache_bytes_read(const gemma2_session *s, int depth)
{
    const gemma2_config *c = &s->model->config;
    size_t n = 0;
    for (int l = 0; l < c->n_layers; l++) {
        int seen = c->is_local[l] && depth > s->window ? s->window : depth;
        n += 2 * (size_t)seen * (size_t)c->n_kv_heads * position_bytes(s, c->head_dim);
    }
    return n;
}

/* ---- works ---- */

struct result {
    const char *kind; /* "prefill", "decode at", "sessions", "busy" */
    int n, threads;
    struct sample speed;  /* tokens a second */
    double done, limit;   /* GFLOP/s, GB/s, tok/s each or share of idle; tokens a second, 0 if not
                           * measured */
};

struct report {
    const struct options *o;
    const gemma2_model *m;
    int batch, cache, n_limits, n_results;
    struct limits limits[MAX_LIST];
    struct result results[4 * MAX_LIST * MAX_LIST];
};

/* Noise in the cache, as if tokens had been evaluated. */
static void fill_cache(gemma2_session *s)
{
    const gemma2_config *c = &s->model->config;
    for (int l = 0; l < c->n_layers; l++)
        for (int values = 0; values < 2; values++) {
            uint8_t *p = values ? s->cache[l].values : s->cache[l].keys;
            size_t bytes = head_bytes(s, &s->cache[l], values) * (size_t)c->n_kv_heads;
            for (size_t i = 0; i < bytes; i += 2)
                p[i] = (uint8_t)(i * 7), p[i + 1] = (uint8_t)((i * 31 & 0x83) | 0x30);
        }
}

/* Tokens a second of n tokens after depth others: in one call, or one by one. */
static double time_tokens(gemma2_session *s, int depth, int n, int decode, float *logits)
{
    static int32_t ids[MAX_IDS];
    for (int i = 0; i < n; i++)
        ids[i] = (int32_t)((uint32_t)i * 7919u % (uint32_t)s->model->config.n_vocab);
    s->position = depth, s->oldest = max_i32(0, depth - s->ring);
    double start = now();
    if (!decode && gemma2_prefill(s, ids, (size_t)n, logits) < 0)
        die("a prompt failed");
    for (int i = 0; decode && i < n; i++)
        if (gemma2_eval(s, ids + i, 1, logits) < 0)
            die("a step failed");
    return n / (now() - start);
}

/* GFLOP a prompt's token takes in the layers' products. */
static double gflop_a_token(const gemma2_model *m)
{
    double n = 0;
    gemma2_section e;
    for (size_t i = 0; gemma2_get_section(m, i, &e); i++)
        if (e.layer >= 0 && e.cols > 1)
            n += 2e-9 * (double)(e.rows * e.cols);
    return n;
}

static void print_result(const struct result *r)
{
    int decode = *r->kind == 'd', shared = *r->kind == 's', busy = *r->kind == 'b';
    printf("  %-10s%5d %9.2f tok/s  (%.2f .. %.2f) %7.*f %s", r->kind, r->n, r->speed.median,
           r->speed.low, r->speed.high, 1 + shared + busy, r->done,
           decode ? "GB/s" : shared ? "tok/s each" : busy ? "of idle" : "GFLOP/s");
    if (r->limit > 0)
        printf(", %.0f %% of %s", 100 * r->speed.median / r->limit,
               decode ? "read bandwidth" : "the matrix peak");
    printf("\n");
    fflush(stdout);
}

static void run_work(struct report *report, gemma2_session *s, const struct limits *l, int decode,
                     int n)
{
    float *logits = malloc(sizeof *logits * (size_t)s->model->config.n_vocab);
    double speed[MAX_RUNS];
    int runs = !decode && n > 2000 ? 1 + report->o->runs / 3 : report->o->runs;
    int depth = decode ? n : 0, tokens = decode ? DECODED : n;
    if (!logits)
        die("out of memory");
    time_tokens(s, depth, decode ? 2 : n < 32 ? n : 32, decode, logits);
    for (int i = 0; i < runs; i++)
        speed[i] = time_tokens(s, depth, tokens, decode, logits);
    free(logits);
    struct result *r = &report->results[report->n_results++];
    *r = (struct result){.kind = decode ? "decode at" : "prefill", .n = n,
                         .threads = s->worker->n_threads, .speed = summarise(speed, runs)};
    double gb = 1e-9 * (double)(weight_bytes(s->model) + cache_bytes_read(s, depth));
    r->done = r->speed.median * (decode ? gb : gflop_a_token(s->model));
    r->limit = decode ? l->best_read / gb : prefill_limit(s->model, l);
    print_result(r);
}

/* A process that does nothing, as fast as it can, on one processor. */
static pid_t start_busy(int processor)
{
    pid_t pid = fork();
    if (pid)
        return pid;
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)processor, &set);
    sched_setaffinity(0, sizeof set, &set);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    for (volatile int i = 0;; i = !i) {
    }
}

/* Idle and busy runs take turns. */
static void run_busy(struct report *report, gemma2_session *s, int n)
{
    float *logits = malloc(sizeof *logits * (size_t)s->model->config.n_vocab);
    double idle[MAX_RUNS], busy[MAX_RUNS];
    pid_t others[MAX_SESSIONS];
    if (!logits)
        die("out of memory");
    for (int i = 0; i < report->o->runs; i++) {
        idle[i] = time_tokens(s, 0, DECODED, 1, logits);
        for (int k = 0; k < n; k++)
            if ((others[k] = start_busy(k)) < 0)
                die("no process for --busy");
        time_tokens(s, 0, DECODED, 1, logits);
        busy[i] = time_tokens(s, 0, DECODED, 1, logits);
        for (int k = 0; k < n; k++)
            kill(others[k], SIGKILL), waitpid(others[k], NULL, 0);
        time_tokens(s, 0, DECODED, 1, logits);
    }
    free(logits);
    struct result *r = &report->results[report->n_results++];
    *r = (struct result){.kind = "busy", .n = n, .threads = s->worker->n_threads,
                         .speed = summarise(busy, report->o->runs)};
    r->done = r->speed.median / summarise(idle, report->o->runs).median;
    print_result(r);
}

/* Tokens a second of n sessions together, DECODED tokens each, a row of each in every pass. */
static double time_sessions(gemma2_session **s, int n, float *logits)
{
    size_t v = (size_t)s[0]->model->config.n_vocab;
    gemma2_row rows[MAX_SESSIONS];
    for (int k = 0; k < n; k++)
        gemma2_rewind(s[k], 0);
    double start = now();
    for (int i = 0; i < DECODED; i++) {
        for (int k = 0; k < n; k++)
            rows[k] = (gemma2_row){.session = s[k],
                                   .id = (int32_t)((size_t)(i * 7919 + k * 104729) % v),
                                   .logits = logits + (size_t)k * v};
        if (gemma2_eval_rows(rows, (size_t)n) < 0)
            die("a shared pass failed");
    }
    return n * DECODED / (now() - start);
}

static void run_sessions(struct report *report, gemma2_session_params params, int n)
{
    gemma2_session *s[MAX_SESSIONS];
    double speed[MAX_RUNS];
    char err[256];
    float *logits = malloc((size_t)n * sizeof *logits * (size_t)report->m->config.n_vocab);
    gemma2_worker_params of = {.struct_size = sizeof of, .n_batch = n,
                               .n_threads = params.n_threads, .n_context = DECODED};
    gemma2_worker *work = gemma2_worker_new(report->m, &of, err, sizeof err);
    if (!work)
        die(err);
    params.n_context = DECODED, params.n_batch = 1, params.worker = work;
    for (int k = 0; k < n; k++)
        if (!(s[k] = gemma2_session_new(report->m, &params, err, sizeof err)))
            die(err);
    if (!logits)
        die("out of memory");
    time_sessions(s, n, logits);
    for (int i = 0; i < report->o->runs; i++)
        speed[i] = time_sessions(s, n, logits);
    struct result *r = &report->results[report->n_results++];
    *r = (struct result){.kind = "sessions", .n = n, .threads = work->n_threads,
                         .speed = summarise(speed, report->o->runs)};
    r->done = r->speed.median / n;
    print_result(r);
    for (int k = 0; k < n; k++)
        gemma2_session_free(s[k]);
    gemma2_worker_free(work);
    free(logits);
}

static int32_t nth_token(int32_t i) { return (int32_t)((uint32_t)i * 7919u % 100000); }

struct guesser {
    uint32_t chance;       /* of 100 that a guess is right */
    gemma2_session *draft; /* or NULL: guesses cost nothing */
    float *logits;
};

/* Guesses the tokens that come, whatever the draft model says. */
static int32_t guess_right(void *context, const int32_t *history, int32_t n, int32_t *ids,
                           int32_t most)
{
    const struct guesser *g = context;
    if (g->draft && follow(g->draft, history, n, g->logits) < 0)
        die("the draft model failed");
    for (int32_t i = 0; i < most; i++) {
        uint32_t dice = ((uint32_t)(n + i) * 2654435761u >> 8) % 100;
        ids[i] = nth_token(n + i) + (dice >= g->chance);
        if (g->draft && i + 1 < most && gemma2_eval(g->draft, &ids[i], 1, g->logits) < 0)
            die("the draft model failed");
    }
    return most;
}

static double time_ahead(gemma2_session *s, gemma2_ahead *a, int32_t n, float *logits)
{
    double start = now();
    gemma2_rewind(s, 0);
    for (int32_t i = 0, id; i < n; i++) {
        id = nth_token(i);
        if ((a ? gemma2_eval_ahead(s, a, id, logits) : gemma2_eval(s, &id, 1, logits)) < 0)
            die("looking ahead failed");
    }
    return n / (now() - start);
}

/* Speed with guesses of a forced acceptance against speed without, in turn. */
static void run_ahead(const gemma2_model *m, gemma2_session *s, gemma2_session *draft, int runs)
{
    static const uint32_t chances[] = {0, 70, 85, 90};
    size_t n_vocab = (size_t)gemma2_get_config(m)->n_vocab;
    float *logits = malloc(2 * n_vocab * sizeof *logits);
    gemma2_ahead_params p;
    gemma2_ahead_params_init(&p);
    p.lookup = 0, p.propose = guess_right;
    for (int i = 0; i < 4; i++) {
        struct guesser g = {chances[i], draft, logits + n_vocab};
        p.context = &g;
        gemma2_ahead *a = gemma2_ahead_new(m, &p, NULL, 0);
        if (!a || !logits)
            die("out of memory");
        time_ahead(s, a, 48, logits); /* it learns what passes cost */
        double ahead[MAX_RUNS], plain[MAX_RUNS], gain[MAX_RUNS];
        for (int k = 0; k < runs; k++) {
            ahead[k] = time_ahead(s, a, 64, logits), plain[k] = time_ahead(s, NULL, 24, logits);
            gain[k] = ahead[k] / plain[k];
        }
        struct sample x = summarise(gain, runs);
        printf("ahead    %2u %% right: %.2f tok/s, %.2f without, %.2fx (%.2f .. %.2f); "
               "%.1f tokens a pass\n", chances[i], summarise(ahead, runs).median,
               summarise(plain, runs).median, x.median, x.low, x.high,
               (double)(a->counts.passes + a->counts.accepted) / (double)a->counts.passes);
        for (int k = 2; k <= MAX_DRAFTS + 1 && a->cost[1] > 0; k++)
            if (a->cost[k] > 0) /* k - 1 guesses, all right or not at all */
                printf("         %2d rows cost %.2f passes; pays above %.0f %% right\n", k,
                       a->cost[k] / a->cost[1],
                       100 * (a->cost[k] / a->cost[1] - 1) / (k - 1));
        gemma2_ahead_free(a);
    }
    free(logits);
}

/* Seconds of one way to move a session of so many bytes: see the names below. */
static double time_move(int way, gemma2_session *to, gemma2_session *from, uint8_t *saved,
                        size_t bytes, uint8_t *copy)
{
    double start = now();
    if (way == 0)
        memcpy(copy, saved, bytes);
    else if (way == 1 ? gemma2_session_copy(to, from)
             : way == 2 ? gemma2_session_save(from, saved, bytes) < 0
                        : gemma2_session_restore(to, saved, bytes))
        die("a session cannot be moved");
    return now() - start;
}

/* Medians, the last two also without the CPU's instructions for digests. */
static void run_states(gemma2_model *m, gemma2_session *s, const gemma2_session_params *params,
                       int n, int runs)
{
    static const char *const ways[] = {"memcpy", "copy", "save", "restore"};
    gemma2_session *to = gemma2_session_new(m, params, NULL, 0);
    sha256_fn *fast = m->sha256;
    s->position = n, s->oldest = max_i32(0, n - s->ring);
    size_t bytes = (size_t)gemma2_session_save(s, NULL, 0);
    uint8_t *saved = malloc(bytes), *copy = malloc(bytes);
    if (!to || !saved || !copy)
        die("out of memory");
    printf("states   of %d tokens, %.0f MB:", n, (double)bytes / 1e6);
    for (int i = 0; i < 6; i++) {
        double times[MAX_RUNS];
        int way = i < 4 ? i : i - 2;
        m->sha256 = i < 4 ? fast : NULL;
        gemma2_session_save(s, saved, bytes);
        for (int k = 0; k < runs; k++)
            times[k] = time_move(way, to, s, saved, bytes, copy);
        double median = summarise(times, runs).median;
        printf(" %s%s %.1f ms (%.0f MB/s)", ways[way], i < 4 ? "" : " plainly", 1e3 * median,
               (double)bytes / 1e6 / median);
    }
    printf("\n");
    m->sha256 = fast;
    free(saved), free(copy);
    gemma2_session_free(to);
}

/* All works with one number of threads. */
static void run_threads(struct report *report, int threads)
{
    const struct options *o = report->o;
    char err[256];
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_threads = threads, params.n_batch = o->batch;
    params.cache_type = cache_type(o->kv);
    gemma2_session *s = gemma2_session_new(report->m, &params, err, sizeof err);
    if (!s)
        die(err);
    report->batch = s->n_batch, report->cache = s->cache_type;
    struct limits *l = &report->limits[report->n_limits++];
    l->threads = s->worker->n_threads;
    if (!o->no_limits)
        measure_limits(report->m, l);
    print_limits(l);
    for (int i = 0; i < o->prefill.n; i++)
        if (o->prefill.v[i] <= gemma2_context(s))
            run_work(report, s, l, 0, o->prefill.v[i]);
    if (o->ahead)
        run_ahead(report->m, s, NULL, o->runs);
    if (o->draft) {
        struct options of_draft = *o;
        of_draft.shape = o->draft;
        gemma2_model *m = make_shape(&of_draft);
        gemma2_session *draft = m ? gemma2_session_new(m, &params, err, sizeof err) : NULL;
        if (!draft)
            die("no room for the draft model");
        run_ahead(report->m, s, draft, o->runs);
        gemma2_session_free(draft), gemma2_close(m);
    }
    if (o->decode.n)
        fill_cache(s);
    for (int i = 0; i < o->decode.n && o->states; i++)
        if (o->decode.v[i] && o->decode.v[i] <= gemma2_context(s))
            run_states((gemma2_model *)(uintptr_t)report->m, s, &params, o->decode.v[i], o->runs);
    for (int i = 0; i < o->decode.n && !o->states; i++)
        if (o->decode.v[i] + DECODED <= gemma2_context(s))
            run_work(report, s, l, 1, o->decode.v[i]);
    for (int i = 0; i < o->busy.n; i++)
        run_busy(report, s, o->busy.v[i]);
    gemma2_session_free(s);
    for (int i = 0; i < o->sessions.n; i++)
        run_sessions(report, params, o->sessions.v[i]);
}

/* ---- reports ---- */

/* The CPU's name for itself, or the kind of machine. */
static const char *cpu_name(void)
{
    static char line[256];
    static struct utsname machine;
    FILE *f = fopen("/proc/cpuinfo", "r");
    char *name = NULL;
    while (f && !name && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && (name = strchr(line, ':')) != NULL)
            name += 2, name[strcspn(name, "\n")] = 0;
    if (f)
        fclose(f);
    return name ? name : uname(&machine) < 0 ? "unknown CPU" : machine.machine;
}

/* Peak resident memory in GiB. */
static double peak_resident(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss / (1 << 30); /* bytes there */
#else
    return (double)usage.ru_maxrss / (1 << 20);
#endif
}

/* How much the last number of threads gains over the first, work by work. */
static void print_scaling(const struct report *report)
{
    int first = report->limits[0].threads, last = report->limits[report->n_limits - 1].threads;
    if (report->n_limits < 2)
        return;
    printf("scaling, %d threads to %d", last, first);
    int n = report->n_results / report->n_limits, base = report->n_results - n;
    for (int i = 0; i < n; i++)
        printf("%s %s %d %.2f", i ? "," : ":", report->results[i].kind, report->results[i].n,
               report->results[base + i].speed.median / report->results[i].speed.median);
    printf("\n");
}

static void write_limits(FILE *f, const struct limits *l)
{
    fprintf(f, "{\"threads\":%d,\"read_gbs\":%.2f,\"reads\":{", l->threads, l->best_read);
    for (int i = 0; i < N_READ_WAYS; i++)
        fprintf(f, "%s\"%s\":%.2f", i ? "," : "", stream_ways[i].name, l->read[i]);
    fprintf(f, "},\"peaks\":[");
    for (int i = 0, n = 0; i < N_PEAKS; i++)
        if (l->peak[i] > 0)
            fprintf(f, "%s{\"name\":\"%s\",\"gops\":%.1f,\"gops_one_thread\":%.1f}",
                    n++ ? "," : "", peaks[i].name, l->peak[i], l->peak_1[i]);
    fprintf(f, "]}");
}

static void write_result(FILE *f, const struct result *r)
{
    fprintf(f, "\n{\"work\":\"%s %d\",\"threads\":%d,\"median\":%.3f,\"low\":%.3f,\"high\":%.3f,"
               "\"%s\":%.2f", r->kind, r->n, r->threads, r->speed.median, r->speed.low,
            r->speed.high, *r->kind == 'd' ? "gbs" : *r->kind == 's' ? "tps_each" : "gflops",
            r->done);
    if (r->limit > 0)
        fprintf(f, ",\"percent_of_limit\":%.1f", 100 * r->speed.median / r->limit);
    fprintf(f, "}");
}

/* A string in JSON's quotes. */
static void write_string(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++)
        if (*s == '"' || *s == '\\')
            fprintf(f, "\\%c", *s);
        else if ((unsigned char)*s >= ' ')
            fputc(*s, f);
    fputc('"', f);
}

static void write_json(const struct report *report)
{
    const struct options *o = report->o;
    FILE *f = fopen(o->json, "w");
    if (!f)
        die("cannot write the JSON file");
    fprintf(f, "{\"cpu\":");
    write_string(f, cpu_name());
    fprintf(f, ",\"model\":");
    write_string(f, o->shape ? o->shape : o->model);
    fprintf(f, ",\"row\":\"%s\",\"weight_bytes\":%zu,\"batch\":%d,\"cache\":\"%s\","
               "\"huge_pages\":%s,\"runs\":%d,\"peak_resident_gib\":%.3f,\n\"limits\":[",
            report->m->isa->name, weight_bytes(report->m), report->batch,
            cache_names[report->cache], o->read ? "true" : "false", o->runs, peak_resident());
    for (int i = 0; i < report->n_limits && !o->no_limits; i++)
        fprintf(f, "%s", i ? ",\n" : ""), write_limits(f, &report->limits[i]);
    fprintf(f, "],\n\"results\":[");
    for (int i = 0; i < report->n_results; i++)
        fprintf(f, "%s", i ? "," : ""), write_result(f, &report->results[i]);
    fprintf(f, "]}\n");
    if (fclose(f))
        die("cannot write the JSON file");
}

/* ---- masks ---- */

static int by_time(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* A reply under a grammar: where it stands, and the mask of its next token. */
struct reply {
    gemma2_matcher *matcher;
    gemma2_grammar_state state;
    uint32_t *mask;
};

/* What masks and steps take of replies made of allowed tokens. */
static void time_masks(const gemma2_model *m, struct reply *r)
{
    enum { REPLIES = 20, LENGTH = 200 };
    static double took[REPLIES * LENGTH];
    uint32_t draw = 1;
    double all = 0;
    size_t n = 0;
    for (int reply = 0; reply < REPLIES; reply++) {
        gemma2_matcher_start(r->matcher, &r->state);
        for (int left = LENGTH, over = 0; left > 0 && !over; left--) {
            int32_t chosen = -1, choices = 0;
            double start = now();
            gemma2_matcher_allowed(r->matcher, &r->state, left, r->mask);
            took[n++] = 1e6 * (now() - start);
            all -= start - now();
            for (int32_t id = 0; id < m->config.n_vocab; id++)
                if (r->mask[id / 32] >> id % 32 & 1) {
                    draw = draw * 1664525 + 1013904223;
                    chosen = (draw >> 8) % (uint32_t)++choices ? chosen : id;
                }
            start = now();
            over = gemma2_matcher_accept(r->matcher, &r->state, chosen) < 0 ||
                   gemma2_is_stop(m, chosen);
            all += now() - start;
        }
    }
    qsort(took, n, sizeof *took, by_time);
    printf("%zu masks: median %.1f us, 99 of 100 within %.1f us, longest %.0f us; with its step "
           "%.1f us on average\n", n, took[n / 2], took[n * 99 / 100], took[n - 1],
           1e6 * all / (double)n);
}

/* Tokens a second of replies, each at most n tokens long, in one text; r NULL: unconstrained. */
static double time_replies(gemma2_session *s, struct reply *r, int n, float *logits)
{
    gemma2_sampler p;
    gemma2_sampler_init(&p, 1);
    int32_t id = nth_token(0), left = 0;
    double start = now();
    gemma2_rewind(s, 0);
    for (int i = 0; i < n; i++) {
        if (gemma2_eval(s, &id, 1, logits) < 0)
            die("a pass failed");
        if (r && !left)
            gemma2_matcher_start(r->matcher, &r->state), left = n;
        if (r && gemma2_matcher_allowed(r->matcher, &r->state, left--, r->mask) < 0)
            die("the grammar has no room");
        p.allow = r ? r->mask : NULL;
        id = gemma2_sample(s, &p, logits);
        if (id < 0 || (r && gemma2_matcher_accept(r->matcher, &r->state, id) < 0))
            die("no token may follow");
        left = gemma2_is_stop(s->model, id) ? 0 : left;
    }
    return n / (now() - start);
}

static void run_masks(const struct options *o, const gemma2_model *m)
{
    enum { LENGTH = 100 };
    static char text[1 << 20];
    char err[256];
    double masked[MAX_RUNS], plain[MAX_RUNS], share[MAX_RUNS];
    FILE *f = fopen(o->masks, "rb");
    size_t size = f ? fread(text, 1, sizeof text, f) : 0, n_vocab = (size_t)m->config.n_vocab;
    gemma2_grammar *g = gemma2_grammar_new(m, text, (int64_t)size, err, sizeof err);
    struct reply r = {.matcher = gemma2_matcher_new(g),
                      .mask = calloc(n_vocab / 32 + 1, sizeof *r.mask)};
    float *logits = malloc(n_vocab * sizeof *logits);
    if (!f || !r.mask || !r.matcher || !logits)
        die(f && !g ? err : "cannot read the grammar");
    fclose(f);
    time_masks(m, &r);
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    params.n_context = LENGTH;
    for (int i = 0; i < o->threads.n && m->config.d_model; i++) {
        params.n_threads = o->threads.v[i];
        gemma2_session *s = gemma2_session_new(m, &params, err, sizeof err);
        if (!s)
            die(err);
        for (int k = -1; k < o->runs; k++) { /* the first run warms up */
            int at = k < 0 ? 0 : k;
            masked[at] = time_replies(s, &r, LENGTH, logits);
            plain[at] = time_replies(s, NULL, LENGTH, logits);
            share[at] = masked[at] / plain[at];
        }
        struct sample x = summarise(share, o->runs);
        printf("generating, %d threads: %.2f tok/s with masks, %.2f without, %.3f of it "
               "(%.3f .. %.3f)\n", s->worker->n_threads, summarise(masked, o->runs).median,
               summarise(plain, o->runs).median, x.median, x.low, x.high);
        gemma2_session_free(s);
    }
    gemma2_matcher_free(r.matcher), gemma2_grammar_free(g), free(r.mask), free(logits);
}

/* ---- the command line ---- */

static size_t encode(const gemma2_model *m, const char *text, int64_t size, unsigned flags,
                     int32_t *ids)
{
    size_t bytes = gemma2_encode_scratch((size_t)size);
    void *scratch = malloc(bytes);
    int64_t n = gemma2_encode(m, text, size, flags, ids, MAX_IDS, scratch, bytes);
    free(scratch);
    return n > 0 && n <= MAX_IDS ? (size_t)n : (die("no text, or one too long"), 0);
}

static void count_guesses(const gemma2_model *m, const char *path)
{
    static char text[1 << 16];
    static int32_t ids[MAX_IDS];
    gemma2_ahead_params p;
    gemma2_ahead_params_init(&p);
    p.n_drafts = 4;
    FILE *f = fopen(path, "rb");
    size_t size = f ? fread(text, 1, sizeof text - 1, f) : 0;
    char *reply = strstr(text, "\n--\n");
    gemma2_session *s = gemma2_session_new(m, NULL, NULL, 0);
    gemma2_ahead *a = gemma2_ahead_new(m, &p, NULL, 0);
    if (!reply || !s || !a)
        die("--told takes a file of a prompt, a line -- and a reply");
    fclose(f);
    size_t n = encode(m, text, reply + 1 - text, GEMMA2_ENCODE_BOS, ids);
    int status = gemma2_prefill(s, ids, n, NULL);
    n = encode(m, reply + 4, (int64_t)size - (reply + 4 - text), 0, ids);
    for (size_t i = 0; i < n && !status; i++)
        status = gemma2_eval_ahead(s, a, ids[i], NULL);
    if (status)
        die("the text is longer than the context");
    printf("%zu|%llu|%llu|%llu\n", n, (unsigned long long)a->counts.passes,
           (unsigned long long)a->counts.drafted, (unsigned long long)a->counts.accepted);
    gemma2_ahead_free(a), gemma2_session_free(s);
}

static const struct option {
    const char *name;
    enum { TEXT, FLAG, NUMBER, LIST } kind;
    size_t at;
    int low, high;
} option_table[] = {
    {"--shape", TEXT, offsetof(struct options, shape), 0, 0},
    {"--draft", TEXT, offsetof(struct options, draft), 0, 0},
    {"--type", TEXT, offsetof(struct options, type), 0, 0},
    {"--head", TEXT, offsetof(struct options, head), 0, 0},
    {"--json", TEXT, offsetof(struct options, json), 0, 0},
    {"--kv", TEXT, offsetof(struct options, kv), 0, 0},
    {"--masks", TEXT, offsetof(struct options, masks), 0, 0},
    {"--told", TEXT, offsetof(struct options, told), 0, 0},
    {"--threads", LIST, offsetof(struct options, threads), 1, 1024},
    {"--prefill", LIST, offsetof(struct options, prefill), 1, MAX_IDS},
    {"--decode", LIST, offsetof(struct options, decode), 0, 1 << 30},
    {"--sessions", LIST, offsetof(struct options, sessions), 1, MAX_SESSIONS},
    {"--busy", LIST, offsetof(struct options, busy), 1, MAX_SESSIONS},
    {"--kept", NUMBER, offsetof(struct options, kept), 1, 256000},
    {"--batch", NUMBER, offsetof(struct options, batch), 1, 4096},
    {"--runs", NUMBER, offsetof(struct options, runs), 1, MAX_RUNS},
    {"--ahead", FLAG, offsetof(struct options, ahead), 0, 0},
    {"--states", FLAG, offsetof(struct options, states), 0, 0},
    {"--plan", FLAG, offsetof(struct options, plan), 0, 0},
    {"--quick", FLAG, offsetof(struct options, quick), 0, 0},
    {"--read", FLAG, offsetof(struct options, read), 0, 0},
    {"--no-limits", FLAG, offsetof(struct options, no_limits), 0, 0},
};

static void usage(const char *what, const char *which)
{
    fprintf(stderr, "bench: %s%s\n"
            "usage: bench MODEL | --shape 2b|9b|27b [--type TYPE] [--head TYPE] [--kept N]\n"
            "       [--threads N,N] [--prefill N,N|none] [--decode N,N|none] [--quick]\n"
            "       [--sessions N,N] [--busy N] [--batch N] [--kv auto|f32|f16|q8] [--runs N]\n"
            "       [--ahead] [--draft SHAPE] [--states] [--masks GRAMMAR] [--told FILE] [--plan]\n"
            "       [--read] [--no-limits] [--json FILE]\n", which, what);
    exit(2);
}

/* One number from *text, which moves past it. */
static int parse_number(const struct option *option, const char **text)
{
    char *end;
    errno = 0;
    long v = strtol(*text, &end, 10);
    if (end == *text || **text == ' ' || errno || v < option->low || v > option->high)
        usage(": not a number that it takes", option->name);
    *text = end;
    return (int)v;
}

static void set_option(struct options *o, const struct option *option, const char *text)
{
    void *at = (char *)o + option->at;
    if (option->kind == TEXT) {
        *(const char **)at = text;
        return;
    }
    struct list list = {0, {0}};
    int more = option->kind == NUMBER || strcmp(text, "none") != 0;
    while (more) {
        if (list.n == MAX_LIST)
            usage(" takes at most 16 numbers", option->name);
        list.v[list.n++] = parse_number(option, &text);
        more = *text == ',' && option->kind == LIST;
        if (*text && !more)
            usage(": not a number that it takes", option->name);
        text += more;
    }
    if (option->kind == NUMBER)
        *(int *)at = list.v[0];
    else
        *(struct list *)at = list;
}

static void parse(int argc, char **argv, struct options *o)
{
    for (int i = 1; i < argc; i++) {
        const struct option *option = option_table;
        const struct option *end = option + sizeof option_table / sizeof *option_table;
        while (option < end && strcmp(argv[i], option->name))
            option++;
        if (option == end && argv[i][0] == '-')
            usage(": no such option", argv[i]);
        else if (option == end && o->model)
            usage(": a second model", argv[i]);
        else if (option == end)
            o->model = argv[i];
        else if (option->kind == FLAG)
            *(int *)((char *)o + option->at) = 1;
        else if (i + 1 == argc)
            usage(" lacks its value", option->name);
        else
            set_option(o, option, argv[++i]);
    }
    if (!o->model == !o->shape)
        usage("one model or --shape is needed", "");
    if (cache_type(o->kv) < 0)
        usage(" is auto, f32, f16 or q8", "--kv");
    if (!o->threads.n)
        o->threads = (struct list){1, {0}};
    if (o->quick)
        o->prefill = (struct list){1, {512}}, o->decode = (struct list){2, {0, 4096}};
}

int main(int argc, char **argv)
{
    static struct options o = {.type = "q8", .kv = "auto", .runs = 5,
                               .prefill = {4, {32, 512, 2048, 8000}},
                               .decode = {3, {0, 4096, 8000}}};
    static struct report report;
    char err[256];
    parse(argc, argv, &o);
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.read_into_memory = (uint32_t)o.read;
    gemma2_model *m = o.shape ? make_shape(&o) : gemma2_open(o.model, &params, err, sizeof err);
    if (!m)
        die(err);
    if (o.masks)
        return run_masks(&o, m), 0;
    if (o.told)
        return count_guesses(m, o.told), 0;
    if (o.plan)
        return print_plan(&o, m), 0;
    report.o = &o, report.m = m;
    printf("%s, %s row\n%s, weights %.2f GB%s\n", cpu_name(), m->isa->name,
           o.shape ? o.shape : o.model, (double)weight_bytes(m) / 1e9,
           o.read ? ", huge pages" : "");
    for (int i = 0; i < o.threads.n; i++)
        run_threads(&report, o.threads.v[i]);
    print_scaling(&report);
    printf("batch %d, %s cache, peak resident memory %.2f GiB\n", report.batch,
           cache_names[report.cache], peak_resident());
    if (o.json)
        write_json(&report);
    gemma2_close(m);
    return 0;
}
