/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md with the bytes of ref.
 *
 * Sizes become whole numbers of 16 bits, a unit a register. All candidates are tried on a unit
 * before the next one. Levels are found in bytes, two candidates at a time:
 *
 *     sizes --> t = half levels --> bytes --> 2 * level --> 16 bits --> value --> squared error
 *
 * Channels of a unit lie as the packs leave them, so that the pairs of a sum are
 *
 *     lane 0: channels 0-3, 8-11    lane 1: 4-7, 12-15        pairs 0 1 4 5 | 2 3 6 7
 */
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/tables.h"
#include "kernels/x86/encode_rows_avx2.h"
#include "kernels/x86/lanes_avx2.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define LANES TQKV_UNIT_CHANNELS

/* A tqkvk_bucket; levels are doubled. */
typedef struct byte_table {
    __m256i index, limit[3], level[2];
} byte_table;

/* What turns whole sizes to half levels and levels to whole sizes, twice in each word. */
typedef struct factors {
    _Alignas(32) uint32_t to_half_levels[TQKVK_CANDIDATES_MAX];
    _Alignas(32) uint32_t to_size[TQKVK_CANDIDATES_MAX];
} factors;

/* A row at work. */
typedef struct search {
    const tqkvi_layout *layout;
    __m256i size[TQKV_UNITS_MAX];
    factors factors[9]; /* by width */
    tqkvk_row_range range;
    _Alignas(32) int32_t candidates[TQKVK_CANDIDATES_MAX];
    size_t n_candidates;
    _Alignas(32) float errors[TQKVK_CANDIDATES_MAX];
    _Alignas(16) uint8_t magnitude[DIM_MAX]; /* of the candidate coded last */
} search;

static inline __m256i broadcast_16(const void *bytes)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes));
}

static inline __m256i double_levels(const int8_t *levels)
{
    const __m256i level = broadcast_16(levels);
    return _mm256_add_epi8(level, level);
}

/* Widths 2..6; 8 needs none. */
TQKVK_INLINE byte_table load_table(uint32_t bits)
{
    if (bits == 8)
        return (byte_table){.index = _mm256_setzero_si256()};
    const tqkvk_bucket *bucket = &tqkvk_buckets[bits];
    const int8_t *levels = tqkvk_widths[bits].levels + (1u << (bits - 1));
    byte_table table = {.index = broadcast_16(bucket->index)};
    for (uint32_t r = 0; r < 3; r++)
        table.limit[r] = broadcast_16(bucket->limit[r]);
    table.level[0] = double_levels(levels);
    table.level[1] = double_levels(levels + (bits == 6 ? 16 : 0));
    return table;
}

/* Levels of half levels t (32 bytes), doubled; widths 2..8. */
TQKVK_INLINE __m256i find_double_levels(uint32_t bits, const byte_table *table, __m256i t)
{
    if (bits == 8)
        return tqkvk_double_levels_8(t);
    const uint32_t n_rounds = bits == 6 ? 3 : bits == 5 ? 2 : 1;
    const __m256i bucket = _mm256_and_si256(_mm256_srli_epi16(t, 4), _mm256_set1_epi8(15));
    const __m256i t_signed = _mm256_xor_si256(t, _mm256_set1_epi8(-128));
    __m256i index = _mm256_shuffle_epi8(table->index, bucket);
    for (uint32_t r = 0; r < n_rounds; r++)
        index = _mm256_sub_epi8(
            index, _mm256_cmpgt_epi8(t_signed, _mm256_shuffle_epi8(table->limit[r], bucket)));
    const __m256i low = _mm256_shuffle_epi8(table->level[0], index);
    return bits < 6 ? low
                    : _mm256_blendv_epi8(low, _mm256_shuffle_epi8(table->level[1], index),
                                         _mm256_slli_epi16(index, 3));
}

/* Indices of the levels of half levels t (16 bytes, at most 254). */
TQKVK_INLINE __m128i find_indices(uint32_t bits, __m128i t)
{
    if (bits == 1)
        return _mm_setzero_si128();
    if (bits == 8)
        return _mm_avg_epu8(t, _mm_setzero_si128());

    const tqkvk_bucket *table = &tqkvk_buckets[bits];
    const __m128i bucket = _mm_and_si128(_mm_srli_epi16(t, 4), _mm_set1_epi8(15));
    const __m128i t_signed = _mm_xor_si128(t, _mm_set1_epi8(-128));
    __m128i index =
        _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)table->index), bucket);
    for (uint32_t r = 0; r < (bits == 6 ? 3u : bits == 5 ? 2u : 1u); r++) {
        const __m128i limit = _mm_loadu_si128((const __m128i *)(const void *)table->limit[r]);
        index = _mm_sub_epi8(index, _mm_cmpgt_epi8(t_signed, _mm_shuffle_epi8(limit, bucket)));
    }
    return index;
}

