/* SPDX-License-Identifier: Apache-2.0 */
#include <arm_neon.h>

#include "kernels/tables.h"

static inline uint32x4_t bits_of(const float *x)
{
    return vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x)));
}

uint32_t tqkvk_largest_bits_neon(const float *x, size_t n)
{
    uint32x4_t a = vdupq_n_u32(0), b = a;
    for (size_t i = 0; i < n; i += 16) {
        a = vmaxq_u32(a, vmaxq_u32(bits_of(x + i), bits_of(x + i + 4)));
        b = vmaxq_u32(b, vmaxq_u32(bits_of(x + i + 8), bits_of(x + i + 12)));
    }
    return vmaxvq_u32(vmaxq_u32(a, b));
}
