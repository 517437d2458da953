/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which nodes we take and how a graph runs.
 *
 * Where nothing but the CPU computes beside us we take all that the CPU takes, so that the host
 * makes one graph of the whole model. Our own CPU backend runs it, and for that time the nodes on
 * caches in codes are custom nodes that call us: the host's threads come to us and go on. They
 * change in place, since the host knows by address who uses which result. Nodes on plain storage
 * stay as they are.
 *
 * Hosts probe with dummy buffers of our type, and whoever says yes there receives the weights of
 * the model: a node on a tensor without memory is taken for its name, never because "the buffer is
 * ours".
 */
#include "kv_graph.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kv_backend.h"
#include "kv_report.h"
#include "kv_short.h"

/* --- which nodes --- */

/* A source whose memory is a KV cache, with or without a record (dry runs have none), or NULL. */
static const ggml_tensor *cache_source(const ggml_tensor *node)
{
    uint32_t index;
    tqkv_side side;

    for (int i = 0; i < GGML_SOURCES; i++) {
        const ggml_tensor *src = node->src[i];
        if (src && tqkvp_is_ours(src) && tqkvp_op_of(tqkvp_root(src)) == TQKVP_OP_NONE &&
            tqkvp_cache_name(tqkvp_root(src)->name, &index, &side))
            return src;
    }
    return NULL;
}

/* The result of the node lives in a cache or in other state of a model. */
static bool is_state(const ggml_tensor *node)
{
    return tqkvp_is_ours(node) && tqkvp_op_of(tqkvp_root(node)) == TQKVP_OP_NONE;
}

/* What a node on a cache tells about its layer. */
static void learn(const ggml_tensor *node)
{
    const tqkvp_tensor *tensor = tqkvp_tensor_of(node);
    const tqkvp_op op = tqkvp_op_of(node);

    if (tensor) {
        if (op == TQKVP_OP_SET_ROWS)
            tqkvp_layer_learn_rows(tensor->layer, node);
        return;
    }
    const ggml_tensor *cache = cache_source(node);
    tensor = cache ? tqkvp_tensor_of(cache) : NULL;
    if (tensor && op == TQKVP_OP_FLASH_ATTN)
        tqkvp_layer_learn_attention(tensor->layer, node);
    else if (tensor && op == TQKVP_OP_MUL_MAT)
        tqkvp_layer_wish_plain(tensor->layer, "flash attention is off");
}

/* A tensor of our type in a buffer without memory that is no state of a model: a probe. */
static bool is_probe(const ggml_tensor *t)
{
    const ggml_tensor *root = tqkvp_root(t);

    return tqkvp_is_ours(root) && !tqkvp_buffer_context(root->buffer) &&
           strncmp(root->name, "cache_", 6) != 0;
}

/*
 * Of the context that was made last. Others that compute would get nothing to do any more if we
 * took all, and users may not want it (TQKV_GRAPH). And a host that keeps the cache of some layers
 * to itself wants their attention to be computed by the device that it gave these layers to.
 */
static atomic_bool takes_all;

static void find_others(const ggml_device *ours)
{
    typedef int32_t type_fn(ggml_device *device);
    const tqkvp_host *host = tqkvp_host_get();
    tqkvp_config config;
    bool alone = tqkvp_config_read(&config) && !config.splits_graph;

    for (size_t i = 0; i < host->dev_count(); i++) {
        ggml_device *device = host->dev_get(i);
        const int32_t type = ((type_fn *)device->functions[GGML_DEVICE_TYPE])(device);
        alone = alone && (type == GGML_DEVICE_CPU || device == ours);
    }
    atomic_store(&takes_all, alone);
}

bool tqkvp_supports_op(const ggml_tensor *node)
{
    typedef bool supports_fn(ggml_device *device, const ggml_tensor *node);
    ggml_device *cpu = tqkvp_host_get()->cpu;
    uint32_t index;
    tqkv_side side;

    if (is_state(node) || cache_source(node)) {
        learn(node);
        return true;
    }
    if (tqkvp_op_of(node) == TQKVP_OP_SET_ROWS &&
        tqkvp_cache_name(tqkvp_root(node)->name, &index, &side))
        atomic_store(&takes_all, false);
    if (!atomic_load(&takes_all))
        return false;
    for (int i = 0; i < GGML_SOURCES; i++)
        if (node->src[i] && is_probe(node->src[i]))
            return false;
    return ((supports_fn *)cpu->functions[GGML_DEVICE_SUPPORTS_OP])(cpu, node);
}

