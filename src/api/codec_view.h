/* SPDX-License-Identifier: Apache-2.0 */
/* What attention needs of a codec, which it does not know: its heads, and how K turns. */
#ifndef TQKVI_CODEC_VIEW_H
#define TQKVI_CODEC_VIEW_H

#include "attn/attention.h"
#include "codec/layer_codec.h"

/* Bytes of the heads of both sides, a multiple of TQKV_ALIGN. */
size_t tqkvi_view_bytes(const tqkv_codec *codec);
/* heads: [2][n_kv_heads] out, by side. */
void tqkvi_view_heads(const tqkv_codec *codec, tqkvi_attn_head *heads);
/* A tqkvi_turn_rows_fn; user: the codec. */
void tqkvi_view_turn(const void *user, int32_t base, float *rows, size_t n_rows);

#endif /* TQKVI_CODEC_VIEW_H */
