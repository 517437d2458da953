/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes and levels, sixteen to a register, one byte each. Rows and blocks lay out their planes
 * differently, but put a code together and look its level up in the same way.
 *
 * A width is a constant wherever these functions are used. They must be inlined, also at -O2, so
 * that every shift and every look-up knows it.
 */
#ifndef TQKVK_LEVELS_NEON_H
#define TQKVK_LEVELS_NEON_H

#include <arm_neon.h>

#include "format/block_rows.h"
#include "kernels/by_width.h"
#include "kernels/levels.h"

/*
 * Bits to keep of the codes in a first plane. Where a second plane will be laid over what is not
 * the first one's own, all 8: that needs no mask.
 */
TQKVK_INLINE int tqkvk_keep(int bits)
{
    const int low = (int)tqkvi_plane_low((uint32_t)bits);
    return bits == low ? low : 8;
}

/* The bits from bit `from` of each byte, moved to bit 0; those from bit `keep` up are cleared. */
TQKVK_INLINE uint8x16_t tqkvk_field(uint8x16_t v, int from, int keep)
{
    v = v >> vdupq_n_u8((uint8_t)from); /* the intrinsic takes literals only */
    return from + keep >= 8 ? v : vandq_u8(v, vdupq_n_u8((uint8_t)((1 << keep) - 1)));
}

/* Codes of a width from both of its planes. Of `low` only its own bits count. */
TQKVK_INLINE uint8x16_t tqkvk_join(int bits, uint8x16_t low, uint8x16_t top)
{
    return bits == 3 ? vsliq_n_u8(low, top, 2) : vsliq_n_u8(low, top, 4);
}

/* The levels of a width of up to 6 bits, in the form of its look-up. */
typedef struct tqkvk_levels_of {
    int8x16_t up_to_4;
    int8x16x2_t of_5;
    int8x16x4_t of_6;
} tqkvk_levels_of;

TQKVK_INLINE tqkvk_levels_of tqkvk_levels_load(int bits)
{
    const int8_t *levels = tqkvk_widths[bits].levels;
    return (tqkvk_levels_of){vld1q_s8(levels), vld1q_s8_x2(levels), vld1q_s8_x4(levels)};
}

/* 8 bits: level = code - 128, -127 for code 0. */
TQKVK_INLINE int8x16_t tqkvk_to_levels(int bits, uint8x16_t code, const tqkvk_levels_of *of)
{
    if (bits == 8) {
        const uint8x16_t above = vmaxq_u8(code, vdupq_n_u8(1));
        return vreinterpretq_s8_u8(veorq_u8(above, vdupq_n_u8(128)));
    }
    if (bits == 6)
        return vqtbl4q_s8(of->of_6, code);
    if (bits == 5)
        return vqtbl2q_s8(of->of_5, code);
    return vqtbl1q_s8(of->up_to_4, code);
}

/* A unit of a row: out[d] = level[d] * step. */
TQKVK_INLINE void tqkvk_store_unit(int8x16_t level, float step, float *out)
{
    const int16x8_t lo = vmovl_s8(vget_low_s8(level)), hi = vmovl_high_s8(level);
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), step));
    vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(lo)), step));
    vst1q_f32(out + 8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))), step));
    vst1q_f32(out + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(hi)), step));
}

#endif /* TQKVK_LEVELS_NEON_H */
