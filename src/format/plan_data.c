/* SPDX-License-Identifier: Apache-2.0 */
/* The plan as an object: its memory, its names and the rounding of transforms. */
#include "format/plan_data.h"

#include <string.h>

#include "base/half.h"

static tqkv_status layer_init(tqkv_plan *plan, tqkvi_layer_plan *layer,
                              const tqkv_plan_layer *shape)
{
    if (shape->n_kv_heads == 0)
        return TQKV_OK; /* all zero, as the plan's memory is */
    layer->shape = *shape;
    layer->shape.rope.inv_freq = NULL;
    memset(layer->shape.token_bytes, 0, sizeof(layer->shape.token_bytes));
    if (shape->rope.style == TQKV_ROPE_NONE) {
        layer->shape.rope.n_rot = 0;
    } else {
        const size_t n_bytes = shape->rope.n_rot / 2 * sizeof(float);
        layer->inv_freq = tqkvi_alloc(&plan->mem, n_bytes);
        if (!layer->inv_freq)
            return TQKV_ERR_NO_MEMORY;
        memcpy(layer->inv_freq, shape->rope.inv_freq, n_bytes);
        layer->shape.rope.inv_freq = layer->inv_freq;
    }
    for (size_t side = 0; side < 2; side++) {
        layer->heads[side] =
            tqkvi_alloc_zero(&plan->mem, shape->n_kv_heads * sizeof(tqkvi_head_plan));
        if (!layer->heads[side])
            return TQKV_ERR_NO_MEMORY;
    }
    return TQKV_OK;
}

tqkv_status tqkvi_plan_create_bare(const tqkv_allocator *mem, const tqkv_plan_layer *shapes,
                                   uint32_t n_layers, tqkv_plan **out)
{
    *out = NULL;
    if (!shapes || n_layers == 0 || n_layers > TQKVI_LAYERS_MAX)
        return TQKV_ERR_INVALID_ARG;
    for (uint32_t i = 0; i < n_layers; i++) {
        if (tqkvi_shape_fault(&shapes[i]))
            return TQKV_ERR_INVALID_ARG;
    }
    tqkv_allocator own;
    tqkvi_allocator_init(&own, mem);
    tqkv_plan *plan = tqkvi_alloc_zero(&own, sizeof(*plan));
    if (!plan)
        return TQKV_ERR_NO_MEMORY;
    plan->mem = own;
    plan->layers = tqkvi_alloc_zero(&own, n_layers * sizeof(*plan->layers));
    if (!plan->layers)
        goto no_memory;
    plan->n_layers = n_layers;
    if (tqkvi_plan_set_names(plan, NULL, NULL, NULL) != TQKV_OK)
        goto no_memory;
    for (uint32_t i = 0; i < n_layers; i++) {
        if (layer_init(plan, &plan->layers[i], &shapes[i]) != TQKV_OK)
            goto no_memory;
    }
    *out = plan;
    return TQKV_OK;

no_memory:
    tqkvi_plan_destroy(plan); /* safe on a half-built plan */
    return TQKV_ERR_NO_MEMORY;
}

tqkv_status tqkvi_plan_alloc_head(tqkv_plan *plan, uint32_t layer, tqkv_side side, uint32_t head)
{
    const size_t dim = tqkvi_shape_dim(&plan->layers[layer].shape, side);
    tqkvi_head_plan *h = &plan->layers[layer].heads[side][head];

    /* One block: mean, transform, weight. dim is a multiple of 16, so each part is aligned. */
    const size_t n_floats = dim + dim * dim + dim / TQKV_UNIT_CHANNELS;
    h->mean = tqkvi_alloc_zero(&plan->mem, n_floats * sizeof(float));
    if (!h->mean)
        return TQKV_ERR_NO_MEMORY;
    h->transform = h->mean + dim;
    h->weight = h->transform + dim * dim;
    return TQKV_OK;
}

tqkv_status tqkvi_plan_create(const tqkv_allocator *mem, const tqkv_plan_layer *shapes,
                              uint32_t n_layers, tqkv_plan **out)
{
    tqkv_plan *plan;
    *out = NULL;
    TQKV_TRY(tqkvi_plan_create_bare(mem, shapes, n_layers, &plan));
    for (uint32_t i = 0; i < n_layers; i++) {
        for (uint32_t g = 0; g < plan->layers[i].shape.n_kv_heads; g++) {
            if (tqkvi_plan_alloc_head(plan, i, TQKV_SIDE_K, g) != TQKV_OK ||
                tqkvi_plan_alloc_head(plan, i, TQKV_SIDE_V, g) != TQKV_OK) {
                tqkvi_plan_destroy(plan);
                return TQKV_ERR_NO_MEMORY;
            }
        }
    }
    *out = plan;
    return TQKV_OK;
}

