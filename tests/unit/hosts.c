/* A session as a host program treats it: cancelled, copied, saved and restored, forked,
 * used from threads, signal handlers and a host's own parallel regions, called with NULL.
 * It takes a second or two. */
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* While a session stands here, it is cancelled in that layer of that pass. */
static struct {
    gemma2_session *session;
    int pass, layer, passes, layers_after;
} cancelling;

static void watch_layer(void *context, const gemma2_activation *a)
{
    (void)context;
    if (!cancelling.session || strcmp(a->name, "attn_norm"))
        return;
    cancelling.layers_after += cancelling.session->cancelled != 0;
    cancelling.passes += a->layer == 0;
    if (cancelling.passes == cancelling.pass && a->layer == cancelling.layer)
        gemma2_cancel(cancelling.session, 1);
}

/* Cancels the three sessions at context in the first layer, and counts the layers that follow. */
static void cancel_all(void *context, const gemma2_activation *a)
{
    gemma2_session **s = context;
    cancelling.layers_after += !strcmp(a->name, "attn_norm") && s[0]->cancelled;
    for (int i = 0; i < 3; i++)
        gemma2_cancel(s[i], 1);
}

static void cancel_in(gemma2_session *s, int pass, int layer)
{
    cancelling.session = s, cancelling.pass = pass, cancelling.layer = layer;
    cancelling.passes = cancelling.layers_after = 0;
    gemma2_set_hook(s, watch_layer, NULL);
}

/* ---- What a host may get wrong: NULL, struct sizes ---- */

static void test_null_model(const gemma2_model *m)
{
    char err[256] = "", text[8];
    size_t size = 7;
    int32_t id = 0;
    gemma2_plan plan;
    gemma2_section section;
    gemma2_input input;
    double sum = 0;
    gemma2_utf8 hold = {{0}, 0};
    check(!gemma2_open(NULL, NULL, err, sizeof err) && err[0], "open NULL");
    check(!gemma2_open(NULL, NULL, NULL, 0), "open NULL without a buffer");
    err[0] = err[1] = 'x';
    check(!gemma2_open("none", NULL, err, 1) && !err[0] && err[1] == 'x', "err of one byte");
    check(!gemma2_open("none", NULL, err, 0) && !err[0], "err of no bytes");
    err[0] = 0;
    check(!gemma2_open_memory(NULL, 9, NULL, err, sizeof err) && err[0], "open no memory");
    gemma2_close(NULL), gemma2_session_free(NULL);
    gemma2_open_params_init(NULL), gemma2_session_params_init(NULL), gemma2_sampler_init(NULL, 1);
    check(!gemma2_get_config(NULL) && !gemma2_is_stop(NULL, 1), "no model: config, stop");
    check(!gemma2_fact(NULL, "name", &size) && size == 0, "no model: fact");
    check(!gemma2_fact(m, NULL, &size) && !gemma2_fact(m, "name", NULL), "fact: NULL");
    check(gemma2_get_input(NULL, 0, &input) == 0 && gemma2_get_input(m, 0, NULL) == 0 &&
              gemma2_importance(NULL, &id, 1, 1, &sum) == GEMMA2_ERR_ARGUMENT, "importance: NULL");
    check(gemma2_get_section(NULL, 0, &section) == 0 && gemma2_get_section(m, 0, NULL) == 0,
          "section: NULL");
    check(gemma2_check(NULL, 0, err, sizeof err) == GEMMA2_ERR_ARGUMENT &&
              gemma2_check(m, 0, NULL, 0) == 1, "check: NULL");
    check(gemma2_session_plan(NULL, NULL, &plan) == GEMMA2_ERR_ARGUMENT &&
              gemma2_session_plan(m, NULL, NULL) == GEMMA2_ERR_ARGUMENT, "plan: NULL");
    err[0] = 0;
    check(!gemma2_session_new(NULL, NULL, err, sizeof err) && err[0], "session of no model");
    check(!gemma2_session_place(NULL, NULL, &plan, 64, NULL, 0), "session placed, of no model");
    check(gemma2_encode(NULL, "a", 1, 0, &id, 1, text, 8) == GEMMA2_ERR_ARGUMENT, "encode: NULL");
    check(gemma2_decode(NULL, &hold, 1, text, 8) == GEMMA2_ERR_ARGUMENT &&
              gemma2_decode(m, NULL, 1, text, 8) == GEMMA2_ERR_ARGUMENT &&
              gemma2_decode(m, &hold, 1, NULL, 8) == GEMMA2_ERR_ARGUMENT, "decode: NULL");
    check(!gemma2_piece(NULL, 1, &size, NULL) && gemma2_piece(m, 1, NULL, NULL), "piece: NULL");
}

