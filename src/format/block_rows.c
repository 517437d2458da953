/* SPDX-License-Identifier: Apache-2.0 */
/* Rows in and out of blocks. */
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

/* Bytes of a plane that lie together in K: those of a token, up to four. */
#define K_TOGETHER 4u

/* Where the first byte of a row is in a plane of n bytes a row. */
static size_t first_byte(tqkv_side side, uint32_t n, uint32_t slot)
{
    return tqkvi_block_byte(side, n, slot, 0);
}

/* n: 2, 4 or 8, a constant wherever it is called. */
static inline void put_bytes(tqkv_side side, uint32_t n, uint8_t *to, const uint8_t *row)
{
    if (side == TQKV_SIDE_V) {
        for (uint32_t i = 0; i < n; i++)
            to[4 * i] = row[i];
    } else if (n == 2) {
        memcpy(to, row, 2);
    } else {
        for (uint32_t i = 0; i < n; i += K_TOGETHER)
            memcpy(to + (size_t)TQKVI_BLOCK_TOKENS * i, row + i, K_TOGETHER);
    }
}

static inline void get_bytes(tqkv_side side, uint32_t n, const uint8_t *from, uint8_t *row)
{
    if (side == TQKV_SIDE_V) {
        for (uint32_t i = 0; i < n; i++)
            row[i] = from[4 * i];
    } else if (n == 2) {
        memcpy(row, from, 2);
    } else {
        for (uint32_t i = 0; i < n; i += K_TOGETHER)
            memcpy(row + i, from + (size_t)TQKVI_BLOCK_TOKENS * i, K_TOGETHER);
    }
}

static inline void put_plane(tqkv_side side, uint32_t n, uint8_t *plane, uint32_t slot,
                             const uint8_t *row)
{
    uint8_t *to = plane + first_byte(side, n, slot);
    if (n == 8)
        put_bytes(side, 8, to, row);
    else if (n == 4)
        put_bytes(side, 4, to, row);
    else if (n == 2)
        put_bytes(side, 2, to, row);
}

static inline void get_plane(tqkv_side side, uint32_t n, const uint8_t *plane, uint32_t slot,
                             uint8_t *row)
{
    const uint8_t *from = plane + first_byte(side, n, slot);
    if (n == 8)
        get_bytes(side, 8, from, row);
    else if (n == 4)
        get_bytes(side, 4, from, row);
    else if (n == 2)
        get_bytes(side, 2, from, row);
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
            put_plane(side, n[plane], codes, slot, row);
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
            get_plane(side, n[plane], codes, slot, row);
            row += n[plane];
            codes += (size_t)TQKVI_BLOCK_TOKENS * n[plane];
        }
    }
}
