/* Hostile input: 50 classes of wrong and of unusual input that have broken other engines, each
 * with the right outcome - an error where the input is wrong, the correct result where it is
 * merely unusual.  CLASSES, at the end, says for every class where it is tested; those without
 * a place elsewhere are tested here, in the order of their numbers.
 *
 * It takes a few seconds, some 700 MB of address space and no large files on disk (two are
 * sparse). */
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>

/* A vocabulary of the test's own: opened, and its memory. */
static gemma2_model *open_pieces(const struct pieces *p, struct image *image)
{
    *image = build_tokenizer_file(p);
    return open_image(image);
}

/* ---- The weight file -------------------------------------------------------------------- */

/* 5: every integer and real of the header in the other byte order. */
static void test_byte_swapped(void)
{
    struct image m = build(&tiny_shape);
    for (int whole = 0; whole < 2; whole++) { /* the magic as well, or not */
        for (size_t at = whole ? 0 : 8; at < 480; at += 4) {
            uint32_t x = get_u32(m.data + at);
            put_u32(m.data + at, x >> 24 | (x >> 8 & 0xff00) | (x << 8 & 0xff0000) | x << 24);
        }
        seal(&m);
        check(!opens(&m), "a byte-swapped header");
    }
    free(m.data);
}

/* 7: sections that leave a hole, and a file with another one behind it. */
static void test_holes(void)
{
    struct image m = build(&tiny_shape), longer = {NULL, m.size + 64};
    int last = (int)get_u32(m.data + 48) - 1;
    longer.data = fresh(longer.size);
    memset(longer.data, 0, longer.size);
    memcpy(longer.data, m.data, m.size);
    memcpy(longer.data + m.size, "PK\3\4", 4);
    check(!opens(&longer), "an archive behind the model");
    put_u64(longer.data + 32, longer.size);
    seal(&longer);
    check(!opens(&longer), "an archive behind the model, in the header's size");
    put_u64(entry_of(&longer, last) + 32, get_u64(entry_of(&longer, last) + 32) + 64);
    seal(&longer);
    check(!opens(&longer), "a hole of one alignment before the last section");
    free(m.data), free(longer.data);
}

