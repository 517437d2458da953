/* SPDX-License-Identifier: Apache-2.0 */
/* Plans, threads and rows for tests of the store and of attention. */
#ifndef TEST_STORE_MAKE_H
#define TEST_STORE_MAKE_H

#include "test_plan_make.h"
#include "turboquant/turboquant.h"

/* A plan of one layer with tiers of these lengths (n_tiers - 1 of them). frame_tokens: of K. */
TQKV_NODISCARD tqkv_status test_tiered_plan(uint64_t seed, const tqkv_plan_layer *shape,
                                            uint32_t n_tiers, const uint32_t *tier_tokens,
                                            uint32_t n_sinks, uint32_t frame_tokens,
                                            tqkv_plan **out);

/* Threads that are started for each call. */
tqkv_parallel test_threads(size_t n_workers);
/* One thread that runs the tasks backwards with workers in turn. */
tqkv_parallel test_backwards(size_t n_workers);

/* n normal values times `size`. */
void test_fill_normal(test_random *random, float size, float *out, size_t n);

/* Below limit, which is not 0. */
uint32_t test_random_below(test_random *random, uint32_t limit);

#endif /* TEST_STORE_MAKE_H */
