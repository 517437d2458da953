/* SPDX-License-Identifier: Apache-2.0 */
/* Objects: everything that rows of one layer need, worked out once. */
#include "codec/layer_codec.h"

#include <string.h>

#include "codec/half_matrix.h"

#define WEIGHT_MIN 0x1p-20f /* below it the scale would be chosen by rounding errors */
#define VALUE_MAX 1e37f     /* of a decoded channel, far enough from FLT_MAX for a turn */
#define TURNS_MAX 32        /* frames whose turns are kept: 32768 tokens by default */
#define Y_DECODED_MAX \
    (4.0f * tqkvk_scale_value(255)) /* no width reaches further than 8 bits, 4 steps */

static void init_weight(tqkvi_head_codec *head)
{
    const uint32_t n_units = head->dim / TQKV_UNIT_CHANNELS;
    float largest = 0.0f;
    for (uint32_t u = 0; u < n_units; u++)
        largest = head->plan->weight[u] > largest ? head->plan->weight[u] : largest;
    for (uint32_t u = 0; u < n_units; u++) {
        const float relative = largest > 0.0f ? head->plan->weight[u] / largest : 1.0f;
        head->weight[u] = relative > WEIGHT_MIN ? relative : WEIGHT_MIN;
    }
}

/* Whether every bit pattern of codes and scale decodes to finite values. */
static bool decodes_finite(const tqkvi_head_codec *head)
{
    const size_t dim = head->dim;
    for (size_t i = 0; i < dim; i++) {
        const double mean = (double)head->plan->mean[i];
        double reach = mean < 0.0 ? -mean : mean;
        for (size_t j = 0; j < dim; j++) {
            const double v = (double)head->inverse[j * dim + i];
            reach += (v < 0.0 ? -v : v) * (double)Y_DECODED_MAX;
        }
        if (!(reach <= (double)VALUE_MAX))
            return false;
    }
    return true;
}

static bool is_odd(uint32_t bits)
{
    bool odd = false;
    for (; bits != 0; bits &= bits - 1)
        odd = !odd;
    return odd;
}

/*
 * Whether the transform is Walsh-Hadamard matrices on the diagonal, as large as the largest power of
 * two that divides dim, times a factor for each input channel. Sets the factors.
 */
static bool find_factors(const float *transform, uint32_t dim, uint32_t block, float *factor)
{
    for (uint32_t i = 0; i < dim; i++) {
        const uint32_t first = i / block * block;
        const float *row = transform + (size_t)i * dim;
        factor[i] = row[first];
        for (uint32_t j = 0; j < dim; j++) {
            const bool inside = j / block == i / block;
            const float wanted = !inside ? 0.0f : is_odd((i & j) % block) ? -factor[i] : factor[i];
            if (row[j] != wanted)
                return false;
        }
    }
    return true;
}

static tqkv_status init_head(const tqkv_codec *codec, tqkvi_head_codec *head, double *work)
{
    const tqkv_allocator *mem = &codec->mem;
    const size_t square_bytes = (size_t)head->dim * head->dim * sizeof(float); /* dim <= 1024 */

    head->weight = tqkvi_alloc(mem, head->dim / TQKV_UNIT_CHANNELS * sizeof(float));
    head->inverse = tqkvi_alloc(mem, square_bytes);
    head->factor = tqkvi_alloc(mem, head->dim * sizeof(float));
    if (!head->weight || !head->inverse || !head->factor)
        return TQKV_ERR_NO_MEMORY;

    head->zero_mean = head->no_mean = true;
    for (uint32_t d = 0; d < head->dim; d++) {
        head->zero_mean = head->zero_mean && head->plan->mean[d] == 0.0f;
        head->no_mean = head->no_mean && tqkvi_bits_of_float(head->plan->mean[d]) == 0;
    }
    init_weight(head);
    const uint32_t block = head->dim & (~head->dim + 1u);
    if (find_factors(head->plan->transform, head->dim, block, head->factor))
        head->hadamard_block = block;
    if (!tqkvi_invert(head->plan->transform, head->dim, head->inverse, work) ||
        !decodes_finite(head))
        return TQKV_ERR_INVALID_ARG;
    return TQKV_OK;
}

