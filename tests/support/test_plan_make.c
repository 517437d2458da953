/* SPDX-License-Identifier: Apache-2.0 */
#include "test_plan_make.h"

#include <math.h>

#define ROPE_PAIRS_MAX 512

uint32_t test_random_u32(test_random *random)
{
    /* splitmix64 */
    random->state += 0x9e3779b97f4a7c15u;
    uint64_t z = random->state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) >> 32);
}

double test_random_uniform(test_random *random)
{
    return test_random_u32(random) / 4294967296.0;
}

float test_random_normal(test_random *random)
{
    const double radius = sqrt(-2.0 * log(test_random_uniform(random) + 1e-12));
    return (float)(radius * cos(6.283185307179586 * test_random_uniform(random)));
}

tqkv_plan_layer test_shape(uint32_t n_heads, uint32_t n_kv_heads, uint32_t k_dim, uint32_t v_dim)
{
    static float inv_freq[ROPE_PAIRS_MAX];
    for (uint32_t i = 0; i < k_dim / 2 && i < ROPE_PAIRS_MAX; i++)
        inv_freq[i] = (float)pow(10000.0, -2.0 * i / 64.0);
    return (tqkv_plan_layer){
        .n_heads = n_heads,
        .n_kv_heads = n_kv_heads,
        .k_dim = k_dim,
        .v_dim = v_dim,
        .rope = {.style = TQKV_ROPE_HALVES, .n_rot = k_dim, .inv_freq = inv_freq},
    };
}

static tqkv_status fill_head(tqkvi_head_plan *head, uint32_t dim, uint32_t n_tiers,
                             test_random *random)
{
    static const uint8_t widths[] = {0, 1, 2, 3, 4, 5, 6, 8};
    for (uint32_t tier = 0; tier < n_tiers; tier++) {
        uint8_t bits[TQKV_UNITS_MAX];
        for (uint32_t i = 0; i < dim / TQKV_UNIT_CHANNELS; i++)
            bits[i] = tier == 0 ? (uint8_t)(test_random_u32(random) % 2 ? 8 : 6)
                                : widths[test_random_u32(random) % 8];
        TQKV_TRY(tqkvi_layout_init(&head->layout[tier], bits, dim / TQKV_UNIT_CHANNELS));
    }
    for (uint32_t i = 0; i < dim; i++)
        head->mean[i] = 0.3f * test_random_normal(random);
    for (uint32_t i = 0; i < dim / TQKV_UNIT_CHANNELS; i++)
        head->weight[i] = (float)(0.25 + test_random_uniform(random));
    /* Strong diagonal, channels of very different sizes: far from singular. */
    for (uint32_t j = 0; j < dim; j++) {
        const float gain = (float)exp(2.0 * test_random_uniform(random) - 1.0);
        for (uint32_t i = 0; i < dim; i++)
            head->transform[(size_t)i * dim + j] =
                gain *
                ((i == j ? 1.0f : 0.0f) + 0.3f * test_random_normal(random) / sqrtf((float)dim));
    }
    tqkvi_transform_round(head->transform, dim);
    return TQKV_OK;
}

static tqkv_status fill(tqkv_plan *plan, uint64_t seed, uint32_t n_tiers)
{
    test_random random = {.state = seed};
    plan->n_tiers = n_tiers;
    plan->n_sinks = 4;
    plan->frame_tokens = 256;
    plan->context = 8192;
    plan->bits_total = 3.2;
    for (uint32_t i = 0; i < plan->n_layers; i++) {
        tqkvi_layer_plan *layer = &plan->layers[i];
        for (size_t side = 0; side < 2; side++) {
            const uint32_t dim = tqkvi_shape_dim(&layer->shape, (tqkv_side)side);
            for (uint32_t g = 0; g < layer->shape.n_kv_heads; g++)
                TQKV_TRY(fill_head(&layer->heads[side][g], dim, n_tiers, &random));
        }
        for (uint32_t tier = 0; tier < TQKV_TIERS_MAX; tier++)
            layer->shape.tier_tokens[tier] =
                layer->shape.n_kv_heads > 0 && tier + 1 < n_tiers ? 64u << tier : 0;
    }
    TQKV_TRY(tqkvi_plan_set_names(plan, "a model \xc3\xa9", "arch", "5x"));
    return tqkvi_plan_seal(plan, NULL);
}

tqkv_status test_plan_make(const tqkv_allocator *mem, uint64_t seed, const tqkv_plan_layer *shapes,
                           uint32_t n_layers, uint32_t n_tiers, tqkv_plan **out)
{
    *out = NULL;
    tqkv_plan *plan;
    TQKV_TRY(tqkvi_plan_create(mem, shapes, n_layers, &plan));
    const tqkv_status status = fill(plan, seed, n_tiers);
    if (status != TQKV_OK) {
        tqkvi_plan_destroy(plan);
        return status;
    }
    *out = plan;
    return TQKV_OK;
}
