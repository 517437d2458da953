/* SPDX-License-Identifier: Apache-2.0 */
#include "api/codec_view.h"

#include "base/alloc.h"

size_t tqkvi_view_bytes(const tqkv_codec *codec)
{
    return tqkvi_align_up(2 * (size_t)codec->n_kv_heads * sizeof(tqkvi_attn_head));
}

void tqkvi_view_heads(const tqkv_codec *codec, tqkvi_attn_head *heads)
{
    for (uint32_t side = 0; side < 2; side++) {
        for (uint32_t g = 0; g < codec->n_kv_heads; g++) {
            const tqkvi_head_codec *head = &codec->heads[side][g];
            heads[side * codec->n_kv_heads + g] = (tqkvi_attn_head){
                .inverse = head->plain ? NULL : head->inverse,
                .mean = head->plan->mean,
                .few = head->inverse_half};
        }
    }
}

void tqkvi_view_turn(const void *user, int32_t base, float *rows, size_t n_rows)
{
    const tqkv_codec *codec = user;
    float cos[TQKVI_DIM_MAX / 2], sin[TQKVI_DIM_MAX / 2];

    if (base == 0)
        return;
    tqkvi_codec_turn(codec, base, cos, sin);
    for (size_t r = 0; r < n_rows; r++)
        tqkvi_turn_apply(&codec->rope, cos, sin, true, rows + r * codec->layer->shape.k_dim);
}
