/* SPDX-License-Identifier: Apache-2.0 */
/* What goes into the integer products of a tile: queries to bytes, weights to 7 or 14 bits. */
#include <arm_neon.h>
#include <math.h>

#include "kernels/arm/block_neon.h"
#include "kernels/tables.h"

/* The largest |y| of a unit; NaN where one is not finite. */
static inline float largest(tqkvk_four y)
{
    const float32x4_t lo = vmaxq_f32(vabsq_f32(y.v0), vabsq_f32(y.v1));
    const float32x4_t hi = vmaxq_f32(vabsq_f32(y.v2), vabsq_f32(y.v3));
    const float top = vmaxvq_f32(vmaxq_f32(lo, hi)); /* these instructions keep a NaN */
    return isfinite(top) ? top : NAN;
}

/* Ties to even. */
static inline int8x16_t to_bytes(tqkvk_four x)
{
    const int16x8_t lo =
        vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.v0)), vmovn_s32(vcvtnq_s32_f32(x.v1)));
    const int16x8_t hi =
        vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.v2)), vmovn_s32(vcvtnq_s32_f32(x.v3)));
    return vcombine_s8(vmovn_s16(lo), vmovn_s16(hi));
}

static inline void store_query(tqkvk_query_unit *to, int8x16_t q, float factor)
{
    vst1q_s8(to->q, q);
    to->start = -128 * vaddlvq_s8(q);
    to->factor = factor;
}

static inline float32x4_t rest(float32x4_t x)
{
    return vmulq_n_f32(vsubq_f32(x, vrndnq_f32(x)), TQKVK_LOW_PARTS);
}

static inline void round_unit(const float *y, tqkvk_query_unit *out, tqkvk_query_unit *low)
{
    const tqkvk_four unit = tqkvk_four_load(y, 4);
    const float top = largest(unit);
    if (!(top >= TQKVK_TINY)) {
        *out = (tqkvk_query_unit){.factor = isnan(top) ? top : 0.0f};
        if (low)
            *low = *out;
        return;
    }
    const float factor = top / TQKVK_Q_MAX;
    const tqkvk_four x = tqkvk_four_mul(unit, TQKVK_Q_MAX / top);
    store_query(out, to_bytes(x), factor);
    if (low) {
        const tqkvk_four left = {rest(x.v0), rest(x.v1), rest(x.v2), rest(x.v3)};
        store_query(low, to_bytes(left), factor / TQKVK_LOW_PARTS);
    }
}

void tqkvk_round_query_i8_neon(const float *y, size_t n_units, tqkvk_query_unit *out,
                               tqkvk_query_unit *low)
{
    for (size_t u = 0; u < n_units; u++)
        round_unit(y + u * TQKV_UNIT_CHANNELS, out + u, low ? low + u : NULL);
}

/* The largest p * scale; a NaN does not count. */
static inline float measure(const float *p, const float *scale, size_t n, float *kept)
{
    float32x4_t top = vdupq_n_f32(0.0f), sum = vdupq_n_f32(0.0f);

    for (size_t b = 0; b < n; b += 4) {
        const float32x4_t size = vld1q_f32(scale + b), one = vld1q_f32(p + b);
        const uint32x4_t some = vbicq_u32(vreinterpretq_u32_f32(one), vceqzq_f32(size));
        top = vmaxnmq_f32(top, vmulq_f32(one, size));
        sum = vaddq_f32(sum, vreinterpretq_f32_u32(some));
    }
    *kept = vaddvq_f32(sum);
    return vmaxvq_f32(top);
}

/* A NaN becomes 0. */
static inline uint16x4_t round_four(const float *p, const float *scale, float inverse)
{
    const float32x4_t v = vmulq_f32(vld1q_f32(p), vld1q_f32(scale));
    return vmovn_u32(vcvtnq_u32_f32(vmulq_n_f32(v, inverse)));
}

float tqkvk_round_weights_i16_neon(const float *p, const float *scale, size_t n, uint32_t most,
                                   uint16_t *w, float *kept)
{
    const float top = measure(p, scale, n, kept);
    const float inverse = top >= TQKVK_TINY ? (float)most / top : 0.0f;

    for (size_t b = 0; b < n; b += 4)
        vst1_u16(w + b, round_four(p + b, scale + b, inverse));
    return top / (float)most;
}
