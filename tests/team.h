/* One phase of tasks on a team of its own, for tests and bench.  Include it after gemma2.c. */
struct phase {
    size_t n;
    task_fn *task;
    void *context;
};

static void run_phase(struct member *me, void *context)
{
    const struct phase *p = context;
    share(me, p->n, p->task, p->context);
}

static void share_out(int n_threads, size_t n, task_fn *task, void *context)
{
    struct phase p = {n, task, context};
    run_team(&(gemma2_worker){0}, n_threads, run_phase, &p);
}
