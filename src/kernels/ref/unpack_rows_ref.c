/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/levels.h"
#include "kernels/tables.h"

/* Code of channel d (0..15) in a plane of w bits: byte d % (2 w), from bit d / (2 w) * w. */
static uint32_t plane_code(const uint8_t *plane, uint32_t w, uint32_t d)
{
    return (uint32_t)plane[d % (2 * w)] >> (d / (2 * w) * w) & ((1u << w) - 1);
}

/* Widths 1, 2 and 4 are one plane; 3, 5, 6 and 8 have a second one with their highest bits. */
static uint32_t unit_code(const uint8_t *unit, uint32_t bits, uint32_t d)
{
    const uint32_t low = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
    uint32_t code = plane_code(unit, low, d);
    if (bits > low)
        code |= plane_code(unit + 2 * low, bits - low, d) << low;
    return code;
}

void tqkvk_unpack_rows_f32_ref(const tqkvi_layout *layout, const uint8_t *codes, size_t n_rows,
                               float *out)
{
    for (size_t r = 0; r < n_rows; r++) {
        for (uint32_t u = 0; u < layout->n_units; u++) {
            const uint32_t bits = layout->bits[u];
            const tqkvk_width *width = &tqkvk_widths[bits];
            for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++) {
                *out++ = bits == 0 ? 0.0f
                                   : (float)width->levels[unit_code(codes, bits, d)] * width->step;
            }
            codes += 2 * bits;
        }
    }
}
