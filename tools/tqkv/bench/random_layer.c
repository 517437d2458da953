/* SPDX-License-Identifier: Apache-2.0 */
#include "random_layer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum { CONTEXT = 8192 }; /* tokens at which a profile's size is counted, as in `tqkv calibrate` */

static const float ROPE_BASE = 500000;
static const float DECAY_BITS = 3; /* the widest channel has 2^3 times the size of the narrowest */

void *random_layer_alloc(size_t n_bytes)
{
    void *memory =
        aligned_alloc(TQKV_ALIGN, (n_bytes + 2 * TQKV_ALIGN - 1) / TQKV_ALIGN * TQKV_ALIGN);
    if (!memory)
        exit(tool_error("out of memory"));
    return memory;
}

/* Of mean 0 and variance 1: the sum of twelve uniform numbers, minus its mean. */
static float random_normal(uint64_t *state)
{
    float sum = -6;
    for (int i = 0; i < 12; i++) {
        *state = *state * 6364136223846793005U + 1442695040888963407U;
        sum += (float)(*state >> 40) / (float)(1 << 24);
    }
    return sum;
}

/* Both channels of a RoPE pair get the same size, so a turn by any position changes nothing. */
static float *random_rows(uint64_t *state, uint32_t n_heads, uint32_t dim)
{
    const size_t n = (size_t)RANDOM_TOKENS * n_heads * dim;
    const uint32_t half = dim / 2;
    float *rows = random_layer_alloc(n * sizeof(*rows));
    for (size_t i = 0; i < n; i++) {
        const float pair = (float)(i % half) / (float)half;
        rows[i] = random_normal(state) * exp2f(-DECAY_BITS * pair);
    }
    return rows;
}

void random_layer_init(random_layer *layer, const tqkv_plan_layer *shape)
{
    const uint32_t n_pairs = shape->k_dim / 2;
    uint64_t state = 20240229;
    *layer = (random_layer){.shape = *shape};
    layer->inv_freq = tool_alloc(n_pairs, sizeof(*layer->inv_freq));
    for (uint32_t i = 0; i < n_pairs; i++)
        layer->inv_freq[i] = powf(ROPE_BASE, -(float)i / (float)n_pairs);
    layer->shape.rope =
        (tqkv_rope){.style = TQKV_ROPE_HALVES, .n_rot = shape->k_dim, .inv_freq = layer->inv_freq};
    layer->rows[TQKV_SIDE_K] = random_rows(&state, shape->n_kv_heads, shape->k_dim);
    layer->rows[TQKV_SIDE_V] = random_rows(&state, shape->n_kv_heads, shape->v_dim);
    layer->q = random_rows(&state, shape->n_heads, shape->k_dim);
}

void random_layer_deinit(random_layer *layer)
{
    free(layer->inv_freq);
    free(layer->rows[TQKV_SIDE_K]);
    free(layer->rows[TQKV_SIDE_V]);
    free(layer->q);
}

static tqkv_status solve(tqkv_calib *calib, const random_layer *layer, const tqkv_profile *profile,
                         tqkv_plan **out)
{
    int32_t positions[RANDOM_TOKENS];
    for (int32_t t = 0; t < RANDOM_TOKENS; t++)
        positions[t] = t;
    tqkv_status status = tqkv_calib_set_layer(calib, 0, &layer->shape, NULL, 0, 0, NULL);
    if (!status)
        status = tqkv_calib_observe(calib, 0, RANDOM_TOKENS, layer->q, layer->rows[TQKV_SIDE_K],
                                    layer->rows[TQKV_SIDE_V], positions,
                                    1 / sqrtf((float)layer->shape.k_dim), 0, NULL);
    if (!status)
        status = tqkv_calib_prepare(calib, NULL);
    return status ? status : tqkv_calib_solve(calib, profile, out);
}

int random_layer_plan(const random_layer *layer, const char *name, tqkv_plan **out)
{
    tqkv_calib_config config;
    tqkv_profile profile;
    tqkv_calib *calib = NULL;
    char *end;
    const double ratio = strtod(name, &end);
    *out = NULL;
    if (strcmp(end, "x") != 0 || !(ratio >= 2 && ratio <= 16))
        return tool_usage("--profile: '%s' is not like 5x", name);
    tqkv_profile_init(&profile, name, 16 / ratio, CONTEXT);
    tqkv_calib_config_init(&config);
    config.model = "random weights";
    config.arch = "llama";
    config.n_layers = 1;
    config.log = tool_logger();
    tqkv_status status = tqkv_calib_create(&config, &calib);
    if (!status)
        status = solve(calib, layer, &profile, out);
    tqkv_calib_destroy(calib);
    return status ? tool_error("no plan of %s: %s", name, tqkv_status_text(status)) : TOOL_OK;
}
