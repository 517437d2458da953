/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which nodes we take and how a graph runs. A node is taken by the role of the tensors it touches,
 * never because "the buffer is ours": hosts probe with dummy buffers of our type, and whoever says
 * yes there receives the weights of the model.
 */
#include "kv_graph.h"

#include <stdio.h>
#include <stdlib.h>

#include "kv_backend.h"
#include "kv_report.h"

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

bool tqkvp_supports_op(const ggml_tensor *node)
{
    const ggml_tensor *root = tqkvp_root(node);
    const tqkvp_op op = tqkvp_op_of(node);

    /* the result lives in a cache or in other state of a model */
    if (tqkvp_is_ours(root) && tqkvp_op_of(root) == TQKVP_OP_NONE) {
        const tqkvp_tensor *tensor = tqkvp_tensor_of(root);
        if (tensor && op == TQKVP_OP_SET_ROWS)
            tqkvp_layer_learn_rows(tensor->layer, node);
        return true;
    }
    const ggml_tensor *cache = cache_source(node);
    if (!cache)
        return false;
    const tqkvp_tensor *tensor = tqkvp_tensor_of(cache);
    if (tensor && op == TQKVP_OP_FLASH_ATTN)
        tqkvp_layer_learn_attention(tensor->layer, node);
    else if (tensor && op == TQKVP_OP_MUL_MAT)
        tqkvp_layer_wish_plain(tensor->layer, "flash attention is off");
    return true;
}

/* --- running a graph --- */

/* Makes every layer that the node touches plain and queues the node for the CPU. */
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
        const ggml_tensor *t = i < 0 ? node : node->src[i];
        tqkvp_tensor *tensor = t ? tqkvp_tensor_of(t) : NULL;
        if (!tensor)
            continue;
        status = tensor->layer->failed ? GGML_FAILED : tqkvp_layer_make_plain(tensor->layer, why);
        if (i < 0)
            tensor->layer->written = true;
    }
    if (status != GGML_OK)
        return status;
    if (!backend->cpu && !(backend->cpu = tqkvp_cpu_create())) {
        tqkvp_say("stopped: the host gives no CPU backend for %s",
                  tqkvp_host_get()->op_name(node->op));
        return GGML_FAILED;
    }
    return tqkvp_cpu_add(backend->cpu, node, tqkvp_pool_threads(backend->pool));
}

/* The layer whose cells a node reads or writes, or NULL. */
static tqkvp_layer *layer_of_node(const ggml_tensor *node)
{
    const tqkvp_tensor *tensor = tqkvp_tensor_of(node);

    if (!tensor) {
        const ggml_tensor *cache = cache_source(node);
        tensor = cache ? tqkvp_tensor_of(cache) : NULL;
    }
    return tensor ? tensor->layer : NULL;
}

static int32_t compute_node(tqkvp_backend *backend, ggml_tensor *node)
{
    tqkvp_layer *layer = layer_of_node(node);
    const bool in_cache = tqkvp_tensor_of(node) != NULL;
    tqkvp_done done = TQKVP_NOT_OURS;

    if (!layer)
        return delegate(backend, node, NULL);
    /* graphs that were not split for us first, such as a shift, still tell what they can */
    tqkvp_supports_op(node);
    tqkvp_announce(layer->buffer);
    const int32_t status = tqkvp_layer_open(layer);
    if (status != GGML_OK)
        return status;
    if (layer->plain)
        return delegate(backend, node, layer->why);

    /* what was queued for the CPU comes first */
    if (tqkvp_cpu_flush(backend->cpu, tqkvp_pool_threads(backend->pool)) != GGML_OK)
        return GGML_FAILED;
    switch (tqkvp_op_of(node)) {
    case TQKVP_OP_SET_ROWS:
        if (in_cache)
            done = tqkvp_do_set_rows(backend, node);
        break;
    case TQKVP_OP_FLASH_ATTN:
        done = tqkvp_do_attention(backend, node);
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

static int32_t graph_compute(ggml_backend *handle, struct ggml_cgraph *graph)
{
    const tqkvp_host *host = tqkvp_host_get();
    tqkvp_backend *backend = (tqkvp_backend *)(void *)handle;
    const int n = host->graph_n_nodes(graph);
    int32_t status = GGML_OK;

    for (int i = 0; i < n && status == GGML_OK; i++) {
        ggml_tensor *node = host->graph_node(graph, i);
        const tqkvp_op op = tqkvp_op_of(node);
        if (op == TQKVP_OP_NONE || op == TQKVP_OP_VIEW ||
            (host->sets_compute_flag && !(node->flags & GGML_FLAG_COMPUTE)))
            continue;
        status = compute_node(backend, node);
    }
    /* the batch never stays open, not even after a failure */
    const int32_t flushed = tqkvp_cpu_flush(backend->cpu, tqkvp_pool_threads(backend->pool));
    const tqkvp_done committed = tqkvp_commit(backend);
    if (status == GGML_OK)
        status = flushed;
    if (status == GGML_OK && committed != TQKVP_DONE)
        status = GGML_FAILED;
    return status;
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
    tqkvp_pool_destroy(backend->pool);
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
    backend->pool = tqkvp_pool_create(tqkvp_host_get()->omp_parallel);
    if (!backend->pool || tqkv_batch_create(NULL, &backend->batch) != TQKV_OK) {
        backend_free(&backend->handle);
        return NULL;
    }
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
    tqkvp_pool_set_threads(backend->pool, n_threads);
}
