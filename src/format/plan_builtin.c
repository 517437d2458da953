/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plans without calibration. f16 stores rows as they are. q8 spreads outliers with a Hadamard
 * transform (mean 0, weights 1) and gives every unit 8 bits.
 */
#include <string.h>

#include "format/plan_data.h"

#define SQRT_HALF 0.70710678f
/*
 * Scales reach from 2^-8 to 2^8. Values of V are smaller than those of K, about .01 to 10 where K
 * has .1 to 100: this puts both in the middle.
 */
#define V_GAIN 8.0f

static uint32_t parity(uint32_t x)
{
    uint32_t odd = 0;
    for (; x != 0; x &= x - 1)
        odd ^= 1u;
    return odd;
}

/*
 * Orthonormal but for `gain`: Walsh-Hadamard matrices on the diagonal, as large as the largest power
 * of two that divides dim.
 */
static void hadamard(float *m, uint32_t dim, float gain)
{
    const uint32_t block = dim & (~dim + 1u);
    float size = gain;
    uint32_t left = block;
    for (; left >= 4; left /= 4)
        size *= 0.5f;
    if (left == 2)
        size *= SQRT_HALF;
    for (uint32_t i = 0; i < dim; i++) {
        /* Without signs, equal values in every channel would all meet in one output. */
        const uint32_t sign = parity((i + 1) * 0x9e3779b1u);
        const uint32_t first = i / block * block;
        for (uint32_t j = first; j < first + block; j++)
            m[(size_t)i * dim + j] = parity(i & j & (block - 1)) == sign ? size : -size;
    }
}

static tqkv_status fill_head(tqkv_plan *plan, tqkv_builtin kind, tqkv_side side, uint32_t head)
{
    tqkvi_head_plan *h = &plan->layers[0].heads[side][head];
    const uint32_t dim = tqkvi_shape_dim(&plan->layers[0].shape, side);
    const uint32_t n_units = dim / TQKV_UNIT_CHANNELS;
    uint8_t bits[TQKV_UNITS_MAX];
    memset(bits, kind == TQKV_BUILTIN_F16 ? TQKVI_BITS_PLAIN : 8, sizeof(bits));
    TQKV_TRY(tqkvi_layout_init(&h->layout[0], bits, n_units));
    if (kind == TQKV_BUILTIN_F16)
        return TQKV_OK;

    TQKV_TRY(tqkvi_plan_alloc_head(plan, 0, side, head));
    hadamard(h->transform, dim, side == TQKV_SIDE_K ? 1.0f : V_GAIN);
    tqkvi_transform_round(h->transform, dim);
    for (uint32_t i = 0; i < n_units; i++)
        h->weight[i] = 1.0f;
    return TQKV_OK;
}

static tqkv_status fill(tqkv_plan *plan, tqkv_builtin kind)
{
    const tqkv_plan_layer *shape = &plan->layers[0].shape;
    plan->n_tiers = 1;
    plan->frame_tokens =
        TQKVI_FRAME_TOKENS_MAX; /* no mean to align: K stays where its position put it */
    plan->context = 1;
    for (uint32_t g = 0; g < shape->n_kv_heads; g++) {
        TQKV_TRY(fill_head(plan, kind, TQKV_SIDE_K, g));
        TQKV_TRY(fill_head(plan, kind, TQKV_SIDE_V, g));
    }
    tqkvi_layer_set_token_bytes(&plan->layers[0], 1);
    const double n_values = (double)shape->n_kv_heads * (shape->k_dim + shape->v_dim);
    plan->bits_total = shape->token_bytes[0] * 8.0 / n_values;
    TQKV_TRY(tqkvi_plan_set_names(plan, "", "", kind == TQKV_BUILTIN_F16 ? "f16" : "q8"));
    return tqkvi_plan_seal(plan, NULL);
}

static bool dim_is_supported(uint32_t dim)
{
    return dim % TQKV_UNIT_CHANNELS == 0 && dim <= TQKVI_DIM_MAX;
}

tqkv_status tqkvi_plan_create_builtin(const tqkv_allocator *mem, tqkv_builtin kind,
                                      const tqkv_plan_layer *shape, tqkv_plan **out)
{
    *out = NULL;
    if ((kind != TQKV_BUILTIN_F16 && kind != TQKV_BUILTIN_Q8) || shape->n_kv_heads == 0)
        return TQKV_ERR_INVALID_ARG;
    if (shape->k_dim == 0 || shape->v_dim == 0)
        return TQKV_ERR_INVALID_ARG;
    if (!dim_is_supported(shape->k_dim) || !dim_is_supported(shape->v_dim))
        return TQKV_ERR_UNSUPPORTED;

    tqkv_plan_layer own = *shape;
    memset(own.tier_tokens, 0, sizeof(own.tier_tokens));
    tqkv_plan *plan;
    TQKV_TRY(tqkvi_plan_create_bare(mem, &own, 1, &plan));
    const tqkv_status status = fill(plan, kind);
    if (status != TQKV_OK) {
        tqkvi_plan_destroy(plan);
        return status;
    }
    *out = plan;
    return TQKV_OK;
}
