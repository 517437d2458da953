/* SPDX-License-Identifier: Apache-2.0 */
/* Public functions of codec.h. */
#include <stdalign.h>

#include "api/checks.h"
#include "codec/layer_codec.h"

tqkv_status tqkv_codec_create(const tqkv_plan *plan, uint32_t layer, const tqkv_rope *rope,
                              const tqkv_allocator *mem, tqkv_codec **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!plan || layer >= plan->n_layers)
        return TQKV_ERR_INVALID_ARG;
    if (!tqkvi_is_rope(rope, plan->layers[layer].shape.k_dim))
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_codec_create(plan, layer, rope, mem, out);
}

void tqkv_codec_destroy(tqkv_codec *codec)
{
    tqkvi_codec_destroy(codec);
}

static bool place_is_good(const tqkv_codec *codec, uint32_t head, tqkv_side side, uint32_t tier)
{
    return codec && (side == TQKV_SIDE_K || side == TQKV_SIDE_V) && head < codec->n_kv_heads &&
           tier < codec->n_tiers;
}

size_t tqkv_codec_row_bytes(const tqkv_codec *codec, uint32_t head, tqkv_side side, uint32_t tier)
{
    return place_is_good(codec, head, side, tier)
               ? tqkvi_codec_layout(codec, side, head, tier)->row_bytes
               : 0;
}

/* Whether the arrays of a call can hold its rows. A layout without codes needs no codes. */
static bool arrays_are_good(const tqkv_codec *codec, uint32_t head, tqkv_side side, uint32_t tier,
                            const float *x, size_t stride, size_t n_rows, const uint8_t *scales,
                            const uint8_t *codes)
{
    const bool needs_codes = tqkvi_codec_layout(codec, side, head, tier)->row_bytes != 0;
    return n_rows == 0 ||
           (x && scales && (codes || !needs_codes) && stride >= codec->heads[side][head].dim);
}

/* Cosines and sines of a base, or NULL where nothing is turned. */
typedef struct turn {
    float cos[TQKVI_DIM_MAX / 2], sin[TQKVI_DIM_MAX / 2];
    const float *cos_or_null, *sin_or_null;
} turn;

static void turn_init(const tqkv_codec *codec, tqkv_side side, int32_t base, turn *t)
{
    const bool turns = side == TQKV_SIDE_K && base != 0 && codec->rope.style != TQKV_ROPE_NONE;
    if (turns)
        tqkvi_codec_turn(codec, base, t->cos, t->sin);
    t->cos_or_null = turns ? t->cos : NULL;
    t->sin_or_null = turns ? t->sin : NULL;
}

tqkv_status tqkv_codec_encode(const tqkv_codec *codec, uint32_t head, tqkv_side side, uint32_t tier,
                              int32_t base, const float *x, size_t stride, size_t n_rows,
                              uint8_t *scales, uint8_t *codes, size_t *n_bad)
{
    alignas(TQKV_ALIGN) float scratch[TQKVI_CODEC_SCRATCH_MAX];
    uint8_t no_codes;
    size_t bad = 0;
    turn t;

    if (n_bad)
        *n_bad = 0;
    if (!place_is_good(codec, head, side, tier) ||
        !arrays_are_good(codec, head, side, tier, x, stride, n_rows, scales, codes))
        return TQKV_ERR_INVALID_ARG;

    const size_t row_bytes = tqkvi_codec_layout(codec, side, head, tier)->row_bytes;
    turn_init(codec, side, base, &t);
    for (size_t r = 0; r < n_rows; r += TQKVI_ROWS_AT_ONCE) {
        uint8_t *row_codes = codes ? codes + r * row_bytes : &no_codes;
        const size_t n = n_rows - r < TQKVI_ROWS_AT_ONCE ? n_rows - r : TQKVI_ROWS_AT_ONCE;
        bad += tqkvi_encode_few(codec, side, head, tier, t.cos_or_null, t.sin_or_null,
                                x + r * stride, stride, n, &scales[r], row_codes, scratch);
    }
    if (n_bad)
        *n_bad = bad;
    return TQKV_OK;
}

tqkv_status tqkv_codec_decode(const tqkv_codec *codec, uint32_t head, tqkv_side side, uint32_t tier,
                              int32_t base, const uint8_t *scales, const uint8_t *codes,
                              size_t n_rows, float *x, size_t stride)
{
    alignas(TQKV_ALIGN) float scratch[TQKVI_CODEC_SCRATCH_MAX];
    const uint8_t no_codes = 0;
    turn t;

    if (!place_is_good(codec, head, side, tier) ||
        !arrays_are_good(codec, head, side, tier, x, stride, n_rows, scales, codes))
        return TQKV_ERR_INVALID_ARG;

    const size_t row_bytes = tqkvi_codec_layout(codec, side, head, tier)->row_bytes;
    turn_init(codec, side, base, &t);
    for (size_t r = 0; r < n_rows; r++) {
        const uint8_t *row_codes = codes ? codes + r * row_bytes : &no_codes;
        tqkvi_decode_row(codec, side, head, tier, t.cos_or_null, t.sin_or_null, scales[r],
                         row_codes, x + r * stride, scratch);
    }
    return TQKV_OK;
}
