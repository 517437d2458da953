/* SPDX-License-Identifier: Apache-2.0 */
/* Makes the image of a layer (image.h) out of its codec. */
#include "cuda/image.h"

#include <math.h>
#include <string.h>

#include "base/half.h"
#include "codec/layer_codec.h"
#include "kernels/levels.h"

#define PART_ALIGN 256
#define LANES 32

static void put_byte(uint32_t *words, uint32_t i, int byte)
{
    words[i / 4] |= (uint32_t)(uint8_t)byte << 8 * (i % 4);
}

static void fill_words(tqkvc_width *to, const tqkvk_width *from, uint32_t bits)
{
    const uint32_t half = 1u << (bits - 1);

    if (bits > 6)
        return; /* uniform: no table */
    for (uint32_t i = 0; i < half; i++) {
        const int negative = from->levels[i], positive = from->levels[half + i];
        if (bits >= 5) {
            put_byte(to->words, i, positive);
            continue;
        }
        put_byte(to->words, i, bits == 4 ? negative - 1 : negative);
        put_byte(to->words, half + i, positive);
        if (bits == 4) {
            put_byte(to->words + TQKVC_V_WORDS, i, -negative);
            put_byte(to->words + TQKVC_V_WORDS, half + i, positive);
        }
    }
}

static void fill_width(tqkvc_tables *tables, const tqkvk_width *from, uint32_t bits)
{
    tqkvc_width *to = &tables->widths[bits];
    tqkvc_encode_tables *encode = &tables->encode;

    fill_words(to, from, bits);
    to->step = from->step;
    encode->step[bits] = from->step;
    encode->inv_step2[bits] = from->inv_step2;
    encode->inv_peak[bits] = from->inv_peak;
    memset(encode->index[bits], TQKVC_NO_MAGNITUDE, sizeof(encode->index[bits]));
    for (uint32_t i = 0; i < from->n_magnitudes; i++) {
        to->magnitude[i] = (uint8_t)from->levels[(1u << (bits - 1)) + i];
        encode->index[bits][to->magnitude[i]] = (uint8_t)i;
    }
    for (uint32_t t = 0; t <= TQKVK_HALF_LEVELS_MAX; t++) {
        uint32_t m = 0;
        while (m + 1 < from->n_magnitudes && from->thresholds[m] <= t)
            m++;
        encode->level[bits][t] = to->magnitude[m];
    }
}

static void fill_tables(tqkvc_tables *tables)
{
    tqkvc_encode_tables *encode = &tables->encode;

    for (uint32_t bits = 1; bits < TQKVC_WIDTHS; bits++)
        if (tqkvk_widths[bits].n_magnitudes != 0)
            fill_width(tables, &tqkvk_widths[bits], bits);
    memcpy(encode->scale_values, tqkvk_scale_values, sizeof(encode->scale_values));
    memcpy(encode->scale_inverses, tqkvk_scale_inverses, sizeof(encode->scale_inverses));
    memcpy(encode->energy_thresholds, tqkvk_energy_thresholds, sizeof(encode->energy_thresholds));
    memcpy(encode->peak_thresholds, tqkvk_peak_thresholds, sizeof(encode->peak_thresholds));
    memcpy(encode->level_octaves, tqkvk_level_octaves, sizeof(encode->level_octaves));
}

static uint16_t traits_of(const tqkvi_head_codec *head)
{
    return (uint16_t)((head->zero_mean ? TQKVC_ZERO_MEAN : 0u) |
                      (head->hadamard_block != 0 ? TQKVC_HADAMARD : 0u));
}

static void fill_layouts(tqkvc_shape *shape, const tqkv_codec *codec, tqkvc_layout *layouts)
{
    for (uint32_t tier = 0; tier < shape->n_tiers; tier++) {
        uint32_t offset = 0, largest = 0;
        for (uint32_t g = 0; g < shape->n_kv_heads; g++) {
            tqkvc_layout *to = &layouts[tier * shape->n_kv_heads + g];
            to->offset = offset;
            for (uint32_t side = 0; side < 2; side++) {
                const tqkvi_layout *from = &codec->layer->heads[side][g].layout[tier];
                to->bytes[side] = TQKVC_BLOCK_TOKENS * (1 + from->row_bytes);
                for (uint32_t u = 0; u < from->n_units; u++)
                    *(u < TQKVC_UNITS_MAX ? &to->widths[side] : &to->more_widths) |=
                        (uint64_t)from->bits[u] << 4 * (u % TQKVC_UNITS_MAX);
                to->traits[side] = traits_of(&codec->heads[side][g]);
                shape->traits_any |= to->traits[side];
            }
            const uint32_t bytes = to->bytes[0] + to->bytes[1];
            largest = bytes > largest ? bytes : largest;
            offset += bytes;
        }
        shape->block_bytes[tier] = offset;
        shape->section_bytes_max[tier] = largest;
    }
}

