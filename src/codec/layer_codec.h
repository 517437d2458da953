/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The codec of one layer: rows of the model to codes and back.
 *
 *     x --(K: turn by -base)--> --(- mean)--> --(transform)--> y --(scale, codes)--> row
 *
 * The public tqkv_codec is this object. It never changes after creation.
 */
#ifndef TQKVI_LAYER_CODEC_H
#define TQKVI_LAYER_CODEC_H

#include <stdbool.h>

#include "format/plan_data.h"
#include "kernels/kernels.h"
#include "turboquant/codec.h"

typedef struct tqkvi_head_codec {
    uint32_t dim;
    bool plain;     /* every tier is f16: no mean, no transform, no scale */
    bool zero_mean; /* the mean is 0 in every channel */
    bool no_mean;   /* and +0: less the mean a row is the same bits */
    const tqkvi_head_plan *plan;
    uint32_t hadamard_block; /* channels of the Walsh-Hadamard blocks of the transform, or 0 */
    float *factor;           /* [dim] of the input channels then */
    float *weight;           /* [dim / 16] the plan's, divided by the largest, at least 2^-20 */
    float *inverse;          /* [dim][dim]: x[i] = mean[i] + sum_j inverse[j * dim + i] * y[j],
                     * so q'[j] = sum_i inverse[j * dim + i] * q[i] gives q.x = q'.y + q.mean */
    /* For few rows at a time; value NULL where there is none. */
    tqkvk_half_matrix transform_half; /* the transform's numbers; none beside hadamard_block */
    tqkvk_half_matrix inverse_half; /* rounded: for attention only. Of K the inverse transposed */
} tqkvi_head_codec;

struct tqkv_codec {
    tqkv_allocator mem;
    const tqkv_plan *plan;
    const tqkvi_layer_plan *layer;
    const tqkvk_table *kernels;
    tqkv_rope rope; /* inv_freq owned */
    float *turns;   /* [n_turns][n_rot] cos and sin of the bases of the first frames after 0 */
    uint32_t n_turns;
    uint32_t n_kv_heads, n_tiers;
    tqkvi_head_codec *heads[2]; /* [n_kv_heads] by tqkv_side */
    uint8_t *halves;            /* of all heads, see half_matrix.h */
};

/* See tqkv_codec_create; plan and layer are good, rope is good or NULL. */
TQKV_NODISCARD tqkv_status tqkvi_codec_create(const tqkv_plan *plan, uint32_t layer,
                                              const tqkv_rope *rope, const tqkv_allocator *mem,
                                              tqkv_codec **out);
/* Accepts NULL and a half-built codec. */
void tqkvi_codec_destroy(tqkv_codec *codec);

static inline const tqkvi_layout *tqkvi_codec_layout(const tqkv_codec *codec, tqkv_side side,
                                                     uint32_t head, uint32_t tier)
{
    return &codec->heads[side][head].plan->layout[tier];
}

/*
 * m: [dim][dim] f32 and its inverse, Gauss-Jordan with pivoting in f64; work: [2 * dim * dim].
 * The same bits on every CPU. Returns false when m has no inverse.
 */
bool tqkvi_invert(const float *m, uint32_t dim, float *inverse, double *work);

/* First position of the frame that holds a position: the base of its K. */
int32_t tqkvi_frame_base(int32_t position, uint32_t frame_tokens);

/* cos and sin of base * inv_freq: [n_rot / 2] each, deterministic on every CPU. */
void tqkvi_turn_init(const tqkv_rope *rope, int32_t base, float *cos_out, float *sin_out);
/* The same of a codec, which has those of many bases at hand. */
void tqkvi_codec_turn(const tqkv_codec *codec, int32_t base, float *cos_out, float *sin_out);
/* Turns a row by +base (or, with inverse, by -base), in place. Multiplies and adds apart. */
void tqkvi_turn_apply(const tqkv_rope *rope, const float *cos_in, const float *sin_in, bool inverse,
                      float *row);

/* Rows that are encoded at once at most: they share what is read of the transform. */
#define TQKVI_ROWS_AT_ONCE 4

/* Floats of scratch that the row functions below need, TQKV_ALIGN-aligned. */
#define TQKVI_CODEC_SCRATCH_MAX (2 * TQKVI_ROWS_AT_ONCE * TQKVI_DIM_MAX + TQKV_ALIGN)
size_t tqkvi_codec_scratch_floats(const tqkv_codec *codec);

/*
 * One row. x: [dim] f32, borrowed. turn_cos/turn_sin: of the base for K, NULL for V or base 0.
 * Returns false when the row had NaN or Inf (stored as zero). x, codes of any alignment.
 */
bool tqkvi_encode_row(const tqkv_codec *codec, tqkv_side side, uint32_t head, uint32_t tier,
                      const float *turn_cos, const float *turn_sin, const float *x, uint8_t *scale,
                      uint8_t *codes, float *scratch);
/*
 * Up to TQKVI_ROWS_AT_ONCE rows of one head, tier and base. x: [n] rows, stride floats apart. scales:
 * [n], codes: [n][row_bytes] out. Returns how many had NaN or Inf.
 */
size_t tqkvi_encode_few(const tqkv_codec *codec, tqkv_side side, uint32_t head, uint32_t tier,
                        const float *turn_cos, const float *turn_sin, const float *x, size_t stride,
                        size_t n, uint8_t *scales, uint8_t *codes, float *scratch);
void tqkvi_decode_row(const tqkv_codec *codec, tqkv_side side, uint32_t head, uint32_t tier,
                      const float *turn_cos, const float *turn_sin, uint8_t scale,
                      const uint8_t *codes, float *x, float *scratch);
/* From one tier's codes to another's with the same base: no transform needed. */
void tqkvi_recode_row(const tqkv_codec *codec, tqkv_side side, uint32_t head, uint32_t tier_from,
                      uint8_t scale_from, const uint8_t *codes_from, uint32_t tier_to,
                      uint8_t *scale_to, uint8_t *codes_to, float *scratch);

#endif /* TQKVI_LAYER_CODEC_H */
