/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plan to the bytes of its file (docs/FORMAT.md, "The plan file"). RoPE tables and layouts are
 * gathered in sorted catalogues without repetition, so a plan has exactly one file.
 */
#include "format/plan_data.h"

#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/log.h"
#include "base/sha256.h"
#include "format/plan_file.h"

typedef struct catalogue {
    const tqkv_rope **ropes;
    const tqkvi_layout **layouts;
    uint32_t n_ropes, n_layouts;
} catalogue;

int tqkvi_rope_compare(const tqkv_rope *a, const tqkv_rope *b)
{
    if (a->style != b->style)
        return a->style < b->style ? -1 : 1;
    if (a->n_rot != b->n_rot)
        return a->n_rot < b->n_rot ? -1 : 1;
    for (uint32_t i = 0; i < a->n_rot / 2; i++) {
        const uint32_t va = tqkvi_bits_of_float(a->inv_freq[i]);
        const uint32_t vb = tqkvi_bits_of_float(b->inv_freq[i]);
        if (va != vb)
            return va < vb ? -1 : 1;
    }
    return 0;
}

int tqkvi_layout_compare(const tqkvi_layout *a, const tqkvi_layout *b)
{
    if (a->n_units != b->n_units)
        return a->n_units < b->n_units ? -1 : 1;
    return memcmp(a->bits, b->bits, a->n_units);
}

static int compare_ropes(const void *a, const void *b)
{
    return tqkvi_rope_compare(*(const tqkv_rope *const *)a, *(const tqkv_rope *const *)b);
}

static int compare_layouts(const void *a, const void *b)
{
    return tqkvi_layout_compare(*(const tqkvi_layout *const *)a, *(const tqkvi_layout *const *)b);
}

static void catalogue_deinit(catalogue *cat, const tqkv_allocator *mem)
{
    tqkvi_free(mem, cat->ropes);
    tqkvi_free(mem, cat->layouts);
}

static tqkv_status catalogue_init(catalogue *cat, const tqkv_plan *plan)
{
    *cat = (catalogue){.ropes = NULL};
    size_t n_heads = 0;
    for (uint32_t i = 0; i < plan->n_layers; i++)
        n_heads += plan->layers[i].shape.n_kv_heads;
    cat->ropes = tqkvi_alloc(&plan->mem, plan->n_layers * sizeof(*cat->ropes));
    cat->layouts = tqkvi_alloc(&plan->mem, n_heads * 2 * plan->n_tiers * sizeof(*cat->layouts));
    if (!cat->ropes || !cat->layouts) {
        catalogue_deinit(cat, &plan->mem);
        return TQKV_ERR_NO_MEMORY;
    }
    size_t n_ropes = 0, n_layouts = 0;
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        const tqkvi_layer_plan *layer = &plan->layers[i];
        if (layer->shape.n_kv_heads > 0)
            cat->ropes[n_ropes++] = &layer->shape.rope;
        for (uint32_t g = 0; g < layer->shape.n_kv_heads; g++) {
            for (uint32_t tier = 0; tier < plan->n_tiers; tier++) {
                cat->layouts[n_layouts++] = &layer->heads[0][g].layout[tier];
                cat->layouts[n_layouts++] = &layer->heads[1][g].layout[tier];
            }
        }
    }
    qsort(cat->ropes, n_ropes, sizeof(*cat->ropes), compare_ropes);
    qsort(cat->layouts, n_layouts, sizeof(*cat->layouts), compare_layouts);
    for (size_t i = 0; i < n_ropes; i++) {
        if (cat->n_ropes == 0 || compare_ropes(&cat->ropes[i], &cat->ropes[cat->n_ropes - 1]) != 0)
            cat->ropes[cat->n_ropes++] = cat->ropes[i];
    }
    for (size_t i = 0; i < n_layouts; i++) {
        if (cat->n_layouts == 0 ||
            compare_layouts(&cat->layouts[i], &cat->layouts[cat->n_layouts - 1]) != 0)
            cat->layouts[cat->n_layouts++] = cat->layouts[i];
    }
    return TQKV_OK;
}

static uint32_t rope_id(const catalogue *cat, const tqkv_rope *rope)
{
    const tqkv_rope **at =
        bsearch(&rope, cat->ropes, cat->n_ropes, sizeof(*cat->ropes), compare_ropes);
    return (uint32_t)(at - cat->ropes);
}

static uint32_t layout_id(const catalogue *cat, const tqkvi_layout *layout)
{
    const tqkvi_layout **at =
        bsearch(&layout, cat->layouts, cat->n_layouts, sizeof(*cat->layouts), compare_layouts);
    return (uint32_t)(at - cat->layouts);
}

/* Where bytes go; with out == NULL they are only counted. */
typedef struct writer {
    uint8_t *out;
    size_t n;
} writer;

