/* SPDX-License-Identifier: Apache-2.0 */
/* "Encoding a row" of docs/FORMAT.md, step by step, from the row in unit variance on. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/levels.h"
#include "kernels/tables.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define LANES TQKV_UNIT_CHANNELS
#define PAIRS (LANES / 2)
#define Y_MAX 4096.0f /* past every level at every scale, and small enough that no sum overflows */
#define CANDIDATES_MAX 16

/* Magnitudes of a row: as they are, and in whole numbers, the largest one 2^12 .. 2^13. */
typedef struct row_sizes {
    float f[DIM_MAX];
    int32_t i[DIM_MAX];
    int exponent; /* i is about f * 2 ^ exponent */
    float n_coded;
    bool all_8; /* every unit with codes has 8 bits */
} row_sizes;

/* A row coded at one scale. */
typedef struct coded_row {
    int scale;
    uint8_t magnitude[DIM_MAX]; /* index of the level without its sign */
    float error;
    bool near; /* may be what the row was decoded from; then the error is that of f32 */
} coded_row;

static int32_t level_of(uint32_t bits, uint8_t magnitude)
{
    return tqkvk_widths[bits].levels[(1u << (bits - 1)) + magnitude];
}

/* Number of thresholds [1..255] at or below value, at least 1. */
static int count_thresholds(const float thresholds[256], float value)
{
    int n = 0;
    while (n < 255 && thresholds[n + 1] <= value)
        n++;
    return n > 0 ? n : 1;
}

static int clamp_scale(int c)
{
    return c < 1 ? 1 : c > 255 ? 255 : c;
}

/* Sum of factor[u] * v ^ 2: exact in pairs, then eight lanes of f32. factor: of each unit. */
static float sum_squares(const tqkvi_layout *layout, const float *factor, const int32_t *v)
{
    float lane[PAIRS] = {0};
    for (uint32_t u = 0; u < layout->n_units; u++) {
        for (uint32_t i = 0; i < PAIRS && layout->bits[u] != 0; i++) {
            const int32_t *pair = v + u * LANES + 2 * i;
            lane[i] = fmaf(factor[u], (float)(pair[0] * pair[0] + pair[1] * pair[1]), lane[i]);
        }
    }
    return ((lane[0] + lane[2]) + (lane[4] + lane[6])) +
           ((lane[1] + lane[3]) + (lane[5] + lane[7]));
}

static void take_sizes(const tqkvi_layout *layout, const float *y, row_sizes *out)
{
    float largest = 0x1p-7f; /* the smallest scale is 2^-7.94 */
    *out = (row_sizes){.all_8 = true};
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        out->f[j] = fabsf(y[j]) < Y_MAX ? fabsf(y[j]) : Y_MAX;
        if (bits == 0)
            continue;
        largest = out->f[j] > largest ? out->f[j] : largest;
        out->all_8 = out->all_8 && bits == 8;
        out->n_coded += 1.0f;
    }
    (void)frexpf(largest, &out->exponent);
    out->exponent = 13 - out->exponent;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        if (layout->bits[j / LANES] != 0)
            out->i[j] = (int32_t)rintf(ldexpf(out->f[j], out->exponent));
    }
}

/* Scale whose largest level is nearest to the largest channel. */
static int find_peak(const tqkvi_layout *layout, const row_sizes *row)
{
    float peak = 0.0f;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        const float relative = bits != 0 ? row->f[j] * tqkvk_widths[bits].inv_peak : 0.0f;
        peak = relative > peak ? relative : peak;
    }
    return count_thresholds(tqkvk_peak_thresholds, peak);
}

/* Scale nearest to the root mean square. */
static int find_energy(const tqkvi_layout *layout, const row_sizes *row)
{
    float ones[TQKV_UNITS_MAX];
    for (uint32_t u = 0; u < layout->n_units; u++)
        ones[u] = 1.0f;
    const float mean = sum_squares(layout, ones, row->i) / row->n_coded;
    return count_thresholds(tqkvk_energy_thresholds, ldexpf(mean, -2 * row->exponent));
}

