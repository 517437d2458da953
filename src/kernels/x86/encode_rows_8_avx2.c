/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of 8 bits only. A level is a product there and no look-up; all six candidates have room in
 * registers; and the largest level, which says whether a candidate is stable, is that of the
 * largest size. What is rare (ties, rows that were decoded before, scales at an end) is left to
 * the search of all widths.
 */
#include <float.h>
#include <immintrin.h>

#include "kernels/tables.h"
#include "kernels/x86/encode_rows_avx2.h"
#include "kernels/x86/lanes_avx2.h"

#define LANES TQKV_UNIT_CHANNELS
/*
 * Rows go through each step together: a row alone is a chain of sums and look-ups that is longer
 * than what a core sees at once, so nothing else would be done while it waits.
 */
#define ROWS_IN_STEP 4

#define NONE SIZE_MAX
#define PEAK_MIN 3 /* all candidates are within 1..255, and eight entries of a table */
#define PEAK_MAX 250

/*
 * Candidates by place: peak, peak + 1, peak + 2, peak + 3, peak - 2, peak - 1. In most rows the
 * last two, which are lower, cut so much off the largest size that they cannot be the best: they
 * are tried only where that is not known.
 */
#define HIGH 4

typedef struct search_8 {
    float unit;       /* a whole size is a size times this */
    uint32_t largest; /* whole size */
    tqkvk_row_range range;
    _Alignas(32) uint32_t to_half_levels[8], to_size[8]; /* twice in each word */
    _Alignas(16) float high_errors[HIGH];
    _Alignas(32) int16_t size[TQKV_UNITS_MAX * LANES];   /* with sign, as the packs leave them */
} search_8;

static inline __m256 absolute(const float *y)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_load_ps(y));
}

static float largest_of(const float *y, uint32_t n_units)
{
    __m256 a = _mm256_setzero_ps(), b = a;
    for (uint32_t u = 0; u < n_units; u++, y += LANES) {
        a = _mm256_max_ps(a, absolute(y));
        b = _mm256_max_ps(b, absolute(y + 8));
    }
    return tqkvk_max_lanes(_mm256_max_ps(a, b));
}

/* Numbers of scales by place of the candidate. */
static __m256 load_by_place(const float *of_peak)
{
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(of_peak - 2),
                                    _mm256_setr_epi32(2, 3, 4, 5, 0, 1, 6, 7));
}

static void set_factors(search_8 *s)
{
    const __m256 up = _mm256_set1_ps(tqkvi_power_of_two(15 - s->range.exponent));
    const __m256 down = _mm256_set1_ps(tqkvi_power_of_two(7 + s->range.exponent));
    const __m256 inv_step2 = _mm256_broadcast_ss(&tqkvk_widths[8].inv_step2);
    const __m256 step = _mm256_broadcast_ss(&tqkvk_widths[8].step);
    const __m256 inverse = load_by_place(tqkvk_scale_inverses + s->range.peak);
    const __m256 value = load_by_place(tqkvk_scale_values + s->range.peak);

    _mm256_store_si256((__m256i *)(void *)s->to_half_levels,
                       tqkvk_twice_16(_mm256_mul_ps(_mm256_mul_ps(inverse, inv_step2), up)));
    _mm256_store_si256((__m256i *)(void *)s->to_size,
                       tqkvk_twice_16(_mm256_mul_ps(_mm256_mul_ps(value, step), down)));
}

/* Returns false where candidates or sizes would have to be limited. */
static bool measure(search_8 *s, const float *y, uint32_t n_units)
{
    const float largest = largest_of(y, n_units);
    if (!(largest >= TQKVK_SIZE_MIN && largest <= TQKVK_Y_MAX))
        return false;
    const int exponent = tqkvk_size_exponent(largest);
    const int peak = 128 + tqkvk_peak_index(largest * tqkvk_widths[8].inv_peak);

    s->unit = tqkvi_power_of_two(exponent);
    s->largest = (uint32_t)_mm_cvtss_si32(_mm_set_ss(largest * s->unit));
    s->range = (tqkvk_row_range){.peak = peak,
                                 .exponent = exponent,
                                 .n_coded = (int)(n_units * LANES),
                                 .widths = TQKVK_ONLY_8};
    if (peak < PEAK_MIN || peak > PEAK_MAX)
        return false;
    set_factors(s);
    return true;
}

/* Whole sizes of a unit with their signs. */
static inline __m256i sizes_of(const float *y, __m256 unit)
{
    const __m256i lo = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(y), unit));
    const __m256i hi = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(y + 8), unit));
    return _mm256_packs_epi32(lo, hi);
}

