/* SPDX-License-Identifier: Apache-2.0 */
/* Half conversions by F16C; the last values of an odd count go through ref. */
#include <immintrin.h>

#include "kernels/tables.h"

void tqkvk_half_to_float_avx2(const void *x, float *out, size_t n)
{
    const uint8_t *from = x;
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                      (const __m128i *)(const void *)(from + 2 * i))));
    tqkvk_half_to_float_ref(from + 2 * i, out + i, n - i);
}

void tqkvk_float_to_half_avx2(const float *x, void *out, size_t n)
{
    uint8_t *to = out;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(to + 2 * i), half);
    }
    tqkvk_float_to_half_ref(x + i, to + 2 * i, n - i);
}
