/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scale bytes to values, eight at a time. Sixteen steps double a value: bits 0..3 of a byte choose
 * one of sixteen values, bits 4..7 are added to its exponent.
 */
#include <immintrin.h>

#include "kernels/levels.h"
#include "kernels/tables.h"

#define OCTAVE 16      /* the first byte of the sixteen values */
#define TO_EXPONENT 19 /* bit 4 of a byte to bit 23 of a float */

void tqkvk_scale_values_avx2(const uint8_t *scales, size_t n, float *out)
{
    const __m256 low = _mm256_loadu_ps(tqkvk_scale_values + OCTAVE);
    const __m256 high = _mm256_loadu_ps(tqkvk_scale_values + OCTAVE + 8);

    for (size_t i = 0; i < n; i += 8) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(scales + i));
        const __m256i code = _mm256_cvtepu8_epi32(bytes);
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                              _mm256_permutevar8x32_ps(high, code), bit3);
        const __m256i octaves = _mm256_and_si256(code, _mm256_set1_epi32(0xf0));
        const __m256i more = _mm256_sub_epi32(octaves, _mm256_set1_epi32(OCTAVE));
        const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(value),
                                              _mm256_slli_epi32(more, TO_EXPONENT));
        const __m256i none = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
        _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_andnot_si256(none, bits)));
    }
}
