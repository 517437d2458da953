/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the codes of one token and one KV head lie in memory. docs/FORMAT.md says the same with
 * pictures; the format is version 0 and may change until the CPU and CUDA kernels have settled.
 *
 * A row is its units of 16 channels one after another. A unit of `bits` width takes 2 * bits bytes,
 * split into planes, lowest bits of the code first:
 *
 *     width   1    2    3      4    5      6      8          0: no bytes
 *     planes  1    2    2,1    4    4,1    4,2    4,4        16: sixteen f16, little-endian
 *
 * A plane of w bits takes 2 * w bytes. Byte i of it holds 8 / w codes; the codes of channels
 * i, i + 2w, i + 4w, ... from its lowest bits up (w = 4: byte i has channels i and i + 8).
 */
#ifndef TQKVI_ROW_LAYOUT_H
#define TQKVI_ROW_LAYOUT_H

#include "turboquant/plan.h"

#define TQKVI_BLOCK_TOKENS 16
#define TQKVI_BITS_PLAIN 16 /* f16, no transform, no scale search */

/* Widths of the units of one head. */
typedef struct tqkvi_layout {
    uint32_t n_units;
    uint32_t row_bytes;
    uint8_t bits[TQKV_UNITS_MAX];
} tqkvi_layout;

/*
 * Sets row_bytes from n_units and bits.
 * Errors: TQKV_ERR_CORRUPT (a width that does not exist, or a mix of 16 with others).
 */
TQKV_NODISCARD tqkv_status tqkvi_layout_init(tqkvi_layout *layout, const uint8_t *bits,
                                             uint32_t n_units);

/*
 * A block holds 16 tokens of one layer: for each KV head its K section, then its V section.
 * A section: 16 scales, one byte a token, then 16 rows, interleaved as block_rows.h says. Sections
 * are multiples of 16 bytes.
 */
typedef struct tqkvi_block_layout {
    uint32_t n_kv_heads;
    uint32_t block_bytes;
    uint32_t *section[2]; /* [n_kv_heads] offset of the section in the block, by tqkv_side */
} tqkvi_block_layout;

#endif /* TQKVI_ROW_LAYOUT_H */
