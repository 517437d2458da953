/* SPDX-License-Identifier: Apache-2.0 */
#include "base/half.h"
#include "kernels/tables.h"

#include <string.h>

/* The arrays may lie anywhere, so that values are copied before they are looked at. */
void tqkvk_half_to_float_ref(const void *x, float *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, (const uint8_t *)x + i * sizeof(half), sizeof(half));
        const float value = tqkvi_half_to_float(half);
        memcpy((uint8_t *)out + i * sizeof(value), &value, sizeof(value));
    }
}

void tqkvk_float_to_half_ref(const float *x, void *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float value;
        memcpy(&value, (const uint8_t *)x + i * sizeof(value), sizeof(value));
        const uint16_t half = tqkvi_float_to_half(value);
        memcpy((uint8_t *)out + i * sizeof(half), &half, sizeof(half));
    }
}
