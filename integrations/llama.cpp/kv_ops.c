/* SPDX-License-Identifier: Apache-2.0 */
/* The operations on a KV cache that the stores do themselves. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "float_bits.h"
#include "kv_cells.h"
#include "kv_backend.h"
#include "kv_graph.h"
#include "kv_rows.h"

static tqkv_plugin_observer_fn *observer;
static void *observer_user;
static atomic_uint_fast64_t last_pass;

void tqkvp_set_observer(tqkv_plugin_observer_fn *observe, void *user)
{
    observer = observe;
    observer_user = user;
}

bool tqkvp_is_observed(void)
{
    return observer != NULL;
}

static tqkvp_done failed(const tqkvp_layer *layer, const char *what, tqkv_status status)
{
    tqkvp_say("stopped: layer %u: %s: %s", layer->index, what, tqkv_status_text(status));
    return TQKVP_FAILED;
}

static bool reserve(void **place, size_t *have, size_t want)
{
    if (want <= *have)
        return true;
    free(*place);
    want = (want + want / 4 + TQKV_ALIGN - 1) & ~(size_t)(TQKV_ALIGN - 1);
    *place = aligned_alloc(TQKV_ALIGN, want);
    *have = *place ? want : 0;
    return *place != NULL;
}

/* --- SET_ROWS --- */

/* Reads the cells of a node into `cells`; false where they are not all inside the tensor. */
static bool read_cells(const ggml_tensor *node, const tqkvp_tensor *tensor, int64_t n,
                       int64_t *cells)
{
    for (int64_t i = 0; i < n; i++)
        if (!tqkvp_cell_at(node, tensor, i, &cells[i]))
            return false;
    return true;
}

static bool same_cells(const tqkvp_backend *backend, const int64_t *cells, int64_t n)
{
    return backend->n_cells == n && memcmp(backend->cells, cells, (size_t)n * sizeof(*cells)) == 0;
}

static void begin_pass(tqkvp_backend *backend, tqkvp_layer *layer)
{
    if (backend->pass == 0 || layer->last_pass == backend->pass) {
        backend->pass = atomic_fetch_add(&last_pass, 1) + 1;
        backend->positions_of = NULL;
    }
    layer->last_pass = backend->pass;
}

const int32_t *tqkvp_row_positions(tqkvp_backend *backend, const ggml_tensor *node)
{
    tqkvp_layer *layer = tqkvp_tensor_of(node)->layer;
    const ggml_tensor *rope = tqkvp_rope_behind(node->src[0], !layer->sides[TQKV_SIDE_V]);
    const int64_t n = node->src[0]->ne[1];

    begin_pass(backend, layer);
    if (!rope)
        return NULL;
    const ggml_tensor *source = rope->src[1];
    if (backend->positions_of == source && backend->n_positions == n)
        return backend->positions;
    const int32_t *positions = tqkvp_rope_positions(rope, n);
    if (!positions)
        return NULL;
    size_t have = (size_t)backend->positions_max * sizeof(int32_t);
    void *place = backend->positions;
    const bool ok = reserve(&place, &have, (size_t)n * sizeof(int32_t));
    backend->positions = place;
    backend->positions_max = (int64_t)(have / sizeof(int32_t));
    backend->positions_of = ok ? source : NULL;
    backend->n_positions = n;
    if (!ok)
        return NULL;
    memcpy(backend->positions, positions, (size_t)n * sizeof(int32_t));
    return backend->positions;
}

static tqkvp_done begin_batch(tqkvp_backend *backend, tqkvp_layer *layer, const ggml_tensor *node,
                              const int64_t *cells, int64_t n)
{
    const tqkvp_tensor *tensor = tqkvp_tensor_of(node);
    const int32_t *positions = NULL;

    if (tqkvp_commit(backend) != TQKVP_DONE)
        return TQKVP_FAILED;
    if (tensor->side == TQKV_SIDE_K)
        positions = tqkvp_row_positions(backend, node);
    size_t have = (size_t)backend->cells_max * sizeof(*cells);
    void *place = backend->cells;
    const bool ok = reserve(&place, &have, (size_t)n * sizeof(*cells));
    backend->cells = place;
    backend->cells_max = (int64_t)(have / sizeof(*cells));
    if (!ok)
        return failed(layer, "a batch", TQKV_ERR_NO_MEMORY);
    memcpy(backend->cells, cells, (size_t)n * sizeof(*cells));
    backend->n_cells = n;

    const tqkv_status status =
        tqkv_batch_begin(backend->batch, layer->store, cells, positions, (size_t)n);
    if (status == TQKV_ERR_INVALID_ARG)
        return TQKVP_NOT_OURS; /* one cell twice */
    if (status != TQKV_OK)
        return failed(layer, "a batch", status);
    backend->open = layer;
    backend->has_positions = positions != NULL;
    layer->written = true;
    layer->copied_from = NULL;
    return TQKVP_DONE;
}

