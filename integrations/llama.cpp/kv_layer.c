/* SPDX-License-Identifier: Apache-2.0 */
#include "kv_layer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kv_cells.h"
#include "kv_rows.h"
#include "kv_short.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

enum { KV_DIM_MAX = TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS };

/* --- names and tensors --- */

bool tqkvp_cache_name(const char *name, uint32_t *layer, tqkv_side *side)
{
    const char start[] = "cache_", middle[] = "_l";
    uint32_t index = 0;
    int digits = 0;

    if (strncmp(name, start, sizeof(start) - 1) != 0)
        return false;
    const char *p = name + sizeof(start) - 1;
    if (*p != 'k' && *p != 'v')
        return false;
    *side = *p == 'k' ? TQKV_SIDE_K : TQKV_SIDE_V;
    p++;
    if (strncmp(p, middle, sizeof(middle) - 1) != 0)
        return false;
    for (p += sizeof(middle) - 1; *p >= '0' && *p <= '9' && digits < 6; p++, digits++)
        index = index * 10 + (uint32_t)(*p - '0');
    *layer = index;
    return digits > 0 && *p == '\0';
}

tqkvp_tensor *tqkvp_tensor_of(const ggml_tensor *t)
{
    const ggml_tensor *root = tqkvp_root(t);

    return tqkvp_is_ours(root) ? root->extra : NULL;
}

static void tensor_destroy(tqkvp_tensor *tensor)
{
    if (!tensor)
        return;
    if (tensor->plain)
        munmap(tensor->plain, tensor->plain_bytes);
    free(tensor->partial);
    free(tensor);
}

bool tqkvp_tensor_back(tqkvp_tensor *tensor)
{
    return mprotect(tensor->plain, tensor->plain_bytes, PROT_READ | PROT_WRITE) == 0;
}

void tqkvp_tensor_unback(tqkvp_tensor *tensor)
{
    madvise(tensor->plain, tensor->plain_bytes, MADV_DONTNEED);
    mprotect(tensor->plain, tensor->plain_bytes, PROT_NONE);
}

tqkvp_layer *tqkvp_layer_get(tqkvp_buffer *buffer, uint32_t index)
{
    for (size_t i = 0; i < buffer->n_layers; i++)
        if (buffer->layers[i]->index == index)
            return buffer->layers[i];

    tqkvp_layer *layer = calloc(1, sizeof(*layer));
    tqkvp_layer **layers =
        realloc(buffer->layers, (buffer->n_layers + 1) * sizeof(*buffer->layers));
    if (layers)
        buffer->layers = layers;
    if (!layer || !layers) {
        free(layer);
        return NULL;
    }
    layer->buffer = buffer;
    layer->index = index;
    layers[buffer->n_layers++] = layer;
    return layer;
}

bool tqkvp_layer_add_side(tqkvp_layer *layer, tqkv_side side, ggml_tensor *t)
{
    const size_t page = 4096;
    tqkvp_tensor *tensor = calloc(1, sizeof(*tensor));

    if (!tensor || layer->sides[side]) {
        free(tensor);
        return false;
    }
    tensor->layer = layer;
    tensor->side = side;
    tensor->ggml_type = t->type;
    tensor->type = tqkvp_type_of(t);
    tensor->row_values = t->ne[0];
    tensor->row_bytes = t->nb[1];
    tensor->n_rows = t->ne[1] * t->ne[2];
    tensor->partial_row = -1;
    tensor->plain_bytes =
        (tensor->row_bytes * (size_t)tensor->n_rows + TQKV_ALIGN + page) & ~(page - 1);
    void *space = mmap(NULL, tensor->plain_bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
        free(tensor);
        return false;
    }
    tensor->plain = space;
    layer->sides[side] = tensor;
    layer->n_cells = (uint32_t)t->ne[1];
    layer->n_streams = (uint32_t)t->ne[2];
    t->extra = tensor;
    t->data = tensor->plain; /* views take their addresses from here */
    return true;
}

