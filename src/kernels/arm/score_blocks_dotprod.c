/* SPDX-License-Identifier: Apache-2.0 */
/* Scores of blocks: 16 instructions multiply a unit of 16 tokens with a query. Base NEON takes 44. */
#include "kernels/arm/score_blocks_neon.h"
#include "kernels/arm/unit_dot_dotprod.h"
#include "kernels/tables.h"

TQKVK_INLINE int32x4_t score_four(int8x16_t v0, int8x16_t v1, int8x16_t v2, int8x16_t v3,
                                  int8x16_t q)
{
    return tqkvk_dot(vdupq_n_s32(0), v0, v1, v2, v3, q);
}

void tqkvk_score_blocks_i8_dotprod(const tqkvi_layout *layout, const uint8_t *const *codes,
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
