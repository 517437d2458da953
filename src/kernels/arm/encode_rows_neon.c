/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md with the bytes of ref.
 *
 * Sizes become whole numbers of 16 bits: a unit is two registers, or one of bytes, where look-ups
 * find the level. All candidates are tried on a unit before the next one:
 *
 *     sizes --> t = half levels --> bytes --> level --> 16 bits --> value --> squared error
 */
#include <stdbool.h>
#include <string.h>

#include "kernels/arm/block_neon.h"
#include "kernels/arm/levels_neon.h"
#include "kernels/scale_search.h"
#include "kernels/tables.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define LANES TQKV_UNIT_CHANNELS

/* What turns whole sizes to half levels and levels to whole sizes. */
typedef struct factors {
    uint16_t to_half_levels[TQKVK_CANDIDATES_MAX], to_size[TQKVK_CANDIDATES_MAX];
} factors;

/* Eight sums of pairs: pairs 0..3 and 4..7 of a unit. */
typedef struct pair_sums {
    float32x4_t lo, hi;
} pair_sums;

/* A row at work. */
typedef struct search {
    const tqkvi_layout *layout;
    uint16_t size[DIM_MAX];
    factors factors[9]; /* by width */
    tqkvk_row_range range;
    int candidates[TQKVK_CANDIDATES_MAX];
    size_t n_candidates;
    uint8_t magnitude[DIM_MAX]; /* of the candidate coded last */
} search;

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

/* Half levels of whole sizes, at most 255. */
TQKVK_INLINE uint8x16_t half_levels_of(uint16x8_t lo, uint16x8_t hi, uint16_t to_half_levels)
{
    const uint16x8_t f = vdupq_n_u16(to_half_levels);
    const uint16x8_t t_lo = vshrn_high_n_u32(
        vshrn_n_u32(vmull_u16(vget_low_u16(lo), vget_low_u16(f)), 15), vmull_high_u16(lo, f), 15);
    const uint16x8_t t_hi = vshrn_high_n_u32(
        vshrn_n_u32(vmull_u16(vget_low_u16(hi), vget_low_u16(f)), 15), vmull_high_u16(hi, f), 15);
    return vqmovn_high_u16(vqmovn_u16(t_lo), t_hi);
}

/* Whole sizes that eight levels stand for. */
TQKVK_INLINE uint16x8_t values_of(uint16x8_t level, uint16_t to_size)
{
    const uint16x8_t f = vdupq_n_u16(to_size);
    return vshrn_high_n_u32(vshrn_n_u32(vmull_u16(vget_low_u16(level), vget_low_u16(f)), 7),
                            vmull_high_u16(level, f), 7);
}

TQKVK_INLINE float32x4_t pair_squares(int16x8_t v)
{
    return vcvtq_f32_s32(
        vpaddq_s32(vmull_s16(vget_low_s16(v), vget_low_s16(v)), vmull_high_s16(v, v)));
}

/* sums + weight * v ^ 2, pair by pair */
TQKVK_INLINE pair_sums add_squares(pair_sums sums, int16x8_t lo, int16x8_t hi, float weight)
{
    return (pair_sums){vfmaq_n_f32(sums.lo, pair_squares(lo), weight),
                       vfmaq_n_f32(sums.hi, pair_squares(hi), weight)};
}

static inline pair_sums zero_sums(void)
{
    return (pair_sums){vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
}

/* ((0 + 2) + (4 + 6)) + ((1 + 3) + (5 + 7)) */
static inline float sum_pairs(pair_sums sums)
{
    const float32x2_t two = vadd_f32(vadd_f32(vget_low_f32(sums.lo), vget_high_f32(sums.lo)),
                                     vadd_f32(vget_low_f32(sums.hi), vget_high_f32(sums.hi)));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

static inline int16x8_t difference(uint16x8_t size, uint16x8_t value)
{
    return vreinterpretq_s16_u16(vsubq_u16(size, value));
}

/* Adds the errors of one unit to the sums of every candidate. */
TQKVK_INLINE void add_unit_errors(uint32_t bits, const uint16_t *size, float weight,
                                  const factors *f, size_t n, pair_sums *sums)
{
    const byte_table table = load_table(bits);
    const uint16x8_t lo = vld1q_u16(size), hi = vld1q_u16(size + 8);

    for (size_t i = 0; i < n; i++) {
        const uint8x16_t t = half_levels_of(lo, hi, f->to_half_levels[i]);
        const uint8x16_t level =
            find_levels(bits, &table, vminq_u8(t, vdupq_n_u8(TQKVK_HALF_LEVELS_MAX)));
        const uint16x8_t value_lo = values_of(vmovl_u8(vget_low_u8(level)), f->to_size[i]);
        const uint16x8_t value_hi = values_of(vmovl_high_u8(level), f->to_size[i]);
        sums[i] = add_squares(sums[i], difference(lo, value_lo), difference(hi, value_hi), weight);
    }
}

/* errors: of the candidates. One case per width, each with a loop of its own. */
static void find_errors(const search *s, const float *weight, float *errors)
{
    pair_sums sums[TQKVK_CANDIDATES_MAX];
    for (size_t i = 0; i < s->n_candidates; i++)
        sums[i] = zero_sums();
    for (uint32_t u = 0; u < s->layout->n_units; u++) {
        const uint32_t bits = s->layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, add_unit_errors, s->size + u * LANES, weight[u],
                       &s->factors[bits], s->n_candidates, sums);
    }
    for (size_t i = 0; i < s->n_candidates; i++)
        errors[i] = sum_pairs(sums[i]);
}

/* How many of n thresholds of an octave (8 or 16) the mantissa of value >= 0 reaches. */
static inline int count_in_octave(const float *thresholds, int n, float value)
{
    const uint32_t bits = tqkvi_bits_of_float(value);
    const float32x4_t mantissa =
        vreinterpretq_f32_u32(vdupq_n_u32((bits & 0x7fffffu) | 0x3f800000u));
    uint32x4_t count = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 4)
        count = vsubq_u32(count, vcgeq_f32(mantissa, vld1q_f32(thresholds + i)));
    return (int)vaddvq_u32(count);
}