static tqkv_status init_side(tqkv_codec *codec, tqkv_side side)
{
    const uint32_t dim = tqkvi_shape_dim(&codec->layer->shape, side);
    tqkv_status status = TQKV_OK;
    size_t heads_bytes;

    TQKV_TRY(tqkvi_size_mul(codec->n_kv_heads, sizeof(tqkvi_head_codec), &heads_bytes));
    codec->heads[side] = tqkvi_alloc_zero(&codec->mem, heads_bytes);
    double *work = tqkvi_alloc(&codec->mem, 2 * (size_t)dim * dim * sizeof(double));
    if (!codec->heads[side] || !work)
        status = TQKV_ERR_NO_MEMORY;

    for (uint32_t g = 0; status == TQKV_OK && g < codec->n_kv_heads; g++) {
        tqkvi_head_codec *head = &codec->heads[side][g];
        head->dim = dim;
        head->plan = &codec->layer->heads[side][g];
        head->plain = tqkvi_head_is_plain(head->plan);
        if (!head->plain)
            status = init_head(codec, head, work);
    }
    tqkvi_free(&codec->mem, work);
    return status;
}

/* As attention reads them, head by head, and then as the encoder does. */
static tqkv_status init_halves(tqkv_codec *codec)
{
    size_t bytes = 0;

    for (uint32_t i = 0; i < 2 * codec->n_kv_heads; i++) {
        const tqkvi_head_codec *head = &codec->heads[i & 1][i / 2];
        bytes += head->plain ? 0 : 2 * tqkvi_half_matrix_bytes(head->dim);
    }
    if (bytes == 0)
        return TQKV_OK;
    codec->halves = tqkvi_alloc(&codec->mem, bytes);
    if (!codec->halves)
        return TQKV_ERR_NO_MEMORY;
    uint8_t *next = codec->halves;
    for (uint32_t i = 0; i < 2 * codec->n_kv_heads; i++) {
        tqkvi_head_codec *head = &codec->heads[i & 1][i / 2];
        const bool is_k = (i & 1) == TQKV_SIDE_K;
        if (head->plain)
            continue;
        tqkvi_half_matrix_init(&head->inverse_half, next, head->inverse, is_k ? 1 : head->dim,
                               is_k ? head->dim : 1, head->dim, true);
        next += tqkvi_half_matrix_bytes(head->dim);
    }
    for (uint32_t i = 0; i < 2 * codec->n_kv_heads; i++) {
        tqkvi_head_codec *head = &codec->heads[i & 1][i / 2];
        if (head->plain || head->hadamard_block != 0)
            continue;
        tqkvi_half_matrix_init(&head->transform_half, next, head->plan->transform, head->dim, 1,
                               head->dim, false);
        next += tqkvi_half_matrix_bytes(head->dim);
    }
    return TQKV_OK;
}

static tqkv_status init_rope(tqkv_codec *codec, const tqkv_rope *rope)
{
    codec->rope = (tqkv_rope){.style = TQKV_ROPE_NONE};
    if (rope->style == TQKV_ROPE_NONE)
        return TQKV_OK;
    const size_t bytes = rope->n_rot / 2 * sizeof(float);
    float *inv_freq = tqkvi_alloc(&codec->mem, bytes);
    if (!inv_freq)
        return TQKV_ERR_NO_MEMORY;
    memcpy(inv_freq, rope->inv_freq, bytes);
    codec->rope = (tqkv_rope){.style = rope->style, .n_rot = rope->n_rot, .inv_freq = inv_freq};
    return TQKV_OK;
}

