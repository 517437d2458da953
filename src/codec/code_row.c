/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One row to codes and back, as docs/FORMAT.md "Encoding a row" says. The kernel does the search
 * for the scale; here is what surrounds it: bad and zero rows, turn, mean, transform.
 */
#include <string.h>

#include "codec/layer_codec.h"

#define HALF_MAX 65504.0f
#define SCALE_PLAIN 1 /* of a plain row that is not zero */

typedef enum row_kind { ROW_ZERO, ROW_GOOD, ROW_BAD } row_kind;

/* Two groups of rows of scratch. All are readable past their end. */
static float *scratch_rows(const tqkvi_head_codec *head, float *scratch, uint32_t i)
{
    return scratch + (size_t)i * TQKVI_ROWS_AT_ONCE * head->dim;
}

size_t tqkvi_codec_scratch_floats(const tqkv_codec *codec)
{
    const tqkv_plan_layer *shape = &codec->layer->shape;
    const size_t dim = shape->k_dim > shape->v_dim ? shape->k_dim : shape->v_dim;
    return 2 * TQKVI_ROWS_AT_ONCE * dim + TQKV_ALIGN / sizeof(float);
}

static row_kind classify(const tqkv_codec *codec, const float *x, uint32_t dim)
{
    const uint32_t bits = codec->kernels->largest_bits(x, dim);
    return bits >= TQKVK_BITS_INFINITE ? ROW_BAD : bits ? ROW_GOOD : ROW_ZERO;
}

static void store_zero(const tqkvi_layout *layout, uint8_t *scale, uint8_t *codes)
{
    *scale = 0;
    memset(codes, 0, layout->row_bytes);
}

static float clamp_half(float v)
{
    return v > HALF_MAX ? HALF_MAX : v < -HALF_MAX ? -HALF_MAX : v;
}

static void encode_plain(const tqkv_codec *codec, const tqkvi_head_codec *head,
                         const tqkvi_layout *layout, const float *x, uint8_t *scale, uint8_t *codes,
                         float *scratch)
{
    float *row = scratch_rows(head, scratch, 0);
    uint32_t any = 0;

    for (uint32_t d = 0; d < head->dim; d++)
        row[d] = clamp_half(x[d]);
    codec->kernels->float_to_half(row, codes, head->dim);
    for (uint32_t i = 0; i < layout->row_bytes; i += 2)
        any |= (uint32_t)codes[i] | (codes[i + 1] & 0x7fu);
    *scale = SCALE_PLAIN;
    if (!any)
        store_zero(layout, scale, codes);
}

static void decode_plain(const tqkv_codec *codec, const tqkvi_head_codec *head,
                         const uint8_t *codes, float *x, float *scratch)
{
    float *row = scratch_rows(head, scratch, 0);
    codec->kernels->half_to_float(codes, row, head->dim);
    for (uint32_t d = 0; d < head->dim; d++)
        x[d] =
            row[d] >= -HALF_MAX && row[d] <= HALF_MAX ? row[d] : 0.0f; /* never written otherwise */
}

/* yhat: [dim] f32, the row behind the transform, TQKV_ALIGN-aligned. */
static void dequantise(const tqkv_codec *codec, const tqkvi_layout *layout, uint8_t scale,
                       const uint8_t *codes, float *yhat)
{
    const float s = tqkvk_scale_value(scale);
    codec->kernels->unpack_rows(layout, codes, 1, yhat);
    for (uint32_t d = 0; d < layout->n_units * TQKV_UNIT_CHANNELS; d++)
        yhat[d] = s * yhat[d];
}

/* y: [n][dim] finite; overwritten. scales: [n], codes: [n][row_bytes] out. */
static void quantise(const tqkv_codec *codec, const tqkvi_head_codec *head,
                     const tqkvi_layout *layout, float *y, size_t n, uint8_t *scales,
                     uint8_t *codes)
{
    codec->kernels->encode_rows(layout, head->weight, y, n, scales, codes);
    /* All levels 0 and no mean: the row decodes to x = 0, whose code is the zero row. */
    for (size_t r = 0; r < n && head->zero_mean; r++, y += head->dim, codes += layout->row_bytes) {
        if (scales[r] != 1)
            continue;
        dequantise(codec, layout, scales[r], codes, y);
        if (classify(codec, y, head->dim) == ROW_ZERO)
            store_zero(layout, &scales[r], codes);
    }
}

/* z = x, turned back, less the mean. */
static void centre(const tqkv_codec *codec, const tqkvi_head_codec *head, const float *turn_cos,
                   const float *turn_sin, const float *x, float *z)
{
    if (turn_cos) {
        memcpy(z, x, head->dim * sizeof(*z));
        tqkvi_turn_apply(&codec->rope, turn_cos, turn_sin, true, z);
        x = z;
    }
    for (uint32_t d = 0; d < head->dim; d++)
        z[d] = x[d] - head->plan->mean[d];
}

/* Four rows share what is read, and mostly follow others; fewer are a decoding step. */
static void transform_rows(const tqkv_codec *codec, const tqkvi_head_codec *head, const float *z,
                           float *y, size_t n)
{
    if (n < TQKVI_ROWS_AT_ONCE && head->transform_half.value)
        codec->kernels->transform_half(&head->transform_half, z, y, head->dim, n);
    else
        codec->kernels->transform(head->plan->transform, z, y, head->dim, n);
}

