/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels: plain functions over arrays, one table per instruction set, every table complete.
 *
 * Exact kernels decide stored bytes: the same bits on every CPU and GPU. They multiply and add
 * fused only where the contract says so, and in the order that it gives. Bounded kernels only produce
 * output; they may fuse and reorder, and state their error.
 *
 * Arrays are TQKV_ALIGN-aligned and readable TQKV_ALIGN bytes past their end unless said otherwise.
 * dim is a multiple of 16.
 */
#ifndef TQKVK_KERNELS_H
#define TQKVK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "format/row_layout.h"

/*
 * Rows times matrix; x, y: [n_rows][dim]. y[j] = sum over i = 0, 1, ..., dim - 1 of
 * m[i * dim + j] * x[i], starting from 0. Exact: each product is added fused, in ascending i.
 */
typedef void tqkvk_transform_fn(const float *m, const float *x, float *y, size_t dim,
                                size_t n_rows);

/*
 * A matrix as transform takes it, in half the bytes: m[i * dim + j] = value[i * dim + j] * factor[j].
 * The products are finite and normal or 0 in f32, so they are exact.
 */
typedef struct tqkvk_half_matrix {
    const uint16_t *value; /* [dim][dim] f16 */
    const float *factor;   /* [dim] powers of two */
} tqkvk_half_matrix;

/* transform of such a matrix, for few rows: reading it counts then. Exact: the bits of transform. */
typedef void tqkvk_transform_half_fn(const tqkvk_half_matrix *m, const float *x, float *y,
                                     size_t dim, size_t n_rows);

/*
 * The same for Walsh-Hadamard matrices of `block` channels (a power of two, at least 16, that
 * divides dim) times a factor for each input channel: y = factor[i] * x[i], then within each block,
 * for n = 1, 2, 4, ... block / 2, the pairs (j, j + n) where j & n is 0 become their sum and their
 * difference. x, y: [dim], x of any alignment. Exact.
 */
typedef void tqkvk_hadamard_fn(const float *factor, const float *x, float *y, size_t dim,
                               size_t block);

/*
 * The largest bits of |x[i]|: 0 for a row of zeros, TQKVK_BITS_INFINITE or more where one is
 * infinite or a NaN. x: [n] of any alignment, n a multiple of 16. Exact.
 */
#define TQKVK_BITS_INFINITE 0x7f800000u
typedef uint32_t tqkvk_largest_bits_fn(const float *x, size_t n);

/*
 * Chooses the scales and the codes of n_rows rows and packs them, as docs/FORMAT.md "Encoding a row"
 * says. y: [n_rows][dim] in unit variance, finite. weight: [n_units], 2^-20 .. 1. scales: [n_rows]
 * out, 1..255 (zero rows are the codec's business). codes: [n_rows][row_bytes] out, any alignment.
 * Exact. Not for plain (f16) layouts.
 */
typedef void tqkvk_encode_rows_fn(const tqkvi_layout *layout, const float *weight, const float *y,
                                  size_t n_rows, uint8_t *scales, uint8_t *codes);

/*
 * Unpacks n_rows rows (codes: row_bytes apart, any alignment) to levels: out[r * dim + j] is the
 * integer level times the step of its width, 0 in a unit of width 0; times the scale of the row it
 * would be y. Nothing past the last row of codes is read. Exact. Not for plain (f16) layouts.
 */
typedef void tqkvk_unpack_rows_fn(const tqkvi_layout *layout, const uint8_t *codes, size_t n_rows,
                                  float *out);

/*
 * Unpacks the 16 rows of a section of a block (format/block_rows.h) to out: [16][dim], as
 * unpack_rows does. codes: [16 * row_bytes], what follows the scales, any alignment; nothing past
 * it is read. Exact. Not for plain (f16) layouts.
 */
typedef void tqkvk_unpack_block_fn(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                                   float *out);

/*
 * x: n f16 values, n any; every pointer of any alignment, nothing past the ends is touched. Exact,
 * but a NaN may come out with another payload.
 */
typedef void tqkvk_half_to_float_fn(const void *x, float *out, size_t n);
/* The same; nearest even, from 65520 on infinity. */
typedef void tqkvk_float_to_half_fn(const float *x, void *out, size_t n);

