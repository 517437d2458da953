/* SPDX-License-Identifier: Apache-2.0 */
/* "Encoding a row" of docs/FORMAT.md, step by step, from the row in unit variance on. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/levels.h"
#include "kernels/tables.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)
#define LANES TQKV_UNIT_CHANNELS
#define Y_MAX 4096.0f /* past every level at every scale, and small enough that no sum overflows */
#define CANDIDATES_MAX 16

/* A row coded at one scale. */
typedef struct coded_row {
    uint8_t magnitude[DIM_MAX]; /* index of the level without its sign */
    float value[DIM_MAX];       /* what it decodes to, without its sign */
    float error;
} coded_row;

/* What the choice of candidates depends on. */
typedef struct row_range {
    int energy; /* index of the scale nearest to the root mean square */
    int peak;   /* index of the scale whose largest level is nearest to the largest channel */
} row_range;

/* Order of every sum over channels: sixteen lanes, then the halving tree. */
static float sum_lanes(const float lanes[LANES])
{
    float tree[LANES];
    memcpy(tree, lanes, sizeof(tree));
    for (uint32_t n = LANES / 2; n > 0; n /= 2) {
        for (uint32_t i = 0; i < n; i++)
            tree[i] = tree[i] + tree[i + n];
    }
    return tree[0];
}

/* Number of thresholds [1..255] at or below value, at least 1. */
static int count_thresholds(const float thresholds[256], float value)
{
    int n = 0;
    while (n < 255 && thresholds[n + 1] <= value)
        n++;
    return n > 0 ? n : 1;
}

/* size: magnitudes of the channels. */
static row_range find_range(const tqkvi_layout *layout, const float *size)
{
    float lanes[LANES] = {0};
    float peak = 0.0f;
    float n_coded = 0.0f;

    for (uint32_t u = 0; u < layout->n_units; u++) {
        if (layout->bits[u] == 0)
            continue;
        for (uint32_t d = 0; d < LANES; d++) {
            const float v = size[u * LANES + d];
            const float square = v * v;
            const float relative = v * tqkvk_widths[layout->bits[u]].inv_peak;
            lanes[d] = lanes[d] + square;
            peak = relative > peak ? relative : peak;
        }
        n_coded += (float)LANES;
    }
    return (row_range){
        .energy = count_thresholds(tqkvk_energy_thresholds, sum_lanes(lanes) / n_coded),
        .peak = count_thresholds(tqkvk_peak_thresholds, peak),
    };
}

static uint8_t nearest_magnitude(const tqkvk_width *width, float half_levels)
{
    const uint32_t t =
        (uint32_t)(half_levels < TQKVK_HALF_LEVELS_MAX ? half_levels : TQKVK_HALF_LEVELS_MAX);
    uint32_t m = 0;
    while (m + 1 < width->n_magnitudes && width->thresholds[m] <= t)
        m++;
    return (uint8_t)m;
}

static void code_row(const tqkvi_layout *layout, const float *weight, const float *size, int scale,
                     coded_row *out)
{
    float lanes[LANES] = {0};

    for (uint32_t u = 0; u < layout->n_units; u++) {
        const uint32_t bits = layout->bits[u];
        if (bits == 0)
            continue;
        const tqkvk_width *width = &tqkvk_widths[bits];
        const int8_t *magnitudes = width->levels + (1u << (bits - 1));
        const float factor = tqkvk_scale_inverses[scale] * width->inv_step2;
        for (uint32_t d = 0; d < LANES; d++) {
            const uint32_t j = u * LANES + d;
            const uint8_t m = nearest_magnitude(width, size[j] * factor);
            const float level = width->step * (float)magnitudes[m];
            const float value = tqkvk_scale_values[scale] * level;
            const float difference = size[j] - value;
            const float square = difference * difference;
            const float weighted = weight[u] * square;
            lanes[d] = lanes[d] + weighted;
            out->magnitude[j] = m;
            out->value[j] = value;
        }
    }
    out->error = sum_lanes(lanes);
}

/* Would encoding the decoded row consider this scale, with one step to spare? */
static bool is_stable(row_range again, int scale)
{
    return (again.energy - 3 <= scale && scale <= again.energy + 7) || scale == again.peak;
}

static int list_candidates(row_range range, int out[CANDIDATES_MAX])
{
    int n = 0;
    for (int c = 1; c <= 255; c++) {
        if ((range.energy - 4 <= c && c <= range.energy + 8) ||
            (range.peak - 1 <= c && c <= range.peak + 1))
            out[n++] = c;
    }
    return n;
}

static bool same_values(const tqkvi_layout *layout, const coded_row *a, const coded_row *b)
{
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        if (layout->bits[j / LANES] != 0 && a->value[j] != b->value[j])
            return false;
    }
    return true;
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

uint8_t tqkvk_encode_row_f32_ref(const tqkvi_layout *layout, const float *weight, const float *y,
                                 uint8_t *codes)
{
    float size[DIM_MAX];
    int candidates[CANDIDATES_MAX];
    coded_row best, row;
    int scale = 0;

    if (layout->row_bytes == 0)
        return 1;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++)
        size[j] = fabsf(y[j]) < Y_MAX ? fabsf(y[j]) : Y_MAX;

    const int n_candidates = list_candidates(find_range(layout, size), candidates);
    for (int i = 0; i < n_candidates; i++) {
        code_row(layout, weight, size, candidates[i], &row);
        if ((scale == 0 || row.error < best.error) &&
            is_stable(find_range(layout, row.value), candidates[i])) {
            scale = candidates[i];
            best = row;
        }
    }

    /* The same values may exist at the scale that their peak asks for, a power of two below. */
    const int peak = find_range(layout, best.value).peak;
    if (scale > peak && (scale - peak) % 16 == 0) {
        code_row(layout, weight, best.value, peak, &row);
        if (same_values(layout, &row, &best)) {
            scale = peak;
            best = row;
        }
    }
    pack_row(layout, y, best.magnitude, codes);
    return (uint8_t)scale;
}