static int open_as_nobody(const char *path)
{
    pid_t child = fork();
    if (child == 0) {
        char err[256] = "";
        if (setuid(65534))
            _exit(2);
        gemma2_model *m = gemma2_open(path, NULL, err, sizeof err);
        _exit(m || !strstr(err, "Permission denied"));
    }
    int status = -1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* 8: paths that lead nowhere or are not for us (a directory, a pipe and a device are in
 * test_foreign), and names that are merely unusual. */
static void test_paths(void)
{
    struct image m = build(&tiny_shape);
    char loop[128], target[160];
    snprintf(loop, sizeof loop, "%s", in_dir("loop"));
    check(symlink(loop, loop) == 0, "symlink");
    refused(loop, "cannot open");
    unlink(loop);
    snprintf(target, sizeof target, "%s/x", write_file("model", m.data, m.size));
    refused(target, "Not a directory");
    chmod(in_dir("model"), 0);
    chmod(scratch_dir, 0755);
    if (geteuid() == 0)
        check(open_as_nobody(in_dir("model")) == 0, "an unreadable file, as nobody");
    else
        refused(in_dir("model"), "Permission denied");
    unlink(in_dir("model"));
    static const char *const names[] = {("m\xc3\xb6" "del \xe6\xa8\xa1"), "\xff\xfe",
                                        "a\nb", "%s%n", "-"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        gemma2_model *x = gemma2_open(write_file(names[i], m.data, m.size), NULL, NULL, 0);
        check(x != NULL, "a model named %s", names[i]);
        gemma2_close(x);
        unlink(in_dir(names[i]));
    }
    free(m.data);
}

/* 8: files of 5 GB, sparse: zeros, which are no model; and a tokenizer behind a section that
 * is skipped, whose offset does not fit 32 bits. */
static void test_large_files(void)
{
    static struct pieces p;
    const uint64_t large = (uint64_t)5 << 30;
    plain_pieces(&p, 30);
    struct image m = build_tokenizer_file(&p);
    uint64_t from = get_u64(entry_of(&m, 1) + 32), to = from + large, n = m.size - from;
    put_u32(entry_of(&m, 0), 300), put_u32(entry_of(&m, 0) + 12, 1);
    put_u64(entry_of(&m, 0) + 40, to - get_u64(entry_of(&m, 0) + 32));
    put_u64(entry_of(&m, 1) + 32, to);
    put_u64(m.data + 32, to + n);
    seal(&m);
    FILE *f = fopen(in_dir("large"), "wb");
    if (!check(f && !ftruncate(fileno(f), (off_t)(to + n)), "no sparse file of 5 GB"))
        return;
    fclose(f);
    refused(in_dir("large"), "not a gemma2.c model");
    f = fopen(in_dir("large"), "r+b");
    fwrite(m.data, 1, from, f);
    fseeko(f, (off_t)to, SEEK_SET);
    fwrite(m.data + from, 1, n, f);
    fclose(f);
    char err[256] = "";
    int32_t ids[4];
    gemma2_model *x = gemma2_open(in_dir("large"), NULL, err, sizeof err);
    if (check(x != NULL, "a tokenizer at 5 GB: %s", err))
        check(encode(x, "ab", 2, 0, ids, 4) == 2 && ids[0] == 6 && ids[1] == 7 &&
                  gemma2_check(x, 1, NULL, 0) == 1, "a tokenizer at 5 GB reads otherwise");
    gemma2_close(x);
    unlink(in_dir("large"));
    free(m.data);
}

/* 9: read_into_memory is proof against a file that is cut short later. */
static void test_shrinks_in_memory(void)
{
    struct image m = build(&tiny_shape);
    gemma2_open_params params;
    gemma2_open_params_init(&params);
    params.read_into_memory = 1;
    const char *path = write_file("model", m.data, m.size);
    gemma2_model *x = gemma2_open(path, &params, NULL, 0);
    check(x && truncate(path, 0) == 0, "open and truncate");
    for (uint32_t i = 0; x && i < x->n_sections; i++)
        check(gemma2_check(x, i, NULL, 0) == 1, "section %u after the file is gone", i);
    gemma2_close(x);
    unlink(path);
    free(m.data);
}

/* 12, 13, 14, 21, 26: 64-bit values near every edge, alone in each field of each entry, and in
 * two entries whose sizes together wrap. */
static void test_wrapping_sizes(void)
{
    struct image m = build(&tiny_shape);
    const uint64_t values[] = {UINT64_MAX, UINT64_MAX - 63, UINT64_MAX - 4095, (uint64_t)1 << 63,
                               INT64_MAX, INT64_MAX - 62, (uint64_t)1 << 58, (uint64_t)1 << 32,
                               m.size, m.size + 1, m.size - 1, 0};
    int opened = 0, n = (int)get_u32(m.data + 48);
    for (int i = 0; i < n; i++)
        for (size_t at = 16; at < 48; at += 8)
            for (size_t k = 0; k < sizeof values / sizeof *values; k++) {
                uint8_t *p = entry_of(&m, i) + at;
                uint64_t was = get_u64(p);
                put_u64(p, values[k]);
                seal(&m);
                opened += was != values[k] && opens(&m);
                put_u64(p, was);
            }
    check_none(opened, "files with a size or offset out of its place that open");
    uint8_t *a = entry_of(&m, 0) + 40, *b = entry_of(&m, 1) + 40;
    uint64_t shift = (uint64_t)1 << 63;
    put_u64(a, get_u64(a) + shift), put_u64(b, get_u64(b) + shift);
    put_u64(entry_of(&m, 1) + 32, get_u64(entry_of(&m, 1) + 32) + shift);
    seal(&m);
    check(!opens(&m), "two sizes whose sum wraps");
    free(m.data);
}

/* 14: a section that is skipped, of nearly 2^64 bytes: it ends, wrapping, just before its own
 * start, and all that follows is laid out as if it were empty. */
static void test_wraps_around(void)
{
    struct image m = build(&tiny_shape);
    int n = (int)get_u32(m.data + 48);
    uint64_t from = get_u64(entry_of(&m, 0) + 32), to = get_u64(entry_of(&m, 1) + 32);
    memmove(m.data + from, m.data + to, m.size - to);
    m.size -= to - from;
    put_u64(m.data + 32, m.size);
    for (int i = 1; i < n; i++)
        put_u64(entry_of(&m, i) + 32, get_u64(entry_of(&m, i) + 32) - (to - from));
    put_u32(entry_of(&m, 0), 300), put_u32(entry_of(&m, 0) + 12, 1);
    for (uint64_t bytes = 0, i = 0; i < 3; i++, bytes -= 8) {
        put_u64(entry_of(&m, 0) + 40, bytes);
        seal(&m);
        check(opens(&m) == (bytes == 0), "a skipped section of %llu bytes",
              (unsigned long long)bytes);
    }
    free(m.data);
}

/* 12, 15: the largest legal dimensions, for which there are no bytes; and plans too large for
 * any memory, which say so without wrapping. */
static void test_largest_dimensions(void)
{
    static const uint32_t largest[][2] = {{64, 1024}, {68, 1 << 20}, {72, 4096}, {76, 4096},
                                          {80, 1024}, {84, 1 << 22}, {92, 1 << 30}, {96, 1 << 30}};
    struct model x = make(&tiny_shape);
    struct image m = build(&tiny_shape);
    for (size_t i = 0; i < sizeof largest / sizeof *largest; i++)
        put_u32(m.data + largest[i][0], largest[i][1]);
    seal(&m);
    check(!opens(&m), "the largest dimensions without their bytes");
    gemma2_session_params params;
    gemma2_session_params_init(&params);
    gemma2_plan plan = {0};
    params.n_context = 1 << 30, params.n_batch = 4096, params.n_threads = 1;
    params.cache_type = GEMMA2_CACHE_F32;
    check(gemma2_session_plan(x.m, &params, &plan) == GEMMA2_OK &&
              plan.total >= plan.cache + ((uint64_t)4 << 30) && plan.total < (uint64_t)1 << 40,
          "the plan of the longest context");
    gemma2_config *c = &x.m->config; /* as if a file had them */
    c->n_layers = 0, c->n_heads = 4096, c->head_dim = 1024, c->d_model = 1 << 20;
    c->d_ffn = 1 << 22, c->n_kv_heads = 4096;
    gemma2_session s;
    gemma2_worker work;
    check(read_session_params(&s, &work, x.m, &params) < 0, "no layers, no session");
    c->n_layers = 1024;
    check(saved_bytes(&s, 1 << 30, 0) > (uint64_t)1 << 62, "a saved session of 2^65 bytes");
    for (int l = 0; l < 1024; l++)
        c->is_local[l] = 0;
    check(gemma2_session_plan(x.m, &params, &plan) == GEMMA2_ERR_ARGUMENT,
          "a plan of 2^65 bytes: %llu", (unsigned long long)plan.total);
    char err[256] = "";
    check(!gemma2_session_new(x.m, &params, err, sizeof err) && strstr(err, "too large"),
          "a session of 2^65 bytes: %s", err);
    c->n_vocab = INT32_MAX;
    gemma2_worker_params most = {.struct_size = sizeof most, .n_batch = 4096, .n_threads = 1,
                                 .n_context = 1 << 30};
    check(gemma2_worker_plan(x.m, &most, &plan) < 0 || plan.total > (uint64_t)1 << 40,
          "a worker for the largest dimensions");
    err[0] = 0;
    check(!gemma2_worker_new(x.m, &most, err, sizeof err) && err[0], "and none: %s", err);
    free(m.data);
    unmake(&x);
}

/* Logits after each of the ids, fed in chunks of `chunk`: [n][V]. */
static float *logits_of(const gemma2_model *m, struct setup o, const int32_t *ids, size_t n,
                        size_t chunk)
{
    float *logits = fresh(n * vocab(m) * sizeof *logits);
    gemma2_session *s = start(m, o);
    memset(logits, 0, n * vocab(m) * sizeof *logits);
    for (size_t at = 0; at < n; at += chunk) {
        size_t k = n - at < chunk ? n - at : chunk;
        check(gemma2_eval(s, ids + at, k, logits + (at + k - 1) * vocab(m)) == GEMMA2_OK, "eval");
    }
    gemma2_session_free(s);
    return logits;
}

static int same_logits(const gemma2_model *m, const float *a, const float *b, size_t i)
{
    return !memcmp(a + i * vocab(m), b + i * vocab(m), vocab(m) * sizeof *a);
}

/* 19: a window longer than the context is no window; a window of 1 sees its own token; a
 * context of 1 holds one. */
static void test_windows(void)
{
    struct shape wide = shapes[0], none = shapes[0];
    wide.window = 1 << 30, wide.local = 7, none.local = 0;
    uint64_t state = rnd_state;
    struct model x = make(&wide);
    rnd_state = state; /* the same weights */
    struct model y = make(&none);
    int32_t ids[30];
    random_ids(x.m, ids, 30);
    struct setup o = {30, 7, 1, 0, 0};
    float *a = logits_of(x.m, o, ids, 30, 1), *b = logits_of(y.m, o, ids, 30, 1);
    int bad = 0;
    for (size_t i = 0; i < 30; i++)
        bad += !same_logits(x.m, a, b, i);
    check_none(bad, "a window of 2^30 is not the whole context");
    free(a), free(b);
    for (int32_t window = 1; window <= 3; window += 2) {
        o.window = window;
        a = logits_of(x.m, o, ids, 30, 1), b = logits_of(x.m, o, ids, 30, 6);
        check(same_logits(x.m, a, b, 29), "window %d, in chunks", window);
        free(a), free(b);
    }
    struct setup one = {1, 0, 1, 0, 0};
    gemma2_session *s = start(x.m, one);
    float logprob;
    check(gemma2_eval(s, ids, 2, NULL) == GEMMA2_ERR_CONTEXT, "two tokens, a context of 1");
    check(gemma2_score(s, ids, 1, 3, &logprob) == GEMMA2_OK && logprob <= 0, "one token");
    check(gemma2_eval(s, ids, 1, NULL) == GEMMA2_ERR_CONTEXT && gemma2_position(s) == 1, "full");
    gemma2_session_free(s);
    unmake(&x), unmake(&y);
}

/* 24: keys of facts that are empty, long, hold NUL, or come twice. */
static void test_fact_keys(void)
{
    struct model x = make(&tiny_shape);
    static const char facts[] = "\4\0\0\0" "\0\0\0\0" "\1\0\0\0" "A"
                                "\3\0\0\0" "\0\0\0\0" "n\0m" "\1\0\0\0" "\1\0\0\0" "kv"
                                "\1\0\0\0" "\1\0\0\0" "kw";
    size_t size = 9;
    x.m->facts = (struct bytes){(const uint8_t *)facts, sizeof facts - 1};
    struct errbuf none = {.text = NULL};
    check(check_facts(x.m, &none), "unusual keys");
    const char *value = gemma2_fact(x.m, "", &size);
    check(value && size == 1 && *value == 'A', "the empty key");
    check(!gemma2_fact(x.m, NULL, &size) && !gemma2_fact(x.m, "k", NULL), "no key, no size");
    check(!gemma2_fact(x.m, "n", &size) && size == 0, "a key that holds NUL is not its start");
    value = gemma2_fact(x.m, "k", &size);
    check(value && size == 1 && *value == 'v', "of two equal keys the first");
    char *key = fresh(100001);
    memset(key, 'k', 100000), key[100000] = 0;
    check(!gemma2_fact(x.m, key, &size), "a key of 100,000 bytes");
    free(key);
    unmake(&x);
}

/* All values of a tensor become x: floats, or the scales S of a quantised one. */
static void fill_values(const struct image *m, int section, float x)
{
    uint8_t *e = entry_of(m, section), *p = section_of(m, section);
    uint32_t type = get_u32(e + 8);
    uint64_t tile = tensor_bytes(type, 1, get_u64(e + 24)), bytes = get_u64(e + 40);
    for (uint64_t at = 0; at < bytes; at += type >= Q8 ? tile : 4)
        for (int lane = 0; lane < (type >= Q8 ? 16 : 1); lane++)
            if (type == BF16)
                put_u32(p + at, bits_of(x) >> 16 | (bits_of(x) & 0xffff0000));
            else
                put_u32(p + at + 4 * (uint64_t)lane, bits_of(x));
    seal_section(m, section);
}

/* Prefill, decode, score, sample: an id of the vocabulary, or the code for bad logits. */
static int runs_soundly(const gemma2_model *m)
{
    int32_t ids[6];
    float *logits = fresh(vocab(m) * sizeof *logits), logprobs[6];
    gemma2_session *s = start(m, (struct setup){12, 4, 1, 0, 0});
    gemma2_sampler sampler;
    gemma2_sampler_init(&sampler, 1);
    random_ids(m, ids, 6);
    int sound = gemma2_prefill(s, ids, 5, logits) == GEMMA2_OK &&
                gemma2_eval(s, ids, 1, logits) == GEMMA2_OK;
    int32_t id = gemma2_sample(s, &sampler, logits);
    int finite = all_finite(logits, vocab(m));
    sound &= finite ? id >= 0 && (size_t)id < vocab(m) : id == GEMMA2_ERR_NONFINITE;
    int status = gemma2_score(s, ids, 6, -1, logprobs);
    sound &= status == GEMMA2_OK ? all_finite(logprobs, 5) : status == GEMMA2_ERR_NONFINITE;
    sound &= gemma2_position(s) == 12;
    status = gemma2_logprob(logits, vocab(m), 0, logprobs);
    sound &= status == (finite ? GEMMA2_OK : GEMMA2_ERR_NONFINITE);
    gemma2_session_free(s);
    free(logits);
    return sound;
}

/* 25: every tensor in turn, and all of them, zero, denormal, huge, infinite, NaN. */
static void test_values(void)
{
    static const float values[] = {0, -0.0f, 1e-45f, -1e-40f, 1e30f, 3.4e38f, INFINITY, NAN};
    for (int i = 0; i < N_SHAPES; i++)
        for (size_t k = 0; k < sizeof values / sizeof *values; k++) {
            struct image m = build(&shapes[i]);
            int n = (int)get_u32(m.data + 48), bad = 0;
            for (int section = 2; section <= n; section++) {
                if (section < n && section > 13 && section < n - 3)
                    continue; /* one layer is like another */
                struct image copy = {fresh(m.size), m.size};
                memcpy(copy.data, m.data, m.size);
                for (int j = 2; j < n; j++)
                    if (j == section || section == n)
                        fill_values(&copy, j, values[k]);
                gemma2_model *model = open_image(&copy);
                bad += !runs_soundly(model);
                gemma2_close(model);
                free(copy.data);
            }
            check(!bad, "%s: %d tensors of %g give an id, or no code", shapes[i].name, bad,
                  values[k]);
            free(m.data);
        }
}

/* 25: a token whose values are not finite spoils what comes after it and nothing before it, on
 * every row of kernels and however tokens are cut into passes. */
static void test_spoiled_token(void)
{
    static const float values[] = {INFINITY, -INFINITY, NAN};
    enum { N = 40, SPOILED = 21 };
    struct shape shape = shapes[1], even = {"even", 2, 24, 2, 1, 32, 40, 83, 8, 64, 50, 30, 1, 1,
                                            {F32, BF16, BF16, F32, BF16}, 64};
    for (int i = 0; i < 2 * 3 * 3; i++) { /* the matrix class takes the second one's heads */
        struct model x = make(i % 2 ? &even : &shape);
        struct setup one = {N, 1, 1, 0, 1 + i / 2 % 3}, many = {N, 16, 1, 0, 1 + i / 2 % 3};
        int32_t ids[N];
        int bad = 0;
        for (int k = 0; k < N; k++)
            ids[k] = k < SPOILED ? 7 + k % 5 : k == SPOILED ? 5 : 8;
        x.m->embedding.type = TYPE_F32; /* of which one number is not finite */
        x.m->embedding.data = fresh((vocab(x.m) + 15) / 16 * x.m->embedding.cols * 64);
        x.m->embedding.tile_bytes = x.m->embedding.cols * 64;
        fill_tensor((uint8_t *)x.m->embedding.data, F32, (uint32_t)vocab(x.m),
                    x.m->embedding.cols);
        put_u32((uint8_t *)x.m->embedding.data + 5 * 4, bits_of(values[i / 6]));
        for (int row = 0; row < N_KERNELS; row++) {
            if (!all_kernels[row]->available())
                continue;
            x.m->isa = all_kernels[row], x.m->matrix = all_kernels[row]->matrix;
            float a[N], b[N], logits[2][128];
            gemma2_session *s = start(x.m, one), *t = start(x.m, many);
            bad += gemma2_score(s, ids, N, 1, a) != GEMMA2_ERR_NONFINITE ||
                   gemma2_score(t, ids, N, 1, b) != GEMMA2_ERR_NONFINITE ||
                   !all_finite(a, SPOILED) || memcmp(a, b, SPOILED * sizeof *a);
            for (int k = 0; k < 2; k++) { /* read with what follows, or without */
                gemma2_rewind(t, 0);
                bad += gemma2_prefill(t, ids, SPOILED + (k ? 0 : 5), NULL) != GEMMA2_OK ||
                       gemma2_rewind(t, SPOILED) != GEMMA2_OK ||
                       gemma2_eval(t, ids, 1, logits[k]) != GEMMA2_OK;
            }
            bad += !all_finite(logits[0], vocab(x.m)) ||
                   memcmp(logits[0], logits[1], vocab(x.m) * sizeof **logits);
            gemma2_session_free(s), gemma2_session_free(t);
        }
        check(!bad, "%s, cache %d, %g: %d of what comes before is spoiled", i % 2 ? "even" : "odd",
              one.cache, values[i / 6], bad);
        free((void *)x.m->embedding.data);
        unmake(&x);
    }
}

/* ---- Tokenizer and text ------------------------------------------------------------------ */

static void remove_stops(const struct image *m)
{
    memset(m->data + 256, 0, 12);
    seal(m);
}

/* 30: vocabularies of one piece and of two. */
static void test_small_vocabularies(void)
{
    static struct pieces p;
    struct shape one = tiny_shape;
    struct image image;
    int32_t ids[4] = {9, 9, 9, 9};
    for (int with_a = 0; with_a < 2; with_a++) {
        memset(&p, 0, sizeof p);
        for (int i = 0; i < 6; i++)
            p.special[i] = i == 3 ? 0 : -1;
        add_piece(&p, "?", GEMMA2_PIECE_UNKNOWN, 0);
        if (with_a)
            add_piece(&p, "a", GEMMA2_PIECE_NORMAL, 0);
        image = build_tokenizer_file(&p);
        remove_stops(&image);
        gemma2_model *m = open_image(&image);
        check(encode(m, "xay", 3, 0, ids, 4) == (with_a ? 3 : 1) && ids[0] == 0, "a run of unk");
        check(encode(m, "", 0, 0, NULL, 0) == 0, "no text");
        check(encode(m, "x", 1, GEMMA2_ENCODE_BOS, ids, 4) == GEMMA2_ERR_ARGUMENT, "no BOS");
        gemma2_close(m), free(image.data);
    }
    p.n = 1, p.blob_bytes = 1, one.v = 1;
    image = build_with(&one, &p);
    remove_stops(&image);
    gemma2_model *m = open_image(&image);
    gemma2_session *s = start(m, (struct setup){4, 2, 1, 0, 0});
    gemma2_sampler sampler;
    float logit, logprobs[2];
    gemma2_sampler_init(&sampler, 1);
    ids[0] = ids[1] = 0;
    check(gemma2_eval(s, ids, 2, &logit) == GEMMA2_OK && gemma2_sample(s, &sampler, &logit) == 0,
          "a vocabulary of one token");
    check(gemma2_score(s, ids, 2, 0, logprobs) == GEMMA2_OK && logprobs[0] == 0 &&
              logprobs[1] == 0, "one token is certain");
    gemma2_session_free(s), gemma2_close(m), free(image.data);
}

/* 32, 34: no U+2581, some bytes missing; NUL inside a piece; a thousand equal pieces. */
static void test_unusual_pieces(void)
{
    static struct pieces p;
    struct image image;
    int32_t ids[8], want[] = {4, 3, 4, 5, 3};
    size_t size;
    start_pieces(&p);
    add_piece(&p, "a", GEMMA2_PIECE_NORMAL, 0);
    add_piece(&p, "<0x0A>", GEMMA2_PIECE_BYTE, 0);
    gemma2_model *m = open_pieces(&p, &image);
    check(encode(m, "a a\n\xc3\xa9", 6, 0, ids, 8) == 5 && !memcmp(ids, want, sizeof want),
          "spaces and bytes without pieces are unk");
    gemma2_close(m), free(image.data);

    start_pieces(&p);
    add_piece(&p, "a", GEMMA2_PIECE_NORMAL, 0);
    p.blob[p.blob_bytes++] = 0; /* "a\0" */
    p.ends[p.n - 1] = p.blob_bytes;
    for (int i = 0; i < 500; i++) {
        add_piece(&p, "b", GEMMA2_PIECE_NORMAL, 0);
        add_piece(&p, "cc", GEMMA2_PIECE_USER, 0);
    }
    m = open_pieces(&p, &image);
    check(encode(m, "bcc", 3, 0, ids, 8) == 2 && ids[0] == 5 && ids[1] == 6, "the lowest id");
    const char *piece = gemma2_piece(m, 4, &size, NULL);
    check(piece && size == 2 && !memcmp(piece, "a\0", 2), "NUL inside a piece");
    check(encode(m, "a", 1, 0, ids, 8) == 1 && ids[0] == 3, "a NUL is not the end of a piece");
    gemma2_close(m), free(image.data);

    start_pieces(&p);
    add_piece(&p, "a", GEMMA2_PIECE_NORMAL, 0);
    add_piece(&p, "b", GEMMA2_PIECE_NORMAL, 0);
    add_piece(&p, "\xe2\x96\x81", GEMMA2_PIECE_NORMAL, 0);
    add_piece(&p, "a\xe2\x96\x81", GEMMA2_PIECE_NORMAL, 0);
    p.kinds[0] = GEMMA2_PIECE_USER;
    m = open_pieces(&p, &image);
    check(encode(m, "a b", 3, 0, ids, 8) == 2 && ids[0] == 7 && ids[1] == 5,
          "a piece that ends in a space");
    check(encode(m, "a<pad>", 6, 0, ids, 8) == 2 && ids[0] == 4 && ids[1] == 0, "id 0 by its text");
    gemma2_close(m), free(image.data);
}

/* 31: each piece in turn ends a little behind the file, of which the blob is the end. */
static void test_piece_ends(void)
{
    static const uint32_t beyond[] = {1, 2, 64, 1000, 4000};
    static struct pieces p;
    plain_pieces(&p, 20);
    for (uint32_t i = 0; i < p.n; i++)
        for (size_t k = 0; k < 5; k++) {
            uint32_t was = p.ends[i];
            p.ends[i] = p.blob_bytes + beyond[k];
            struct image m = build_tokenizer_file(&p);
            check(!opens(&m), "piece %u ends %u bytes behind the file", i, beyond[k]);
            free(m.data);
            p.ends[i] = was;
        }
}

/* 36: text that is no UTF-8, or hardly any, comes back as what it stands for. */
static void test_texts(const gemma2_model *m)
{
    static const struct {
        const char *bytes;
        size_t n;
    } texts[] = {
        {"", 0}, {" ", 1}, {"        ", 8}, {"\0", 1}, {"a\0b", 3}, {"\0\0\0\0", 4},
        {"\xff", 1}, {"\xc0\x80", 2}, {"\xc1\xbf", 2}, {"\xe0\x80\x80", 3}, {"\xf0\x80\x80\x80", 4},
        {"\xed\xa0\x80", 3}, {"\xed\xbf\xbf", 3}, {"\xed\xa0\xbd\xed\xb8\x80", 6},
        {"\xf4\x90\x80\x80", 4}, {"\xf8\x88\x80\x80\x80", 5}, {"\xfe\xff", 2}, {"\xe2\x82", 2},
        {"\xe2\x82" "a", 3}, {"\xf0\x9f\x98", 3}, {"a\xcc\x81\xcc\x82\xcc\x83\xcc\x84\xcc\x85", 11},
        {"\xef\xbb\xbfhi", 5}, {"\xe2\x80\xae" "abc", 6}, {"\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f"
         "\x91\xa9", 11}, {"\r\n\t\v\f\x1b[2J", 9}, {"\x80\x81\x82\x83", 4},
    };
    char want[64], got[1024];
    int32_t ids[64];
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        for (unsigned flags = 0; flags < 4; flags++) {
            size_t n = repaired((const uint8_t *)texts[i].bytes, texts[i].n, want);
            int64_t count = encode(m, texts[i].bytes, texts[i].n, flags, ids, 64);
            check(count >= 0 && count <= 64 && decode_all(m, ids, count, got) == n &&
                      !memcmp(want, got, n), "text %zu does not come back", i);
        }
}

/* Encodes n bytes of one unit again and again.  Returns comparisons, and *seconds of CPU. */
static unsigned long work_of(const gemma2_model *m, const char *unit, size_t n, double *seconds)
{
    char *text = fresh(n + 8);
    struct timespec a, b;
    for (size_t i = 0; i < n; i++)
        text[i] = unit[i % strlen(unit)];
    n_compared = 0;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    check(encode(m, text, n, 0, NULL, 0) > 0, "a long run of %s", unit);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    *seconds = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
    free(text);
    return n_compared;
}

/* 36: sixteen times the text is about sixteen times the work, where a quadratic algorithm
 * would do 256 times as much (test_long_runs has whole megabytes); and lengths above 2^28 are
 * refused. */
static void test_linear(const gemma2_model *m)
{
    static const char *const units[] = {"a", " ", "\n", "ab", "aaab", " a", "\xe2\x96\x81", "<",
                                        "\xf0\x9f\x98\x80", "\xff", "<start_of_turn", "1"};
    static const uint64_t large[] = {((uint64_t)1 << 28) + 1, (uint64_t)1 << 31,
                                     ((uint64_t)1 << 31) + 1, (uint64_t)1 << 32,
                                     ((uint64_t)1 << 32) + 1, INT64_MAX};
    double short_s, long_s;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        unsigned long few = work_of(m, units[i], 1 << 14, &short_s);
        unsigned long many = work_of(m, units[i], 1 << 18, &long_s);
        check(many <= 17 * few + 1000 && few < 40ul << 14, "%s: %lu comparisons for 16 KB, %lu "
              "for 256 KB", units[i], few, many);
        check(long_s < 0.2 + 80 * short_s, "%s: %.3f s of CPU for 16 KB, %.3f for 256 KB", units[i],
              short_s, long_s);
    }
    char scratch[64];
    for (size_t i = 0; i < sizeof large / sizeof *large; i++)
        check(gemma2_encode(m, "a", (int64_t)large[i], 0, NULL, 0, scratch, sizeof scratch) ==
                  GEMMA2_ERR_ARGUMENT, "a text of %llu bytes", (unsigned long long)large[i]);
}

