/* SPDX-License-Identifier: Apache-2.0 */
#include "test_store_make.h"

#include <pthread.h>
#include <stdatomic.h>

#define WORKERS_MAX 16

typedef struct thread_call {
    atomic_size_t next;
    size_t n_tasks;
    tqkv_task_fn *fn;
    void *task;
} thread_call;

typedef struct thread_start {
    thread_call *call;
    size_t worker;
} thread_start;

tqkv_status test_tiered_plan(uint64_t seed, const tqkv_plan_layer *shape, uint32_t n_tiers,
                             const uint32_t *tier_tokens, uint32_t n_sinks, uint32_t frame_tokens,
                             tqkv_plan **out)
{
    TQKV_TRY(test_plan_make(NULL, seed, shape, 1, n_tiers, out));
    for (uint32_t i = 0; i + 1 < n_tiers; i++)
        (*out)->layers[0].shape.tier_tokens[i] = tier_tokens[i];
    (*out)->n_sinks = n_sinks;
    (*out)->frame_tokens = frame_tokens;
    return tqkvi_plan_seal(*out, NULL);
}

static void *thread_main(void *user)
{
    const thread_start *start = user;
    thread_call *call = start->call;

    for (size_t i = atomic_fetch_add(&call->next, 1); i < call->n_tasks;
         i = atomic_fetch_add(&call->next, 1))
        call->fn(call->task, i, start->worker);
    return NULL;
}

static void run_threads(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    const size_t n_workers = (size_t)(uintptr_t)user;
    thread_call call = {.n_tasks = n_tasks, .fn = fn, .task = task};
    thread_start starts[WORKERS_MAX];
    pthread_t threads[WORKERS_MAX];
    bool started[WORKERS_MAX] = {false};

    for (size_t i = 0; i < n_workers; i++)
        starts[i] = (thread_start){.call = &call, .worker = i};
    for (size_t i = 1; i < n_workers; i++)
        started[i] = pthread_create(&threads[i], NULL, thread_main, &starts[i]) == 0;
    (void)thread_main(&starts[0]);
    for (size_t i = 1; i < n_workers; i++)
        if (started[i])
            (void)pthread_join(threads[i], NULL);
}

static void run_backwards(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    const size_t n_workers = (size_t)(uintptr_t)user;

    for (size_t i = n_tasks; i-- > 0;)
        fn(task, i, i % n_workers);
}

tqkv_parallel test_threads(size_t n_workers)
{
    return (tqkv_parallel){
        .user = (void *)(uintptr_t)n_workers, .n_workers = n_workers, .run = run_threads};
}

tqkv_parallel test_backwards(size_t n_workers)
{
    return (tqkv_parallel){
        .user = (void *)(uintptr_t)n_workers, .n_workers = n_workers, .run = run_backwards};
}

void test_fill_normal(test_random *random, float size, float *out, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = size * test_random_normal(random);
}

uint32_t test_random_below(test_random *random, uint32_t limit)
{
    return test_random_u32(random) % limit;
}
