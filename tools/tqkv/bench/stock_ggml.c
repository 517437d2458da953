/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One graph with a ggml_flash_attn_ext for each layer, over K and V laid out as llama.cpp's cache has them: a row
 * holds all heads of a token. The mask is what llama.cpp gives: f16, one row for each query.
 */
#include <ggml-cpu.h>
#include <ggml.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench_layers.h"
#include "tool.h"

enum { TENSORS_PER_LAYER = 6, MORE_TENSORS = 8 };

struct stock_layers {
    const random_layer *layer;
    bench_size size;
    enum ggml_type type;
    struct ggml_context *ctx;
    struct ggml_tensor *q, *mask, *out;
    struct ggml_cgraph *graph;
    struct ggml_cplan plan;
    double layer_bytes;
};

bool stock_layers_exist(void)
{
    return true;
}

static bool find_type(const char *name, enum ggml_type *out)
{
    static const enum ggml_type types[] = {GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                           GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1,
                                           GGML_TYPE_Q4_0};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        if (strcmp(ggml_type_name(types[i]), name) == 0) {
            *out = types[i];
            return true;
        }
    }
    return false;
}

/* The text from its beginning, repeated, into tokens [first, end). */
static void put_text(const stock_layers *x, tqkv_side side, const struct ggml_tensor *rows,
                     int64_t first, int64_t end)
{
    for (int64_t t = first; t < end; t += RANDOM_TOKENS) {
        const int64_t n = end - t < RANDOM_TOKENS ? end - t : RANDOM_TOKENS;
        ggml_quantize_chunk(x->type, x->layer->rows[side],
                            (char *)rows->data + (size_t)t * rows->nb[2], 0,
                            n * x->layer->shape.n_kv_heads, rows->ne[0], NULL);
    }
}

/* [n_kv][n_kv_heads][dim], with the same tokens as our_layers.c has. */
static struct ggml_tensor *make_side(const stock_layers *x, tqkv_side side)
{
    const tqkv_plan_layer *shape = &x->layer->shape;
    const int64_t depth = x->size.depth, n_kv = depth + x->size.n_q;
    struct ggml_tensor *rows =
        ggml_new_tensor_3d(x->ctx, x->type, side == TQKV_SIDE_K ? shape->k_dim : shape->v_dim,
                           shape->n_kv_heads, n_kv);
    put_text(x, side, rows, 0, depth);
    put_text(x, side, rows, depth, n_kv);
    return rows;
}

/* Query i sees the depth and tokens 0..i after it. */
static void fill_mask(const stock_layers *x)
{
    ggml_fp16_t *mask = x->mask->data;
    const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY);
    const size_t n_kv = (size_t)x->size.depth + x->size.n_q;
    for (size_t i = 0; i < x->size.n_q; i++)
        for (size_t t = 0; t < n_kv; t++)
            mask[i * n_kv + t] = t > x->size.depth + i ? hidden : 0;
}

static void make_tensors(stock_layers *x)
{
    const tqkv_plan_layer *shape = &x->layer->shape;
    const int64_t n_kv = (int64_t)x->size.depth + x->size.n_q;
    x->q = ggml_new_tensor_3d(x->ctx, GGML_TYPE_F32, shape->k_dim, shape->n_heads, x->size.n_q);
    memcpy(x->q->data, x->layer->q, ggml_nbytes(x->q));
    x->mask = ggml_new_tensor_2d(x->ctx, GGML_TYPE_F16, n_kv, x->size.n_q);
    fill_mask(x);
    x->graph = ggml_new_graph(x->ctx);
    for (uint32_t i = 0; i < x->size.n_layers; i++) {
        struct ggml_tensor *k = make_side(x, TQKV_SIDE_K), *v = make_side(x, TQKV_SIDE_V);
        x->layer_bytes = (double)(ggml_nbytes(k) + ggml_nbytes(v)) * x->size.depth / (double)n_kv;
        x->out = ggml_flash_attn_ext(
            x->ctx, ggml_permute(x->ctx, x->q, 0, 2, 1, 3), ggml_permute(x->ctx, k, 0, 2, 1, 3),
            ggml_permute(x->ctx, v, 0, 2, 1, 3), x->mask, 1 / sqrtf((float)shape->k_dim), 0, 0);
        ggml_build_forward_expand(x->graph, x->out);
    }
}

static size_t context_bytes(const stock_layers *x)
{
    const tqkv_plan_layer *shape = &x->layer->shape;
    const size_t n_kv = (size_t)x->size.depth + x->size.n_q;
    const size_t row_bytes =
        ggml_row_size(x->type, shape->k_dim) + ggml_row_size(x->type, shape->v_dim);
    const size_t out_bytes =
        (size_t)x->size.n_q * shape->n_heads * (shape->k_dim + shape->v_dim) * sizeof(float);
    const size_t n_tensors = (size_t)x->size.n_layers * TENSORS_PER_LAYER + MORE_TENSORS;
    return x->size.n_layers * (n_kv * shape->n_kv_heads * row_bytes + out_bytes) + out_bytes +
           n_kv * x->size.n_q * sizeof(ggml_fp16_t) + ggml_graph_overhead() +
           n_tensors * (ggml_tensor_overhead() + GGML_MEM_ALIGN);
}

int stock_layers_create(const random_layer *layer, const char *type, const bench_size *size,
                        stock_layers **out)
{
    stock_layers *x = tool_alloc(1, sizeof(*x));
    *out = x;
    x->layer = layer;
    x->size = *size;
    if (!find_type(type, &x->type))
        return tool_usage("--cache: llama.cpp has no cache type '%s'", type);
    x->ctx = ggml_init((struct ggml_init_params){.mem_size = context_bytes(x)});
    if (!x->ctx)
        return tool_error("out of memory for the layers of %s", type);
    make_tensors(x);
    x->plan = ggml_graph_plan(x->graph, (int)size->n_threads, NULL);
    x->plan.work_data = random_layer_alloc(x->plan.work_size + 1);
    return TOOL_OK;
}

void stock_layers_destroy(stock_layers *x)
{
    if (!x)
        return;
    free(x->plan.work_data);
    ggml_free(x->ctx);
    free(x);
}

double stock_layers_bytes(const stock_layers *x)
{
    return x->layer_bytes;
}

const float *stock_layers_output(const stock_layers *x)
{
    return x->out->data;
}

void stock_layers_run(void *layers)
{
    stock_layers *x = layers;
    if (ggml_graph_compute(x->graph, &x->plan) != GGML_STATUS_SUCCESS)
        exit(tool_error("llama.cpp's attention failed"));
}