/* 36: vocabularies made to be slow: user-defined pieces that a text goes along with for long,
 * in vain, at each of its letters. */
static void test_slow_vocabularies(void)
{
    static struct pieces p;
    static char long_piece[4097];
    double seconds;
    for (int chain = 0; chain < 2; chain++) {
        start_pieces(&p);
        add_piece(&p, "a", GEMMA2_PIECE_NORMAL, -1);
        memset(long_piece, 'a', 4096);
        long_piece[4095] = 'b'; /* a..ab alone, or behind it ab, aab, aaab .. */
        add_piece(&p, long_piece, GEMMA2_PIECE_USER, 0);
        for (int i = 1; chain && i < 140; i++)
            add_piece(&p, long_piece + 4095 - i, GEMMA2_PIECE_USER, 0);
        struct image image;
        gemma2_model *m = open_pieces(&p, &image);
        unsigned long n = work_of(m, "a", 1 << 16, &seconds);
        check(n < 40ul << 16 && seconds < 1, "64 KB of a, vocabulary %d: %lu comparisons, %.2f s",
              chain, n, seconds);
        gemma2_close(m);
        free(image.data);
    }
}

/* 36: a template with as many marks of plain text as there can be, each of which a text goes
 * along with for long at each of its letters. */
static void test_slow_template(const gemma2_model *tokenizer)
{
    static char part[MAX_CHAT_LINES * (MAX_LINE_BYTES + 3)], text[1 << 17];
    const char *facts[] = {"chat.user.before", part, "chat.user.after", "", "chat.model.before", "",
                           "chat.model.after", "", "chat.generate", "", NULL};
    for (size_t at = 0, i = 0; i < MAX_CHAT_LINES; i++, at += MAX_LINE_BYTES - 1) {
        memset(part + at, 'a', MAX_LINE_BYTES - 2);
        part[at + MAX_LINE_BYTES - 3] = (char)('b' + i % 20);
        part[at + MAX_LINE_BYTES - 2] = '\n';
    }
    memset(text, 'a', sizeof text);
    struct image from = {fresh(tokenizer->file.size), tokenizer->file.size};
    memcpy(from.data, tokenizer->file.data, from.size);
    struct image image = with_facts(&from, facts);
    gemma2_model *m = open_image(&image);
    gemma2_message message = {GEMMA2_ROLE_USER, text, 1 << 13};
    size_t bytes[2];
    unsigned long work[2];
    for (int i = 0; i < 2; i++, message.size = sizeof text) {
        bytes[i] = gemma2_chat_scratch(m, &message, 1);
        void *scratch = fresh(bytes[i]);
        n_compared = 0;
        check(gemma2_encode_chat(m, &message, 1, 0, NULL, 0, scratch, bytes[i]) > 0, "a template");
        work[i] = n_compared;
        free(scratch);
    }
    check(work[1] < 17 * work[0] && work[1] < 120ul << 17, "a slow template: %lu comparisons for "
          "8 KB, %lu for 128 KB", work[0], work[1]);
    gemma2_close(m);
    free(image.data), free(from.data);
}

