/* Section 4, the pass, and sessions: chunks, rows, far positions, rewinding, refusals. */

/* Feeds ids in chunks.  Returns how many chunks end in other logits than single steps. */
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
            for (size_t k = (size_t)batch % 4; k < 11; k += 4)
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
    for (int i = 0; i < 2 * N_SHAPES; i++) {
        struct model x = make(&shapes[i / 2]);
        int cache = i % 2 ? GEMMA2_CACHE_Q8 : GEMMA2_CACHE_AUTO;
        random_ids(x.m, ids, 30);
        x.m->isa = &scalar_kernels;
        float *truth = step_by_step(x.m, (struct setup){30, 1, 1, 0, cache}, ids, 30);
        for (int k = 0; k < N_KERNELS; k++) {
            x.m->isa = all_kernels[k];
            if (all_kernels[k]->available())
                check(!chunks_differ(x.m, (struct setup){30, 11, 1, 0, cache}, ids, 30, 12,
                                     truth) &&
                          !chunks_differ(x.m, (struct setup){30, 4, 1, 0, cache}, ids, 30, 1,
                                         truth),
                      "%s on %s differs from scalar", shapes[i / 2].name, all_kernels[k]->name);
        }
        free(truth);
        unmake(&x);
    }
}

/* The model in plain loops gives the engine's bits: every type of weights and of cache,
 * any way of cutting; and across the border of attention's blocks of 256 positions. */
static void test_reference(void)
{
    enum { N = 270 };
    int32_t ids[N];
    for (int i = 0; i < N_SHAPES; i++)
        for (int cache = GEMMA2_CACHE_F32; cache <= GEMMA2_CACHE_Q8; cache++) {
            struct model x = make(&shapes[i]);
            size_t n = i == 3 ? N : 30; /* layers that see all positions, no soft-cap */
            int32_t context = (int32_t)n;
            random_ids(x.m, ids, n);
            float *truth = step_by_step(x.m, (struct setup){context, 1, 1, 0, cache}, ids, n);
            x.m->is_reference = 1;
            check(!chunks_differ(x.m, (struct setup){context, 1, 1, 0, cache}, ids, n, 1, truth) &&
                      !chunks_differ(x.m, (struct setup){context, 7, 3, 0, cache}, ids, n, 9,
                                     truth),
                  "%s, cache %d: the reference differs", shapes[i].name, cache);
            free(truth);
            unmake(&x);
        }
}

/* How many logits are not as the head's rows say: the whole model's, or -infinity. */
static int kept_differ(const gemma2_model *m, const uint32_t *ids, const float *logits,
                       const float *whole)
{
    int bad = 0, at = 0;
    for (int id = 0; id < m->config.n_vocab; id++)
        if (at < m->config.n_kept && ids[at] == (uint32_t)id)
            bad += !!memcmp(&logits[id], &whole[id], sizeof *logits), at++;
        else
            bad += logits[id] != -INFINITY;
    return bad;
}

/* A head with some rows only, tied or not, of every type: the logits that it has are the whole
 * model's, for the engine on every row, in both classes, and for the reference.  Scores are those
 * of the logits, and a sampler that takes anything takes only what is kept. */
