/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks by products of 16 bits. Tokens are taken apart, so that lanes are
 * channels and a lane of the weights serves a whole register. Eight channels of 16 tokens, widened,
 * are sixteen registers.
 */
#include "kernels/arm/weigh_blocks_neon.h"
#include "kernels/tables.h"

typedef struct tokens {
    int16x8_t t0, t1, t2, t3;
} tokens;

typedef struct eight_sums {
    int32x4_t lo, hi;
} eight_sums;

TQKVK_INLINE tokens low_half(tqkvk_quad q)
{
    return (tokens){vmovl_s8(vget_low_s8(q.v0)), vmovl_s8(vget_low_s8(q.v1)),
                    vmovl_s8(vget_low_s8(q.v2)), vmovl_s8(vget_low_s8(q.v3))};
}

TQKVK_INLINE tokens high_half(tqkvk_quad q)
{
    return (tokens){vmovl_high_s8(q.v0), vmovl_high_s8(q.v1), vmovl_high_s8(q.v2),
                    vmovl_high_s8(q.v3)};
}

/* w: four weights, below 2^14, so they are positive as signed ones too. */
TQKVK_INLINE eight_sums add_four(eight_sums sum, tokens x, const uint16_t *w)
{
    const int16x4_t four = vreinterpret_s16_u16(vld1_u16(w));
    sum.lo = vmlal_lane_s16(sum.lo, vget_low_s16(x.t0), four, 0);
    sum.hi = vmlal_high_lane_s16(sum.hi, x.t0, four, 0);
    sum.lo = vmlal_lane_s16(sum.lo, vget_low_s16(x.t1), four, 1);
    sum.hi = vmlal_high_lane_s16(sum.hi, x.t1, four, 1);
    sum.lo = vmlal_lane_s16(sum.lo, vget_low_s16(x.t2), four, 2);
    sum.hi = vmlal_high_lane_s16(sum.hi, x.t2, four, 2);
    sum.lo = vmlal_lane_s16(sum.lo, vget_low_s16(x.t3), four, 3);
    sum.hi = vmlal_high_lane_s16(sum.hi, x.t3, four, 3);
    return sum;
}

/* sums: of these eight channels of the first query, four apart. */
TQKVK_INLINE void weigh_half(tokens x0, tokens x1, tokens x2, tokens x3, const uint16_t *w,
                             size_t w_stride, size_t n_q, int32x4_t *sums)
{
    for (size_t a = 0; a < n_q; a++, w += w_stride, sums += 4) {
        eight_sums sum = {sums[0], sums[1]};
        sum = add_four(sum, x0, w);
        sum = add_four(sum, x1, w + 4);
        sum = add_four(sum, x2, w + 8);
        sum = add_four(sum, x3, w + 12);
        sums[0] = sum.lo;
        sums[1] = sum.hi;
    }
}

TQKVK_INLINE void weigh_block(const tqkvk_unit *unit, const uint16_t *w, size_t w_stride,
                              size_t n_q, int32x4_t *sums)
{
    const tqkvk_quad q0 = tqkvk_v_tokens(unit->q0), q1 = tqkvk_v_tokens(unit->q1);
    const tqkvk_quad q2 = tqkvk_v_tokens(unit->q2), q3 = tqkvk_v_tokens(unit->q3);
    weigh_half(low_half(q0), low_half(q1), low_half(q2), low_half(q3), w, w_stride, n_q, sums);
    weigh_half(high_half(q0), high_half(q1), high_half(q2), high_half(q3), w, w_stride, n_q,
               sums + 2);
}

void tqkvk_weigh_blocks_i8_neon(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, uint32_t most, const uint16_t *w, size_t w_stride,
                                size_t n_q, const float *f, const float *g, float *o)
{
    (void)most; /* words, whatever they hold */
    tqkvk_weigh c = {.codes = codes,
                     .n_blocks = n_blocks,
                     .w_stride = w_stride,
                     .dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS};

    for (size_t a = 0; a < n_q; a += c.n_q) {
        c.n_q = n_q - a < TQKVK_WEIGH_QUERIES ? n_q - a : TQKVK_WEIGH_QUERIES;
        c.w = w + a * w_stride;
        c.f = f + a;
        c.g = g + a;
        c.o = o + a * c.dim;
        tqkvk_weigh_units(weigh_block, layout, c);
    }
}