static void test_unusual_texts(void)
{
    char err[256] = "";
    gemma2_model *m = gemma2_open("tokenizer.bin", NULL, err, sizeof err);
    if (!check(m != NULL, "tokenizer.bin: %s", err))
        return;
    test_texts(m);
    test_linear(m);
    test_slow_template(m);
    gemma2_close(m);
}

/* ---- Run time, API ------------------------------------------------------------------------ */

/* 41: a window of 4096 and a context of 8192, around both edges: single steps, chunks that
 * straddle them, and a prompt that fills the context say the same. */
static void test_real_edges(void)
{
    static const struct shape shape = {"edges", 2, 4, 2, 1, 2, 4, 20, 4096, 8192, 30, 20, 1, 0,
                                       {F32, F32, F32, F32, F32}, 64};
    enum { N = 8192 };
    struct model x = make(&shape);
    size_t v = vocab(x.m);
    int32_t *ids = fresh((N + 1) * sizeof *ids);
    float *singles = fresh(v * sizeof(float) * 8), *logits = fresh(v * sizeof(float));
    static const size_t edges[] = {4095, 4096, 4097, 4098, 8190, 8191, 8192};
    random_ids(x.m, ids, N + 1);
    gemma2_session *s = start(x.m, (struct setup){0, 256, 1, 0, 0});
    size_t at = 0;
    for (size_t i = 0; i < 7; i++) {
        if (edges[i] - at > 1)
            gemma2_eval(s, ids + at, edges[i] - at - 1, NULL);
        gemma2_eval(s, ids + edges[i] - 1, 1, singles + i * v);
        at = edges[i];
    }
    check(gemma2_eval(s, ids, 1, logits) == GEMMA2_ERR_CONTEXT, "token 8193");
    gemma2_session_free(s);
    for (size_t i = 1; i < 7; i += i < 3 ? 1 : 3) { /* 4096, 4097, 4098, 8192 */
        s = start(x.m, (struct setup){0, 250, 1, 0, 0});
        check(gemma2_eval(s, ids, edges[i], logits) == GEMMA2_OK &&
                  !memcmp(logits, singles + i * v, v * sizeof *logits), "%zu tokens", edges[i]);
        check(gemma2_eval(s, ids, N + 1 - edges[i], NULL) == GEMMA2_ERR_CONTEXT, "one too many");
        check(gemma2_eval(s, ids, 0, NULL) == GEMMA2_ERR_ARGUMENT, "no tokens");
        gemma2_session_free(s);
    }
    free(ids), free(singles), free(logits);
    unmake(&x);
}

