/* SPDX-License-Identifier: Apache-2.0 */
/* Rows in and out of blocks, byte by byte: beside encoding a row this is nothing. */
#include "format/block_rows.h"

#include <stdbool.h>
#include <string.h>

static bool is_plain(const tqkvi_layout *layout)
{
    return layout->bits[0] == TQKVI_BITS_PLAIN;
}

/* Bytes that a row has in the planes of a unit. */
static void plane_bytes(uint32_t bits, uint32_t n[2])
{
    n[0] = 2 * tqkvi_plane_low(bits);
    n[1] = 2 * bits - n[0];
}

void tqkvi_block_put_row(const tqkvi_layout *layout, tqkv_side side, uint8_t *codes, uint32_t slot,
                         const uint8_t *row)
{
    if (is_plain(layout)) {
        memcpy(codes + (size_t)slot * layout->row_bytes, row, layout->row_bytes);
        return;
    }
    for (uint32_t u = 0; u < layout->n_units; u++) {
        uint32_t n[2];
        plane_bytes(layout->bits[u], n);
        for (int plane = 0; plane < 2; plane++) {
            for (uint32_t i = 0; i < n[plane]; i++)
                codes[tqkvi_block_byte(side, n[plane], slot, i)] = row[i];
            row += n[plane];
            codes += (size_t)TQKVI_BLOCK_TOKENS * n[plane];
        }
    }
}

void tqkvi_block_get_row(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                         uint32_t slot, uint8_t *row)
{
    if (is_plain(layout)) {
        memcpy(row, codes + (size_t)slot * layout->row_bytes, layout->row_bytes);
        return;
    }
    for (uint32_t u = 0; u < layout->n_units; u++) {
        uint32_t n[2];
        plane_bytes(layout->bits[u], n);
        for (int plane = 0; plane < 2; plane++) {
            for (uint32_t i = 0; i < n[plane]; i++)
                row[i] = codes[tqkvi_block_byte(side, n[plane], slot, i)];
            row += n[plane];
            codes += (size_t)TQKVI_BLOCK_TOKENS * n[plane];
        }
    }
}