/*
 * s[a * s_stride + b] = sum_i q[a * dim + i] * k[b * dim + i], a < n_q, b < n_k; n_k a multiple
 * of 8, s_stride >= n_k, s of any alignment. Bounded: |error| <= dim * eps * sum |q k|.
 */
typedef void tqkvk_dot_tile_fn(const float *q, size_t n_q, const float *k, size_t n_k, size_t dim,
                               float *s, size_t s_stride);

/*
 * One step of the online softmax of a row of n scores (n a multiple of 8), in place.
 * s[b] becomes exp(s[b] - m') with m' = max(*m, max s), scores of -inf become 0. *m becomes m',
 * *l becomes *l * exp(*m - m') + sum of the new s. Returns exp(*m - m') (the factor for the output
 * so far), 1 when m' is -inf. Scores are below +inf. Bounded: exp within 4 ulp, 0 below 2^-126.
 */
typedef float tqkvk_softmax_step_fn(float *s, size_t n, float *m, float *l);

/*
 * o[a * dim + i] = o[a * dim + i] * f[a] + sum_b p[a * p_stride + b] * v[b * dim + i], n_k any.
 * p and f of any alignment. Bounded: |error| <= (n_k + 2) * eps * sum |terms|.
 */
typedef void tqkvk_accumulate_tile_fn(const float *p, size_t p_stride, size_t n_q, const float *v,
                                      size_t n_k, size_t dim, const float *f, float *o);

/*
 * The next six are attention over the codes of blocks. Queries are rounded to 7 bits and weights
 * to 7 or 14, so that sums of products with levels are integers. Where a query needs more, a second
 * part of 1 / TQKVK_LOW_PARTS the size follows in a second call.
 */
#define TQKVK_Q_MAX 63 /* a u8 level times an s8 query, twice, fits in 16 bits */
#define TQKVK_LOW_PARTS 126
#define TQKVK_WEIGHT_MAX 16383      /* two halves of 7 bits, signed or not */
#define TQKVK_COARSE_WEIGHT_MAX 127 /* one */
#define TQKVK_TINY 0x1p-100f        /* what is smaller is rounded to 0 */
#define TQKVK_TILE_TOKENS 64

/* Sixteen channels of a query. Each unit has a factor of its own: units differ in size. */
typedef struct tqkvk_query_unit {
    int8_t q[TQKV_UNIT_CHANNELS]; /* |q| <= TQKVK_Q_MAX */
    int32_t start;                /* -128 times the sum of q: takes 128 off each level */
    float factor;                 /* the query is about q * factor */
} tqkvk_query_unit;

/*
 * Rounds a query y: [n_units * 16]. In each unit the factor is the largest |y| / TQKVK_Q_MAX, and q
 * the integers nearest to y / factor, ties to even. low (may be NULL): what is left, with 1 /
 * TQKVK_LOW_PARTS of the factor. So q * factor, or the sum of both, is within half a factor of y.
 * A unit whose largest |y| is below TQKVK_TINY is 0; one with a NaN or an infinity has q = 0 and
 * the factor NaN. Exact.
 */
typedef void tqkvk_round_query_fn(const float *y, size_t n_units, tqkvk_query_unit *out,
                                  tqkvk_query_unit *low);

/*
 * Scores of blocks of K. codes: [n_blocks], 1..4, each what follows the scales of a section, any
 * alignment. q: [n_q][n_units], n_q any.
 * s[a * s_stride + 16 * p + t] += sum over units of factor * step of the unit * (sum over its
 * channels of q * level of token t of block p). The inner sum is exact: at most 16 * 63 * 255,
 * below 2^18, whatever the head size. s: TQKV_ALIGN-aligned, s_stride a multiple of 16. Bounded:
 * |error| <= (n_units + 2) eps |terms|.
 */
typedef void tqkvk_score_blocks_fn(const tqkvi_layout *layout, const uint8_t *const *codes,
                                   size_t n_blocks, const tqkvk_query_unit *q, size_t n_q, float *s,
                                   size_t s_stride);

/* Values of scale bytes, as tqkvk_scale_value. n a multiple of 16; any alignment. Exact. */
typedef void tqkvk_scale_values_fn(const uint8_t *scales, size_t n, float *out);