void tqkvi_plan_destroy(tqkv_plan *plan)
{
    if (!plan)
        return;
    const tqkv_allocator mem = plan->mem;
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        tqkvi_layer_plan *layer = &plan->layers[i];
        for (size_t side = 0; side < 2; side++) {
            for (uint32_t g = 0; layer->heads[side] && g < layer->shape.n_kv_heads; g++)
                tqkvi_free(&mem, layer->heads[side][g].mean); /* first part of the head's block */
            tqkvi_free(&mem, layer->heads[side]);
        }
        tqkvi_free(&mem, layer->inv_freq);
    }
    tqkvi_free(&mem, plan->layers);
    tqkvi_free(&mem, plan->model);
    tqkvi_free(&mem, plan->arch);
    tqkvi_free(&mem, plan->profile);
    tqkvi_free(&mem, plan);
}

static char *copy_text(const tqkv_allocator *mem, const char *text)
{
    const size_t n_bytes = text ? strlen(text) : 0;
    char *copy = tqkvi_alloc_zero(mem, n_bytes + 1);
    if (copy && n_bytes > 0)
        memcpy(copy, text, n_bytes);
    return copy;
}

tqkv_status tqkvi_plan_set_names(tqkv_plan *plan, const char *model, const char *arch,
                                 const char *profile)
{
    char **fields[3] = {&plan->model, &plan->arch, &plan->profile};
    char *copies[3] = {copy_text(&plan->mem, model), copy_text(&plan->mem, arch),
                       copy_text(&plan->mem, profile)};

    if (!copies[0] || !copies[1] || !copies[2]) {
        for (size_t i = 0; i < 3; i++)
            tqkvi_free(&plan->mem, copies[i]);
        return TQKV_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < 3; i++) {
        tqkvi_free(&plan->mem, *fields[i]);
        *fields[i] = copies[i];
    }
    return TQKV_OK;
}

void tqkvi_layer_set_token_bytes(tqkvi_layer_plan *layer, uint32_t n_tiers)
{
    for (uint32_t tier = 0; tier < n_tiers; tier++) {
        uint32_t n_bytes = 0;
        for (uint32_t g = 0; g < layer->shape.n_kv_heads; g++) {
            n_bytes += layer->heads[0][g].layout[tier].row_bytes + 1;
            n_bytes += layer->heads[1][g].layout[tier].row_bytes + 1;
        }
        layer->shape.token_bytes[tier] = n_bytes;
    }
}

void tqkvi_layer_block_layout(const tqkvi_layer_plan *layer, uint32_t tier, uint32_t *sections,
                              tqkvi_block_layout *out)
{
    const uint32_t n_heads = layer->shape.n_kv_heads;
    uint64_t at = 0; /* at most 4096 heads of 2 * 33 KiB: fits in u32 */

    *out = (tqkvi_block_layout){.n_kv_heads = n_heads, .section = {sections, sections + n_heads}};
    for (uint32_t g = 0; g < n_heads; g++) {
        for (uint32_t side = 0; side < 2; side++) {
            out->section[side][g] = (uint32_t)at;
            at += (uint64_t)TQKVI_BLOCK_TOKENS *
                  (1 + (uint64_t)layer->heads[side][g].layout[tier].row_bytes);
        }
    }
    out->block_bytes = (uint32_t)at;
}

int tqkvi_column_exponent(const float *column, uint32_t dim)
{
    float largest = 0.0f;
    for (uint32_t i = 0; i < dim; i++) {
        const float size = column[i] < 0.0f ? -column[i] : column[i];
        largest = size > largest ? size : largest;
    }
    if (largest == 0.0f)
        return 0;
    int e = 0;
    for (; largest >= 0x1p15f && e < TQKVI_EXPONENT_MAX; e++)
        largest *= 0.5f;
    for (; largest < 0x1p14f && e > TQKVI_EXPONENT_MIN; e--)
        largest *= 2.0f;
    return e;
}

void tqkvi_column_round(float *column, uint32_t dim)
{
    int e = tqkvi_column_exponent(column, dim);
    bool carried;
    do {
        const float up = tqkvi_power_of_two(-e);
        const float down = tqkvi_power_of_two(e);
        carried = false;
        for (uint32_t i = 0; i < dim; i++) {
            const float rounded = tqkvi_half_to_float(tqkvi_float_to_half(column[i] * up));
            carried = carried || rounded == 0x1p15f || rounded == -0x1p15f;
            column[i] = rounded * down;
        }
        /* The largest rounded up to 2^15: once more with the exponent that it has now. */
    } while (carried && e++ < TQKVI_EXPONENT_MAX);
}

void tqkvi_transform_column(const float *m, uint32_t dim, uint32_t j, float *column)
{
    for (uint32_t i = 0; i < dim; i++)
        column[i] = m[(size_t)i * dim + j];
}

void tqkvi_transform_round(float *m, uint32_t dim)
{
    for (uint32_t j = 0; j < dim; j++) {
        float column[TQKVI_DIM_MAX];
        tqkvi_transform_column(m, dim, j, column);
        tqkvi_column_round(column, dim);
        for (uint32_t i = 0; i < dim; i++)
            m[(size_t)i * dim + j] = column[i];
    }
}