static void put(writer *w, const void *bytes, size_t n)
{
    if (w->out && n > 0)
        memcpy(w->out + w->n, bytes, n);
    w->n += n;
}

static void put_u16(writer *w, uint16_t value)
{
    uint8_t bytes[2];
    tqkvi_store_u16(bytes, value);
    put(w, bytes, sizeof(bytes));
}

static void put_u32(writer *w, uint32_t value)
{
    uint8_t bytes[4];
    tqkvi_store_u32(bytes, value);
    put(w, bytes, sizeof(bytes));
}

static void put_u64(writer *w, uint64_t value)
{
    uint8_t bytes[8];
    tqkvi_store_u64(bytes, value);
    put(w, bytes, sizeof(bytes));
}

static void put_floats(writer *w, const float *values, size_t n)
{
    for (size_t i = 0; i < n; i++)
        put_u32(w, tqkvi_bits_of_float(values[i]));
}

static void put_name(writer *w, const char *name)
{
    const size_t n = strlen(name);
    put_u16(w, (uint16_t)n);
    put(w, name, n);
}

static void put_transform(writer *w, const float *m, uint32_t dim)
{
    if (!w->out) {
        w->n += dim + (size_t)dim * dim * 2;
        return;
    }
    for (uint32_t j = 0; j < dim; j++) {
        float column[TQKVI_DIM_MAX];
        tqkvi_transform_column(m, dim, j, column);
        const int e = tqkvi_column_exponent(column, dim);
        const float up = tqkvi_power_of_two(-e);
        w->out[w->n + j] = (uint8_t)(int8_t)e;
        for (uint32_t i = 0; i < dim; i++) {
            uint8_t *at = w->out + w->n + dim + 2 * ((size_t)i * dim + j);
            tqkvi_store_u16(at, tqkvi_float_to_half(column[i] * up));
        }
    }
    w->n += dim + (size_t)dim * dim * 2;
}

static void put_header(writer *w, const tqkv_plan *plan, const catalogue *cat)
{
    static const uint8_t no_fingerprint[TQKV_FINGERPRINT_BYTES];
    uint64_t bits_total;
    memcpy(&bits_total, &plan->bits_total, sizeof(bits_total));

    put(w, TQKVI_PLAN_MAGIC, TQKVI_PLAN_MAGIC_BYTES);
    put_u32(w, TQKVI_PLAN_VERSION);
    put_u32(w, 0);
    put_u64(w, 0); /* length, and the fingerprint: filled in at the end */
    put(w, no_fingerprint, sizeof(no_fingerprint));
    put_u32(w, plan->n_layers);
    put_u32(w, plan->n_tiers);
    put_u32(w, plan->n_sinks);
    put_u32(w, plan->frame_tokens);
    put_u32(w, plan->context);
    put_u32(w, cat->n_ropes);
    put_u32(w, cat->n_layouts);
    put_u32(w, 0);
    put_u64(w, bits_total);
}

static void put_layer(writer *w, const tqkv_plan_layer *shape, const catalogue *cat,
                      uint32_t n_tiers)
{
    put_u32(w, shape->n_kv_heads);
    if (shape->n_kv_heads == 0)
        return;
    put_u32(w, shape->n_heads);
    put_u32(w, shape->k_dim);
    put_u32(w, shape->is_latent ? shape->v_dim | TQKVI_LATENT_BIT : shape->v_dim);
    put_u32(w, shape->window);
    put_u32(w, rope_id(cat, &shape->rope));
    for (uint32_t tier = 0; tier < n_tiers; tier++)
        put_u32(w, shape->tier_tokens[tier]);
}

static void put_head(writer *w, const tqkvi_head_plan *head, uint32_t dim, const catalogue *cat,
                     uint32_t n_tiers)
{
    for (uint32_t tier = 0; tier < n_tiers; tier++)
        put_u32(w, layout_id(cat, &head->layout[tier]));
    if (tqkvi_head_is_plain(head))
        return;
    put_floats(w, head->mean, dim);
    put_floats(w, head->weight, dim / TQKV_UNIT_CHANNELS);
    put_transform(w, head->transform, dim);
}

