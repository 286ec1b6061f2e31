/* Section 4, sharing of work, and the floating-point environment. */
#include <pthread.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

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
            share_out(threads[i] < 1024 || n < 20 ? threads[i] : 20, n, count_task, &tasks);
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
        check(status == GEMMA2_OK, "%d threads: %d", s->worker->n_threads, status);
        check(!i || (!logits_differ(x.m, to, logits, 0) && !memcmp(scores[0], scores[1], 60 * 4)),
              "%d threads change results", s->worker->n_threads);
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
    eval_row(s, ids[15], out->logits[2]);
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
        share_out(3, 1000, count_task, &tasks);
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

/* Steps of so many seconds alone and in a team; returns how many of the last 1000 went to the
 * team, and the seconds of all in *total. */
static int team_steps(struct pace *p, double alone, double team, double *total)
{
    int n = 0;
    *total = 0;
    for (int i = 0; i < 2000; i++) {
        int is_team = next_way(p);
        note_pace(p, is_team, is_team ? team : alone);
        *total += is_team ? team : alone;
        n += is_team && i >= 1000;
    }
    return n;
}

/* The faster way is taken, also when it changes, and trying the other costs little. */
static void test_pace(void)
{
    struct pace p = {{0, 0}, 0, 0};
    double idle, busy, again;
    int n[3] = {team_steps(&p, 0.08, 0.045, &idle), team_steps(&p, 0.08, 0.2, &busy),
                team_steps(&p, 0.08, 0.045, &again)};
    check(n[0] > 980 && n[2] > 980 && n[1] < 10, "pace: %d, %d and %d of 1000 steps in a team",
          n[0], n[1], n[2]);
    check(idle < 1.02 * 0.045 * 2000 && busy < 1.03 * 0.08 * 2000 && again < 1.2 * 0.045 * 2000,
          "pace: %g, %g and %g seconds", idle, busy, again);
    note_pace(&p, p.is_team, 0.4);
    check(next_way(&p) == 1, "pace: one slow step changes nothing");
    struct pace large = {{0, 0}, 0, 1};
    check(team_steps(&large, 0.08, 0.045, &idle) > 980 && idle < 1.02 * 0.045 * 2000,
          "pace: a large model, which begins with the team");
    int wrong = 0;
    for (int is_big = 0; is_big < 2; is_big++) {
        static gemma2_model m;
        static gemma2_worker work = {.model = &m};
        struct pace *before = work.pace - 1, *found;
        double scale;
        m.config.file_bytes = is_big ? 1u << 30 : 1u << 20;
        for (size_t rows = 1; rows <= 600; rows++) {
            found = pace_of(&work, rows, &scale);
            wrong += (found != NULL) != (rows <= (is_big ? 8u : 256u));
            wrong += found && (found < before || found > before + 1 || scale < 1 || scale >= 2 ||
                               (rows <= 8 && scale != 1));
            before = found ? found : before;
        }
    }
    check(!wrong, "pace: %d numbers of rows have a wrong pace", wrong);
}

/* Phases of tasks in turn with phases of the calling thread alone. */
struct turns {
    int places[7], seen;
};

static void add_in_turn(void *context, size_t task)
{
    ((struct turns *)context)->places[task]++;
}

static void take_turns(struct member *me, void *context)
{
    struct turns *t = context;
    for (int i = 1; i <= 200; i++) {
        share(me, 7, add_in_turn, t);
        for (int k = 0; k < 7 && me->index == 0; k++)
            t->seen += t->places[k] == i;
        await_caller(me);
    }
}

static void test_turns(void)
{
    for (int threads = 1; threads <= 5; threads += 2) {
        struct turns t = {{0}, 0};
        run_team(&(gemma2_worker){0}, threads, take_turns, &t);
        check(t.seen == 1400, "turns of %d threads: %d of 1400 tasks seen", threads, t.seen);
    }
}

/* ---- the host's threads ---- */

struct call {
    void (*fn)(void *arg, int32_t i);
    void *arg;
    int32_t i;
};

static void *make_call(void *call)
{
    struct call *c = call;
    c->fn(c->arg, c->i);
    return NULL;
}

