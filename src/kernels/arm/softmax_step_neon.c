/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scales of scores and weights, and one step of the online softmax between them. exp(x) is 2^n * e^r
 * with n = round(x / ln 2) and e^r by a polynomial on |r| <= ln 2 / 2 (coefficients of Cephes' expf;
 * error below 2 ulp).
 */
#include <arm_neon.h>
#include <math.h>

#include "kernels/tables.h"

#define EXP_MIN (-87.33654f) /* e^x is below 2^-126 under it */

/* x where the mask is clear, 0 where it is set. */
static inline float32x4_t clear(float32x4_t x, uint32x4_t mask)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), mask));
}

void tqkvk_scale_scores_f32_neon(float *s, const float *scale, size_t n, float q_mean)
{
    const float32x4_t mean = vdupq_n_f32(q_mean);

    for (size_t b = 0; b < n; b += 4) {
        const float32x4_t size = vld1q_f32(scale + b);
        const float32x4_t score = vfmaq_f32(mean, vld1q_f32(s + b), size);
        vst1q_f32(s + b, clear(score, vceqzq_f32(size)));
    }
}

float tqkvk_scale_weights_f32_neon(float *p, const float *scale, size_t n)
{
    float32x4_t sum = vdupq_n_f32(0.0f);

    for (size_t b = 0; b < n; b += 4) {
        const float32x4_t size = vld1q_f32(scale + b), weight = vld1q_f32(p + b);
        sum = vaddq_f32(sum, clear(weight, vceqzq_f32(size)));
        vst1q_f32(p + b, vmulq_f32(weight, size));
    }
    return vaddvq_f32(sum);
}

/* x <= 0. Below EXP_MIN, and for -inf, 0. */
static inline float32x4_t exp_not_positive(float32x4_t x)
{
    const uint32x4_t too_small = vcltq_f32(x, vdupq_n_f32(EXP_MIN));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 0x1.715476p+0f));
    /* ln 2 in two parts: n times the first one is exact. */
    float32x4_t r = vfmsq_n_f32(x, n, 0.693359375f);
    r = vfmsq_n_f32(r, n, -2.12194440e-4f);

    float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
    p = vfmaq_f32(vdupq_n_f32(1.3981999507e-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(8.3334519073e-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(4.1665795894e-2f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.6666665459e-1f), p, r);
    p = vfmaq_f32(vdupq_n_f32(5.0000001201e-1f), p, r);
    p = vfmaq_f32(r, p, vmulq_f32(r, r));
    p = vaddq_f32(p, vdupq_n_f32(1.0f));

    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    const int32x4_t power = vaddq_s32(vreinterpretq_s32_f32(p), exponent);
    return clear(vreinterpretq_f32_s32(power), too_small);
}

float tqkvk_softmax_step_f32_neon(float *s, size_t n, float *m, float *l)
{
    float32x4_t top = vdupq_n_f32(*m);
    for (size_t b = 0; b < n; b += 4)
        top = vmaxq_f32(top, vld1q_f32(s + b));
    const float m_new = vmaxvq_f32(top);
    if (m_new == -INFINITY) {
        for (size_t b = 0; b < n; b += 4)
            vst1q_f32(s + b, vdupq_n_f32(0.0f));
        return 1.0f;
    }

    const float32x4_t shift = vdupq_n_f32(m_new);
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (size_t b = 0; b < n; b += 4) {
        const float32x4_t e = exp_not_positive(vsubq_f32(vld1q_f32(s + b), shift));
        vst1q_f32(s + b, e);
        sum = vaddq_f32(sum, e);
    }
    const float factor = vgetq_lane_f32(exp_not_positive(vdupq_n_f32(*m - m_new)), 0);
    *m = m_new;
    *l = *l * factor + vaddvq_f32(sum);
    return factor;
}
