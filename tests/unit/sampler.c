/* Section 6, the sampler. */

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

struct candidate {
    float logit;
    int32_t id;
};

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
        check((gemma2_sample(s, &ok, logits) == GEMMA2_ERR_NONFINITE) == (i < 2) &&
                  gemma2_sample(s, &ok, logits) != v - 1, "logits with %g", value[i]);
        check(gemma2_logprob(logits, (size_t)v, 0, &logprob) ==
                  (i < 2 ? GEMMA2_ERR_NONFINITE : GEMMA2_OK), "logprob beside %g", value[i]);
        logits[i * (v - 1) / 2] = 0;
    }
}

/* One of two equal tokens has the half that top_p asks for: the lower id. */
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
