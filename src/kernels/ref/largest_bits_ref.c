/* SPDX-License-Identifier: Apache-2.0 */
#include "format/bytes.h"
#include "kernels/tables.h"

uint32_t tqkvk_largest_bits_ref(const float *x, size_t n)
{
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = tqkvi_bits_of_float(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}
