/* SPDX-License-Identifier: Apache-2.0 */
#include "format/block_rows.h"
#include "kernels/tables.h"

void tqkvk_unpack_block_f32_ref(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                                float *out)
{
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;
    uint8_t row[TQKVI_ROW_BYTES_MAX];

    for (uint32_t slot = 0; slot < TQKVI_BLOCK_TOKENS; slot++) {
        tqkvi_block_get_row(layout, side, codes, slot, row);
        tqkvk_unpack_rows_f32_ref(layout, row, 1, out + slot * dim);
    }
}
