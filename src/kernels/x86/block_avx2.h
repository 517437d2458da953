/* SPDX-License-Identifier: Apache-2.0 */
/* Four vectors at a time, by name: compilers keep those in registers at -O2 as well. */
#ifndef TQKVK_BLOCK_AVX2_H
#define TQKVK_BLOCK_AVX2_H

#include <immintrin.h>
#include <stddef.h>

typedef struct tqkvk_four {
    __m256 v0, v1, v2, v3;
} tqkvk_four;

static inline tqkvk_four tqkvk_four_zero(void)
{
    const __m256 zero = _mm256_setzero_ps();
    return (tqkvk_four){zero, zero, zero, zero};
}

/* Vectors `step` floats apart. */
static inline tqkvk_four tqkvk_four_load(const float *x, size_t step)
{
    return (tqkvk_four){_mm256_load_ps(x), _mm256_load_ps(x + step), _mm256_load_ps(x + 2 * step),
                        _mm256_load_ps(x + 3 * step)};
}

static inline void tqkvk_four_store(float *x, tqkvk_four a)
{
    _mm256_store_ps(x, a.v0);
    _mm256_store_ps(x + 8, a.v1);
    _mm256_store_ps(x + 16, a.v2);
    _mm256_store_ps(x + 24, a.v3);
}

static inline tqkvk_four tqkvk_four_mul(tqkvk_four a, __m256 b)
{
    return (tqkvk_four){_mm256_mul_ps(a.v0, b), _mm256_mul_ps(a.v1, b), _mm256_mul_ps(a.v2, b),
                        _mm256_mul_ps(a.v3, b)};
}

/* sum + a * b, fused. */
static inline tqkvk_four tqkvk_four_fma(tqkvk_four sum, tqkvk_four a, __m256 b)
{
    return (tqkvk_four){_mm256_fmadd_ps(a.v0, b, sum.v0), _mm256_fmadd_ps(a.v1, b, sum.v1),
                        _mm256_fmadd_ps(a.v2, b, sum.v2), _mm256_fmadd_ps(a.v3, b, sum.v3)};
}

/* The sum over the lanes of each vector. */
static inline __m128 tqkvk_four_sums(tqkvk_four a)
{
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a.v0, a.v1), _mm256_hadd_ps(a.v2, a.v3));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#endif /* TQKVK_BLOCK_AVX2_H */
