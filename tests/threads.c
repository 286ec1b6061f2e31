/* One model in three threads of a host, each with a session and an OpenMP team of its own:
 * every thread gets what one alone gets.  Built for ThreadSanitizer, which must be silent
 * here, and must not be with the argument "race": then the tasks of a team write to one place.
 *
 *   clang -O1 -g -fopenmp -fsanitize=thread tests/threads.c -lm -lpthread && ./a.out [race] */
#include "../gemma2.c"

#include "model.h"
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { N_HOSTS = 3, N_TOKENS = 24 };

static const struct shape shape = {"shared", 2, 264, 8, 4, 32, 600, 700, 100, 300, 50, 30, 1, 0,
                                   {Q8, F32, Q4, BF16, Q6}, 64};

struct host {
    const gemma2_model *model;
    float *logits;
    int32_t sampled, status;
};

/* Reads every activation, while nobody writes it. */
static void look(void *context, const gemma2_activation *a)
{
    for (size_t i = 0; i < a->rows * a->cols; i++)
        *(float *)context += a->data[i];
}

static void *be_a_host(void *argument)
{
    struct host *h = argument;
    int32_t ids[N_TOKENS];
    gemma2_session_params params;
    gemma2_sampler sampler;
    for (int i = 0; i < N_TOKENS; i++)
        ids[i] = i * 29 % gemma2_get_config(h->model)->n_vocab;
    gemma2_session_params_init(&params);
    params.n_context = 64, params.n_batch = 9, params.n_threads = 3;
    gemma2_session *s = gemma2_session_new(h->model, &params, NULL, 0);
    float sum = 0;
    gemma2_set_hook(s, look, &sum);
    gemma2_sampler_init(&sampler, 3);
    h->status = s ? gemma2_prefill(s, ids, N_TOKENS - 1, NULL) : -1;
    if (h->status >= 0)
        h->status = gemma2_eval(s, ids + N_TOKENS - 1, 1, h->logits);
    if (h->status >= 0)
        h->sampled = gemma2_sample(s, &sampler, h->logits);
    gemma2_session_free(s);
    return NULL;
}

static void test_hosts(void)
{
    struct model x = make(&shape);
    struct host hosts[1 + N_HOSTS]; /* the first runs alone */
    pthread_t threads[1 + N_HOSTS];
    for (int i = 0; i <= N_HOSTS; i++) {
        struct host h = {x.m, fresh(vocab(x.m) * sizeof(float)), 0, 0};
        hosts[i] = h;
    }
    be_a_host(&hosts[0]);
    for (int i = 1; i <= N_HOSTS; i++)
        if (pthread_create(&threads[i], NULL, be_a_host, &hosts[i]))
            printf("no thread\n"), exit(1);
    for (int i = 1; i <= N_HOSTS; i++) {
        pthread_join(threads[i], NULL);
        check(hosts[0].status == GEMMA2_OK && hosts[i].status == GEMMA2_OK, "host %d: status", i);
        check(!memcmp(hosts[i].logits, hosts[0].logits, vocab(x.m) * sizeof(float)) &&
                  hosts[i].sampled == hosts[0].sampled, "host %d gets other numbers", i);
    }
    for (int i = 0; i <= N_HOSTS; i++)
        free(hosts[i].logits);
    unmake(&x);
}

static _Atomic int n_begun;

/* Waits for another task, so that no thread can do the tasks of all.  In the relaxed order
 * neither learns of the other's memory. */
static void racing_task(void *context, size_t task)
{
    atomic_fetch_add_explicit(&n_begun, 1, memory_order_relaxed);
    while (atomic_load_explicit(&n_begun, memory_order_relaxed) < 2)
        sched_yield();
    *(size_t *)context += task;
}

int main(int argc, char **argv)
{
    size_t sum = 0;
    if (argc > 1 && !strcmp(argv[1], "race"))
        share_out(4, 8, racing_task, &sum);
    else
        test_hosts();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
