/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block to rows of f32. Both sides come as 16 registers of 16 levels, four lanes of 4 bytes each;
 * four of them transposed are four whole rows:
 *
 *     K    register j of quad g: tokens 4j..4j+3, channels 4g..4g+3. Rows 4j..: j of every quad.
 *     V    the same with tokens and channels exchanged, and with its 4 x 4 bytes turned over.
 *          Rows 4g..: all of quad g.
 */
#include "kernels/tables.h"
#include "kernels/x86/block_codes_avx2.h"

static inline void store_row(__m128i levels, __m256 step, float *out)
{
    const __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels));
    const __m256 hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(levels, levels)));
    _mm256_store_ps(out, _mm256_mul_ps(lo, step));
    _mm256_store_ps(out + 8, _mm256_mul_ps(hi, step));
}

/* part: dword i of each is a piece of row i. */
static inline void store_four(const __m128i part[4], __m256 step, float *out, size_t dim)
{
    const __m128i lo01 = _mm_unpacklo_epi32(part[0], part[1]);
    const __m128i lo23 = _mm_unpacklo_epi32(part[2], part[3]);
    const __m128i hi01 = _mm_unpackhi_epi32(part[0], part[1]);
    const __m128i hi23 = _mm_unpackhi_epi32(part[2], part[3]);
    store_row(_mm_unpacklo_epi64(lo01, lo23), step, out);
    store_row(_mm_unpackhi_epi64(lo01, lo23), step, out + dim);
    store_row(_mm_unpacklo_epi64(hi01, hi23), step, out + 2 * dim);
    store_row(_mm_unpackhi_epi64(hi01, hi23), step, out + 3 * dim);
}

static inline void split(tqkvk_quad q, __m128i part[4])
{
    part[0] = _mm256_castsi256_si128(q.lo);
    part[1] = _mm256_extracti128_si256(q.lo, 1);
    part[2] = _mm256_castsi256_si128(q.hi);
    part[3] = _mm256_extracti128_si256(q.hi, 1);
}

static inline void store_k(const tqkvk_unit *unit, __m256 step, float *out, size_t dim)
{
    __m128i part[4][4];
    split(unit->q0, part[0]);
    split(unit->q1, part[1]);
    split(unit->q2, part[2]);
    split(unit->q3, part[3]);
    for (size_t j = 0; j < 4; j++) {
        const __m128i four[4] = {part[0][j], part[1][j], part[2][j], part[3][j]};
        store_four(four, step, out + 4 * j * dim, dim);
    }
}

static inline void store_v_quad(tqkvk_quad q, __m256 step, float *out, size_t dim)
{
    const __m128i over = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i part[4];
    split(q, part);
    for (size_t j = 0; j < 4; j++)
        part[j] = _mm_shuffle_epi8(part[j], over);
    store_four(part, step, out, dim);
}

TQKVK_INLINE void unpack_unit(int bits, tqkv_side side, const uint8_t *codes, float *out,
                              size_t dim)
{
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);
    const tqkvk_levels_of of = tqkvk_levels_load(bits, 0);
    const tqkvk_unit unit = tqkvk_levels_unit(side, bits, codes, &of, 0);
    if (side == TQKV_SIDE_K) {
        store_k(&unit, step, out, dim);
        return;
    }
    store_v_quad(unit.q0, step, out, dim);
    store_v_quad(unit.q1, step, out + 4 * dim, dim);
    store_v_quad(unit.q2, step, out + 8 * dim, dim);
    store_v_quad(unit.q3, step, out + 12 * dim, dim);
}

static void zero_unit(float *out, size_t dim)
{
    for (size_t t = 0; t < TQKVI_BLOCK_TOKENS; t++)
        memset(out + t * dim, 0, TQKV_UNIT_CHANNELS * sizeof(*out));
}

TQKVK_INLINE void unpack_side(tqkv_side side, const tqkvi_layout *layout, const uint8_t *codes,
                              float *out)
{
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;

    for (uint32_t u = 0; u < layout->n_units; u++, out += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, zero_unit(out, dim), unpack_unit, side, codes, out, dim);
        codes += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

void tqkvk_unpack_block_f32_avx2(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                                 float *out)
{
    if (side == TQKV_SIDE_K)
        unpack_side(TQKV_SIDE_K, layout, codes, out);
    else
        unpack_side(TQKV_SIDE_V, layout, codes, out);
}