/* Levels of two vectors of half levels, doubled, in bytes. */
static inline __m256i double_levels_of(__m256i t_a, __m256i t_b)
{
    return tqkvk_double_levels_8(_mm256_packus_epi16(t_a, t_b));
}

/* Adds the errors of a unit at candidates i and i + 1. */
static inline void add_two(const search_8 *s, size_t i, __m256i size, __m256 weight, __m256 *sums)
{
    const __m256i zero = _mm256_setzero_si256(), double_size = _mm256_add_epi16(size, size);
    const __m256i level = double_levels_of(
        tqkvk_half_levels_of(double_size, tqkvk_broadcast_word(&s->to_half_levels[i])),
        tqkvk_half_levels_of(double_size, tqkvk_broadcast_word(&s->to_half_levels[i + 1])));
    const __m256i a = tqkvk_values_of(_mm256_unpacklo_epi8(zero, level),
                                      tqkvk_broadcast_word(&s->to_size[i]));
    const __m256i b = tqkvk_values_of(_mm256_unpackhi_epi8(zero, level),
                                      tqkvk_broadcast_word(&s->to_size[i + 1]));
    sums[0] = tqkvk_add_squares(sums[0], _mm256_sub_epi16(size, a), weight);
    sums[1] = tqkvk_add_squares(sums[1], _mm256_sub_epi16(size, b), weight);
}

/* Also keeps the sizes. */
static void find_high_errors(search_8 *s, const float *weight, const float *y, uint32_t n_units)
{
    const __m256 unit = _mm256_set1_ps(s->unit), zero = _mm256_setzero_ps();
    __m256 sums[HIGH] = {zero, zero, zero, zero};
    for (uint32_t u = 0; u < n_units; u++) {
        const __m256i size_signed = sizes_of(y + u * LANES, unit);
        const __m256i size = _mm256_abs_epi16(size_signed);
        const __m256 w = _mm256_broadcast_ss(&weight[u]);
        _mm256_store_si256((__m256i *)(void *)(s->size + u * LANES), size_signed);
        add_two(s, 0, size, w, sums);
        add_two(s, 2, size, w, sums + 2);
    }
    _mm_store_ps(s->high_errors, tqkvk_four_errors(sums));
}

static inline __m256i load_sizes(const int16_t *size)
{
    return _mm256_load_si256((const __m256i *)(const void *)size);
}

/* The last two lanes are beyond every error. */
static __m128 find_low_errors(const search_8 *s, const float *weight, uint32_t n_units)
{
    const __m256 beyond = _mm256_set1_ps(FLT_MAX / 16), zero = _mm256_setzero_ps();
    __m256 sums[4] = {zero, zero, beyond, beyond};
    for (uint32_t u = 0; u < n_units; u++)
        add_two(s, HIGH, _mm256_abs_epi16(load_sizes(s->size + u * LANES)),
                _mm256_broadcast_ss(&weight[u]), sums);
    return tqkvk_four_errors(sums);
}

static uint32_t level_of_largest(const search_8 *s, size_t i)
{
    const uint32_t t = (2 * s->largest * (s->to_half_levels[i] & 0xffffu)) >> 16;
    return ((t < TQKVK_HALF_LEVELS_MAX ? t : TQKVK_HALF_LEVELS_MAX) + 1) / 2;
}

/*
 * What the error at candidate i is at least: that of the largest size. Sums of what is not negative
 * never get smaller by rounding.
 */
static float error_of_largest(const search_8 *s, size_t i, float least_weight)
{
    const uint32_t value = (level_of_largest(s, i) * (s->to_size[i] & 0xffffu)) >> 7;
    const int difference = (int)s->largest - (int)value;
    return least_weight * (float)(difference * difference);
}

static int scale_of(const search_8 *s, size_t i)
{
    return s->range.peak + (int)i - (i < HIGH ? 0 : 6);
}

/* Whether the row would be found again at candidate i, and at no lower scale. */
static bool is_stable(const search_8 *s, size_t i)
{
    const tqkvk_row_again again = {.peak = tqkvk_level_octaves[level_of_largest(s, i)]};
    return tqkvk_is_stable(&s->range, again, scale_of(s, i)) &&
           !tqkvk_may_go_lower(again, scale_of(s, i));
}

