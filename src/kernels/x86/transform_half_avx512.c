/* SPDX-License-Identifier: Apache-2.0 */
/*
 * As transform_avx512.c, of f16 values: up to four rows by 64 outputs share what is read and
 * converted. A matrix comes from memory here, and then one to four rows take the same time.
 */
#include "kernels/ask_ahead.h"
#include "kernels/tables.h"
#include "kernels/x86/tile_avx512.h"

TQKVK_INLINE __m512 load_16(const uint16_t *value, __m512 factor)
{
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const void *)value)), factor);
}

TQKVK_INLINE tqkvk_line load_line(const uint16_t *value, tqkvk_line factor)
{
    return (tqkvk_line){load_16(value, factor.a), load_16(value + 16, factor.b),
                        load_16(value + 32, factor.c), load_16(value + 48, factor.d)};
}

TQKVK_INLINE void store_line(float *to, tqkvk_line x)
{
    _mm512_storeu_ps(to, x.a);
    _mm512_storeu_ps(to + 16, x.b);
    _mm512_storeu_ps(to + 32, x.c);
    _mm512_storeu_ps(to + 48, x.d);
}

/* n: 1..4, a constant wherever it is called. Outputs j .. j + 63. */
TQKVK_INLINE void rows_by_64(const tqkvk_half_matrix *m, size_t j, const float *x, float *y,
                             size_t dim, int n)
{
    const tqkvk_line zero = tqkvk_line_zero(), factor = tqkvk_line_load(m->factor + j);
    const uint16_t *value = m->value + j;
    tqkvk_lines sum = {zero, zero, zero, zero};

    for (size_t i = 0; i < dim; i++, value += dim) {
        const tqkvk_line line = load_line(value, factor);
        tqkvk_ask_ahead(value, 2 * sizeof(__m512i));
        sum.r0 = tqkvk_line_fma(sum.r0, line, x[i]);
        if (n > 1)
            sum.r1 = tqkvk_line_fma(sum.r1, line, x[dim + i]);
        if (n > 2)
            sum.r2 = tqkvk_line_fma(sum.r2, line, x[2 * dim + i]);
        if (n > 3)
            sum.r3 = tqkvk_line_fma(sum.r3, line, x[3 * dim + i]);
    }
    store_line(y + j, sum.r0);
    if (n > 1)
        store_line(y + dim + j, sum.r1);
    if (n > 2)
        store_line(y + 2 * dim + j, sum.r2);
    if (n > 3)
        store_line(y + 3 * dim + j, sum.r3);
}

TQKVK_INLINE void rows_by_16(const tqkvk_half_matrix *m, size_t j, const float *x, float *y,
                             size_t dim, int n)
{
    const __m512 factor = _mm512_loadu_ps(m->factor + j);
    const uint16_t *value = m->value + j;
    __m512 r0 = _mm512_setzero_ps(), r1 = r0, r2 = r0, r3 = r0;

    for (size_t i = 0; i < dim; i++, value += dim) {
        const __m512 line = load_16(value, factor);
        tqkvk_ask_ahead(value, sizeof(__m256i));
        r0 = _mm512_fmadd_ps(line, _mm512_set1_ps(x[i]), r0);
        if (n > 1)
            r1 = _mm512_fmadd_ps(line, _mm512_set1_ps(x[dim + i]), r1);
        if (n > 2)
            r2 = _mm512_fmadd_ps(line, _mm512_set1_ps(x[2 * dim + i]), r2);
        if (n > 3)
            r3 = _mm512_fmadd_ps(line, _mm512_set1_ps(x[3 * dim + i]), r3);
    }
    _mm512_storeu_ps(y + j, r0);
    if (n > 1)
        _mm512_storeu_ps(y + dim + j, r1);
    if (n > 2)
        _mm512_storeu_ps(y + 2 * dim + j, r2);
    if (n > 3)
        _mm512_storeu_ps(y + 3 * dim + j, r3);
}

TQKVK_INLINE void few_rows(const tqkvk_half_matrix *m, const float *x, float *y, size_t dim, int n)
{
    size_t j = 0;

    for (; j + TQKVK_LINE <= dim; j += TQKVK_LINE)
        rows_by_64(m, j, x, y, dim, n);
    for (; j < dim; j += 16)
        rows_by_16(m, j, x, y, dim, n);
}

void tqkvk_transform_half_avx512(const tqkvk_half_matrix *m, const float *x, float *y, size_t dim,
                                 size_t n_rows)
{
    for (; n_rows >= 4; n_rows -= 4, x += 4 * dim, y += 4 * dim)
        few_rows(m, x, y, dim, 4);
    if (n_rows == 3)
        few_rows(m, x, y, dim, 3);
    else if (n_rows == 2)
        few_rows(m, x, y, dim, 2);
    else if (n_rows == 1)
        few_rows(m, x, y, dim, 1);
}
