/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A layer with random weights: rows of K, V and Q whose channels differ in size as those of a
 * model do, and plans that calibration makes of them.
 */
#ifndef TQKV_RANDOM_LAYER_H
#define TQKV_RANDOM_LAYER_H

#include "turboquant/turboquant.h"

enum { RANDOM_TOKENS = 512 }; /* that differ; longer texts repeat them */

typedef struct random_layer {
    tqkv_plan_layer shape;
    float *inv_freq;
    float *rows[2]; /* by tqkv_side: [RANDOM_TOKENS][n_kv_heads][dim] */
    float *q;       /* [RANDOM_TOKENS][n_heads][k_dim] */
} random_layer;

/* shape: NULL rope and tiers are fine; copied. */
void random_layer_init(random_layer *layer, const tqkv_plan_layer *shape);
void random_layer_deinit(random_layer *layer);

/* profile: "5x" for 16 / 5 bits per value. Returns an exit code; says why it failed. */
int random_layer_plan(const random_layer *layer, const char *profile, tqkv_plan **out);

/* Memory that kernels may read: on TQKV_ALIGN, with as much behind it. free() frees it. */
void *random_layer_alloc(size_t n_bytes);

#endif /* TQKV_RANDOM_LAYER_H */
