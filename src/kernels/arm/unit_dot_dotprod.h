/* SPDX-License-Identifier: Apache-2.0 */
/* The dot product of ARMv8.2: each 32-bit lane takes four products of bytes. */
#ifndef TQKVK_UNIT_DOT_DOTPROD_H
#define TQKVK_UNIT_DOT_DOTPROD_H

#include "kernels/arm/levels_neon.h"

/* sum + vg times word g of x, g = 0..3. */
TQKVK_INLINE int32x4_t tqkvk_dot(int32x4_t sum, int8x16_t v0, int8x16_t v1, int8x16_t v2,
                                 int8x16_t v3, int8x16_t x)
{
    sum = vdotq_laneq_s32(sum, v0, x, 0);
    sum = vdotq_laneq_s32(sum, v1, x, 1);
    sum = vdotq_laneq_s32(sum, v2, x, 2);
    return vdotq_laneq_s32(sum, v3, x, 3);
}

#endif /* TQKVK_UNIT_DOT_DOTPROD_H */
