/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Four rows times a matrix, 64 columns at a time: 16 sums in registers while the inner index runs,
 * 4 loads and 4 broadcasts for 16 multiply-adds. A line is 64 columns of one row.
 */
#ifndef TQKVK_TILE_AVX512_H
#define TQKVK_TILE_AVX512_H

#include <immintrin.h>

#include "kernels/by_width.h"

#define TQKVK_LINE 64

typedef struct tqkvk_line {
    __m512 a, b, c, d;
} tqkvk_line;

typedef struct tqkvk_lines {
    tqkvk_line r0, r1, r2, r3;
} tqkvk_lines;

TQKVK_INLINE tqkvk_line tqkvk_line_zero(void)
{
    const __m512 zero = _mm512_setzero_ps();
    return (tqkvk_line){zero, zero, zero, zero};
}

TQKVK_INLINE tqkvk_line tqkvk_line_load(const float *from)
{
    return (tqkvk_line){_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16),
                        _mm512_loadu_ps(from + 32), _mm512_loadu_ps(from + 48)};
}

TQKVK_INLINE tqkvk_line tqkvk_line_mul(tqkvk_line x, float f)
{
    const __m512 factor = _mm512_set1_ps(f);
    return (tqkvk_line){_mm512_mul_ps(x.a, factor), _mm512_mul_ps(x.b, factor),
                        _mm512_mul_ps(x.c, factor), _mm512_mul_ps(x.d, factor)};
}

TQKVK_INLINE tqkvk_line tqkvk_line_fma(tqkvk_line sum, tqkvk_line x, float f)
{
    const __m512 factor = _mm512_set1_ps(f);
    return (tqkvk_line){
        _mm512_fmadd_ps(x.a, factor, sum.a), _mm512_fmadd_ps(x.b, factor, sum.b),
        _mm512_fmadd_ps(x.c, factor, sum.c), _mm512_fmadd_ps(x.d, factor, sum.d)};
}

/* sum += sum over i < n of p[i] * v[i * v_stride ..] */
TQKVK_INLINE tqkvk_line tqkvk_line_sum(tqkvk_line sum, const float *p, const float *v,
                                       size_t v_stride, size_t n)
{
    for (size_t i = 0; i < n; i++, v += v_stride)
        sum = tqkvk_line_fma(sum, tqkvk_line_load(v), p[i]);
    return sum;
}

/* The same of four rows: sum.r[a] += sum over i < n of p[a * p_stride + i] * v[i * v_stride ..] */
TQKVK_INLINE tqkvk_lines tqkvk_lines_sum(tqkvk_lines sum, const float *p, size_t p_stride,
                                         const float *v, size_t v_stride, size_t n)
{
    for (size_t i = 0; i < n; i++, p++, v += v_stride) {
        const tqkvk_line x = tqkvk_line_load(v);
        sum.r0 = tqkvk_line_fma(sum.r0, x, p[0]);
        sum.r1 = tqkvk_line_fma(sum.r1, x, p[p_stride]);
        sum.r2 = tqkvk_line_fma(sum.r2, x, p[2 * p_stride]);
        sum.r3 = tqkvk_line_fma(sum.r3, x, p[3 * p_stride]);
    }
    return sum;
}

#endif /* TQKVK_TILE_AVX512_H */