void tqkvp_layer_destroy(tqkvp_layer *layer)
{
    if (!layer)
        return;
    tqkv_store_destroy(layer->store);
    tqkv_plan_destroy(layer->own_plan);
    tensor_destroy(layer->sides[0]);
    tensor_destroy(layer->sides[1]);
    free(layer->positions);
    free(layer);
}

/* --- what the graph tells --- */

void tqkvp_layer_wish_plain(tqkvp_layer *layer, const char *why)
{
    if (layer->must_be_plain || layer->plain)
        return;
    layer->must_be_plain = true;
    snprintf(layer->why, sizeof(layer->why), "%s", why);
}

/*
 * K and V of one tensor. A latent layer attends with all channels of a row and adds up all but those
 * that turn, which are at one of its ends. False for anything else.
 */
static bool learn_latent(tqkvp_layer *layer, const ggml_tensor *k, const ggml_tensor *v)
{
    const tqkvp_tensor *side = layer->sides[TQKV_SIDE_K];
    const int64_t n_turned = k->ne[0] - v->ne[0];

    if (!side || layer->sides[TQKV_SIDE_V] || tqkvp_tensor_of(k) != side ||
        tqkvp_tensor_of(v) != side || k->ne[2] != 1 || n_turned <= 0 || v->view_offs < k->view_offs)
        return false;
    const int64_t offset =
        (int64_t)(v->view_offs - k->view_offs) * side->row_values / (int64_t)side->row_bytes;
    layer->turned_first = offset != 0;
    return offset == 0 || offset == n_turned;
}

void tqkvp_layer_learn_attention(tqkvp_layer *layer, const ggml_tensor *node)
{
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
    const tqkvp_tensor *k_side = layer->sides[TQKV_SIDE_K], *v_side = layer->sides[TQKV_SIDE_V];
    char why[96];

    if (layer->shape_known || layer->must_be_plain)
        return;
    const bool is_latent = learn_latent(layer, k, v);
    if (!is_latent &&
        (!k_side || !v_side || tqkvp_tensor_of(v) != v_side || tqkvp_tensor_of(k) != k_side)) {
        tqkvp_layer_wish_plain(layer, "K and V share one tensor, and it is not a latent beside "
                                      "channels that turn");
        return;
    }
    const int64_t n_heads = q->ne[2], n_kv_heads = k->ne[2], v_dim = v->ne[0];
    const int64_t k_dim = is_latent ? k->ne[0] - v_dim : k->ne[0];
    if (n_kv_heads * k->ne[0] != k_side->row_values ||
        (v_side && n_kv_heads * v_dim != v_side->row_values) || q->ne[0] != k->ne[0] ||
        n_heads % n_kv_heads != 0) {
        tqkvp_layer_wish_plain(layer, "the heads do not fill a row of the cache");
        return;
    }
    if (k_dim % TQKV_UNIT_CHANNELS || v_dim % TQKV_UNIT_CHANNELS || k_dim > KV_DIM_MAX ||
        v_dim > KV_DIM_MAX) {
        snprintf(why, sizeof(why), "heads of %lld and %lld channels are not supported",
                 (long long)k_dim, (long long)v_dim);
        tqkvp_layer_wish_plain(layer, why);
        return;
    }
    layer->shape = (tqkv_plan_layer){.n_heads = (uint32_t)n_heads,
                                     .n_kv_heads = (uint32_t)n_kv_heads,
                                     .k_dim = (uint32_t)k_dim,
                                     .v_dim = (uint32_t)v_dim,
                                     .is_latent = is_latent};
    layer->shape_known = true;
}

void tqkvp_layer_learn_rows(tqkvp_layer *layer, const ggml_tensor *node)
{
    const tqkvp_tensor *tensor = tqkvp_tensor_of(node);

    /* without flash attention V is stored transposed, one value at a time */
    if (node->ne[0] != tensor->row_values) {
        tqkvp_layer_wish_plain(layer, "flash attention is off");
        return;
    }
    if (tensor->side != TQKV_SIDE_K || layer->rope_state == TQKVP_ROPE_SEEN)
        return;
    const ggml_tensor *rope = tqkvp_rope_behind(node->src[0], !layer->sides[TQKV_SIDE_V]);
    layer->rope_state = rope && tqkvp_rope_read(rope, (uint32_t)rope->ne[0], &layer->rope)
                            ? TQKVP_ROPE_SEEN
                            : TQKVP_ROPE_HIDDEN;
}

