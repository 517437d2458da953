/* SPDX-License-Identifier: Apache-2.0 */
/* One block of memory: the factors, then the values. */
#include "codec/half_matrix.h"

#include <string.h>

#include "base/half.h"
#include "format/bytes.h"
#include "format/plan_data.h"

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

static tqkv_status init(tqkvk_half_matrix *half, const float *m, size_t row, size_t column,
                        uint32_t dim, bool rounded, const tqkv_allocator *mem)
{
    const size_t factor_bytes = dim * sizeof(float);
    float x[TQKVI_DIM_MAX];
    bool good = true;

    *half = (tqkvk_half_matrix){.value = NULL};
    float *factor = tqkvi_alloc(mem, factor_bytes + (size_t)dim * dim * sizeof(uint16_t));
    if (!factor)
        return TQKV_ERR_NO_MEMORY;
    uint16_t *value = (uint16_t *)(void *)((uint8_t *)factor + factor_bytes);
    for (uint32_t j = 0; j < dim && good; j++) {
        for (uint32_t i = 0; i < dim; i++)
            x[i] = m[i * row + j * column];
        good = put_column(x, dim, j, rounded, factor, value);
    }
    if (good)
        *half = (tqkvk_half_matrix){.value = value, .factor = factor};
    else
        tqkvi_free(mem, factor);
    return TQKV_OK;
}

tqkv_status tqkvi_half_matrix_init(tqkvk_half_matrix *half, const float *m, uint32_t dim,
                                   bool rounded, const tqkv_allocator *mem)
{
    return init(half, m, dim, 1, dim, rounded, mem);
}

tqkv_status tqkvi_half_matrix_init_transposed(tqkvk_half_matrix *half, const float *m, uint32_t dim,
                                              bool rounded, const tqkv_allocator *mem)
{
    return init(half, m, 1, dim, dim, rounded, mem);
}

void tqkvi_half_matrix_deinit(tqkvk_half_matrix *half, const tqkv_allocator *mem)
{
    tqkvi_free(mem, (void *)(uintptr_t)half->factor);
    *half = (tqkvk_half_matrix){.value = NULL};
}
