/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md with the bytes of ref.
 *
 * A unit of 16 channels is four registers of f32, or one of bytes, where look-ups find the level.
 * All candidates are tried on a unit before the next one:
 *
 *     f32 |y| --> t = half levels --> bytes --> level --> f32 value --> squared error, 16 lanes
 *
 * The lanes of the error are those of the contract, so that only the halving tree remains to be
 * added up.
 */
#include <stdbool.h>
#include <string.h>

#include "kernels/arm/block_neon.h"
#include "kernels/arm/levels_neon.h"
#include "kernels/scale_search.h"
#include "kernels/tables.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define LANES TQKV_UNIT_CHANNELS

typedef struct coded_row {
    float value[DIM_MAX];
    uint8x16_t magnitude[TQKV_UNITS_MAX];
} coded_row;

/* A tqkvk_bucket. */
typedef struct byte_table {
    uint8x16_t index, level;
    int8x16_t limit0, limit1, limit2;
    uint8x16_t gain0, gain1, gain2;
} byte_table;

TQKVK_INLINE byte_table load_table(uint32_t bits)
{
    const tqkvk_bucket *bucket = &tqkvk_buckets[bits <= 6 ? bits : 0];
    return (byte_table){vld1q_u8(bucket->index),    vld1q_u8(bucket->level),
                        vld1q_s8(bucket->limit[0]), vld1q_s8(bucket->limit[1]),
                        vld1q_s8(bucket->limit[2]), vld1q_u8(bucket->gain[0]),
                        vld1q_u8(bucket->gain[1]),  vld1q_u8(bucket->gain[2])};
}

/* All ones where t is past the limit of its bucket. */
TQKVK_INLINE uint8x16_t passes(uint8x16_t t, uint8x16_t bucket, int8x16_t limit)
{
    const int8x16_t t_signed = vreinterpretq_s8_u8(veorq_u8(t, vdupq_n_u8(128)));
    return vcgtq_s8(t_signed, vqtbl1q_s8(limit, bucket));
}

TQKVK_INLINE uint8x16_t add_gain(uint8x16_t level, uint8x16_t t, uint8x16_t bucket, int8x16_t limit,
                                 uint8x16_t gain)
{
    return vaddq_u8(level, vandq_u8(passes(t, bucket, limit), vqtbl1q_u8(gain, bucket)));
}

/* Positive levels of half levels t. */
TQKVK_INLINE uint8x16_t find_levels(uint32_t bits, const byte_table *table, uint8x16_t t)
{
    if (bits == 1)
        return vdupq_n_u8(TQKVK_LEVEL_MAX);
    if (bits == 8)
        return vrhaddq_u8(t, vdupq_n_u8(0));

    const uint8x16_t bucket = vshrq_n_u8(t, 4);
    uint8x16_t level = vqtbl1q_u8(table->level, bucket);
    level = add_gain(level, t, bucket, table->limit0, table->gain0);
    if (bits >= 5)
        level = add_gain(level, t, bucket, table->limit1, table->gain1);
    if (bits == 6)
        level = add_gain(level, t, bucket, table->limit2, table->gain2);
    return level;
}

/* The same as indices of the levels. */
TQKVK_INLINE uint8x16_t find_indices(uint32_t bits, const byte_table *table, uint8x16_t t)
{
    if (bits == 1)
        return vdupq_n_u8(0);
    if (bits == 8)
        return vrhaddq_u8(t, vdupq_n_u8(0));

    const uint8x16_t bucket = vshrq_n_u8(t, 4); /* unused limits are never passed */
    uint8x16_t index = vqtbl1q_u8(table->index, bucket);
    index = vsubq_u8(index, passes(t, bucket, table->limit0));
    index = vsubq_u8(index, passes(t, bucket, table->limit1));
    return vsubq_u8(index, passes(t, bucket, table->limit2));
}

TQKVK_INLINE uint16x4_t half_levels_4(float32x4_t size, float factor)
{
    const float32x4_t limit = vdupq_n_f32((float)TQKVK_HALF_LEVELS_MAX);
    return vmovn_u32(vcvtq_u32_f32(vminq_f32(vmulq_n_f32(size, factor), limit)));
}

