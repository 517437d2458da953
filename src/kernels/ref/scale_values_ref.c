/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/levels.h"
#include "kernels/tables.h"

void tqkvk_scale_values_ref(const uint8_t *scales, size_t n, float *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = tqkvk_scale_values[scales[i]];
}