static void test_kept(void)
{
    enum { N = 6, MOST = 140 };
    static const uint32_t strides[] = {1, 3, 200};
    int32_t text[N];
    uint32_t ids[MOST], n;
    float logits[MOST], whole[MOST], scores[N], logprob;
    for (int i = 0; i < N_SHAPES * 3; i++) {
        struct model x = make(&shapes[i / 3]);
        n = 0;
        for (uint32_t id = 2; id < shapes[i / 3].v; id += strides[i % 3])
            ids[n++] = id;
        struct image image = with_kept(&x.image, ids, n);
        gemma2_model *m = open_image(&image);
        check(m->config.n_kept == (int32_t)n && gemma2_check(m, 2, NULL, 0) == 1, "kept ids");
        random_ids(m, text, N);
        for (int k = 0; k < 2 * N_KERNELS + 1; k++) {
            const struct kernels *isa = all_kernels[k / 2 % N_KERNELS];
            if (!isa->available())
                continue;
            m->isa = x.m->isa = isa, m->matrix = x.m->matrix = k % 2 ? isa->matrix : NULL;
            m->is_reference = x.m->is_reference = k == 2 * N_KERNELS;
            gemma2_session *s = start(m, (struct setup){16, 8, 1, 0, 0});
            gemma2_session *t = start(x.m, (struct setup){16, 8, 1, 0, 0});
            int bad = gemma2_prefill(s, text, N, logits) | gemma2_prefill(t, text, N, whole);
            bad |= kept_differ(m, ids, logits, whole);
            bad |= gemma2_eval(s, text, 1, logits) | gemma2_eval(t, text, 1, whole);
            bad |= kept_differ(m, ids, logits, whole);
            for (int32_t id = 0; id < N; id++)
                bad |= gemma2_rewind(s, 7) | gemma2_score(s, text, 1, id, scores) |
                       gemma2_rewind(s, 7) | gemma2_eval(s, text, 1, logits) |
                       gemma2_logprob(logits, vocab(m), id, &logprob) |
                       (memcmp(scores, &logprob, sizeof logprob) != 0) |
                       (logits[id] == -INFINITY ? logprob != -INFINITY : !(logprob <= 0));
            check(!bad, "%s, %u of %u ids, %s", shapes[i / 3].name, n, shapes[i / 3].v, isa->name);
            gemma2_sampler p;
            gemma2_sampler_init(&p, 1);
            p.temperature = 1e6f, p.top_k = 0, p.top_p = 1, p.repetition_penalty = 0.1f;
            for (int draw = 0; draw < 20; draw++) {
                int32_t id = gemma2_sample(s, &p, logits);
                bad += id < 0 || logits[id] == -INFINITY;
            }
            gemma2_candidate top[MOST];
            check(!bad && gemma2_top_logprobs(logits, vocab(m), top, MOST) == (int32_t)n,
                  "%s: an id that is not kept is drawn, or ranked", shapes[i / 3].name);
            gemma2_session_free(s), gemma2_session_free(t);
        }
        gemma2_close(m), free(image.data);
        unmake(&x);
    }
}

/* What test_hook's hook sees and does. */
struct seen {
    float *residual;  /* [L][D], of the last row */
    float push;       /* added to the first value after layer 0 */
    int n, n_logits;
};

static void see(void *context, const gemma2_activation *a)
{
    struct seen *seen = context;
    seen->n++;
    seen->n_logits += !strcmp(a->name, "logits");
    if (strcmp(a->name, "residual"))
        return;
    for (size_t t = 0; t < a->rows && a->layer == 0; t++)
        a->data[t * a->cols] += seen->push;
    memcpy(seen->residual + (size_t)a->layer * a->cols, a->data + (a->rows - 1) * a->cols,
           a->cols * sizeof(float));
}

/* A hook sees the states that gemma2_read_out turns into logits, and what it changes counts:
 * for the engine as for the reference.  Taken away, it is not called. */
