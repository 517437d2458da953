/* SPDX-License-Identifier: Apache-2.0 */
/* Random numbers and random plans for tests. */
#ifndef TEST_PLAN_MAKE_H
#define TEST_PLAN_MAKE_H

#include "format/plan_data.h"

/* State of a random generator: any seed. */
typedef struct test_random {
    uint64_t state;
} test_random;

uint32_t test_random_u32(test_random *random);
/* 0 <= result < 1. */
double test_random_uniform(test_random *random);
/* Mean 0, variance 1. */
float test_random_normal(test_random *random);

/* One value of every kind: a shape with RoPE, its table is static. */
tqkv_plan_layer test_shape(uint32_t n_heads, uint32_t n_kv_heads, uint32_t k_dim, uint32_t v_dim);

/*
 * A sealed plan: random means, well-conditioned random transforms, random widths. Tier 0 is wide,
 * later tiers are narrower. mem NULL: malloc.
 * Errors: those of tqkvi_plan_create and tqkvi_plan_seal.
 */
TQKV_NODISCARD tqkv_status test_plan_make(const tqkv_allocator *mem, uint64_t seed,
                                          const tqkv_plan_layer *shapes, uint32_t n_layers,
                                          uint32_t n_tiers, tqkv_plan **out);

#endif /* TEST_PLAN_MAKE_H */
