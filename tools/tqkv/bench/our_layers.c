/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One store for each layer. The first is filled; the others are copies of its codes, so that they
 * lie elsewhere. The tokens that ask stay in open batches, as they are while a model attends.
 */
#include <math.h>
#include <stdlib.h>

#include "bench_layers.h"
#include "spin_pool.h"
#include "tool.h"

struct our_layers {
    const random_layer *layer;
    uint32_t n_layers, depth, n_q;
    tqkv_store **stores;
    tqkv_batch **batches;
    spin_pool *pool;
    tqkv_attend_args args;
};

static int failed(const char *what, tqkv_status status)
{
    return tool_error("%s: %s", what, tqkv_status_text(status));
}

/* Stages tokens [first, first + n), n <= RANDOM_TOKENS, of the repeated text. */
static tqkv_status stage(const random_layer *layer, tqkv_batch *batch, tqkv_store *store,
                         uint32_t first, uint32_t n)
{
    const size_t strides[] = {(size_t)layer->shape.n_kv_heads * layer->shape.k_dim,
                              (size_t)layer->shape.n_kv_heads * layer->shape.v_dim};
    int64_t cells[RANDOM_TOKENS];
    for (uint32_t t = 0; t < n; t++)
        cells[t] = (int64_t)first + t;
    tqkv_status status = tqkv_batch_begin(batch, store, cells, NULL, n);
    for (int side = 0; side < 2 && !status; side++)
        status = tqkv_batch_put(batch, (tqkv_side)side, layer->rows[side], strides[side]);
    return status;
}

static tqkv_status fill(const our_layers *x, tqkv_batch *batch, tqkv_store *store)
{
    tqkv_status status = TQKV_OK;
    for (uint32_t first = 0; first < x->depth && !status; first += RANDOM_TOKENS) {
        const uint32_t left = x->depth - first;
        status = stage(x->layer, batch, store, first, left < RANDOM_TOKENS ? left : RANDOM_TOKENS);
        if (!status)
            status = tqkv_batch_commit(batch, spin_pool_parallel(x->pool));
    }
    return status;
}

static tqkv_status create_stores(our_layers *x, const tqkv_plan *plan, uint32_t plan_layer)
{
    tqkv_store_config config;
    tqkv_store_config_init(&config);
    config.plan = plan;
    config.layer = plan_layer;
    config.n_cells = x->depth + x->n_q;
    config.n_streams = 1;
    tqkv_status status = TQKV_OK;
    for (uint32_t i = 0; i < x->n_layers && !status; i++) {
        status = tqkv_store_create(&config, &x->stores[i]);
        if (!status)
            status = tqkv_batch_create(NULL, &x->batches[i]);
        if (!status)
            status = i ? tqkv_store_copy_stream(x->stores[i], 0, x->stores[0], 0)
                       : fill(x, x->batches[0], x->stores[0]);
        if (!status)
            status = stage(x->layer, x->batches[i], x->stores[i], x->depth, x->n_q);
    }
    return status;
}

static void set_args(our_layers *x, uint32_t n_threads)
{
    const tqkv_plan_layer *shape = &x->layer->shape;
    tqkv_attend_args *args = &x->args;
    tqkv_attend_args_init(args);
    args->n_q = x->n_q;
    args->n_cells = x->depth + x->n_q;
    args->q = x->layer->q;
    args->q_head_stride = shape->k_dim;
    args->q_token_stride = (size_t)shape->n_heads * shape->k_dim;
    args->out_head_stride = shape->v_dim;
    args->out_token_stride = (size_t)shape->n_heads * shape->v_dim;
    args->out = random_layer_alloc(x->n_q * args->out_token_stride * sizeof(float));
    args->scale = 1 / sqrtf((float)shape->k_dim);
    args->causal = 1;
    args->scratch = random_layer_alloc(tqkv_store_scratch_bytes(x->stores[0], x->n_q, n_threads));
}

int our_layers_create(const random_layer *layer, const tqkv_plan *plan, uint32_t plan_layer,
                      const bench_size *size, our_layers **out)
{
    our_layers *x = tool_alloc(1, sizeof(*x));
    x->layer = layer;
    x->n_layers = size->n_layers;
    x->depth = size->depth;
    x->n_q = size->n_q;
    x->stores = tool_alloc(x->n_layers, sizeof(*x->stores));
    x->batches = tool_alloc(x->n_layers, sizeof(*x->batches));
    x->pool = spin_pool_create(size->n_threads);
    *out = x;
    spin_pool_start(x->pool);
    const tqkv_status status = create_stores(x, plan, plan_layer);
    spin_pool_stop(x->pool);
    if (status)
        return failed("filling our layers", status);
    set_args(x, size->n_threads);
    return TOOL_OK;
}

void our_layers_destroy(our_layers *x)
{
    if (!x)
        return;
    for (uint32_t i = 0; i < x->n_layers; i++) {
        tqkv_batch_destroy(x->batches[i]);
        tqkv_store_destroy(x->stores[i]);
    }
    free(x->batches);
    free(x->stores);
    free(x->args.out);
    free(x->args.scratch);
    spin_pool_destroy(x->pool);
    free(x);
}

double our_layers_bytes(const our_layers *x)
{
    return x->depth ? (double)tqkv_store_bytes(x->stores[0]) : 0;
}

const float *our_layers_output(const our_layers *x)
{
    return x->args.out;
}

void our_layers_begin(void *layers)
{
    spin_pool_start(((our_layers *)layers)->pool);
}

void our_layers_run(void *layers)
{
    our_layers *x = layers;
    for (uint32_t i = 0; i < x->n_layers; i++) {
        const tqkv_status status =
            tqkv_store_attend(x->stores[i], x->batches[i], &x->args, spin_pool_parallel(x->pool));
        if (status)
            exit(failed("attention", status));
    }
}

void our_layers_end(void *layers)
{
    spin_pool_stop(((our_layers *)layers)->pool);
}
