/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md with the bytes of ref.
 *
 * A unit of 16 channels is the vector. All candidates are tried on a unit before the next one, two
 * at a time: 2 x 16 half levels fit the 32 bytes of a register, where byte look-ups find the level
 *
 *     f32 |y| --> t = half levels --> bytes --> level --> f32 value --> squared error, 16 lanes
 *
 * The lanes of the error are those of the contract, so that only the two halves of a unit and the
 * halving tree remain to be added up. Bytes of a register lie as the packs leave them:
 *
 *     lane 0: first 0-3, 8-11, second 0-3, 8-11    lane 1: first 4-7, 12-15, second 4-7, 12-15
 */
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/by_width.h"
#include "kernels/levels.h"
#include "kernels/scale_search.h"
#include "kernels/tables.h"
#include "kernels/x86/lanes_avx2.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define LANES TQKV_UNIT_CHANNELS

typedef struct coded_row {
    _Alignas(32) float value[DIM_MAX];
    __m128i magnitude[TQKV_UNITS_MAX];
} coded_row;

typedef struct byte_table {
    __m256i index, level, limit[3], gain[3];
} byte_table;

static inline __m256i broadcast_16(const void *bytes)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes));
}

static inline byte_table load_table(uint32_t bits)
{
    const tqkvk_bucket *bucket = &tqkvk_buckets[bits <= 6 ? bits : 0];
    byte_table table = {broadcast_16(bucket->index), broadcast_16(bucket->level), {{0}}, {{0}}};
    for (uint32_t r = 0; r < 3; r++) {
        table.limit[r] = broadcast_16(bucket->limit[r]);
        table.gain[r] = broadcast_16(bucket->gain[r]);
    }
    return table;
}

/* Positive levels of half levels t (32 bytes). bits is a constant wherever this is inlined. */
static inline __m256i find_levels(uint32_t bits, const byte_table *table, __m256i t)
{
    if (bits == 1)
        return _mm256_set1_epi8(TQKVK_LEVEL_MAX);
    if (bits == 8)
        return _mm256_avg_epu8(t, _mm256_setzero_si256());

    const uint32_t n_rounds = bits == 6 ? 3 : bits == 5 ? 2 : 1;
    const __m256i bucket = _mm256_and_si256(_mm256_srli_epi16(t, 4), _mm256_set1_epi8(15));
    const __m256i t_signed = _mm256_xor_si256(t, _mm256_set1_epi8(-128));
    __m256i level = _mm256_shuffle_epi8(table->level, bucket);
    for (uint32_t r = 0; r < n_rounds; r++) {
        const __m256i above =
            _mm256_cmpgt_epi8(t_signed, _mm256_shuffle_epi8(table->limit[r], bucket));
        level = _mm256_add_epi8(
            level, _mm256_and_si256(above, _mm256_shuffle_epi8(table->gain[r], bucket)));
    }
    return level;
}

/* The same as indices of the levels. */
static inline __m256i find_indices(uint32_t bits, const byte_table *table, __m256i t)
{
    if (bits == 1)
        return _mm256_setzero_si256();
    if (bits == 8)
        return _mm256_avg_epu8(t, _mm256_setzero_si256());

    const __m256i bucket = _mm256_and_si256(_mm256_srli_epi16(t, 4), _mm256_set1_epi8(15));
    const __m256i t_signed = _mm256_xor_si256(t, _mm256_set1_epi8(-128));
    __m256i index = _mm256_shuffle_epi8(table->index, bucket);
    for (uint32_t r = 0; r < 3; r++) /* unused limits are never passed */
        index = _mm256_sub_epi8(
            index, _mm256_cmpgt_epi8(t_signed, _mm256_shuffle_epi8(table->limit[r], bucket)));
    return index;
}

static inline __m256i half_levels(__m256 size, __m256 factor)
{
    const __m256 limit = _mm256_set1_ps((float)TQKVK_HALF_LEVELS_MAX);
    return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_mul_ps(size, factor), limit));
}

static inline __m256i to_bytes(__m256i a_lo, __m256i a_hi, __m256i b_lo, __m256i b_hi)
{
    return _mm256_packus_epi16(_mm256_packs_epi32(a_lo, a_hi), _mm256_packs_epi32(b_lo, b_hi));
}

/* Quarter 0..3 of the bytes: first 0-7, first 8-15, second 0-7, second 8-15. */
static inline __m256 from_bytes(__m256i bytes, int quarter)
{
    const __m256i spread = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1));
    const __m256i select = _mm256_or_si256(spread, _mm256_set1_epi32(4 * quarter));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, select));
}

/* sum + weight * (size - scale * (step * level)) ^ 2 */
static inline __m256 add_error(__m256 sum, __m256 size, __m256 level, __m256 step, __m256 scale,
                               __m256 weight)
{
    const __m256 difference = _mm256_sub_ps(size, _mm256_mul_ps(scale, _mm256_mul_ps(step, level)));
    return _mm256_add_ps(sum, _mm256_mul_ps(weight, _mm256_mul_ps(difference, difference)));
}

