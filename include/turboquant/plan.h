/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plan says how the KV cache of one model is stored: per layer, KV head and side (K or V) the
 * mean, the transform and, for every age tier, the bits of each unit of 16 channels. Plans come
 * from calibration (calib.h) through a `.tqkv` file, or are built in and uniform.
 *
 * A plan never changes after creation: share it between threads. docs/FORMAT.md describes the file.
 */
#ifndef TURBOQUANT_PLAN_H
#define TURBOQUANT_PLAN_H

#include "types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TQKV_UNIT_CHANNELS 16 /* channels that share one width */
#define TQKV_UNITS_MAX 64     /* units of one head: head_dim <= 1024 */
#define TQKV_TIERS_MAX 4      /* widths by age, youngest first; the last has no age limit */
#define TQKV_FINGERPRINT_BYTES 32

typedef struct tqkv_plan tqkv_plan;

/* How positions were rotated into K before it reached us. */
typedef enum tqkv_rope_style {
    TQKV_ROPE_NONE = 0,
    TQKV_ROPE_HALVES = 1, /* channel i is paired with i + n_rot/2 (NeoX) */
    TQKV_ROPE_PAIRS = 2   /* channel 2i is paired with 2i + 1 (interleaved) */
} tqkv_rope_style;

/*
 * RoPE of one layer. A token at position p has its pair i turned by p * inv_freq[i] radians.
 * inv_freq: [n_rot / 2] f32, radians per position, after every scaling that is linear in the
 * position (linear scaling, YaRN, frequency factors). Channels n_rot.. are not turned.
 */
typedef struct tqkv_rope {
    uint32_t style; /* tqkv_rope_style */
    uint32_t n_rot; /* channels, even, <= k_dim */
    const float *inv_freq;
} tqkv_rope;

typedef struct tqkv_plan_info {
    const char *model;   /* name of the model, UTF-8 */
    const char *arch;    /* architecture as the model file says it, UTF-8 */
    const char *profile; /* "5x", "8x", "f16", "q8", or what the user asked for */
    uint32_t n_layers;
    uint32_t n_tiers;
    uint32_t n_sinks;      /* tokens at position < n_sinks keep the first tier's widths */
    uint32_t frame_tokens; /* K of positions [n*frame, (n+1)*frame) share one RoPE base */
    uint32_t context;      /* tokens at which bits_total is counted */
    double bits_total;     /* bytes held at `context` * 8 / values held, everything counted */
    uint8_t fingerprint[TQKV_FINGERPRINT_BYTES]; /* SHA-256 of the file without this field */
} tqkv_plan_info;

/*
 * Shape of one layer. In a latent layer (multi-head latent attention) n_kv_heads is 1, K are the channels
 * that RoPE turns and V is the latent; a key is both. The score of a query is the sum of its products with
 * K and with V, the output the weighted sum of V. Each is stored once.
 */
typedef struct tqkv_plan_layer {
    uint32_t n_heads;    /* query heads */
    uint32_t n_kv_heads; /* divides n_heads */
    uint32_t k_dim, v_dim; /* channels of one head, multiples of 16 */
    uint32_t window;     /* tokens a sliding-window layer can see, 0: all */
    tqkv_rope rope;      /* inv_freq lives as long as the plan */
    uint32_t tier_tokens[TQKV_TIERS_MAX]; /* tokens that the tier holds, may be 0; of the last: 0, it holds the rest */
    uint32_t token_bytes[TQKV_TIERS_MAX]; /* of one token in the tier: K + V, codes + scales */
    uint32_t is_latent; /* 1: V serves as key as well, see above; 0 otherwise */
} tqkv_plan_layer;

/*
 * Reads a plan from bytes (borrowed).
 * Errors: TQKV_ERR_CORRUPT, TQKV_ERR_VERSION, TQKV_ERR_NO_MEMORY; the logger gets the field.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_read(const void *bytes, size_t n_bytes, const tqkv_logger *log,
                                                   tqkv_plan **out);

/* Reads the file at path; also TQKV_ERR_IO. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_load(const char *path, const tqkv_logger *log, tqkv_plan **out);

/* Writes beside path and renames: the file is whole or not there. Errors: TQKV_ERR_IO. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_save(const tqkv_plan *plan, const char *path,
                                                   const tqkv_logger *log);

/* Storage without calibration. F16 is lossless for f16 input; Q8 is 8 bits behind a Hadamard transform. */
typedef enum tqkv_builtin { TQKV_BUILTIN_F16 = 0, TQKV_BUILTIN_Q8 = 1 } tqkv_builtin;

/*
 * A plan of one layer with the shape (and RoPE, copied) of `shape`; token_bytes and tier_tokens
 * are ignored. Errors: TQKV_ERR_INVALID_ARG, TQKV_ERR_UNSUPPORTED (dims), TQKV_ERR_NO_MEMORY.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_builtin(tqkv_builtin kind, const tqkv_plan_layer *shape,
                                                      tqkv_plan **out);

/*
 * What rank `rank` of n_ranks needs where an engine deals the heads of every layer out to ranks in order
 * (tensor parallelism): n_heads / n_ranks query heads and their KV heads, copied. Where there are
 * fewer KV heads than ranks, neighbours have the same one. bits_total stays that of the whole plan.
 * Errors: TQKV_ERR_INVALID_ARG, TQKV_ERR_UNSUPPORTED (heads of a layer that cannot be dealt
 * out evenly), TQKV_ERR_NO_MEMORY.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_share(const tqkv_plan *plan, uint32_t rank, uint32_t n_ranks,
                                                    tqkv_plan **out);

/* Accepts NULL. */
TQKV_API void tqkv_plan_destroy(tqkv_plan *plan);

/* Strings and arrays live as long as the plan. */
TQKV_API void tqkv_plan_get_info(const tqkv_plan *plan, tqkv_plan_info *out);

/* layer < n_layers, otherwise TQKV_ERR_INVALID_ARG. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_get_layer(const tqkv_plan *plan, uint32_t layer,
                                                        tqkv_plan_layer *out);

/*
 * Bits of each unit of 16 channels of one head in one tier.
 * bits: [dim / 16] out. Values: 0 1 2 3 4 5 6 8, or 16 for plain f16.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_get_bits(const tqkv_plan *plan, uint32_t layer, uint32_t head,
                                                       tqkv_side side, uint32_t tier, uint8_t *bits);

/*
 * Weights of the squared error of each unit of one head: how much of what attention loses a unit
 * stands for. Only ratios within a head mean something. weights: [dim / 16] f32 out, all 0 in a
 * head of plain f16, which has none. Errors: TQKV_ERR_INVALID_ARG.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_plan_get_weights(const tqkv_plan *plan, uint32_t layer,
                                                          uint32_t head, tqkv_side side, float *weights);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_PLAN_H */
