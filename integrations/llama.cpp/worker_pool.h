/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads of one backend. Where the host computes with OpenMP its threads do our work too. Otherwise
 * we have our own. Between calls they sleep: the host computes the rest of the model on the
 * same cores, and a thread that spins there costs it more than waking one costs us. Within a call
 * tasks are taken one at a time from a counter, and the caller, which takes part, waits only for
 * tasks that have begun: a thread that wakes late delays nothing.
 */
#ifndef TQKV_WORKER_POOL_H
#define TQKV_WORKER_POOL_H

#include <turboquant/types.h>

typedef struct tqkvp_pool tqkvp_pool;

/* Runs fn(data) once on each of n_threads threads, the caller among them: GOMP_parallel. */
typedef void tqkvp_omp_parallel_fn(void (*fn)(void *data), void *data, unsigned n_threads, unsigned flags);

/* omp: the host's, or NULL. NULL where there is no memory. No thread starts before it is needed. */
tqkvp_pool *tqkvp_pool_create(tqkvp_omp_parallel_fn *omp);
void tqkvp_pool_destroy(tqkvp_pool *pool);

/* Threads that later calls use, the caller included; at least 1. Not during a call. */
void tqkvp_pool_set_threads(tqkvp_pool *pool, int n_threads);
int tqkvp_pool_threads(const tqkvp_pool *pool);

/* Valid as long as the pool, until the number of threads changes. */
const tqkv_parallel *tqkvp_pool_parallel(tqkvp_pool *pool);

#endif /* TQKV_WORKER_POOL_H */