/* Levels of indices. */
TQKVK_INLINE __m128i levels_of(uint32_t bits, __m128i index)
{
    if (bits == 1)
        return _mm_set1_epi8(TQKVK_LEVEL_MAX);
    if (bits == 8)
        return index;
    const int8_t *levels = tqkvk_widths[bits].levels + (1u << (bits - 1));
    const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)levels);
    __m128i level = _mm_shuffle_epi8(low, index);
    if (bits == 6) {
        const __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(levels + 16));
        const __m128i is_high = _mm_cmpgt_epi8(index, _mm_set1_epi8(15));
        level = _mm_blendv_epi8(level, _mm_shuffle_epi8(high, index), is_high);
    }
    return level;
}

TQKVK_INLINE void add_unit_1(__m256i size, __m256 weight, const factors *f, __m256 *sums)
{
    const __m256i level = _mm256_set1_epi16((short)(TQKVK_LEVEL_MAX << 9));
    for (size_t i = 0; i < TQKVK_CANDIDATES_MAX; i++) {
        const __m256i value = tqkvk_values_of(level, tqkvk_broadcast_word(&f->to_size[i]));
        sums[i] = tqkvk_add_squares(sums[i], _mm256_sub_epi16(size, value), weight);
    }
}

/* Adds the errors of one unit to those of the candidates. */
TQKVK_INLINE void add_unit_errors(uint32_t bits, __m256i size, float weight_value, const factors *f,
                                  __m256 *sums)
{
    const __m256 weight = _mm256_set1_ps(weight_value);
    const __m256i zero = _mm256_setzero_si256();
    if (bits == 1) {
        add_unit_1(size, weight, f, sums);
        return;
    }
    const __m256i double_size = _mm256_add_epi16(size, size);
    const byte_table table = load_table(bits);
    for (size_t i = 0; i < TQKVK_CANDIDATES_MAX; i += 2) {
        const __m256i t_a =
            tqkvk_half_levels_of(double_size, tqkvk_broadcast_word(&f->to_half_levels[i]));
        const __m256i t_b =
            tqkvk_half_levels_of(double_size, tqkvk_broadcast_word(&f->to_half_levels[i + 1]));
        const __m256i level = find_double_levels(bits, &table, _mm256_packus_epi16(t_a, t_b));
        const __m256i a = tqkvk_values_of(_mm256_unpacklo_epi8(zero, level),
                                          tqkvk_broadcast_word(&f->to_size[i]));
        const __m256i b = tqkvk_values_of(_mm256_unpackhi_epi8(zero, level),
                                          tqkvk_broadcast_word(&f->to_size[i + 1]));
        sums[i] = tqkvk_add_squares(sums[i], _mm256_sub_epi16(size, a), weight);
        sums[i + 1] = tqkvk_add_squares(sums[i + 1], _mm256_sub_epi16(size, b), weight);
    }
}

/* One case per width, each with loops of its own. */
static void find_errors(search *s, const float *weight)
{
    __m256 sums[TQKVK_CANDIDATES_MAX];
    for (size_t i = 0; i < TQKVK_CANDIDATES_MAX; i++)
        sums[i] = _mm256_setzero_ps();
    for (uint32_t u = 0; u < s->layout->n_units; u++) {
        const uint32_t bits = s->layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, add_unit_errors, s->size[u], weight[u],
                       &s->factors[bits], sums);
    }
    _mm256_store_ps(s->errors, tqkvk_eight_errors(sums));
    _mm256_store_ps(s->errors + 8, tqkvk_eight_errors(sums + 8));
}

static inline __m256 magnitude_of(const float *y)
{
    return _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_load_ps(y)),
                         _mm256_set1_ps(TQKVK_Y_MAX));
}

