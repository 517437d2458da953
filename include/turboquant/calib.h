/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calibration: watches Q, K and V of a model on representative text and makes a plan.
 *
 *     tqkv_calib_create
 *     tqkv_calib_set_layer        for each layer
 *     tqkv_calib_observe          for each layer and piece of text (first pass)
 *     tqkv_calib_prepare          transforms are fixed from here on
 *     tqkv_calib_perturb          for each (layer, side): quantise the old tokens of that group alone;
 *     tqkv_calib_set_sensitivity  the caller reads the KL at the logits and reports it
 *     tqkv_calib_solve            for each profile wanted
 *
 * Threads: one call at a time per object. The result depends only on the numbers given, not on
 * the number of workers.
 */
#ifndef TURBOQUANT_CALIB_H
#define TURBOQUANT_CALIB_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tqkv_calib tqkv_calib;

typedef struct tqkv_calib_config {
    size_t struct_bytes; /* set by tqkv_calib_config_init */
    const char *model;   /* copied */
    const char *arch;    /* copied */
    uint32_t n_layers;
    uint32_t frame_tokens; /* default from _init */
    float gamma;           /* power of the attention metric in the transform, 0..1 */
    uint32_t n_sinks;      /* default 4 */
    const tqkv_allocator *mem;
    const tqkv_logger *log;
} tqkv_calib_config;

TQKV_API void tqkv_calib_config_init(tqkv_calib_config *config);
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_create(const tqkv_calib_config *config, tqkv_calib **out);
TQKV_API void tqkv_calib_destroy(tqkv_calib *calib);

/*
 * Shape, RoPE and window of a layer (tier_tokens and token_bytes ignored), and the projection after attention.
 * w_o: [n_out][n_heads * v_dim] f32, borrowed, or NULL where it is not known (identity then); in a latent
 * layer what becomes of the weighted sum of latents: heads' values, then the output.
 * resident: tokens the engine holds for this layer at the plan's context, 0: all (a sliding window
 * holds fewer).
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_set_layer(tqkv_calib *calib, uint32_t layer,
                                                         const tqkv_plan_layer *shape, const float *w_o,
                                                         size_t n_out, uint32_t resident,
                                                         const tqkv_parallel *parallel);

/*
 * One piece of text, causal from its first token.
 * q: [n][n_heads][k_dim], k: [n][n_kv_heads][k_dim], v: [n][n_kv_heads][v_dim] f32 contiguous,
 * RoPE applied, borrowed. In a latent layer q is [n][n_heads][k_dim + v_dim], its part for V last.
 * positions: [n] ascending by one. scale, softcap: of the scores.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_observe(tqkv_calib *calib, uint32_t layer, size_t n, const float *q,
                                                       const float *k, const float *v, const int32_t *positions,
                                                       float scale, float softcap, const tqkv_parallel *parallel);

/* Means and transforms from what was observed. Errors: TQKV_ERR_INVALID_ARG (a layer saw too few tokens). */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_prepare(tqkv_calib *calib, const tqkv_parallel *parallel);

/*
 * Replaces rows of one side by what `bits` per value would leave of them, sinks apart.
 * rows: [n][n_kv_heads][dim] f32 contiguous, changed in place. positions: [n].
 * distortion: out, mean over tokens of the error in the attention metric.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_perturb(tqkv_calib *calib, uint32_t layer, tqkv_side side, float bits,
                                                       size_t n, const int32_t *positions, float *rows,
                                                       double *distortion, const tqkv_parallel *parallel);

/* kl: mean KL at the logits when tqkv_calib_perturb made that much mean distortion in one group, > 0. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_set_sensitivity(tqkv_calib *calib, uint32_t layer, tqkv_side side,
                                                               double kl, double distortion);

typedef struct tqkv_profile {
    size_t struct_bytes;   /* set by tqkv_profile_init */
    const char *name;      /* "5x" */
    double bits_total;     /* budget per value, everything counted, at `context` */
    uint32_t context;      /* tokens */
    uint32_t n_tiers;      /* 1..TQKV_TIERS_MAX; the last tier gets what the budget leaves */
    /*
     * What is asked for. Where young tiers take too much of the budget they come out narrower, in sliding
     * windows first, and shorter; where they take little, the last of them comes out longer. The first
     * tier stays as it is.
     */
    uint32_t tier_tokens[TQKV_TIERS_MAX];
    float tier_bits[TQKV_TIERS_MAX]; /* mean bits per value of a young tier; the last is ignored */
} tqkv_profile;

/* Fills the profile for a budget: tiers as measured best for it. name may be NULL. */
TQKV_API void tqkv_profile_init(tqkv_profile *profile, const char *name, double bits_total, uint32_t context);

/* Errors: TQKV_ERR_INVALID_ARG (budget below what the tiers need; the logger gets the least possible). */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_calib_solve(tqkv_calib *calib, const tqkv_profile *profile,
                                                     tqkv_plan **out);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_CALIB_H */
