/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels: plain functions over arrays, one table per instruction set, every table complete.
 *
 * Exact kernels decide stored bytes: the same bits on every CPU and GPU. They multiply and add
 * apart (no fused operations), in the order that the contract gives. Bounded kernels only produce
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
 * y[j] = sum over i = 0, 1, ..., dim - 1 of m[i * dim + j] * x[i], starting from 0. Exact: each
 * product is rounded, then added, in ascending i.
 */
typedef void tqkvk_transform_fn(const float *m, const float *x, float *y, size_t dim);

/*
 * Chooses the scale and the codes of one row and packs them, as docs/FORMAT.md "Encoding a row"
 * says. y: [dim] in unit variance, finite. weight: [n_units], 2^-20 .. 1. codes: [row_bytes] out,
 * any alignment. Returns the scale byte, 1..255 (zero rows are the codec's business). Exact.
 * Not for plain (f16) layouts.
 */
typedef uint8_t tqkvk_encode_row_fn(const tqkvi_layout *layout, const float *weight, const float *y,
                                    uint8_t *codes);

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

typedef struct tqkvk_table {
    const char *name; /* "ref", "avx2", ... */
    tqkvk_transform_fn *transform;
    tqkvk_encode_row_fn *encode_row;
    tqkvk_unpack_rows_fn *unpack_rows;
    tqkvk_unpack_block_fn *unpack_block;
    tqkvk_half_to_float_fn *half_to_float;
    tqkvk_float_to_half_fn *float_to_half;
    tqkvk_dot_tile_fn *dot_tile;
    tqkvk_softmax_step_fn *softmax_step;
    tqkvk_accumulate_tile_fn *accumulate_tile;
} tqkvk_table;

/* The best table of this CPU, lowered by TQKV_ISA=ref|avx2; chosen once. Threads: any. */
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
