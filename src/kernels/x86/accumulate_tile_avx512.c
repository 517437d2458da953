/* SPDX-License-Identifier: Apache-2.0 */
/* Output of a tile: four queries and 64 channels at a time; what is left over goes alone. */
#include "kernels/tables.h"
#include "kernels/x86/tile_avx512.h"

typedef struct tile {
    const float *p;
    size_t p_stride;
    const float *v;
    size_t n_k, dim;
} tile;

static inline void store_line(float *to, tqkvk_line x)
{
    _mm512_storeu_ps(to, x.a);
    _mm512_storeu_ps(to + 16, x.b);
    _mm512_storeu_ps(to + 32, x.c);
    _mm512_storeu_ps(to + 48, x.d);
}

static inline tqkvk_line scaled(const float *o, float f)
{
    return tqkvk_line_mul(tqkvk_line_load(o), f);
}

/* Queries a .. a + 3, channels i .. i + 63. */
static void accumulate_4x64(const tile *t, size_t a, size_t i, const float *f, float *o)
{
    const size_t dim = t->dim;

    f += a;
    o += a * dim + i;
    tqkvk_lines sum = {scaled(o, f[0]), scaled(o + dim, f[1]), scaled(o + 2 * dim, f[2]),
                       scaled(o + 3 * dim, f[3])};
    sum = tqkvk_lines_sum(sum, t->p + a * t->p_stride, t->p_stride, t->v + i, dim, t->n_k);
    store_line(o, sum.r0);
    store_line(o + dim, sum.r1);
    store_line(o + 2 * dim, sum.r2);
    store_line(o + 3 * dim, sum.r3);
}

static void accumulate_1x64(const tile *t, size_t a, size_t i, const float *f, float *o)
{
    o += a * t->dim + i;
    store_line(o, tqkvk_line_sum(scaled(o, f[a]), t->p + a * t->p_stride, t->v + i, t->dim, t->n_k));
}

static void accumulate_4x16(const tile *t, size_t a, size_t i, const float *f, float *o)
{
    const float *p = t->p + a * t->p_stride, *v = t->v + i;
    const size_t dim = t->dim, p_stride = t->p_stride;

    f += a;
    o += a * dim + i;
    __m512 s0 = _mm512_mul_ps(_mm512_loadu_ps(o), _mm512_set1_ps(f[0]));
    __m512 s1 = _mm512_mul_ps(_mm512_loadu_ps(o + dim), _mm512_set1_ps(f[1]));
    __m512 s2 = _mm512_mul_ps(_mm512_loadu_ps(o + 2 * dim), _mm512_set1_ps(f[2]));
    __m512 s3 = _mm512_mul_ps(_mm512_loadu_ps(o + 3 * dim), _mm512_set1_ps(f[3]));
    for (size_t b = 0; b < t->n_k; b++, p++, v += dim) {
        const __m512 x = _mm512_loadu_ps(v);
        s0 = _mm512_fmadd_ps(x, _mm512_set1_ps(p[0]), s0);
        s1 = _mm512_fmadd_ps(x, _mm512_set1_ps(p[p_stride]), s1);
        s2 = _mm512_fmadd_ps(x, _mm512_set1_ps(p[2 * p_stride]), s2);
        s3 = _mm512_fmadd_ps(x, _mm512_set1_ps(p[3 * p_stride]), s3);
    }
    _mm512_storeu_ps(o, s0);
    _mm512_storeu_ps(o + dim, s1);
    _mm512_storeu_ps(o + 2 * dim, s2);
    _mm512_storeu_ps(o + 3 * dim, s3);
}

static void accumulate_1x16(const tile *t, size_t a, size_t i, const float *f, float *o)
{
    const float *p = t->p + a * t->p_stride, *v = t->v + i;

    o += a * t->dim + i;
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(o), _mm512_set1_ps(f[a]));
    for (size_t b = 0; b < t->n_k; b++, v += t->dim)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(v), _mm512_set1_ps(p[b]), sum);
    _mm512_storeu_ps(o, sum);
}

void tqkvk_accumulate_tile_f32_avx512(const float *p, size_t p_stride, size_t n_q, const float *v,
                                      size_t n_k, size_t dim, const float *f, float *o)
{
    const tile t = {.p = p, .p_stride = p_stride, .v = v, .n_k = n_k, .dim = dim};
    size_t a = 0;

    for (; a + 4 <= n_q; a += 4) {
        size_t i = 0;
        for (; i + TQKVK_LINE <= dim; i += TQKVK_LINE)
            accumulate_4x64(&t, a, i, f, o);
        for (; i < dim; i += 16)
            accumulate_4x16(&t, a, i, f, o);
    }
    for (; a < n_q; a++) {
        size_t i = 0;
        for (; i + TQKVK_LINE <= dim; i += TQKVK_LINE)
            accumulate_1x64(&t, a, i, f, o);
        for (; i < dim; i += 16)
            accumulate_1x16(&t, a, i, f, o);
    }
}