bool tqkvp_supports_buffer_type(ggml_buffer_type *type)
{
    typedef bool supports_fn(ggml_device *device, ggml_buffer_type *type);
    ggml_device *cpu = tqkvp_host_get()->cpu;

    return type == tqkvp_buffer_type() || tqkvp_host_get()->buft_is_host(type) ||
           ((supports_fn *)cpu->functions[GGML_DEVICE_SUPPORTS_BUFT])(cpu, type);
}

/* --- one node --- */

/* The layer that the result (which < 0) or a source of a node belongs to, or NULL. */
static tqkvp_layer *layer_at(const ggml_tensor *node, int which)
{
    const ggml_tensor *t = which < 0 ? node : node->src[which];
    const tqkvp_tensor *tensor = t ? tqkvp_tensor_of(t) : NULL;

    return tensor ? tensor->layer : NULL;
}

/* The first of the layers whose cells a node writes or reads, or NULL. */
static tqkvp_layer *layer_of_node(const ggml_tensor *node)
{
    tqkvp_layer *layer = NULL;

    for (int i = -1; i < GGML_SOURCES && !layer; i++)
        layer = layer_at(node, i);
    return layer;
}

/* Makes every layer that the node touches plain and lets the CPU compute it. */
static int32_t delegate(tqkvp_backend *backend, ggml_tensor *node, const char *why)
{
    int32_t status = GGML_OK;
    char text[96];

    if (tqkvp_commit(backend) != TQKVP_DONE)
        return GGML_FAILED;
    if (!why) {
        snprintf(text, sizeof(text), "operation %s", tqkvp_host_get()->op_name(node->op));
        why = text;
    }
    for (int i = -1; i < GGML_SOURCES && status == GGML_OK; i++) {
        tqkvp_layer *layer = layer_at(node, i);
        if (!layer)
            continue;
        status = layer->failed ? GGML_FAILED : tqkvp_layer_make_plain(layer, why);
        if (i < 0)
            layer->written = true;
    }
    if (status != GGML_OK)
        return status;
    if (!backend->aside && !(backend->aside = tqkvp_cpu_create())) {
        tqkvp_say("stopped: the host gives no CPU backend for %s",
                  tqkvp_host_get()->op_name(node->op));
        return GGML_FAILED;
    }
    return tqkvp_cpu_node(backend->aside, node);
}

static int32_t compute_node(tqkvp_backend *backend, ggml_tensor *node)
{
    const tqkvp_layer *layer = layer_of_node(node);
    const bool in_cache = tqkvp_tensor_of(node) != NULL;
    tqkvp_done done = TQKVP_NOT_OURS;

    if (layer->plain) /* since an earlier node of this graph, or it is not the only layer */
        return delegate(backend, node, layer->why);
    switch (tqkvp_op_of(node)) {
    case TQKVP_OP_SET_ROWS:
        if (in_cache)
            done = tqkvp_do_set_rows(backend, node);
        break;
    case TQKVP_OP_FLASH_ATTN:
        done = tqkvp_do_attention(backend, node);
        /* while the helpers are here */
        if (done == TQKVP_DONE && backend->open == layer)
            done = tqkvp_commit(backend);
        break;
    case TQKVP_OP_ROPE:
        if (in_cache)
            done = tqkvp_do_shift(backend, node);
        break;
    case TQKVP_OP_CPY:
        done = tqkvp_do_copy(backend, node);
        break;
    default:
        break;
    }
    if (done == TQKVP_NOT_OURS)
        return delegate(backend, node, NULL);
    return done == TQKVP_DONE ? GGML_OK : GGML_FAILED;
}

/* --- running a graph --- */

static bool has_helpers(const tqkvp_slot *slot)
{
    return tqkvp_op_of(&slot->original) == TQKVP_OP_FLASH_ATTN;
}

