/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A call is open while `epoch` is odd. A worker announces itself in `active` before it looks at the
 * epoch again; the caller closes the epoch before it looks at `active`. Both orders are
 * sequentially consistent, so either the worker sees that the call is over, or the caller sees the worker and
 * waits for it. The fields of the call change only while the epoch is even and `active` is zero.
 */
#include "worker_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

enum {
    WORKERS_MAX = 512,
    SPINS = 200 /* pauses before sleeping: about a microsecond, less than one wake-up */
};

struct tqkvp_pool {
    tqkv_parallel parallel;
    tqkvp_omp_parallel_fn *omp;
    atomic_size_t omp_worker; /* numbers the threads of one call */
    int n_threads; /* wanted, the caller included */
    int n_started; /* threads that exist */
    pthread_t threads[WORKERS_MAX];

    atomic_uint epoch;
    atomic_uint active;
    atomic_size_t next;
    size_t n_tasks;
    size_t n_workers;
    tqkv_task_fn *fn;
    void *task;

    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_int n_sleeping;
    atomic_bool stop;
};

typedef struct worker_start {
    tqkvp_pool *pool;
    size_t worker;
} worker_start;

static void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __asm__ __volatile__("pause");
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void run_tasks(tqkvp_pool *pool, size_t worker)
{
    for (;;) {
        const size_t i = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (i >= pool->n_tasks)
            return;
        pool->fn(pool->task, i, worker);
    }
}

/* Waits until the epoch differs from `seen`; returns it. */
static unsigned wait_for_call(tqkvp_pool *pool, unsigned seen)
{
    unsigned epoch = atomic_load(&pool->epoch);

    for (int i = 0; i < SPINS && epoch == seen; i++) {
        pause_cpu();
        epoch = atomic_load(&pool->epoch);
    }
    if (epoch != seen)
        return epoch;

    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while ((epoch = atomic_load(&pool->epoch)) == seen && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
    return epoch;
}

static void *worker_main(void *argument)
{
    worker_start start = *(worker_start *)argument;
    tqkvp_pool *pool = start.pool;
    unsigned seen = 0;

    free(argument);
    while (!atomic_load(&pool->stop)) {
        const unsigned epoch = wait_for_call(pool, seen);
        seen = epoch;
        if (!(epoch & 1))
            continue;
        atomic_fetch_add(&pool->active, 1);
        if (atomic_load(&pool->epoch) == epoch && start.worker < pool->n_workers)
            run_tasks(pool, start.worker);
        atomic_fetch_sub(&pool->active, 1);
    }
    return NULL;
}

static void start_workers(tqkvp_pool *pool, int n_wanted)
{
    sigset_t all, before;

    if (pool->n_started >= n_wanted)
        return;
    /* signals belong to the threads of the program */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (pool->n_started < n_wanted) {
        worker_start *start = malloc(sizeof(*start));
        if (!start)
            break;
        start->pool = pool;
        start->worker = (size_t)pool->n_started + 1;
        if (pthread_create(&pool->threads[pool->n_started], NULL, worker_main, start) != 0) {
            free(start);
            break; /* fewer threads compute the same */
        }
        pool->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void omp_main(void *user)
{
    tqkvp_pool *pool = user;

    run_tasks(pool, atomic_fetch_add_explicit(&pool->omp_worker, 1, memory_order_relaxed));
}

/* As many threads as the host uses, whatever the tasks: another number would make OpenMP start anew. */
static void run_on_omp(tqkvp_pool *pool, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    pool->fn = fn;
    pool->task = task;
    pool->n_tasks = n_tasks;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->omp_worker, 0);
    pool->omp(omp_main, pool, (unsigned)pool->n_threads, 0);
}

static void run(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    tqkvp_pool *pool = user;

    if (pool->omp && n_tasks > 1 && pool->n_threads > 1) {
        run_on_omp(pool, n_tasks, fn, task);
        return;
    }
    if (n_tasks > 1 && pool->n_threads > 1)
        start_workers(pool, pool->n_threads - 1);
    if (n_tasks < 2 || pool->n_threads < 2 || pool->n_started == 0) {
        for (size_t i = 0; i < n_tasks; i++)
            fn(task, i, 0);
        return;
    }

    pool->fn = fn;
    pool->task = task;
    pool->n_tasks = n_tasks;
    pool->n_workers = (size_t)pool->n_threads;
    atomic_store(&pool->next, 0);
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->n_sleeping) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    run_tasks(pool, 0);
    atomic_fetch_add(&pool->epoch, 1);
    for (int i = 0; atomic_load(&pool->active) > 0; i++) {
        if (i < SPINS)
            pause_cpu();
        else
            sched_yield(); /* its thread may be waiting for this core */
    }
}

tqkvp_pool *tqkvp_pool_create(tqkvp_omp_parallel_fn *omp)
{
    tqkvp_pool *pool = calloc(1, sizeof(*pool));

    if (!pool)
        return NULL;
    pool->omp = omp;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    tqkvp_pool_set_threads(pool, 1);
    return pool;
}

void tqkvp_pool_destroy(tqkvp_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->n_started; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void tqkvp_pool_set_threads(tqkvp_pool *pool, int n_threads)
{
    if (n_threads < 1)
        n_threads = 1;
    if (n_threads > WORKERS_MAX)
        n_threads = WORKERS_MAX;
    pool->n_threads = n_threads;
    pool->parallel = (tqkv_parallel){.user = pool, .n_workers = (size_t)n_threads, .run = run};
}

int tqkvp_pool_threads(const tqkvp_pool *pool)
{
    return pool->n_threads;
}

const tqkv_parallel *tqkvp_pool_parallel(tqkvp_pool *pool)
{
    return &pool->parallel;
}
