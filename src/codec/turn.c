/* SPDX-License-Identifier: Apache-2.0 */
/* RoPE of one position, for taking a row of K into its frame and back. */
#include "base/sine.h"
#include "codec/layer_codec.h"

int32_t tqkvi_frame_base(int32_t position, uint32_t frame_tokens)
{
    const int64_t frame = frame_tokens;
    const int64_t start = position / frame * frame; /* rounded towards zero */
    const int64_t base = start > position ? start - frame : start;

    return base < INT32_MIN ? INT32_MIN : (int32_t)base;
}

void tqkvi_turn_init(const tqkv_rope *rope, int32_t base, float *cos_out, float *sin_out)
{
    for (uint32_t i = 0; i < rope->n_rot / 2; i++) {
        double c, s;
        tqkvi_sincos((double)base * (double)rope->inv_freq[i], &s, &c);
        cos_out[i] = (float)c;
        sin_out[i] = (float)s;
    }
}

static void turn_pairs(const float *cos_in, const float *sin_in, float direction, float *row,
                       uint32_t n_pairs)
{
    for (uint32_t i = 0; i < n_pairs; i++) {
        const float c = cos_in[i], s = direction * sin_in[i];
        const float a = row[2 * i], b = row[2 * i + 1];
        row[2 * i] = a * c - b * s;
        row[2 * i + 1] = b * c + a * s;
    }
}

static void turn_halves(const float *restrict cos_in, const float *restrict sin_in, float direction,
                        float *restrict first, float *restrict second, uint32_t n_pairs)
{
    for (uint32_t i = 0; i < n_pairs; i++) {
        const float c = cos_in[i], s = direction * sin_in[i];
        const float a = first[i], b = second[i];
        first[i] = a * c - b * s;
        second[i] = b * c + a * s;
    }
}

void tqkvi_turn_apply(const tqkv_rope *rope, const float *cos_in, const float *sin_in, bool inverse,
                      float *row)
{
    const float direction = inverse ? -1.0f : 1.0f;

    if (rope->style == TQKV_ROPE_NONE)
        return;
    if (rope->style == TQKV_ROPE_PAIRS)
        turn_pairs(cos_in, sin_in, direction, row, rope->n_rot / 2);
    else
        turn_halves(cos_in, sin_in, direction, row, row + rope->n_rot / 2, rope->n_rot / 2);
}
