/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Vector times matrix. Lanes are outputs, so that each output keeps its order of additions; eight
 * vectors of outputs stay in registers while i runs, which hides the latency of the additions.
 */
#include "kernels/tables.h"
#include "kernels/x86/block_avx2.h"

static void transform_64(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four lo = tqkvk_four_zero();
    tqkvk_four hi = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim) {
        const __m256 xi = _mm256_broadcast_ss(x + i);
        lo = tqkvk_four_add(lo, tqkvk_four_mul(tqkvk_four_load(m, 8), xi));
        hi = tqkvk_four_add(hi, tqkvk_four_mul(tqkvk_four_load(m + 32, 8), xi));
    }
    tqkvk_four_store(y, lo);
    tqkvk_four_store(y + 32, hi);
}

static void transform_16(const float *m, const float *x, float *y, size_t dim)
{
    __m256 lo = _mm256_setzero_ps();
    __m256 hi = _mm256_setzero_ps();
    for (size_t i = 0; i < dim; i++, m += dim) {
        const __m256 xi = _mm256_broadcast_ss(x + i);
        lo = _mm256_add_ps(lo, _mm256_mul_ps(_mm256_load_ps(m), xi));
        hi = _mm256_add_ps(hi, _mm256_mul_ps(_mm256_load_ps(m + 8), xi));
    }
    _mm256_store_ps(y, lo);
    _mm256_store_ps(y + 8, hi);
}

void tqkvk_transform_f32_avx2(const float *m, const float *x, float *y, size_t dim)
{
    size_t j = 0;
    for (; j + 64 <= dim; j += 64)
        transform_64(m + j, x, y + j, dim);
    for (; j < dim; j += 16)
        transform_16(m + j, x, y + j, dim);
}
