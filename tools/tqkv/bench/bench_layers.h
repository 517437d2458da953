/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Some layers of one kind of cache, each with its own K and V, attended to one after another: ours in our_layers.c,
 * llama.cpp's in stock_ggml.c (stock_none.c where the build has no llama.cpp).
 */
#ifndef TQKV_BENCH_LAYERS_H
#define TQKV_BENCH_LAYERS_H

#include <stdbool.h>

#include "random_layer.h"

typedef struct bench_size {
    uint32_t n_layers;
    uint32_t depth; /* tokens in the cache */
    uint32_t n_q;   /* tokens after them that ask, causally */
    uint32_t n_threads;
} bench_size;

typedef struct our_layers our_layers;
typedef struct stock_layers stock_layers;

/* layer: kept. plan: kept; its layer of that number has the shape of the random layer. */
int our_layers_create(const random_layer *layer, const tqkv_plan *plan, uint32_t plan_layer,
                      const bench_size *size, our_layers **out);
void our_layers_destroy(our_layers *layers);
/* Bytes that one layer holds of its depth. */
double our_layers_bytes(const our_layers *layers);
/* Output of the last layer, [n_q][n_heads][v_dim]. */
const float *our_layers_output(const our_layers *layers);
/* For in_turn: attention of every layer in turn. */
void our_layers_begin(void *layers);
void our_layers_run(void *layers);
void our_layers_end(void *layers);

bool stock_layers_exist(void);
/* type: "f16", "q8_0", ... */
int stock_layers_create(const random_layer *layer, const char *type, const bench_size *size,
                        stock_layers **out);
void stock_layers_destroy(stock_layers *layers);
double stock_layers_bytes(const stock_layers *layers);
const float *stock_layers_output(const stock_layers *layers);
void stock_layers_run(void *layers);

#endif /* TQKV_BENCH_LAYERS_H */