static void test_null_session(const gemma2_model *m)
{
    int32_t id = 1;
    float x[128] = {0};
    gemma2_sampler sampler;
    gemma2_session *s = start(m, (struct setup){16, 4, 1, 0, 0});
    gemma2_sampler_init(&sampler, 1);
    check(gemma2_position(NULL) < 0 && gemma2_context(NULL) < 0 && !gemma2_history(NULL),
          "no session: position, context, history");
    check(gemma2_prefill(NULL, &id, 1, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_eval(NULL, &id, 1, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_score(NULL, &id, 1, 1, x) == GEMMA2_ERR_ARGUMENT, "no session: eval");
    check(gemma2_prefill(s, NULL, 1, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_score(s, NULL, 1, 1, x) == GEMMA2_ERR_ARGUMENT, "no ids");
    check(gemma2_read_out(NULL, NULL, NULL) == GEMMA2_ERR_ARGUMENT, "a state of no session");
    check(gemma2_states(NULL, &id, 1, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_states(s, NULL, 1, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_states(s, &id, 1, NULL) == GEMMA2_ERR_ARGUMENT &&
              gemma2_scores(s, x, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_scores(NULL, x, x) == GEMMA2_ERR_ARGUMENT, "no states, no scores");
    check(gemma2_set_hook(NULL, NULL, NULL) == GEMMA2_ERR_ARGUMENT &&
              eval_row(NULL, 1, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_importance(s, &id, 1, 1, NULL) == GEMMA2_ERR_ARGUMENT,
          "NULL: hook, row, sums");
    check(gemma2_rewind(NULL, 0) == GEMMA2_ERR_ARGUMENT &&
              gemma2_cancel(NULL, 1) == GEMMA2_ERR_ARGUMENT, "no session: rewind, cancel");
    check(gemma2_session_copy(NULL, s) == GEMMA2_ERR_ARGUMENT &&
              gemma2_session_copy(s, NULL) == GEMMA2_ERR_ARGUMENT, "copy: NULL");
    check(gemma2_session_save(NULL, x, sizeof x) == GEMMA2_ERR_ARGUMENT, "save: NULL");
    check(gemma2_session_restore(NULL, x, sizeof x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_session_restore(s, NULL, 9) == GEMMA2_ERR_ARGUMENT, "restore: NULL");
    check(gemma2_sample(NULL, &sampler, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_sample(s, NULL, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_sample(s, &sampler, NULL) == GEMMA2_ERR_ARGUMENT, "sample: NULL");
    check(gemma2_logprob(NULL, 1, 0, x) == GEMMA2_ERR_ARGUMENT &&
              gemma2_logprob(x, 1, 0, NULL) == GEMMA2_ERR_ARGUMENT, "logprob: NULL");
    check(gemma2_position(s) == 0 && gemma2_eval(s, &id, 1, x) == GEMMA2_OK, "usable after all");
    gemma2_session_free(s);
}

/* Without a next token the last log-probability is the caller's, whatever stands there. */
static void test_score_without_next(const gemma2_model *m)
{
    int32_t ids[6] = {1, 2, 3, 4, 5, 6};
    for (size_t n = 1; n <= 6; n++) {
        float scores[6] = {NAN, NAN, NAN, NAN, NAN, NAN};
        gemma2_session *s = start(m, (struct setup){16, 4, 1, 0, 0});
        check(gemma2_score(s, ids, n, -1, scores) == GEMMA2_OK && isnan(scores[n - 1]) &&
                  all_finite(scores, n - 1) && gemma2_position(s) == (int32_t)n,
              "scores of %zu tokens without a next one", n);
        gemma2_session_free(s);
    }
}

/* A params struct at the start of a larger struct, as a newer caller would pass it. */
struct newer_session {
    gemma2_session_params p;
    int32_t unknown;
};
struct newer_open {
    gemma2_open_params p;
    int32_t unknown;
};
struct newer_sampler {
    gemma2_sampler p;
    uint64_t unknown;
};
struct newer_ahead {
    gemma2_ahead_params p;
    void *unknown;
};

static int opens_with(const char *path, const gemma2_open_params *p)
{
    gemma2_model *m = gemma2_open(path, p, NULL, 0);
    gemma2_close(m);
    return m != NULL;
}

static void test_struct_sizes(const gemma2_model *m)
{
    struct newer_session s = {{0}, 0};
    struct newer_open o = {{0}, 0};
    struct newer_sampler a;
    gemma2_plan plan, full;
    float x[128] = {0};
    static const char demo[] = "tests/demo/story-q8.bin";
    gemma2_session_params_init(&s.p), gemma2_open_params_init(&o.p);
    check(s.p.struct_size == sizeof s.p && o.p.struct_size == sizeof o.p, "init sets struct_size");
    s.p.n_context = 40, s.p.n_batch = 4;
    gemma2_session_plan(m, &s.p, &full);
    s.p.struct_size = sizeof s;
    check(gemma2_session_plan(m, &s.p, &plan) == GEMMA2_OK && plan.total == full.total,
          "a newer caller that asks for nothing new");
    s.unknown = 1;
    check(gemma2_session_plan(m, &s.p, &plan) == GEMMA2_ERR_ARGUMENT &&
              !gemma2_session_new(m, &s.p, NULL, 0), "a newer caller's request is not overlooked");
    s.p.struct_size = 8, s.p.n_batch = -1; /* an older struct ended with n_context */
    gemma2_session *t = gemma2_session_new(m, &s.p, NULL, 0);
    check(t && gemma2_context(t) == 40 && t->n_batch == 40, "an older caller's struct");
    gemma2_session_free(t);
    s.p.struct_size = 10;
    check(gemma2_session_plan(m, &s.p, &plan) == GEMMA2_ERR_ARGUMENT, "half a member");
    s.p.n_batch = 4;
    gemma2_worker_params w = {.struct_size = offsetof(gemma2_worker_params, run) + 4};
    s.p.struct_size = offsetof(gemma2_session_params, worker) + 4;
    int half = sizeof(void *) == 8 ? GEMMA2_ERR_ARGUMENT : GEMMA2_OK;
    check(gemma2_session_plan(m, &s.p, &plan) == half && gemma2_worker_plan(m, &w, &plan) == half,
          "half a pointer");
    o.p.struct_size = sizeof o;
    check(opens_with(demo, &o.p), "open: newer struct");
    o.unknown = 1;
    check(!opens_with(demo, &o.p), "open: a newer request");
    o.p.struct_size = 8, o.p.exact_prefill = 7;
    check(opens_with(demo, &o.p), "open: older struct");
    t = start(m, (struct setup){16, 4, 1, 0, 0});
    memset(&a, 0, sizeof a);
    gemma2_sampler_init(&a.p, 1);
    a.p.struct_size = sizeof a;
    check(gemma2_sample(t, &a.p, x) >= 0, "sampler: newer struct");
    a.unknown = 1;
    check(gemma2_sample(t, &a.p, x) == GEMMA2_ERR_ARGUMENT, "sampler: a newer request");
    a.unknown = 0, a.p.allow = NULL;
    for (uint32_t size = 0; size < sizeof a.p; size++) {
        a.p.struct_size = size;
        if ((gemma2_sample(t, &a.p, x) < 0) == (size == offsetof(gemma2_sampler, allow)))
            check(0, "sampler: struct of %u bytes", size);
    }
    gemma2_session_free(t);
    struct newer_ahead h = {{0}, NULL};
    uint64_t bytes = gemma2_ahead_bytes(m, NULL);
    gemma2_ahead_params_init(&h.p);
    check(h.p.struct_size == sizeof h.p && gemma2_ahead_bytes(m, &h.p) == bytes, "ahead: init");
    h.p.struct_size = sizeof h;
    check(gemma2_ahead_bytes(m, &h.p) == bytes, "ahead: a newer caller that asks for nothing new");
    h.unknown = &h;
    check(!gemma2_ahead_bytes(m, &h.p) && !gemma2_ahead_new(m, &h.p, NULL, 0),
          "ahead: a newer request");
    h.p.n_context = h.p.lookup = -1; /* an older struct ended with n_drafts */
    h.p.struct_size = 8;
    check(gemma2_ahead_bytes(m, &h.p) == bytes, "ahead: older struct");
    h.p.struct_size = 10;
    check(!gemma2_ahead_bytes(m, &h.p), "ahead: half a member");
    h.p.n_context = 0, h.p.struct_size = offsetof(gemma2_ahead_params, draft) + 4;
    int refused = gemma2_ahead_bytes(m, &h.p) == 0;
    check(refused == (sizeof(void *) == 8), "ahead: half a pointer");
}

static void test_misuse(void)
{
    struct model x = make(&shapes[0]);
    test_null_model(x.m);
    test_null_session(x.m);
    test_score_without_next(x.m);
    test_struct_sizes(x.m);
    unmake(&x);
}

/* ---- Cancellation ---- */

static void test_cancel_holds(void)
{
    struct model x = make(&shapes[MIXED]);
    int32_t ids[12];
    float scores[12], *logits = fresh(vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, 12);
    float *truth = step_by_step(x.m, (struct setup){12, 3, 1, 0, 0}, ids, 12);
    gemma2_session *s = start(x.m, (struct setup){12, 3, 1, 0, 0});
    gemma2_eval(s, ids, 5, NULL);
    memset(logits, 0, vocab(x.m) * sizeof *logits);
    check(gemma2_cancel(s, 1) == GEMMA2_OK, "cancel");
    for (int again = 0; again < 2; again++) {
        check(gemma2_eval(s, ids + 5, 7, logits) == GEMMA2_ERR_CANCELLED &&
                  gemma2_prefill(s, ids + 5, 1, logits) == GEMMA2_ERR_CANCELLED &&
                  gemma2_score(s, ids + 5, 2, 1, scores) == GEMMA2_ERR_CANCELLED &&
                  eval_row(s, ids[5], logits) == GEMMA2_ERR_CANCELLED,
              "cancelled, and still");
        check(gemma2_position(s) == 5 && is_zero((uint8_t *)logits, vocab(x.m) * 4),
              "nothing came of it");
    }
    check(gemma2_eval(s, ids, 9, logits) == GEMMA2_ERR_CONTEXT, "errors come before");
    check(gemma2_cancel(s, 0) == GEMMA2_OK && gemma2_eval(s, ids + 5, 7, logits) == GEMMA2_OK &&
              !logits_differ(x.m, logits, truth, 11), "and goes on with the same bits");
    gemma2_session_free(s);
    free(truth), free(logits);
    unmake(&x);
}

/* Cancelled in each layer of each pass of a prompt, then finished, far behind the wrap. */
static void cancel_everywhere(const struct model *x, const char *name, int32_t batch)
{
    enum { N = 45 };
    int32_t ids[N];
    int layers = gemma2_get_config(x->m)->n_layers, bad = 0;
    float *logits = fresh(vocab(x->m) * sizeof *logits);
    random_ids(x->m, ids, N);
    float *truth = step_by_step(x->m, (struct setup){N, batch, 1, 0, 0}, ids, N);
    gemma2_session *s = start(x->m, (struct setup){N, batch, 1, 0, 0});
    for (int pass = 1; (pass - 1) * batch < N; pass++)
        for (int layer = 0; layer < layers; layer++) {
            gemma2_rewind(s, 0);
            cancel_in(s, pass, layer);
            bad += gemma2_eval(s, ids, N, logits) != GEMMA2_ERR_CANCELLED;
            bad += cancelling.layers_after != 0; /* none began after the cancelled one */
            bad += gemma2_position(s) != (pass - 1) * batch;
            cancelling.session = NULL;
            gemma2_cancel(s, 0);
            bad += gemma2_eval(s, ids + gemma2_position(s), (size_t)(N - gemma2_position(s)),
                               logits) != GEMMA2_OK;
            bad += logits_differ(x->m, logits, truth, N - 1);
        }
    check(!bad, "%s, n_batch %d: %d wrong after a cancellation", name, batch, bad);
    gemma2_session_free(s);
    free(truth), free(logits);
}

/* A shared pass goes on without the session that cancelled it, whose rows are named and do not
 * count.  If all sessions cancel, it ends at the layer that it is at. */
static void test_cancel_shared(void)
{
    struct model x = make(&shapes[4]);
    gemma2_session *s[3];
    gemma2_row rows[4];
    int32_t ids[3][9];
    float *truth[3], *logits = fresh(4 * vocab(x.m) * sizeof *logits);
    for (int i = 0; i < 3; i++) {
        random_ids(x.m, ids[i], 9);
        truth[i] = step_by_step(x.m, (struct setup){9, 4, 1, 0, 0}, ids[i], 9);
        s[i] = start(x.m, (struct setup){9, 4, 1, 0, 0});
        gemma2_eval(s[i], ids[i], 7, NULL);
    }
    for (int i = 0; i < 3; i++) { /* one more row than sessions: two rows are of session i */
        for (int k = 0; k < 4; k++) {
            int of = k < 3 ? k : i;
            gemma2_rewind(s[of], 7);
            rows[k] = row_of(s[of], ids[of][k < 3 ? 7 : 8], logits + (size_t)k * vocab(x.m));
        }
        gemma2_set_hook(s[0], watch_layer, NULL);
        cancel_in(s[i], 1, 1);
        check(gemma2_eval_rows(rows, 4) == GEMMA2_ERR_CANCELLED &&
                  rows[3].status == GEMMA2_ERR_CANCELLED && gemma2_position(s[i]) == 7,
              "a shared pass, cancelled by session %d", i);
        cancelling.session = NULL;
        for (int k = 0; k < 3; k++)
            check(rows[k].status == (k == i ? GEMMA2_ERR_CANCELLED : GEMMA2_OK) &&
                      gemma2_position(s[k]) == 7 + (k != i) &&
                      (k == i || !logits_differ(x.m, rows[k].logits, truth[k], 7)),
                  "cancelled by session %d: row %d", i, k);
        memset(logits, 0, 4 * vocab(x.m) * sizeof *logits);
        check(gemma2_eval_rows(rows + i, 1) == GEMMA2_ERR_CANCELLED &&
                  rows[i].status == GEMMA2_ERR_CANCELLED &&
                  is_zero((uint8_t *)rows[i].logits, vocab(x.m) * 4), "and before the pass");
        gemma2_cancel(s[i], 0);
    }
    for (int i = 0; i < 3; i++)
        gemma2_rewind(s[i], 7), rows[i].id = ids[i][7];
    cancelling.layers_after = 0;
    gemma2_set_hook(s[0], cancel_all, s);
    check(gemma2_eval_rows(rows, 3) == GEMMA2_ERR_CANCELLED && !cancelling.layers_after &&
              gemma2_position(s[2]) == 7, "a shared pass, cancelled by all");
    gemma2_set_hook(s[0], NULL, NULL);
    for (int i = 0; i < 3; i++)
        gemma2_cancel(s[i], 0);
    check(gemma2_eval_rows(rows, 3) == GEMMA2_OK, "the shared pass again");
    for (int i = 0; i < 3; i++) {
        check(!logits_differ(x.m, rows[i].logits, truth[i], 7), "session %d's logits", i);
        gemma2_session_free(s[i]), free(truth[i]);
    }
    free(logits);
    unmake(&x);
}

/* A cancelled pass counts as rewound: what can be gone back to is exact. */
static void test_cancel_rewind(void)
{
    struct model x = make(&shapes[0]);
    int32_t ids[40];
    float *logits = fresh(vocab(x.m) * sizeof *logits);
    int bad = 0, refused = 0;
    random_ids(x.m, ids, 40);
    float *truth = step_by_step(x.m, (struct setup){40, 12, 1, 0, 0}, ids, 40);
    for (int32_t to = 1; to < 28; to++) {
        gemma2_session *s = start(x.m, (struct setup){40, 12, 1, 0, 0});
        gemma2_eval(s, ids, 28, NULL);
        cancel_in(s, 1, 2);
        bad += gemma2_eval(s, ids + 28, 12, NULL) != GEMMA2_ERR_CANCELLED;
        cancelling.session = NULL;
        gemma2_cancel(s, 0);
        int status = gemma2_rewind(s, to);
        refused += status == GEMMA2_ERR_REWIND;
        int32_t from = status == GEMMA2_OK ? to : 28;
        bad += gemma2_eval(s, ids + from, (size_t)(40 - from), logits) != GEMMA2_OK ||
               logits_differ(x.m, logits, truth, 39);
        gemma2_session_free(s);
    }
    check(!bad && refused > 0 && refused < 27, "rewinds after a cancellation: %d wrong, %d refused",
          bad, refused);
    free(truth), free(logits);
    unmake(&x);
}

static gemma2_session *volatile interrupted;

static void on_alarm(int signal_number)
{
    (void)signal_number;
    gemma2_cancel(interrupted, 1);
}

static void *cancel_soon(void *session)
{
    usleep(2000);
    gemma2_cancel(session, 1);
    return NULL;
}

/* Evaluates until something cancels the session.  Returns 1 if a cancellation ended it. */
static int run_until_cancelled(gemma2_session *s)
{
    static int32_t ids[200];
    int status = GEMMA2_OK;
    for (int i = 0; status == GEMMA2_OK && i < 100000; i++) {
        gemma2_rewind(s, 0);
        status = gemma2_prefill(s, ids, 200, NULL);
    }
    gemma2_cancel(s, 0);
    return status == GEMMA2_ERR_CANCELLED && gemma2_position(s) % 16 == 0;
}

static void test_cancel_from_outside(void)
{
    struct model x = make(&long_shape);
    gemma2_session *s = start(x.m, (struct setup){200, 16, 1, 0, 0});
    struct sigaction action = {0}, before;
    struct itimerval soon = {{0, 0}, {0, 2000}};
    pthread_t thread;
    interrupted = s;
    action.sa_handler = on_alarm;
    sigaction(SIGALRM, &action, &before);
    setitimer(ITIMER_REAL, &soon, NULL);
    check(run_until_cancelled(s), "cancelled from a signal handler");
    sigaction(SIGALRM, &before, NULL);
    if (check(!pthread_create(&thread, NULL, cancel_soon, s), "a thread")) {
        check(run_until_cancelled(s), "cancelled from another thread");
        pthread_join(thread, NULL);
    }
    gemma2_session_free(s);
    unmake(&x);
}

static void test_cancel(void)
{
    test_cancel_holds();
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        for (int32_t batch = 4; batch <= 14; batch += 9)
            cancel_everywhere(&x, shapes[i].name, batch);
        unmake(&x);
    }
    test_cancel_shared();
    test_cancel_rewind();
    test_cancel_from_outside();
}

/* ---- Copies ---- */

enum { MOST = 60 };

/* Whether s, at some position, goes on as truth does, for more steps than a window has. */
static int goes_on_as(gemma2_session *s, const int32_t *ids, const float *truth)
{
    const gemma2_model *m = s->model;
    float *logits = fresh(vocab(m) * sizeof *logits);
    int32_t start = gemma2_position(s), end = min_i32(start + 11, MOST);
    int good = !memcmp(gemma2_history(s), ids, (size_t)start * sizeof *ids);
    for (int32_t at = start; at < end && good; at++)
        good = gemma2_eval(s, ids + at, 1, logits) == GEMMA2_OK &&
               !logits_differ(m, logits, truth, (size_t)at);
    free(logits);
    return good;
}

/* From every position a copy goes on, also after the deepest rewind that is allowed, and
 * allows none that the original refuses. */
static void copy_walk(const struct model *x, struct setup a, struct setup b, int *bad)
{
    int32_t ids[MOST];
    random_ids(x->m, ids, MOST);
    float *truth = step_by_step(x->m, a, ids, MOST);
    gemma2_session *from = start(x->m, a), *to = start(x->m, b);
    gemma2_eval(to, ids + 7, 41, NULL); /* what it holds goes */
    for (int32_t n = 0; n < MOST; n += 1 + n / 5) {
        gemma2_rewind(from, 0);
        if (n)
            gemma2_eval(from, ids, (size_t)n, NULL);
        for (int32_t back = 0; back <= n; back++) {
            *bad += gemma2_session_copy(to, from) != GEMMA2_OK || gemma2_position(to) != n;
            int status = gemma2_rewind(to, n - back);
            if (status == GEMMA2_OK && (back < 2 || back % 7 == 0))
                *bad += !goes_on_as(to, ids, truth);
            *bad += status != GEMMA2_OK && status != GEMMA2_ERR_REWIND;
            *bad += status == GEMMA2_OK && back && gemma2_session_copy(to, from) == GEMMA2_OK &&
                    gemma2_rewind(from, n - back) != GEMMA2_OK;
            if (gemma2_position(from) != n)
                gemma2_session_copy(from, to);
        }
        *bad += n && gemma2_position(from) != n;
    }
    gemma2_session_free(from), gemma2_session_free(to);
    free(truth);
}

static void test_copies(void)
{
    static const struct setup setups[][2] = {
        {{60, 4, 1, 0, 0}, {60, 4, 1, 0, 0}}, {{60, 30, 1, 0, 1}, {200, 1, 1, 0, 1}},
        {{60, 1, 1, 5, 2}, {61, 60, 1, 5, 2}}, {{64, 9, 1, 1, 3}, {60, 15, 1, 1, 3}},
        {{60, 4, 1, 0, 3}, {70, 23, 1, 0, 3}}};
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        for (size_t k = 0; k < sizeof setups / sizeof *setups; k++) {
            int bad = 0;
            copy_walk(&x, setups[k][0], setups[k][1], &bad);
            check(!bad, "%s, setups %zu: %d copies wrong", shapes[i].name, k, bad);
        }
        unmake(&x);
    }
}

static void test_copies_refused(void)
{
    struct model x = make(&shapes[0]), y = make(&shapes[1]), again = {x.image, NULL};
    again.m = open_image(&x.image);
    int32_t ids[MOST];
    random_ids(x.m, ids, MOST);
    float *truth = step_by_step(x.m, (struct setup){60, 4, 1, 0, 0}, ids, MOST);
    gemma2_session *s = start(x.m, (struct setup){60, 4, 1, 0, 0});
    gemma2_eval(s, ids, 30, NULL);
    struct {
        const gemma2_model *m;
        struct setup o;
        int status;
    } cases[] = {{x.m, {60, 4, 1, 7, 0}, GEMMA2_ERR_MISMATCH},
                 {x.m, {60, 4, 1, 0, 2}, GEMMA2_ERR_MISMATCH},
                 {y.m, {60, 4, 1, 0, 1}, GEMMA2_ERR_MISMATCH},
                 {x.m, {29, 4, 1, 0, 0}, GEMMA2_ERR_CONTEXT},
                 {x.m, {30, 4, 1, 0, 0}, GEMMA2_OK},
                 {again.m, {60, 4, 1, 0, 0}, GEMMA2_OK}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gemma2_session *t = start(cases[i].m, cases[i].o);
        gemma2_eval(t, (int32_t[]){1, 2}, 2, NULL);
        int status = gemma2_session_copy(t, s);
        check(status == cases[i].status && gemma2_position(t) == (status < 0 ? 2 : 30) &&
                  gemma2_history(t)[0] == (status < 0 ? 1 : ids[0]), "copy %zu: %d", i, status);
        gemma2_session_free(t);
    }
    check(gemma2_session_copy(s, s) == GEMMA2_OK && goes_on_as(s, ids, truth),
          "a copy onto itself");
    gemma2_session_free(s);
    free(truth);
    gemma2_close(again.m);
    unmake(&x), unmake(&y);
}

/* A ring made for any n_batch takes a prompt in one call and goes back the promised n_batch tokens
 * from its end. */
static void test_every_batch(void)
{
    struct model x = make(&shapes[0]);
    int32_t ids[MOST];
    int bad = 0;
    float *logits = fresh(vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, MOST);
    for (int32_t window = 2; window <= 8; window += 3) {
        float *truth = step_by_step(x.m, (struct setup){MOST, 1, 1, window, 0}, ids, MOST);
        for (int32_t batch = 1; batch < 50; batch++) {
            gemma2_session *s = start(x.m, (struct setup){MOST, batch, 1, window, 0});
            bad += gemma2_eval(s, ids, MOST, logits) != GEMMA2_OK ||
                   logits_differ(x.m, logits, truth, MOST - 1);
            bad += gemma2_rewind(s, MOST - batch) != GEMMA2_OK || !goes_on_as(s, ids, truth);
            gemma2_session_free(s);
        }
        free(truth);
    }
    check_none(bad, "windows and batches");
    free(logits);
    unmake(&x);
}

/* Sessions far into long contexts in one pass, their attention split over blocks of positions,
 * led by a session of a long context or of a short context. */
static void test_far_rows(void)
{
    enum { N = 1000, ROWS = 4, V = 40 };
    static const int32_t held[2][ROWS] = {{999, 770, 600, 999}, {3, 999, 2, 770}};
    static const int32_t contexts[2][ROWS] = {{N, N, 601, N}, {16, N, 16, N}};
    struct shape shape = long_shape;
    shape.n = 9, shape.k = 1; /* more than MAX_QUERIES heads share a kv head */
    struct model x = make(&shape);
    static float logits[ROWS][V], truth[V];
    int32_t ids[N];
    random_ids(x.m, ids, N);
    for (int i = 0; i < 2; i++) {
        gemma2_session *s[ROWS];
        gemma2_row rows[ROWS];
        for (int t = 0; t < ROWS; t++) {
            s[t] = start(x.m, (struct setup){contexts[i][t], 16, 3, 0, 0});
            gemma2_eval(s[t], ids, (size_t)held[i][t], NULL);
            rows[t] = row_of(s[t], ids[held[i][t]], logits[t]);
        }
        check(gemma2_eval_rows(rows, ROWS) == GEMMA2_OK, "far rows");
        for (int t = 0; t < ROWS; t++) {
            gemma2_session *alone = start(x.m, (struct setup){N, 256, 1, 0, 0});
            gemma2_eval(alone, ids, (size_t)held[i][t] + 1, truth);
            check(!memcmp(truth, logits[t], sizeof truth), "row %d of far ones, %d", t, i);
            gemma2_session_free(alone), gemma2_session_free(s[t]);
        }
    }
    unmake(&x);
}

/* ---- Saved sessions ---- */

static uint8_t *save(const gemma2_session *s, size_t *size)
{
    int64_t bytes = gemma2_session_save(s, NULL, 0);
    uint8_t *p = fresh(bytes > 0 ? (size_t)bytes : 1);
    *size = (size_t)bytes;
    check(bytes > 0 && gemma2_session_save(s, p, *size - 1) == GEMMA2_ERR_SPACE &&
              gemma2_session_save(s, p, *size) == bytes, "save");
    return p;
}

/* Saved at every few positions, restored into unlike sessions on one instruction set after
 * another. */
static void save_walk(const struct model *x, struct setup a, struct setup b, int *bad)
{
    static int row;
    int32_t ids[MOST];
    random_ids(x->m, ids, MOST);
    const struct kernels *best = x->m->isa;
    float *truth = step_by_step(x->m, a, ids, MOST);
    gemma2_session *from = start(x->m, a);
    for (int32_t n = 0, step = 1; n < MOST; n += step, step = 1 + n / 4) {
        size_t size;
        uint8_t *p = save(from, &size);
        gemma2_session *to = start(x->m, b);
        while (!all_kernels[++row % N_KERNELS]->available())
            ;
        x->m->isa = all_kernels[row % N_KERNELS];
        gemma2_eval(to, ids + 3, 50, NULL);
        *bad += gemma2_session_restore(to, p, size) != GEMMA2_OK || gemma2_position(to) != n;
        *bad += !goes_on_as(to, ids, truth);
        x->m->isa = best;
        gemma2_session_free(to);
        *bad += gemma2_eval(from, ids + n, (size_t)min_i32(step, MOST - n), NULL) != GEMMA2_OK;
        free(p);
    }
    gemma2_session_free(from);
    free(truth);
}

static void test_saves(void)
{
    static const struct setup setups[][2] = {
        {{60, 4, 1, 0, 0}, {60, 4, 1, 0, 0}}, {{60, 30, 1, 0, 1}, {200, 1, 1, 0, 1}},
        {{60, 15, 1, 5, 2}, {61, 60, 1, 5, 2}}, {{64, 9, 1, 1, 3}, {60, 15, 1, 1, 3}},
        {{60, 4, 1, 0, 3}, {70, 23, 1, 0, 3}}};
    for (int i = 0; i < N_SHAPES; i++) {
        struct model x = make(&shapes[i]);
        for (size_t k = 0; k < sizeof setups / sizeof *setups; k++) {
            int bad = 0;
            save_walk(&x, setups[k][0], setups[k][1], &bad);
            check(!bad, "%s, setups %zu: %d saves wrong", shapes[i].name, k, bad);
        }
        unmake(&x);
    }
}

/* Logits 5 tokens behind n that a session holds which was copied or restored into memory
 * full of that byte. */
static void go_on_in(uint8_t *memory, int byte, const gemma2_session *from, const uint8_t *saved,
                     size_t saved_bytes, const int32_t *ids, float *logits)
{
    gemma2_session_params p;
    gemma2_plan plan;
    gemma2_session_params_init(&p);
    p.n_context = from->n_context, p.n_batch = 8, p.n_threads = 1;
    p.cache_type = from->cache_type;
    gemma2_session_plan(from->model, &p, &plan);
    memset(memory, byte, (size_t)plan.total);
    gemma2_session *to = gemma2_session_place(from->model, &p, memory, (size_t)plan.total, NULL, 0);
    int status = saved ? gemma2_session_restore(to, saved, saved_bytes)
                       : gemma2_session_copy(to, from);
    status |= gemma2_prefill(to, ids + gemma2_position(to), 5, logits);
    if (status)
        check(0, "copied, restored or gone on: %d", status);
}

/* What a copied or restored session never wrote has no part in what follows, whatever the
 * memory held, on no row of kernels. */
static void test_memory_of_before(void)
{
    enum { N = 130, V = 40 };
    static const struct shape shape = {"wide", 2, 64, 4, 2, 32, 64, V, 15, N, 50, 30, 1, 0,
                                       {Q8, Q8, Q8, Q8, Q8}, 64};
    struct model x = make(&shape);
    const struct kernels *best = x.m->isa;
    const gemma2_open_params open = {.struct_size = sizeof open};
    int32_t ids[N];
    uint8_t *memory = fresh(1 << 20);
    float logits[2][V];
    random_ids(x.m, ids, N);
    for (size_t row = 0; row < N_KERNELS; row++) {
        int bad = 0;
        if (!all_kernels[row]->available())
            continue;
        x.m->isa = all_kernels[row];
        x.m->matrix = NULL;
        choose_matrix(x.m, &open);
        for (int32_t n = 80; n < 112; n++) { /* the window begins anywhere in 16 slots */
            int32_t cache = n < 96 ? GEMMA2_CACHE_F16 : GEMMA2_CACHE_Q8;
            gemma2_session *from = start(x.m, (struct setup){N, 1, 1, 0, cache});
            gemma2_eval(from, ids, (size_t)n, NULL);
            size_t size;
            uint8_t *saved = save(from, &size);
            for (int i = 0; i < 2; i++) {
                go_on_in(memory, 0, from, i ? saved : NULL, size, ids, logits[0]);
                go_on_in(memory, 0xff, from, i ? saved : NULL, size, ids, logits[1]);
                bad += memcmp(logits[0], logits[1], sizeof *logits) != 0;
            }
            gemma2_session_free(from);
            free(saved);
        }
        check(!bad, "%s: %d sessions know what their memory held", x.m->isa->name, bad);
    }
    free(memory);
    x.m->isa = best;
    unmake(&x);
}

/* A restored session rewinds as the saved session does, or refuses what its own ring lacks. */
static void test_saved_rewinds(void)
{
    struct model x = make(&shapes[MIXED]);
    int32_t ids[MOST];
    int bad = 0, allowed = 0;
    random_ids(x.m, ids, MOST);
    float *truth = step_by_step(x.m, (struct setup){60, 20, 1, 0, 0}, ids, MOST);
    gemma2_session *s = start(x.m, (struct setup){60, 20, 1, 0, 0});
    gemma2_eval(s, ids, 50, NULL);
    size_t size;
    uint8_t *p = save(s, &size);
    for (int32_t batch = 1; batch <= 41; batch += 20)
        for (int32_t to = 49; to > 0; to--) {
            gemma2_session *t = start(x.m, (struct setup){60, batch, 1, 0, 0});
            bad += gemma2_session_restore(t, p, size) != GEMMA2_OK;
            int status = gemma2_rewind(t, to);
            bad += batch == 21 && (status == GEMMA2_OK) != (to - 8 + 1 >= 50 - 32);
            allowed += status == GEMMA2_OK;
            bad += status == GEMMA2_OK ? !goes_on_as(t, ids, truth) : status != GEMMA2_ERR_REWIND;
            gemma2_session_free(t);
        }
    gemma2_session *full = start(x.m, (struct setup){50, 3, 1, 0, 0});
    check(gemma2_session_restore(full, p, size) == GEMMA2_OK && gemma2_position(full) == 50 &&
              gemma2_eval(full, ids, 1, NULL) == GEMMA2_ERR_CONTEXT, "a context just large enough");
    gemma2_session_free(full);
    check(!bad && allowed > 40, "rewinds of restored sessions: %d wrong, %d allowed", bad, allowed);
    free(p), free(truth);
    gemma2_session_free(s);
    unmake(&x);
}

static void put_digest(uint8_t *p, size_t size)
{
    struct sha256 s;
    sha256_init(&s);
    sha256_add(&s, p, 96);
    sha256_add(&s, p + 128, size - 128);
    sha256_end(&s, p + 96);
}

/* The layout, read as its table has it: ids, and values as the cache has them. */
static void test_saved_layout(int32_t cache)
{
    struct model x = make(&shapes[0]); /* 3 layers, 0 and 2 local, K 2, H 6, window 8 */
    gemma2_session *s = start(x.m, (struct setup){40, 4, 1, 0, cache});
    size_t number = (size_t)4 >> (cache - GEMMA2_CACHE_F32), place = 6 * number;
    place += cache == GEMMA2_CACHE_Q8 ? 2 : 0; /* a scale */
    int32_t ids[30];
    size_t size;
    random_ids(x.m, ids, 30);
    gemma2_eval(s, ids, 30, NULL); /* rings of 16: 14 .. 29 */
    uint8_t *p = save(s, &size), digest[32];
    check(size == 128 + 4 * 30 + (16 + 30 + 16) * 2 * 2 * place && get_u64(p + 16) == size,
          "bytes of a saved session");
    check(!memcmp(p, "\x89GEMSES\n", 8) && get_u32(p + 8) == 1 && get_u32(p + 12) == 128 &&
              get_u32(p + 32) == 30 && get_u32(p + 36) == 14 &&
              get_u32(p + 40) == (uint32_t)cache && get_u32(p + 44) == 8 &&
              !memcmp(p + 64, s->model->config.identity, 32),
          "its header");
    int bad = 0;
    for (int i = 0; i < 30; i++)
        bad += get_u32(p + 128 + 4 * i) != (uint32_t)ids[i];
    const uint8_t *at = p + 128 + 4 * 30 + (16 * 2 * 2 + 30 * 2 + 30) * place;
    for (int i = 0; i < 30; i++, at += place) /* values of layer 1, kv head 1 */
        for (int k = 0; k < 6; k++) {
            const uint8_t *x_at = at + (size_t)k * number;
            uint16_t half = (uint16_t)(x_at[0] | x_at[number > 1] << 8);
            float scale = from_f16((uint16_t)(at[place - 2] | at[place - 1] << 8));
            float got = number == 4   ? get_f32(x_at)
                        : number == 2 ? from_f16(half) : scale * (float)(int8_t)*x_at;
            bad += got != cached(s, 1, 1, 'v', i, k);
        }
    check(!bad, "%d ids and values of a saved session differ", bad);
    memcpy(digest, p + 96, 32);
    put_digest(p, size);
    check(!memcmp(digest, p + 96, 32), "its digest");
    free(p);
    gemma2_session_free(s);
    unmake(&x);
}

/* These bytes never change: files that were saved once are restored by later versions. */
static void test_saved_bytes(void)
{
    static const char *const known[] = {
        "b5b7ae422ed8ef5c765d3b86214f78e9425f9b9c5e85cf5c01f9afb1ec2dd5e0",
        "1f03ce803303976298732ab3e2ee70ca96cc0ed3ba4709ad96d9f37e958455ae",
        "023e04acfef4b479dcb28858794b323c7b6c74fce8f2bd7976222e6213bb2ab0"};
    for (int i = 0; i < 3; i++) {
        char hex[65];
        uint8_t digest[32];
        int32_t ids[30];
        size_t size;
        rnd_state = 7;
        struct model x = make(&shapes[i ? 2 : MIXED]);
        gemma2_session *s = start(x.m, (struct setup){40, 4, 1, 0, GEMMA2_CACHE_F32 + i});
        random_ids(x.m, ids, 30);
        gemma2_eval(s, ids, 30, NULL);
        uint8_t *p = save(s, &size);
        sha256_of(p, size, size, digest);
        for (int k = 0; k < 32; k++)
            snprintf(hex + 2 * k, 3, "%02x", digest[k]);
        check(!strcmp(hex, known[i]), "a saved session's bytes: %s", hex);
        free(p);
        gemma2_session_free(s);
        unmake(&x);
    }
}

/* Whether a session refuses the bytes with that code, and is as it was. */
static int refuses(gemma2_session *s, const uint8_t *p, size_t size, int code)
{
    const uint8_t *cache = s->cache[0].keys;
    size_t bytes = (size_t)(s->cache[s->model->config.n_layers - 1].values - cache);
    int32_t position = s->position, oldest = s->oldest, ids[4];
    uint8_t before[32], after[32];
    memcpy(ids, s->ids, sizeof ids);
    sha256_of(cache, bytes, bytes, before);
    int status = gemma2_session_restore(s, p, size);
    sha256_of(cache, bytes, bytes, after);
    return (code ? status == code : status < 0) && s->position == position &&
           s->oldest == oldest && !memcmp(ids, s->ids, sizeof ids) && !memcmp(before, after, 32);
}

static void test_damaged_saves(int32_t cache)
{
    struct model x = make(&tiny_shape);
    int32_t ids[12];
    size_t size;
    int bad = 0;
    random_ids(x.m, ids, 12);
    gemma2_session *s = start(x.m, (struct setup){16, 4, 1, 0, cache});
    gemma2_session *t = start(x.m, (struct setup){16, 4, 1, 0, cache});
    gemma2_eval(s, ids, 12, NULL), gemma2_eval(t, ids + 2, 5, NULL);
    uint8_t *p = save(s, &size), *longer = fresh(size + 1);
    for (size_t n = 0; n < size; n++) {
        uint8_t *cut = fresh(n); /* ends where it ends */
        memcpy(cut, p, n);
        bad += !refuses(t, cut, n, n < 8 ? GEMMA2_ERR_FOREIGN : GEMMA2_ERR_CORRUPT);
        free(cut);
    }
    check_none(bad, "truncated sessions");
    memcpy(longer, p, size), longer[size] = 0;
    check(refuses(t, longer, size + 1, GEMMA2_ERR_CORRUPT), "a byte too many");
    bad = 0;
    for (size_t i = 0; i < size * 8; i++) {
        p[i / 8] ^= (uint8_t)(1 << i % 8);
        bad += !refuses(t, p, size, i / 8 < 8 ? GEMMA2_ERR_FOREIGN
                                    : i / 32 == 2 ? GEMMA2_ERR_MISMATCH : GEMMA2_ERR_CORRUPT);
        p[i / 8] ^= (uint8_t)(1 << i % 8);
    }
    check_none(bad, "sessions with one bit wrong");
    memcpy(longer + 1, p, size);
    check(gemma2_session_restore(t, longer + 1, size) == GEMMA2_OK, "at an odd address");
    free(p), free(longer);
    gemma2_session_free(s), gemma2_session_free(t);
    unmake(&x);
}

/* A digest that is right makes nonsense no truer. */
static void test_hostile_saves(int32_t cache)
{
    static const struct {
        size_t at;
        uint32_t value;
        int code;
    } cases[] = {
        {12, 127, -8}, {12, 0xffffffff, -8}, {16, 1, -8}, {20, 1, -8}, {24, 1, -8}, {48, 1, -8},
        {60, 1, -8}, {32, 12, -8}, {32, 14, -8}, {32, 0, -8}, {32, 17, -3}, {32, 0x7fffffff, -3},
        {32, 0xffffffff, -3}, {36, 1, -8}, {36, 12, -8}, {36, 13, -8}, {36, 14, -8},
        {36, 0x80000000, -8}, {36, 0xffffffff, -8}, {40, 0, -10}, {40, 4, -10},
        {44, 9, -10}, {44, 0, -10}, {64, 0, -10}, {92, 0, -10}, {128, 7, -8}, {128, 0x80000000, -8},
        {128 + 4 * 12, 0xffffffff, -8}};
    struct model x = make(&tiny_shape);
    int32_t ids[13];
    size_t size;
    random_ids(x.m, ids, 13);
    gemma2_session *s = start(x.m, (struct setup){16, 4, 1, 0, cache});
    gemma2_session *t = start(x.m, (struct setup){16, 4, 1, 0, cache});
    gemma2_eval(s, ids, 13, NULL), gemma2_eval(t, ids + 2, 5, NULL);
    uint8_t *p = save(s, &size), *edited = fresh(size);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memcpy(edited, p, size);
        put_u32(edited + cases[i].at, cases[i].value);
        put_digest(edited, size);
        check(refuses(t, edited, size, cases[i].code), "%u at byte %zu of a saved session",
              cases[i].value, cases[i].at);
    }
    for (size_t i = 0; i + 4 <= size; i += 4) /* any other number: refused, or harmless */
        for (int k = 0; k < 3; k++) {
            memcpy(edited, p, size);
            put_u32(edited + i, k == 0 ? 0xffffffff : k == 1 ? 0x7fc00000 : rnd());
            put_digest(edited, size);
            if (gemma2_session_restore(t, edited, size) == GEMMA2_OK)
                gemma2_eval(t, ids, 3, NULL);
        }
    check(gemma2_session_restore(t, p, size) == GEMMA2_OK && gemma2_position(t) == 13,
          "the sound one after all of them");
    free(p), free(edited);
    gemma2_rewind(t, 0), gemma2_eval(t, ids, 3, NULL);
    p = save(t, &size), size = (size_t)saved_bytes(t, 3, 1); /* consistent, but for the window */
    put_u32(p + 36, 1), put_u32(p + 16, (uint32_t)size), put_digest(p, size);
    check(refuses(s, p, size, -8), "a saved session that lacks a position it sees");
    gemma2_session *other = start(x.m, (struct setup){16, 4, 1, 0, cache % 3 + 1});
    check(refuses(other, p, size, -10), "a saved session of cache type %d", cache);
    gemma2_session_free(other);
    free(p);
    gemma2_session_free(s), gemma2_session_free(t);
    unmake(&x);
}

/* ---- Where it runs ---- */

/* Ten tokens after what `from` holds, on another session.  good: the logits are those of truth. */
struct elsewhere {
    gemma2_session *from;
    const int32_t *ids;
    const float *truth;
    struct setup o;
    int good;
};

static void *go_elsewhere(void *context)
{
    struct elsewhere *e = context;
    gemma2_session_params p;
    gemma2_session_params_init(&p);
    p.n_context = e->o.context, p.n_batch = e->o.batch, p.n_threads = e->o.threads;
    gemma2_session *s = gemma2_session_new(e->from->model, &p, NULL, 0);
    e->good = gemma2_session_copy(s, e->from) == GEMMA2_OK && goes_on_as(s, e->ids, e->truth);
    gemma2_session_free(s);
    return NULL;
}

/* Several threads at once, each with its session, all copied from one that stands still. */
static void run_in_threads(struct elsewhere e)
{
    struct elsewhere all[4];
    pthread_t threads[4];
    int started = 0, good = 0;
    for (int i = 0; i < 4; i++) {
        all[i] = e, all[i].o.threads = 1 + i % 2;
        started += !pthread_create(&threads[i], NULL, go_elsewhere, &all[i]);
    }
    check(started == 4, "four threads");
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL), good += all[i].good;
    check(good == 4, "%d of four threads went on", good);
}

/* The stack that the header speaks of. */
static void run_on_small_stack(struct elsewhere e)
{
    pthread_attr_t attributes;
    pthread_t thread;
    size_t stack = 200 << 10;
#if defined(__SANITIZE_ADDRESS__) || !defined(__OPTIMIZE__)
    stack = 8 << 20; /* red zones and unshared slots take more than the header says */
    printf("not run: a small stack, in a build that needs a larger one\n");
#endif
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack);
    if (check(!pthread_create(&thread, &attributes, go_elsewhere, &e), "a thread of small stack"))
        pthread_join(thread, NULL);
    check(e.good, "on a stack of %zu KB", stack >> 10);
    pthread_attr_destroy(&attributes);
}

/* A child after fork() goes on with one thread, whatever the parent used. */
static void run_in_child(struct elsewhere e)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        e.o.threads = 1;
        go_elsewhere(&e);
        _exit(e.good ? 0 : 1);
    }
    int status = -1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0,
          "a child goes on: status %d", status);
}

/* Inside a host's own parallel region, with and without nested ones. */
static void run_in_region(struct elsewhere e)
{
#ifdef _OPENMP
    for (int levels = 1; levels <= 2; levels++) {
        int good = 0, all = 0;
        omp_set_max_active_levels(levels);
#pragma omp parallel num_threads(3) reduction(+ : good, all)
        {
            struct elsewhere mine = e;
            mine.o.threads = 2;
            go_elsewhere(&mine);
            good += mine.good, all++;
        }
        check(good == all, "in a parallel region, %d active levels: %d of %d", levels, good, all);
    }
    omp_set_max_active_levels(1);
#else
    (void)e;
    printf("not run: a host's parallel region, this build has no OpenMP\n");
#endif
}

static void test_places_to_run(void)
{
    /* wide enough that work is shared out: see BYTES_A_THREAD */
    struct shape shape = {"wide", 2, 264, 8, 4, 32, 600, 700, 100, 300, 50, 30, 1, 0,
                          {Q8, F32, Q4, BF16, Q6}, 64};
    struct model x = make(&shape);
    int32_t ids[MOST];
    random_ids(x.m, ids, MOST);
    float *truth = step_by_step(x.m, (struct setup){60, 40, 1, 0, 0}, ids, MOST);
    gemma2_session *s = start(x.m, (struct setup){60, 40, 2, 0, 0});
    gemma2_eval(s, ids, 45, NULL); /* with two threads */
    struct elsewhere e = {s, ids, truth, {60, 40, 1, 0, 0}, 0};
    run_in_child(e);
    run_in_threads(e);
    run_on_small_stack(e);
    run_in_region(e);
    gemma2_session_free(s);
    free(truth);
    unmake(&x);
}

/* After a session exists nothing is allocated, whatever is called. */
static void test_no_allocation(void)
{
    struct model x = make(&shapes[MIXED]);
    gemma2_session *s = start(x.m, (struct setup){40, 8, 1, 0, 0});
    gemma2_session *t = start(x.m, (struct setup){40, 8, 1, 0, 0});
    gemma2_sampler sampler;
    int32_t ids[30];
    static uint8_t saved[1 << 20], scratch[1 << 12];
    float scores[8], *logits = fresh(vocab(x.m) * sizeof *logits);
    random_ids(x.m, ids, 30);
    gemma2_sampler_init(&sampler, 1);
    sampler.presence_penalty = 1;
    int before = alloc_calls, status = gemma2_prefill(s, ids, 20, logits);
    status |= gemma2_score(s, ids + 20, 8, 1, scores) | gemma2_eval(s, ids + 28, 1, logits);
    status |= gemma2_session_copy(t, s) | (gemma2_sample(s, &sampler, logits) < 0);
    status |= gemma2_eval_rows((gemma2_row[]){row_of(s, 1, logits), row_of(t, 2, NULL)}, 2);
    int64_t bytes = gemma2_session_save(s, saved, sizeof saved);
    status |= gemma2_session_restore(t, saved, (size_t)bytes) | gemma2_rewind(t, 27);
    status |= gemma2_encode(x.m, "a cab", 5, 0, ids, 30, scratch, sizeof scratch) <= 0;
    check(status == 0 && alloc_calls == before, "%d allocations after a session's own",
          alloc_calls - before);
    gemma2_session_free(s), gemma2_session_free(t);
    free(logits);
    unmake(&x);
}

static void test_hosts(void)
{
    test_misuse();
    test_cancel();
    test_copies();
    test_copies_refused();
    test_every_batch();
    test_far_rows();
    test_saves();
    test_memory_of_before();
    test_saved_rewinds();
    test_saved_bytes();
    for (int32_t cache = GEMMA2_CACHE_F32; cache <= GEMMA2_CACHE_Q8; cache++) {
        test_saved_layout(cache);
        test_damaged_saves(cache);
        test_hostile_saves(cache);
    }
    test_places_to_run();
    test_no_allocation();
}
