/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks in registers of 32 bytes, by products of bytes (dot_bytes_avx2.h). Lanes
 * are channels. Unit by unit: the sums of its 16 channels stay in a small array, [queries][16]
 * integers, while the blocks of the tile go by; each block is unpacked once for all queries. Then
 * the sums join the output, converted once.
 *
 * Weights are bytes of 7 bits, so that two products with levels fit in 16 bits. Those of 14 bits
 * are two bytes, and each has sums of its own.
 */
#ifndef TQKVK_WEIGH_BLOCKS_AVX2_H
#define TQKVK_WEIGH_BLOCKS_AVX2_H

#include <stdbool.h>

#include "kernels/block_units.h"
#include "kernels/x86/block_codes_avx2.h"
#include "kernels/x86/dot_bytes_avx2.h"

#define TQKVK_WEIGH_QUERIES 16 /* at most so many go over the blocks together */

typedef struct tqkvk_weigh {
    const uint8_t *const *codes;
    size_t at; /* of the unit in the codes of every block */
    size_t n_blocks;
    const uint8_t *low, *high; /* [n_q][TQKVK_TILE_TOKENS] 7 bits of each weight; see is_fine */
    const uint16_t *words;     /* the same as words, where a kernel wants them */
    size_t n_q, dim;
    const float *f, *g;
    float *o; /* of the first query, at the unit's channels */
} tqkvk_weigh;

TQKVK_INLINE tqkvk_quad tqkvk_weigh_quad(tqkvk_dot_bytes_fn *dot, tqkvk_quad sum,
                                         tqkvk_quad levels, const uint8_t *w)
{
    const __m256i four = tqkvk_repeat_four(w);
    return (tqkvk_quad){dot(sum.lo, four, levels.lo), dot(sum.hi, four, levels.hi)};
}

/*
 * Sums are set and kept half by half: compilers copy a quad as a whole by other sizes than its
 * halves are read with, and then reading waits for writing.
 */
TQKVK_INLINE void tqkvk_weigh_clear(tqkvk_quad *sums, size_t n_q)
{
    for (size_t a = 0; a < n_q; a++) {
        _mm256_store_si256(&sums[a].lo, _mm256_setzero_si256());
        _mm256_store_si256(&sums[a].hi, _mm256_setzero_si256());
    }
}

/* Adds a block to the sums of all queries. w: its weights of the first query. */
TQKVK_INLINE void tqkvk_weigh_block(tqkvk_dot_bytes_fn *dot, const tqkvk_unit *unit,
                                    const uint8_t *w, size_t n_q, tqkvk_quad *sums)
{
    for (size_t a = 0; a < n_q; a++, w += TQKVK_TILE_TOKENS) {
        tqkvk_quad sum = {sums[a].lo, sums[a].hi};
        sum = tqkvk_weigh_quad(dot, sum, unit->q0, w);
        sum = tqkvk_weigh_quad(dot, sum, unit->q1, w + 4);
        sum = tqkvk_weigh_quad(dot, sum, unit->q2, w + 8);
        sum = tqkvk_weigh_quad(dot, sum, unit->q3, w + 12);
        sums[a].lo = sum.lo;
        sums[a].hi = sum.hi;
    }
}

/* The sums of a unit to the output. */
TQKVK_INLINE void tqkvk_weigh_store(const tqkvk_weigh *c, float step, const tqkvk_quad *sums)
{
    float *o = c->o;

    for (size_t a = 0; a < c->n_q; a++, o += c->dim) {
        const __m256 f = _mm256_broadcast_ss(c->f + a);
        const __m256 g = _mm256_mul_ps(_mm256_broadcast_ss(c->g + a), _mm256_set1_ps(step));
        const __m256 lo = _mm256_mul_ps(_mm256_load_ps(o), f);
        const __m256 hi = _mm256_mul_ps(_mm256_load_ps(o + 8), f);
        _mm256_store_ps(o, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[a].lo), g, lo));
        _mm256_store_ps(o + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[a].hi), g, hi));
    }
}

/* is_fine: weights have high bits. A constant wherever it is passed. */
TQKVK_INLINE void tqkvk_weigh_unit(int bits, tqkvk_dot_bytes_fn *dot, bool is_fine,
                                   const tqkvk_weigh *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits, 0);
    tqkvk_quad low[TQKVK_WEIGH_QUERIES], high[TQKVK_WEIGH_QUERIES];

    tqkvk_weigh_clear(low, c->n_q);
    if (is_fine)
        tqkvk_weigh_clear(high, c->n_q);
    for (size_t p = 0; p < c->n_blocks; p++) {
        const size_t first = p * TQKVI_BLOCK_TOKENS;
        const tqkvk_unit u = tqkvk_levels_unit(TQKV_SIDE_V, bits, c->codes[p] + c->at, &of, 0);
        tqkvk_weigh_block(dot, &u, c->low + first, c->n_q, low);
        if (is_fine)
            tqkvk_weigh_block(dot, &u, c->high + first, c->n_q, high);
    }
    for (size_t a = 0; is_fine && a < c->n_q; a++) {
        low[a].lo = _mm256_add_epi32(low[a].lo, _mm256_slli_epi32(high[a].lo, 7));
        low[a].hi = _mm256_add_epi32(low[a].hi, _mm256_slli_epi32(high[a].hi, 7));
    }
    tqkvk_weigh_store(c, tqkvk_widths[bits].step, low);
}

/* c: of unit 0 and of up to TQKVK_WEIGH_QUERIES queries. */
TQKVK_INLINE void tqkvk_weigh_units(tqkvk_dot_bytes_fn *dot, bool is_fine,
                                    const tqkvi_layout *layout, tqkvk_weigh c)
{
    for (uint32_t u = 0; u < layout->n_units; u++, c.o += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, tqkvk_weigh_no_unit(c.n_q, c.dim, c.f, c.o), tqkvk_weigh_unit, dot,
                       is_fine, &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

/* Bytes of n weights, bits `from` to `from` + 6. */
static inline void tqkvk_weigh_bytes(const uint16_t *w, size_t n, int from, uint8_t *out)
{
    const __m256i mask = _mm256_set1_epi16(127);

    for (size_t b = 0; b < n; b += TQKVI_BLOCK_TOKENS) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(w + b));
        v = _mm256_and_si256(_mm256_srli_epi16(v, from), mask);
        _mm_store_si128(
            (__m128i *)(void *)(out + b),
            _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
    }
}

/* Chooses the queries [first, first + n_q) of what a kernel was given. */
TQKVK_INLINE void tqkvk_weigh_choose(tqkvk_weigh *c, size_t first, size_t n_q, const float *f,
                                     const float *g, float *o)
{
    c->n_q = n_q - first < TQKVK_WEIGH_QUERIES ? n_q - first : TQKVK_WEIGH_QUERIES;
    c->f = f + first;
    c->g = g + first;
    c->o = o + first * c->dim;
}

/* A whole kernel, by bytes alone. */
TQKVK_INLINE void tqkvk_weigh_tile(tqkvk_dot_bytes_fn *dot, const tqkvi_layout *layout,
                                   const uint8_t *const *codes, size_t n_blocks, uint32_t most,
                                   const uint16_t *w, size_t w_stride, size_t n_q, const float *f,
                                   const float *g, float *o)
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
            tqkvk_weigh_units(dot, true, layout, c);
        else
            tqkvk_weigh_units(dot, false, layout, c);
    }
}

#endif /* TQKVK_WEIGH_BLOCKS_AVX2_H */
