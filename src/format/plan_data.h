/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plan in memory: what calibration makes, the file holds and the codec reads.
 *
 * Transforms are kept in f32 but always representable as in the file: for each output channel a
 * power of two times f16 values. tqkvi_transform_round makes a matrix so.
 */
#ifndef TQKVI_PLAN_DATA_H
#define TQKVI_PLAN_DATA_H

#include <stdbool.h>

#include "base/alloc.h"
#include "format/bytes.h"
#include "format/row_layout.h"
#include "turboquant/plan.h"

/* Limits of the format beside those of plan.h. */
#define TQKVI_LAYERS_MAX 4096
#define TQKVI_HEADS_MAX 4096
#define TQKVI_DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define TQKVI_NAME_BYTES_MAX 1024
#define TQKVI_SINKS_MAX 65536
#define TQKVI_FRAME_TOKENS_MAX (1u << 24)
#define TQKVI_TIER_TOKENS_MAX (1u << 24)
#define TQKVI_INV_FREQ_MAX \
    4.0f /* radians per position; base/sine.h reduces angles up to 2^31 times this */
#define TQKVI_EXPONENT_MIN \
    (-100) /* of a transform's channel; 2^-24 (smallest f16) * 2^-100 is a normal f32 */
#define TQKVI_EXPONENT_MAX 112 /* 65504 * 2^112 is still finite in f32 */
#define TQKVI_LATENT_BIT (1u << 31) /* of v_dim in the file */

/*
 * One KV head, one side. A head is plain (f16) in every tier or in none. In a plain head nothing
 * reads the three arrays and they may be NULL: the reader and the built-in plans leave them so.
 */
typedef struct tqkvi_head_plan {
    tqkvi_layout layout[TQKV_TIERS_MAX];
    float *mean; /* [dim], in the frame (K: RoPE undone to the base) */
    /* [dim][dim]: y[j] = sum_i transform[i * dim + j] * (x[i] - mean[i]); y has unit variance */
    float *transform;
    float *weight; /* [dim / 16] weight of a unit's squared error in the choice of the scale */
} tqkvi_head_plan;

typedef struct tqkvi_layer_plan {
    tqkv_plan_layer shape; /* rope.inv_freq points into inv_freq */
    float *inv_freq;       /* [n_rot / 2] */
    /* [n_kv_heads] by tqkv_side; NULL when n_kv_heads is 0: a layer without a cache, shape all 0 */
    tqkvi_head_plan *heads[2];
} tqkvi_layer_plan;

struct tqkv_plan {
    tqkv_allocator mem;
    char *model, *arch, *profile;
    uint32_t n_layers, n_tiers, n_sinks, frame_tokens, context;
    double bits_total;
    uint8_t fingerprint[TQKV_FINGERPRINT_BYTES]; /* set by tqkvi_plan_seal and by the reader */
    tqkvi_layer_plan *layers;                    /* [n_layers] */
};

/*
 * All arrays of every layer, zeroed, from `shapes` ([n_layers]; rope copied, token_bytes ignored).
 * Layouts and the numbers of struct tqkv_plan are left to the caller; names are empty.
 * mem: NULL for malloc.
 * Errors: TQKV_ERR_INVALID_ARG (a shape that tqkvi_shape_fault refuses), TQKV_ERR_NO_MEMORY.
 */
TQKV_NODISCARD tqkv_status tqkvi_plan_create(const tqkv_allocator *mem,
                                             const tqkv_plan_layer *shapes, uint32_t n_layers,
                                             tqkv_plan **out);

/* The same without the arrays of the heads, which stay NULL. */
TQKV_NODISCARD tqkv_status tqkvi_plan_create_bare(const tqkv_allocator *mem,
                                                  const tqkv_plan_layer *shapes, uint32_t n_layers,
                                                  tqkv_plan **out);

/* The zeroed arrays of one head that has none yet. */
TQKV_NODISCARD tqkv_status tqkvi_plan_alloc_head(tqkv_plan *plan, uint32_t layer, tqkv_side side,
                                                 uint32_t head);

/* Replaces the strings (copied; NULL: empty). On failure the plan keeps what it had. */
TQKV_NODISCARD tqkv_status tqkvi_plan_set_names(tqkv_plan *plan, const char *model,
                                                const char *arch, const char *profile);

/*
 * Checks every field as the reader would, sets token_bytes of each layer and the fingerprint. The
 * logger gets the name of a field that is wrong. Errors: TQKV_ERR_INVALID_ARG, TQKV_ERR_NO_MEMORY.
 */