static void test_hook(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        size_t d = shapes[i].d, layers = shapes[i].layers, bytes = vocab(x.m) * sizeof(float);
        float *logits[3], *lens = fresh(bytes);
        struct seen seen = {fresh(layers * d * sizeof(float)), 0, 0, 0};
        int32_t ids[5];
        random_ids(x.m, ids, 5);
        for (int k = 0; k < 3; k++) { /* as it is, changed, changed in the reference */
            x.m->is_reference = k == 2;
            gemma2_session *s = start(x.m, (struct setup){8, 8, 1, 0, 0});
            logits[k] = fresh(bytes);
            seen = (struct seen){seen.residual, k ? 0.5f : 0, 0, 0};
            gemma2_set_hook(s, see, &seen);
            gemma2_eval(s, ids, 5, logits[k]);
            int calls = (int)(layers * 13 + 1) * (k == 2 ? 5 : 1) + 2;
            check(seen.n == calls && seen.n_logits == 1, "%s: hook called %d times", shapes[i].name,
                  seen.n);
            check(gemma2_read_out(s, seen.residual + (layers - 1) * d, lens) == GEMMA2_OK &&
                      !memcmp(lens, logits[k], bytes) && seen.n == calls,
                  "%s: the last state read out", shapes[i].name);
            gemma2_set_hook(s, NULL, NULL);
            gemma2_eval(s, ids, 1, NULL);
            check(seen.n == calls && gemma2_position(s) == 6, "%s: hook taken away",
                  shapes[i].name);
            gemma2_session_free(s);
            x.m->is_reference = 0;
        }
        check(!memcmp(logits[1], logits[2], bytes) && memcmp(logits[0], logits[1], bytes),
              "%s: a changed state", shapes[i].name);
        for (int k = 0; k < 3; k++)
            free(logits[k]);
        free(lens), free(seen.residual);
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
    /* four times the largest seen */
    check(worst < 0.25, "%s on %s: prefill is off by %g", shape->name, x->m->isa->name, worst);
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
                rows[n] = row_of(s[k], ids[k][at + before], logits + n * vocab(m));
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
                                                   {30, 8, 1, 1, 3}};
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

/* Sessions without scratch share a worker, in passes of their own and together: the bits of
 * sessions alone, whatever the worker's batch. */
static void share_worker(const struct model *x, const char *name, struct setup o, int32_t batch)
{
    int32_t ids[2][24];
    float *truth[2], *logits = fresh(2 * vocab(x->m) * sizeof *logits);
    gemma2_worker_params p = {.struct_size = sizeof p, .n_batch = batch, .n_threads = o.threads};
    gemma2_plan alone = {0, 0, 0, 0}, with = alone, of_worker = alone;
    gemma2_session *s[2];
    gemma2_worker *work = gemma2_worker_new(x->m, &p, NULL, 0);
    gemma2_session_params params = {.struct_size = sizeof params, .n_context = o.context,
                                    .n_batch = o.batch, .n_threads = o.threads, .window = o.window,
                                    .cache_type = o.cache};
    gemma2_session_plan(x->m, &params, &alone);
    params.worker = work;
    gemma2_session_plan(x->m, &params, &with);
    gemma2_worker_plan(x->m, &p, &of_worker);
    check(with.cache == alone.cache && with.scratch < 4096 && of_worker.cache == 0 &&
              of_worker.total > 4096 && with.total == with.cache + with.scratch &&
              with.weights == x->image.size, "%s: plans of a shared worker", name);
    for (int k = 0; k < 2; k++) {
        random_ids(x->m, ids[k], 24);
        truth[k] = step_by_step(x->m, o, ids[k], 24);
        s[k] = gemma2_session_new(x->m, &params, NULL, 0);
    }
    int bad = 0;
    for (size_t at = 0; at < 24; at += 3)
        for (int k = 0; k < 2; k++) {
            size_t i = at + 1 + (size_t)k;
            gemma2_row rows[2] = {row_of(s[k], ids[k][i], logits),
                                  row_of(s[!k], ids[!k][i], logits + vocab(x->m))};
            bad += k == 0 && gemma2_eval(s[0], ids[0] + at, 1, NULL) != GEMMA2_OK;
            bad += k == 0 && gemma2_eval(s[1], ids[1] + at, 1, NULL) != GEMMA2_OK;
            bad += batch > 1 ? gemma2_eval_rows(rows, 2) != GEMMA2_OK
                             : gemma2_eval(s[k], &rows[0].id, 1, logits) != GEMMA2_OK ||
                                   gemma2_eval(s[!k], &rows[1].id, 1, rows[1].logits) != GEMMA2_OK;
            bad += logits_differ(x->m, logits, truth[k], i) +
                   logits_differ(x->m, rows[1].logits, truth[!k], i);
        }
    for (int k = 0; k < 2; k++) {
        bad += gemma2_rewind(s[k], 0) != GEMMA2_OK;
        bad += gemma2_eval(s[k], ids[k], 24, logits) != GEMMA2_OK;
        bad += logits_differ(x->m, logits, truth[k], 23);
    }
    check(!bad, "%s: a shared worker of batch %d: %d wrong", name, batch, bad);
    for (int k = 0; k < 2; k++)
        gemma2_session_free(s[k]), free(truth[k]);
    gemma2_worker_free(work);
    free(logits);
}

