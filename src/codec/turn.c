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

void tqkvi_turn_apply(const tqkv_rope *rope, const float *cos_in, const float *sin_in, bool inverse,
                      float *row)
{
    const uint32_t n_pairs = rope->n_rot / 2;
    const uint32_t step = rope->style == TQKV_ROPE_PAIRS ? 2 : 1; /* from a pair to the next */
    const uint32_t apart = rope->style == TQKV_ROPE_PAIRS ? 1 : n_pairs; /* the two of a pair */

    if (rope->style == TQKV_ROPE_NONE)
        return;
    for (uint32_t i = 0; i < n_pairs; i++) {
        float *a = row + (size_t)i * step;
        float *b = a + apart;
        const float c = cos_in[i];
        const float s = inverse ? -sin_in[i] : sin_in[i];
        const float x0 = *a, x1 = *b;
        *a = x0 * c - x1 * s;
        *b = x1 * c + x0 * s;
    }
}
