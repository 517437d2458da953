/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of blocks. Lanes are tokens, so nothing is summed across lanes. A unit of a block is
 * unpacked once, into eight registers, and every query goes over it: its 16 channels are four words
 * of 4 bytes, each multiplied with a quad.
 *
 * The instruction wants one side unsigned, so levels are raised by 128, and the sums start from
 * what that adds, taken off. Two products of at most 255 * TQKVK_Q_MAX fit in 16 bits.
 */
#include "kernels/tables.h"
#include "kernels/x86/block_codes_avx2.h"

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

TQKVK_INLINE __m256i dot(__m256i sum, __m256i levels, __m256i q)
{
    const __m256i pairs = _mm256_maddubs_epi16(levels, q);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

TQKVK_INLINE tqkvk_quad dot_quad(tqkvk_quad sum, tqkvk_quad levels, const int8_t *q)
{
    int word;
    memcpy(&word, q, sizeof(word));
    const __m256i four = _mm256_set1_epi32(word);
    return (tqkvk_quad){dot(sum.lo, levels.lo, four), dot(sum.hi, levels.hi, four)};
}

TQKVK_INLINE void score_query(const tqkvk_unit *unit, const tqkvk_query_unit *q, __m256 step,
                              float *s)
{
    const __m256i start = _mm256_set1_epi32(q->start);
    const __m256 factor = _mm256_mul_ps(_mm256_broadcast_ss(&q->factor), step);
    tqkvk_quad sum = {start, start};

    sum = dot_quad(sum, unit->q0, q->q);
    sum = dot_quad(sum, unit->q1, q->q + 4);
    sum = dot_quad(sum, unit->q2, q->q + 8);
    sum = dot_quad(sum, unit->q3, q->q + 12);
    _mm256_store_ps(s, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.lo), factor, _mm256_load_ps(s)));
    _mm256_store_ps(s + 8,
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.hi), factor, _mm256_load_ps(s + 8)));
}

TQKVK_INLINE void score_unit(int bits, const score *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits, RAISED);
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);

    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit unit =
            tqkvk_levels_unit(TQKV_SIDE_K, bits, c->codes[p] + c->at, &of, RAISED);
        const tqkvk_query_unit *q = c->q;
        float *s = c->s + p * TQKVI_BLOCK_TOKENS;
        for (size_t a = 0; a < c->n_q; a++, q += c->n_units, s += c->s_stride)
            score_query(&unit, q, step, s);
    }
}

void tqkvk_score_blocks_i8_avx2(const tqkvi_layout *layout, const uint8_t *const *codes,
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
