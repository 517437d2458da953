/* SPDX-License-Identifier: Apache-2.0 */
/* Sizes of rows; see row_layout.h. */
#include "format/row_layout.h"

#include <stdbool.h>
#include <string.h>

static bool width_exists(uint8_t bits)
{
    return bits <= 6 || bits == 8 || bits == TQKVI_BITS_PLAIN;
}

tqkv_status tqkvi_layout_init(tqkvi_layout *layout, const uint8_t *bits, uint32_t n_units)
{
    *layout = (tqkvi_layout){.n_units = 0};
    if (n_units == 0 || n_units > TQKV_UNITS_MAX)
        return TQKV_ERR_CORRUPT;
    const bool plain = bits[0] == TQKVI_BITS_PLAIN;
    uint32_t row_bytes = 0;
    for (uint32_t i = 0; i < n_units; i++) {
        if (!width_exists(bits[i]) || (bits[i] == TQKVI_BITS_PLAIN) != plain)
            return TQKV_ERR_CORRUPT;
        row_bytes += 2u * bits[i];
    }
    memcpy(layout->bits, bits, n_units);
    layout->n_units = n_units;
    layout->row_bytes = row_bytes;
    return TQKV_OK;
}
