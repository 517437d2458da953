/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of a tile. 64 channels of 64 keys are transposed to [channel][key], so that a register
 * holds one channel of sixteen keys and no sum is across a register. That pays from a few queries on.
 */
#include <stdbool.h>

#include "format/row_layout.h"
#include "kernels/tables.h"
#include "kernels/x86/tile_avx512.h"

#define QUERIES_MIN 6 /* fewer are faster the other way */

/* Up to 64 channels of up to 64 keys; what is not there is zero. */
typedef struct tile {
    _Alignas(TQKV_ALIGN) float k[TQKVK_LINE * TQKVK_LINE]; /* [channel][key] */
    size_t n_channels;
    __mmask16 keys[4]; /* which are there, of each register of a line */
} tile;

/* Four channels of the keys 0, 4, 8 and 12 behind k; of the first two only, if that is all. */
static inline __m512 load_four(const float *k, size_t dim, bool is_half)
{
    const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_load_ps(k)),
                                          _mm_load_ps(k + 4 * dim), 1);
    if (is_half)
        return _mm512_zextps256_ps512(_mm512_castps512_ps256(low));
    return _mm512_insertf32x4(_mm512_insertf32x4(low, _mm_load_ps(k + 8 * dim), 2),
                              _mm_load_ps(k + 12 * dim), 3);
}

/* Four channels of 16 keys, of 8 if is_half, to four rows of [channel][key]. */
static inline void transpose_patch(const float *k, size_t dim, bool is_half, float *out)
{
    const __m512 x0 = load_four(k, dim, is_half), x1 = load_four(k + dim, dim, is_half);
    const __m512 x2 = load_four(k + 2 * dim, dim, is_half);
    const __m512 x3 = load_four(k + 3 * dim, dim, is_half);
    const __m512d lo01 = _mm512_castps_pd(_mm512_unpacklo_ps(x0, x1));
    const __m512d lo23 = _mm512_castps_pd(_mm512_unpacklo_ps(x2, x3));
    const __m512d hi01 = _mm512_castps_pd(_mm512_unpackhi_ps(x0, x1));
    const __m512d hi23 = _mm512_castps_pd(_mm512_unpackhi_ps(x2, x3));

    _mm512_store_ps(out, _mm512_castpd_ps(_mm512_unpacklo_pd(lo01, lo23)));
    _mm512_store_ps(out + TQKVK_LINE, _mm512_castpd_ps(_mm512_unpackhi_pd(lo01, lo23)));
    _mm512_store_ps(out + 2 * TQKVK_LINE, _mm512_castpd_ps(_mm512_unpacklo_pd(hi01, hi23)));
    _mm512_store_ps(out + 3 * TQKVK_LINE, _mm512_castpd_ps(_mm512_unpackhi_pd(hi01, hi23)));
}

/* n_k: a multiple of 8. */
static void load_tile(const float *k, size_t n_k, size_t n_channels, size_t dim, tile *out)
{
    out->n_channels = n_channels;
    for (size_t b = 0; b < TQKVK_LINE; b += 16) {
        const size_t n = n_k < b ? 0 : n_k - b;
        out->keys[b / 16] = n >= 16 ? 0xffff : n == 8 ? 0xff : 0;
        for (size_t i = 0; i < n_channels; i += 4) {
            float *to = out->k + i * TQKVK_LINE + b;
            if (n > 0)
                transpose_patch(k + b * dim + i, dim, n == 8, to);
            for (size_t j = 0; j < 4 && n == 0; j++)
                _mm512_store_ps(to + j * TQKVK_LINE, _mm512_setzero_ps());
        }
    }
}

static inline tqkvk_line load_scores(const tile *t, const float *s)
{
    return (tqkvk_line){_mm512_maskz_loadu_ps(t->keys[0], s),
                        _mm512_maskz_loadu_ps(t->keys[1], s + 16),
                        _mm512_maskz_loadu_ps(t->keys[2], s + 32),
                        _mm512_maskz_loadu_ps(t->keys[3], s + 48)};
}

static inline void store_scores(const tile *t, tqkvk_line x, float *s)
{
    _mm512_mask_storeu_ps(s, t->keys[0], x.a);
    _mm512_mask_storeu_ps(s + 16, t->keys[1], x.b);
    _mm512_mask_storeu_ps(s + 32, t->keys[2], x.c);
    _mm512_mask_storeu_ps(s + 48, t->keys[3], x.d);
}

static void dot_4(const tile *t, const float *q, size_t dim, bool is_first, float *s,
                  size_t s_stride)
{
    tqkvk_lines sum = {tqkvk_line_zero(), tqkvk_line_zero(), tqkvk_line_zero(), tqkvk_line_zero()};
    if (!is_first)
        sum = (tqkvk_lines){load_scores(t, s), load_scores(t, s + s_stride),
                            load_scores(t, s + 2 * s_stride), load_scores(t, s + 3 * s_stride)};
    sum = tqkvk_lines_sum(sum, q, dim, t->k, TQKVK_LINE, t->n_channels);
    store_scores(t, sum.r0, s);
    store_scores(t, sum.r1, s + s_stride);
    store_scores(t, sum.r2, s + 2 * s_stride);
    store_scores(t, sum.r3, s + 3 * s_stride);
}

static void dot_1(const tile *t, const float *q, bool is_first, float *s)
{
    const tqkvk_line start = is_first ? tqkvk_line_zero() : load_scores(t, s);
    store_scores(t, tqkvk_line_sum(start, q, t->k, TQKVK_LINE, t->n_channels), s);
}

void tqkvk_dot_tile_f32_avx512(const float *q, size_t n_q, const float *k, size_t n_k, size_t dim,
                               float *s, size_t s_stride)
{
    tile t;

    if (n_q < QUERIES_MIN) {
        tqkvk_dot_tile_f32_avx2(q, n_q, k, n_k, dim, s, s_stride);
        return;
    }
    for (size_t b = 0; b < n_k; b += TQKVK_LINE, k += TQKVK_LINE * dim) {
        for (size_t i = 0; i < dim; i += TQKVK_LINE) {
            size_t a = 0;
            load_tile(k + i, n_k - b, dim - i < TQKVK_LINE ? dim - i : TQKVK_LINE, dim, &t);
            for (; a + 4 <= n_q; a += 4)
                dot_4(&t, q + a * dim + i, dim, i == 0, s + a * s_stride + b, s_stride);
            for (; a < n_q; a++)
                dot_1(&t, q + a * dim + i, i == 0, s + a * s_stride + b);
        }
    }
}
