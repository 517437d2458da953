/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "kernels/tables.h"

void tqkvk_transform_f32_ref(const float *m, const float *x, float *y, size_t dim, size_t n_rows)
{
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t j = 0; j < dim; j++) {
            float sum = 0.0f;
            for (size_t i = 0; i < dim; i++)
                sum = fmaf(m[i * dim + j], x[r * dim + i], sum);
            y[r * dim + j] = sum;
        }
    }
}

void tqkvk_hadamard_f32_ref(const float *factor, const float *x, float *y, size_t dim, size_t block)
{
    for (size_t i = 0; i < dim; i++)
        y[i] = factor[i] * x[i];
    for (size_t n = 1; n < block; n *= 2) {
        for (size_t j = 0; j < dim; j++) {
            if (j & n)
                continue;
            const float a = y[j], b = y[j + n];
            y[j] = a + b;
            y[j + n] = a - b;
        }
    }
}
