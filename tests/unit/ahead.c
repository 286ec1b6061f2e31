/* Section 7, speculation: whatever is guessed, every call gives what it gives without guesses. */

enum { TOLD = 70 };

/* All that a run of the teller below shows, to the bit. */
struct told {
    int32_t ids[TOLD], status[TOLD], positions[TOLD];
    float *logits; /* [TOLD][V] */
    uint8_t saved[1 << 18];
    int64_t n_saved;
    uint64_t rng;
};

/* A proposer that knows what will be asked for, and says something else now and then; or one
 * that breaks every rule but its buffer. */
struct oracle {
    const struct told *truth;
    int step, hostile;
};

static int32_t guess(void *context, const int32_t *history, int32_t n, int32_t *ids, int32_t most)
{
    const struct oracle *o = context;
    (void)history;
    for (int32_t i = 0; i < most; i++) {
        int at = o->step + 1 + i;
        ids[i] = at < TOLD && below(5) ? o->truth->ids[at] : (int32_t)below(70);
        if (o->hostile && below(3) == 0)
            ids[i] = below(2) ? INT32_MIN + (int32_t)below(9) : INT32_MAX - n;
    }
    return o->hostile ? (int32_t)below(4 * TOLD) - TOLD : most;
}

/* What may happen between two tokens of a reply. */
static void disturb(gemma2_session **s, gemma2_session **other, int32_t id, int event)
{
    static uint8_t saved[1 << 18];
    gemma2_session *before = *s;
    switch (event) {
    case 0:
        gemma2_rewind(*s, max_i32(gemma2_position(*s) - 3, 0));
        break;
    case 1:
        check(gemma2_session_copy(*other, *s) == GEMMA2_OK, "ahead: copy");
        *s = *other, *other = before;
        break;
    case 2: {
        int64_t n = gemma2_session_save(*s, saved, sizeof saved);
        check(n > 0 && gemma2_session_restore(*s, saved, (size_t)n) == GEMMA2_OK, "ahead: restore");
        break;
    }
    case 3:
        gemma2_eval(*s, &id, 1, NULL);
        break;
    default:
        break;
    }
}

/* A reply with disturbances, with or without guesses. */
static void tell_ahead(const gemma2_model *m, struct setup o, gemma2_ahead *a,
                       struct oracle *oracle, gemma2_sampler sampler, struct told *t)
{
    gemma2_session *s = start(m, o), *other = start(m, o);
    int32_t prompt[] = {2, 7, 9, 7, 9, 7};
    uint64_t events = sampler.rng | 1;
    size_t v = vocab(m);
    check(gemma2_prefill(s, prompt, 6, t->logits) == GEMMA2_OK, "ahead: prompt");
    for (int i = 0; i < TOLD; i++) {
        float *logits = t->logits + (size_t)i * v;
        if (i)
            memcpy(logits, logits - v, v * sizeof *logits);
        int32_t id = t->ids[i] = gemma2_sample(s, &sampler, logits);
        int event = (int)(pcg32(&events) % 24), is_cut = event == 5;
        if (oracle)
            oracle->step = i;
        disturb(&s, &other, id, event);
        gemma2_cancel(s, is_cut);
        for (int again = 0; again <= is_cut; again++, gemma2_cancel(s, 0))
            t->status[i] = a ? gemma2_eval_ahead(s, a, id, event == 6 ? NULL : logits)
                             : gemma2_eval(s, &id, 1, event == 6 ? NULL : logits);
        t->positions[i] = gemma2_position(s);
    }
    t->rng = sampler.rng;
    t->n_saved = gemma2_session_save(s, t->saved, sizeof t->saved);
    gemma2_session_free(s), gemma2_session_free(other);
}

static int told_differ(const struct told *a, const struct told *b, size_t v)
{
    return memcmp(a->ids, b->ids, sizeof a->ids) ||
           memcmp(a->status, b->status, sizeof a->status) ||
           memcmp(a->positions, b->positions, sizeof a->positions) || a->rng != b->rng ||
           memcmp(a->logits, b->logits, TOLD * v * sizeof *a->logits) ||
           a->n_saved != b->n_saved || memcmp(a->saved, b->saved, (size_t)a->n_saved);
}

/* Every proposer against none: guesses of a known future, hostile guesses, lookup, and the same
 * model as a draft. */