/*
 * s[b] = s[b] * scale[b] + q_mean, or 0 where scale[b] is 0: such a row is the zero vector. n a
 * multiple of 16. Bounded: |error| <= 2 eps |terms|.
 */
typedef void tqkvk_scale_scores_fn(float *s, const float *scale, size_t n, float q_mean);

/*
 * p[b] *= scale[b]; scale >= 0. n a multiple of 16. Returns the sum of p, as it was, where scale is
 * not 0. Products are exact, the sum is bounded by n * eps * sum.
 */
typedef float tqkvk_scale_weights_fn(float *p, const float *scale, size_t n);

/*
 * Rounds the weights v[b] = p[b] * scale[b] of up to TQKVK_TILE_TOKENS tokens; p, scale >= 0. n a
 * multiple of 16. most: TQKVK_WEIGHT_MAX or TQKVK_COARSE_WEIGHT_MAX. Returns g, the largest v /
 * most. w: [n] out, the integer nearest to v / g, ties to even; 0 for a NaN. Where the largest v is
 * below TQKVK_TINY, w is 0. *kept: the sum of p where scale is not 0. w is exact, given v; g is one
 * quotient; *kept is bounded by n * eps * sum.
 */
typedef float tqkvk_round_weights_fn(const float *p, const float *scale, size_t n, uint32_t most,
                                     uint16_t *w, float *kept);

/*
 * o[a * dim + i] = o[a * dim + i] * f[a] + g[a] * step of channel i * (sum over p and t of
 * w[a * w_stride + 16 * p + t] * level of channel i of token t of block p of V). codes as above;
 * w: <= most, which is as above; any alignment; n_blocks 1..4; n_q any. The sum is exact: at most
 * 64 * 16383 * 127 < 2^27. Bounded: |error| <= 4 eps |terms|.
 */
typedef void tqkvk_weigh_blocks_fn(const tqkvi_layout *layout, const uint8_t *const *codes,
                                   size_t n_blocks, uint32_t most, const uint16_t *w,
                                   size_t w_stride, size_t n_q, const float *f, const float *g,
                                   float *o);

typedef struct tqkvk_table {
    const char *name; /* "ref", "avx2", ... */
    tqkvk_transform_fn *transform;
    tqkvk_transform_half_fn *transform_half;
    tqkvk_hadamard_fn *hadamard;
    tqkvk_largest_bits_fn *largest_bits;
    tqkvk_encode_rows_fn *encode_rows;
    tqkvk_unpack_rows_fn *unpack_rows;
    tqkvk_unpack_block_fn *unpack_block;
    tqkvk_half_to_float_fn *half_to_float;
    tqkvk_float_to_half_fn *float_to_half;
    tqkvk_dot_tile_fn *dot_tile;
    tqkvk_softmax_step_fn *softmax_step;
    tqkvk_accumulate_tile_fn *accumulate_tile;
    tqkvk_round_query_fn *round_query;
    tqkvk_score_blocks_fn *score_blocks;
    tqkvk_scale_values_fn *scale_values;
    tqkvk_scale_scores_fn *scale_scores;
    tqkvk_scale_weights_fn *scale_weights;
    tqkvk_round_weights_fn *round_weights;
    tqkvk_weigh_blocks_fn *weigh_blocks;
} tqkvk_table;

/*
 * The best table of this CPU, lowered by TQKV_ISA=ref|avx2|avx2-vnni|avx512|avx512-vnni|avx512-vbmi
 * or ref|neon|neon-dotprod; chosen once. Threads: any.
 */
const tqkvk_table *tqkvk_get(void);
/* Every table that runs on this CPU, lowest first; *n out. For tests. */
const tqkvk_table *const *tqkvk_all(size_t *n);

/* Value of a scale byte, 1..255: 2 ^ ((scale - 128) / 16); 0 for 0. */
float tqkvk_scale_value(uint8_t scale);
/* Step and levels of a width: y is about level * step * scale. levels: [1 << bits]. */
float tqkvk_step(uint32_t bits);
const int8_t *tqkvk_levels(uint32_t bits);
/* Mean squared error of a width on N(0, 1), for bit allocation. bits 0 gives 1. */
double tqkvk_distortion(uint32_t bits);

#endif /* TQKVK_KERNELS_H */