tqkvp_done tqkvp_do_set_rows(tqkvp_backend *backend, const ggml_tensor *node)
{
    tqkvp_tensor *tensor = tqkvp_tensor_of(node);
    tqkvp_layer *layer = tensor->layer;
    const ggml_tensor *rows = node->src[0];
    const int64_t n = rows->ne[1];
    tqkvp_done done = TQKVP_DONE;

    if (tqkvp_type_of(rows) != TQKVP_TYPE_F32 || rows->nb[0] != sizeof(float) ||
        rows->ne[0] != tensor->row_values || node->ne[0] != tensor->row_values ||
        rows->ne[2] != 1 || rows->ne[3] != 1 || rows->nb[1] % sizeof(float) != 0 ||
        (node->view_src && node->view_offs % tensor->row_bytes != 0))
        return TQKVP_NOT_OURS;
    if (n == 0)
        return TQKVP_DONE;
    tqkvp_rows_settle(tensor);

    int64_t *cells = malloc((size_t)n * sizeof(*cells));
    if (!cells)
        return failed(layer, "a batch", TQKV_ERR_NO_MEMORY);
    if (!read_cells(node, tensor, n, cells))
        done = TQKVP_NOT_OURS;
    else if (backend->open != layer || tensor->side == TQKV_SIDE_K ||
             !same_cells(backend, cells, n))
        done = begin_batch(backend, layer, node, cells, n);
    free(cells);
    if (done != TQKVP_DONE)
        return done;

    tqkv_status status = TQKV_OK;
    tqkvp_part parts[2];
    const size_t n_parts = tqkvp_row_parts(tensor, parts);
    for (size_t i = 0; i < n_parts && status == TQKV_OK; i++)
        status = tqkv_batch_put(backend->batch, parts[i].side,
                                (const float *)rows->data + parts[i].first,
                                rows->nb[1] / sizeof(float));
    return status == TQKV_OK ? TQKVP_DONE : failed(layer, "storing rows", status);
}

tqkvp_done tqkvp_commit(tqkvp_backend *backend)
{
    const tqkvp_layer *layer = backend->open;

    if (!layer)
        return TQKVP_DONE;
    backend->open = NULL;
    backend->n_cells = 0;
    const tqkv_status status =
        tqkv_batch_commit(backend->batch, tqkvp_team_parallel(&backend->team));
    return status == TQKV_OK ? TQKVP_DONE : failed(layer, "encoding", status);
}

/* --- FLASH_ATTN_EXT --- */

static float param_f32(const ggml_tensor *node, int word)
{
    float x;

    memcpy(&x, &node->op_params[word], sizeof(x));
    return x;
}

/*
 * ALiBi: head h scales the mask by a power of 2^(-max_bias / m), m the largest power of two within
 * the heads; the heads beyond m take the odd powers of its square root.
 */
static const float *find_slopes(tqkvp_backend *backend, uint32_t n_heads, float max_bias)
{
    uint32_t m = 1;

    if (!(max_bias > 0.0f))
        return NULL;
    while (2 * m <= n_heads)
        m *= 2;
    const float base = powf(2.0f, -max_bias / (float)m);
    const float half = powf(2.0f, -max_bias / 2.0f / (float)m);
    for (uint32_t h = 0; h < n_heads; h++)
        backend->slopes[h] =
            h < m ? powf(base, (float)(h + 1)) : powf(half, (float)(2 * (h - m) + 1));
    return backend->slopes;
}

/* The mask of one stream as f16; false for a layout that no host makes. */
static bool find_mask(tqkvp_backend *backend, const ggml_tensor *mask, int64_t stream,
                      tqkv_attend_args *args)
{
    if (!mask)
        return true;
    if (mask->ne[2] != 1 || mask->ne[0] < args->n_cells || mask->ne[1] < args->n_q)
        return false;
    const char *data = (const char *)mask->data + (size_t)(stream % mask->ne[3]) * mask->nb[3];
    if (tqkvp_type_of(mask) == TQKVP_TYPE_F16 && mask->nb[0] == 2) {
        args->mask = (const uint16_t *)(const void *)data;
        args->mask_row_stride = mask->nb[1] / 2;
        return true;
    }
    if (tqkvp_type_of(mask) != TQKVP_TYPE_F32 || mask->nb[0] != 4)
        return false;
    void *place = backend->mask;
    const bool ok = reserve(&place, &backend->mask_max, (size_t)args->n_q * args->n_cells * 2);
    backend->mask = place;
    if (!ok)
        return false;
    for (uint32_t i = 0; i < args->n_q; i++)
        for (uint32_t t = 0; t < args->n_cells; t++)
            backend->mask[(size_t)i * args->n_cells + t] =
                tqkvp_f32_to_f16(((const float *)(const void *)(data + i * mask->nb[1]))[t]);
    args->mask = backend->mask;
    args->mask_row_stride = args->n_cells;
    return true;
}

