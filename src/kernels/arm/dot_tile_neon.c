/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of a tile. A block of 4 queries and 4 keys keeps its 16 sums in registers while the
 * channels run: 8 loads for 16 multiply-adds. Left-over queries go one by one, with 8 keys.
 */
#include "kernels/arm/block_neon.h"
#include "kernels/tables.h"

#define Q_BLOCK 4
#define K_BLOCK 4

static void dot_4(const float *q, const float *k, size_t n_k, size_t dim, float *s, size_t s_stride)
{
    for (size_t b = 0; b < n_k; b += K_BLOCK, k += K_BLOCK * dim) {
        tqkvk_four sum0 = tqkvk_four_zero(), sum1 = tqkvk_four_zero();
        tqkvk_four sum2 = tqkvk_four_zero(), sum3 = tqkvk_four_zero();
        for (size_t i = 0; i < dim; i += 4) {
            const tqkvk_four keys = tqkvk_four_load(k + i, dim);
            sum0 = tqkvk_four_fma(sum0, keys, vld1q_f32(q + i));
            sum1 = tqkvk_four_fma(sum1, keys, vld1q_f32(q + dim + i));
            sum2 = tqkvk_four_fma(sum2, keys, vld1q_f32(q + 2 * dim + i));
            sum3 = tqkvk_four_fma(sum3, keys, vld1q_f32(q + 3 * dim + i));
        }
        vst1q_f32(s + b, tqkvk_four_sums(sum0));
        vst1q_f32(s + s_stride + b, tqkvk_four_sums(sum1));
        vst1q_f32(s + 2 * s_stride + b, tqkvk_four_sums(sum2));
        vst1q_f32(s + 3 * s_stride + b, tqkvk_four_sums(sum3));
    }
}

/* Two blocks of keys: eight sums, so that additions do not wait for each other. */
static void dot_1(const float *q, const float *k, size_t n_k, size_t dim, float *s)
{
    for (size_t b = 0; b < n_k; b += 2 * K_BLOCK, k += 2 * K_BLOCK * dim) {
        tqkvk_four sum0 = tqkvk_four_zero(), sum1 = tqkvk_four_zero();
        for (size_t i = 0; i < dim; i += 4) {
            const float32x4_t query = vld1q_f32(q + i);
            sum0 = tqkvk_four_fma(sum0, tqkvk_four_load(k + i, dim), query);
            sum1 = tqkvk_four_fma(sum1, tqkvk_four_load(k + K_BLOCK * dim + i, dim), query);
        }
        vst1q_f32(s + b, tqkvk_four_sums(sum0));
        vst1q_f32(s + b + K_BLOCK, tqkvk_four_sums(sum1));
    }
}

void tqkvk_dot_tile_f32_neon(const float *q, size_t n_q, const float *k, size_t n_k, size_t dim,
                             float *s, size_t s_stride)
{
    size_t a = 0;
    for (; a + Q_BLOCK <= n_q; a += Q_BLOCK)
        dot_4(q + a * dim, k, n_k, dim, s + a * s_stride, s_stride);
    for (; a < n_q; a++)
        dot_1(q + a * dim, k, n_k, dim, s + a * s_stride);
}
