/* SPDX-License-Identifier: Apache-2.0 */
/* Runs tasks on the caller's threads, or one after another without any. */
#ifndef TQKVI_PARALLEL_H
#define TQKVI_PARALLEL_H

#include <stdbool.h>

#include "turboquant/types.h"

/* Whether a caller's threads can be used. NULL: there are none, which is fine. */
static inline bool tqkvi_is_parallel(const tqkv_parallel *parallel)
{
    return !parallel || (parallel->n_workers > 0 && parallel->run);
}

static inline void tqkvi_run(const tqkv_parallel *parallel, size_t n_tasks, tqkv_task_fn *fn,
                             void *task)
{
    if (parallel && n_tasks > 1) {
        parallel->run(parallel->user, n_tasks, fn, task);
        return;
    }
    for (size_t i = 0; i < n_tasks; i++)
        fn(task, i, 0);
}

#endif /* TQKVI_PARALLEL_H */
