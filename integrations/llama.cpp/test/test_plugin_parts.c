/* SPDX-License-Identifier: Apache-2.0 */
/* Parts of the plugin that need no host, and what it does where there is none. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "float_bits.h"
#include "node_team.c"

/* --- the team --- */

enum { TASKS = 300, NODES = 40, THREADS_MAX = 5 };

typedef struct job {
    atomic_int runs[TASKS];
    atomic_int busy[THREADS_MAX]; /* tasks that run as this worker now */
    atomic_int n_workers_seen;
} job;

static void count(void *task, size_t i, size_t worker)
{
    job *j = task;

    if (worker >= THREADS_MAX || atomic_fetch_add(&j->busy[worker], 1) != 0)
        abort(); /* two tasks with the scratch of one worker */
    int seen = atomic_load(&j->n_workers_seen);
    while ((int)worker + 1 > seen &&
           !atomic_compare_exchange_weak(&j->n_workers_seen, &seen, (int)worker + 1))
        ;
    atomic_fetch_add(&j->runs[i], 1);
    for (volatile int k = 0; k < 200; k = k + 1)
        ;
    atomic_fetch_sub(&j->busy[worker], 1);
}

/* A host: threads that enter every node of a graph, and none the next before all have left. */
typedef struct host {
    tqkvp_team team;
    pthread_barrier_t barrier;
    int n_threads;
    job job;
} host;

typedef struct host_thread {
    host *host;
    int ith;
} host_thread;

/* Node n hands out tasks n % 4 times: to nobody, to one, to all. */
static void lead(host *h, int n)
{
    tqkvp_team_begin(&h->team, h->n_threads);
    const tqkv_parallel *parallel = tqkvp_team_parallel(&h->team);
    if (parallel->n_workers != (size_t)h->n_threads)
        abort();
    for (int call = 0; call < n % 4; call++) {
        const size_t n_tasks = (size_t)((n * 13 + call * 7) % TASKS);
        parallel->run(parallel->user, n_tasks, count, &h->job);
        for (size_t i = 0; i < TASKS; i++)
            if (atomic_exchange(&h->job.runs[i], 0) != (i < n_tasks))
                abort();
    }
    tqkvp_team_end(&h->team, (unsigned)n);
}

static void *host_thread_main(void *argument)
{
    const host_thread *thread = argument;
    host *h = thread->host;

    for (int n = 0; n < NODES; n++) {
        if (n % 7 == 5)
            continue; /* left out by the host */
        /* some come late, even after the leader is through */
        for (volatile int k = 0; k < (n + thread->ith * 3) % 5 * 2000; k = k + 1)
            ;
        if (thread->ith == 0)
            lead(h, n);
        else
            tqkvp_team_help(&h->team, (unsigned)n, (size_t)thread->ith);
        pthread_barrier_wait(&h->barrier);
    }
    return NULL;
}

static void test_team_runs_every_task_once(void **state)
{
    static host h;

    (void)state;
    tqkvp_team_init(&h.team);
    for (int graph = 0; graph < 10; graph++) {
        pthread_t threads[THREADS_MAX];
        host_thread starts[THREADS_MAX];
        h.n_threads = 1 + graph % THREADS_MAX;
        atomic_store(&h.job.n_workers_seen, 0);
        tqkvp_team_reset(&h.team);
        assert_int_equal(pthread_barrier_init(&h.barrier, NULL, (unsigned)h.n_threads), 0);
        for (int i = 0; i < h.n_threads; i++) {
            starts[i] = (host_thread){.host = &h, .ith = i};
            assert_int_equal(pthread_create(&threads[i], NULL, host_thread_main, &starts[i]), 0);
        }
        for (int i = 0; i < h.n_threads; i++)
            assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_true(atomic_load(&h.job.n_workers_seen) <= h.n_threads);
        pthread_barrier_destroy(&h.barrier);
        /* between graphs the leader is alone */
        const tqkv_parallel *parallel = tqkvp_team_parallel(&h.team);
        assert_int_equal(parallel->n_workers, 1);
        parallel->run(parallel->user, TASKS, count, &h.job);
        for (size_t i = 0; i < TASKS; i++)
            assert_int_equal(atomic_exchange(&h.job.runs[i], 0), 1);
    }
}

/* --- 16-bit floats --- */

/* The nearest f16 by search among all of them, ties to the even one. */
static uint16_t nearest_f16(double x)
{
    uint16_t best = 0;
    double best_error = INFINITY;

    for (uint32_t h = 0; h < 0x7c00u; h++) {
        const double error = fabs(fabs(x) - (double)tqkvp_f16_to_f32((uint16_t)h));
        if (error < best_error || (error == best_error && h % 2 == 0)) {
            best = (uint16_t)h;
            best_error = error;
        }
    }
    return best;
}

static void test_f16(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000u; h++) {
        const float x = tqkvp_f16_to_f32((uint16_t)h);
        if (tqkvp_f16_is_nan((uint16_t)h))
            assert_true(isnan(x) && tqkvp_f16_is_nan(tqkvp_f32_to_f16(x)));
        else
            assert_int_equal(tqkvp_f32_to_f16(x), h);
    }
    const float some[] = {1.0f + 0x1p-11f, 1.0f + 3 * 0x1p-11f, 0x1p-25f, 0x1.8p-24f, 3e-8f, 6.1e-5f,
                          65503.0f,        0.1f,                123.456f, 2.5e-7f};
    for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++) {
        assert_int_equal(tqkvp_f32_to_f16(some[i]), nearest_f16((double)some[i]));
        assert_int_equal(tqkvp_f32_to_f16(-some[i]), 0x8000u | nearest_f16((double)some[i]));
    }
    assert_int_equal(tqkvp_f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(tqkvp_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(tqkvp_f32_to_f16(INFINITY), 0x7c00);
}

static void test_bf16(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000u; h++) {
        const float x = tqkvp_bf16_to_f32((uint16_t)h);
        if (!isnan(x))
            assert_int_equal(tqkvp_f32_to_bf16(x), h);
    }
    assert_int_equal(tqkvp_f32_to_bf16(1.0f + 0x1p-8f), 0x3f80);     /* tie, down to even */
    assert_int_equal(tqkvp_f32_to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82); /* tie, up to even */
    assert_true(isnan(tqkvp_bf16_to_f32(tqkvp_f32_to_bf16(NAN))));
}

/* --- no host --- */

static void test_no_host(void **state)
{
    void *plugin = dlopen(TQKV_PLUGIN_PATH, RTLD_NOW | RTLD_LOCAL);

    (void)state;
    if (!plugin)
        fail_msg("%s", dlerror());
    void *(*init)(void);
    void *symbol = dlsym(plugin, "ggml_backend_init");
    assert_non_null(symbol);
    memcpy(&init, &symbol, sizeof(init));
    assert_null(init());
    assert_null(init()); /* refusing is not for ever, and not a crash */
    /* nothing else is exported: the library inside must not meet another copy of itself */
    assert_null(dlsym(plugin, "tqkv_version"));
    dlclose(plugin);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_team_runs_every_task_once),
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_no_host),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