/* The best candidate if there is one and it is stable. */
static size_t find_best(const search_8 *s, const float *weight, float least_weight,
                        uint32_t n_units)
{
    const __m256 beyond = _mm256_set1_ps(FLT_MAX);
    const float near_error = 16.0f * (float)s->range.n_coded;
    const __m128 high = _mm_load_ps(s->high_errors);
    const __m128 low_at_least =
        _mm_setr_ps(error_of_largest(s, HIGH, least_weight),
                    error_of_largest(s, HIGH + 1, least_weight), FLT_MAX, FLT_MAX);

    size_t i = tqkvk_find_least(_mm256_set_m128(low_at_least, high), beyond, near_error);
    if (i >= HIGH)
        i = tqkvk_find_least(_mm256_set_m128(find_low_errors(s, weight, n_units), high), beyond,
                             near_error);
    return i < TQKVK_CANDIDATES_8 && is_stable(s, i) ? i : NONE;
}

/*
 * The codes of units a and b, one after the other. In each lane bytes are channels
 *
 *     a 0-3 8-11 b 0-3 8-11 | a 4-7 12-15 b 4-7 12-15
 *
 * and byte i of a plane has those of channels i and i + 8: the neighbours in 8 bytes.
 */
static inline __m256i codes_of(__m256i a, __m256i b, __m256i factor)
{
    const __m256i size_a = _mm256_abs_epi16(a), size_b = _mm256_abs_epi16(b);
    const __m256i twice =
        double_levels_of(tqkvk_half_levels_of(_mm256_add_epi16(size_a, size_a), factor),
                         tqkvk_half_levels_of(_mm256_add_epi16(size_b, size_b), factor));
    const __m256i level = _mm256_sign_epi8(_mm256_srli_epi16(twice, 1), _mm256_packs_epi16(a, b));
    const __m256i code = _mm256_xor_si256(level, _mm256_set1_epi8((char)(uint8_t)0x80));
    const __m256i other = _mm256_shuffle_epi32(code, _MM_SHUFFLE(2, 3, 0, 1));
    const __m256i keep = _mm256_set1_epi64x((long long)0xf0f0f0f00f0f0f0fu); /* high, low plane */
    const __m256i moved = _mm256_blend_epi32(_mm256_slli_epi16(other, 4),
                                             _mm256_srli_epi16(other, 4), 0xaa);
    const __m256i planes =
        _mm256_or_si256(_mm256_and_si256(code, keep), _mm256_andnot_si256(keep, moved));
    return _mm256_permutevar8x32_epi32(planes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static void pack(const search_8 *s, size_t i, uint32_t n_units, uint8_t *codes)
{
    const __m256i factor = tqkvk_broadcast_word(&s->to_half_levels[i]);
    const int16_t *size = s->size;
    for (uint32_t u = 0; u + 2 <= n_units; u += 2, size += 2 * LANES, codes += 2 * LANES)
        _mm256_storeu_si256((__m256i *)(void *)codes,
                            codes_of(load_sizes(size), load_sizes(size + LANES), factor));
    if (n_units % 2) {
        const __m256i last = codes_of(load_sizes(size), _mm256_setzero_si256(), factor);
        _mm_storeu_si128((__m128i *)(void *)codes, _mm256_castsi256_si128(last));
    }
}

static void encode_few(const tqkvi_layout *layout, const float *weight, float least_weight,
                       const float *y, size_t n_rows, uint8_t *scales, uint8_t *codes)
{
    const uint32_t n_units = layout->n_units;
    const size_t dim = (size_t)n_units * LANES;
    search_8 s[ROWS_IN_STEP];
    bool good[ROWS_IN_STEP];

    for (size_t r = 0; r < n_rows; r++)
        good[r] = measure(&s[r], y + r * dim, n_units);
    for (size_t r = 0; r < n_rows; r++) {
        if (good[r])
            find_high_errors(&s[r], weight, y + r * dim, n_units);
    }
    for (size_t r = 0; r < n_rows; r++) {
        const size_t i = good[r] ? find_best(&s[r], weight, least_weight, n_units) : NONE;
        if (i != NONE) {
            scales[r] = (uint8_t)scale_of(&s[r], i);
            pack(&s[r], i, n_units, codes + r * layout->row_bytes);
        }
    }
}

void tqkvk_encode_rows_8_avx2(const tqkvi_layout *layout, const float *weight, const float *y,
                              size_t n_rows, uint8_t *scales, uint8_t *codes)
{
    const size_t dim = (size_t)layout->n_units * LANES;
    float least_weight = weight[0];

    for (uint32_t u = 1; u < layout->n_units; u++)
        least_weight = weight[u] < least_weight ? weight[u] : least_weight;
    for (size_t r = 0; r < n_rows; r += ROWS_IN_STEP) {
        const size_t left = n_rows - r;
        encode_few(layout, weight, least_weight, y + r * dim,
                   left < ROWS_IN_STEP ? left : ROWS_IN_STEP, scales + r,
                   codes + r * layout->row_bytes);
    }
}