TQKVK_INLINE uint8x16_t half_levels(tqkvk_four size, float factor)
{
    const uint16x8_t lo =
        vcombine_u16(half_levels_4(size.v0, factor), half_levels_4(size.v1, factor));
    const uint16x8_t hi =
        vcombine_u16(half_levels_4(size.v2, factor), half_levels_4(size.v3, factor));
    return vcombine_u8(vmovn_u16(lo), vmovn_u16(hi));
}

/* scale * (step * level) */
TQKVK_INLINE tqkvk_four values_of(uint8x16_t level, float step, float scale)
{
    const uint16x8_t lo = vmovl_u8(vget_low_u8(level)), hi = vmovl_high_u8(level);
    const tqkvk_four value = {
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(lo))), vcvtq_f32_u32(vmovl_high_u16(lo)),
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(hi))), vcvtq_f32_u32(vmovl_high_u16(hi))};
    return tqkvk_four_mul(tqkvk_four_mul(value, step), scale);
}

/* sum + weight * (size - value) ^ 2 */
TQKVK_INLINE float32x4_t add_error(float32x4_t sum, float32x4_t size, float32x4_t value,
                                   float weight)
{
    const float32x4_t difference = vsubq_f32(size, value);
    return vaddq_f32(sum, vmulq_n_f32(vmulq_f32(difference, difference), weight));
}

/* Adds the errors of one unit to the sums of every candidate. */
TQKVK_INLINE void add_unit_errors(uint32_t bits, float weight, const float *size,
                                  const uint8_t *candidates, size_t n, tqkvk_four *sums)
{
    const byte_table table = load_table(bits);
    const float step = tqkvk_widths[bits].step, inv_step2 = tqkvk_widths[bits].inv_step2;
    const tqkvk_four unit = tqkvk_four_load(size, 4);

    for (size_t i = 0; i < n; i++) {
        const uint8_t c = candidates[i];
        const uint8x16_t t = half_levels(unit, tqkvk_scale_inverses[c] * inv_step2);
        const uint8x16_t level = find_levels(bits, &table, t);
        const tqkvk_four value = values_of(level, step, tqkvk_scale_values[c]), sum = sums[i];
        sums[i] = (tqkvk_four){add_error(sum.v0, unit.v0, value.v0, weight),
                               add_error(sum.v1, unit.v1, value.v1, weight),
                               add_error(sum.v2, unit.v2, value.v2, weight),
                               add_error(sum.v3, unit.v3, value.v3, weight)};
    }
}

/* The halving tree. */
TQKVK_INLINE float sum_lanes(tqkvk_four v)
{
    const float32x4_t four = vaddq_f32(vaddq_f32(v.v0, v.v2), vaddq_f32(v.v1, v.v3));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

/* errors: [n] out, of the candidates. One case per width, each with a loop of its own. */
static void find_errors(const tqkvi_layout *layout, const float *weight, const float *size,
                        const uint8_t *candidates, size_t n, float *errors)
{
    tqkvk_four sums[TQKVK_CANDIDATES_MAX];
    for (size_t i = 0; i < n; i++)
        sums[i] = tqkvk_four_zero();

    for (uint32_t u = 0; u < layout->n_units; u++, size += LANES) {
        TQKVK_BY_WIDTH(layout->bits[u], TQKVK_NOTHING, add_unit_errors, weight[u], size, candidates,
                       n, sums);
    }
    for (size_t i = 0; i < n; i++)
        errors[i] = sum_lanes(sums[i]);
}

/* How many of n thresholds of an octave (8 or 16) the mantissa of value >= 0 reaches. */
static inline int count_in_octave(const float *thresholds, int n, float value, int *exponent)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    *exponent = (int)(bits >> 23) - 127;
    const float32x4_t mantissa =
        vreinterpretq_f32_u32(vdupq_n_u32((bits & 0x7fffffu) | 0x3f800000u));
    uint32x4_t count = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 4)
        count = vsubq_u32(count, vcgeq_f32(mantissa, vld1q_f32(thresholds + i)));
    return (int)vaddvq_u32(count);
}

