/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks. Weights of 7 bits go as weigh_blocks_avx2.h says. Those of 14 bits would
 * take six instructions there for 32 products; as words they take four: levels are widened, tokens
 * 0 and 2 of a quad apart from 1 and 3, half a unit to eight registers, and weights are put into
 * the same order first.
 */
#include "kernels/x86/weigh_blocks_avx2.h"
#include "kernels/tables.h"

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
    return _mm256_add_epi32(sum, _mm256_madd_epi16(levels, tqkvk_repeat_four(w)));
}

/* Half a unit: eight channels of 16 tokens, the upper ones if is_high. */
TQKVK_INLINE void weigh_half(__m256i q0, __m256i q1, __m256i q2, __m256i q3, bool is_high,
                             size_t n_q, const uint16_t *w, tqkvk_quad *sums)
{
    const __m256i e0 = even(q0), e1 = even(q1), e2 = even(q2), e3 = even(q3);
    const __m256i o0 = odd(q0), o1 = odd(q1), o2 = odd(q2), o3 = odd(q3);

    for (size_t a = 0; a < n_q; a++, w += TQKVK_TILE_TOKENS) {
        __m256i *to = is_high ? &sums[a].hi : &sums[a].lo;
        __m256i sum = *to;
        sum = dot(dot(sum, e0, w), o0, w + 2);
        sum = dot(dot(sum, e1, w + 4), o1, w + 6);
        sum = dot(dot(sum, e2, w + 8), o2, w + 10);
        sum = dot(dot(sum, e3, w + 12), o3, w + 14);
        *to = sum;
    }
}

TQKVK_INLINE void weigh_unit_words(int bits, const tqkvk_weigh *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits, 0);
    tqkvk_quad sums[TQKVK_WEIGH_QUERIES];

    tqkvk_weigh_clear(sums, c->n_q);
    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit u = tqkvk_levels_unit(TQKV_SIDE_V, bits, c->codes[p] + c->at, &of, 0);
        const uint16_t *w = c->words + p * TQKVI_BLOCK_TOKENS;
        weigh_half(u.q0.lo, u.q1.lo, u.q2.lo, u.q3.lo, false, c->n_q, w, sums);
        weigh_half(u.q0.hi, u.q1.hi, u.q2.hi, u.q3.hi, true, c->n_q, w, sums);
    }
    tqkvk_weigh_store(c, tqkvk_widths[bits].step, sums);
}

static void weigh_words(const tqkvi_layout *layout, tqkvk_weigh c)
{
    for (uint32_t u = 0; u < layout->n_units; u++, c.o += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, tqkvk_weigh_no_unit(c.n_q, c.dim, c.f, c.o), weigh_unit_words, &c);
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

void tqkvk_weigh_blocks_i8_avx2(const tqkvi_layout *layout, const uint8_t *const *codes,
                                size_t n_blocks, uint32_t most, const uint16_t *w, size_t w_stride,
                                size_t n_q, const float *f, const float *g, float *o)
{
    const size_t n = n_blocks * TQKVI_BLOCK_TOKENS;
    _Alignas(TQKV_ALIGN) uint16_t words[TQKVK_WEIGH_QUERIES][TQKVK_TILE_TOKENS];
    tqkvk_weigh c = {.codes = codes,
                     .n_blocks = n_blocks,
                     .words = words[0],
                     .dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS};

    if (most <= TQKVK_COARSE_WEIGHT_MAX) {
        tqkvk_weigh_tile(tqkvk_dot_bytes_avx2, layout, codes, n_blocks, TQKVK_COARSE_WEIGHT_MAX, w,
                         w_stride, n_q, f, g, o);
        return;
    }
    for (size_t a = 0; a < n_q; a += c.n_q) {
        tqkvk_weigh_choose(&c, a, n_q, f, g, o);
        for (size_t i = 0; i < c.n_q; i++)
            order_weights(w + (a + i) * w_stride, n, words[i]);
        weigh_words(layout, c);
    }
}
