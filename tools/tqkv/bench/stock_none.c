/* SPDX-License-Identifier: Apache-2.0 */
/* Stands in for stock_ggml.c in a build without llama.cpp: ours is timed alone. */
#include "bench_layers.h"
#include "tool.h"

bool stock_layers_exist(void)
{
    return false;
}

int stock_layers_create(const random_layer *layer, const char *type, const bench_size *size,
                        stock_layers **out)
{
    (void)layer;
    (void)size;
    *out = NULL;
    return tool_usage("--cache %s: this tqkv-bench was built without llama.cpp", type);
}

void stock_layers_destroy(stock_layers *layers)
{
    (void)layers;
}

double stock_layers_bytes(const stock_layers *layers)
{
    (void)layers;
    return 0;
}

const float *stock_layers_output(const stock_layers *layers)
{
    (void)layers;
    return NULL;
}

void stock_layers_run(void *layers)
{
    (void)layers;
}
