/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows times matrix. Lanes are outputs, so that each output keeps its order of additions; eight
 * vectors of outputs stay in registers while i runs, which hides the latency of the additions: of
 * one row 32 outputs, or of four rows 16, which then share what is read of the matrix.
 */
#include "kernels/arm/block_neon.h"
#include "kernels/tables.h"

static void transform_32(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four lo = tqkvk_four_zero();
    tqkvk_four hi = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim) {
        lo = tqkvk_four_fma_n(lo, tqkvk_four_load(m, 4), x[i]);
        hi = tqkvk_four_fma_n(hi, tqkvk_four_load(m + 16, 4), x[i]);
    }
    tqkvk_four_store(y, lo);
    tqkvk_four_store(y + 16, hi);
}

static void transform_16(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four sum = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim)
        sum = tqkvk_four_fma_n(sum, tqkvk_four_load(m, 4), x[i]);
    tqkvk_four_store(y, sum);
}

static void transform_4_16(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four sum0 = tqkvk_four_zero(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (size_t i = 0; i < dim; i++, m += dim) {
        const tqkvk_four row = tqkvk_four_load(m, 4);
        sum0 = tqkvk_four_fma_n(sum0, row, x[i]);
        sum1 = tqkvk_four_fma_n(sum1, row, x[dim + i]);
        sum2 = tqkvk_four_fma_n(sum2, row, x[2 * dim + i]);
        sum3 = tqkvk_four_fma_n(sum3, row, x[3 * dim + i]);
    }
    tqkvk_four_store(y, sum0);
    tqkvk_four_store(y + dim, sum1);
    tqkvk_four_store(y + 2 * dim, sum2);
    tqkvk_four_store(y + 3 * dim, sum3);
}

void tqkvk_transform_f32_neon(const float *m, const float *x, float *y, size_t dim, size_t n_rows)
{
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        for (size_t j = 0; j < dim; j += 16)
            transform_4_16(m + j, x + r * dim, y + r * dim + j, dim);
    }
    for (; r < n_rows; r++) {
        size_t j = 0;
        for (; j + 32 <= dim; j += 32)
            transform_32(m + j, x + r * dim, y + r * dim + j, dim);
        for (; j < dim; j += 16)
            transform_16(m + j, x + r * dim, y + r * dim + j, dim);
    }
}

/* Pairs 1 and 2 apart. */
static inline float32x4_t butterflies_of_4(float32x4_t v)
{
    const float32x4_t even = vuzp1q_f32(v, v), odd = vuzp2q_f32(v, v);
    v = vzip1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
    const float32x2_t low = vget_low_f32(v), high = vget_high_f32(v);
    return vcombine_f32(vadd_f32(low, high), vsub_f32(low, high));
}

void tqkvk_hadamard_f32_neon(const float *factor, const float *x, float *y, size_t dim,
                             size_t block)
{
    for (size_t i = 0; i < dim; i += 4)
        vst1q_f32(y + i, butterflies_of_4(vmulq_f32(vld1q_f32(factor + i), vld1q_f32(x + i))));
    for (size_t n = 4; n < block; n *= 2) {
        for (size_t first = 0; first < dim; first += 2 * n) {
            for (size_t i = first; i < first + n; i += 4) {
                const float32x4_t a = vld1q_f32(y + i), b = vld1q_f32(y + i + n);
                vst1q_f32(y + i, vaddq_f32(a, b));
                vst1q_f32(y + i + n, vsubq_f32(a, b));
            }
        }
    }
}
