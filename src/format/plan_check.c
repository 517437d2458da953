/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a plan may hold. The reader and tqkvi_plan_seal ask the same functions, so a sealed plan
 * can be read back. Each returns the name of the field and what is wrong with it.
 */
#include "format/plan_data.h"

#include <float.h>
#include <string.h>

#define WEIGHT_MAX \
    0x1p64f /* times the largest squared error of a row, about 2^31, is finite in f32 */

static bool is_finite(float v)
{
    return v >= -FLT_MAX && v <= FLT_MAX;
}

static bool dim_is_good(uint32_t dim)
{
    return dim != 0 && dim <= TQKVI_DIM_MAX && dim % TQKV_UNIT_CHANNELS == 0;
}

const char *tqkvi_rope_fault(const tqkv_rope *rope)
{
    if (rope->style == TQKV_ROPE_NONE)
        return NULL;
    if (rope->style > TQKV_ROPE_PAIRS)
        return "rope style does not exist";
    if (rope->n_rot == 0 || rope->n_rot % 2 != 0 || rope->n_rot > TQKVI_DIM_MAX)
        return "rope n_rot must be even and from 2 to 1024";
    if (!rope->inv_freq)
        return "rope inv_freq is missing";
    for (uint32_t i = 0; i < rope->n_rot / 2; i++) {
        const float v = rope->inv_freq[i];
        if (!(v >= -TQKVI_INV_FREQ_MAX && v <= TQKVI_INV_FREQ_MAX))
            return "rope inv_freq must be finite and at most 4 radians per position";
    }
    return NULL;
}

const char *tqkvi_shape_fault(const tqkv_plan_layer *shape)
{
    if (shape->n_kv_heads == 0)
        return NULL; /* no cache: nothing else counts */
    if (shape->n_heads > TQKVI_HEADS_MAX)
        return "n_heads must be at most 4096";
    if (shape->n_kv_heads > shape->n_heads || shape->n_heads % shape->n_kv_heads != 0)
        return "n_kv_heads must divide n_heads";
    if (!dim_is_good(shape->k_dim))
        return "k_dim must be a multiple of 16 and at most 1024";
    if (!dim_is_good(shape->v_dim))
        return "v_dim must be a multiple of 16 and at most 1024";
    if (shape->is_latent > 1)
        return "is_latent must be 0 or 1";
    if (shape->is_latent && shape->n_kv_heads != 1)
        return "n_kv_heads must be 1 in a latent layer";
    if (shape->rope.style != TQKV_ROPE_NONE && shape->rope.n_rot > shape->k_dim)
        return "rope n_rot must be at most k_dim";
    return tqkvi_rope_fault(&shape->rope);
}

const char *tqkvi_tiers_fault(const tqkv_plan_layer *shape, uint32_t n_tiers)
{
    for (uint32_t i = 0; i + 1 < n_tiers; i++) {
        if (shape->tier_tokens[i] > TQKVI_TIER_TOKENS_MAX)
            return "tier_tokens must be at most 2^24";
    }
    for (uint32_t i = n_tiers - 1; i < TQKV_TIERS_MAX; i++) {
        if (shape->tier_tokens[i] != 0)
            return "tier_tokens of the last tier must be 0";
    }
    return NULL;
}

const char *tqkvi_numbers_fault(const tqkv_plan *plan)
{
    if (plan->n_layers == 0 || plan->n_layers > TQKVI_LAYERS_MAX)
        return "n_layers must be from 1 to 4096";
    if (plan->n_tiers == 0 || plan->n_tiers > TQKV_TIERS_MAX)
        return "n_tiers must be from 1 to 4";
    if (plan->n_sinks > TQKVI_SINKS_MAX)
        return "n_sinks must be at most 65536";
    if (plan->frame_tokens == 0 || plan->frame_tokens > TQKVI_FRAME_TOKENS_MAX)
        return "frame_tokens must be from 1 to 2^24";
    if (plan->context == 0 || plan->context > INT32_MAX)
        return "context must be from 1 to 2^31 - 1";
    if (!(plan->bits_total >= 0.0 && plan->bits_total <= DBL_MAX))
        return "bits_total must be finite and not negative";
    return NULL;
}

/* Bytes of the UTF-8 character at p, 0 when it is none or a control character. */
static size_t character_bytes(const uint8_t *p, size_t left)
{
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (p[0] < 0x80)
        return p[0] >= 0x20 && p[0] != 0x7f;
    const size_t n = p[0] >= 0xf8 ? 0 : p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : p[0] >= 0xc0 ? 2 : 0;
    if (n == 0 || n > left)
        return 0;
    uint32_t code = p[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (p[i] & 0x3fu);
    }
    const bool surrogate = code >= 0xd800 && code < 0xe000;
    return code >= least[n] && code <= 0x10ffff && !surrogate ? n : 0;
}

const char *tqkvi_name_fault(const char *text, size_t n_bytes)
{
    if (n_bytes > TQKVI_NAME_BYTES_MAX)
        return "name must be at most 1024 bytes";
    for (size_t i = 0; i < n_bytes;) {
        const size_t n = character_bytes((const uint8_t *)text + i, n_bytes - i);
        if (n == 0)
            return "name must be UTF-8 without control characters";
        i += n;
    }
    return NULL;
}

static const char *layouts_fault(const tqkvi_head_plan *head, uint32_t dim, uint32_t n_tiers)
{
    const bool plain = tqkvi_head_is_plain(head);
    for (uint32_t i = 0; i < n_tiers; i++) {
        const tqkvi_layout *layout = &head->layout[i];
        tqkvi_layout again;
        if (layout->n_units != dim / TQKV_UNIT_CHANNELS)
            return "layout must have one width for each 16 channels";
        if (tqkvi_layout_init(&again, layout->bits, layout->n_units) != TQKV_OK ||
            again.row_bytes != layout->row_bytes)
            return "layout has a width that does not exist or mixes f16 with others";
        if ((layout->bits[0] == TQKVI_BITS_PLAIN) != plain)
            return "layouts of a head must be f16 in every tier or in none";
    }
    return NULL;
}

static const char *transform_fault(const float *m, uint32_t dim)
{
    for (uint32_t j = 0; j < dim; j++) {
        float column[TQKVI_DIM_MAX], rounded[TQKVI_DIM_MAX];
        tqkvi_transform_column(m, dim, j, column);
        for (uint32_t i = 0; i < dim; i++) {
            if (!is_finite(column[i]))
                return "transform has a NaN or an infinity";
            rounded[i] = column[i];
        }
        tqkvi_column_round(rounded, dim);
        if (memcmp(column, rounded, dim * sizeof(float)) != 0)
            return "transform is not rounded to f16 times a power of two";
    }
    return NULL;
}

const char *tqkvi_vectors_fault(const tqkvi_head_plan *head, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++) {
        if (!is_finite(head->mean[i]))
            return "mean has a NaN or an infinity";
    }
    for (uint32_t i = 0; i < dim / TQKV_UNIT_CHANNELS; i++) {
        if (!(head->weight[i] >= 0.0f && head->weight[i] <= WEIGHT_MAX))
            return "weight must be from 0 to 2^64";
    }
    return NULL;
}

const char *tqkvi_head_fault(const tqkvi_head_plan *head, uint32_t dim, uint32_t n_tiers)
{
    const char *why = layouts_fault(head, dim, n_tiers);
    if (why || tqkvi_head_is_plain(head))
        return why;
    if (!head->mean || !head->transform || !head->weight)
        return "mean, transform or weight is missing";
    why = tqkvi_vectors_fault(head, dim);
    return why ? why : transform_fault(head->transform, dim);
}
