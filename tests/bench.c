/* How fast, and how close to what the machine can do: bench MODEL | --shape 2b|9b|27b
 *
 *   bench model.bin [--threads N] [--runs N] [--quick] [--read] [--json FILE]
 *   bench --shape 2b --type q8 [--head q6] ...     random weights, made in memory
 *
 * Per line: tokens a second as median over the runs (lowest .. highest), and for decoding
 * the bytes of weights and cache read a second, beside the plain read bandwidth of the same
 * bytes measured in the same process.  Depth is set by declaring positions of the cache
 * filled with noise: speed does not depend on the values. */
#include "../gemma2.c"

#include <sys/resource.h>
#include <time.h>

struct options {
    const char *model, *shape, *type, *head, *json;
    int threads, runs, quick, read;
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

/* The shape's header; the vocabulary is Gemma's. */
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

/* A tokenizer whose pieces are the bytes and, for the rest, UNUSED. */
static void put_tokenizer(uint8_t *p)
{
    uint32_t v = 256000;
    put_u32(p, v);
    memset(p + 4, 0xff, 24);
    put_u32(p + 8, 1), put_u32(p + 4, 0), put_u32(p + 28, 256 * 6);
    uint8_t *ends = p + 64 + 4 * (size_t)v, *kinds = ends + 4 * (size_t)v, *blob = kinds + v;
    for (uint32_t i = 0; i < v; i++) {
        put_u32(ends + 4 * (size_t)i, 6 * (i < 256 ? i + 1 : 256));
        kinds[i] = i < 256 ? GEMMA2_PIECE_BYTE : GEMMA2_PIECE_UNUSED;
    }
    for (int i = 0; i < 256; i++) {
        char text[8];
        snprintf(text, sizeof text, "<0x%02X>", i);
        memcpy(blob + 6 * i, text, 6);
    }
}

/* Lays out the sections at base, or only counts when base is NULL; returns the size. */
static uint64_t build_image(uint8_t *base, size_t shape, uint32_t type, uint32_t head)
{
    gemma2_config c = {.n_vocab = 256000, .d_model = (int32_t)shapes[shape].d,
                       .n_heads = (int32_t)shapes[shape].n, .d_ffn = (int32_t)shapes[shape].f,
                       .n_kv_heads = (int32_t)shapes[shape].k,
                       .head_dim = (int32_t)shapes[shape].h};
    uint32_t n_sections = 3 + shapes[shape].l * 11, at = 0;
    uint64_t end = HEADER_BYTES + (uint64_t)n_sections * ENTRY_BYTES;
    for (uint32_t l = 0; l <= shapes[shape].l; l++)
        for (int i = 0; i < N_ROLES; i++) {
            const struct role *r = &roles[i];
            int in_layer = r->id >= ROLE_LAYER_FIRST;
            if (r->id == ROLE_FACTS || r->id == ROLE_HEAD ||
                in_layer != (l < shapes[shape].l))
                continue;
            uint32_t t = r->id == ROLE_TOKENIZER ? TYPE_BYTES : r->cols == '1' ? TYPE_F32
                         : in_layer ? type : head;
            uint64_t rows = dimension(&c, r->rows), cols = dimension(&c, r->cols);
            uint64_t tile = tile_bytes(t == TYPE_BYTES ? TYPE_F32 : t, cols);
            uint64_t bytes = t ? (rows + 15) / 16 * tile : 64 + 9 * 256000 + 256 * 6;
            end = (end + 4095) / 4096 * 4096;
            if (base) {
                put_entry(base + HEADER_BYTES + (size_t)at * ENTRY_BYTES, r->id, in_layer ? l : 0,
                          t, t ? rows : 0, t ? cols : 0, end, bytes);
                if (t)
                    fill_tensor(base + end, t, bytes, tile);
                else
                    put_tokenizer(base + end);
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
    uint32_t type = type_named(o->type), head = type_named(o->head ? o->head : o->type);
    uint64_t size = build_image(NULL, i, type, head);
    if (size + (2u << 30) > free_memory()) {
        fprintf(stderr, "bench: %s in %s needs %.1f GB and 2 more for the session; %.1f are free\n",
                o->shape, o->type, (double)size / 1e9, (double)free_memory() / 1e9);
        exit(1);
    }
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("cannot map the weights");
#ifdef MADV_HUGEPAGE
    madvise(p, size, o->read ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    build_image(p, i, type, head);
    char err[256];
    gemma2_model *m = gemma2_open_memory(p, size, err, sizeof err);
    if (!m)
        die(err);
    return m;
}

/* ---- measuring ---- */

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

/* Plain streaming reads of the weights by all threads: what decoding could at best do. */
struct read_job {
    const uint8_t *p;
    size_t chunk, size;
    uint64_t sums[1024];
};

static void read_task(void *context, size_t i)
{
    struct read_job *job = context;
    size_t from = i * job->chunk, to = from + job->chunk < job->size ? from + job->chunk : job->size;
    uint64_t s[8] = {0};
    for (size_t at = from; at + 64 <= to; at += 64) {
        uint64_t v[8];
        memcpy(v, job->p + at, 64);
        __builtin_prefetch(job->p + at + 2048);
        for (int k = 0; k < 8; k++)
            s[k] += v[k];
    }
    job->sums[i % 1024] += s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}

static double read_bandwidth(const gemma2_model *m, int threads, int runs)
{
    static struct read_job job;
    double best[64];
    job.p = m->file.data, job.size = m->file.size, job.chunk = 1 << 20;
    for (int i = 0; i < runs && i < 64; i++) {
        double start = now();
        share(threads, (job.size + job.chunk - 1) / job.chunk, job.size, read_task, &job);
        best[i] = (double)job.size / (now() - start) / 1e9;
    }
    return summarise(best, runs).median;
}

/* Noise in the cache, and a position as if depth tokens had been evaluated. */
static void set_depth(gemma2_session *s, int depth)
{
    const gemma2_config *c = &s->model->config;
    for (int l = 0; l < c->n_layers && depth; l++)
        for (int values = 0; values < 2; values++) {
            uint8_t *p = values ? s->cache[l].values : s->cache[l].keys;
            size_t bytes = head_bytes(s, &s->cache[l], values) * (size_t)c->n_kv_heads;
            for (size_t i = 0; i < bytes; i += 2)
                p[i] = (uint8_t)(i * 7), p[i + 1] = (uint8_t)((i * 31 & 0x83) | 0x30);
        }
    s->position = s->high = depth;
}

static size_t weight_bytes(const gemma2_model *m)
{
    size_t n = 0;
    for (uint32_t i = 0; i < m->n_sections; i++) {
        struct entry e = get_entry(m->directory, i);
        if (e.type != TYPE_BYTES)
            n += (size_t)e.bytes;
    }
    return n;
}

static size_t cache_bytes_read(const gemma2_session *s, int depth)
{
    const gemma2_config *c = &s->model->config;
    size_t n = 0;
    for (int l = 0; l < c->n_layers; l++) {
        int seen = c->is_local[l] && depth > s->window ? s->window : depth;
        n += 2 * (size_t)seen * (size_t)c->n_kv_heads * (size_t)c->head_dim * (s->half ? 2 : 4);
    }
    return n;
}

static double time_tokens(gemma2_session *s, int depth, int n, int decode, float *logits)
{
    static int32_t ids[8192];
    for (int i = 0; i < n; i++)
        ids[i] = (int32_t)((uint32_t)i * 7919u % (uint32_t)s->model->config.n_vocab);
    s->position = s->high = depth;
    double start = now();
    if (!decode)
        gemma2_prefill(s, ids, (size_t)n, logits);
    for (int i = 0; decode && i < n; i++)
        gemma2_eval(s, ids + i, 1, logits);
    return n / (now() - start);
}

struct work {
    const char *name;
    int depth, n, decode, quick;
};

static const struct work works[] = {
    {"prefill 32", 0, 32, 0, 0},        {"prefill 512", 0, 512, 0, 1},
    {"prefill 2048", 0, 2048, 0, 0},    {"prefill 8000", 0, 8000, 0, 0},
    {"decode at 0", 0, 16, 1, 1},       {"decode at 4096", 4096, 16, 1, 1},
    {"decode at 8000", 8000, 16, 1, 0},
};

static void run_work(gemma2_session *s, const struct work *w, const struct options *o,
                     double bandwidth, FILE *json, int first)
{
    float *logits = malloc(sizeof *logits * (size_t)s->model->config.n_vocab);
    double speed[64];
    int runs = w->n > 2000 ? 1 + o->runs / 3 : o->runs;
    if (!logits)
        die("out of memory");
    if (w->decode)
        set_depth(s, w->depth);
    time_tokens(s, w->depth, w->decode ? 2 : 32, w->decode, logits);
    for (int i = 0; i < runs; i++)
        speed[i] = time_tokens(s, w->depth, w->n, w->decode, logits);
    struct sample t = summarise(speed, runs);
    printf("%-15s %8.2f tok/s  (%.2f .. %.2f)", w->name, t.median, t.low, t.high);
    double gbs = t.median * (double)(weight_bytes(s->model) + cache_bytes_read(s, w->depth)) / 1e9;
    if (w->decode)
        printf("  %6.1f GB/s  %3.0f %% of read bandwidth", gbs, 100 * gbs / bandwidth);
    printf("\n");
    if (json)
        fprintf(json, "%s{\"work\":\"%s\",\"median\":%.3f,\"low\":%.3f,\"high\":%.3f}",
                first ? "" : ",", w->name, t.median, t.low, t.high);
    free(logits);
}

static void parse(int argc, char **argv, struct options *o)
{
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        int takes = !strcmp(a, "--shape") || !strcmp(a, "--type") || !strcmp(a, "--head") ||
                    !strcmp(a, "--json") || !strcmp(a, "--threads") || !strcmp(a, "--runs");
        if (takes && !v)
            die("an option lacks its value");
        if (!strcmp(a, "--shape")) o->shape = v;
        else if (!strcmp(a, "--type")) o->type = v;
        else if (!strcmp(a, "--head")) o->head = v;
        else if (!strcmp(a, "--json")) o->json = v;
        else if (!strcmp(a, "--threads")) o->threads = atoi(v);
        else if (!strcmp(a, "--runs")) o->runs = atoi(v);
        else if (!strcmp(a, "--quick")) o->quick = 1;
        else if (!strcmp(a, "--read")) o->read = 1;
        else o->model = a;
        i += takes;
    }
    if (o->runs < 1 || o->runs > 64 || (!o->model && !o->shape))
        die("usage: bench MODEL | --shape 2b|9b|27b [--type T] [--head T] [--threads N] "
            "[--runs 1..64] [--quick] [--read] [--json FILE]");
}

int main(int argc, char **argv)
{
    struct options o = {.type = "q8", .runs = 5};
    char err[256];
    parse(argc, argv, &o);
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.read_into_memory = (uint32_t)o.read;
    gemma2_model *m = o.shape ? make_shape(&o) : gemma2_open(o.model, &params, err, sizeof err);
    if (!m)
        die(err);
    gemma2_session_params sp;
    gemma2_session_params_init(&sp);
    sp.n_threads = o.threads;
    gemma2_session *s = gemma2_session_new(m, &sp, err, sizeof err);
    if (!s)
        die(err);
    double bandwidth = read_bandwidth(m, s->n_threads, 4);
    FILE *json = o.json ? fopen(o.json, "w") : NULL;
    printf("%s, %s row, %d threads, weights %.2f GB, read bandwidth %.1f GB/s%s\n",
           o.shape ? o.shape : o.model, m->isa->name, s->n_threads, (double)weight_bytes(m) / 1e9,
           bandwidth, o.read ? " (huge pages)" : "");
    if (json)
        fprintf(json, "{\"row\":\"%s\",\"threads\":%d,\"weight_bytes\":%zu,\"read_gbs\":%.2f,"
                      "\"results\":[", m->isa->name, s->n_threads, weight_bytes(m), bandwidth);
    for (size_t i = 0, done = 0; i < sizeof works / sizeof *works; i++)
        if ((!o.quick || works[i].quick) && works[i].depth + works[i].n <= s->n_context)
            run_work(s, &works[i], &o, bandwidth, json, !done++);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("peak resident  %8.2f GiB\n", (double)usage.ru_maxrss / (1 << 20));
    if (json)
        fprintf(json, "],\"peak_rss_kib\":%ld}\n", usage.ru_maxrss), fclose(json);
    gemma2_session_free(s);
    gemma2_close(m);
    return 0;
}