/* What a custom node calls, on each of the host's threads. */
static void compute_slot(ggml_tensor *node, int ith, int nth, void *user)
{
    tqkvp_slot *slot = user;
    tqkvp_backend *backend = slot->backend;
    const unsigned number = (unsigned)(slot - backend->slots);

    if (ith != 0) {
        if (has_helpers(slot))
            tqkvp_team_help(&backend->team, number, (size_t)ith);
        return;
    }
    tqkvp_team_begin(&backend->team, has_helpers(slot) ? nth : 1);
    if (backend->status == GGML_OK)
        backend->status = compute_node(backend, &slot->original);
    /* the host computes the rest of the graph: not with what happens to be in memory */
    if (backend->status != GGML_OK && !layer_at(&slot->original, -1))
        memset(node->data, 0, tqkvp_host_get()->nbytes(node));
    tqkvp_team_end(&backend->team, number);
}

static tqkvp_slot *add_slot(tqkvp_backend *backend)
{
    if (backend->n_slots == backend->slots_max) {
        const size_t n = 2 * backend->slots_max + 128;
        tqkvp_slot *slots = realloc(backend->slots, n * sizeof(*slots));
        if (!slots)
            return NULL;
        backend->slots = slots;
        backend->slots_max = n;
    }
    return &backend->slots[backend->n_slots++];
}

/* Finds the nodes on caches, and hears what they tell before any layer is opened. */
static int32_t find_nodes(tqkvp_backend *backend, struct ggml_cgraph *graph)
{
    const tqkvp_host *host = tqkvp_host_get();
    const int n = host->graph_n_nodes(graph);

    backend->n_slots = 0;
    for (int i = 0; i < n; i++) {
        ggml_tensor *node = host->graph_node(graph, i);
        const tqkvp_op op = tqkvp_op_of(node);
        if (op == TQKVP_OP_NONE || op == TQKVP_OP_VIEW ||
            (host->sets_compute_flag && !(node->flags & GGML_FLAG_COMPUTE)) || !layer_of_node(node))
            continue;
        tqkvp_slot *slot = add_slot(backend);
        if (!slot)
            return GGML_ALLOC_FAILED;
        slot->node = node;
        learn(node);
    }
    return GGML_OK;
}

/* Whether layers of a node can stay short. */
static void look_at_layers(const ggml_tensor *node)
{
    for (int i = -1; i < GGML_SOURCES; i++) {
        tqkvp_layer *layer = layer_at(node, i);
        if (layer)
            tqkvp_short_look(layer, node);
    }
}

/* *in_codes: the layer has its cells in a store while this graph runs. */
static int32_t open_layer(tqkvp_layer *layer, bool *in_codes)
{
    const int32_t status = layer->is_short && !layer->outgrown ? GGML_OK : tqkvp_layer_open(layer);

    *in_codes = status == GGML_OK && !layer->plain && !tqkvp_short_goes_on(layer);
    return status;
}

/* Opens the layers of a node. *in_codes: it touches one that is not in plain storage. */
static int32_t open_layers(const ggml_tensor *node, bool *in_codes)
{
    *in_codes = false;
    for (int i = -1; i < GGML_SOURCES; i++) {
        tqkvp_layer *layer = layer_at(node, i);
        if (!layer)
            continue;
        tqkvp_announce(layer->buffer);
        bool has_codes;
        const int32_t status = open_layer(layer, &has_codes);
        if (status != GGML_OK)
            return status;
        *in_codes = *in_codes || has_codes;
        layer->written = layer->written || (i < 0 && !has_codes);
    }
    return GGML_OK;
}

/* A short layer keeps the positions of the rows that the host is about to store. */
static int32_t note_rows(tqkvp_backend *backend, const ggml_tensor *node)
{
    const tqkvp_tensor *tensor = tqkvp_tensor_of(node);

    if (!tensor || !tensor->layer->is_short || tensor->side != TQKV_SIDE_K)
        return GGML_OK;
    const int32_t *positions = tqkvp_row_positions(backend, node);
    if (positions)
        tqkvp_short_note(tensor->layer, node, positions);
    return positions ? GGML_OK : GGML_ALLOC_FAILED;
}