/* 42: all settings at their ends over logits at theirs: an id that is not banned, and the
 * extremes that are certain. */
static void test_sampler_extremes(void)
{
    static const float temperature[] = {0, 1e-45f, 1e-38f, 1e-6f, 1, 1e6f};
    static const float top_p[] = {1e-45f, FLT_MIN, 0.5f, 0.99999994f, 1}, min_p[] = {0, 1e-45f, 1};
    static const int32_t top_k[] = {0, 1, 82, 83, 84, INT32_MAX};
    static const float fill[][2] = {{0, 0}, {-0.0f, 0}, {1e-45f, 0}, {-3e38f, 3e38f},
                                    {3e38f, 2.9e38f}, {-3e38f, -3e38f}, {1, 0.99999994f}};
    struct model x = make(&shapes[0]);
    gemma2_session *s = start(x.m, (struct setup){8, 1, 1, 0, 0});
    int bad = 0, n = (int)vocab(x.m), turn = 0;
    float *logits = fresh((size_t)n * sizeof *logits);
    for (int f = 0; f < 7; f++)
        for (int i = 0; i < 6 * 5 * 3 * 6; i++) {
            gemma2_sampler p;
            gemma2_bias ban = {turn % n, -INFINITY};
            gemma2_sampler_init(&p, (uint64_t)turn++);
            p.temperature = temperature[i % 6], p.top_p = top_p[i / 6 % 5];
            p.min_p = min_p[i / 30 % 3], p.top_k = top_k[i / 90];
            p.bias = &ban, p.n_bias = turn % 2;
            if (turn % 3 == 0)
                p.rng = turn % 2 ? 0 : UINT64_MAX; /* u = 0, and near 1 */
            for (int k = 0; k < n; k++)
                logits[k] = fill[f][(k + turn) % 5 == 0];
            int32_t id = gemma2_sample(s, &p, logits);
            float best = fmaxf(fill[f][0], fill[f][1]);
            int apart = fabsf(fill[f][0] - fill[f][1]) > 1; /* exp(difference) is not 1 */
            int certain = p.temperature == 0 || p.top_k == 1 || p.top_p < 1e-30f ||
                          (p.min_p == 1 && apart);
            bad += id < 0 || id >= n || (p.n_bias && id == ban.id) ||
                   (certain && logits[id] != best);
        }
    check_none(bad, "draws at the ends of all settings");
    free(logits);
    gemma2_session_free(s);
    unmake(&x);
}