/* --- the store --- */

/* Statistics of values that the host rotates before it stores them are not those of the plan. */
static bool is_rotated_by_host(const tqkvp_layer *layer)
{
    for (int side = 0; side < 2; side++)
        if (layer->sides[side] && layer->sides[side]->type == TQKVP_TYPE_OTHER)
            return true;
    return false;
}

const tqkvp_plan *tqkvp_layer_plan(const tqkvp_layer *layer)
{
    const tqkvp_choice *choice = &layer->buffer->choice;

    return choice->n > 0 && !is_rotated_by_host(layer) ? choice->plans[0] : NULL;
}

tqkv_rope tqkvp_layer_rope(const tqkvp_layer *layer)
{
    const tqkvp_plan *plan = tqkvp_layer_plan(layer);
    tqkv_plan_layer planned;

    if (layer->rope_state == TQKVP_ROPE_SEEN)
        return layer->rope.rope;
    if (plan && tqkv_plan_get_layer(plan->plan, layer->index, &planned) == TQKV_OK)
        return planned.rope;
    return (tqkv_rope){.style = TQKV_ROPE_NONE};
}

static int32_t fail(tqkvp_layer *layer, const char *what, tqkv_status status)
{
    layer->failed = true;
    tqkvp_say("stopped: layer %u: %s: %s", layer->index, what, tqkv_status_text(status));
    return status == TQKV_ERR_NO_MEMORY ? GGML_ALLOC_FAILED : GGML_FAILED;
}

/* Compares the plan with the graph; false after a message. */
static bool plan_fits(tqkvp_layer *layer, const tqkvp_plan *plan, const tqkv_plan_layer *planned)
{
    const tqkv_plan_layer *shape = &layer->shape;

    if (layer->shape_known &&
        (shape->n_heads != planned->n_heads || shape->n_kv_heads != planned->n_kv_heads ||
         shape->k_dim != planned->k_dim || shape->v_dim != planned->v_dim ||
         shape->is_latent != planned->is_latent)) {
        layer->failed = true;
        tqkvp_say(
            "stopped: plan %s was made for another model (%s): layer %u has %u heads, %u KV "
            "heads of %u and %u channels there, and %u, %u, %u, %u here. Make a plan for this "
            "model with `tqkv calibrate`, or set TQKV_MODE=q8",
            plan->path, plan->info.model, layer->index, planned->n_heads, planned->n_kv_heads,
            planned->k_dim, planned->v_dim, shape->n_heads, shape->n_kv_heads, shape->k_dim,
            shape->v_dim);
        return false;
    }
    if (layer->rope_state == TQKVP_ROPE_SEEN && !layer->buffer->warned_rope &&
        !tqkvp_rope_equal(&layer->rope.rope, &planned->rope)) {
        layer->buffer->warned_rope = true;
        tqkvp_say("RoPE of layer %u is not the one that plan %s was made with (another base or "
                  "scaling?): taking the model's; expect somewhat more loss",
                  layer->index, plan->path);
    }
    return true;
}