/* A value as two f16: high, and what it lacks. */
static void split(float v, uint16_t *high, uint16_t *low)
{
    *high = tqkvi_float_to_half(v);
    *low = tqkvi_float_to_half(v - tqkvi_half_to_float(*high));
}

/*
 * Row i, column k of the operand of 16 x 16 is in lane i % 8 * 4 + k % 8 / 2, word k / 8 * 2 + i / 8,
 * half k % 2. The low part is `low` words behind.
 */
static void put_operand(uint32_t *operand, size_t low, uint32_t i, uint32_t k, float v)
{
    const uint32_t word = (i % 8 * 4 + k % 8 / 2) * 4 + k / 8 * 2 + i / 8;
    uint16_t half[2];

    split(v, &half[0], &half[1]);
    for (uint32_t part = 0; part < 2; part++)
        operand[part * low + word] |= (uint32_t)half[part] << 16 * (k % 2);
}

/* inverse: [dim][dim] of the codec. A V matrix is its transpose. */
static void fill_matrix(uint32_t dim, tqkv_side side, const float *inverse, uint32_t *matrix,
                        float *row_scale)
{
    const size_t row_step = side == TQKV_SIDE_K ? dim : 1;
    const size_t column_step = side == TQKV_SIDE_K ? 1 : dim;

    for (uint32_t i = 0; i < dim; i++) {
        float largest = 0;
        int exponent = 0;
        for (uint32_t k = 0; k < dim; k++)
            largest = fmaxf(largest, fabsf(inverse[i * row_step + k * column_step]));
        if (largest > 0)
            (void)frexpf(largest, &exponent);
        row_scale[i] = ldexpf(1.0f, exponent);
        for (uint32_t k = 0; k < dim; k++)
            put_operand(matrix + (size_t)(i / 16 * (dim / 16) + k / 16) * LANES * 4, (size_t)dim * dim / 2,
                        i % 16, k % 16, ldexpf(inverse[i * row_step + k * column_step], -exponent));
    }
}

static uint32_t dim_of(const tqkvc_shape *shape, uint32_t side)
{
    return shape->is_latent && side == TQKV_SIDE_V ? TQKVC_LATENT_DIM : shape->dim;
}

static bool has_matrix(const tqkvc_shape *shape, uint32_t side)
{
    return !shape->is_latent || side == TQKV_SIDE_K;
}

static void fill_side(const tqkvc_shape *shape, const tqkv_codec *codec, tqkv_side side,
                      uint8_t *image)
{
    const tqkvc_parts *parts = &shape->parts;
    const size_t dim = dim_of(shape, side), units = dim / TQKV_UNIT_CHANNELS;

    for (size_t g = 0; g < shape->n_kv_heads; g++) {
        const tqkvi_head_codec *head = &codec->heads[side][g];
        memcpy(image + parts->mean[side] + g * dim * 4, head->plan->mean, dim * 4);
        memcpy(image + parts->weight[side] + g * units * 4, head->weight, units * 4);
        memcpy(image + parts->transform[side] + g * dim * dim * 4, head->plan->transform,
               dim * dim * 4);
        if (has_matrix(shape, side))
            fill_matrix((uint32_t)dim, side, head->inverse,
                        (uint32_t *)(void *)(image + parts->matrix[side] + g * dim * dim * 4),
                        (float *)(void *)(image + parts->row_scale[side] + g * dim * 4));
    }
}

