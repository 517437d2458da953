/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/ref/unit_level_ref.h"
#include "kernels/tables.h"

void tqkvk_unpack_rows_f32_ref(const tqkvi_layout *layout, const uint8_t *codes, size_t n_rows,
                               float *out)
{
    for (size_t r = 0; r < n_rows; r++) {
        for (uint32_t u = 0; u < layout->n_units; u++) {
            const uint32_t bits = layout->bits[u];
            const tqkvk_width *width = &tqkvk_widths[bits];
            for (uint32_t d = 0; d < TQKV_UNIT_CHANNELS; d++) {
                *out++ = (float)tqkvk_unit_level(codes, bits, d) * width->step;
            }
            codes += 2 * bits;
        }
    }
}
