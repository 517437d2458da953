/* SPDX-License-Identifier: Apache-2.0 */
/* The factors, then the values. */
#include "codec/half_matrix.h"

#include <string.h>

#include "base/alloc.h"
#include "base/half.h"
#include "format/bytes.h"
#include "format/plan_data.h"

static size_t factor_bytes(uint32_t dim)
{
    return tqkvi_align_up(dim * sizeof(float));
}

size_t tqkvi_half_matrix_bytes(uint32_t dim)
{
    return factor_bytes(dim) + tqkvi_align_up((size_t)dim * dim * sizeof(uint16_t));
}

/* Column j to its place; false where `rounded` does not allow what it became, or it is infinite. */
static bool put_column(const float *column, uint32_t dim, uint32_t j, bool rounded, float *factor,
                       uint16_t *value)
{
    float kept[TQKVI_DIM_MAX];
    bool good = true;

    memcpy(kept, column, dim * sizeof(*kept));
    tqkvi_column_round(kept, dim);
    const int e = tqkvi_column_exponent(kept, dim);
    const float up = tqkvi_power_of_two(-e);
    factor[j] = tqkvi_power_of_two(e);
    for (uint32_t i = 0; i < dim; i++) {
        const uint16_t half = tqkvi_float_to_half(kept[i] * up);
        value[(size_t)i * dim + j] = half;
        good = good && (half & 0x7c00u) != 0x7c00u && (rounded || kept[i] == column[i]);
    }
    return good;
}

void tqkvi_half_matrix_init(tqkvk_half_matrix *half, void *memory, const float *m, size_t row,
                            size_t column, uint32_t dim, bool rounded)
{
    float *factor = memory;
    uint16_t *value = (uint16_t *)(void *)((uint8_t *)memory + factor_bytes(dim));
    float x[TQKVI_DIM_MAX];
    bool good = true;

    for (uint32_t j = 0; j < dim && good; j++) {
        for (uint32_t i = 0; i < dim; i++)
            x[i] = m[i * row + j * column];
        good = put_column(x, dim, j, rounded, factor, value);
    }
    *half = (tqkvk_half_matrix){.value = good ? value : NULL, .factor = factor};
}
