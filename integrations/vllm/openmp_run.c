/* SPDX-License-Identifier: Apache-2.0 */
/* tqkv_parallel on the OpenMP threads of the process. */
#include <omp.h>
#include <stdatomic.h>

#include "turboquant/types.h"

/* A tqkv_parallel.run; user: the number of workers, as a pointer. */
TQKV_API void turboquant_openmp_run(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task)
{
    atomic_size_t next = 0;

#pragma omp parallel num_threads((int)(uintptr_t)user)
    for (size_t i = atomic_fetch_add(&next, 1); i < n_tasks; i = atomic_fetch_add(&next, 1))
        fn(task, i, (size_t)omp_get_thread_num());
}
