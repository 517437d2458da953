/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_view.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"
#include "turboquant/store.h"

/* llama.cpp gives a sliding layer the window plus one micro-batch, in whole 256 cells. */
#define MICRO_BATCH_TOKENS 512
#define CELLS_STEP 256

int plan_view_load(const char *path, tqkv_plan **out)
{
    *out = NULL;
    if (access(path, R_OK) != 0)
        return tool_error("plan %s: %s%s", path, strerror(errno),
                          errno == ENOENT ? "; 'tqkv calibrate MODEL.gguf' makes one" : "");
    const tqkv_status status = tqkv_plan_load(path, tool_logger(), out);
    if (status != TQKV_OK)
        return tool_error("plan %s: %s", path, tqkv_status_text(status));
    return TOOL_OK;
}

static bool layer_fits(const tqkv_plan_layer *layer, const gguf_head *model, uint32_t i)
{
    const bool has_usual_dims = layer->k_dim == model->k_dim && layer->v_dim == model->v_dim;
    const bool has_swa_dims = layer->k_dim == model->k_dim_swa && layer->v_dim == model->v_dim_swa;
    return layer->n_kv_heads == model->n_kv_heads[i] && (has_usual_dims || has_swa_dims);
}

int plan_view_check_model(const tqkv_plan *plan, const char *plan_path, const gguf_head *model,
                          const char *model_path)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(plan, &info);
    if (info.arch && *info.arch && strcmp(info.arch, model->arch) != 0)
        return tool_error("plan %s was made for architecture '%s', model %s is '%s'", plan_path,
                          info.arch, model_path, model->arch);
    if (info.n_layers != model->n_layers)
        return tool_error("plan %s has %u layers (it was made for '%s'), model %s has %u",
                          plan_path, info.n_layers, info.model ? info.model : "", model_path,
                          model->n_layers);
    for (uint32_t i = 0; i < info.n_layers && !model->is_latent; i++) {
        tqkv_plan_layer layer;
        if (tqkv_plan_get_layer(plan, i, &layer) != TQKV_OK || layer_fits(&layer, model, i))
            continue;
        return tool_error(
            "plan %s, layer %u: %u KV heads of %u + %u channels; model %s has %u of %u + %u",
            plan_path, i, layer.n_kv_heads, layer.k_dim, layer.v_dim, model_path,
            model->n_kv_heads[i], model->k_dim, model->v_dim);
    }
    return TOOL_OK;
}

uint32_t plan_view_resident(uint32_t window, uint32_t n_tokens)
{
    if (!window || window > UINT32_MAX / 2)
        return n_tokens;
    const uint32_t cells = (window + MICRO_BATCH_TOKENS + CELLS_STEP - 1) / CELLS_STEP * CELLS_STEP;
    return n_tokens < cells ? n_tokens : cells;
}

int plan_view_layer_bytes(const tqkv_plan *plan, uint32_t layer, uint32_t n_tokens, double *held,
                          double *f16)
{
    tqkv_plan_layer shape;
    tqkv_store_config config;
    tqkv_store *store;
    tqkv_status status = tqkv_plan_get_layer(plan, layer, &shape);
    *held = *f16 = 0;
    if (status != TQKV_OK)
        return tool_error("layer %u of the plan: %s", layer, tqkv_status_text(status));
    if (!shape.n_kv_heads)
        return TOOL_OK; /* a layer without a cache */
    const uint32_t n_held = plan_view_resident(shape.window, n_tokens);
    tqkv_store_config_init(&config);
    config.plan = plan;
    config.layer = layer;
    config.n_cells = n_held;
    config.n_streams = 1;
    status = tqkv_store_create(&config, &store);
    if (status != TQKV_OK)
        return tool_error("layer %u of the plan: %s", layer, tqkv_status_text(status));
    *held = (double)tqkv_store_bytes_at(store, n_tokens);
    *f16 = 2.0 * n_held * shape.n_kv_heads * (shape.k_dim + shape.v_dim);
    tqkv_store_destroy(store);
    return TOOL_OK;
}

int plan_view_bytes(const tqkv_plan *plan, uint32_t n_tokens, double *held, double *f16)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(plan, &info);
    *held = *f16 = 0;
    for (uint32_t i = 0; i < info.n_layers; i++) {
        double layer_held, layer_f16;
        const int rc = plan_view_layer_bytes(plan, i, n_tokens, &layer_held, &layer_f16);
        if (rc != TOOL_OK)
            return rc;
        *held += layer_held;
        *f16 += layer_f16;
    }
    return TOOL_OK;
}

double plan_view_head_bits(const tqkv_plan *plan, uint32_t layer, uint32_t head, tqkv_side side,
                           uint32_t tier)
{
    tqkv_plan_layer shape;
    uint8_t bits[TQKV_UNITS_MAX];
    if (tqkv_plan_get_layer(plan, layer, &shape) != TQKV_OK ||
        tqkv_plan_get_bits(plan, layer, head, side, tier, bits) != TQKV_OK)
        return 0;
    const uint32_t dim = side == TQKV_SIDE_K ? shape.k_dim : shape.v_dim;
    const uint32_t n_units = dim / TQKV_UNIT_CHANNELS;
    double sum = 0;
    for (uint32_t i = 0; i < n_units; i++)
        sum += bits[i];
    return n_units ? sum / n_units + (bits[0] == 16 ? 0.0 : 8.0 / dim) : 0;
}

double plan_view_side_bits(const tqkv_plan *plan, uint32_t layer, tqkv_side side, uint32_t tier)
{
    tqkv_plan_layer shape;
    double sum = 0;
    if (tqkv_plan_get_layer(plan, layer, &shape) != TQKV_OK || !shape.n_kv_heads)
        return 0;
    for (uint32_t g = 0; g < shape.n_kv_heads; g++)
        sum += plan_view_head_bits(plan, layer, g, side, tier);
    return sum / shape.n_kv_heads;
}

void plan_view_long_layer(const tqkv_plan *plan, tqkv_plan_layer *out)
{
    uint32_t i = 0;
    tqkv_plan_layer layer = {0};
    *out = layer;
    while (tqkv_plan_get_layer(plan, i++, &layer) == TQKV_OK) {
        if (layer.n_kv_heads)
            *out = layer;
        if (layer.n_kv_heads && !layer.window)
            return;
    }
}

void plan_view_fingerprint(const tqkv_plan_info *info, char out[PLAN_VIEW_FINGERPRINT_CHARS])
{
    for (size_t i = 0; i < TQKV_FINGERPRINT_BYTES; i++)
        snprintf(out + 2 * i, 3, "%02x", info->fingerprint[i]);
}

char *plan_view_default_path(const char *model_path)
{
    return tool_replace_ending(model_path, ".gguf", ".tqkv");
}
