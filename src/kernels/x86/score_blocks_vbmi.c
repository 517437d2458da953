/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of blocks as in score_blocks_avx2.h, with a quad in one register and one instruction
 * (VNNI) for its products. 32 registers hold a unit of all four blocks of a tile, so that what is
 * read of a query serves all of them. A tile with fewer blocks is filled up with its first one,
 * whose scores are dropped.
 */
#include "kernels/block_units.h"
#include "kernels/tables.h"
#include "kernels/x86/block_codes_vbmi.h"

#define RAISED 128

/* Sixteen channels of a query, four to a register. */
typedef struct query {
    __m512i q0, q1, q2, q3, start;
    __m512 factor;
} query;

TQKVK_INLINE void score_block(const tqkvk_unit *unit, const query *q, float *s)
{
    __m512i sum = _mm512_dpbusd_epi32(q->start, unit->q0, q->q0);
    sum = _mm512_dpbusd_epi32(sum, unit->q1, q->q1);
    sum = _mm512_dpbusd_epi32(sum, unit->q2, q->q2);
    sum = _mm512_dpbusd_epi32(sum, unit->q3, q->q3);
    _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), q->factor, _mm512_load_ps(s)));
}

TQKVK_INLINE void score_unit(int bits, const tqkvk_score *c)
{
    const __m512i of = tqkvk_levels_load(bits, RAISED);
    const float step = tqkvk_widths[bits].step;
    const tqkvk_tile_unit tile =
        tqkvk_levels_tile(TQKV_SIDE_K, bits, c->codes, c->at, of, RAISED);
    const tqkvk_query_unit *from = c->q;
    float *s = c->s;

    for (size_t a = 0; a < c->n_q; a++, from += c->n_units, s += c->s_stride) {
        const query q = {tqkvk_four_bytes(from->q),      tqkvk_four_bytes(from->q + 4),
                         tqkvk_four_bytes(from->q + 8),  tqkvk_four_bytes(from->q + 12),
                         _mm512_set1_epi32(from->start), _mm512_set1_ps(from->factor * step)};
        score_block(&tile.b0, &q, s);
        if (c->n_blocks > 1)
            score_block(&tile.b1, &q, s + TQKVI_BLOCK_TOKENS);
        if (c->n_blocks > 2)
            score_block(&tile.b2, &q, s + 2 * TQKVI_BLOCK_TOKENS);
        if (c->n_blocks > 3)
            score_block(&tile.b3, &q, s + 3 * TQKVI_BLOCK_TOKENS);
    }
}

void tqkvk_score_blocks_i8_vbmi(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, const tqkvk_query_unit *q, size_t n_q, float *s,
                                size_t s_stride)
{
    const uint8_t *filled[TQKVK_TILE_BLOCKS];
    tqkvk_score c = {.codes = filled,
                     .n_blocks = n_blocks,
                     .q = q,
                     .n_q = n_q,
                     .n_units = layout->n_units,
                     .s = s,
                     .s_stride = s_stride};

    tqkvk_fill_tile(codes, n_blocks, filled);
    for (uint32_t u = 0; u < layout->n_units; u++, c.q++) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, score_unit, &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}
