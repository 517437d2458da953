/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads for one timed run. They spin between calls, as OpenMP's do inside llama.cpp, so that what is
 * timed is work and not waking up; they end with the run, so that they take no core from the next one.
 */
#ifndef TQKV_SPIN_POOL_H
#define TQKV_SPIN_POOL_H

#include "turboquant/types.h"

typedef struct spin_pool spin_pool;

/* n_threads >= 1, the calling thread counted. Never NULL. No thread runs before spin_pool_start. */
spin_pool *spin_pool_create(uint32_t n_threads);
void spin_pool_destroy(spin_pool *pool);

/* Calls through spin_pool_parallel are allowed between these two only. */
void spin_pool_start(spin_pool *pool);
void spin_pool_stop(spin_pool *pool);
/* Lives as long as the pool. */
const tqkv_parallel *spin_pool_parallel(const spin_pool *pool);

#endif /* TQKV_SPIN_POOL_H */