/*
 * Index of a mean square, less that of 1. Thresholds repeat from octave to octave, eight of energy
 * (2 ^ (1/16), 2 ^ (3/16), ...) and sixteen of peaks: count by exponent, then within the octave.
 */
static int energy_index(float mean)
{
    return 8 * tqkvk_exponent_of(mean) + count_in_octave(&tqkvk_energy_thresholds[129], 8, mean);
}

static int peak_index(float peak)
{
    return 16 * tqkvk_exponent_of(peak) + count_in_octave(&tqkvk_peak_thresholds[129], 16, peak);
}

static inline float32x4_t magnitude_of(const float *y)
{
    return vminq_f32(vabsq_f32(vld1q_f32(y)), vdupq_n_f32(TQKVK_Y_MAX));
}

static inline int16x8_t whole_sizes(const float *y, float unit)
{
    return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(magnitude_of(y), unit))),
                        vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(magnitude_of(y + 4), unit))));
}

/* Sizes and range of a row. */
static void measure(search *s, const float *y)
{
    const tqkvi_layout *layout = s->layout;
    float32x4_t largest = vdupq_n_f32(TQKVK_SIZE_MIN), peak = vdupq_n_f32(0.0f);
    uint32_t widths = 0, n_coded = 0;

    for (uint32_t u = 0; u < layout->n_units; u++) {
        const uint32_t bits = layout->bits[u];
        const float *unit = y + u * LANES;
        if (bits == 0)
            continue;
        const float32x4_t top =
            vmaxq_f32(vmaxq_f32(magnitude_of(unit), magnitude_of(unit + 4)),
                      vmaxq_f32(magnitude_of(unit + 8), magnitude_of(unit + 12)));
        largest = vmaxq_f32(largest, top);
        peak = vmaxq_f32(peak, vmulq_n_f32(top, tqkvk_widths[bits].inv_peak));
        widths |= 1u << bits;
        n_coded += LANES;
    }
    const int exponent = tqkvk_size_exponent(vmaxvq_f32(largest));
    const float unit = tqkvi_power_of_two(exponent);
    pair_sums sums = zero_sums();
    for (uint32_t u = 0; u < layout->n_units; u++) {
        if (layout->bits[u] == 0)
            continue;
        const int16x8_t lo = whole_sizes(y + u * LANES, unit);
        const int16x8_t hi = whole_sizes(y + u * LANES + 8, unit);
        vst1q_u16(s->size + u * LANES, vreinterpretq_u16_s16(lo));
        vst1q_u16(s->size + u * LANES + 8, vreinterpretq_u16_s16(hi));
        sums = add_squares(sums, lo, hi, 1.0f);
    }
    const float mean = sum_pairs(sums) / (float)n_coded;
    s->range = (tqkvk_row_range){
        .energy = tqkvk_clamp_scale(128 + energy_index(mean * tqkvi_power_of_two(-2 * exponent))),
        .peak = tqkvk_clamp_scale(128 + peak_index(vmaxvq_f32(peak))),
        .exponent = exponent,
        .n_coded = (int)n_coded,
        .widths = widths};
}

static void list_candidates(search *s)
{
    const tqkvk_row_range *range = &s->range;
    const int n_energy = range->widths == TQKVK_ONLY_8 ? 0 : TQKVK_CANDIDATES_ENERGY;
    const int first = range->widths == TQKVK_ONLY_8 ? range->peak - 2 : range->peak - 1;

    s->n_candidates = range->widths == TQKVK_ONLY_8 ? TQKVK_CANDIDATES_8 : TQKVK_CANDIDATES_MAX;
    for (int i = 0; i < n_energy; i++)
        s->candidates[i] = tqkvk_clamp_scale(range->energy - 4 + i);
    for (int i = n_energy; i < (int)s->n_candidates; i++)
        s->candidates[i] = tqkvk_clamp_scale(first + i - n_energy);
}

