/* SPDX-License-Identifier: Apache-2.0 */
/* What encoders of rows have in common: sizes of 16 bits, sixteen a register, and errors. */
#ifndef TQKVK_ENCODE_ROWS_AVX2_H
#define TQKVK_ENCODE_ROWS_AVX2_H

#include <immintrin.h>
#include <stdbool.h>

#include "kernels/by_width.h"
#include "kernels/levels.h"
#include "kernels/scale_search.h"

/*
 * Rows whose units all have 8 bits. Where one candidate is not clearly the best and stable, or
 * would have to be limited, the scale stays 0, as it must come, and the codes as they were.
 */
void tqkvk_encode_rows_8_avx2(const tqkvi_layout *layout, const float *weight, const float *y,
                              size_t n_rows, uint8_t *scales, uint8_t *codes);

/* To whole numbers of at most 16 bits, twice in each word. */
static inline __m256i tqkvk_twice_16(__m256 v)
{
    const __m256i whole = _mm256_min_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(65535));
    return _mm256_or_si256(whole, _mm256_slli_epi32(whole, 16));
}

static inline __m256i tqkvk_broadcast_word(const uint32_t *factor)
{
    return _mm256_castps_si256(_mm256_broadcast_ss((const float *)(const void *)factor));
}

/* Half levels of whole sizes. */
static inline __m256i tqkvk_half_levels_of(__m256i double_size, __m256i to_half_levels)
{
    return _mm256_mulhi_epu16(double_size, to_half_levels);
}

/* Of 8 bits: the levels of half levels t (32 bytes), doubled; t + 1 but for its last bit. */
static inline __m256i tqkvk_double_levels_8(__m256i t)
{
    return _mm256_and_si256(_mm256_adds_epu8(t, _mm256_set1_epi8(1)),
                            _mm256_set1_epi8((char)(uint8_t)0xfe));
}

/* The value of doubled levels, of which each 16 bits have one in the upper byte. */
static inline __m256i tqkvk_values_of(__m256i double_level, __m256i to_size)
{
    return _mm256_mulhi_epu16(double_level, to_size);
}

/* sum + weight * v ^ 2, pair by pair */
static inline __m256 tqkvk_add_squares(__m256 sum, __m256i v, __m256 weight)
{
    return _mm256_fmadd_ps(weight, _mm256_cvtepi32_ps(_mm256_madd_epi16(v, v)), sum);
}

/* The errors of four candidates from their sums. */
static inline __m128 tqkvk_four_errors(const __m256 *sums)
{
    const __m256 a = _mm256_unpacklo_ps(sums[0], sums[1]), b = _mm256_unpacklo_ps(sums[2], sums[3]);
    const __m256 c = _mm256_unpackhi_ps(sums[0], sums[1]), d = _mm256_unpackhi_ps(sums[2], sums[3]);
    const __m256 pair[4] = {_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee),
                            _mm256_shuffle_ps(c, d, 0x44), _mm256_shuffle_ps(c, d, 0xee)};
    __m128 half[4]; /* pairs 0 + 2, 1 + 3, 4 + 6, 5 + 7 */
    for (int i = 0; i < 4; i++)
        half[i] = _mm_add_ps(_mm256_castps256_ps128(pair[i]), _mm256_extractf128_ps(pair[i], 1));
    return _mm_add_ps(_mm_add_ps(half[0], half[2]), _mm_add_ps(half[1], half[3]));
}

static inline __m256 tqkvk_eight_errors(const __m256 *sums)
{
    return _mm256_set_m128(tqkvk_four_errors(sums + 4), tqkvk_four_errors(sums));
}

/*
 * Of 16 errors the place of the least, where it is one and the row was not decoded from codes like
 * these; otherwise 16. Nearly every row has one.
 */
static inline size_t tqkvk_find_least(__m256 a, __m256 b, float near_error)
{
    const __m256 ab = _mm256_min_ps(a, b);
    __m128 low = _mm_min_ps(_mm256_castps256_ps128(ab), _mm256_extractf128_ps(ab, 1));
    low = _mm_min_ps(low, _mm_movehl_ps(low, low));
    low = _mm_min_ss(low, _mm_movehdup_ps(low));
    const __m256 least = _mm256_broadcastss_ps(low);
    const uint32_t mask =
        (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, least, _CMP_EQ_OQ)) |
        (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(b, least, _CMP_EQ_OQ)) << 8;
    const bool one = (mask & (mask - 1)) == 0;
    return one && _mm_cvtss_f32(low) > near_error ? (size_t)__builtin_ctz(mask) : 16;
}

/* How many of n thresholds of an octave (8 or 16) the mantissa of value >= 0 reaches. */
static inline int tqkvk_count_in_octave(const float *thresholds, int n, float value)
{
    const uint32_t bits = tqkvi_bits_of_float(value);
    const __m256 mantissa =
        _mm256_castsi256_ps(_mm256_set1_epi32((int)((bits & 0x7fffffu) | 0x3f800000u)));
    unsigned mask = 0;
    for (int i = 0; i < n; i += 8) {
        const __m256 passed = _mm256_cmp_ps(mantissa, _mm256_loadu_ps(thresholds + i), _CMP_GE_OQ);
        mask |= (unsigned)_mm256_movemask_ps(passed) << i;
    }
    return _mm_popcnt_u32(mask);
}

/*
 * Index of a mean square, less that of 1. Thresholds repeat from octave to octave, eight of energy
 * (2 ^ (1/16), 2 ^ (3/16), ...) and sixteen of peaks: count by exponent, then within the octave.
 */
static inline int tqkvk_energy_index(float mean)
{
    return 8 * tqkvk_exponent_of(mean) +
           tqkvk_count_in_octave(&tqkvk_energy_thresholds[129], 8, mean);
}

static inline int tqkvk_peak_index(float peak)
{
    return 16 * tqkvk_exponent_of(peak) +
           tqkvk_count_in_octave(&tqkvk_peak_thresholds[129], 16, peak);
}

#endif /* TQKVK_ENCODE_ROWS_AVX2_H */
