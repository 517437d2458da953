/* SPDX-License-Identifier: Apache-2.0 */
/* Products of bytes, four to a sum: three instructions of AVX2, or one where there is VNNI. */
#ifndef TQKVK_DOT_BYTES_AVX2_H
#define TQKVK_DOT_BYTES_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "kernels/by_width.h"

/*
 * To each of eight sums the products of four bytes with four bytes, a unsigned and b signed. Two
 * neighbouring products fit in 16 bits together. A constant wherever it is passed.
 */
typedef __m256i tqkvk_dot_bytes_fn(__m256i sum, __m256i a, __m256i b);

/* Four bytes, eight times. */
TQKVK_INLINE __m256i tqkvk_repeat_four(const void *bytes)
{
    int four;
    memcpy(&four, bytes, sizeof(four));
    return _mm256_set1_epi32(four);
}

TQKVK_INLINE __m256i tqkvk_dot_bytes_avx2(__m256i sum, __m256i a, __m256i b)
{
    const __m256i pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* Both ways to write the same instruction: of AVX-512 VL, and of CPUs without AVX-512. */
#if defined(__AVX512VNNI__)
TQKVK_INLINE __m256i tqkvk_dot_bytes_vnni(__m256i sum, __m256i a, __m256i b)
{
    return _mm256_dpbusd_epi32(sum, a, b);
}
#elif defined(__AVXVNNI__)
TQKVK_INLINE __m256i tqkvk_dot_bytes_vnni(__m256i sum, __m256i a, __m256i b)
{
    return _mm256_dpbusd_avx_epi32(sum, a, b);
}
#endif

#endif /* TQKVK_DOT_BYTES_AVX2_H */
