/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tasks are out while `epoch` is odd. A helper announces itself in `active` before it looks at the
 * epoch again; the leader closes the epoch before it looks at `active`. Both orders are
 * sequentially consistent, so either the helper sees that the tasks are gone, or the leader sees
 * the helper and waits for it. The fields of the tasks change only while the epoch is even and
 * `active` is zero.
 */
#include "node_team.h"

#include <sched.h>

enum {
    /* Pauses before the core is offered to others: some 50 us, more than a leader needs between
     * tasks of a decoding step, and little beside a time slice where threads outnumber cores. */
    SPINS = 4096
};

static void wait_a_little(unsigned *n_waits)
{
    if (++*n_waits > SPINS) {
        sched_yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __asm__ __volatile__("pause");
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void run_tasks(tqkvp_team *team, size_t worker)
{
    for (;;) {
        const size_t i = atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
        if (i >= team->n_tasks)
            return;
        team->fn(team->task, i, worker);
    }
}

static void run(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    tqkvp_team *team = user;
    unsigned n_waits = 0;

    if (n_tasks < 2 || team->parallel.n_workers < 2) {
        for (size_t i = 0; i < n_tasks; i++)
            fn(task, i, 0);
        return;
    }
    team->fn = fn;
    team->task = task;
    team->n_tasks = n_tasks;
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    atomic_fetch_add(&team->epoch, 1);
    run_tasks(team, 0);
    atomic_fetch_add(&team->epoch, 1);
    while (atomic_load(&team->active) > 0)
        wait_a_little(&n_waits);
}

void tqkvp_team_init(tqkvp_team *team)
{
    *team = (tqkvp_team){.parallel = {.user = team, .n_workers = 1, .run = run}};
}

void tqkvp_team_reset(tqkvp_team *team)
{
    atomic_store(&team->n_finished, 0);
}

const tqkv_parallel *tqkvp_team_parallel(const tqkvp_team *team)
{
    return &team->parallel;
}

void tqkvp_team_begin(tqkvp_team *team, int n_threads)
{
    team->parallel.n_workers = (size_t)n_threads;
}

void tqkvp_team_end(tqkvp_team *team, unsigned node)
{
    team->parallel.n_workers = 1;
    atomic_store(&team->n_finished, node + 1);
}

void tqkvp_team_help(tqkvp_team *team, unsigned node, size_t worker)
{
    unsigned seen = 0, n_waits = 0;

    while (atomic_load(&team->n_finished) <= node) {
        const unsigned epoch = atomic_load(&team->epoch);
        if (!(epoch & 1) || epoch == seen) {
            wait_a_little(&n_waits);
            continue;
        }
        seen = epoch;
        n_waits = 0;
        atomic_fetch_add(&team->active, 1);
        if (atomic_load(&team->epoch) == epoch)
            run_tasks(team, worker);
        atomic_fetch_sub(&team->active, 1);
    }
}
