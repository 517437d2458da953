/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Positions and RoPE parameters of K rows, read from the graph: the rows that SET_ROWS stores are
 * views of the ROPE node that made them, and that node carries everything.
 */
#ifndef TQKV_ROPE_CHAIN_H
#define TQKV_ROPE_CHAIN_H

#include <turboquant/plan.h>

#include "ggml_abi.h"

enum { TQKVP_ROT_PAIRS_MAX = 512 };

/* RoPE with room for its frequencies; `rope.inv_freq` points into it. */
typedef struct tqkvp_rope {
    tqkv_rope rope;
    float inv_freq[TQKVP_ROT_PAIRS_MAX];
} tqkvp_rope;

/*
 * The ROPE node whose result `rows` shows, or NULL where something else lies between. in_part: the
 * rows may also be two tensors side by side, one of which it made.
 */
const ggml_tensor *tqkvp_rope_behind(const ggml_tensor *rows, bool in_part);

/*
 * Parameters of a ROPE node over heads of `head_dim` channels. False where they cannot be said in a
 * tqkv_rope: rotated channels not first, pairs of another kind, frequency factors out of reach.
 */
bool tqkvp_rope_read(const ggml_tensor *node, uint32_t head_dim, tqkvp_rope *out);

/* The same rotation, up to rounding. */
bool tqkvp_rope_equal(const tqkv_rope *a, const tqkv_rope *b);

/* Positions of the first `n` tokens of a ROPE node, or NULL. */
const int32_t *tqkvp_rope_positions(const ggml_tensor *node, int64_t n);

#endif /* TQKV_ROPE_CHAIN_H */
