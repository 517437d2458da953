/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows in blocks. A row outside a store is in the row format (row_layout.h). In the section of a
 * block the bytes of its 16 rows lie interleaved, so that a vector register finds next to each
 * other what an integer dot product adds up:
 *
 *     K    4 channels of one token, then those of the next token      lanes are tokens
 *     V    4 tokens of one channel, then those of the next channel    lanes are channels
 *
 * Units and their planes follow each other as in a row, each 16 times as large. Only whole bytes
 * move, and each byte belongs to one token, so tokens of a block may be written side by side.
 * docs/FORMAT.md has the pictures.
 *
 * Rows of f16 (TQKVI_BITS_PLAIN) are not interleaved.
 */
#ifndef TQKVI_BLOCK_ROWS_H
#define TQKVI_BLOCK_ROWS_H

#include "format/row_layout.h"

/* No row is longer: f16 in every unit. */
#define TQKVI_ROW_BYTES_MAX (2 * TQKVI_BITS_PLAIN * TQKV_UNITS_MAX)

/* Bits of the first plane of a width; the second plane has the rest. */
static inline uint32_t tqkvi_plane_low(uint32_t bits)
{
    return bits >= 4 ? 4 : bits >= 2 ? 2 : bits;
}

/* Where byte i of a plane of n bytes (2, 4 or 8) of the row in a slot is, in the block's plane. */
static inline uint32_t tqkvi_block_byte(tqkv_side side, uint32_t n, uint32_t slot, uint32_t i)
{
    if (side == TQKV_SIDE_V)
        return slot / 4 * 4 * n + 4 * i + slot % 4;
    return i / 4 * 64 + (n < 4 ? n : 4) * slot + i % 4;
}

/* row: [row_bytes] of any alignment; codes: [16 * row_bytes], what follows the scales. */
void tqkvi_block_put_row(const tqkvi_layout *layout, tqkv_side side, uint8_t *codes, uint32_t slot,
                         const uint8_t *row);
void tqkvi_block_get_row(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                         uint32_t slot, uint8_t *row);

#endif /* TQKVI_BLOCK_ROWS_H */
