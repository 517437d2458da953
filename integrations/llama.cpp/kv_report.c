/* SPDX-License-Identifier: Apache-2.0 */
#include "kv_report.h"

#include <stdio.h>
#include <string.h>

#include "kv_layer.h"
#include "kv_short.h"

/* --- the line --- */

typedef struct summary {
    size_t n_layers, n_plain, n_failed;
    uint32_t n_tokens;    /* cells of the largest layer */
    double bytes, values; /* of the compressed layers when full */
    const char *plan;     /* path, or NULL: built in */
    const char *plain;    /* reason */
    tqkvp_mode mode;
    bool rotated; /* by the host, because of the declared type */
    const char *other_type;
} summary;

static void add_layer(summary *s, tqkvp_layer *layer)
{
    s->n_layers++;
    if (tqkvp_layer_open(layer) != GGML_OK) {
        s->n_failed++;
        return;
    }
    for (int side = 0; side < 2; side++) {
        const tqkvp_tensor *tensor = layer->sides[side];
        if (tensor && tensor->type != TQKVP_TYPE_F16)
            s->other_type = tqkvp_host_get()->type_name(tensor->ggml_type);
        if (tensor && tensor->type == TQKVP_TYPE_OTHER)
            s->rotated = true;
    }
    if (layer->plain) {
        s->n_plain++;
        s->plain = layer->why;
        return;
    }
    const tqkvp_plan *plan = tqkvp_layer_plan(layer);
    if (plan)
        s->plan = plan->path;
    if (layer->n_cells > s->n_tokens)
        s->n_tokens = layer->n_cells;
    double per_token = 0.0;
    for (int side = 0; side < 2; side++)
        per_token += layer->sides[side] ? (double)layer->sides[side]->row_values : 0.0;
    s->bytes += (double)tqkv_store_bytes_at(layer->store, layer->n_cells);
    s->values += per_token * layer->n_cells * layer->n_streams;
}

static void add_buffer(void *user, tqkvp_buffer *buffer)
{
    summary *s = user;

    buffer->announced = true;
    s->mode = buffer->config.mode;
    for (size_t i = 0; i < buffer->n_layers; i++)
        add_layer(s, buffer->layers[i]);
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

static void say_active(const summary *s)
{
    const double bits = s->values > 0.0 ? 8.0 * s->bytes / s->values : 16.0;
    const size_t n = s->n_layers - s->n_plain;
    char storage[512], plain[160] = "";

    if (s->plan)
        snprintf(storage, sizeof(storage), "plan %s", base_name(s->plan));
    else if (s->mode == TQKVP_MODE_F16)
        snprintf(storage, sizeof(storage), "f16, not compressed (mode f16)");
    else if (s->mode == TQKVP_MODE_Q8)
        snprintf(storage, sizeof(storage), "built-in q8 (mode q8)");
    else if (s->rotated)
        snprintf(storage, sizeof(storage), "built-in q8");
    else
        snprintf(storage, sizeof(storage),
                 "built-in q8 (no plan beside the model; `tqkv calibrate` makes one for 5x)");
    if (s->n_plain)
        snprintf(plain, sizeof(plain), " (%zu more stored plain: %s)", s->n_plain, s->plain);
    tqkvp_say("active: %.1fx (%.1f bits per value at %u tokens), %s, %zu layer%s%s", 16.0 / bits,
              bits, s->n_tokens, storage, n, n == 1 ? "" : "s", plain);
}

void tqkvp_announce(tqkvp_buffer *buffer)
{
    summary s = {0};

    if (buffer->announced)
        return;
    tqkvp_buffers_each(buffer->context, add_buffer, &s);
    if (s.n_failed)
        return; /* said already */
    if (s.n_plain == s.n_layers)
        tqkvp_say("not active: %s; the cache is stored uncompressed", s.plain);
    else
        say_active(&s);
    if (s.rotated)
        tqkvp_say(
            "cache type %s makes llama.cpp rotate K and V, which no plan knows; leave -ctk and "
            "-ctv at f16 and the plan decides the size",
            s.other_type);
    else if (s.other_type)
        tqkvp_say("cache type %s only makes states and copies larger or less exact; leave -ctk and "
                  "-ctv at f16",
                  s.other_type);
}

static void count_layers(void *user, tqkvp_buffer *buffer)
{
    *(size_t *)user += buffer->n_layers;
}

void tqkvp_announce_absence(uint64_t context)
{
    size_t n = 0;

    tqkvp_buffers_each(context, count_layers, &n);
    if (n == 0)
        tqkvp_say("not active: llama.cpp keeps the cache to itself (-nkvo or -ngl 0), or the model "
                  "has none");
}

/* --- numbers --- */

typedef struct counting {
    tqkv_plugin_bytes *total, *layers;
    size_t n, n_max;
} counting;

static tqkv_plugin_bytes layer_bytes(const tqkvp_layer *layer)
{
    tqkv_plugin_bytes bytes = {.layer = layer->index, .plain = layer->plain};
    tqkv_store_stats stats = {0};
    uint64_t values = 0, layout = 0, n_tokens = 0;
    const uint64_t n_rows = (uint64_t)layer->n_cells * layer->n_streams;

    for (int side = 0; side < 2; side++) {
        if (!layer->sides[side])
            continue;
        values += (uint64_t)layer->sides[side]->row_values;
        layout += layer->sides[side]->row_bytes * n_rows;
    }
    bytes.f16_reserved = 2 * values * n_rows;
    if (layer->plain) {
        bytes.held = bytes.reserved = layout;
        bytes.f16_held = bytes.f16_reserved;
    } else if (layer->store) {
        tqkv_store_get_stats(layer->store, &stats);
        for (size_t i = 0; i < TQKV_TIERS_MAX; i++)
            n_tokens += stats.n_tokens[i];
        bytes.held = tqkv_store_bytes(layer->store);
        bytes.reserved = tqkv_store_bytes_at(layer->store, layer->n_cells);
        bytes.f16_held = 2 * values * n_tokens;
    }
    if (layer->is_short) {
        n_tokens = tqkvp_short_tokens(layer);
        bytes.held += n_tokens * (layout / n_rows + sizeof(*layer->positions));
        bytes.f16_held = 2 * values * n_tokens;
    }
    return bytes;
}

static void count_buffer(void *user, tqkvp_buffer *buffer)
{
    counting *c = user;

    for (size_t i = 0; i < buffer->n_layers; i++, c->n++) {
        const tqkv_plugin_bytes bytes = layer_bytes(buffer->layers[i]);
        if (c->layers && c->n < c->n_max)
            c->layers[c->n] = bytes;
        c->total->layer++;
        c->total->plain += bytes.plain;
        c->total->held += bytes.held;
        c->total->reserved += bytes.reserved;
        c->total->f16_held += bytes.f16_held;
        c->total->f16_reserved += bytes.f16_reserved;
    }
}

size_t tqkvp_kv_bytes(tqkv_plugin_bytes *total, tqkv_plugin_bytes *layers, size_t n_layers_max)
{
    tqkv_plugin_bytes unused;
    counting c = {.total = total ? total : &unused, .layers = layers, .n_max = n_layers_max};

    memset(c.total, 0, sizeof(*c.total));
    /* a context without a cache of ours may have come later */
    for (uint64_t context = tqkvp_context_last() + 1; context-- > 0 && c.n == 0;)
        tqkvp_buffers_each(context, count_buffer, &c);
    return c.n;
}
