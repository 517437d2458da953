/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks. As in weigh_blocks_avx2.h lanes are channels, but 32 registers hold a
 * unit of all four blocks of a tile, sixteen quads, so that the sums of a query stay in registers
 * too. One instruction (VNNI) does the products of a quad with the upper 7 bits of its weights,
 * where they have any, one with the lower 7. A tile with fewer blocks is filled up with its first
 * one, of weight 0.
 */
#include <stdbool.h>

#include "kernels/block_units.h"
#include "kernels/tables.h"
#include "kernels/x86/block_codes_vbmi.h"

#define QUERIES_MAX 16 /* whose weights are copied together */

/* Weights of a tile: 128 * high + low. */
typedef struct tqkvk_halves {
    _Alignas(TQKV_ALIGN) uint8_t high[TQKVK_TILE_TOKENS];
    uint8_t low[TQKVK_TILE_TOKENS];
} tqkvk_halves;

typedef struct weigh {
    const uint8_t *codes[TQKVK_TILE_BLOCKS];
    size_t at;             /* of the unit in the codes of every block */
    const tqkvk_halves *w; /* [n_q] */
    size_t n_q, dim;
    const float *f, *g;
    float *o; /* of the first query, at the unit's channels */
} weigh;

TQKVK_INLINE __m512i dot(__m512i sum, __m512i levels, const uint8_t *w)
{
    return _mm512_dpbusd_epi32(sum, tqkvk_four_bytes(w), levels);
}

TQKVK_INLINE __m512i dot_unit(__m512i sum, const tqkvk_unit *unit, const uint8_t *w)
{
    sum = dot(sum, unit->q0, w);
    sum = dot(sum, unit->q1, w + 4);
    sum = dot(sum, unit->q2, w + 8);
    return dot(sum, unit->q3, w + 12);
}

TQKVK_INLINE __m512i fine_sum(const tqkvk_tile_unit *tile, const tqkvk_halves *w)
{
    __m512i high = dot_unit(_mm512_setzero_si512(), &tile->b0, w->high);
    __m512i low = dot_unit(_mm512_setzero_si512(), &tile->b0, w->low);
    high = dot_unit(high, &tile->b1, w->high + 16);
    low = dot_unit(low, &tile->b1, w->low + 16);
    high = dot_unit(high, &tile->b2, w->high + 32);
    low = dot_unit(low, &tile->b2, w->low + 32);
    high = dot_unit(high, &tile->b3, w->high + 48);
    low = dot_unit(low, &tile->b3, w->low + 48);
    return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
}

/* Two sums, so that one does not wait for the other. */
TQKVK_INLINE __m512i coarse_sum(const tqkvk_tile_unit *tile, const tqkvk_halves *w)
{
    __m512i even = dot_unit(_mm512_setzero_si512(), &tile->b0, w->low);
    __m512i odd = dot_unit(_mm512_setzero_si512(), &tile->b1, w->low + 16);
    even = dot_unit(even, &tile->b2, w->low + 32);
    odd = dot_unit(odd, &tile->b3, w->low + 48);
    return _mm512_add_epi32(even, odd);
}

/* is_coarse: weights have no upper bits. A constant wherever it is passed. */
TQKVK_INLINE void weigh_unit(int bits, bool is_coarse, const weigh *c)
{
    const __m512i of = tqkvk_levels_load(bits, 0);
    const __m512 step = _mm512_set1_ps(tqkvk_widths[bits].step);
    const tqkvk_tile_unit tile = tqkvk_levels_tile(TQKV_SIDE_V, bits, c->codes, c->at, of, 0);
    float *o = c->o;

    for (size_t a = 0; a < c->n_q; a++, o += c->dim) {
        const tqkvk_halves *w = c->w + a;
        const __m512 sum = _mm512_cvtepi32_ps(is_coarse ? coarse_sum(&tile, w) : fine_sum(&tile, w));
        const __m512 g = _mm512_mul_ps(_mm512_set1_ps(c->g[a]), step);
        const __m512 old = _mm512_mul_ps(_mm512_load_ps(o), _mm512_set1_ps(c->f[a]));
        _mm512_store_ps(o, _mm512_fmadd_ps(sum, g, old));
    }
}

TQKVK_INLINE void weigh_queries(const tqkvi_layout *layout, bool is_coarse, weigh c)
{
    for (uint32_t u = 0; u < layout->n_units; u++, c.o += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, tqkvk_weigh_no_unit(c.n_q, c.dim, c.f, c.o), weigh_unit, is_coarse,
                       &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

static tqkvk_halves split_weights(const uint16_t *w, __mmask64 present)
{
    const __m512i first = _mm512_maskz_loadu_epi16((__mmask32)present, w);
    const __m512i second = _mm512_maskz_loadu_epi16((__mmask32)(present >> 32), w + 32);
    const __m512i mask = _mm512_set1_epi16(127);
    tqkvk_halves halves;
    __m256i *high = (__m256i *)(void *)halves.high, *low = (__m256i *)(void *)halves.low;

    _mm256_store_si256(high, _mm512_cvtepi16_epi8(_mm512_srli_epi16(first, 7)));
    _mm256_store_si256(high + 1, _mm512_cvtepi16_epi8(_mm512_srli_epi16(second, 7)));
    _mm256_store_si256(low, _mm512_cvtepi16_epi8(_mm512_and_si512(first, mask)));
    _mm256_store_si256(low + 1, _mm512_cvtepi16_epi8(_mm512_and_si512(second, mask)));
    return halves;
}

void tqkvk_weigh_blocks_i8_vbmi(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, uint32_t most, const uint16_t *w, size_t w_stride,
                                size_t n_q, const float *f, const float *g, float *o)
{
    const __mmask64 present = ~(__mmask64)0 >> (TQKVK_TILE_TOKENS - 16 * n_blocks);
    tqkvk_halves weights[QUERIES_MAX];
    weigh c = {.w = weights, .dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS};

    tqkvk_fill_tile(codes, n_blocks, c.codes);
    for (size_t a = 0; a < n_q; a += c.n_q) {
        c.n_q = n_q - a < QUERIES_MAX ? n_q - a : QUERIES_MAX;
        for (size_t i = 0; i < c.n_q; i++)
            weights[i] = split_weights(w + (a + i) * w_stride, present);
        c.f = f + a;
        c.g = g + a;
        c.o = o + a * c.dim;
        if (most <= TQKVK_COARSE_WEIGHT_MAX)
            weigh_queries(layout, true, c);
        else
            weigh_queries(layout, false, c);
    }
}