/* Sizes and range of a row. */
static void measure(search *s, const float *y)
{
    const tqkvi_layout *layout = s->layout;
    __m256 largest = _mm256_set1_ps(TQKVK_SIZE_MIN), peak = _mm256_setzero_ps();
    uint32_t widths = 0, n_coded = 0;

    for (uint32_t u = 0; u < layout->n_units; u++) {
        const uint32_t bits = layout->bits[u];
        if (bits == 0)
            continue;
        const __m256 top =
            _mm256_max_ps(magnitude_of(y + u * LANES), magnitude_of(y + u * LANES + 8));
        const __m256 inv_peak = _mm256_broadcast_ss(&tqkvk_widths[bits].inv_peak);
        largest = _mm256_max_ps(largest, top);
        peak = _mm256_max_ps(peak, _mm256_mul_ps(top, inv_peak));
        widths |= 1u << bits;
        n_coded += LANES;
    }
    const int exponent = tqkvk_size_exponent(tqkvk_max_lanes(largest));
    const __m256 unit = _mm256_set1_ps(tqkvi_power_of_two(exponent)), one = _mm256_set1_ps(1.0f);
    __m256 sum = _mm256_setzero_ps();
    for (uint32_t u = 0; u < layout->n_units; u++) {
        if (layout->bits[u] == 0)
            continue;
        const __m256 lo = _mm256_mul_ps(magnitude_of(y + u * LANES), unit);
        const __m256 hi = _mm256_mul_ps(magnitude_of(y + u * LANES + 8), unit);
        s->size[u] = _mm256_packs_epi32(_mm256_cvtps_epi32(lo), _mm256_cvtps_epi32(hi));
        sum = tqkvk_add_squares(sum, s->size[u], one);
    }
    const float mean =
        tqkvk_sum_lanes(sum) / (float)n_coded * tqkvi_power_of_two(-2 * exponent);
    s->range = (tqkvk_row_range){
        .energy = tqkvk_clamp_scale(128 + tqkvk_energy_index(mean)),
        .peak = tqkvk_clamp_scale(128 + tqkvk_peak_index(tqkvk_max_lanes(peak))),
        .exponent = exponent,
        .n_coded = (int)n_coded,
        .widths = widths};
}

/* first, first + 1, ..., all within 1..255 */
static inline __m256i eight_scales(int first)
{
    const __m256i c =
        _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_max_epi32(_mm256_min_epi32(c, _mm256_set1_epi32(255)), _mm256_set1_epi32(1));
}

static void list_candidates(search *s)
{
    const tqkvk_row_range *range = &s->range;
    __m256i *out = (__m256i *)(void *)s->candidates;

    if (range->widths == TQKVK_ONLY_8) {
        s->n_candidates = TQKVK_CANDIDATES_8;
        _mm256_store_si256(out, eight_scales(range->peak - 2));
        _mm256_store_si256(out + 1, eight_scales(range->peak - 2)); /* no candidates */
        return;
    }
    s->n_candidates = TQKVK_CANDIDATES_MAX;
    _mm256_store_si256(out, eight_scales(range->energy - 4));
    _mm256_store_si256(out + 1, _mm256_blend_epi32(eight_scales(range->energy + 4),
                                                   eight_scales(range->peak - 6), 0xe0));
}

static void fill_factors(search *s)
{
    const int exponent = s->range.exponent;
    const __m256 up = _mm256_set1_ps(tqkvi_power_of_two(15 - exponent));
    const __m256 down = _mm256_set1_ps(tqkvi_power_of_two(7 + exponent));

    for (size_t i = 0; i < TQKVK_CANDIDATES_MAX; i += 8) {
        const __m256i c = _mm256_load_si256((const __m256i *)(const void *)(s->candidates + i));
        const __m256 value = _mm256_i32gather_ps(tqkvk_scale_values, c, 4);
        const __m256 inverse = _mm256_i32gather_ps(tqkvk_scale_inverses, c, 4);
        for (uint32_t left = s->range.widths; left != 0; left &= left - 1) {
            const uint32_t bits = (uint32_t)__builtin_ctz(left);
            const __m256 step = _mm256_broadcast_ss(&tqkvk_widths[bits].step);
            const __m256 inv_step2 = _mm256_broadcast_ss(&tqkvk_widths[bits].inv_step2);
            const __m256 half_levels = _mm256_mul_ps(_mm256_mul_ps(inverse, inv_step2), up);
            const __m256 size = _mm256_mul_ps(_mm256_mul_ps(value, step), down);
            factors *f = &s->factors[bits];
            _mm256_store_si256((__m256i *)(void *)(f->to_half_levels + i),
                               tqkvk_twice_16(half_levels));
            _mm256_store_si256((__m256i *)(void *)(f->to_size + i), tqkvk_twice_16(size));
        }
    }
}