/* Adds the errors of one unit to sums [n_pairs][first lo, first hi, second lo, second hi]. */
static inline void add_unit_errors(uint32_t bits, float weight_value, const float *size,
                                   const uint8_t *candidates, size_t n_pairs, __m256 *sums)
{
    const byte_table table = load_table(bits);
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);
    const __m256 inv_step2 = _mm256_set1_ps(tqkvk_widths[bits].inv_step2);
    const __m256 weight = _mm256_set1_ps(weight_value);
    const __m256 lo = _mm256_load_ps(size);
    const __m256 hi = _mm256_load_ps(size + 8);

    for (size_t i = 0; i < n_pairs; i++, sums += 4) {
        const uint8_t first = candidates[2 * i], second = candidates[2 * i + 1];
        const __m256 factor_a =
            _mm256_mul_ps(_mm256_broadcast_ss(&tqkvk_scale_inverses[first]), inv_step2);
        const __m256 factor_b =
            _mm256_mul_ps(_mm256_broadcast_ss(&tqkvk_scale_inverses[second]), inv_step2);
        const __m256 scale_a = _mm256_broadcast_ss(&tqkvk_scale_values[first]);
        const __m256 scale_b = _mm256_broadcast_ss(&tqkvk_scale_values[second]);
        const __m256i t = to_bytes(half_levels(lo, factor_a), half_levels(hi, factor_a),
                                   half_levels(lo, factor_b), half_levels(hi, factor_b));
        const __m256i level = find_levels(bits, &table, t);
        sums[0] = add_error(sums[0], lo, from_bytes(level, 0), step, scale_a, weight);
        sums[1] = add_error(sums[1], hi, from_bytes(level, 1), step, scale_a, weight);
        sums[2] = add_error(sums[2], lo, from_bytes(level, 2), step, scale_b, weight);
        sums[3] = add_error(sums[3], hi, from_bytes(level, 3), step, scale_b, weight);
    }
}

/*
 * errors: [2 * n_pairs] out, of the candidates.
 * One case per width, each with loops of its own.
 */
static void find_errors(const tqkvi_layout *layout, const float *weight, const float *size,
                        const uint8_t *candidates, size_t n_pairs, float *errors)
{
    __m256 sums[2 * TQKVK_CANDIDATES_MAX];
    for (size_t i = 0; i < 4 * n_pairs; i++)
        sums[i] = _mm256_setzero_ps();

    for (uint32_t u = 0; u < layout->n_units; u++, size += LANES) {
        TQKVK_BY_WIDTH(layout->bits[u], TQKVK_NOTHING, add_unit_errors, weight[u], size, candidates,
                       n_pairs, sums);
    }
    for (size_t i = 0; i < 2 * n_pairs; i++)
        errors[i] = tqkvk_sum_lanes(_mm256_add_ps(sums[2 * i], sums[2 * i + 1]));
}

/* How many of n thresholds of an octave (8 or 16) the mantissa of value >= 0 reaches. */
static inline int count_in_octave(const float *thresholds, int n, float value, int *exponent)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    *exponent = (int)(bits >> 23) - 127;
    const __m256 mantissa =
        _mm256_castsi256_ps(_mm256_set1_epi32((int)((bits & 0x7fffffu) | 0x3f800000u)));
    unsigned mask = 0;
    for (int i = 0; i < n; i += 8) {
        const __m256 passed = _mm256_cmp_ps(mantissa, _mm256_loadu_ps(thresholds + i), _CMP_GE_OQ);
        mask |= (unsigned)_mm256_movemask_ps(passed) << i;
    }
    return _mm_popcnt_u32(mask);
}

static tqkvk_row_range find_range(const tqkvi_layout *layout, const float *size)
{
    __m256 sum_lo = _mm256_setzero_ps(), sum_hi = _mm256_setzero_ps(), top = _mm256_setzero_ps();
    int n_coded = 0;

    for (uint32_t u = 0; u < layout->n_units; u++, size += LANES) {
        if (layout->bits[u] == 0)
            continue;
        const __m256 lo = _mm256_load_ps(size);
        const __m256 hi = _mm256_load_ps(size + 8);
        const __m256 inv_peak = _mm256_broadcast_ss(&tqkvk_widths[layout->bits[u]].inv_peak);
        sum_lo = _mm256_add_ps(sum_lo, _mm256_mul_ps(lo, lo));
        sum_hi = _mm256_add_ps(sum_hi, _mm256_mul_ps(hi, hi));
        top = _mm256_max_ps(top, _mm256_mul_ps(_mm256_max_ps(lo, hi), inv_peak));
        n_coded += (int)LANES;
    }
    const float mean = tqkvk_sum_lanes(_mm256_add_ps(sum_lo, sum_hi)) / (float)n_coded;
    int energy_exponent, peak_exponent;
    const int n_energy = count_in_octave(&tqkvk_energy_thresholds[129], 8, mean, &energy_exponent);
    const int n_peak =
        count_in_octave(&tqkvk_peak_thresholds[129], 16, tqkvk_max_lanes(top), &peak_exponent);
    return tqkvk_range_of(energy_exponent, n_energy, peak_exponent, n_peak);
}

