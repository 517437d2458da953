/* SPDX-License-Identifier: Apache-2.0 */
/* Public functions of plan.h. */
#include <string.h>

#include "format/plan_data.h"

tqkv_status tqkv_plan_read(const void *bytes, size_t n_bytes, const tqkv_logger *log,
                           tqkv_plan **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!bytes)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_plan_parse(NULL, bytes, n_bytes, log, out);
}

tqkv_status tqkv_plan_load(const char *path, const tqkv_logger *log, tqkv_plan **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!path)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_plan_load_file(NULL, path, log, out);
}

tqkv_status tqkv_plan_save(const tqkv_plan *plan, const char *path, const tqkv_logger *log)
{
    if (!plan || !path)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_plan_save_file(plan, path, log);
}

tqkv_status tqkv_plan_builtin(tqkv_builtin kind, const tqkv_plan_layer *shape, tqkv_plan **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!shape)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_plan_create_builtin(NULL, kind, shape, out);
}

tqkv_status tqkv_plan_share(const tqkv_plan *plan, uint32_t rank, uint32_t n_ranks, tqkv_plan **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!plan || rank >= n_ranks)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_plan_create_share(NULL, plan, rank, n_ranks, out);
}

void tqkv_plan_destroy(tqkv_plan *plan)
{
    tqkvi_plan_destroy(plan);
}

void tqkv_plan_get_info(const tqkv_plan *plan, tqkv_plan_info *out)
{
    if (!out)
        return;
    *out = (tqkv_plan_info){.model = "", .arch = "", .profile = ""};
    if (!plan)
        return;
    out->model = plan->model;
    out->arch = plan->arch;
    out->profile = plan->profile;
    out->n_layers = plan->n_layers;
    out->n_tiers = plan->n_tiers;
    out->n_sinks = plan->n_sinks;
    out->frame_tokens = plan->frame_tokens;
    out->context = plan->context;
    out->bits_total = plan->bits_total;
    memcpy(out->fingerprint, plan->fingerprint, sizeof(out->fingerprint));
}

tqkv_status tqkv_plan_get_layer(const tqkv_plan *plan, uint32_t layer, tqkv_plan_layer *out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = (tqkv_plan_layer){.n_heads = 0};
    if (!plan || layer >= plan->n_layers)
        return TQKV_ERR_INVALID_ARG;
    *out = plan->layers[layer].shape;
    return TQKV_OK;
}

/* NULL where there is no such head. */
static const tqkvi_head_plan *find_head(const tqkv_plan *plan, uint32_t layer, uint32_t head,
                                        tqkv_side side)
{
    if (!plan || layer >= plan->n_layers || head >= plan->layers[layer].shape.n_kv_heads ||
        (side != TQKV_SIDE_K && side != TQKV_SIDE_V))
        return NULL;
    return &plan->layers[layer].heads[side][head];
}

tqkv_status tqkv_plan_get_bits(const tqkv_plan *plan, uint32_t layer, uint32_t head, tqkv_side side,
                               uint32_t tier, uint8_t *bits)
{
    const tqkvi_head_plan *found = find_head(plan, layer, head, side);
    if (!found || !bits || tier >= plan->n_tiers)
        return TQKV_ERR_INVALID_ARG;
    memcpy(bits, found->layout[tier].bits, found->layout[tier].n_units);
    return TQKV_OK;
}

tqkv_status tqkv_plan_get_weights(const tqkv_plan *plan, uint32_t layer, uint32_t head,
                                  tqkv_side side, float *weights)
{
    const tqkvi_head_plan *found = find_head(plan, layer, head, side);
    if (!found || !weights)
        return TQKV_ERR_INVALID_ARG;
    const size_t n_units = found->layout[0].n_units;
    if (found->weight)
        memcpy(weights, found->weight, n_units * sizeof(*weights));
    else
        memset(weights, 0, n_units * sizeof(*weights));
    return TQKV_OK;
}
