/* SPDX-License-Identifier: Apache-2.0 */
/* What goes into the integer products of a tile: queries to bytes, weights to 7 or 14 bits. */
#include <immintrin.h>
#include <math.h>

#include "kernels/tables.h"
#include "kernels/x86/lanes_avx2.h"

static inline __m256 absolute(__m256 x)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

/* The largest |x| of sixteen; NaN where one is not finite. */
static inline float largest(__m256 x0, __m256 x1)
{
    const __m256 zero = _mm256_setzero_ps();
    const __m256 none = _mm256_add_ps(_mm256_mul_ps(x0, zero), _mm256_mul_ps(x1, zero));
    if (_mm256_movemask_ps(_mm256_cmp_ps(none, zero, _CMP_NEQ_UQ)))
        return NAN;
    return tqkvk_max_lanes(_mm256_max_ps(absolute(x0), absolute(x1)));
}

/* Sixteen integers within -127..127, and -128 times their sum. */
static inline void store_query(tqkvk_query_unit *to, __m256i a, __m256i b, float factor)
{
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(-128));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
    _mm_storeu_si128((__m128i *)(void *)to->q, bytes);
    to->start = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_srli_epi64(sum, 32)));
    to->factor = factor;
}

static inline __m256i round_rest(__m256 x, __m256i whole)
{
    const __m256 rest = _mm256_sub_ps(x, _mm256_cvtepi32_ps(whole));
    return _mm256_cvtps_epi32(_mm256_mul_ps(rest, _mm256_set1_ps(TQKVK_LOW_PARTS)));
}

static inline void round_unit(const float *y, tqkvk_query_unit *out, tqkvk_query_unit *low)
{
    const __m256 y0 = _mm256_load_ps(y), y1 = _mm256_load_ps(y + 8);
    const float top = largest(y0, y1);
    if (!(top >= TQKVK_TINY)) {
        *out = (tqkvk_query_unit){.factor = isnan(top) ? top : 0.0f};
        if (low)
            *low = *out;
        return;
    }
    const float factor = top / TQKVK_Q_MAX;
    const __m256 inverse = _mm256_set1_ps(TQKVK_Q_MAX / top);
    const __m256 x0 = _mm256_mul_ps(y0, inverse), x1 = _mm256_mul_ps(y1, inverse);
    const __m256i whole0 = _mm256_cvtps_epi32(x0), whole1 = _mm256_cvtps_epi32(x1);
    store_query(out, whole0, whole1, factor);
    if (low)
        store_query(low, round_rest(x0, whole0), round_rest(x1, whole1), factor / TQKVK_LOW_PARTS);
}

void tqkvk_round_query_i8_avx2(const float *y, size_t n_units, tqkvk_query_unit *out,
                               tqkvk_query_unit *low)
{
    for (size_t u = 0; u < n_units; u++)
        round_unit(y + u * TQKV_UNIT_CHANNELS, out + u, low ? low + u : NULL);
}

/* The largest p * scale; a NaN does not count. */
static inline float measure(const float *p, const float *scale, size_t n, float *kept)
{
    __m256 top = _mm256_setzero_ps(), sum = _mm256_setzero_ps();

    for (size_t b = 0; b < n; b += 8) {
        const __m256 size = _mm256_load_ps(scale + b), one = _mm256_loadu_ps(p + b);
        const __m256 some = _mm256_cmp_ps(size, _mm256_setzero_ps(), _CMP_NEQ_OQ);
        top = _mm256_max_ps(_mm256_mul_ps(one, size), top);
        sum = _mm256_add_ps(sum, _mm256_and_ps(one, some));
    }
    *kept = tqkvk_sum_lanes(sum);
    return tqkvk_max_lanes(top);
}

static inline __m256i round_eight(const float *p, const float *scale, __m256 inverse)
{
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(p), _mm256_load_ps(scale));
    return _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
}

float tqkvk_round_weights_i16_avx2(const float *p, const float *scale, size_t n, uint32_t most,
                                   uint16_t *w, float *kept)
{
    const float top = measure(p, scale, n, kept);
    const __m256 inverse = _mm256_set1_ps(top >= TQKVK_TINY ? (float)most / top : 0.0f);

    for (size_t b = 0; b < n; b += 16) {
        const __m256i first = round_eight(p + b, scale + b, inverse);
        const __m256i second = round_eight(p + b + 8, scale + b + 8, inverse);
        /* A NaN became the least integer, which packus takes to 0. */
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
        _mm256_storeu_si256((__m256i *)(void *)(w + b), words);
    }
    return top / (float)most;
}