/* Every task of attention asks for the turns of its frames, and one takes longer than a tile. */
static tqkv_status init_turns(tqkv_codec *codec)
{
    const size_t n_rot = codec->rope.n_rot;
    const uint32_t frame = codec->plan->frame_tokens;

    if (n_rot == 0)
        return TQKV_OK;
    codec->turns = tqkvi_alloc(&codec->mem, TURNS_MAX * n_rot * sizeof(float));
    if (!codec->turns)
        return TQKV_ERR_NO_MEMORY;
    for (; codec->n_turns < TURNS_MAX; codec->n_turns++) {
        const uint64_t base = (codec->n_turns + 1) * (uint64_t)frame;
        float *turn = codec->turns + codec->n_turns * n_rot;
        if (base > INT32_MAX)
            break;
        tqkvi_turn_init(&codec->rope, (int32_t)base, turn, turn + n_rot / 2);
    }
    return TQKV_OK;
}

void tqkvi_codec_turn(const tqkv_codec *codec, int32_t base, float *cos_out, float *sin_out)
{
    const size_t n_rot = codec->rope.n_rot;
    const uint32_t frame = codec->plan->frame_tokens;
    const uint32_t n = base > 0 ? (uint32_t)base / frame : 0; /* of the frame */

    if (n == 0 || n > codec->n_turns || n * frame != (uint32_t)base) {
        tqkvi_turn_init(&codec->rope, base, cos_out, sin_out);
        return;
    }
    const float *turn = codec->turns + (n - 1) * n_rot;
    memcpy(cos_out, turn, n_rot / 2 * sizeof(float));
    memcpy(sin_out, turn + n_rot / 2, n_rot / 2 * sizeof(float));
}

tqkv_status tqkvi_codec_create(const tqkv_plan *plan, uint32_t layer, const tqkv_rope *rope,
                               const tqkv_allocator *mem, tqkv_codec **out)
{
    tqkv_allocator allocator;

    *out = NULL;
    tqkvi_allocator_init(&allocator, mem);
    tqkv_codec *codec = tqkvi_alloc_zero(&allocator, sizeof(*codec));
    if (!codec)
        return TQKV_ERR_NO_MEMORY;

    codec->mem = allocator;
    codec->plan = plan;
    codec->layer = &plan->layers[layer];
    codec->kernels = tqkvk_get();
    codec->n_kv_heads = codec->layer->shape.n_kv_heads;
    codec->n_tiers = plan->n_tiers;
    tqkv_status status = init_rope(codec, rope ? rope : &codec->layer->shape.rope);
    if (status == TQKV_OK)
        status = init_turns(codec);
    if (status == TQKV_OK && codec->n_kv_heads != 0)
        status = init_side(codec, TQKV_SIDE_K);
    if (status == TQKV_OK && codec->n_kv_heads != 0)
        status = init_side(codec, TQKV_SIDE_V);
    if (status == TQKV_OK)
        status = init_halves(codec);
    if (status != TQKV_OK) {
        tqkvi_codec_destroy(codec);
        return status;
    }
    *out = codec;
    return TQKV_OK;
}

void tqkvi_codec_destroy(tqkv_codec *codec)
{
    if (!codec)
        return;
    for (uint32_t side = 0; side < 2; side++) {
        for (uint32_t g = 0; codec->heads[side] && g < codec->n_kv_heads; g++) {
            tqkvi_free(&codec->mem, codec->heads[side][g].weight);
            tqkvi_free(&codec->mem, codec->heads[side][g].inverse);
            tqkvi_free(&codec->mem, codec->heads[side][g].factor);
        }
        tqkvi_free(&codec->mem, codec->heads[side]);
    }
    tqkvi_free(&codec->mem, codec->halves);
    tqkvi_free(&codec->mem, codec->turns);
    tqkvi_free(&codec->mem, (void *)codec->rope.inv_freq);
    const tqkv_allocator mem = codec->mem;
    tqkvi_free(&mem, codec);
}
