/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Vector times matrix. Lanes are outputs, so that each output keeps its order of additions; eight
 * vectors of outputs stay in registers while i runs, which hides the latency of the additions.
 */
#include "kernels/arm/block_neon.h"
#include "kernels/tables.h"

static void transform_32(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four lo = tqkvk_four_zero();
    tqkvk_four hi = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim) {
        lo = tqkvk_four_add(lo, tqkvk_four_mul(tqkvk_four_load(m, 4), x[i]));
        hi = tqkvk_four_add(hi, tqkvk_four_mul(tqkvk_four_load(m + 16, 4), x[i]));
    }
    tqkvk_four_store(y, lo);
    tqkvk_four_store(y + 16, hi);
}

static void transform_16(const float *m, const float *x, float *y, size_t dim)
{
    tqkvk_four sum = tqkvk_four_zero();
    for (size_t i = 0; i < dim; i++, m += dim)
        sum = tqkvk_four_add(sum, tqkvk_four_mul(tqkvk_four_load(m, 4), x[i]));
    tqkvk_four_store(y, sum);
}

void tqkvk_transform_f32_neon(const float *m, const float *x, float *y, size_t dim)
{
    size_t j = 0;
    for (; j + 32 <= dim; j += 32)
        transform_32(m + j, x, y + j, dim);
    for (; j < dim; j += 16)
        transform_16(m + j, x, y + j, dim);
}