static void all_guesses(const gemma2_model *m, struct setup o, gemma2_sampler sampler,
                        gemma2_ahead_counts *sum)
{
    static struct told truth, told;
    size_t v = vocab(m);
    truth.logits = fresh(TOLD * v * sizeof(float)), told.logits = fresh(TOLD * v * sizeof(float));
    tell_ahead(m, o, NULL, NULL, sampler, &truth);
    gemma2_session *draft = start(m, (struct setup){48, 7, 1, 0, 0});
    for (int kind = 0; kind < 5; kind++) {
        struct oracle oracle = {&truth, 0, kind == 1};
        gemma2_ahead_params p;
        gemma2_ahead_counts counts = {0, 0, 0};
        gemma2_ahead_params_init(&p);
        p.lookup = kind >= 2 && kind != 4;
        p.n_drafts = kind == 3 ? 0 : 1 + (int32_t)below(15);
        if (kind < 2)
            p.propose = guess, p.context = &oracle;
        if (kind == 4)
            p.draft = draft;
        gemma2_ahead *a = gemma2_ahead_new(m, &p, NULL, 0);
        if (!check(a != NULL, "ahead %d", kind))
            continue;
        tell_ahead(m, o, a, &oracle, sampler, &told);
        check(!told_differ(&truth, &told, v), "guesses of kind %d change a result", kind);
        check(gemma2_ahead_count(a, &counts) == GEMMA2_OK && counts.accepted <= counts.drafted,
              "ahead %d: counts", kind);
        sum[kind].passes += counts.passes, sum[kind].drafted += counts.drafted;
        sum[kind].accepted += counts.accepted;
        gemma2_ahead_free(a);
    }
    gemma2_session_free(draft);
    free(truth.logits), free(told.logits);
}

static void test_guesses(void)
{
    gemma2_ahead_counts sum[5] = {{0, 0, 0}};
    for (int i = 0; i < N_SHAPES * (full_test() ? 24 : 6); i++) {
        struct model x = make(&shapes[i % N_SHAPES]);
        struct setup o = {i % 4 ? 64 : 30, 1 + 6 * (i % 5), 1 + i % 2, 0, 1 + (int)below(3)};
        gemma2_bias bias[] = {{7, 2}, {9, -INFINITY}};
        gemma2_sampler sampler;
        gemma2_sampler_init(&sampler, (uint64_t)i);
        sampler.temperature = i % 3 ? 1 : 0;
        sampler.top_k = i % 2 ? 5 : 0;
        if (i % 5 == 1)
            sampler.repetition_penalty = 1.3f, sampler.frequency_penalty = 0.2f;
        if (i % 5 == 2)
            sampler.bias = bias, sampler.n_bias = 2;
        all_guesses(x.m, o, sampler, sum);
        unmake(&x);
    }
    for (int kind = 0; kind < 5; kind++) /* each way of guessing was put to the test */
        check(kind == 3 || sum[kind].accepted > 0, "guesses of kind %d: %llu accepted", kind,
              (unsigned long long)sum[kind].accepted);
    check(sum[0].accepted > sum[0].passes / 2, "a known future saves passes");
}

/* Lookup finds what repeats, as far as it goes and beyond its end, and nothing else. */
static void test_lookup(void)
{
    struct model x = make(&shapes[0]);
    gemma2_ahead *a = gemma2_ahead_new(x.m, NULL, NULL, 0);
    int32_t ids[64], out[15];
    int match = -1;
    for (int32_t i = 0; i < 20; i++)
        ids[i] = i + 5;
    check(find_match(a, ids, 20, &match) == 0, "nothing repeats");
    ids[20] = 8, ids[21] = 9;
    check(find_match(a, ids, 22, &match) == 5 && match == 3, "two tokens again");
    ids[22] = 10;
    check(find_match(a, ids, 23, &match) == 6 && match == 2, "three tokens again");
    ids[22] = 50; /* another end: what is gone is not found */
    check(find_match(a, ids, 23, &match) == 0, "a match taken back");
    a->adapts = 0;
    for (int32_t i = 0; i < 9; i++)
        ids[i] = i % 3;
    check(make_guesses(a, ids, 9, out, 15) == 15, "a loop");
    for (int32_t i = 0; i < 15; i++)
        check(out[i] == i % 3, "the loop's %d. guess", i);
    gemma2_ahead_free(a);
    unmake(&x);
}

/* Seconds that n tokens take where a row costs 1 and 0.1 more with each draft, and a guess comes
 * true with such a chance.  Counted, not measured. */
static double spend(gemma2_ahead *a, int n, double chance)
{
    double seconds = 0;
    for (int held = 0; held < n;) {
        int32_t drafts = choose_drafts(a, a->source, 15), right = 1;
        note_pass(a, drafts, 1 + 0.1 * drafts);
        seconds += 1 + 0.1 * drafts;
        held++;
        for (int32_t i = 0; i < drafts && right; i++, held += right)
            note_answer(a, right = (int)below(1000) < chance * 1000);
    }
    return seconds;
}

