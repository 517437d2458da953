/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A call is published by adding one to `call`; a helper that sees a new number takes tasks until
 * none is left and then leaves. The caller returns when all helpers have left, so the fields of a
 * call change only while every helper spins on `call`.
 */
#include "spin_pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "tool.h"

enum { SPINS = 20000 }; /* some tens of microseconds */

typedef struct helper {
    spin_pool *pool;
    size_t worker;
    pthread_t thread;
} helper;

struct spin_pool {
    tqkv_parallel parallel;
    helper *helpers;
    size_t n_helpers;
    atomic_uint call;
    atomic_size_t next, n_inside;
    bool is_ending; /* set before the last call is published */
    size_t n_tasks;
    tqkv_task_fn *fn;
    void *task;
};

/* Where more threads run than there are cores, the one that is waited for needs this one. */
static void spin(unsigned *n_spins)
{
    if (++*n_spins > SPINS)
        sched_yield();
}

static void take_tasks(spin_pool *pool, size_t worker)
{
    for (size_t i = atomic_fetch_add(&pool->next, 1); i < pool->n_tasks;
         i = atomic_fetch_add(&pool->next, 1))
        pool->fn(pool->task, i, worker);
}

static void *helper_main(void *arg)
{
    const helper *self = arg;
    spin_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        unsigned call, n_spins = 0;
        while ((call = atomic_load(&pool->call)) == seen)
            spin(&n_spins);
        seen = call;
        if (pool->is_ending)
            return NULL;
        take_tasks(pool, self->worker);
        atomic_fetch_sub(&pool->n_inside, 1);
    }
}

static void run(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    spin_pool *pool = user;
    pool->fn = fn;
    pool->task = task;
    pool->n_tasks = n_tasks;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->n_inside, pool->n_helpers);
    atomic_fetch_add(&pool->call, 1);
    take_tasks(pool, 0);
    for (unsigned n_spins = 0; atomic_load(&pool->n_inside) > 0;)
        spin(&n_spins);
}

spin_pool *spin_pool_create(uint32_t n_threads)
{
    spin_pool *pool = tool_alloc(1, sizeof(*pool));
    pool->n_helpers = n_threads - 1;
    pool->helpers = tool_alloc(n_threads, sizeof(*pool->helpers));
    pool->parallel = (tqkv_parallel){.user = pool, .n_workers = n_threads, .run = run};
    return pool;
}

void spin_pool_destroy(spin_pool *pool)
{
    if (!pool)
        return;
    free(pool->helpers);
    free(pool);
}

void spin_pool_start(spin_pool *pool)
{
    pool->is_ending = false;
    atomic_store(&pool->call, 0);
    for (size_t i = 0; i < pool->n_helpers; i++) {
        helper *h = &pool->helpers[i];
        *h = (helper){.pool = pool, .worker = i + 1};
        if (pthread_create(&h->thread, NULL, helper_main, h) != 0)
            exit(tool_error("a thread cannot be started"));
    }
}

void spin_pool_stop(spin_pool *pool)
{
    pool->is_ending = true;
    atomic_fetch_add(&pool->call, 1);
    for (size_t i = 0; i < pool->n_helpers; i++)
        pthread_join(pool->helpers[i].thread, NULL);
}

const tqkv_parallel *spin_pool_parallel(const spin_pool *pool)
{
    return &pool->parallel;
}
