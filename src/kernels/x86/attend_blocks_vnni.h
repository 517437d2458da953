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
        tqkvk_score_units(tqkvk_dot_bytes_vnni, layout,                                            \
                          (tqkvk_score){.codes = codes,                                            \
                                        .n_blocks = n_blocks,                                      \
                                        .q = q,                                                    \
                                        .n_q = n_q,                                                \
                                        .n_units = layout->n_units,                                \
                                        .s = s,                                                    \
                                        .s_stride = s_stride});                                    \
    }                                                                                              \
                                                                                                   \
    void tqkvk_weigh_blocks_i8_##isa(const tqkvi_layout *layout, const uint8_t *const *codes,      \
                                     size_t n_blocks, uint32_t most, const uint16_t *w,            \
                                     size_t w_stride, size_t n_q, const float *f, const float *g,  \
                                     float *o)                                                     \
    {                                                                                              \
        tqkvk_weigh_by_bytes(layout, codes, n_blocks, most, w, w_stride, n_q, f, g, o);            \
    }

static inline void tqkvk_weigh_by_bytes(const tqkvi_layout *layout, const uint8_t *const *codes,
                                        size_t n_blocks, uint32_t most, const uint16_t *w,
                                        size_t w_stride, size_t n_q, const float *f, const float *g,
                                        float *o)
{
    const size_t n = n_blocks * TQKVI_BLOCK_TOKENS;
    const bool is_fine = most > TQKVK_COARSE_WEIGHT_MAX;
    _Alignas(TQKV_ALIGN) uint8_t low[TQKVK_WEIGH_QUERIES][TQKVK_TILE_TOKENS];
    _Alignas(TQKV_ALIGN) uint8_t high[TQKVK_WEIGH_QUERIES][TQKVK_TILE_TOKENS];
    tqkvk_weigh c = {.codes = codes,
                     .n_blocks = n_blocks,
                     .low = low[0],
                     .high = high[0],
                     .dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS};

    for (size_t a = 0; a < n_q; a += c.n_q) {
        tqkvk_weigh_choose(&c, a, n_q, f, g, o);
        for (size_t i = 0; i < c.n_q; i++) {
            tqkvk_weigh_bytes(w + (a + i) * w_stride, n, 0, low[i]);
            if (is_fine)
                tqkvk_weigh_bytes(w + (a + i) * w_stride, n, 7, high[i]);
        }
        if (is_fine)
            tqkvk_weigh_units(tqkvk_dot_bytes_vnni, true, layout, c);
        else
            tqkvk_weigh_units(tqkvk_dot_bytes_vnni, false, layout, c);
    }
}

#endif /* TQKVK_ATTEND_BLOCKS_VNNI_H */