/* A word of a saved session, under a right digest: what restoring it says; and that the
 * session then is as it was. */
static int restored(gemma2_session *s, uint8_t *saved, size_t n, size_t at, uint32_t value)
{
    uint32_t was = get_u32(saved + at);
    size_t held = (size_t)gemma2_session_save(s, NULL, 0);
    uint8_t *before = fresh(held), *after = fresh(held), *copy = fresh(n);
    put_u32(saved + at, value);
    saved_digest(s->model, saved, n, saved + SAVED_DIGEST_AT);
    memcpy(copy, saved, n);
    gemma2_session_save(s, before, held);
    int status = gemma2_session_restore(s, copy, n);
    if (status < 0)
        check(gemma2_session_save(s, after, held) == (int64_t)held && !memcmp(before, after, held),
              "a session changes when it refuses %#x at %zu", value, at);
    put_u32(saved + at, was);
    saved_digest(s->model, saved, n, saved + SAVED_DIGEST_AT);
    free(before), free(after), free(copy);
    return status;
}

/* 45: saved sessions that are damaged, lie, or belong elsewhere. */
static void test_saved_sessions(void)
{
    enum { C = GEMMA2_ERR_CORRUPT, M = GEMMA2_ERR_MISMATCH, X = GEMMA2_ERR_CONTEXT,
           F = GEMMA2_ERR_FOREIGN };
    static const struct {
        uint32_t at, value;
        int status;
    } cases[] = {
        {0, 0, F}, {4, 0, F}, {8, 0, M}, {8, 2, M}, {12, 127, C}, {12, ~0u, C}, {16, 0, C},
        {20, 1, C}, {24, 1, C}, {28, 1, C}, {32, 0, C}, {32, 19, C}, {32, 21, C}, {32, 41, X},
        {32, 1u << 31, X}, {32, ~0u, X}, {36, 1, C}, {36, 20, C}, {36, 1u << 31, C}, {36, ~0u, C},
        {40, 0, M}, {40, 2, M}, {40, ~0u, M}, {44, 0, M}, {44, 7, M}, {48, 1, C}, {60, 1, C},
        {64, 0, M}, {128, 83, C}, {128, ~0u, C}, {128 + 4 * 19, 1u << 31, C}, {128, 82, 0},
        {128 + 4 * 20, 0x7fc00000, 0}};
    struct model x = make(&shapes[0]), y = make(&shapes[0]); /* other weights */
    struct setup o = {40, 20, 1, 0, 0};
    int32_t ids[20];
    random_ids(x.m, ids, 20);
    gemma2_session *s = start(x.m, o), *t = start(x.m, o), *other = start(y.m, o);
    gemma2_eval(s, ids, 20, NULL), gemma2_eval(t, ids, 3, NULL);
    size_t n = (size_t)gemma2_session_save(s, NULL, 0);
    uint8_t *saved = fresh(n + 64);
    memset(saved, 0, n + 64);
    gemma2_session_save(s, saved, n);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int status = restored(t, saved, n, cases[i].at, cases[i].value);
        check(status == cases[i].status, "saved session with %#x at %u: %d, not %d",
              cases[i].value, cases[i].at, status, cases[i].status);
        gemma2_rewind(t, 0);
        gemma2_eval(t, ids, 3, NULL);
    }
    check(gemma2_session_restore(other, saved, n) == M, "a session of another model");
    for (int32_t first = 0; first <= 20; first++) { /* local layers see the last 8 */
        size_t bytes = (size_t)saved_bytes(s, 20, first);
        put_u64(saved + 16, bytes), put_u32(saved + 36, (uint32_t)first);
        saved_digest(s->model, saved, bytes, saved + SAVED_DIGEST_AT);
        check(gemma2_session_restore(t, saved, bytes) == (first <= 13 ? GEMMA2_OK : C),
              "local layers from %d on", first);
    }
    gemma2_session_save(s, saved, n);
    int bad = 0;
    for (size_t cut = 0; cut < n + 64; cut += 1 + cut / 150) {
        uint8_t *copy = fresh(cut);
        memcpy(copy, saved, cut);
        bad += cut != n && gemma2_session_restore(t, copy, cut) != (cut < 8 ? F : C);
        if (cut >= SAVED_BYTES) {
            put_u64(copy + 16, cut);
            saved_digest(s->model, copy, cut, copy + SAVED_DIGEST_AT);
            bad += cut != n && gemma2_session_restore(t, copy, cut) != C;
        }
        free(copy);
    }
    for (size_t i = 0; i < n; i += 1 + i / 150) {
        saved[i] ^= 4;
        int status = gemma2_session_restore(t, saved, n);
        bad += status != (i < 8 ? F : C) && !(status == M && i >= 8 && i < 12);
        saved[i] ^= 4;
    }
    check_none(bad, "truncated or flipped sessions");
    check(gemma2_session_save(s, saved, n - 1) == GEMMA2_ERR_SPACE, "a byte too few");
    gemma2_session_free(s), gemma2_session_free(t), gemma2_session_free(other);
    free(saved);
    unmake(&x), unmake(&y);
}

