/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of blocks as in score_blocks_avx2.c, with a quad in one register and one instruction
 * (VNNI) for its products.
 */
#include "kernels/tables.h"
#include "kernels/x86/block_codes_avx512.h"

#define RAISED 128

typedef struct score {
    const uint8_t *const *codes;
    size_t at; /* of the unit in the codes of every block */
    size_t n_blocks;
    const tqkvk_query_unit *q; /* of the first query */
    size_t n_q, n_units;
    float *s;
    size_t s_stride;
} score;

TQKVK_INLINE __m512i dot(__m512i sum, __m512i levels, const int8_t *q)
{
    int word;
    memcpy(&word, q, sizeof(word));
    return _mm512_dpbusd_epi32(sum, levels, _mm512_set1_epi32(word));
}

TQKVK_INLINE void score_query(const tqkvk_unit *unit, const tqkvk_query_unit *q, __m512 step,
                              float *s)
{
    __m512i sum = _mm512_set1_epi32(q->start);
    sum = dot(sum, unit->q0, q->q);
    sum = dot(sum, unit->q1, q->q + 4);
    sum = dot(sum, unit->q2, q->q + 8);
    sum = dot(sum, unit->q3, q->q + 12);
    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(q->factor), step);
    _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_load_ps(s)));
}

TQKVK_INLINE void score_unit(int bits, const score *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits, RAISED);
    const __m512 step = _mm512_set1_ps(tqkvk_widths[bits].step);

    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit unit =
            tqkvk_levels_unit(TQKV_SIDE_K, bits, c->codes[p] + c->at, &of, RAISED);
        const tqkvk_query_unit *q = c->q;
        float *s = c->s + p * TQKVI_BLOCK_TOKENS;
        for (size_t a = 0; a < c->n_q; a++, q += c->n_units, s += c->s_stride)
            score_query(&unit, q, step, s);
    }
}

void tqkvk_score_blocks_i8_avx512(const tqkvi_layout *layout, const uint8_t *const *codes,
                                  size_t n_blocks, const tqkvk_query_unit *q, size_t n_q, float *s,
                                  size_t s_stride)
{
    score c = {.codes = codes,
               .n_blocks = n_blocks,
               .q = q,
               .n_q = n_q,
               .n_units = layout->n_units,
               .s = s,
               .s_stride = s_stride};

    for (uint32_t u = 0; u < layout->n_units; u++, c.q++) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, score_unit, &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}