/* Magnitudes of a unit at candidate i. Returns the levels, as the packs leave them. */
TQKVK_INLINE __m128i code_unit(uint32_t bits, __m256i size, const uint32_t *to_half_levels,
                               uint8_t *magnitude)
{
    const __m256i t = tqkvk_half_levels_of(_mm256_add_epi16(size, size),
                                           tqkvk_broadcast_word(to_half_levels));
    const __m128i bytes =
        _mm_min_epu8(_mm_packus_epi16(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1)),
                     _mm_set1_epi8((char)TQKVK_HALF_LEVELS_MAX));
    const __m128i index = find_indices(bits, bytes);
    _mm_store_si128((__m128i *)(void *)magnitude,
                    _mm_shuffle_epi32(index, _MM_SHUFFLE(3, 1, 2, 0)));
    return levels_of(bits, index);
}

static inline uint32_t max_byte(__m128i v)
{
    const __m128i left = _mm_xor_si128(v, _mm_set1_epi8(-1)); /* 255 - v */
    const __m128i words = _mm_min_epu8(left, _mm_srli_epi16(left, 8));
    return 255u - ((uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(words)) & 0xffu);
}

/* sum: of the squares of values without scale. */
TQKVK_INLINE void code_any_unit(uint32_t bits, __m256i size, const uint32_t *to_half_levels,
                                uint8_t *magnitude, __m256 *sum, __m128i *largest)
{
    const __m128i level = code_unit(bits, size, to_half_levels, magnitude);
    const float step = tqkvk_widths[bits].step;
    *largest = _mm_max_epu8(*largest, level);
    *sum = tqkvk_add_squares(*sum, _mm256_cvtepu8_epi16(level), _mm256_set1_ps(step * step));
}

/* Codes the row at candidate i. */
static tqkvk_row_again code_row(search *s, size_t i)
{
    __m256 sum = _mm256_setzero_ps();
    __m128i largest = _mm_setzero_si128();

    for (uint32_t u = 0; u < s->layout->n_units; u++) {
        const uint32_t bits = s->layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, code_any_unit, s->size[u],
                       &s->factors[bits].to_half_levels[i], s->magnitude + u * LANES, &sum,
                       &largest);
    }
    const float mean = tqkvk_sum_lanes(sum) / (float)s->range.n_coded;
    return (tqkvk_row_again){.energy = tqkvk_energy_index(mean),
                             .peak = tqkvk_level_octaves[max_byte(largest)]};
}

static inline void store_plane4(uint8_t *plane, __m128i code)
{
    const __m128i low = _mm_and_si128(code, _mm_set1_epi8(15));
    _mm_storel_epi64((__m128i *)(void *)plane,
                     _mm_or_si128(low, _mm_slli_epi16(_mm_srli_si128(low, 8), 4)));
}

static inline void store_plane2(uint8_t *plane, __m128i code)
{
    const __m128i low = _mm_and_si128(code, _mm_set1_epi8(3));
    __m128i word = _mm_sllv_epi32(low, _mm_setr_epi32(0, 2, 4, 6));
    word = _mm_or_si128(word, _mm_srli_si128(word, 8));
    word = _mm_or_si128(word, _mm_srli_si128(word, 4));
    const int value = _mm_cvtsi128_si32(word);
    memcpy(plane, &value, sizeof(value));
}

/* bit: of the code. Even channels come first, so that the mask is the two bytes of the plane. */
static inline void store_plane1(uint8_t *plane, __m128i code, int bit)
{
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i top = _mm_sll_epi16(_mm_shuffle_epi8(code, order), _mm_cvtsi32_si128(7 - bit));
    const uint16_t value = (uint16_t)_mm_movemask_epi8(top);
    memcpy(plane, &value, sizeof(value));
}

static inline void store_unit(uint32_t bits, __m128i code, uint8_t *out)
{
    switch (bits) {
    case 1:
        store_plane1(out, code, 0);
        break;
    case 2:
        store_plane2(out, code);
        break;
    case 3:
        store_plane2(out, code);
        store_plane1(out + 4, code, 2);
        break;
    case 4:
        store_plane4(out, code);
        break;
    case 5:
        store_plane4(out, code);
        store_plane1(out + 8, code, 4);
        break;
    case 6:
        store_plane4(out, code);
        store_plane2(out + 8, _mm_srli_epi16(code, 4));
        break;
    default:
        store_plane4(out, code);
        store_plane4(out + 8, _mm_srli_epi16(code, 4));
        break;
    }
}