/* To whole numbers of at most 16 bits. */
static inline uint16_t whole_16(float v)
{
    const uint32_t whole = vcvtns_u32_f32(v);
    return (uint16_t)(whole < 65535 ? whole : 65535);
}

static void fill_factors(search *s)
{
    const float up = tqkvi_power_of_two(15 - s->range.exponent);
    const float down = tqkvi_power_of_two(7 + s->range.exponent);

    for (uint32_t bits = 1; bits <= 8; bits++) {
        const tqkvk_width *width = &tqkvk_widths[bits];
        factors *f = &s->factors[bits];
        for (size_t i = 0; i < s->n_candidates && (s->range.widths >> bits & 1); i++) {
            const float inverse = tqkvk_scale_inverses[s->candidates[i]] * width->inv_step2;
            const float step = tqkvk_scale_values[s->candidates[i]] * width->step;
            f->to_half_levels[i] = whole_16(inverse * up);
            f->to_size[i] = whole_16(step * down);
        }
    }
}

/* Codes the row at candidate i: once or twice for a row, so that a width need not be a constant. */
static tqkvk_row_again code_row(search *s, size_t i)
{
    pair_sums sums = zero_sums();
    uint8x16_t largest = vdupq_n_u8(0);

    for (uint32_t u = 0; u < s->layout->n_units; u++) {
        const uint32_t bits = s->layout->bits[u];
        if (bits == 0)
            continue;
        const byte_table table = load_table(bits);
        const float step = tqkvk_widths[bits].step;
        const uint8x16_t t = vminq_u8(half_levels_of(vld1q_u16(s->size + u * LANES),
                                                     vld1q_u16(s->size + u * LANES + 8),
                                                     s->factors[bits].to_half_levels[i]),
                                      vdupq_n_u8(TQKVK_HALF_LEVELS_MAX));
        const uint8x16_t level = find_levels(bits, &table, t);
        vst1q_u8(s->magnitude + u * LANES, find_indices(bits, &table, t));
        largest = vmaxq_u8(largest, level);
        sums = add_squares(sums, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(level))),
                           vreinterpretq_s16_u16(vmovl_high_u8(level)), step * step);
    }
    return (tqkvk_row_again){.energy = energy_index(sum_pairs(sums) / (float)s->range.n_coded),
                             .peak = tqkvk_level_octaves[vmaxvq_u8(largest)]};
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

static void pack_row(const search *s, const float *y, uint8_t *codes)
{
    for (uint32_t u = 0; u < s->layout->n_units; u++, y += LANES) {
        const uint32_t bits = s->layout->bits[u];
        if (bits == 0)
            continue;
        const uint8x16_t half = vdupq_n_u8((uint8_t)(1u << (bits - 1)));
        const uint8x16_t sign = sign_bytes(y);
        const uint8x16_t flipped = veorq_u8(vld1q_u8(s->magnitude + u * LANES), sign);
        /* 8 bits: 128 +- m; otherwise the complement, whose excess bits no plane takes. */
        const uint8x16_t code =
            bits == 8 ? vaddq_u8(half, vsubq_u8(flipped, sign)) : vaddq_u8(half, flipped);
        store_unit(bits, code, codes);
        codes += 2 * bits;
    }
}

static uint8_t encode_row(const tqkvi_layout *layout, const float *weight, const float *y,
                          uint8_t *codes)
{
    float errors[TQKVK_CANDIDATES_MAX];
    tqkvk_contest contest;
    search s;
    tqkvk_row_again again;
    int scale;

    if (layout->row_bytes == 0)
        return 1;
    s.layout = layout;
    measure(&s, y);
    list_candidates(&s);
    fill_factors(&s);
    find_errors(&s, weight, errors);
    contest.n = s.n_candidates;
    for (size_t i = 0; i < s.n_candidates; i++) {
        const bool near_row = errors[i] <= 16.0f * (float)s.range.n_coded;
        if (near_row) { /* rare: the row was decoded from codes like these */
            (void)code_row(&s, i);
            errors[i] = tqkvk_exact_error(layout, weight, y, s.candidates[i], s.magnitude);
        }
        tqkvk_contest_put(&contest, i, near_row, errors[i], (uint8_t)s.candidates[i]);
    }
    do { /* the first one is nearly always stable, and some candidate is */
        const size_t best = tqkvk_contest_take(&contest);
        scale = s.candidates[best];
        again = code_row(&s, best);
    } while (!tqkvk_is_stable(&s.range, again, scale));
    if (tqkvk_may_go_lower(again, scale))
        scale = tqkvk_use_lower_scale(layout, again, scale, s.magnitude);
    pack_row(&s, y, codes);
    return (uint8_t)scale;
}

void tqkvk_encode_rows_f32_neon(const tqkvi_layout *layout, const float *weight, const float *y,
                               size_t n_rows, uint8_t *scales, uint8_t *codes)
{
    for (size_t r = 0; r < n_rows; r++)
        scales[r] = encode_row(layout, weight, y + r * layout->n_units * LANES,
                               codes + r * layout->row_bytes);
}
