/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Output of a tile. A block of 3 queries and 32 channels keeps its 12 sums in registers while the
 * keys run: 4 loads and 3 broadcasts for 12 multiply-adds. Left-over queries go one by one, with
 * 64 channels.
 */
#include "kernels/tables.h"
#include "kernels/x86/block_avx2.h"

typedef struct tile {
    const float *p;
    size_t p_stride;
    const float *v;
    size_t n_k, dim;
} tile;

static inline tqkvk_four scaled(const float *o, const float *f)
{
    return tqkvk_four_mul(tqkvk_four_load(o, 8), _mm256_broadcast_ss(f));
}

/* p, v, f and o start at the block's first query and channel. */
static void accumulate_3x32(const tile *t, const float *f, float *o)
{
    const float *p0 = t->p, *p1 = t->p + t->p_stride, *p2 = t->p + 2 * t->p_stride, *v = t->v;
    const size_t n_k = t->n_k, dim = t->dim;
    tqkvk_four sum0 = scaled(o, f), sum1 = scaled(o + dim, f + 1),
               sum2 = scaled(o + 2 * dim, f + 2);
    for (size_t b = 0; b < n_k; b++, v += dim) {
        const tqkvk_four values = tqkvk_four_load(v, 8);
        sum0 = tqkvk_four_fma(sum0, values, _mm256_broadcast_ss(p0 + b));
        sum1 = tqkvk_four_fma(sum1, values, _mm256_broadcast_ss(p1 + b));
        sum2 = tqkvk_four_fma(sum2, values, _mm256_broadcast_ss(p2 + b));
    }
    tqkvk_four_store(o, sum0);
    tqkvk_four_store(o + dim, sum1);
    tqkvk_four_store(o + 2 * dim, sum2);
}

static void accumulate_1x64(const tile *t, const float *f, float *o)
{
    const float *p = t->p, *v = t->v;
    const size_t n_k = t->n_k, dim = t->dim;
    tqkvk_four sum0 = scaled(o, f), sum1 = scaled(o + 32, f);
    for (size_t b = 0; b < n_k; b++, v += dim) {
        const __m256 weight = _mm256_broadcast_ss(p + b);
        sum0 = tqkvk_four_fma(sum0, tqkvk_four_load(v, 8), weight);
        sum1 = tqkvk_four_fma(sum1, tqkvk_four_load(v + 32, 8), weight);
    }
    tqkvk_four_store(o, sum0);
    tqkvk_four_store(o + 32, sum1);
}

/* What is left of the channels. */
static void accumulate_1x16(const tile *t, const float *f, float *o)
{
    const float *v = t->v;
    const __m256 factor = _mm256_broadcast_ss(f);
    __m256 lo = _mm256_mul_ps(_mm256_load_ps(o), factor);
    __m256 hi = _mm256_mul_ps(_mm256_load_ps(o + 8), factor);
    for (size_t b = 0; b < t->n_k; b++, v += t->dim) {
        const __m256 weight = _mm256_broadcast_ss(t->p + b);
        lo = _mm256_fmadd_ps(_mm256_load_ps(v), weight, lo);
        hi = _mm256_fmadd_ps(_mm256_load_ps(v + 8), weight, hi);
    }
    _mm256_store_ps(o, lo);
    _mm256_store_ps(o + 8, hi);
}

/* The first query, channels i and on. */
static void accumulate_1(tile t, size_t i, const float *f, float *o)
{
    const float *v = t.v;
    for (; i + 64 <= t.dim; i += 64) {
        t.v = v + i;
        accumulate_1x64(&t, f, o + i);
    }
    for (; i < t.dim; i += 16) {
        t.v = v + i;
        accumulate_1x16(&t, f, o + i);
    }
}

static void accumulate_3(tile t, const float *f, float *o)
{
    const float *v = t.v;
    size_t i = 0;
    for (; i + 32 <= t.dim; i += 32) {
        t.v = v + i;
        accumulate_3x32(&t, f, o + i);
    }
    t.v = v;
    for (size_t a = 0; a < 3 && i < t.dim; a++, t.p += t.p_stride)
        accumulate_1(t, i, f + a, o + a * t.dim);
}

void tqkvk_accumulate_tile_f32_avx2(const float *p, size_t p_stride, size_t n_q, const float *v,
                                    size_t n_k, size_t dim, const float *f, float *o)
{
    tile t = {.p = p, .p_stride = p_stride, .v = v, .n_k = n_k, .dim = dim};
    size_t a = 0;
    for (; a + 3 <= n_q; a += 3, t.p += 3 * p_stride)
        accumulate_3(t, f + a, o + a * dim);
    for (; a < n_q; a++, t.p += p_stride)
        accumulate_1(t, 0, f + a, o + a * dim);
}
