/* SPDX-License-Identifier: Apache-2.0 */
/* Rare parts of the search for a scale: rows that were decoded before, and two forms of one row. */
#include "kernels/scale_search.h"

#include <math.h>
#include <string.h>

#include "kernels/levels.h"

#define LANES TQKV_UNIT_CHANNELS

static uint32_t level_of(uint32_t bits, uint32_t magnitude)
{
    return (uint32_t)tqkvk_widths[bits].levels[(1u << (bits - 1)) + magnitude];
}

float tqkvk_exact_error(const tqkvi_layout *layout, const float *weight, const float *y, int scale,
                        const uint8_t *magnitude)
{
    float lane[LANES] = {0};

    for (uint32_t u = 0; u < layout->n_units; u++, y += LANES, magnitude += LANES) {
        const uint32_t bits = layout->bits[u];
        for (uint32_t d = 0; d < LANES && bits != 0; d++) {
            const float size = fabsf(y[d]) < TQKVK_Y_MAX ? fabsf(y[d]) : TQKVK_Y_MAX;
            const float level = tqkvk_widths[bits].step * (float)level_of(bits, magnitude[d]);
            const float difference = size - tqkvk_scale_values[scale] * level;
            lane[d] = lane[d] + weight[u] * (difference * difference);
        }
    }
    for (uint32_t n = LANES / 2; n > 0; n /= 2) {
        for (uint32_t i = 0; i < n; i++)
            lane[i] = lane[i] + lane[i + n];
    }
    return lane[0];
}

/* Index of a level, or 256 where the width has no such level. */
static uint32_t find_level(uint32_t bits, uint64_t level)
{
    for (uint32_t m = 0; m < tqkvk_widths[bits].n_magnitudes; m++) {
        if (level_of(bits, m) == level)
            return m;
    }
    return 256;
}

int tqkvk_use_lower_scale(const tqkvi_layout *layout, tqkvk_row_again again, int scale,
                          uint8_t *magnitude)
{
    const int peak = tqkvk_clamp_scale(scale + again.peak);
    uint8_t lower[TQKV_UNITS_MAX * LANES] = {0};

    if (again.peak == TQKVK_NO_OCTAVES)
        return peak;
    for (uint32_t j = 0; j < layout->n_units * LANES; j++) {
        const uint32_t bits = layout->bits[j / LANES];
        if (bits == 0)
            continue;
        const uint32_t m =
            find_level(bits, (uint64_t)level_of(bits, magnitude[j]) << (scale - peak) / 16);
        if (m == 256)
            return scale;
        lower[j] = (uint8_t)m;
    }
    memcpy(magnitude, lower, layout->n_units * LANES);
    return peak;
}