static void test_shared_worker(void)
{
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        for (int32_t batch = 1; batch < 40; batch += 13)
            share_worker(&x, shapes[i].name,
                         (struct setup){24, 1 + batch / 2, 1 + i % 2, 0, i % 4}, batch);
        unmake(&x);
    }
}

/* Prompts and single tokens in one pass: a prompt by gemma2_prefill, a token by gemma2_eval, and a
 * session whose rows are of both classes, give the bits they give alone. */
static void mix_classes(const struct model *x, const char *name, int cache)
{
    enum { PROMPT = 21, N = PROMPT + 5 };
    const struct setup o = {64, 40, 1, 0, cache};
    const char *isa = x->m->isa->name;
    int32_t ids[3][N];
    int where[3][N], bad[3] = {0};
    size_t v = vocab(x->m);
    gemma2_session *s[3], *alone = start(x->m, o);
    gemma2_row rows[3 * N];
    float *logits = fresh(3 * N * v * sizeof *logits), *one = fresh(v * sizeof *one);
    gemma2_worker_params p = {.struct_size = sizeof p, .n_batch = 3 * N, .n_threads = 2};
    gemma2_worker *work = gemma2_worker_new(x->m, &p, NULL, 0);
    gemma2_session_params params = {.struct_size = sizeof params, .n_context = 64, .n_batch = 40,
                                    .cache_type = cache, .worker = work};
    for (int k = 0; k < 3; k++)
        random_ids(x->m, ids[k], N), s[k] = gemma2_session_new(x->m, &params, NULL, 0);
    gemma2_eval(s[1], ids[1], PROMPT, NULL);
    size_t n = 0;
    memset(where, -1, sizeof where);
    for (size_t i = 0; i < N; i++) /* in turn: a prompt; single tokens; both, ending exact */
        for (int k = 0; k < 3; k++)
            if (k == 1 ? i >= PROMPT : k == 2 || i < PROMPT) {
                rows[n] = row_of(s[k], ids[k][i], logits + n * v);
                rows[n].prefill = k == 0 || (k == 2 && i < PROMPT);
                where[k][i] = (int)n++;
            }
    check(gemma2_eval_rows(rows, n) == GEMMA2_OK, "%s on %s: both classes", name, isa);
    for (int k = 0; k < 3; k++) {
        gemma2_rewind(alone, 0);
        for (size_t i = 0; i < (k ? N : PROMPT); i++) {
            (k == 1 || i >= PROMPT ? gemma2_eval : gemma2_prefill)(alone, &ids[k][i], 1, one);
            if (where[k][i] >= 0)
                bad[k] += logits_differ(x->m, one, rows[where[k][i]].logits, 0);
        }
    }
    check(!bad[0] && !bad[1] && !bad[2], "%s on %s, cache %d: %d, %d and %d rows of both classes "
          "differ", name, isa, cache, bad[0], bad[1], bad[2]);
    for (int k = 0; k < 3; k++)
        gemma2_session_free(s[k]);
    gemma2_session_free(alone), gemma2_worker_free(work);
    free(logits), free(one);
}