struct thread_work {
    const gemma2_model *m;
    const int32_t *ids;
    const float *truth;
    int bad;
};

static void *run_thread(void *context)
{
    struct thread_work *w = context;
    for (int round = 0; round < 20; round++) {
        float *got = logits_of(w->m, (struct setup){30, 5, 1, 0, 0}, w->ids, 30, 30);
        char text[64];
        int32_t ids[8];
        w->bad += !same_logits(w->m, got, w->truth, 29);
        w->bad += encode(w->m, "abc", 3, 0, ids, 8) != 3 || decode_all(w->m, ids, 3, text) != 3;
        free(got);
    }
    return NULL;
}

/* 48: no handle; one model in four threads, and in a child after fork. */
static void test_handles(void)
{
    struct model x = make(&shapes[2]);
    int32_t ids[30];
    pthread_t threads[4];
    random_ids(x.m, ids, 30);
    float *truth = logits_of(x.m, (struct setup){30, 5, 1, 0, 0}, ids, 30, 30);
    struct thread_work work[4];
    gemma2_close(NULL), gemma2_session_free(NULL);
    for (int i = 0; i < 4; i++) {
        work[i] = (struct thread_work){x.m, ids, truth, 0};
        if (pthread_create(&threads[i], NULL, run_thread, &work[i]))
            printf("no thread\n"), exit(1);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        check(!work[i].bad, "thread %d: %d wrong", i, work[i].bad);
    }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct thread_work in_child = {x.m, ids, truth, 0};
        run_thread(&in_child);
        _exit(in_child.bad != 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "in a child after fork");
    free(truth);
    unmake(&x);
}

/* ---- Where each class is tested ------------------------------------------------------------ */

/* The classes are those of the project's survey of failures in other engines.  A test has a
 * file and a word that must stand in it, several separated by blanks. */
