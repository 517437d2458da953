/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scale bytes to values, sixteen at a time. Sixteen steps double a value: bits 0..3 of a byte
 * choose one of sixteen values, byte by byte of the float, bits 4..7 are added to its exponent.
 */
#include <arm_neon.h>

#include "kernels/levels.h"
#include "kernels/tables.h"

#define OCTAVE 16 /* the first byte of the sixteen values */

/* value: where bits 4..7 of the code are 1. */
static inline void store_four(uint32x4_t value, uint32x4_t code, float *out)
{
    const uint32x4_t octaves = vandq_u32(code, vdupq_n_u32(0xf0));
    const uint32x4_t more = vshlq_n_u32(vsubq_u32(octaves, vdupq_n_u32(OCTAVE)), 19);
    const uint32x4_t none = vceqzq_u32(code);
    vst1q_f32(out, vreinterpretq_f32_u32(vbicq_u32(vaddq_u32(value, more), none)));
}

void tqkvk_scale_values_neon(const uint8_t *scales, size_t n, float *out)
{
    /* plane.val[i] has byte i of each of the sixteen values. */
    const uint8x16x4_t plane = vld4q_u8((const uint8_t *)(tqkvk_scale_values + OCTAVE));

    for (size_t i = 0; i < n; i += 16) {
        const uint8x16_t code = vld1q_u8(scales + i), place = vandq_u8(code, vdupq_n_u8(15));
        const uint8x16x2_t lower = vzipq_u8(vqtbl1q_u8(plane.val[0], place),
                                            vqtbl1q_u8(plane.val[1], place));
        const uint8x16x2_t upper = vzipq_u8(vqtbl1q_u8(plane.val[2], place),
                                            vqtbl1q_u8(plane.val[3], place));
        const uint16x8x2_t first = vzipq_u16(vreinterpretq_u16_u8(lower.val[0]),
                                             vreinterpretq_u16_u8(upper.val[0]));
        const uint16x8x2_t second = vzipq_u16(vreinterpretq_u16_u8(lower.val[1]),
                                              vreinterpretq_u16_u8(upper.val[1]));
        const uint16x8_t low = vmovl_u8(vget_low_u8(code)), high = vmovl_high_u8(code);
        store_four(vreinterpretq_u32_u16(first.val[0]), vmovl_u16(vget_low_u16(low)), out + i);
        store_four(vreinterpretq_u32_u16(first.val[1]), vmovl_high_u16(low), out + i + 4);
        store_four(vreinterpretq_u32_u16(second.val[0]), vmovl_u16(vget_low_u16(high)),
                   out + i + 8);
        store_four(vreinterpretq_u32_u16(second.val[1]), vmovl_high_u16(high), out + i + 12);
    }
}