/* Shows the open batch to the program that asked for it. */
static void observe(tqkvp_backend *backend, tqkvp_layer *layer, const tqkv_attend_args *args)
{
    if (!observer || backend->open != layer || (int64_t)args->n_q != backend->n_cells)
        return;
    const tqkv_plugin_event event = {
        .struct_bytes = sizeof(event),
        .layer = layer->index,
        .n_tokens = args->n_q,
        .n_heads = layer->shape.n_heads,
        .n_kv_heads = layer->shape.n_kv_heads,
        .k_dim = layer->shape.k_dim,
        .v_dim = layer->shape.v_dim,
        .n_cells = args->n_cells,
        .q = args->q,
        .q_token_stride = args->q_token_stride,
        .q_head_stride = args->q_head_stride,
        .k = tqkv_batch_rows(backend->batch, TQKV_SIDE_K),
        .v = tqkv_batch_rows(backend->batch, TQKV_SIDE_V),
        .positions = backend->has_positions ? backend->positions : NULL,
        .rope = tqkvp_layer_rope(layer),
        .scale = args->scale,
        .softcap = args->softcap,
        .q_latent = args->q_latent,
    };
    observer(observer_user, &event);
}

/* Bytes of a row before its value `n`. */
static size_t bytes_before(const tqkvp_tensor *tensor, int64_t n)
{
    return (size_t)n * tensor->row_bytes / (size_t)tensor->row_values;
}

/* Whether the node looks at the cells of its layer the way llama.cpp does. */
static bool attention_is_ours(const ggml_tensor *node, const tqkvp_layer *layer)
{
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
    const tqkvp_tensor *k_side = layer->sides[TQKV_SIDE_K];
    const tqkv_plan_layer *shape = &layer->shape;
    const tqkvp_tensor *v_side = shape->is_latent ? k_side : layer->sides[TQKV_SIDE_V];
    const uint32_t key_dim = shape->is_latent ? shape->k_dim + shape->v_dim : shape->k_dim;
    tqkvp_part parts[2];
    const size_t latent_at =
        tqkvp_row_parts(k_side, parts) == 2 ? bytes_before(k_side, parts[1].first) : 0;

    if (!v_side || tqkvp_tensor_of(k) != k_side || tqkvp_tensor_of(v) != v_side)
        return false;
    return layer->shape_known && q->ne[0] == key_dim && q->ne[2] == shape->n_heads &&
           k->ne[0] == key_dim && k->ne[2] == shape->n_kv_heads && v->ne[0] == shape->v_dim &&
           v->ne[2] == shape->n_kv_heads && k->ne[1] == v->ne[1] && k->ne[1] <= layer->n_cells &&
           k->nb[1] == k_side->row_bytes && v->nb[1] == v_side->row_bytes &&
           k->view_offs % (k_side->row_bytes * layer->n_cells) == 0 &&
           v->view_offs / v_side->row_bytes == k->view_offs / k_side->row_bytes &&
           (!shape->is_latent || v->view_offs == k->view_offs + latent_at) &&
           tqkvp_type_of(q) == TQKVP_TYPE_F32 && q->nb[0] == sizeof(float) &&
           shape->n_heads <= sizeof(((tqkvp_backend *)0)->slopes) / sizeof(float);
}

/* A query of a latent layer has its parts where a row has them. */
static void find_queries(const tqkvp_layer *layer, const void *data, tqkv_attend_args *args)
{
    tqkvp_part parts[2];

    args->q = data;
    if (tqkvp_row_parts(layer->sides[TQKV_SIDE_K], parts) == 2) {
        args->q = (const float *)data + parts[0].first;
        args->q_latent = (const float *)data + parts[1].first;
    }
}