static int list_candidates(const tqkvi_layout *layout, const row_sizes *row,
                           int out[CANDIDATES_MAX])
{
    const int peak = find_peak(layout, row), energy = find_energy(layout, row);
    int n = 0;
    for (int c = 1; c <= 255; c++) {
        const bool near_peak = peak - 1 <= c && c <= peak + 1;
        const bool near_energy = energy - 4 <= c && c <= energy + 8;
        if (row->all_8 ? peak - 2 <= c && c <= peak + 3 : near_peak || near_energy)
            out[n++] = c;
    }
    return n;
}

static int32_t whole_16(float v)
{
    return v < 65535.0f ? (int32_t)rintf(v) : 65535;
}

static uint8_t nearest_magnitude(const tqkvk_width *width, int32_t half_levels)
{
    uint32_t m = 0;
    while (m + 1 < width->n_magnitudes && width->thresholds[m] <= half_levels)
        m++;
    return (uint8_t)m;
}

/* Order of the sum: sixteen lanes, then the halving tree. */
static float exact_error(const tqkvi_layout *layout, const float *weight, const row_sizes *row,
                         const coded_row *coded)
{
    float lane[LANES] = {0};
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        if (bits == 0)
            continue;
        const float level = tqkvk_widths[bits].step * (float)level_of(bits, coded->magnitude[j]);
        const float difference = row->f[j] - tqkvk_scale_values[coded->scale] * level;
        const float square = difference * difference;
        const float weighted = weight[j / LANES] * square;
        lane[j % LANES] = lane[j % LANES] + weighted;
    }
    for (uint32_t n = LANES / 2; n > 0; n /= 2) {
        for (uint32_t i = 0; i < n; i++)
            lane[i] = lane[i] + lane[i + n];
    }
    return lane[0];
}

static void code_row(const tqkvi_layout *layout, const float *weight, const row_sizes *row,
                     int scale, coded_row *out)
{
    int32_t difference[DIM_MAX];

    out->scale = scale;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        if (bits == 0)
            continue;
        const tqkvk_width *width = &tqkvk_widths[bits];
        const float inverse = tqkvk_scale_inverses[scale] * width->inv_step2;
        const float step = tqkvk_scale_values[scale] * width->step;
        const int32_t to_half_levels = whole_16(ldexpf(inverse, 15 - row->exponent));
        const int32_t to_size = whole_16(ldexpf(step, row->exponent + 7));
        const int32_t half_levels = row->i[j] * to_half_levels >> 15;
        out->magnitude[j] = nearest_magnitude(width, half_levels);
        difference[j] = row->i[j] - (level_of(bits, out->magnitude[j]) * to_size >> 7);
    }
    out->error = sum_squares(layout, weight, difference);
    out->near = out->error <= 16.0f * row->n_coded;
    if (out->near)
        out->error = exact_error(layout, weight, row, out);
}

/* Scale that find_peak would find for the decoded row. */
static int peak_again(const tqkvi_layout *layout, const coded_row *row)
{
    int32_t largest = 0;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        const int32_t level = bits != 0 ? level_of(bits, row->magnitude[j]) : 0;
        largest = level > largest ? level : largest;
    }
    return clamp_scale(row->scale + tqkvk_level_octaves[largest]);
}

/* Scale that find_energy would find for it, or the next one. */
static int energy_again(const tqkvi_layout *layout, float n_coded, const coded_row *row)
{
    float step_squared[TQKV_UNITS_MAX];
    int32_t level[DIM_MAX];
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        step_squared[j / LANES] = tqkvk_widths[bits].step * tqkvk_widths[bits].step;
        level[j] = bits != 0 ? level_of(bits, row->magnitude[j]) : 0;
    }
    const float mean = sum_squares(layout, step_squared, level) / n_coded;
    return clamp_scale(row->scale + count_thresholds(tqkvk_energy_thresholds, mean) - 128);
}