static const struct {
    int number;
    const char *what, *file, *tests;
} CLASSES[] = {
    {1, "empty file", "unit/weight_file.c", "test_foreign"},
    {2, "shorter than the header", "unit/weight_file.c", "test_truncated"},
    {3, "wrong magic, HTML, gzip", "unit/weight_file.c", "test_foreign"},
    {4, "version 0 or future", "unit/weight_file.c", "test_header_limits"},
    {5, "byte-swapped header", "unit/hostile.c", "test_byte_swapped"},
    {6, "truncated anywhere", "unit/weight_file.c", "test_truncated"},
    {7, "trailing bytes, holes, polyglots", "unit/hostile.c", "test_holes"},
    {7, "trailing bytes; padding not zero", "unit/weight_file.c", "test_truncated test_check"},
    {8, "directory, FIFO, device", "unit/weight_file.c", "test_foreign"},
    {8, "unreadable, above 4 GiB, sparse", "unit/hostile.c", "test_paths test_large_files"},
    {9, "cut short while mapped", "cli.sh", "shrinks"},
    {9, "cut short after it was read", "unit/hostile.c", "test_shrinks_in_memory"},
    {10, "dimensions of zero", "unit/weight_file.c", "test_header_limits"},
    {11, "negative dimensions", "unit/weight_file.c", "test_header_limits test_hostile_words"},
    {12, "products that overflow", "unit/hostile.c", "test_wrapping_sizes test_largest_dimensions"},
    {13, "alignment that wraps", "unit/hostile.c", "test_wrapping_sizes"},
    {14, "sum of sizes that wraps", "unit/hostile.c", "test_wrapping_sizes test_wraps_around"},
    {15, "size_t of 32 bits", "unit/hostile.c", "test_largest_dimensions"},
    {16, "more layers than an array has", "unit/weight_file.c", "test_header_limits"},
    {17, "heads that do not divide, odd head_dim", "unit/weight_file.c", "test_consistent_lies"},
    {17, "dimensions no multiple of anything", "unit/pass.c", "test_models_on_rows"},
    {18, "a header its bytes belie", "unit/weight_file.c", "test_directory test_header_limits"},
    {19, "windows and contexts at their ends", "unit/hostile.c", "test_windows"},
    {19, "windows and contexts out of range", "unit/weight_file.c", "test_header_limits"},
    {19, "windows and contexts out of range", "unit/pass.c", "test_session_params"},
    {20, "eps, theta, soft-caps, scales", "unit/weight_file.c", "test_header_limits"},
    {21, "offsets before, past, overlapping, unaligned", "unit/weight_file.c", "test_directory"},
    {21, "offsets that wrap", "unit/hostile.c", "test_wrapping_sizes"},
    {22, "unknown or negative types", "unit/weight_file.c", "test_directory"},
    {23, "more dimensions than a tensor has: the format has no such count", NULL, NULL},
    {24, "tensors missing, twice, unknown", "unit/weight_file.c",
     "test_missing test_consistent_lies"},
    {24, "keys empty, long, twice", "unit/hostile.c", "test_fact_keys"},
    {25, "values not finite, by --check", "unit/weight_file.c", "test_check_values"},
    {25, "values zero, denormal, huge, not finite, while running", "unit/hostile.c", "test_values"},
    {25, "a token of values not finite among others", "unit/hostile.c", "test_spoiled_token"},
    {26, "counts of 2^64 - 1", "unit/hostile.c", "test_wrapping_sizes"},
    {26, "counts of 2^32 - 1", "unit/weight_file.c", "test_header_limits test_facts"},
    {27, "nested arrays: the format nests nothing", NULL, NULL},
    {28, "a wrong type for a key: the format's keys have no types", NULL, NULL},
    {29, "a size function that fails", "unit/tokenizer.c", "test_encode_arguments"},
    {30, "vocabularies of 1 and 2", "unit/hostile.c", "test_small_vocabularies"},
    {30, "special ids outside, another size", "unit/weight_file.c", "test_tokenizer_section"},
    {31, "lengths of pieces (the longest is computed, not stored)", "unit/weight_file.c",
     "test_tokenizer_section"},
    {31, "pieces that end behind the file", "unit/hostile.c", "test_piece_ends"},
    {32, "no U+2581, missing bytes", "unit/hostile.c", "test_unusual_pieces"},
    {32, "no bytes, no unk", "unit/tokenizer.c", "test_encodings"},
    {32, "no bytes, no unk", "unit/weight_file.c", "test_tokenizer_section"},
    {33, "byte pieces misspelt", "unit/weight_file.c", "test_tokenizer_section"},
    {34, "duplicates, NUL", "unit/hostile.c", "test_unusual_pieces"},
    {34, "pieces that are no UTF-8", "unit/weight_file.c", "test_tokenizer_section"},
    {35, "scores NaN or infinite, too few", "unit/weight_file.c", "test_tokenizer_section"},
    {36, "unusual text", "unit/hostile.c", "test_texts test_linear"},
    {36, "a megabyte of one letter", "unit/tokenizer.c", "test_long_runs"},
    {36, "vocabularies made to be slow", "unit/hostile.c", "test_slow_vocabularies"},
    {36, "a chat template made to be slow", "unit/hostile.c", "test_slow_template"},
    {36, "facts that make no chat template", "unit/chat.c", "test_bad_templates"},
    {36, "a text above 2^28 bytes", "cli.sh", "268435457"},
    {37, "control strings in text", "unit/tokenizer.c", "test_round_trip"},
    {37, "control strings in a chat", "cli.sh", "forged"},
    {38, "ids out of range", "unit/pass.c", "test_refused_calls"},
    {38, "ids out of range", "unit/tokenizer.c", "test_decode_calls"},
    {38, "ids out of range", "unit/sampler.c", "test_bias"},
    {39, "control sequences on a terminal", "cli.sh", "sequences ESCAPES"},
    {40, "negative and excessive rewinds", "unit/pass.c", "test_rewind_edges"},
    {41, "prompts at the context's edge, rewinds past the ring", "unit/pass.c",
     "test_refused_calls test_rewind test_chunks"},
    {41, "positions around 4096 and 8192", "unit/hostile.c", "test_real_edges"},
    {42, "sampler out of range", "unit/sampler.c", "test_sampler_refuses test_bias"},
    {42, "sampler at the ends of its range", "unit/hostile.c", "test_sampler_extremes"},
    {43, "stop strings", "cli.sh", "stops STRAY"},
    {44, "grammars", "unit/constraints.c", "test_languages test_huge_grammars"},
    {45, "session files", "unit/hostile.c", "test_saved_sessions"},
    {46, "a turn of 100 KB", "cli.sh", "turn"},
    {47, "failing allocations and calls", "fault.c", "test_library test_program"},
    {48, "handles: NULL, threads, fork", "unit/hostile.c", "test_handles"},
    {49, "arguments; paths that are not ASCII", "cli.sh", "number E_ACUTE"},
    {50, "the converter", "oracle_export.py", "test_bad test_interrupt"},
    {50, "pickles", "oracle_arrays.py", "test_torch_pickles"},
};

static char *read_text(const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "tests/%s", name);
    FILE *f = fopen(path, "rb");
    char *text = calloc(1, 1 << 20);
    if (!f || !text || !fread(text, 1, (1 << 20) - 1, f))
        printf("cannot read %s\n", path), exit(1);
    fclose(f);
    return text;
}

/* The table holds every class, in order, and names tests that are there. */
static void test_table(void)
{
    int last = 0;
    for (size_t i = 0; i < sizeof CLASSES / sizeof *CLASSES; i++) {
        check(CLASSES[i].number == last || CLASSES[i].number == last + 1, "class %d is missing",
              last + 1);
        last = CLASSES[i].number;
        char *text = CLASSES[i].file ? read_text(CLASSES[i].file) : NULL, names[128], *rest = names;
        snprintf(names, sizeof names, "%s", text ? CLASSES[i].tests : "");
        for (char *word; text && (word = strtok(rest, " ")) != NULL; rest = NULL)
            check(strstr(text, word) != NULL, "class %d: there is no %s in %s", last, word,
                  CLASSES[i].file);
        free(text);
    }
    check(last == 50, "the table ends with class %d", last);
}

/* Sizes that no machine has are refused by NULL under a sanitizer, too. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static void test_hostile(void)
{
    test_byte_swapped();
    test_holes();
    test_paths();
    test_large_files();
    test_shrinks_in_memory();
    test_wrapping_sizes();
    test_wraps_around();
    test_largest_dimensions();
    test_windows();
    test_fact_keys();
    test_values();
    test_spoiled_token();
    test_small_vocabularies();
    test_unusual_pieces();
    test_piece_ends();
    test_unusual_texts();
    test_slow_vocabularies();
    test_real_edges();
    test_sampler_extremes();
    test_saved_sessions();
    test_handles();
    test_table();
}
