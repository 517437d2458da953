/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What calibration remembers of one layer: first and second moments of K (in its RoPE frame) and
 * of V, and the attention metric of both (docs/DESIGN.md, "Attention metric").
 *
 * When key t changes by dk and value t by dv, the output of query i moves by
 *     p_it (v_t - o_i) scale (q_i . dk)   and   p_it dv,
 * seen through W_o. Summed over queries i that will read a compressed key t ("cold" pairs), the
 * squared movement is dk' M_K dk and dv' M_V dv with
 *     M_K = sum p_it^2 |W_o (v_t - o_i)|^2 q_i q_i'     q_i turned into the frame of t
 *     M_V = sum p_it^2 W_o' W_o
 *
 * In a latent layer dv moves the score as well, by scale (q'_i . dv) with q' the query's part for
 * the latent. Both movements are of the output, so they add up:
 *     M_V = sum p_it^2 (W_o' W_o + scale^2 |W_o (v_t - o_i)|^2 q'_i q'_i')
 * (the product of both, which changes its sign from token to token, is left out). M_K needs no scale
 * here: how much K matters beside V is measured, see calibration.h.
 */
#ifndef TQKVI_OBSERVE_H
#define TQKVI_OBSERVE_H

#include "base/alloc.h"
#include "base/parallel.h"
#include "kernels/kernels.h"
#include "turboquant/plan.h"

/* Moments of one KV head and side, about a fixed shift so that large means cost no precision. */
typedef struct tqkvi_moments {
    uint64_t n;     /* tokens; the shift is set by the first piece */
    float *shift;   /* [dim] */
    double *sum;    /* [dim] of x - shift */
    double *outer;  /* [dim][dim] of (x - shift)(x - shift)' */
    double *metric; /* [dim][dim] */
} tqkvi_moments;

typedef struct tqkvi_layer_stats {
    tqkv_plan_layer shape; /* rope.inv_freq owned */
    uint32_t resident;     /* tokens that the engine holds at the plan's context, 0: all */
    float *gram;           /* [n_heads][v_dim][v_dim]: W_o' W_o of the head's columns */
    tqkvi_moments *heads[2]; /* [n_kv_heads] by side */
} tqkvi_layer_stats;

/* shape: rope copied. w_o: [n_out][n_heads * v_dim], or NULL for the identity. */
TQKV_NODISCARD tqkv_status tqkvi_layer_stats_init(tqkvi_layer_stats *stats, const tqkv_allocator *mem,
                                                  const tqkv_plan_layer *shape, const float *w_o, size_t n_out,
                                                  const tqkv_parallel *parallel);
void tqkvi_layer_stats_deinit(tqkvi_layer_stats *stats, const tqkv_allocator *mem);

typedef struct tqkvi_piece {
    size_t n; /* tokens */
    const float *q, *k, *v;   /* [n][n_heads or n_kv_heads][dim]; q with k_dim + v_dim in a latent layer */
    const int32_t *positions; /* [n] ascending by one */
    float scale, softcap;
    uint32_t frame_tokens, n_sinks;
} tqkvi_piece;

/* Adds one piece; one task per KV head, so the sums do not depend on the number of workers. */
TQKV_NODISCARD tqkv_status tqkvi_layer_stats_add(tqkvi_layer_stats *stats, const tqkv_allocator *mem,
                                                 const tqkvi_piece *piece, const tqkv_parallel *parallel);

#endif /* TQKVI_OBSERVE_H */