tqkvp_done tqkvp_do_attention(tqkvp_backend *backend, const ggml_tensor *node)
{
    const ggml_tensor *q = node->src[0], *k = node->src[1];
    tqkvp_layer *layer = tqkvp_tensor_of(k)->layer;

    if (!attention_is_ours(node, layer))
        return TQKVP_NOT_OURS;
    if (backend->open != layer && tqkvp_commit(backend) != TQKVP_DONE)
        return TQKVP_FAILED;
    for (int side = 0; side < 2; side++)
        if (layer->sides[side])
            tqkvp_rows_settle(layer->sides[side]);

    tqkv_attend_args args;
    tqkv_attend_args_init(&args);
    args.n_q = (uint32_t)q->ne[1];
    args.n_cells = (uint32_t)k->ne[1];
    args.q_token_stride = q->nb[1] / sizeof(float);
    args.q_head_stride = q->nb[2] / sizeof(float);
    args.out_token_stride = node->nb[2] / sizeof(float);
    args.out_head_stride = node->nb[1] / sizeof(float);
    args.scale = param_f32(node, 0);
    args.softcap = param_f32(node, 2);
    args.slopes = find_slopes(backend, layer->shape.n_heads, param_f32(node, 1));
    args.sinks = node->src[4] ? node->src[4]->data : NULL;

    const tqkv_parallel *parallel = tqkvp_team_parallel(&backend->team);
    if (!reserve(&backend->scratch, &backend->scratch_bytes,
                 tqkv_store_scratch_bytes(layer->store, args.n_q, parallel->n_workers)))
        return failed(layer, "attention", TQKV_ERR_NO_MEMORY);
    args.scratch = backend->scratch;

    const size_t stream_bytes = layer->sides[TQKV_SIDE_K]->row_bytes * layer->n_cells;
    const tqkv_batch *batch = backend->open == layer ? backend->batch : NULL;
    for (int64_t s = 0; s < q->ne[3]; s++) {
        args.stream = (uint32_t)(k->view_offs / stream_bytes + (size_t)s);
        find_queries(layer, (const char *)q->data + (size_t)s * q->nb[3], &args);
        args.out = (float *)(void *)((char *)node->data + (size_t)s * node->nb[3]);
        if (!find_mask(backend, node->src[3], s, &args))
            return TQKVP_NOT_OURS;
        if (q->ne[3] == 1)
            observe(backend, layer, &args);
        const tqkv_status status = tqkv_store_attend(layer->store, batch, &args, parallel);
        if (status != TQKV_OK)
            return failed(layer, "attention", status);
    }
    return TQKVP_DONE;
}

/* --- ROPE on the cache: cells move to other positions --- */

tqkvp_done tqkvp_do_shift(tqkvp_backend *backend, const ggml_tensor *node)
{
    tqkvp_tensor *tensor = tqkvp_tensor_of(node);
    tqkvp_layer *layer = tensor->layer;
    const ggml_tensor *deltas = node->src[1];
    tqkvp_part parts[2]; /* the first turns */
    tqkvp_rope rope;

    if (tqkvp_commit(backend) != TQKVP_DONE)
        return TQKVP_FAILED;
    if (!layer->written)
        return TQKVP_DONE; /* turning zeros */
    const tqkv_rope stored = tqkvp_layer_rope(layer);
    (void)tqkvp_row_parts(tensor, parts);
    if (tensor->side != TQKV_SIDE_K || tqkvp_tensor_of(node->src[0]) != tensor ||
        node->view_offs != bytes_before(tensor, parts[0].first) ||
        node->nb[2] != tensor->row_bytes || node->ne[2] != tensor->n_rows ||
        !layer->shape_known || node->ne[1] != layer->shape.n_kv_heads || node->ne[3] != 1 ||
        !tqkvp_rope_read(node, layer->shape.k_dim, &rope) ||
        !tqkvp_rope_equal(&rope.rope, &stored) || tqkvp_type_of(deltas) != TQKVP_TYPE_I32 ||
        !deltas->data || deltas->ne[0] != tensor->n_rows)
        return TQKVP_NOT_OURS;

    tqkvp_rows_settle(tensor);
    for (uint32_t s = 0; s < layer->n_streams; s++) {
        const int64_t first = (int64_t)s * layer->n_cells;
        const int32_t *d = (const int32_t *)deltas->data + first;
        bool moves = false;
        for (uint32_t i = 0; i < layer->n_cells && !moves; i++)
            moves = d[i] != 0;
        if (!moves)
            continue;
        const tqkv_status status = tqkv_store_shift(layer->store, first, d, layer->n_cells);
        if (status != TQKV_OK)
            return failed(layer, "moving cells", status);
        layer->copied_from = NULL;
    }
    return TQKVP_DONE;
}

/* --- CPY out of the cache and back: how the host shifts a quantised one --- */

