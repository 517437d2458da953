/* SPDX-License-Identifier: Apache-2.0 */
/* Scores of blocks as score_blocks_avx2.h says, by products of 16 bits. */
#include "kernels/tables.h"
#include "kernels/x86/score_blocks_avx2.h"

void tqkvk_score_blocks_i8_avx2(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, const tqkvk_query_unit *q, size_t n_q, float *s,
                                size_t s_stride)
{
    tqkvk_score_tile(tqkvk_dot_bytes_avx2, layout, codes, n_blocks, q, n_q, s, s_stride);
}
