/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks. Lanes are channels. Unit by unit: the sums of its 16 channels stay in a
 * small array, [queries][16] integers, while the blocks of the tile go by; each block is unpacked
 * once for all queries. Then the sums join the output, converted once.
 *
 * Weights of 14 bits are multiplied as words: levels are widened, tokens 0 and 2 of a quad apart
 * from 1 and 3, half a unit to eight registers, and weights are put into the same order first.
 * Those of 7 bits are bytes, as levels are, and two products fit in a word.
 */
#include <stdbool.h>

#include "kernels/tables.h"
#include "kernels/x86/block_codes_avx2.h"

#define QUERIES_MAX 16 /* that go over the blocks together */

typedef struct weigh {
    const uint8_t *const *codes;
    size_t at; /* of the unit in the codes of every block */
    size_t n_blocks;
    const uint16_t *w;     /* [n_q][TQKVK_TILE_TOKENS], of every four tokens 0 2 1 3 */
    const uint8_t *coarse; /* [n_q][TQKVK_TILE_TOKENS] in order; NULL: w has the weights */
    size_t n_q, dim;
    const float *f, *g;
    float *o; /* of the first query, at the unit's channels */
} weigh;

TQKVK_INLINE __m256i even(__m256i bytes)
{
    return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
}

TQKVK_INLINE __m256i odd(__m256i bytes)
{
    return _mm256_srai_epi16(bytes, 8);
}

TQKVK_INLINE __m256i dot(__m256i sum, __m256i levels, const uint16_t *w)
{
    int two;
    memcpy(&two, w, sizeof(two));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(levels, _mm256_set1_epi32(two)));
}

/* Half a unit: eight channels of 16 tokens. sums: [queries], two apart. */
TQKVK_INLINE void weigh_half(__m256i q0, __m256i q1, __m256i q2, __m256i q3, const weigh *c,
                             const uint16_t *w, __m256i *sums)
{
    const __m256i e0 = even(q0), e1 = even(q1), e2 = even(q2), e3 = even(q3);
    const __m256i o0 = odd(q0), o1 = odd(q1), o2 = odd(q2), o3 = odd(q3);

    for (size_t a = 0; a < c->n_q; a++, w += TQKVK_TILE_TOKENS) {
        __m256i sum = sums[2 * a];
        sum = dot(dot(sum, e0, w), o0, w + 2);
        sum = dot(dot(sum, e1, w + 4), o1, w + 6);
        sum = dot(dot(sum, e2, w + 8), o2, w + 10);
        sum = dot(dot(sum, e3, w + 12), o3, w + 14);
        sums[2 * a] = sum;
    }
}

