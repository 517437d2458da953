/* SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>

#include "kernels/tables.h"

static inline __m256i bits_of(const float *x)
{
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)x),
                            _mm256_set1_epi32(0x7fffffff));
}

uint32_t tqkvk_largest_bits_avx2(const float *x, size_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t i = 0; i < n; i += 16) {
        a = _mm256_max_epu32(a, bits_of(x + i));
        b = _mm256_max_epu32(b, bits_of(x + i + 8));
    }
    a = _mm256_max_epu32(a, b);
    __m128i top = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(top);
}
