/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "base/half.h"
#include "kernels/tables.h"

void tqkvk_transform_half_ref(const tqkvk_half_matrix *m, const float *x, float *y, size_t dim,
                              size_t n_rows)
{
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t j = 0; j < dim; j++) {
            float sum = 0.0f;
            for (size_t i = 0; i < dim; i++) {
                const float value = tqkvi_half_to_float(m->value[i * dim + j]);
                sum = fmaf(value * m->factor[j], x[r * dim + i], sum);
            }
            y[r * dim + j] = sum;
        }
    }
}
