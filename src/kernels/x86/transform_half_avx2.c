/* SPDX-License-Identifier: Apache-2.0 */
/* As transform_avx2.c, of f16 values: of one row 32 outputs, or of up to four rows 16. */
#include "kernels/ask_ahead.h"
#include "kernels/by_width.h"
#include "kernels/tables.h"
#include "kernels/x86/block_avx2.h"

TQKVK_INLINE __m256 load_8(const uint16_t *value, __m256 factor)
{
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *)value)), factor);
}

static void row_by_32(const tqkvk_half_matrix *m, size_t j, const float *x, float *y, size_t dim)
{
    const tqkvk_four factor = tqkvk_four_load(m->factor + j, 8);
    const uint16_t *value = m->value + j;
    tqkvk_four sum = tqkvk_four_zero();

    for (size_t i = 0; i < dim; i++, value += dim) {
        const tqkvk_four line = {load_8(value, factor.v0), load_8(value + 8, factor.v1),
                                 load_8(value + 16, factor.v2), load_8(value + 24, factor.v3)};
        tqkvk_ask_ahead(value, 2 * sizeof(__m256i));
        sum = tqkvk_four_fma(sum, line, _mm256_broadcast_ss(x + i));
    }
    tqkvk_four_store(y + j, sum);
}

/* One vector of outputs of up to four rows; n a constant wherever it is called. */
TQKVK_INLINE tqkvk_four add_rows(tqkvk_four sum, __m256 line, const float *x, size_t dim, int n)
{
    sum.v0 = _mm256_fmadd_ps(line, _mm256_broadcast_ss(x), sum.v0);
    if (n > 1)
        sum.v1 = _mm256_fmadd_ps(line, _mm256_broadcast_ss(x + dim), sum.v1);
    if (n > 2)
        sum.v2 = _mm256_fmadd_ps(line, _mm256_broadcast_ss(x + 2 * dim), sum.v2);
    if (n > 3)
        sum.v3 = _mm256_fmadd_ps(line, _mm256_broadcast_ss(x + 3 * dim), sum.v3);
    return sum;
}

TQKVK_INLINE void store_rows(float *y, size_t dim, tqkvk_four sum, int n)
{
    _mm256_store_ps(y, sum.v0);
    if (n > 1)
        _mm256_store_ps(y + dim, sum.v1);
    if (n > 2)
        _mm256_store_ps(y + 2 * dim, sum.v2);
    if (n > 3)
        _mm256_store_ps(y + 3 * dim, sum.v3);
}

TQKVK_INLINE void few_rows(const tqkvk_half_matrix *m, size_t j, const float *x, float *y,
                           size_t dim, int n)
{
    for (; j < dim; j += 16) {
        const __m256 low = _mm256_load_ps(m->factor + j), high = _mm256_load_ps(m->factor + j + 8);
        const uint16_t *value = m->value + j;
        tqkvk_four lo = tqkvk_four_zero(), hi = tqkvk_four_zero();
        for (size_t i = 0; i < dim; i++, value += dim) {
            tqkvk_ask_ahead(value, sizeof(__m256i));
            lo = add_rows(lo, load_8(value, low), x + i, dim, n);
            hi = add_rows(hi, load_8(value + 8, high), x + i, dim, n);
        }
        store_rows(y + j, dim, lo, n);
        store_rows(y + j + 8, dim, hi, n);
    }
}

void tqkvk_transform_half_avx2(const tqkvk_half_matrix *m, const float *x, float *y, size_t dim,
                               size_t n_rows)
{
    size_t j = 0;

    for (; n_rows >= 4; n_rows -= 4, x += 4 * dim, y += 4 * dim)
        few_rows(m, 0, x, y, dim, 4);
    if (n_rows == 3) {
        few_rows(m, 0, x, y, dim, 3);
    } else if (n_rows == 2) {
        few_rows(m, 0, x, y, dim, 2);
    } else if (n_rows == 1) {
        for (; j + 32 <= dim; j += 32)
            row_by_32(m, j, x, y, dim);
        few_rows(m, j, x, y, dim, 1);
    }
}