TQKV_NODISCARD tqkv_status tqkvi_plan_seal(tqkv_plan *plan, const tqkv_logger *log);

/* m: [dim][dim] as tqkvi_head_plan.transform, rounded in place to what the file can hold. */
void tqkvi_transform_round(float *m, uint32_t dim);

/* Accepts NULL and a half-built plan. */
void tqkvi_plan_destroy(tqkv_plan *plan);

static inline uint32_t tqkvi_shape_dim(const tqkv_plan_layer *shape, tqkv_side side)
{
    return side == TQKV_SIDE_K ? shape->k_dim : shape->v_dim;
}

static inline bool tqkvi_head_is_plain(const tqkvi_head_plan *head)
{
    return head->layout[0].bits[0] == TQKVI_BITS_PLAIN;
}

/* Sets shape.token_bytes of one layer from its layouts: codes and one scale byte per row. */
void tqkvi_layer_set_token_bytes(tqkvi_layer_plan *layer, uint32_t n_tiers);

/* Where the sections of a block of one tier begin. sections: [2 * n_kv_heads], kept by out. */
void tqkvi_layer_block_layout(const tqkvi_layer_plan *layer, uint32_t tier, uint32_t *sections,
                              tqkvi_block_layout *out);

/*
 * What is wrong with a shape, as "k_dim must be ..."; NULL when nothing is. tier_tokens and
 * token_bytes are not looked at.
 */
const char *tqkvi_shape_fault(const tqkv_plan_layer *shape);
/* The same for a RoPE table. */
const char *tqkvi_rope_fault(const tqkv_rope *rope);
/* The same for the numbers of a plan, and for the tiers of one layer. */
const char *tqkvi_numbers_fault(const tqkv_plan *plan);
const char *tqkvi_tiers_fault(const tqkv_plan_layer *shape, uint32_t n_tiers);
/* The same for a string of n_bytes. */
const char *tqkvi_name_fault(const char *text, size_t n_bytes);
/* The same for a head of `dim` channels: layouts, and its arrays unless it is plain. */
const char *tqkvi_head_fault(const tqkvi_head_plan *head, uint32_t dim, uint32_t n_tiers);
/* The part of it that is about mean and weight. */
const char *tqkvi_vectors_fault(const tqkvi_head_plan *head, uint32_t dim);

/*
 * One output channel of a transform ("column": m[i * dim + j] for one j and every i). In the file
 * it is f16 values times 2^exponent; the exponent is the one that brings the largest magnitude
 * into [2^14, 2^15), kept within TQKVI_EXPONENT_MIN.._MAX, and 0 for a column of zeros.
 */
int tqkvi_column_exponent(const float *column, uint32_t dim);
void tqkvi_column_round(float *column, uint32_t dim);
void tqkvi_transform_column(const float *m, uint32_t dim, uint32_t j, float *column);

/* The reader behind tqkv_plan_read, with an allocator (NULL: malloc). */
TQKV_NODISCARD tqkv_status tqkvi_plan_parse(const tqkv_allocator *mem, const void *bytes,
                                            size_t n_bytes, const tqkv_logger *log,
                                            tqkv_plan **out);

/* Files; see tqkv_plan_load and tqkv_plan_save. */
TQKV_NODISCARD tqkv_status tqkvi_plan_load_file(const tqkv_allocator *mem, const char *path,
                                                const tqkv_logger *log, tqkv_plan **out);
TQKV_NODISCARD tqkv_status tqkvi_plan_save_file(const tqkv_plan *plan, const char *path,
                                                const tqkv_logger *log);

/* See tqkv_plan_builtin. mem NULL: malloc. */
TQKV_NODISCARD tqkv_status tqkvi_plan_create_builtin(const tqkv_allocator *mem, tqkv_builtin kind,
                                                     const tqkv_plan_layer *shape, tqkv_plan **out);

/* See tqkv_plan_share. mem NULL: malloc. */
TQKV_NODISCARD tqkv_status tqkvi_plan_create_share(const tqkv_allocator *mem, const tqkv_plan *plan,
                                                   uint32_t rank, uint32_t n_ranks,
                                                   tqkv_plan **out);

/* The file as bytes; *out from plan->mem, freed by tqkvi_free. The plan is sealed. */
TQKV_NODISCARD tqkv_status tqkvi_plan_serialise(const tqkv_plan *plan, uint8_t **out,
                                                size_t *n_bytes);

#endif /* TQKVI_PLAN_DATA_H */
