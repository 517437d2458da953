/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "kernels/ref/unit_level_ref.h"
#include "kernels/tables.h"

#define DIM_MAX (TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS)

/* Levels of the row in a slot of a block. */
static void row_levels(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                       uint32_t slot, int32_t *levels)
{
    uint8_t row[TQKVI_ROW_BYTES_MAX];
    const uint8_t *unit = row;

    tqkvi_block_get_row(layout, side, codes, slot, row);
    for (uint32_t u = 0; u < layout->n_units; u++) {
        for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++)
            *levels++ = tqkvk_unit_level(unit, layout->bits[u], d);
        unit += 2 * layout->bits[u];
    }
}

static float largest(const float *y)
{
    float top = 0.0f;

    for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++) {
        if (!isfinite(y[d]))
            return NAN;
        top = fabsf(y[d]) > top ? fabsf(y[d]) : top;
    }
    return top;
}

static void round_unit(const float *y, tqkvk_query_unit *out, tqkvk_query_unit *low)
{
    const float top = largest(y);
    const float inverse = top >= TQKVK_TINY ? TQKVK_Q_MAX / top : 0.0f;

    out->factor = inverse == 0.0f && !isnan(top) ? 0.0f : top / TQKVK_Q_MAX;
    out->start = 0;
    for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++) {
        out->q[d] = (int8_t)(inverse == 0.0f ? 0.0f : rintf(y[d] * inverse));
        out->start -= 128 * out->q[d];
    }
    if (!low)
        return;
    low->factor = out->factor / TQKVK_LOW_PARTS;
    low->start = 0;
    for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++) {
        const float rest = inverse == 0.0f ? 0.0f : y[d] * inverse - (float)out->q[d];
        low->q[d] = (int8_t)rintf(rest * TQKVK_LOW_PARTS);
        low->start -= 128 * low->q[d];
    }
}

void tqkvk_round_query_i8_ref(const float *y, size_t n_units, tqkvk_query_unit *out,
                              tqkvk_query_unit *low)
{
    for (size_t u = 0; u < n_units; u++)
        round_unit(y + u * TQKV_UNIT_CHANNELS, out + u, low ? low + u : NULL);
}

void tqkvk_score_blocks_i8_ref(const tqkvi_layout *layout, const uint8_t *const *codes,
                               size_t n_blocks, const tqkvk_query_unit *q, size_t n_q, float *s,
                               size_t s_stride)
{
    int32_t levels[DIM_MAX];

    for (size_t b = 0; b < n_blocks * TQKVI_BLOCK_TOKENS; b++) {
        row_levels(layout, TQKV_SIDE_K, codes[b / TQKVI_BLOCK_TOKENS], b % TQKVI_BLOCK_TOKENS,
                   levels);
        for (size_t a = 0; a < n_q; a++) {
            const tqkvk_query_unit *unit = q + a * layout->n_units;
            for (uint32_t u = 0; u < layout->n_units; u++, unit++) {
                int32_t sum = 0;
                for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++)
                    sum += unit->q[d] * levels[u * TQKV_UNIT_CHANNELS + d];
                if (layout->bits[u] != 0)
                    s[a * s_stride + b] +=
                        unit->factor * tqkvk_widths[layout->bits[u]].step * (float)sum;
            }
        }
    }
}

float tqkvk_round_weights_i16_ref(const float *p, const float *scale, size_t n, uint32_t most,
                                  uint16_t *w, float *kept)
{
    float top = 0.0f, sum = 0.0f;

    for (size_t b = 0; b < n; b++) {
        const float v = p[b] * scale[b];
        top = v > top ? v : top;
        sum += scale[b] == 0.0f ? 0.0f : p[b];
    }
    *kept = sum;
    const float inverse = top >= TQKVK_TINY ? (float)most / top : 0.0f;
    for (size_t b = 0; b < n; b++) {
        const float x = rintf(p[b] * scale[b] * inverse);
        w[b] = x > 0.0f ? (uint16_t)x : 0; /* a NaN is 0 */
    }
    return top / (float)most;
}

void tqkvk_weigh_blocks_i8_ref(const tqkvi_layout *layout, const uint8_t *const *codes,
                               size_t n_blocks, uint32_t most, const uint16_t *w, size_t w_stride,
                               size_t n_q, const float *f, const float *g, float *o)
{
    (void)most;
    const size_t n = n_blocks * TQKVI_BLOCK_TOKENS;
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;
    int32_t levels[DIM_MAX], sums[DIM_MAX];

    for (size_t a = 0; a < n_q; a++) {
        memset(sums, 0, sizeof(sums));
        for (size_t b = 0; b < n; b++) {
            row_levels(layout, TQKV_SIDE_V, codes[b / TQKVI_BLOCK_TOKENS], b % TQKVI_BLOCK_TOKENS,
                       levels);
            for (size_t i = 0; i < dim; i++)
                sums[i] += w[a * w_stride + b] * levels[i];
        }
        for (size_t i = 0; i < dim; i++) {
            const float step = tqkvk_widths[layout->bits[i / TQKV_UNIT_CHANNELS]].step;
            o[a * dim + i] = o[a * dim + i] * f[a] + g[a] * step * (float)sums[i];
        }
    }
}