TQKVK_INLINE __m256i dot_bytes(__m256i sum, __m256i levels, __m256i weights)
{
    const __m256i pairs = _mm256_maddubs_epi16(weights, levels);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

TQKVK_INLINE void weigh_quad(tqkvk_quad quad, const uint8_t *w, __m256i *sums)
{
    int four;
    memcpy(&four, w, sizeof(four));
    const __m256i weights = _mm256_set1_epi32(four);
    sums[0] = dot_bytes(sums[0], quad.lo, weights);
    sums[1] = dot_bytes(sums[1], quad.hi, weights);
}

/* A whole unit by weights of 7 bits. */
TQKVK_INLINE void weigh_coarse(const tqkvk_unit *u, const weigh *c, const uint8_t *w, __m256i *sums)
{
    for (size_t a = 0; a < c->n_q; a++, w += TQKVK_TILE_TOKENS, sums += 2) {
        __m256i both[2] = {sums[0], sums[1]};
        weigh_quad(u->q0, w, both);
        weigh_quad(u->q1, w + 4, both);
        weigh_quad(u->q2, w + 8, both);
        weigh_quad(u->q3, w + 12, both);
        sums[0] = both[0];
        sums[1] = both[1];
    }
}

TQKVK_INLINE void weigh_fine(const tqkvk_unit *u, const weigh *c, const uint16_t *w, __m256i *sums)
{
    weigh_half(u->q0.lo, u->q1.lo, u->q2.lo, u->q3.lo, c, w, sums);
    weigh_half(u->q0.hi, u->q1.hi, u->q2.hi, u->q3.hi, c, w, sums + 1);
}

TQKVK_INLINE void weigh_unit(int bits, const weigh *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits, 0);
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);
    __m256i sums[2 * QUERIES_MAX];

    for (size_t a = 0; a < 2 * c->n_q; a++)
        sums[a] = _mm256_setzero_si256();
    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit u = tqkvk_levels_unit(TQKV_SIDE_V, bits, c->codes[p] + c->at, &of, 0);
        if (c->coarse)
            weigh_coarse(&u, c, c->coarse + p * TQKVI_BLOCK_TOKENS, sums);
        else
            weigh_fine(&u, c, c->w + p * TQKVI_BLOCK_TOKENS, sums);
    }
    float *o = c->o;
    for (size_t a = 0; a < c->n_q; a++, o += c->dim) {
        const __m256 f = _mm256_broadcast_ss(c->f + a);
        const __m256 g = _mm256_mul_ps(_mm256_broadcast_ss(c->g + a), step);
        const __m256 lo = _mm256_mul_ps(_mm256_load_ps(o), f);
        const __m256 hi = _mm256_mul_ps(_mm256_load_ps(o + 8), f);
        _mm256_store_ps(o, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[2 * a]), g, lo));
        _mm256_store_ps(o + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[2 * a + 1]), g, hi));
    }
}

static void scale_unit(const weigh *c)
{
    for (size_t a = 0; a < c->n_q; a++)
        for (size_t d = 0; d < TQKV_UNIT_CHANNELS; d++)
            c->o[a * c->dim + d] *= c->f[a];
}

static void weigh_queries(const tqkvi_layout *layout, weigh c)
{
    for (uint32_t u = 0; u < layout->n_units; u++, c.o += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, scale_unit(&c), weigh_unit, &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

static void order_weights(const uint16_t *w, size_t n, uint16_t *out)
{
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0,
                                           1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    for (size_t b = 0; b < n; b += TQKVI_BLOCK_TOKENS) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(w + b));
        _mm256_store_si256((__m256i *)(void *)(out + b), _mm256_shuffle_epi8(v, order));
    }
}

static void narrow_weights(const uint16_t *w, size_t n, uint8_t *out)
{
    for (size_t b = 0; b < n; b += TQKVI_BLOCK_TOKENS) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(w + b));
        const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        _mm_store_si128((__m128i *)(void *)(out + b), _mm_packus_epi16(low, high));
    }
}

void tqkvk_weigh_blocks_i8_avx2(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, uint32_t most, const uint16_t *w, size_t w_stride,
                                size_t n_q, const float *f, const float *g, float *o)
{
    const size_t n = n_blocks * TQKVI_BLOCK_TOKENS;
    const bool is_coarse = most <= TQKVK_COARSE_WEIGHT_MAX;
    _Alignas(TQKV_ALIGN) uint16_t weights[QUERIES_MAX][TQKVK_TILE_TOKENS];
    _Alignas(TQKV_ALIGN) uint8_t coarse[QUERIES_MAX][TQKVK_TILE_TOKENS];
    weigh c = {.codes = codes,
               .n_blocks = n_blocks,
               .w = weights[0],
               .coarse = is_coarse ? coarse[0] : NULL,
               .dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS};

    for (size_t a = 0; a < n_q; a += c.n_q) {
        c.n_q = n_q - a < QUERIES_MAX ? n_q - a : QUERIES_MAX;
        for (size_t i = 0; i < c.n_q; i++) {
            if (is_coarse)
                narrow_weights(w + (a + i) * w_stride, n, coarse[i]);
            else
                order_weights(w + (a + i) * w_stride, n, weights[i]);
        }
        c.f = f + a;
        c.g = g + a;
        c.o = o + a * c.dim;
        weigh_queries(layout, c);
    }
}
