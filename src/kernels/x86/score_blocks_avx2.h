/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of blocks in registers of 32 bytes, but for the product (dot_bytes_avx2.h). Lanes are
 * tokens, so nothing is summed across lanes. A unit of a block is unpacked once, into eight
 * registers, and every query goes over it: its 16 channels are four words of 4 bytes, each
 * multiplied with a quad.
 *
 * The product wants one side unsigned, so levels are raised by 128, and the sums start from what
 * that adds, taken off. Two products of at most 255 * TQKVK_Q_MAX fit in 16 bits.
 */
#ifndef TQKVK_SCORE_BLOCKS_AVX2_H
#define TQKVK_SCORE_BLOCKS_AVX2_H

#include "kernels/block_units.h"
#include "kernels/x86/block_codes_avx2.h"
#include "kernels/x86/dot_bytes_avx2.h"

#define TQKVK_SCORE_RAISED 128

TQKVK_INLINE tqkvk_quad tqkvk_score_quad(tqkvk_dot_bytes_fn *dot, tqkvk_quad sum,
                                         tqkvk_quad levels, const int8_t *q)
{
    const __m256i four = tqkvk_repeat_four(q);
    return (tqkvk_quad){dot(sum.lo, levels.lo, four), dot(sum.hi, levels.hi, four)};
}

TQKVK_INLINE void tqkvk_score_query(tqkvk_dot_bytes_fn *dot, const tqkvk_unit *unit,
                                    const tqkvk_query_unit *q, __m256 step, float *s)
{
    const __m256i start = _mm256_set1_epi32(q->start);
    const __m256 factor = _mm256_mul_ps(_mm256_broadcast_ss(&q->factor), step);
    tqkvk_quad sum = {start, start};

    sum = tqkvk_score_quad(dot, sum, unit->q0, q->q);
    sum = tqkvk_score_quad(dot, sum, unit->q1, q->q + 4);
    sum = tqkvk_score_quad(dot, sum, unit->q2, q->q + 8);
    sum = tqkvk_score_quad(dot, sum, unit->q3, q->q + 12);
    _mm256_store_ps(s, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.lo), factor, _mm256_load_ps(s)));
    _mm256_store_ps(s + 8,
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.hi), factor, _mm256_load_ps(s + 8)));
}

TQKVK_INLINE void tqkvk_score_unit(int bits, tqkvk_dot_bytes_fn *dot, const tqkvk_score *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits, TQKVK_SCORE_RAISED);
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);

    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit unit =
            tqkvk_levels_unit(TQKV_SIDE_K, bits, c->codes[p] + c->at, &of, TQKVK_SCORE_RAISED);
        const tqkvk_query_unit *q = c->q;
        float *s = c->s + p * TQKVI_BLOCK_TOKENS;
        for (size_t a = 0; a < c->n_q; a++, q += c->n_units, s += c->s_stride)
            tqkvk_score_query(dot, &unit, q, step, s);
    }
}

/* A whole kernel. */
TQKVK_INLINE void tqkvk_score_tile(tqkvk_dot_bytes_fn *dot, const tqkvi_layout *layout,
                                   const uint8_t *const *codes, size_t n_blocks,
                                   const tqkvk_query_unit *q, size_t n_q, float *s, size_t s_stride)
{
    tqkvk_score c = {.codes = codes,
                     .n_blocks = n_blocks,
                     .q = q,
                     .n_q = n_q,
                     .n_units = layout->n_units,
                     .s = s,
                     .s_stride = s_stride};

    for (uint32_t u = 0; u < layout->n_units; u++, c.q++) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, TQKVK_NOTHING, tqkvk_score_unit, dot, &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

#endif /* TQKVK_SCORE_BLOCKS_AVX2_H */