static void put_plan(writer *w, const tqkv_plan *plan, const catalogue *cat)
{
    put_header(w, plan, cat);
    put_name(w, plan->model);
    put_name(w, plan->arch);
    put_name(w, plan->profile);
    for (uint32_t i = 0; i < cat->n_ropes; i++) {
        put_u32(w, cat->ropes[i]->style);
        put_u32(w, cat->ropes[i]->n_rot);
        put_floats(w, cat->ropes[i]->inv_freq, cat->ropes[i]->n_rot / 2);
    }
    for (uint32_t i = 0; i < cat->n_layouts; i++) {
        put_u16(w, (uint16_t)cat->layouts[i]->n_units);
        put(w, cat->layouts[i]->bits, cat->layouts[i]->n_units);
    }
    for (uint32_t i = 0; i < plan->n_layers; i++)
        put_layer(w, &plan->layers[i].shape, cat, plan->n_tiers);
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        const tqkvi_layer_plan *layer = &plan->layers[i];
        for (size_t side = 0; side < 2; side++) {
            const uint32_t dim = tqkvi_shape_dim(&layer->shape, (tqkv_side)side);
            for (uint32_t g = 0; g < layer->shape.n_kv_heads; g++)
                put_head(w, &layer->heads[side][g], dim, cat, plan->n_tiers);
        }
    }
}

void tqkvi_plan_fingerprint(const uint8_t *bytes, size_t n_bytes,
                            uint8_t out[TQKV_FINGERPRINT_BYTES])
{
    const size_t after = TQKVI_PLAN_FINGERPRINT_AT + TQKV_FINGERPRINT_BYTES;
    tqkvi_sha256 sha;
    tqkvi_sha256_init(&sha);
    tqkvi_sha256_update(&sha, bytes, TQKVI_PLAN_FINGERPRINT_AT);
    tqkvi_sha256_update(&sha, bytes + after, n_bytes - after);
    tqkvi_sha256_digest(&sha, out);
}

tqkv_status tqkvi_plan_serialise(const tqkv_plan *plan, uint8_t **out, size_t *n_bytes)
{
    catalogue cat;
    *out = NULL;
    *n_bytes = 0;
    TQKV_TRY(catalogue_init(&cat, plan));

    writer count = {.out = NULL, .n = 0};
    put_plan(&count, plan, &cat);
    writer w = {.out = tqkvi_alloc(&plan->mem, count.n), .n = 0};
    if (w.out) {
        put_plan(&w, plan, &cat);
        tqkvi_store_u64(w.out + TQKVI_PLAN_LENGTH_AT, w.n);
        tqkvi_plan_fingerprint(w.out, w.n, w.out + TQKVI_PLAN_FINGERPRINT_AT);
        *out = w.out;
        *n_bytes = w.n;
    }
    catalogue_deinit(&cat, &plan->mem);
    return w.out ? TQKV_OK : TQKV_ERR_NO_MEMORY;
}

/* Logs the first field of a layer that is wrong; true when there is one. */
static bool layer_is_bad(const tqkv_plan *plan, uint32_t i, const tqkv_logger *log)
{
    const tqkvi_layer_plan *layer = &plan->layers[i];
    if (layer->shape.n_kv_heads == 0)
        return false;
    const char *why = tqkvi_shape_fault(&layer->shape);
    if (!why)
        why = tqkvi_tiers_fault(&layer->shape, plan->n_tiers);
    if (why) {
        tqkvi_log(log, TQKV_LOG_ERROR, "plan: layer %u: %s", i, why);
        return true;
    }
    for (size_t side = 0; side < 2; side++) {
        const uint32_t dim = tqkvi_shape_dim(&layer->shape, (tqkv_side)side);
        for (uint32_t g = 0; g < layer->shape.n_kv_heads; g++) {
            why = tqkvi_head_fault(&layer->heads[side][g], dim, plan->n_tiers);
            if (why) {
                tqkvi_log(log, TQKV_LOG_ERROR, "plan: layer %u, %s head %u: %s", i,
                          side == 0 ? "K" : "V", g, why);
                return true;
            }
        }
    }
    return false;
}

tqkv_status tqkvi_plan_seal(tqkv_plan *plan, const tqkv_logger *log)
{
    const char *names[3] = {plan->model, plan->arch, plan->profile};
    const char *why = tqkvi_numbers_fault(plan);
    for (size_t i = 0; i < 3 && !why; i++)
        why = tqkvi_name_fault(names[i], strlen(names[i]));
    if (why) {
        tqkvi_log(log, TQKV_LOG_ERROR, "plan: %s", why);
        return TQKV_ERR_INVALID_ARG;
    }
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        if (layer_is_bad(plan, i, log))
            return TQKV_ERR_INVALID_ARG;
    }
    for (uint32_t i = 0; i < plan->n_layers; i++)
        tqkvi_layer_set_token_bytes(&plan->layers[i], plan->n_tiers);

    uint8_t *bytes;
    size_t n_bytes;
    TQKV_TRY(tqkvi_plan_serialise(plan, &bytes, &n_bytes));
    memcpy(plan->fingerprint, bytes + TQKVI_PLAN_FINGERPRINT_AT, sizeof(plan->fingerprint));
    tqkvi_free(&plan->mem, bytes);
    return TQKV_OK;
}