/* Leaves the nodes on plain storage to the CPU and makes the others call us. */
static int32_t take_nodes(tqkvp_backend *backend)
{
    size_t n = 0;

    for (size_t i = 0; i < backend->n_slots; i++)
        look_at_layers(backend->slots[i].node);
    for (size_t i = 0; i < backend->n_slots; i++) {
        bool in_codes;
        int32_t status = open_layers(backend->slots[i].node, &in_codes);
        if (status == GGML_OK)
            status = note_rows(backend, backend->slots[i].node);
        if (status != GGML_OK)
            return status;
        if (in_codes)
            backend->slots[n++].node = backend->slots[i].node;
    }
    backend->n_slots = n;
    for (size_t i = 0; i < n; i++) {
        tqkvp_slot *slot = &backend->slots[i];
        slot->backend = backend;
        slot->original = *slot->node;
        const ggml_custom_params params = {.compute = compute_slot,
                                           .n_tasks = has_helpers(slot) ? INT_MAX : 1,
                                           .user = slot};
        slot->node->op = tqkvp_host_get()->custom_op;
        memcpy(slot->node->op_params, &params, sizeof(params));
    }
    return GGML_OK;
}

static void give_back_nodes(const tqkvp_backend *backend)
{
    for (size_t i = 0; i < backend->n_slots; i++) {
        const tqkvp_slot *slot = &backend->slots[i];
        slot->node->op = slot->original.op;
        memcpy(slot->node->op_params, slot->original.op_params, sizeof(ggml_custom_params));
    }
}

static int32_t graph_compute(ggml_backend *handle, struct ggml_cgraph *graph)
{
    tqkvp_backend *backend = (tqkvp_backend *)(void *)handle;

    int32_t status = find_nodes(backend, graph);
    if (status == GGML_OK)
        status = take_nodes(backend);
    if (status != GGML_OK)
        return status;
    backend->status = GGML_OK;
    tqkvp_team_reset(&backend->team);
    status = tqkvp_cpu_graph(backend->cpu, graph);
    give_back_nodes(backend);
    /* the batch never stays open, not even after a failure */
    const tqkvp_done committed = tqkvp_commit(backend);
    if (status == GGML_OK)
        status = backend->status;
    return status == GGML_OK && committed != TQKVP_DONE ? GGML_FAILED : status;
}

/* --- the backend --- */

static const char *backend_name(ggml_backend *backend)
{
    (void)backend;
    return "TURBOQUANT0";
}

static void backend_free(ggml_backend *handle)
{
    tqkvp_backend *backend = (tqkvp_backend *)(void *)handle;

    tqkv_batch_destroy(backend->batch);
    tqkvp_cpu_destroy(backend->cpu);
    tqkvp_cpu_destroy(backend->aside);
    free(backend->slots);
    free(backend->cells);
    free(backend->positions);
    free(backend->scratch);
    free(backend->mask);
    free(backend);
}

ggml_backend *tqkvp_backend_create(ggml_device *device)
{
    /* any 16 bytes of our own */
    static const uint8_t guid[16] = {0x74, 0x71, 0x6b, 0x76, 0x5f, 0x1c, 0x4e, 0x02,
                                     0x9d, 0x33, 0xa8, 0x60, 0x17, 0xbe, 0x05, 0x4c};
    const size_t n = tqkvp_host_get()->n_backend_functions;
    tqkvp_backend *backend = calloc(1, sizeof(*backend));

    if (!backend)
        return NULL;
    backend->context = tqkvp_context_begin();
    backend->cpu = tqkvp_cpu_create();
    if (!backend->cpu || tqkv_batch_create(NULL, &backend->batch) != TQKV_OK) {
        backend_free(&backend->handle);
        return NULL;
    }
    tqkvp_team_init(&backend->team);
    find_others(device);
    void **words = backend->handle.words;
    words[0] = (void *)(uintptr_t)guid;
    words[1] = tqkvp_word((ggml_function *)backend_name);
    words[2] = tqkvp_word((ggml_function *)backend_free);
    /* three entries follow it in either version: events and the optimiser */
    words[1 + n - 4] = tqkvp_word((ggml_function *)graph_compute);
    words[1 + n] = device;
    words[2 + n] = backend;
    return &backend->handle;
}

void tqkvp_backend_set_threads(ggml_backend *handle, int n_threads)
{
    tqkvp_backend *backend = (tqkvp_backend *)(void *)handle;

    /* the host calls this before it computes: by now a cache of ours would exist */
    if (!backend->checked)
        tqkvp_announce_absence(backend->context);
    backend->checked = true;
    tqkvp_cpu_set_threads(backend->cpu, n_threads, atomic_load(&takes_all));
}

void tqkvp_backend_set_abort(ggml_backend *handle, bool (*callback)(void *data), void *data)
{
    tqkvp_cpu_set_abort(((tqkvp_backend *)(void *)handle)->cpu, callback, data);
}