/* value: [16] out. */
static inline __m128i code_unit(uint32_t bits, int scale, const float *size, float *value)
{
    const byte_table table = load_table(bits);
    const __m256 scales = _mm256_set1_ps(tqkvk_scale_values[scale]);
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);
    const __m256 factor =
        _mm256_set1_ps(tqkvk_scale_inverses[scale] * tqkvk_widths[bits].inv_step2);
    const __m256i lo = half_levels(_mm256_load_ps(size), factor);
    const __m256i hi = half_levels(_mm256_load_ps(size + 8), factor);
    const __m256i t = to_bytes(lo, hi, lo, hi);
    const __m256i level = find_levels(bits, &table, t);
    const __m256i index = find_indices(bits, &table, t);

    _mm256_store_ps(value, _mm256_mul_ps(scales, _mm256_mul_ps(step, from_bytes(level, 0))));
    _mm256_store_ps(value + 8, _mm256_mul_ps(scales, _mm256_mul_ps(step, from_bytes(level, 1))));
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(index), _mm256_extracti128_si256(index, 1));
}

static void code_row(const tqkvi_layout *layout, const float *size, int scale, coded_row *out)
{
    for (uint32_t u = 0; u < layout->n_units; u++) {
        const uint32_t bits = layout->bits[u];
        if (bits != 0)
            out->magnitude[u] = code_unit(bits, scale, size + u * LANES, out->value + u * LANES);
    }
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

static void pack_row(const tqkvi_layout *layout, const float *y, const coded_row *row,
                     uint8_t *codes)
{
    for (uint32_t u = 0; u < layout->n_units; u++, y += LANES) {
        const uint32_t bits = layout->bits[u];
        if (bits == 0)
            continue;
        const __m128i half = _mm_set1_epi8((char)(uint8_t)(1u << (bits - 1)));
        const __m128i sign = sign_bytes(y);
        const __m128i flipped = _mm_xor_si128(row->magnitude[u], sign);
        /* 8 bits: 128 +- m; otherwise the complement, whose excess bits no plane takes. */
        const __m128i code = bits == 8 ? _mm_add_epi8(half, _mm_sub_epi8(flipped, sign))
                                       : _mm_add_epi8(half, flipped);
        store_unit(bits, code, codes);
        codes += 2 * bits;
    }
}

static bool same_values(const tqkvi_layout *layout, const coded_row *a, const coded_row *b)
{
    for (uint32_t u = 0; u < layout->n_units; u++) {
        if (layout->bits[u] == 0)
            continue;
        for (uint32_t d = u * LANES; d < (u + 1) * LANES; d += 8) {
            const __m256 differs = _mm256_cmp_ps(_mm256_load_ps(a->value + d),
                                                 _mm256_load_ps(b->value + d), _CMP_NEQ_UQ);
            if (_mm256_movemask_ps(differs) != 0)
                return false;
        }
    }
    return true;
}

static void take_magnitudes(const float *y, size_t dim, float *size)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 limit = _mm256_set1_ps(TQKVK_Y_MAX);
    for (size_t d = 0; d < dim; d += 8)
        _mm256_store_ps(size + d,
                        _mm256_min_ps(_mm256_andnot_ps(sign, _mm256_load_ps(y + d)), limit));
}

uint8_t tqkvk_encode_row_f32_avx2(const tqkvi_layout *layout, const float *weight, const float *y,
                                  uint8_t *codes)
{
    _Alignas(32) float size[DIM_MAX];
    uint8_t candidates[TQKVK_CANDIDATES_MAX];
    float errors[TQKVK_CANDIDATES_MAX];
    bool taken[TQKVK_CANDIDATES_MAX] = {false};
    coded_row row, lower;
    tqkvk_row_range again;
    int scale;

    if (layout->row_bytes == 0)
        return 1;
    take_magnitudes(y, (size_t)layout->n_units * LANES, size);
    size_t n = tqkvk_list_candidates(find_range(layout, size), candidates);
    if (n % 2 != 0) { /* the last one again: they go in pairs */
        candidates[n] = candidates[n - 1];
        n++;
    }
    find_errors(layout, weight, size, candidates, n / 2, errors);
    do { /* the first one is nearly always stable, and some candidate is */
        scale = candidates[tqkvk_take_least(errors, taken, n)];
        code_row(layout, size, scale, &row);
        again = find_range(layout, row.value);
    } while (!tqkvk_is_stable(again, scale));

    const coded_row *best = &row;
    if (scale > again.peak && (scale - again.peak) % 16 == 0) {
        code_row(layout, row.value, again.peak, &lower);
        if (same_values(layout, &row, &lower)) {
            scale = again.peak;
            best = &lower;
        }
    }
    pack_row(layout, y, best, codes);
    return (uint8_t)scale;
}