static void fill_latent_units(const tqkvc_layout *layout, tqkvc_latent_units *units)
{
    uint32_t at[2] = {TQKVC_BLOCK_TOKENS, layout->bytes[TQKV_SIDE_K] + TQKVC_BLOCK_TOKENS};

    units->v_section = layout->bytes[TQKV_SIDE_K];
    for (uint32_t u = 0; u < TQKVC_LATENT_UNITS; u++) {
        const uint32_t side = u < TQKVC_LATENT_V_UNITS ? TQKV_SIDE_V : TQKV_SIDE_K,
                       of_side = side == TQKV_SIDE_V ? u : u - TQKVC_LATENT_V_UNITS;
        const uint64_t widths = of_side < TQKVC_UNITS_MAX ? layout->widths[side] : layout->more_widths;
        units->bits[u] = (uint8_t)(widths >> 4 * (of_side % TQKVC_UNITS_MAX) & 15u);
        units->offset[u] = (uint16_t)at[side];
        at[side] += 32u * units->bits[u];
    }
}

/* What latent layers have besides. */
static tqkv_status fill_latent(tqkv_cuda_layer *layer, const tqkv_codec *codec)
{
    const tqkvi_head_codec *k = &codec->heads[TQKV_SIDE_K][0], *v = &codec->heads[TQKV_SIDE_V][0];
    const size_t k_dim = TQKVC_LATENT_K_DIM, v_dim = TQKVC_LATENT_DIM;
    float *query_matrix = (float *)(void *)(layer->image + layer->shape.parts.query_matrix);
    float *coded_mean = (float *)(void *)(layer->image + layer->shape.parts.coded_mean);

    for (uint32_t tier = 0; tier < layer->shape.n_tiers; tier++)
        fill_latent_units((const tqkvc_layout *)(void *)(layer->image + layer->shape.parts.layouts) + tier,
                          (tqkvc_latent_units *)(void *)(layer->image + layer->shape.parts.latent_units) + tier);
    layer->latent_inverse = tqkvi_alloc(&layer->mem, v_dim * v_dim * sizeof(float));
    if (!layer->latent_inverse)
        return TQKV_ERR_NO_MEMORY;
    memcpy(layer->latent_inverse, v->inverse, v_dim * v_dim * sizeof(float));
    for (size_t i = 0; i < k_dim; i++)
        for (size_t j = 0; j < k_dim; j++)
            query_matrix[i * k_dim + j] = k->inverse[j * k_dim + i];
    for (size_t j = 0; j < v_dim; j++) {
        double sum = 0;
        for (size_t i = 0; i < v_dim; i++)
            sum += (double)v->plan->mean[i] * (double)v->plan->transform[i * v_dim + j];
        coded_mean[j] = (float)sum;
    }
    return TQKV_OK;
}

static uint32_t take(size_t *used, size_t bytes)
{
    const size_t at = *used;
    *used = (at + bytes + PART_ALIGN - 1) / PART_ALIGN * PART_ALIGN;
    return (uint32_t)at;
}

/* Places the parts. Returns the bytes of the image, below 2^32 by the limits of a plan. */
static size_t place_parts(tqkvc_shape *shape)
{
    const size_t n = shape->n_kv_heads;
    tqkvc_parts *parts = &shape->parts;
    size_t used = 0;

    (void)take(&used, sizeof(tqkvc_tables));
    parts->layouts = take(&used, shape->n_tiers * n * sizeof(tqkvc_layout));
    parts->inv_freq = take(&used, shape->n_rot / 2 * sizeof(float));
    for (uint32_t side = 0; side < 2; side++) {
        const size_t dim = dim_of(shape, side);
        parts->mean[side] = take(&used, n * dim * 4);
        parts->weight[side] = take(&used, n * dim / TQKV_UNIT_CHANNELS * 4);
        parts->transform[side] = take(&used, n * dim * dim * 4);
        if (!has_matrix(shape, side))
            continue;
        parts->matrix[side] = take(&used, n * dim * dim * 4);
        parts->row_scale[side] = take(&used, n * dim * 4);
    }
    if (shape->is_latent) {
        parts->query_matrix = take(&used, TQKVC_LATENT_K_DIM * TQKVC_LATENT_K_DIM * 4);
        parts->coded_mean = take(&used, TQKVC_LATENT_DIM * 4);
        parts->latent_units = take(&used, shape->n_tiers * sizeof(tqkvc_latent_units));
    }
    return used;
}