static tqkvk_row_range find_range(const tqkvi_layout *layout, const float *size)
{
    tqkvk_four sum = tqkvk_four_zero();
    float32x4_t top = vdupq_n_f32(0.0f);
    int n_coded = 0;

    for (uint32_t u = 0; u < layout->n_units; u++, size += LANES) {
        if (layout->bits[u] == 0)
            continue;
        const tqkvk_four v = tqkvk_four_load(size, 4);
        const float32x4_t largest = vmaxq_f32(vmaxq_f32(v.v0, v.v1), vmaxq_f32(v.v2, v.v3));
        const tqkvk_four square = {vmulq_f32(v.v0, v.v0), vmulq_f32(v.v1, v.v1),
                                   vmulq_f32(v.v2, v.v2), vmulq_f32(v.v3, v.v3)};
        sum = tqkvk_four_add(sum, square);
        top = vmaxq_f32(top, vmulq_n_f32(largest, tqkvk_widths[layout->bits[u]].inv_peak));
        n_coded += (int)LANES;
    }
    const float mean = sum_lanes(sum) / (float)n_coded, peak = vmaxvq_f32(top);
    int energy_exponent, peak_exponent;
    const int n_energy = count_in_octave(&tqkvk_energy_thresholds[129], 8, mean, &energy_exponent);
    const int n_peak = count_in_octave(&tqkvk_peak_thresholds[129], 16, peak, &peak_exponent);
    return tqkvk_range_of(energy_exponent, n_energy, peak_exponent, n_peak);
}

/* Once for the chosen scale, so that a width need not be a constant. value: [16] out. */
static uint8x16_t code_unit(uint32_t bits, int scale, const float *size, float *value)
{
    const byte_table table = load_table(bits);
    const tqkvk_width *width = &tqkvk_widths[bits];
    const uint8x16_t t =
        half_levels(tqkvk_four_load(size, 4), tqkvk_scale_inverses[scale] * width->inv_step2);
    const uint8x16_t level = find_levels(bits, &table, t);
    tqkvk_four_store(value, values_of(level, width->step, tqkvk_scale_values[scale]));
    return find_indices(bits, &table, t);
}

static void code_row(const tqkvi_layout *layout, const float *size, int scale, coded_row *out)
{
    for (uint32_t u = 0; u < layout->n_units; u++) {
        const uint32_t bits = layout->bits[u];
        if (bits != 0)
            out->magnitude[u] = code_unit(bits, scale, size + u * LANES, out->value + u * LANES);
    }
}

/*
 * Planes of w bits. Shifting one part over the other (SLI) keeps the lower bits of the other, so
 * that excess bits of a code fall away.
 */
static inline void store_plane4(uint8_t *plane, uint8x16_t code)
{
    vst1_u8(plane, vsli_n_u8(vget_low_u8(code), vget_high_u8(code), 4));
}

static inline void store_plane2(uint8_t *plane, uint8x16_t code)
{
    const uint8x16_t pairs = vsliq_n_u8(code, vextq_u8(code, code, 4), 2);
    const uint8x8_t fours = vsli_n_u8(vget_low_u8(pairs), vget_high_u8(pairs), 4);
    const uint32_t value = vget_lane_u32(vreinterpret_u32_u8(fours), 0);
    memcpy(plane, &value, sizeof(value));
}

/* Channels 2i and 2i + 1 have bit i of the two bytes: sums of their own bits. */
static inline void store_plane1(uint8_t *plane, uint8x16_t code)
{
    static const int8_t up[16] = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
    const uint8x16_t bit = vshlq_u8(vandq_u8(code, vdupq_n_u8(1)), vld1q_s8(up));
    const uint16_t value = vaddvq_u16(vreinterpretq_u16_u8(bit));
    memcpy(plane, &value, sizeof(value));
}

