/* SPDX-License-Identifier: Apache-2.0 */
/* One code of a unit in the row format. */
#ifndef TQKVK_UNIT_LEVEL_REF_H
#define TQKVK_UNIT_LEVEL_REF_H

#include "format/block_rows.h"
#include "kernels/levels.h"

/* Code of channel d (0..15) in a plane of w bits: byte d % (2 w), from bit d / (2 w) * w. */
static inline uint32_t tqkvk_plane_code(const uint8_t *plane, uint32_t w, uint32_t d)
{
    return (uint32_t)plane[d % (2 * w)] >> (d / (2 * w) * w) & ((1u << w) - 1);
}

/* Level of channel d; 0 in width 0. */
static inline int32_t tqkvk_unit_level(const uint8_t *unit, uint32_t bits, uint32_t d)
{
    if (bits == 0)
        return 0;
    const uint32_t low = tqkvi_plane_low(bits);
    uint32_t code = tqkvk_plane_code(unit, low, d);
    if (bits > low)
        code |= tqkvk_plane_code(unit + 2 * low, bits - low, d) << low;
    return tqkvk_widths[bits].levels[code];
}

#endif /* TQKVK_UNIT_LEVEL_REF_H */
