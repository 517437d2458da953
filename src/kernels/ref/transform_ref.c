/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/tables.h"

void tqkvk_transform_f32_ref(const float *m, const float *x, float *y, size_t dim)
{
    for (size_t j = 0; j < dim; j++) {
        float sum = 0.0f;
        for (size_t i = 0; i < dim; i++) {
            const float product = m[i * dim + j] * x[i];
            sum = sum + product;
        }
        y[j] = sum;
    }
}
