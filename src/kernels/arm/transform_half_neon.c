/* SPDX-License-Identifier: Apache-2.0 */
/* As transform_neon.c, of f16 values: of one row 16 outputs at a time, or of four rows. */
#include "kernels/arm/block_neon.h"
#include "kernels/ask_ahead.h"
#include "kernels/tables.h"

static inline float32x4_t load_4(const uint16_t *value, float32x4_t factor)
{
    return vmulq_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(value))), factor);
}

static inline tqkvk_four load_16(const uint16_t *value, tqkvk_four factor)
{
    return (tqkvk_four){load_4(value, factor.v0), load_4(value + 4, factor.v1),
                        load_4(value + 8, factor.v2), load_4(value + 12, factor.v3)};
}

static void row_by_16(const tqkvk_half_matrix *m, size_t j, const float *x, float *y, size_t dim)
{
    const tqkvk_four factor = tqkvk_four_load(m->factor + j, 4);
    const uint16_t *value = m->value + j;
    tqkvk_four sum = tqkvk_four_zero();

    for (size_t i = 0; i < dim; i++, value += dim) {
        tqkvk_ask_ahead(value, 2 * sizeof(uint16x8_t));
        sum = tqkvk_four_fma_n(sum, load_16(value, factor), x[i]);
    }
    tqkvk_four_store(y + j, sum);
}

static void four_rows_by_16(const tqkvk_half_matrix *m, size_t j, const float *x, float *y,
                            size_t dim)
{
    const tqkvk_four factor = tqkvk_four_load(m->factor + j, 4);
    const uint16_t *value = m->value + j;
    tqkvk_four sum0 = tqkvk_four_zero(), sum1 = sum0, sum2 = sum0, sum3 = sum0;

    for (size_t i = 0; i < dim; i++, value += dim) {
        const tqkvk_four line = load_16(value, factor);
        tqkvk_ask_ahead(value, 2 * sizeof(uint16x8_t));
        sum0 = tqkvk_four_fma_n(sum0, line, x[i]);
        sum1 = tqkvk_four_fma_n(sum1, line, x[dim + i]);
        sum2 = tqkvk_four_fma_n(sum2, line, x[2 * dim + i]);
        sum3 = tqkvk_four_fma_n(sum3, line, x[3 * dim + i]);
    }
    tqkvk_four_store(y + j, sum0);
    tqkvk_four_store(y + dim + j, sum1);
    tqkvk_four_store(y + 2 * dim + j, sum2);
    tqkvk_four_store(y + 3 * dim + j, sum3);
}

void tqkvk_transform_half_neon(const tqkvk_half_matrix *m, const float *x, float *y, size_t dim,
                               size_t n_rows)
{
    for (; n_rows >= 4; n_rows -= 4, x += 4 * dim, y += 4 * dim)
        for (size_t j = 0; j < dim; j += 16)
            four_rows_by_16(m, j, x, y, dim);
    for (; n_rows > 0; n_rows--, x += dim, y += dim)
        for (size_t j = 0; j < dim; j += 16)
            row_by_16(m, j, x, y, dim);
}
