/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of blocks by products of 16 bits. A lane takes one channel of each of the four quads: at
 * most 4 * 127 * TQKVK_Q_MAX = 32004, so it does not overflow. Then the four lanes of a token are
 * added up.
 */
#include "kernels/arm/score_blocks_neon.h"
#include "kernels/tables.h"

_Static_assert(4 * TQKVK_LEVEL_MAX * TQKVK_Q_MAX <= INT16_MAX, "four products in 16 bits");

TQKVK_INLINE int32x4_t score_four(int8x16_t v0, int8x16_t v1, int8x16_t v2, int8x16_t v3,
                                  int8x16_t q)
{
    const int32x4_t word = vreinterpretq_s32_s8(q);
    const int8x16_t q0 = vreinterpretq_s8_s32(vdupq_laneq_s32(word, 0));
    const int8x16_t q1 = vreinterpretq_s8_s32(vdupq_laneq_s32(word, 1));
    const int8x16_t q2 = vreinterpretq_s8_s32(vdupq_laneq_s32(word, 2));
    const int8x16_t q3 = vreinterpretq_s8_s32(vdupq_laneq_s32(word, 3));

    int16x8_t lo = vmull_s8(vget_low_s8(v0), vget_low_s8(q0));
    int16x8_t hi = vmull_high_s8(v0, q0);
    lo = vmlal_s8(lo, vget_low_s8(v1), vget_low_s8(q1));
    hi = vmlal_high_s8(hi, v1, q1);
    lo = vmlal_s8(lo, vget_low_s8(v2), vget_low_s8(q2));
    hi = vmlal_high_s8(hi, v2, q2);
    lo = vmlal_s8(lo, vget_low_s8(v3), vget_low_s8(q3));
    hi = vmlal_high_s8(hi, v3, q3);
    return vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi));
}

void tqkvk_score_blocks_i8_neon(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, const tqkvk_query_unit *q, size_t n_q, float *s,
                                size_t s_stride)
{
    tqkvk_score_units(score_four, layout,
                      (tqkvk_score){.codes = codes,
                                    .n_blocks = n_blocks,
                                    .q = q,
                                    .n_q = n_q,
                                    .n_units = layout->n_units,
                                    .s = s,
                                    .s_stride = s_stride});
}
