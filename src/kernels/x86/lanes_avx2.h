/* SPDX-License-Identifier: Apache-2.0 */
/* One number from the lanes of a register, halving: lane i with i + 4, i + 2, i + 1. */
#ifndef TQKVK_LANES_AVX2_H
#define TQKVK_LANES_AVX2_H

#include <immintrin.h>

static inline float tqkvk_max_lanes(__m256 v)
{
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

static inline float tqkvk_sum_lanes(__m256 v)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

#endif /* TQKVK_LANES_AVX2_H */
