/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Encoding and recoding of many rows at once, shared out over the caller's threads by token groups,
 * KV head and side. Where each row goes was decided before (placing.h), so tasks never meet.
 */
#ifndef TQKVI_ROW_JOBS_H
#define TQKVI_ROW_JOBS_H

#include <stdatomic.h>

#include "cache/cell_store.h"

#define TQKVI_SIDE_BIT(side) (1u << (side))
#define TQKVI_SIDES_BOTH 3u

/* cos and sin of the last base that was asked for. */
typedef struct tqkvi_held_turn {
    bool known;
    int32_t base;
    float cos[TQKVI_DIM_MAX / 2];
    float sin[TQKVI_DIM_MAX / 2];
} tqkvi_held_turn;

typedef struct tqkvi_encode_job {
    tqkv_store *store;
    const float *rows[2];
    const tqkvi_spot *spots;
    size_t n;
    uint8_t *early;       /* see below, or NULL */
    tqkvi_held_turn turn; /* of the first spot's base, which nearly always is that of all */
    atomic_size_t n_bad;
} tqkvi_encode_job;

/*
 * Rows of K and V, [n][n_kv_heads][dim] f32 each, or NULL where that side stays, encoded into spots:
 * [n]. Bad rows are counted.
 */
void tqkvi_encode_rows(tqkv_store *store, const float *k, const float *v, const tqkvi_spot *spots,
                       size_t n, const tqkv_parallel *parallel);

/*
 * The same in three steps, for whoever has a parallel region of its own. Tasks may run in any order.
 *
 * early: NULL, or what rows are encoded into, while it is not yet known where they go: a block of
 * the spots' tier (the same for all, and at most 16 rows) in which row i is in slot i and rows are
 * not interleaved. tqkvi_encode_place then puts them into their spots. Bad rows are counted in n_bad.
 */
void tqkvi_encode_begin(tqkvi_encode_job *job, tqkv_store *store, const float *k, const float *v,
                        const tqkvi_spot *spots, size_t n, uint8_t *early);
size_t tqkvi_encode_tasks(const tqkvi_encode_job *job);
tqkv_task_fn tqkvi_encode_task; /* user: the job */
void tqkvi_encode_place(const tqkvi_encode_job *job);

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
