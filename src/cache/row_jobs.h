/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Encoding and recoding of many rows at once, shared out over the caller's threads by token groups,
 * KV head and side. Where each row goes was decided before (placing.h), so tasks never meet.
 */
#ifndef TQKVI_ROW_JOBS_H
#define TQKVI_ROW_JOBS_H

#include "cache/cell_store.h"

#define TQKVI_SIDE_BIT(side) (1u << (side))
#define TQKVI_SIDES_BOTH 3u

/*
 * Rows of K and V, [n][n_kv_heads][dim] f32 each, or NULL where that side stays, encoded into spots:
 * [n]. Bad rows are counted.
 */
void tqkvi_encode_rows(tqkv_store *store, const float *k, const float *v, const tqkvi_spot *spots,
                       size_t n, const tqkv_parallel *parallel);

typedef struct tqkvi_move {
    tqkvi_spot from, to;
} tqkvi_move;

/* Rows of `sides` go from one spot to another of any tier and base. No spot is both. */
void tqkvi_move_rows(tqkv_store *store, const tqkvi_move *moves, size_t n, uint32_t sides,
                     const tqkv_parallel *parallel);

/* Decodes one side of one token: row: [n_kv_heads][dim]. */
void tqkvi_decode_rows(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side, float *row);

/* K of a token: decoded at `from`, turned by delta positions, encoded at `to` (may be the same). */
void tqkvi_turn_token(tqkv_store *store, const tqkvi_spot *from, const tqkvi_spot *to,
                      int32_t delta);

/* Makes one side of a token the zero vector. */
void tqkvi_zero_rows(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side);

#endif /* TQKVI_ROW_JOBS_H */