/* Where run (i1, i2, i3) of a view of the cache lies: its row, and the first value in it. */
typedef struct run_place {
    int64_t row, value;
} run_place;

static bool find_run(const tqkvp_tensor *tensor, const ggml_tensor *view, int64_t i1, int64_t i2,
                     int64_t i3, run_place *place)
{
    const size_t offset = (view->view_src ? view->view_offs : 0) + (size_t)i1 * view->nb[1] +
                          (size_t)i2 * view->nb[2] + (size_t)i3 * view->nb[3];

    place->row = (int64_t)(offset / tensor->row_bytes);
    /* bytes of a row are proportional to its values, whole blocks at a time */
    place->value =
        (int64_t)(offset % tensor->row_bytes) * tensor->row_values / (int64_t)tensor->row_bytes;
    return place->row < tensor->n_rows && place->value + view->ne[0] <= tensor->row_values;
}

/* A row of the cache that is looked at or changed piece by piece. */
typedef struct row_window {
    tqkvp_tensor *tensor;
    int64_t row; /* -1: none */
    float *now, *before;
    bool ok;
} row_window;

/*
 * Writes the row back if it has changed by more than rounding: a row that went out and came back
 * keeps its codes.
 */
static void window_flush(row_window *window)
{
    const int64_t n = window->tensor->row_values;
    double change = 0.0, size = 0.0;

    if (window->row < 0)
        return;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)window->now[i] - window->before[i];
        change += d * d;
        size += (double)window->before[i] * window->before[i];
    }
    if (change > 1e-10 * size &&
        tqkvp_cell_write(window->tensor, window->row, window->now) != TQKV_OK)
        window->ok = false;
    window->row = -1;
}

static bool window_move(row_window *window, int64_t row, bool writes)
{
    if (window->row == row)
        return window->ok;
    if (writes)
        window_flush(window);
    window->row = row;
    if (tqkvp_cell_read(window->tensor, row, window->now) != TQKV_OK)
        window->ok = false;
    if (writes)
        memcpy(window->before, window->now, (size_t)window->tensor->row_values * sizeof(float));
    return window->ok;
}

static bool is_f32_packed(const ggml_tensor *t)
{
    return tqkvp_type_of(t) == TQKVP_TYPE_F32 && t->nb[0] == 4 &&
           t->nb[1] == 4 * (size_t)t->ne[0] && t->nb[2] == t->nb[1] * (size_t)t->ne[1] &&
           t->nb[3] == t->nb[2] * (size_t)t->ne[2];
}

tqkvp_done tqkvp_do_copy(tqkvp_backend *backend, const ggml_tensor *node)
{
    tqkvp_tensor *to = tqkvp_tensor_of(node), *from = tqkvp_tensor_of(node->src[0]);
    const bool writes = to != NULL;
    const ggml_tensor *view = writes ? node : node->src[0];
    const ggml_tensor *values = writes ? node->src[0] : node;
    row_window window = {.tensor = writes ? to : from, .row = -1, .ok = true};

    if (tqkvp_commit(backend) != TQKVP_DONE)
        return TQKVP_FAILED;
    if ((to && from) || !is_f32_packed(values) || view->ne[0] != values->ne[0] ||
        view->ne[1] != values->ne[1] || view->ne[2] != values->ne[2] ||
        view->ne[3] != values->ne[3])
        return TQKVP_NOT_OURS;
    tqkvp_rows_settle(window.tensor);
    window.now = malloc((size_t)window.tensor->row_values * sizeof(float));
    window.before = malloc((size_t)window.tensor->row_values * sizeof(float));
    window.ok = window.now && window.before;

    float *run = values->data;
    const size_t run_bytes = (size_t)view->ne[0] * sizeof(float);
    bool fits = true;
    for (int64_t i3 = 0; i3 < view->ne[3] && fits; i3++) {
        for (int64_t i2 = 0; i2 < view->ne[2] && fits; i2++) {
            for (int64_t i1 = 0; i1 < view->ne[1] && fits; i1++, run += view->ne[0]) {
                run_place place;
                fits = window.ok && find_run(window.tensor, view, i1, i2, i3, &place) &&
                       window_move(&window, place.row, writes);
                if (!fits)
                    break;
                if (writes)
                    memcpy(window.now + place.value, run, run_bytes);
                else
                    memcpy(run, window.now + place.value, run_bytes);
            }
        }
    }
    if (writes && window.ok)
        window_flush(&window);
    free(window.now);
    free(window.before);
    if (!window.ok)
        return failed(window.tensor->layer, "copying rows", TQKV_ERR_NO_MEMORY);
    return fits ? TQKVP_DONE : TQKVP_NOT_OURS;
}
