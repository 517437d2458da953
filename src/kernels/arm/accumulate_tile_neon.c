/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Output of a tile. A block of 4 queries and 16 channels keeps its 16 sums in registers while the
 * keys run: 4 loads and 4 weights for 16 multiply-adds. Left-over queries go one by one, with 32
 * channels, so that additions do not wait for each other.
 */
#include "kernels/arm/block_neon.h"
#include "kernels/tables.h"

#define Q_BLOCK 4

typedef struct tile {
    const float *p;
    size_t p_stride;
    const float *v;
    size_t n_k, dim;
} tile;

static inline tqkvk_four scaled(const float *o, float f)
{
    return tqkvk_four_mul(tqkvk_four_load(o, 4), f);
}

/* In these three p, v, f and o start at the block's first query and channel. */
static void accumulate_4x16(const tile *t, const float *f, float *o)
{
    const float *p0 = t->p, *p1 = p0 + t->p_stride, *p2 = p1 + t->p_stride, *p3 = p2 + t->p_stride;
    const float *v = t->v;
    const size_t n_k = t->n_k, dim = t->dim;
    tqkvk_four sum0 = scaled(o, f[0]), sum1 = scaled(o + dim, f[1]);
    tqkvk_four sum2 = scaled(o + 2 * dim, f[2]), sum3 = scaled(o + 3 * dim, f[3]);
    for (size_t b = 0; b < n_k; b++, v += dim) {
        const tqkvk_four values = tqkvk_four_load(v, 4);
        sum0 = tqkvk_four_fma_n(sum0, values, p0[b]);
        sum1 = tqkvk_four_fma_n(sum1, values, p1[b]);
        sum2 = tqkvk_four_fma_n(sum2, values, p2[b]);
        sum3 = tqkvk_four_fma_n(sum3, values, p3[b]);
    }
    tqkvk_four_store(o, sum0);
    tqkvk_four_store(o + dim, sum1);
    tqkvk_four_store(o + 2 * dim, sum2);
    tqkvk_four_store(o + 3 * dim, sum3);
}

static void accumulate_1x32(const tile *t, float f, float *o)
{
    const float *p = t->p, *v = t->v;
    const size_t n_k = t->n_k, dim = t->dim;
    tqkvk_four sum0 = scaled(o, f), sum1 = scaled(o + 16, f);
    for (size_t b = 0; b < n_k; b++, v += dim) {
        sum0 = tqkvk_four_fma_n(sum0, tqkvk_four_load(v, 4), p[b]);
        sum1 = tqkvk_four_fma_n(sum1, tqkvk_four_load(v + 16, 4), p[b]);
    }
    tqkvk_four_store(o, sum0);
    tqkvk_four_store(o + 16, sum1);
}

static void accumulate_1x16(const tile *t, float f, float *o)
{
    const float *p = t->p, *v = t->v;
    const size_t n_k = t->n_k, dim = t->dim;
    tqkvk_four sum = scaled(o, f);
    for (size_t b = 0; b < n_k; b++, v += dim)
        sum = tqkvk_four_fma_n(sum, tqkvk_four_load(v, 4), p[b]);
    tqkvk_four_store(o, sum);
}

static void accumulate_4(tile t, const float *f, float *o)
{
    for (size_t i = 0; i < t.dim; i += 16, t.v += 16)
        accumulate_4x16(&t, f, o + i);
}

static void accumulate_1(tile t, float f, float *o)
{
    size_t i = 0;
    for (; i + 32 <= t.dim; i += 32, t.v += 32)
        accumulate_1x32(&t, f, o + i);
    if (i < t.dim)
        accumulate_1x16(&t, f, o + i);
}

void tqkvk_accumulate_tile_f32_neon(const float *p, size_t p_stride, size_t n_q, const float *v,
                                    size_t n_k, size_t dim, const float *f, float *o)
{
    tile t = {.p = p, .p_stride = p_stride, .v = v, .n_k = n_k, .dim = dim};
    size_t a = 0;
    for (; a + Q_BLOCK <= n_q; a += Q_BLOCK, t.p += Q_BLOCK * p_stride)
        accumulate_4(t, f + a, o + a * dim);
    for (; a < n_q; a++, t.p += p_stride)
        accumulate_1(t, f[a], o + a * dim);
}
