/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks by dot products of bytes. Lanes are channels. A weight is two halves of 7
 * bits, which fit in signed bytes: 32 instructions multiply a unit of 16 tokens with the weights of
 * a query, where base NEON takes 64. The halves of 16 weights lie where the weights were:
 *
 *     | low 7 bits of tokens 0..15 | high 7 bits of tokens 0..15 |
 *
 * Coarse weights have no high bits, and take half of the instructions.
 */
#include "kernels/arm/unit_dot_dotprod.h"
#include "kernels/arm/weigh_blocks_neon.h"
#include "kernels/tables.h"

_Static_assert(TQKVK_WEIGHT_MAX < 1 << 14, "two halves of 7 bits");

/* Adds to the sums of four channels. vg has their tokens 4g..4g+3. */
TQKVK_INLINE void weigh_four(int8x16_t v0, int8x16_t v1, int8x16_t v2, int8x16_t v3, int8x16_t low,
                             int8x16_t high, int32x4_t *sum)
{
    const int32x4_t upper = tqkvk_dot(vdupq_n_s32(0), v0, v1, v2, v3, high);
    *sum = vmlaq_n_s32(tqkvk_dot(*sum, v0, v1, v2, v3, low), upper, 128);
}

TQKVK_INLINE void weigh_block(const tqkvk_unit *unit, const uint16_t *w, size_t w_stride,
                              size_t n_q, int32x4_t *sums)
{
    const tqkvk_quad q0 = unit->q0, q1 = unit->q1, q2 = unit->q2, q3 = unit->q3;

    for (size_t a = 0; a < n_q; a++, w += w_stride, sums += 4) {
        const int8x16_t low = vreinterpretq_s8_u16(vld1q_u16(w));
        const int8x16_t high = vreinterpretq_s8_u16(vld1q_u16(w + 8));
        weigh_four(q0.v0, q1.v0, q2.v0, q3.v0, low, high, &sums[0]);
        weigh_four(q0.v1, q1.v1, q2.v1, q3.v1, low, high, &sums[1]);
        weigh_four(q0.v2, q1.v2, q2.v2, q3.v2, low, high, &sums[2]);
        weigh_four(q0.v3, q1.v3, q2.v3, q3.v3, low, high, &sums[3]);
    }
}

TQKVK_INLINE void weigh_block_coarse(const tqkvk_unit *unit, const uint16_t *w, size_t w_stride,
                                     size_t n_q, int32x4_t *sums)
{
    const tqkvk_quad q0 = unit->q0, q1 = unit->q1, q2 = unit->q2, q3 = unit->q3;

    for (size_t a = 0; a < n_q; a++, w += w_stride, sums += 4) {
        const int8x16_t low = vreinterpretq_s8_u16(vld1q_u16(w));
        sums[0] = tqkvk_dot(sums[0], q0.v0, q1.v0, q2.v0, q3.v0, low);
        sums[1] = tqkvk_dot(sums[1], q0.v1, q1.v1, q2.v1, q3.v1, low);
        sums[2] = tqkvk_dot(sums[2], q0.v2, q1.v2, q2.v2, q3.v2, low);
        sums[3] = tqkvk_dot(sums[3], q0.v3, q1.v3, q2.v3, q3.v3, low);
    }
}

static void split_weights(const uint16_t *w, size_t n, uint16_t *out)
{
    for (size_t b = 0; b < n; b += TQKVI_BLOCK_TOKENS) {
        const uint16x8_t first = vld1q_u16(w + b), second = vld1q_u16(w + b + 8);
        const uint8x16_t low = vcombine_u8(vmovn_u16(first), vmovn_u16(second));
        const uint8x16_t high = vcombine_u8(vshrn_n_u16(first, 7), vshrn_n_u16(second, 7));
        vst1q_u16(out + b, vreinterpretq_u16_u8(vandq_u8(low, vdupq_n_u8(127))));
        vst1q_u16(out + b + 8, vreinterpretq_u16_u8(high));
    }
}

void tqkvk_weigh_blocks_i8_dotprod(const tqkvi_layout *layout, const uint8_t *const *codes,
                                   size_t n_blocks, uint32_t most, const uint16_t *w,
                                   size_t w_stride, size_t n_q, const float *f, const float *g,
                                   float *o)
{
    _Alignas(TQKV_ALIGN) uint16_t weights[TQKVK_WEIGH_QUERIES][TQKVK_TILE_TOKENS];
    tqkvk_weigh c = {.codes = codes,
                     .n_blocks = n_blocks,
                     .w = weights[0],
                     .w_stride = TQKVK_TILE_TOKENS,
                     .dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS};

    for (size_t a = 0; a < n_q; a += c.n_q) {
        c.n_q = n_q - a < TQKVK_WEIGH_QUERIES ? n_q - a : TQKVK_WEIGH_QUERIES;
        for (size_t i = 0; i < c.n_q; i++)
            split_weights(w + (a + i) * w_stride, n_blocks * TQKVI_BLOCK_TOKENS, weights[i]);
        c.f = f + a;
        c.g = g + a;
        c.o = o + a * c.dim;
        if (most <= TQKVK_COARSE_WEIGHT_MAX)
            tqkvk_weigh_units(weigh_block_coarse, layout, c);
        else
            tqkvk_weigh_units(weigh_block, layout, c);
    }
}
