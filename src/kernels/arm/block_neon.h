/* SPDX-License-Identifier: Apache-2.0 */
/* Four vectors at a time, by name: compilers keep those in registers at -O2 as well. */
#ifndef TQKVK_BLOCK_NEON_H
#define TQKVK_BLOCK_NEON_H

#include <arm_neon.h>
#include <stddef.h>

typedef struct tqkvk_four {
    float32x4_t v0, v1, v2, v3;
} tqkvk_four;

static inline tqkvk_four tqkvk_four_zero(void)
{
    const float32x4_t zero = vdupq_n_f32(0.0f);
    return (tqkvk_four){zero, zero, zero, zero};
}

/* Vectors `step` floats apart. */
static inline tqkvk_four tqkvk_four_load(const float *x, size_t step)
{
    return (tqkvk_four){vld1q_f32(x), vld1q_f32(x + step), vld1q_f32(x + 2 * step),
                        vld1q_f32(x + 3 * step)};
}

static inline void tqkvk_four_store(float *x, tqkvk_four a)
{
    vst1q_f32(x, a.v0);
    vst1q_f32(x + 4, a.v1);
    vst1q_f32(x + 8, a.v2);
    vst1q_f32(x + 12, a.v3);
}

static inline tqkvk_four tqkvk_four_mul(tqkvk_four a, float b)
{
    return (tqkvk_four){vmulq_n_f32(a.v0, b), vmulq_n_f32(a.v1, b), vmulq_n_f32(a.v2, b),
                        vmulq_n_f32(a.v3, b)};
}

/* sum + a * b, fused; one b for all, or one for each lane. */
static inline tqkvk_four tqkvk_four_fma_n(tqkvk_four sum, tqkvk_four a, float b)
{
    return (tqkvk_four){vfmaq_n_f32(sum.v0, a.v0, b), vfmaq_n_f32(sum.v1, a.v1, b),
                        vfmaq_n_f32(sum.v2, a.v2, b), vfmaq_n_f32(sum.v3, a.v3, b)};
}

static inline tqkvk_four tqkvk_four_fma(tqkvk_four sum, tqkvk_four a, float32x4_t b)
{
    return (tqkvk_four){vfmaq_f32(sum.v0, a.v0, b), vfmaq_f32(sum.v1, a.v1, b),
                        vfmaq_f32(sum.v2, a.v2, b), vfmaq_f32(sum.v3, a.v3, b)};
}

/* The sum over the lanes of each vector. */
static inline float32x4_t tqkvk_four_sums(tqkvk_four a)
{
    return vpaddq_f32(vpaddq_f32(a.v0, a.v1), vpaddq_f32(a.v2, a.v3));
}

#endif /* TQKVK_BLOCK_NEON_H */