/* 0xff in the bytes of the channels whose sign bit is set. */
static inline __m128i sign_bytes(const float *y)
{
    const __m256i lo = _mm256_srai_epi32(_mm256_castps_si256(_mm256_load_ps(y)), 31);
    const __m256i hi = _mm256_srai_epi32(_mm256_castps_si256(_mm256_load_ps(y + 8)), 31);
    const __m256i words = _mm256_packs_epi32(lo, hi);
    const __m256i bytes = _mm256_packs_epi16(words, words);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

static void pack_row(const search *s, const float *y, uint8_t *codes)
{
    for (uint32_t u = 0; u < s->layout->n_units; u++, y += LANES) {
        const uint32_t bits = s->layout->bits[u];
        if (bits == 0)
            continue;
        const __m128i magnitude =
            _mm_load_si128((const __m128i *)(const void *)(s->magnitude + u * LANES));
        const __m128i half = _mm_set1_epi8((char)(uint8_t)(1u << (bits - 1)));
        const __m128i sign = sign_bytes(y);
        const __m128i flipped = _mm_xor_si128(magnitude, sign);
        /* 8 bits: 128 +- m; otherwise the complement, whose excess bits no plane takes. */
        const __m128i code = bits == 8 ? _mm_add_epi8(half, _mm_sub_epi8(flipped, sign))
                                       : _mm_add_epi8(half, flipped);
        store_unit(bits, code, codes);
        codes += 2 * bits;
    }
}

/* Codes the row at candidates in the order of the contest, until one is stable. */
static int try_in_order(search *s, const float *weight, const float *y, float near_error,
                        tqkvk_row_again *again)
{
    tqkvk_contest contest = {.n = s->n_candidates};
    size_t i;

    for (i = 0; i < s->n_candidates; i++) {
        const int c = s->candidates[i];
        const bool near_row = s->errors[i] <= near_error;
        if (near_row) {
            (void)code_row(s, i);
            s->errors[i] = tqkvk_exact_error(s->layout, weight, y, c, s->magnitude);
        }
        tqkvk_contest_put(&contest, i, near_row, s->errors[i], (uint8_t)c);
    }
    do { /* some candidate is stable */
        i = tqkvk_contest_take(&contest);
        *again = code_row(s, i);
    } while (!tqkvk_is_stable(&s->range, *again, s->candidates[i]));
    return s->candidates[i];
}

/* What is left when the errors are known. Returns the scale. */
static uint8_t finish_row(search *s, const float *weight, const float *y, uint8_t *codes)
{
    const float near_error = 16.0f * (float)s->range.n_coded;
    const size_t least = tqkvk_find_least(_mm256_load_ps(s->errors), _mm256_load_ps(s->errors + 8),
                                          near_error);
    tqkvk_row_again again = {0};
    int scale = 0;

    if (least < s->n_candidates) {
        scale = s->candidates[least];
        again = code_row(s, least);
    }
    if (scale == 0 || !tqkvk_is_stable(&s->range, again, scale))
        scale = try_in_order(s, weight, y, near_error, &again);
    if (tqkvk_may_go_lower(again, scale))
        scale = tqkvk_use_lower_scale(s->layout, again, scale, s->magnitude);
    pack_row(s, y, codes);
    return (uint8_t)scale;
}

static uint8_t encode_row(const tqkvi_layout *layout, const float *weight, const float *y,
                          uint8_t *codes)
{
    search s;

    s.layout = layout;
    measure(&s, y);
    list_candidates(&s);
    fill_factors(&s);
    find_errors(&s, weight);
    return finish_row(&s, weight, y, codes);
}

void tqkvk_encode_rows_f32_avx2(const tqkvi_layout *layout, const float *weight, const float *y,
                                size_t n_rows, uint8_t *scales, uint8_t *codes)
{
    const size_t dim = (size_t)layout->n_units * LANES, row_bytes = layout->row_bytes;

    if (row_bytes == 0) {
        memset(scales, 1, n_rows);
        return;
    }
    memset(scales, 0, n_rows);
    if (row_bytes == 2 * 8 * (size_t)layout->n_units)
        tqkvk_encode_rows_8_avx2(layout, weight, y, n_rows, scales, codes);
    for (size_t r = 0; r < n_rows; r++) {
        if (scales[r] == 0)
            scales[r] = encode_row(layout, weight, y + r * dim, codes + r * row_bytes);
    }
}