/* The number of drafts follows chance and cost.  Wrong guesses lose less than 1 % of the time, and
 * right ones are still found after many wrong ones. */
static void test_choice(void)
{
    struct model x = make(&shapes[0]);
    gemma2_ahead *a = gemma2_ahead_new(x.m, NULL, NULL, 0);
    struct guesses g = {0.9, 0};
    check(choose_drafts(a, &g, 15) == 0, "no cost is known");
    note_pass(a, 0, 40); /* the first pass reads the file */
    note_pass(a, 0, 1);
    double lost = spend(a, 126, 0) - 126, more = spend(a, 4000, 0) - 4000;
    check(lost > 0.1 && lost < 1.26, "%.2f of 126 passes are lost", lost);
    check(more > 1 && more < 20, "%.2f of 4000 passes are lost", more);
    check(spend(a, 60, 1) < 55, "right guesses are found");
    spend(a, 100, 0.9);
    double best = spend(a, 20000, 0.9) / 20000, good = spend(a, 20000, 0.7) / 20000;
    check(best < 0.33 && good < 0.55, "%.3f passes a token at 90 %%, %.3f at 70 %%", best, good);
    a->balance = 4;
    int32_t many = choose_drafts(a, &g, 15);
    g.chance = 0.4;
    int32_t few = choose_drafts(a, &g, 15);
    check(many > few && few >= 1, "%d drafts at 0.9, %d at 0.4", many, few);
    g.seconds = 0.5;
    check(choose_drafts(a, &g, 15) < few, "guesses that cost time");
    note_pass(a, 1, 90);
    check(a->cost[2] < 1.3, "a pass that waited says little: %.2f", a->cost[2]);
    gemma2_ahead_free(a);
    unmake(&x);
}

static void test_ahead_refuses(void)
{
    struct model x = make(&shapes[0]), y = make(&shapes[1]);
    gemma2_session *s = start(x.m, (struct setup){8, 4, 1, 0, 0});
    gemma2_session *other = start(y.m, (struct setup){8, 4, 1, 0, 0});
    char err[256] = "";
    gemma2_ahead_params p;
    gemma2_ahead_counts counts;
    gemma2_ahead_params_init(NULL);
    gemma2_ahead_params_init(&p);
    p.draft = other;
    check(!gemma2_ahead_new(x.m, &p, err, sizeof err) && strstr(err, "vocabulary"),
          "a draft with another vocabulary: %s", err);
    p.draft = s, p.propose = guess;
    check(!gemma2_ahead_new(x.m, &p, NULL, 0), "two proposers");
    p.draft = NULL;
    for (int i = 0; i < 4; i++) {
        gemma2_ahead_params bad = p;
        if (i < 2)
            bad.n_drafts = i ? 16 : -1;
        else
            bad.n_context = i == 2 ? -1 : INT32_MAX;
        check(!gemma2_ahead_new(x.m, &bad, err, sizeof err) && !gemma2_ahead_bytes(x.m, &bad),
              "ahead params %d", i);
    }
    check(!gemma2_ahead_new(NULL, NULL, err, sizeof err) && !gemma2_ahead_bytes(NULL, NULL),
          "no model");
    fail_allocation(1);
    check(!gemma2_ahead_new(x.m, NULL, err, sizeof err) && strstr(err, "memory"), "no memory");
    alloc_fails_at = 0;
    gemma2_ahead *a = gemma2_ahead_new(x.m, NULL, NULL, 0);
    check(gemma2_eval_ahead(NULL, a, 2, NULL) == GEMMA2_ERR_ARGUMENT, "no session");
    check(gemma2_eval_ahead(s, NULL, 2, NULL) == GEMMA2_ERR_ARGUMENT, "no ahead");
    check(gemma2_eval_ahead(other, a, 2, NULL) == GEMMA2_ERR_MISMATCH, "another model's session");
    check(gemma2_eval_ahead(s, a, -1, NULL) == GEMMA2_ERR_TOKEN, "id -1");
    check(gemma2_ahead_count(NULL, &counts) == GEMMA2_ERR_ARGUMENT &&
              gemma2_ahead_count(a, NULL) == GEMMA2_ERR_ARGUMENT, "counts");
    gemma2_ahead_free(a), gemma2_ahead_free(NULL);
    gemma2_session_free(s), gemma2_session_free(other);
    unmake(&x), unmake(&y);
}

static void test_ahead(void)
{
    test_guesses();
    test_lookup();
    test_choice();
    test_ahead_refuses();
}
