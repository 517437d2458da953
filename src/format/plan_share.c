/* SPDX-License-Identifier: Apache-2.0 */
/* The part of a plan that one of several ranks needs, when query and KV heads are dealt out to them. */
#include <string.h>

#include "format/plan_data.h"

/* The share of a layer, and the KV head of the whole plan where it begins. */
static bool share_shape(const tqkv_plan_layer *whole, uint32_t rank, uint32_t n_ranks,
                        tqkv_plan_layer *shape, uint32_t *first)
{
    const bool is_shared = whole->n_kv_heads < n_ranks; /* by ranks that ask the same KV head */

    *shape = *whole;
    *first = 0;
    if (whole->n_kv_heads == 0)
        return true;
    if (whole->n_heads % n_ranks != 0 ||
        (is_shared ? n_ranks % whole->n_kv_heads : whole->n_kv_heads % n_ranks) != 0)
        return false;
    shape->n_heads = whole->n_heads / n_ranks;
    shape->n_kv_heads = is_shared ? 1 : whole->n_kv_heads / n_ranks;
    *first = is_shared ? rank / (n_ranks / whole->n_kv_heads) : rank * shape->n_kv_heads;
    return true;
}

static tqkv_status copy_head(tqkv_plan *share, uint32_t layer, tqkv_side side, uint32_t head,
                             const tqkvi_head_plan *from)
{
    const uint32_t dim = tqkvi_shape_dim(&share->layers[layer].shape, side);
    tqkvi_head_plan *to = &share->layers[layer].heads[side][head];

    memcpy(to->layout, from->layout, sizeof(to->layout));
    if (tqkvi_head_is_plain(from))
        return TQKV_OK;
    TQKV_TRY(tqkvi_plan_alloc_head(share, layer, side, head));
    memcpy(to->mean, from->mean, dim * sizeof(*to->mean));
    memcpy(to->transform, from->transform, (size_t)dim * dim * sizeof(*to->transform));
    memcpy(to->weight, from->weight, dim / TQKV_UNIT_CHANNELS * sizeof(*to->weight));
    return TQKV_OK;
}

/* Shares of all shapes; shapes: [n_layers] out. */
static bool share_shapes(const tqkv_plan *plan, uint32_t rank, uint32_t n_ranks,
                         tqkv_plan_layer *shapes)
{
    uint32_t first;

    for (uint32_t i = 0; i < plan->n_layers; i++)
        if (!share_shape(&plan->layers[i].shape, rank, n_ranks, &shapes[i], &first))
            return false;
    return true;
}

static tqkv_status fill(tqkv_plan *share, const tqkv_plan *plan, uint32_t rank, uint32_t n_ranks)
{
    share->n_tiers = plan->n_tiers;
    share->n_sinks = plan->n_sinks;
    share->frame_tokens = plan->frame_tokens;
    share->context = plan->context;
    share->bits_total = plan->bits_total;
    TQKV_TRY(tqkvi_plan_set_names(share, plan->model, plan->arch, plan->profile));
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        const tqkvi_layer_plan *whole = &plan->layers[i];
        tqkv_plan_layer shape;
        uint32_t first;
        (void)share_shape(&whole->shape, rank, n_ranks, &shape, &first);
        for (uint32_t g = 0; g < shape.n_kv_heads; g++) {
            TQKV_TRY(copy_head(share, i, TQKV_SIDE_K, g, &whole->heads[0][first + g]));
            TQKV_TRY(copy_head(share, i, TQKV_SIDE_V, g, &whole->heads[1][first + g]));
        }
    }
    return tqkvi_plan_seal(share, NULL);
}

tqkv_status tqkvi_plan_create_share(const tqkv_allocator *mem, const tqkv_plan *plan, uint32_t rank,
                                    uint32_t n_ranks, tqkv_plan **out)
{
    tqkv_allocator own;
    tqkv_plan *share = NULL;

    *out = NULL;
    tqkvi_allocator_init(&own, mem);
    tqkv_plan_layer *shapes = tqkvi_alloc(&own, plan->n_layers * sizeof(*shapes));
    if (!shapes)
        return TQKV_ERR_NO_MEMORY;
    tqkv_status status = TQKV_ERR_UNSUPPORTED;
    if (share_shapes(plan, rank, n_ranks, shapes))
        status = tqkvi_plan_create_bare(mem, shapes, plan->n_layers, &share);
    tqkvi_free(&own, shapes);
    if (status == TQKV_OK)
        status = fill(share, plan, rank, n_ranks);
    if (status != TQKV_OK) {
        tqkvi_plan_destroy(share);
        return status;
    }
    *out = share;
    return TQKV_OK;
}
