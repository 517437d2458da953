/* SPDX-License-Identifier: Apache-2.0 */
/* As transform_avx2.c, with vectors of sixteen: of one row 64 outputs, or of four rows 32. */
#include <immintrin.h>

#include "kernels/tables.h"

static void transform_64(const float *m, const float *x, float *y, size_t dim)
{
    __m512 y0 = _mm512_setzero_ps(), y1 = y0, y2 = y0, y3 = y0;
    for (size_t i = 0; i < dim; i++, m += dim) {
        const __m512 xi = _mm512_set1_ps(x[i]);
        y0 = _mm512_fmadd_ps(_mm512_load_ps(m), xi, y0);
        y1 = _mm512_fmadd_ps(_mm512_load_ps(m + 16), xi, y1);
        y2 = _mm512_fmadd_ps(_mm512_load_ps(m + 32), xi, y2);
        y3 = _mm512_fmadd_ps(_mm512_load_ps(m + 48), xi, y3);
    }
    _mm512_store_ps(y, y0);
    _mm512_store_ps(y + 16, y1);
    _mm512_store_ps(y + 32, y2);
    _mm512_store_ps(y + 48, y3);
}

static void transform_16(const float *m, const float *x, float *y, size_t dim)
{
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < dim; i++, m += dim)
        sum = _mm512_fmadd_ps(_mm512_load_ps(m), _mm512_set1_ps(x[i]), sum);
    _mm512_store_ps(y, sum);
}

/* One vector of outputs of four rows. */
typedef struct four_rows {
    __m512 r0, r1, r2, r3;
} four_rows;

static inline four_rows four_rows_zero(void)
{
    const __m512 zero = _mm512_setzero_ps();
    return (four_rows){zero, zero, zero, zero};
}

/* One vector of the matrix times the same channel of the rows. */
static inline four_rows four_rows_fma(four_rows sum, __m512 m, const float *x, size_t dim)
{
    return (four_rows){_mm512_fmadd_ps(m, _mm512_set1_ps(x[0]), sum.r0),
                       _mm512_fmadd_ps(m, _mm512_set1_ps(x[dim]), sum.r1),
                       _mm512_fmadd_ps(m, _mm512_set1_ps(x[2 * dim]), sum.r2),
                       _mm512_fmadd_ps(m, _mm512_set1_ps(x[3 * dim]), sum.r3)};
}

static inline void four_rows_store(float *y, size_t dim, four_rows a)
{
    _mm512_store_ps(y, a.r0);
    _mm512_store_ps(y + dim, a.r1);
    _mm512_store_ps(y + 2 * dim, a.r2);
    _mm512_store_ps(y + 3 * dim, a.r3);
}

static void transform_4_32(const float *m, const float *x, float *y, size_t dim)
{
    four_rows lo = four_rows_zero(), hi = four_rows_zero();
    for (size_t i = 0; i < dim; i++, m += dim) {
        lo = four_rows_fma(lo, _mm512_load_ps(m), x + i, dim);
        hi = four_rows_fma(hi, _mm512_load_ps(m + 16), x + i, dim);
    }
    four_rows_store(y, dim, lo);
    four_rows_store(y + 16, dim, hi);
}

static void transform_4_16(const float *m, const float *x, float *y, size_t dim)
{
    four_rows sum = four_rows_zero();
    for (size_t i = 0; i < dim; i++, m += dim)
        sum = four_rows_fma(sum, _mm512_load_ps(m), x + i, dim);
    four_rows_store(y, dim, sum);
}

void tqkvk_transform_f32_avx512(const float *m, const float *x, float *y, size_t dim, size_t n_rows)
{
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        size_t j = 0;
        for (; j + 32 <= dim; j += 32)
            transform_4_32(m + j, x + r * dim, y + r * dim + j, dim);
        if (j < dim)
            transform_4_16(m + j, x + r * dim, y + r * dim + j, dim);
    }
    for (; r < n_rows; r++) {
        size_t j = 0;
        for (; j + 64 <= dim; j += 64)
            transform_64(m + j, x + r * dim, y + r * dim + j, dim);
        for (; j < dim; j += 16)
            transform_16(m + j, x + r * dim, y + r * dim + j, dim);
    }
}