static int32_t make_store(tqkvp_layer *layer)
{
    const tqkvp_plan *plan = tqkvp_layer_plan(layer);
    const tqkv_rope rope = tqkvp_layer_rope(layer);
    tqkv_plan_layer planned;
    tqkv_store_config config;
    tqkv_status status;

    tqkv_store_config_init(&config);
    config.n_cells = layer->n_cells;
    config.n_streams = layer->n_streams;
    if (plan) {
        status = tqkv_plan_get_layer(plan->plan, layer->index, &planned);
        if (status != TQKV_OK)
            return fail(layer, "reading the plan", status);
        if (!plan_fits(layer, plan, &planned))
            return GGML_FAILED;
        if (!layer->sides[TQKV_SIDE_V] && !planned.is_latent)
            return tqkvp_layer_make_plain(layer, "K and V share one tensor, not so in the plan");
        if (!layer->shape_known)
            layer->shape = planned; /* until a graph says the same */
        config.plan = plan->plan;
        config.layer = layer->index;
        config.rope = &rope;
    } else {
        const tqkv_builtin kind =
            layer->buffer->config.mode == TQKVP_MODE_F16 ? TQKV_BUILTIN_F16 : TQKV_BUILTIN_Q8;
        if (!layer->shape_known)
            return tqkvp_layer_make_plain(layer, "the shape of its heads is not known");
        layer->shape.rope = rope;
        status = tqkv_plan_builtin(kind, &layer->shape, &layer->own_plan);
        if (status == TQKV_ERR_UNSUPPORTED)
            return tqkvp_layer_make_plain(layer, "its shape is not supported");
        if (status != TQKV_OK)
            return fail(layer, "making the built-in plan", status);
        config.plan = layer->own_plan;
    }
    status = tqkv_store_create(&config, &layer->store);
    return status == TQKV_OK ? GGML_OK : fail(layer, "reserving the cache", status);
}

int32_t tqkvp_layer_open(tqkvp_layer *layer)
{
    if (layer->failed)
        return GGML_FAILED;
    if (layer->must_be_plain && !layer->plain)
        return tqkvp_layer_make_plain(layer, layer->why);
    if (layer->is_short) {
        const tqkv_status status = tqkvp_short_end(layer);
        return status == TQKV_OK ? GGML_OK : fail(layer, "encoding", status);
    }
    if (layer->plain || layer->store)
        return GGML_OK;
    /* rotated before it was cut into heads: nothing that a store could undo */
    if (layer->rope_state == TQKVP_ROPE_SEEN && layer->shape_known &&
        layer->rope.rope.n_rot > layer->shape.k_dim)
        layer->rope_state = TQKVP_ROPE_HIDDEN;
    if (!layer->sides[TQKV_SIDE_K])
        return tqkvp_layer_make_plain(layer, "V without K");
    return make_store(layer);
}

int32_t tqkvp_layer_make_plain(tqkvp_layer *layer, const char *why)
{
    if (layer->plain)
        return GGML_OK;
    for (int side = 0; side < 2; side++) {
        tqkvp_tensor *tensor = layer->sides[side];
        if (!tensor)
            continue;
        if (!tqkvp_tensor_back(tensor))
            return fail(layer, "memory for plain storage", TQKV_ERR_NO_MEMORY);
        if (!layer->store || !layer->written || layer->is_short)
            continue;
        tqkvp_rows_settle(tensor);
        if (!tqkvp_rows_decode(tensor, 0, tensor->n_rows, tensor->plain))
            return fail(layer, "decoding to plain storage", TQKV_ERR_UNSUPPORTED);
    }
    if (layer->written && !layer->buffer->warned_plain) {
        layer->buffer->warned_plain = true;
        tqkvp_say("layer %u and perhaps others are stored uncompressed from here on: %s",
                  layer->index, why);
    }
    if (why != layer->why)
        snprintf(layer->why, sizeof(layer->why), "%s", why);
    tqkv_store_destroy(layer->store);
    layer->store = NULL;
    layer->is_short = false;
    layer->plain = true;
    return GGML_OK;
}

void tqkvp_layer_clear(tqkvp_layer *layer)
{
    for (int side = 0; side < 2; side++) {
        tqkvp_tensor *tensor = layer->sides[side];
        if (!tensor)
            continue;
        tensor->partial_row = -1;
        if (layer->plain || layer->is_short)
            madvise(tensor->plain, tensor->plain_bytes, MADV_DONTNEED); /* reads as zero */
    }
    if (layer->is_short)
        tqkvp_short_clear(layer);
    layer->outgrown = false;
    if (layer->store)
        tqkv_store_clear(layer->store);
    layer->written = false;
    layer->copied_from = NULL;
}