static inline void store_unit(uint32_t bits, uint8x16_t code, uint8_t *out)
{
    switch (bits) {
    case 1:
        store_plane1(out, code);
        break;
    case 2:
        store_plane2(out, code);
        break;
    case 3:
        store_plane2(out, code);
        store_plane1(out + 4, vshrq_n_u8(code, 2));
        break;
    case 4:
        store_plane4(out, code);
        break;
    case 5:
        store_plane4(out, code);
        store_plane1(out + 8, vshrq_n_u8(code, 4));
        break;
    case 6:
        store_plane4(out, code);
        store_plane2(out + 8, vshrq_n_u8(code, 4));
        break;
    default:
        store_plane4(out, code);
        store_plane4(out + 8, vshrq_n_u8(code, 4));
        break;
    }
}

/* 0xff in the bytes of the channels whose sign bit is set. */
static inline uint8x16_t sign_bytes(const float *y)
{
    const tqkvk_four v = tqkvk_four_load(y, 4);
    const uint16x8_t lo = vcombine_u16(vshrn_n_u32(vreinterpretq_u32_f32(v.v0), 16),
                                       vshrn_n_u32(vreinterpretq_u32_f32(v.v1), 16));
    const uint16x8_t hi = vcombine_u16(vshrn_n_u32(vreinterpretq_u32_f32(v.v2), 16),
                                       vshrn_n_u32(vreinterpretq_u32_f32(v.v3), 16));
    const uint8x16_t top = vcombine_u8(vshrn_n_u16(lo, 8), vshrn_n_u16(hi, 8));
    return vcltzq_s8(vreinterpretq_s8_u8(top));
}

static void pack_row(const tqkvi_layout *layout, const float *y, const coded_row *row,
                     uint8_t *codes)
{
    for (uint32_t u = 0; u < layout->n_units; u++, y += LANES) {
        const uint32_t bits = layout->bits[u];
        if (bits == 0)
            continue;
        const uint8x16_t half = vdupq_n_u8((uint8_t)(1u << (bits - 1)));
        const uint8x16_t sign = sign_bytes(y);
        const uint8x16_t flipped = veorq_u8(row->magnitude[u], sign);
        /* 8 bits: 128 +- m; otherwise the complement, whose excess bits no plane takes. */
        const uint8x16_t code =
            bits == 8 ? vaddq_u8(half, vsubq_u8(flipped, sign)) : vaddq_u8(half, flipped);
        store_unit(bits, code, codes);
        codes += 2 * bits;
    }
}

static bool same_values(const tqkvi_layout *layout, const coded_row *a, const coded_row *b)
{
    for (uint32_t u = 0; u < layout->n_units; u++) {
        if (layout->bits[u] == 0)
            continue;
        for (uint32_t d = u * LANES; d < (u + 1) * LANES; d += 4) {
            const uint32x4_t same = vceqq_f32(vld1q_f32(a->value + d), vld1q_f32(b->value + d));
            if (vminvq_u32(same) == 0)
                return false;
        }
    }
    return true;
}

static void take_magnitudes(const float *y, size_t dim, float *size)
{
    const float32x4_t limit = vdupq_n_f32(TQKVK_Y_MAX);
    for (size_t d = 0; d < dim; d += 4)
        vst1q_f32(size + d, vminq_f32(vabsq_f32(vld1q_f32(y + d)), limit));
}

uint8_t tqkvk_encode_row_f32_neon(const tqkvi_layout *layout, const float *weight, const float *y,
                                  uint8_t *codes)
{
    float size[DIM_MAX];
    uint8_t candidates[TQKVK_CANDIDATES_MAX];
    float errors[TQKVK_CANDIDATES_MAX];
    bool taken[TQKVK_CANDIDATES_MAX] = {false};
    coded_row row, lower;
    tqkvk_row_range again;
    int scale;

    if (layout->row_bytes == 0)
        return 1;
    take_magnitudes(y, (size_t)layout->n_units * LANES, size);
    const size_t n = tqkvk_list_candidates(find_range(layout, size), candidates);
    find_errors(layout, weight, size, candidates, n, errors);
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
