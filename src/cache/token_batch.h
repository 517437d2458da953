/* SPDX-License-Identifier: Apache-2.0 */
/* Tokens that arrive together: staged at full precision, then encoded into the store. */
#ifndef TQKVI_TOKEN_BATCH_H
#define TQKVI_TOKEN_BATCH_H

#include "cache/row_jobs.h"

/* Batches of so few tokens can be encoded beside attention: they all enter the youngest tier. */
#define TQKVI_EARLY_TOKENS TQKVI_BLOCK_TOKENS

struct tqkv_batch {
    tqkv_allocator mem;
    tqkv_store *store; /* NULL: closed */
    size_t n;
    uint32_t *cells;    /* [n] */
    int32_t *positions; /* [n] */
    tqkvi_spot *spots;  /* [n] where each goes, during commit */
    size_t n_max;       /* capacity of the three */
    float *rows[2];     /* [n][n_kv_heads][dim] by side */
    size_t floats_max[2];
    bool has_side[2];
    uint64_t *staged; /* bitset: n_words of the store for each stream */
    size_t words_max;
    uint8_t *early; /* rows of few tokens, encoded before they have spots */
    size_t early_max;
    bool is_encoded; /* the rows as they are now are in `early` */
    tqkvi_encode_job job;
};

TQKV_NODISCARD tqkv_status tqkvi_batch_create(const tqkv_allocator *mem, tqkv_batch **out);
/* Accepts NULL. An open batch is dropped. */
void tqkvi_batch_destroy(tqkv_batch *batch);

/* See tqkv_batch_begin; an open batch was committed before. */
TQKV_NODISCARD tqkv_status tqkvi_batch_begin(tqkv_batch *batch, tqkv_store *store,
                                             const int64_t *cells, const int32_t *positions,
                                             size_t n);
/* Copies rows in; a head row with NaN or Inf becomes zero and is counted. */
void tqkvi_batch_put(tqkv_batch *batch, tqkv_side side, const float *rows, size_t row_stride);

/*
 * Encoding of a live batch with both sides, as tasks beside attention: how many there are, 0 where
 * it is left to the commit. All of them must run before the next call. user: the batch.
 */
size_t tqkvi_batch_encode_begin(tqkv_batch *batch);
tqkv_task_fn tqkvi_batch_encode_task;

void tqkvi_batch_commit(tqkv_batch *batch, const tqkv_parallel *parallel);

/* Whether its tokens take part: a batch into which nothing was put changes nothing. */
static inline bool tqkvi_batch_is_live(const tqkv_batch *batch)
{
    return batch->store && batch->n > 0 &&
           (batch->has_side[TQKV_SIDE_K] || batch->has_side[TQKV_SIDE_V]);
}

/* Reads a side that was not put from the store, so that both can be used; the batch is live. */
void tqkvi_batch_complete(tqkv_batch *batch);

#endif /* TQKVI_TOKEN_BATCH_H */