static void test_mixed_classes(void)
{
    static const struct shape shape[] = {
        {"bf16", 3, 64, 4, 2, 32, 96, 70, 37, 300, 50, 30, 5, 0,
         {BF16, BF16, BF16, BF16, BF16}, 64},
        {"all types", 2, 264, 8, 4, 32, 600, 100, 100, 300, 50, 30, 1, 0,
         {Q8, BF16, Q4, BF16, Q6}, 64}};
    for (int i = 0; i < 2; i++) {
        struct model x = make(&shape[i]);
        for (int k = 0; k < N_KERNELS; k++)
            for (int cache = GEMMA2_CACHE_F32; cache <= GEMMA2_CACHE_Q8; cache++)
                if (has_matrix(all_kernels[k]) || k == N_KERNELS - 1) {
                    x.m->isa = all_kernels[k], x.m->matrix = all_kernels[k]->matrix;
                    mix_classes(&x, shape[i].name, cache);
                }
        unmake(&x);
    }
}

/* Rows that cannot be done are named, each with its reason, and the others are done. */
static void test_rows_refused(void)
{
    enum { BAD = 7 };
    struct model x = make(&shapes[0]), y = make(&shapes[1]);
    int32_t ids[4];
    float *logits = fresh(2 * vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, 4);
    float *truth = step_by_step(x.m, (struct setup){12, 3, 1, 0, 0}, ids, 4);
    gemma2_session *full = start(x.m, (struct setup){2, 3, 1, 0, 0});
    gemma2_session *cancelled = start(x.m, (struct setup){12, 3, 1, 0, 0});
    gemma2_session *small = start(x.m, (struct setup){12, 1, 1, 0, 0});
    gemma2_session *sound = start(x.m, (struct setup){12, 12, 1, 0, 0});
    gemma2_session *wrong = start(x.m, (struct setup){12, 3, 1, 0, 0});
    gemma2_session *foreign = start(y.m, (struct setup){12, 3, 1, 0, 0});
    gemma2_row rows[BAD + 4] = {
        row_of(NULL, 1, NULL), row_of(sound, ids[0], logits), row_of(foreign, 1, logits),
        row_of(full, 1, NULL), row_of(cancelled, 1, NULL), row_of(small, 1, NULL),
        row_of(small, 1, NULL), row_of(wrong, 1, NULL), row_of(wrong, -1, NULL),
        row_of(sound, ids[1], logits + vocab(x.m)), row_of(full, 1, NULL)};
    static const int expected[BAD + 4] = {
        GEMMA2_ERR_ARGUMENT, GEMMA2_OK, GEMMA2_ERR_MISMATCH, GEMMA2_ERR_CONTEXT,
        GEMMA2_ERR_CANCELLED, GEMMA2_ERR_ARGUMENT, GEMMA2_ERR_ARGUMENT, GEMMA2_ERR_TOKEN,
        GEMMA2_ERR_TOKEN, GEMMA2_OK, GEMMA2_ERR_CONTEXT};
    gemma2_eval(full, ids, 1, NULL), gemma2_cancel(cancelled, 1);
    check(gemma2_eval_rows(rows + 1, BAD + 3) == GEMMA2_ERR_MISMATCH, "the first row's reason");
    gemma2_rewind(sound, 0);
    check(gemma2_eval_rows(rows, BAD + 4) == GEMMA2_ERR_ARGUMENT, "no session: the reason");
    for (int i = 0; i < BAD + 4; i++)
        check(rows[i].status == expected[i], "row %d: status %d", i, rows[i].status);
    check(gemma2_position(sound) == 2 && !logits_differ(x.m, logits, truth, 0) &&
              !logits_differ(x.m, logits + vocab(x.m), truth, 1), "the rows that can be done");
    check(gemma2_position(full) == 1 && !gemma2_position(cancelled) && !gemma2_position(small) &&
              !gemma2_position(foreign) && !gemma2_position(wrong), "the others stay");
    rows[1].session = rows[9].session = NULL;
    check(gemma2_eval_rows(rows, 2) == GEMMA2_ERR_ARGUMENT && rows[1].status < 0, "no sessions");
    check(gemma2_eval_rows(rows + 2, 1) == GEMMA2_OK, "a session alone is of its own model");
    gemma2_session_free(full), gemma2_session_free(cancelled), gemma2_session_free(small);
    gemma2_session_free(sound), gemma2_session_free(wrong), gemma2_session_free(foreign);
    free(truth), free(logits);
    unmake(&x), unmake(&y);
}