/* Of few rows. Those that are stored as zero go through all of it as zeros. */
static size_t encode_coded(const tqkv_codec *codec, const tqkvi_head_codec *head,
                           const tqkvi_layout *layout, const float *turn_cos,
                           const float *turn_sin, const float *x, size_t stride, size_t n,
                           uint8_t *scales, uint8_t *codes, float *scratch)
{
    const size_t row_floats = head->dim;
    float *z = scratch_rows(head, scratch, 0);
    float *y = scratch_rows(head, scratch, 1);
    const bool is_centred = head->no_mean && !turn_cos && head->hadamard_block != 0;
    row_kind kind[TQKVI_ROWS_AT_ONCE];
    size_t n_bad = 0;

    for (size_t r = 0; r < n; r++) {
        const float *from = x + r * stride;
        float *row = z + r * row_floats;
        kind[r] = classify(codec, from, head->dim);
        if (kind[r] != ROW_GOOD)
            memset(row, 0, row_floats * sizeof(*row));
        else if (!is_centred)
            centre(codec, head, turn_cos, turn_sin, from, row);
        if (head->hadamard_block != 0)
            codec->kernels->hadamard(head->factor, kind[r] == ROW_GOOD && is_centred ? from : row,
                                     y + r * row_floats, head->dim, head->hadamard_block);
    }
    if (head->hadamard_block == 0)
        transform_rows(codec, head, z, y, n);
    for (size_t r = 0; r < n; r++) {
        if (classify(codec, y + r * row_floats, head->dim) == ROW_BAD) {
            kind[r] = ROW_BAD;
            memset(y + r * row_floats, 0, row_floats * sizeof(*y));
        }
    }
    quantise(codec, head, layout, y, n, scales, codes);
    for (size_t r = 0; r < n; r++) {
        n_bad += kind[r] == ROW_BAD;
        if (kind[r] != ROW_GOOD)
            store_zero(layout, &scales[r], codes + r * layout->row_bytes);
    }
    return n_bad;
}

size_t tqkvi_encode_few(const tqkv_codec *codec, tqkv_side side, uint32_t head_index, uint32_t tier,
                        const float *turn_cos, const float *turn_sin, const float *x, size_t stride,
                        size_t n, uint8_t *scales, uint8_t *codes, float *scratch)
{
    const tqkvi_head_codec *head = &codec->heads[side][head_index];
    const tqkvi_layout *layout = &head->plan->layout[tier];
    size_t n_bad = 0;

    if (!head->plain)
        return encode_coded(codec, head, layout, turn_cos, turn_sin, x, stride, n, scales, codes,
                            scratch);
    for (size_t r = 0; r < n; r++, x += stride, codes += layout->row_bytes) {
        const row_kind kind = classify(codec, x, head->dim);
        n_bad += kind == ROW_BAD;
        if (kind == ROW_GOOD)
            encode_plain(codec, head, layout, x, &scales[r], codes, scratch);
        else
            store_zero(layout, &scales[r], codes);
    }
    return n_bad;
}

bool tqkvi_encode_row(const tqkv_codec *codec, tqkv_side side, uint32_t head, uint32_t tier,
                      const float *turn_cos, const float *turn_sin, const float *x, uint8_t *scale,
                      uint8_t *codes, float *scratch)
{
    return tqkvi_encode_few(codec, side, head, tier, turn_cos, turn_sin, x, 0, 1, scale, codes,
                            scratch) == 0;
}

void tqkvi_decode_row(const tqkv_codec *codec, tqkv_side side, uint32_t head_index, uint32_t tier,
                      const float *turn_cos, const float *turn_sin, uint8_t scale,
                      const uint8_t *codes, float *x, float *scratch)
{
    const tqkvi_head_codec *head = &codec->heads[side][head_index];

    if (scale == 0) {
        memset(x, 0, head->dim * sizeof(*x));
        return;
    }
    if (head->plain) {
        decode_plain(codec, head, codes, x, scratch);
        return;
    }

    float *yhat = scratch_rows(head, scratch, 0);
    float *row = scratch_rows(head, scratch, 1);
    dequantise(codec, &head->plan->layout[tier], scale, codes, yhat);
    codec->kernels->transform(head->inverse, yhat, row, head->dim, 1);
    for (uint32_t d = 0; d < head->dim; d++)
        row[d] = head->plan->mean[d] + row[d];
    if (turn_cos)
        tqkvi_turn_apply(&codec->rope, turn_cos, turn_sin, false, row);
    memcpy(x, row, head->dim * sizeof(*x));
}

void tqkvi_recode_row(const tqkv_codec *codec, tqkv_side side, uint32_t head_index,
                      uint32_t tier_from, uint8_t scale_from, const uint8_t *codes_from,
                      uint32_t tier_to, uint8_t *scale_to, uint8_t *codes_to, float *scratch)
{
    const tqkvi_head_codec *head = &codec->heads[side][head_index];
    const tqkvi_layout *from = &head->plan->layout[tier_from];
    const tqkvi_layout *to = &head->plan->layout[tier_to];

    if (scale_from == 0) {
        store_zero(to, scale_to, codes_to);
    } else if (head->plain) {
        *scale_to = scale_from;
        memcpy(codes_to, codes_from, to->row_bytes);
    } else {
        float *yhat = scratch_rows(head, scratch, 0);
        dequantise(codec, from, scale_from, codes_from, yhat);
        quantise(codec, head, to, yhat, 1, scale_to, codes_to);
    }
}