static bool is_supported(const tqkv_plan *plan, const tqkvi_layer_plan *layer)
{
    const tqkv_plan_layer *shape = &layer->shape;
    const uint32_t dim = shape->k_dim;

    if (shape->n_kv_heads == 0 || shape->n_kv_heads > 1024 || plan->frame_tokens % TQKV_CUDA_TILE_TOKENS != 0)
        return false;
    if (shape->is_latent ? dim != TQKVC_LATENT_K_DIM || shape->v_dim != TQKVC_LATENT_DIM
                         : dim != shape->v_dim || (dim != 64 && dim != 128 && dim != 256))
        return false;
    for (uint32_t side = 0; side < 2; side++)
        for (uint32_t g = 0; g < shape->n_kv_heads; g++)
            if (tqkvi_head_is_plain(&layer->heads[side][g]))
                return false;
    return true;
}

static tqkv_status fill_image(tqkv_cuda_layer *layer, const tqkv_codec *codec)
{
    tqkvc_shape *shape = &layer->shape;
    const tqkv_plan_layer *from = &codec->layer->shape;

    *shape = (tqkvc_shape){.dim = from->k_dim,
                           .n_heads = from->n_heads,
                           .n_kv_heads = from->n_kv_heads,
                           .n_tiers = codec->n_tiers,
                           .frame_tokens = codec->plan->frame_tokens,
                           .is_latent = from->is_latent != 0,
                           .rope_style = codec->rope.style,
                           .n_rot = codec->rope.style == TQKV_ROPE_NONE ? 0 : codec->rope.n_rot};
    layer->image_bytes = place_parts(shape);
    layer->image = tqkvi_alloc_zero(&layer->mem, layer->image_bytes);
    if (!layer->image)
        return TQKV_ERR_NO_MEMORY;
    fill_tables((tqkvc_tables *)(void *)layer->image);
    fill_layouts(shape, codec, (tqkvc_layout *)(void *)(layer->image + shape->parts.layouts));
    if (shape->n_rot != 0)
        memcpy(layer->image + shape->parts.inv_freq, codec->rope.inv_freq,
               shape->n_rot / 2 * sizeof(float));
    fill_side(shape, codec, TQKV_SIDE_K, layer->image);
    fill_side(shape, codec, TQKV_SIDE_V, layer->image);
    return shape->is_latent ? fill_latent(layer, codec) : TQKV_OK;
}

tqkv_status tqkv_cuda_layer_create(const tqkv_plan *plan, uint32_t index, const tqkv_rope *rope,
                                   const tqkv_allocator *mem, tqkv_cuda_layer **out)
{
    tqkv_allocator allocator;
    tqkv_codec *codec;

    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!plan || index >= plan->n_layers)
        return TQKV_ERR_INVALID_ARG;
    if (!is_supported(plan, &plan->layers[index]))
        return TQKV_ERR_UNSUPPORTED;
    TQKV_TRY(tqkv_codec_create(plan, index, rope, mem, &codec));
    tqkvi_allocator_init(&allocator, mem);
    tqkv_cuda_layer *layer = tqkvi_alloc_zero(&allocator, sizeof(*layer));
    tqkv_status status = layer ? TQKV_OK : TQKV_ERR_NO_MEMORY;
    if (layer) {
        layer->mem = allocator;
        status = fill_image(layer, codec);
    }
    tqkv_codec_destroy(codec);
    if (status != TQKV_OK) {
        tqkv_cuda_layer_destroy(layer);
        return status;
    }
    *out = layer;
    return TQKV_OK;
}

void tqkv_cuda_layer_destroy(tqkv_cuda_layer *layer)
{
    if (!layer)
        return;
    const tqkv_allocator mem = layer->mem;
    tqkvi_free(&mem, layer->latent_inverse);
    tqkvi_free(&mem, layer->image);
    tqkvi_free(&mem, layer);
}

const void *tqkv_cuda_layer_image(const tqkv_cuda_layer *layer, size_t *n_bytes)
{
    if (n_bytes)
        *n_bytes = layer ? layer->image_bytes : 0;
    return layer ? layer->image : NULL;
}

const float *tqkv_cuda_layer_inverse(const tqkv_cuda_layer *layer)
{
    return layer ? layer->latent_inverse : NULL;
}

size_t tqkv_cuda_page_bytes(const tqkv_cuda_layer *layer, uint32_t tier, uint32_t page_tokens)
{
    if (!layer || tier >= layer->shape.n_tiers || page_tokens % TQKVC_BLOCK_TOKENS != 0)
        return 0;
    return (size_t)layer->shape.block_bytes[tier] * (page_tokens / TQKVC_BLOCK_TOKENS);
}