/* What a host makes of the calls it is asked for. */
enum way { ALL_AT_ONCE, BUT_FOR_0, ONLY_0, ONLY_LAST, NONE, ASCENDING, DESCENDING, TWICE, N_WAYS };

static void run_way(void *way, int32_t n, void (*fn)(void *arg, int32_t i), void *arg)
{
    pthread_t threads[32];
    struct call calls[32];
    int is_given[32] = {0}, at_once = *(int *)way < ONLY_0 || *(int *)way == TWICE;
    for (int32_t k = 0; k < n; k++) {
        int32_t i = *(int *)way == DESCENDING ? n - 1 - k : k;
        int given = *(int *)way == BUT_FOR_0   ? i > 0
                    : *(int *)way == ONLY_0    ? i == 0
                    : *(int *)way == ONLY_LAST ? i == n - 1 : *(int *)way != NONE;
        calls[k] = (struct call){fn, arg, *(int *)way == TWICE ? i / 2 : i};
        is_given[k] = given && at_once && !pthread_create(&threads[k], NULL, make_call, &calls[k]);
        if (given && !at_once)
            make_call(&calls[k]);
    }
    for (int32_t k = 0; k < n; k++)
        if (is_given[k])
            pthread_join(threads[k], NULL);
}

static int steps_seen;
static void count_step(void *context, const gemma2_activation *a)
{
    steps_seen += a->rows > 0 && context == NULL;
}

/* Whatever the host does with the calls, a pass ends and gives the bits of one thread, also while
 * a hook looks on and where a session is cancelled. */
static void test_host_threads(void)
{
    struct shape shape = {"pool", 2, 264, 8, 4, 32, 600, 700, 100, 300, 50, 30, 1, 0,
                          {Q8, F32, Q4, BF16, Q6}, 64};
    int32_t ids[41];
    struct model x = make(&shape);
    float *logits = fresh(vocab(x.m) * sizeof *logits), scores[2][8];
    random_ids(x.m, ids, 41);
    float *truth = step_by_step(x.m, (struct setup){64, 1, 1, 0, 0}, ids, 41);
    for (int way = 0; way < 2 * N_WAYS; way++) {
        int which = way % N_WAYS, threads = way < N_WAYS ? 3 : 32;
        gemma2_worker_params p = {.struct_size = sizeof p, .n_batch = 20, .n_threads = threads,
                                  .run = run_way, .run_context = &which};
        gemma2_worker *work = gemma2_worker_new(x.m, &p, NULL, 0);
        gemma2_session_params of = {.struct_size = sizeof of, .n_context = 64, .worker = work};
        gemma2_session *s = gemma2_session_new(x.m, &of, NULL, 0);
        int status = gemma2_eval(s, ids, 40, NULL);
        for (int i = 0; i < FEW_ROWS; i++)
            work->pace[i].is_team = 1;
        status |= gemma2_eval(s, ids + 40, 1, logits);
        check(status == GEMMA2_OK && !logits_differ(x.m, logits, truth, 40),
              "host's threads, way %d: %d", way, status);
        gemma2_rewind(s, 32);
        gemma2_set_hook(s, count_step, NULL);
        steps_seen = 0;
        check(gemma2_score(s, ids + 32, 8, 3, scores[way > 0]) == GEMMA2_OK && steps_seen == 27 &&
                  !memcmp(scores[0], scores[way > 0], sizeof scores[0]),
              "host's threads, way %d: %d steps traced", way, steps_seen);
        gemma2_set_hook(s, NULL, NULL);
        gemma2_cancel(s, 1);
        check(gemma2_eval(s, ids + 40, 1, logits) == GEMMA2_ERR_CANCELLED &&
                  gemma2_position(s) == 40, "host's threads, way %d: cancelled", way);
        gemma2_session_free(s), gemma2_worker_free(work);
    }
    free(truth), free(logits);
    unmake(&x);
}

static void test_work_sharing(void)
{
    test_host_threads();
    test_turns();
    test_pace();
    test_share();
    test_threads();
    test_float_environment();
}
