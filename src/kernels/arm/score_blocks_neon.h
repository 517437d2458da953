/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of blocks, but for the product itself. Lanes are tokens. A unit of a block is unpacked
 * once, into sixteen registers, and every query goes over it.
 *
 * Levels and queries are both signed here, so `start` of a query has nothing to take off.
 */
#ifndef TQKVK_SCORE_BLOCKS_NEON_H
#define TQKVK_SCORE_BLOCKS_NEON_H

#include "kernels/arm/block_codes_neon.h"
#include "kernels/block_units.h"

/*
 * The scores of four tokens: vg has their channels 4g..4g+3, 4 bytes a token, and q the 16 channels
 * of a query. A constant wherever it is passed.
 */
typedef int32x4_t tqkvk_score_four_fn(int8x16_t v0, int8x16_t v1, int8x16_t v2, int8x16_t v3,
                                      int8x16_t q);

TQKVK_INLINE void tqkvk_add_scores(float *s, int32x4_t sum, float factor)
{
    vst1q_f32(s, vfmaq_n_f32(vld1q_f32(s), vcvtq_f32_s32(sum), factor));
}

TQKVK_INLINE void tqkvk_score_unit(int bits, tqkvk_score_four_fn *four, const tqkvk_score *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits);
    const float step = tqkvk_widths[bits].step;

    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit u = tqkvk_levels_unit(TQKV_SIDE_K, bits, c->codes[p] + c->at, &of);
        const tqkvk_query_unit *query = c->q;
        float *s = c->s + p * TQKVI_BLOCK_TOKENS;
        for (size_t a = 0; a < c->n_q; a++, query += c->n_units, s += c->s_stride) {
            const int8x16_t q = vld1q_s8(query->q);
            const float factor = query->factor * step;
            tqkvk_add_scores(s, four(u.q0.v0, u.q1.v0, u.q2.v0, u.q3.v0, q), factor);
            tqkvk_add_scores(s + 4, four(u.q0.v1, u.q1.v1, u.q2.v1, u.q3.v1, q), factor);
            tqkvk_add_scores(s + 8, four(u.q0.v2, u.q1.v2, u.q2.v2, u.q3.v2, q), factor);
            tqkvk_add_scores(s + 12, four(u.q0.v3, u.q1.v3, u.q2.v3, u.q3.v3, q), factor);
        }
    }
}

/* c: of unit 0. */
TQKVK_INLINE void tqkvk_score_units(tqkvk_score_four_fn *four, const tqkvi_layout *layout,
                                    tqkvk_score c)
{
    for (uint32_t u = 0; u < layout->n_units; u++, c.q++) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, tqkvk_score_unit, four, &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

#endif /* TQKVK_SCORE_BLOCKS_NEON_H */