/* Workers that cannot be, and sessions of another model's. */
static void test_worker_params(void)
{
    static const struct {
        gemma2_worker_params p;
        int legal;
    } cases[] = {
        {{sizeof(gemma2_worker_params), 0, 0, 0, NULL, NULL}, 1},
        {{sizeof(gemma2_worker_params), -1, 0, 0, NULL, NULL}, 0},
        {{sizeof(gemma2_worker_params), 4097, 1, 0, NULL, NULL}, 0},
        {{sizeof(gemma2_worker_params), 4096, 1, 0, NULL, NULL}, 1},
        {{sizeof(gemma2_worker_params), 1, -1, 0, NULL, NULL}, 0},
        {{sizeof(gemma2_worker_params), 1, 1025, 0, NULL, NULL}, 0},
        {{sizeof(gemma2_worker_params), 1, 1, -1, NULL, NULL}, 0},
        {{sizeof(gemma2_worker_params), 1, 1, (1 << 30) + 1, NULL, NULL}, 0},
        {{0, 1, 1, 1, NULL, NULL}, 0}, {{10, 1, 1, 1, NULL, NULL}, 0},
        {{~0u, 1, 1, 1, NULL, NULL}, 0}, {{8, 1, -1, -1, NULL, NULL}, 1}};
    struct model x = make(&shapes[0]), y = make(&shapes[1]);
    gemma2_plan plan;
    char err[256];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        err[0] = 0;
        gemma2_worker *work = gemma2_worker_new(x.m, &cases[i].p, err, sizeof err);
        check(!!work == cases[i].legal && !work == !!err[0], "worker params %zu", i);
        check(gemma2_worker_plan(x.m, &cases[i].p, &plan) ==
                  (cases[i].legal ? GEMMA2_OK : GEMMA2_ERR_ARGUMENT), "worker params %zu: plan", i);
        gemma2_worker_free(work);
    }
    gemma2_worker *work = gemma2_worker_new(y.m, NULL, NULL, 0);
    gemma2_session_params p = {.struct_size = sizeof p, .worker = work};
    err[0] = 0;
    check(gemma2_session_plan(x.m, &p, &plan) == GEMMA2_ERR_MISMATCH &&
              !gemma2_session_new(x.m, &p, err, sizeof err) && strstr(err, "another model"),
          "a worker of another model: %s", err);
    err[0] = 0;
    check(!gemma2_worker_new(NULL, NULL, err, sizeof err) && err[0] &&
              gemma2_worker_plan(NULL, NULL, &plan) == GEMMA2_ERR_ARGUMENT &&
              gemma2_worker_plan(x.m, NULL, NULL) == GEMMA2_ERR_ARGUMENT, "worker: NULL");
    gemma2_worker_params_init(NULL), gemma2_worker_free(NULL);
    gemma2_worker_free(work);
    fail_allocation(1);
    err[0] = 0;
    check(!gemma2_worker_new(x.m, NULL, err, sizeof err) && strstr(err, "memory"),
          "no memory for a worker: %s", err);
    alloc_fails_at = 0;
    unmake(&x), unmake(&y);
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
    for (int cache = 1; cache <= 3; cache++)
        for (int k = cache - 1; k < 7; k += 3) {
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
            rows[i] = row_of(s[(i / 2 + lead) % 2], 0, logits + (size_t)i * vocab(x.m));
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

/* ---- traps of Gemma 2, where a direct test is cheap (the others: golden.c) ---- */

/* In a local layer of window W, position p sees p - W + 1 and not p - W.  In a global layer it
 * sees all. */
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
    gemma2_row rows[2] = {row_of(s, ids[n - 1], logits), row_of(s, ids[n], logits)};
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

/* Each layer's own bit decides whether its cache holds the context or a window. */
static void test_layer_kinds(void)
{
    struct model x = make(&shapes[MIXED]);
    gemma2_session *s = start(x.m, (struct setup){64, 4, 1, 0, 0});
    for (uint32_t l = 0; l < shapes[MIXED].layers; l++)
        check(s->cache[l].slots == (shapes[MIXED].local >> l & 1 ? 16 + 16 : 64),
              "layer %u: slots, with those of drafts", l);
    gemma2_session_free(s);
    unmake(&x);
}

/* Bytes of a cache: of a local layer the window and a batch, where the context is not less. */
static void test_plans(void)
{
    static const int32_t contexts[] = {1, 10, 17, 64};
    for (int i = 0; i < N_SHAPES * 4 * 3 * 2; i++) {
        const struct shape *s = &shapes[i % N_SHAPES];
        struct model x = make(s);
        gemma2_session_params p;
        gemma2_plan plan = {0, 0, 0, 0};
        gemma2_session_params_init(&p);
        p.n_context = contexts[i / N_SHAPES % 4], p.n_threads = 1;
        p.n_batch = i / (N_SHAPES * 12) ? 20 : 1;
        p.cache_type = GEMMA2_CACHE_F32 + i / (N_SHAPES * 4) % 3;
        uint64_t want = 0, number = (uint64_t[]){4, 2, 1}[p.cache_type - GEMMA2_CACHE_F32];
        uint64_t scales = p.cache_type == GEMMA2_CACHE_Q8 ? (s->h + 31) / 32 * 2 : 0;
        for (uint32_t l = 0; l < s->layers; l++) {
            int wraps = s->local >> l & 1 && 8 + p.n_batch < p.n_context;
            int32_t slots = wraps ? 8 + p.n_batch + 16 : p.n_context; /* 16 for drafts */
            uint64_t heads = ((uint64_t)slots + 15) / 16 * 16 * s->k, wide = (s->h + 15) / 16 * 16;
            want += (heads * (number * s->h + scales) + 63) / 64 * 64;
            want += (heads * (number * wide + scales) + 63) / 64 * 64;
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
            rewind_walk(x.m, (struct setup){40, batch, 1, 8, batch / 2 % 4}, &refused, &bad);
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
    gemma2_row rows[4] = {row_of(s, 1, NULL), row_of(s, 1, NULL), row_of(s, 1, NULL),
                          row_of(s, 1, NULL)};
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
        check(eval_row(t, bad_ids[2], NULL) == GEMMA2_ERR_TOKEN,
              "row id");
    }
    check(gemma2_score(s, ids, 1, v, logprobs) == GEMMA2_ERR_TOKEN, "score: next");
    check(gemma2_score(s, ids, 1, -2, logprobs) == GEMMA2_ERR_ARGUMENT, "score: next -2");
    check(gemma2_score(s, ids, 1, 1, NULL) == GEMMA2_ERR_ARGUMENT, "score: no room");
    check(gemma2_eval_rows(rows, 0) == GEMMA2_ERR_ARGUMENT, "no rows");
    check(gemma2_eval_rows(NULL, 1) == GEMMA2_ERR_ARGUMENT, "NULL rows");
    check(gemma2_eval_rows(rows, 4) == GEMMA2_ERR_ARGUMENT &&
              rows[3].status == GEMMA2_ERR_ARGUMENT, "more rows than n_batch");
    gemma2_session *wide = start(x.m, (struct setup){12, 8, 1, 0, 0});
    gemma2_row many[4] = {row_of(wide, 1, NULL), row_of(t, 1, NULL), row_of(t, 1, NULL),
                          row_of(t, 1, NULL)};
    check(gemma2_eval_rows(many, 4) == GEMMA2_ERR_ARGUMENT && many[0].status == GEMMA2_OK &&
              many[1].status == GEMMA2_ERR_ARGUMENT, "3 rows of a session of n_batch 2");
    check(gemma2_position(t) == 0 && gemma2_position(wide) == 1, "refused rows count");
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
{{24, -1, 0, 0, 0, 0, NULL}, 0}, {{24, (1 << 30) + 1, 1, 0, 0, 0, NULL}, 0},
        {{24, 1, 0, 0, 0, 0, NULL}, 1}, {{24, 8, -1, 0, 0, 0, NULL}, 0},
        {{24, 8, 4097, 0, 0, 0, NULL}, 0}, {{24, 8, 4096, 0, 0, 0, NULL}, 1},
        {{24, 8, 0, -1, 0, 0, NULL}, 0}, {{24, 8, 0, 1025, 0, 0, NULL}, 0},
        {{24, 8, 0, 1024, 0, 0, NULL}, 1}, {{24, 8, 0, 0, -1, 0, NULL}, 0},
        {{24, 8, 0, 0, 9, 0, NULL}, 0}, {{24, 8, 0, 0, 8, 0, NULL}, 1},
        {{24, 8, 0, 0, 0, 4, NULL}, 0}, {{24, 8, 0, 0, 0, -1, NULL}, 0},
        {{24, 8, 0, 0, 0, 3, NULL}, 1}, {{0, 8, 0, 0, 0, 0, NULL}, 0},
        {{~0u, 8, 0, 0, 0, 0, NULL}, 0}, {{8, 8, -1, -1, -1, -1, NULL}, 1},
        {{22, 8, 0, 0, 0, 0, NULL}, 0}, {{24, 0, 0, 0, 0, 0, NULL}, 1},
        {{24, 100, 0, 0, 0, 0, NULL}, 1},
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
        p.n_context = 20, p.n_batch = 5, p.n_threads = 1, p.cache_type = i % 4;
        random_ids(x.m, ids, 20);
        float *truth = step_by_step(x.m, (struct setup){20, 1, 1, 0, p.cache_type}, ids, 20);
        float *logits = fresh(vocab(x.m) * sizeof *logits);
        check(gemma2_session_plan(x.m, &p, &plan) == GEMMA2_OK, "plan");
        char *memory = fresh(plan.total);
        memset(memory, 0xff, plan.total); /* NaN, in every cache type */
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

/* A key that is not finite never comes back with another sign: in halves it saturates, in 8 bits
 * it becomes NaN, which no row can mistake for a score. */
static void test_endless_keys(void)
{
    static const float ends[] = {INFINITY, -INFINITY, NAN};
    struct model x = make(&shapes[0]);
    size_t h = (size_t)x.m->config.head_dim;
    for (int type = GEMMA2_CACHE_F32; type <= GEMMA2_CACHE_Q8; type++)
        for (int k = 0; k < 3; k++) {
            gemma2_session *s = start(x.m, (struct setup){20, 4, 1, 0, type});
            float key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
            for (size_t i = 0; i < h; i++)
                key[i] = value[i] = (float)(i + 1) / 8;
            key[1] = ends[k];
            store_head(s, 0, 0, 3, key, value);
            float got = cached(s, 0, 0, 'k', 3, 1), first = cached(s, 0, 0, 'k', 3, 0);
            int is_same = k < 2 && (got < 0) == (ends[k] < 0) && fabsf(got) >= 65504 && first > 0;
            check(isnan(got) || is_same, "cache type %d holds %g as %g", type, ends[k], got);
            gemma2_session_free(s);
        }
    unmake(&x);
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
        merge_partial(&scalar_kernels, &parts[0], out[0], &parts[1], out[1], 2);
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
        rows[t] = row_of(large, ids[t], got + t * V);
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

/* What depends on the instruction set. */
static void test_model_on_rows(void)
{
    test_matrix_models();
    test_matrix_declined();
    test_models_on_rows();
    test_reference();
}

static void test_model(void)
{
    test_chunks();
    test_kept();
    test_hook();
    test_shared_passes();
    test_shared_worker();
    test_worker_params();
    test_mixed_classes();
    test_rows_refused();
    test_scales();
    test_layer_kinds();
    test_plans();
    test_rewind();
    test_rewind_edges();
    test_refused_calls();
    test_session_params();
    test_placed();
    test_endless_keys();
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
