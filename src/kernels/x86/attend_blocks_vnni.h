/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores and weighted sums of blocks by the byte products of VNNI in registers of 32 bytes. The
 * instruction has two forms, of AVX-512 VL and of CPUs without AVX-512; a .c file of each makes
 * both kernels with its own names and flags.
 */
#ifndef TQKVK_ATTEND_BLOCKS_VNNI_H
#define TQKVK_ATTEND_BLOCKS_VNNI_H

#include "kernels/tables.h"
#include "kernels/x86/score_blocks_avx2.h"
#include "kernels/x86/weigh_blocks_avx2.h"

#define TQKVK_ATTEND_BLOCKS_VNNI(isa)                                                              \
    void tqkvk_score_blocks_i8_##isa(const tqkvi_layout *layout, const uint8_t *const *codes,      \
                                     size_t n_blocks, const tqkvk_query_unit *q, size_t n_q,       \
                                     float *s, size_t s_stride)                                    \
    {                                                                                              \
        tqkvk_score_tile(tqkvk_dot_bytes_vnni, layout, codes, n_blocks, q, n_q, s, s_stride);      \
    }                                                                                              \
                                                                                                   \
    void tqkvk_weigh_blocks_i8_##isa(const tqkvi_layout *layout, const uint8_t *const *codes,      \
                                     size_t n_blocks, uint32_t most, const uint16_t *w,            \
                                     size_t w_stride, size_t n_q, const float *f, const float *g,  \
                                     float *o)                                                     \
    {                                                                                              \
        tqkvk_weigh_tile(tqkvk_dot_bytes_vnni, layout, codes, n_blocks, most, w, w_stride, n_q, f, \
                         g, o);                                                                    \
    }

#endif /* TQKVK_ATTEND_BLOCKS_VNNI_H */
