/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Half conversions, four at a time; the last values go through ref. Arrays may lie anywhere, so
 * they are read and written as bytes.
 */
#include <arm_neon.h>

#include "kernels/tables.h"

void tqkvk_half_to_float_neon(const void *x, float *out, size_t n)
{
    const uint8_t *from = x;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const float16x4_t half = vreinterpret_f16_u8(vld1_u8(from + 2 * i));
        vst1q_u8((uint8_t *)(out + i), vreinterpretq_u8_f32(vcvt_f32_f16(half)));
    }
    tqkvk_half_to_float_ref(from + 2 * i, out + i, n - i);
}

void tqkvk_float_to_half_neon(const float *x, void *out, size_t n)
{
    uint8_t *to = out;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const float32x4_t value = vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)(x + i)));
        vst1_u8(to + 2 * i, vreinterpret_u8_f16(vcvt_f16_f32(value)));
    }
    tqkvk_float_to_half_ref(x + i, to + 2 * i, n - i);
}