/* Would encoding the decoded row consider this scale, with one step to spare? */
static bool is_stable(const tqkvi_layout *layout, const row_sizes *sizes, const coded_row *row)
{
    const int peak = peak_again(layout, row);
    if (sizes->all_8)
        return peak - 1 <= row->scale && row->scale <= peak + 2;
    const int energy = energy_again(layout, sizes->n_coded, row);
    return (energy - 3 <= row->scale && row->scale <= energy + 7) || row->scale == peak;
}

static bool is_better(const coded_row *a, const coded_row *b)
{
    return a->near != b->near ? a->near : a->error < b->error;
}

static bool is_zero(const tqkvi_layout *layout, const coded_row *row)
{
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        if (bits != 0 && level_of(bits, row->magnitude[j]) != 0)
            return false;
    }
    return true;
}

/*
 * The same values may exist at the scale that their peak asks for, whole octaves below; and 0 is 0 at
 * every scale.
 */
static void use_lower_scale(const tqkvi_layout *layout, coded_row *row)
{
    uint8_t magnitude[DIM_MAX] = {0};
    const int peak = peak_again(layout, row);

    if (is_zero(layout, row))
        row->scale = 1;
    if (row->scale <= peak || (row->scale - peak) % 16 != 0)
        return;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        if (bits == 0)
            continue;
        const int64_t wanted = (int64_t)level_of(bits, row->magnitude[j])
                               << (row->scale - peak) / 16;
        uint32_t m = 0;
        while (m < tqkvk_widths[bits].n_magnitudes && level_of(bits, (uint8_t)m) != wanted)
            m++;
        if (m == tqkvk_widths[bits].n_magnitudes)
            return;
        magnitude[j] = (uint8_t)m;
    }
    memcpy(row->magnitude, magnitude, sizeof(magnitude));
    row->scale = peak;
}

static void put_code(uint8_t *plane, uint32_t w, uint32_t d, uint32_t code)
{
    plane[d % (2 * w)] |= (uint8_t)((code & ((1u << w) - 1)) << (d / (2 * w) * w));
}

static void pack_row(const tqkvi_layout *layout, const float *y, const uint8_t *magnitude,
                     uint8_t *codes)
{
    memset(codes, 0, layout->row_bytes);
    for (uint32_t u = 0; u < layout->n_units; u++) {
        const uint32_t bits = layout->bits[u];
        if (bits == 0)
            continue;
        const uint32_t low = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
        const uint32_t half = 1u << (bits - 1);
        for (uint32_t d = 0; d < LANES; d++) {
            const uint32_t m = magnitude[u * LANES + d];
            const uint32_t below = bits == 8 ? half - m : half - 1 - m;
            const uint32_t code = signbit(y[u * LANES + d]) ? below : half + m;
            put_code(codes, low, d, code);
            if (bits > low)
                put_code(codes + 2 * low, bits - low, d, code >> low);
        }
        codes += 2 * bits;
    }
}

static uint8_t encode_row(const tqkvi_layout *layout, const float *weight, const float *y,
                          uint8_t *codes)
{
    row_sizes sizes;
    int candidates[CANDIDATES_MAX];
    coded_row best = {.scale = 0}, row;

    if (layout->row_bytes == 0)
        return 1;
    take_sizes(layout, y, &sizes);
    const int n_candidates = list_candidates(layout, &sizes, candidates);
    for (int i = 0; i < n_candidates; i++) {
        code_row(layout, weight, &sizes, candidates[i], &row);
        if ((best.scale == 0 || is_better(&row, &best)) && is_stable(layout, &sizes, &row))
            best = row;
    }
    use_lower_scale(layout, &best);
    pack_row(layout, y, best.magnitude, codes);
    return (uint8_t)best.scale;
}

void tqkvk_encode_rows_f32_ref(const tqkvi_layout *layout, const float *weight, const float *y,
                              size_t n_rows, uint8_t *scales, uint8_t *codes)
{
    for (size_t r = 0; r < n_rows; r++)
        scales[r] = encode_row(layout, weight, y + r * layout->n_units * LANES,
                               codes + r * layout->row_bytes);
}
