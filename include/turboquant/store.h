/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compressed K and V of one layer, attention over them, and what an engine does to a cache:
 * overwrite, copy, shift, save and restore.
 *
 * A store has n_streams * n_cells cells; cell = stream * n_cells + index. A cell holds one token.
 * New tokens arrive in a batch: they are staged (visible to attention at full precision), attended,
 * then committed (encoded). Older tokens move to narrower tiers when a batch is committed, 16 at a time, by
 * order of writing within their stream.
 *
 *     tqkv_batch_begin(batch, store, cells, positions, n)
 *     tqkv_batch_put_k / tqkv_batch_put_v
 *     tqkv_store_attend(store, batch, ...)        any number of times
 *     tqkv_batch_commit(batch)
 *
 * Threads: one call at a time per store and per batch. A batch may serve many stores in turn.
 * Nothing is allocated between create and destroy but by tqkv_batch_begin when a batch is larger
 * than any before it, and pages of the address space that are touched for the first time.
 */
#ifndef TURBOQUANT_STORE_H
#define TURBOQUANT_STORE_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tqkv_store tqkv_store;
typedef struct tqkv_batch tqkv_batch;

typedef struct tqkv_store_config {
    size_t struct_bytes;   /* set by tqkv_store_config_init */
    const tqkv_plan *plan; /* kept */
    uint32_t layer;        /* of the plan */
    uint32_t n_cells;      /* per stream */
    uint32_t n_streams;    /* >= 1 */
    const tqkv_rope *rope; /* NULL: the plan's; otherwise copied */
    const tqkv_allocator *mem; /* NULL: malloc for small objects and anonymous mmap for cells */
} tqkv_store_config;

TQKV_API void tqkv_store_config_init(tqkv_store_config *config);

/* Address space is reserved for all cells; memory is used only for cells that were written. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_create(const tqkv_store_config *config, tqkv_store **out);
TQKV_API void tqkv_store_destroy(tqkv_store *store);

/*
 * Bytes of memory that a store takes after n_tokens of each stream were written in order; everything
 * counted. More tokens than n_cells: the cells are used in turn, as in a sliding window.
 */
TQKV_API size_t tqkv_store_bytes_at(const tqkv_store *store, size_t n_tokens);
/* Bytes of memory that hold tokens now (whole blocks, tables included); everything counted. */
TQKV_API size_t tqkv_store_bytes(const tqkv_store *store);
/* Bytes of address space when every cell is written. */
TQKV_API size_t tqkv_store_bytes_max(const tqkv_store *store);

TQKV_API TQKV_NODISCARD tqkv_status tqkv_batch_create(const tqkv_allocator *mem, tqkv_batch **out);
TQKV_API void tqkv_batch_destroy(tqkv_batch *batch);

/*
 * Opens a batch of n tokens for one store. An open batch is committed first.
 * cells: [n] distinct. positions: [n], or NULL where no position is visible: the index of the
 * cell in its stream serves. Both copied. After a failure the batch is closed and empty.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_batch_begin(tqkv_batch *batch, tqkv_store *store, const int64_t *cells,
                                                     const int32_t *positions, size_t n);
/* rows: [n][n_kv_heads][dim] f32, stride of one token in floats, copied. Missing sides are kept as they were. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_batch_put(tqkv_batch *batch, tqkv_side side, const float *rows,
                                                   size_t row_stride);
/* The copied rows, [n][n_kv_heads][dim] contiguous: an observer may read or change them before attention. */
TQKV_API float *tqkv_batch_rows(tqkv_batch *batch, tqkv_side side);
/* Encodes what was put and ages older tokens. A batch without tokens is fine. parallel may be NULL. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_batch_commit(tqkv_batch *batch, const tqkv_parallel *parallel);

/*
 * Attention of n_q queries over one stream: softmax(scale * q.k + mask) v per query head.
 * Query head h reads KV head h / (n_heads / n_kv_heads).
 */
typedef struct tqkv_attend_args {
    size_t struct_bytes;    /* set by tqkv_attend_args_init */
    uint32_t stream;
    uint32_t n_q;           /* queries */
    uint32_t n_cells;       /* cells [0, n_cells) of the stream take part */
    const float *q;         /* [n_q][n_heads][k_dim] f32 with the strides below, RoPE applied */
    size_t q_token_stride, q_head_stride; /* floats */
    float *out;             /* [n_q][n_heads][v_dim] f32 with the strides below */
    size_t out_token_stride, out_head_stride; /* floats */
    float *lse;             /* [n_q][n_heads] natural log of the sum of exp, or NULL */
    const uint16_t *mask;   /* [n_q][>= n_cells] f16, added to the scaled scores; -inf hides. NULL: see causal */
    size_t mask_row_stride; /* elements */
    const float *slopes;    /* [n_heads] factor of the mask per head (ALiBi), or NULL: 1 */
    const float *sinks;     /* [n_heads] score of a virtual key without value, or NULL */
    float scale;
    float softcap;          /* 0: none; otherwise softcap * tanh(scale * q.k / softcap) */
    int causal;             /* without a mask: query i sees every committed cell and batch tokens 0..i */
    void *scratch;          /* tqkv_store_scratch_bytes, TQKV_ALIGN-aligned */
    const float *q_latent;  /* [n_q][n_heads][v_dim] f32, strides of q: the part of a query that meets V as a key;
                             * in latent layers (plan.h) and nowhere else */
} tqkv_attend_args;

TQKV_API void tqkv_attend_args_init(tqkv_attend_args *args);
/* Scratch for attention with up to n_q queries and n_workers workers. */
TQKV_API size_t tqkv_store_scratch_bytes(const tqkv_store *store, uint32_t n_q, size_t n_workers);

/*
 * batch: open batch of this store whose tokens also take part, or NULL.
 * A query that sees nothing gets zeros and lse = -inf (with sinks: the score of its sink).
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_attend(tqkv_store *store, const tqkv_batch *batch,
                                                      const tqkv_attend_args *args, const tqkv_parallel *parallel);

/* Decoded rows of one cell: [n_kv_heads][dim] f32. A cell never written gives zeros. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_read(const tqkv_store *store, int64_t cell, tqkv_side side,
                                                    float *row);
/*
 * Writes one side of one cell outside a batch (restoring foreign f32 rows). K enters as a new token in
 * the newest tier; V then goes where the token is. So write K first. position: NULL as in a batch.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_write(tqkv_store *store, int64_t cell, tqkv_side side,
                                                     const int32_t *position, const float *row);

/*
 * One side of one cell as self-describing bytes: magic, version, fingerprint, tier, base, scales,
 * codes, checksum. Importing what was exported gives back the same bytes on the next export.
 * record_bytes: an upper bound for one side. n_bytes out: bytes used. Import K of a cell before its V.
 * Import errors: TQKV_ERR_CORRUPT, TQKV_ERR_MISMATCH (another calibration); the cell is unchanged.
 */
TQKV_API size_t tqkv_store_record_bytes(const tqkv_store *store, tqkv_side side);
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_export(const tqkv_store *store, int64_t cell, tqkv_side side,
                                                      uint8_t *record, size_t *n_bytes);
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_import(tqkv_store *store, int64_t cell, tqkv_side side,
                                                      const uint8_t *record, size_t n_bytes);

/*
 * Moves tokens to other positions: K of cell first + i turns by deltas[i] positions. Runs of equal
 * deltas over whole blocks only change the base of the block; others are decoded, turned, encoded.
 * Errors, with nothing changed: TQKV_ERR_UNSUPPORTED (the store knows no RoPE), TQKV_ERR_INVALID_ARG
 * (also a base that would not fit in 32 bits).
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_shift(tqkv_store *store, int64_t first, const int32_t *deltas,
                                                     size_t n);

/* Copies every cell of a stream, codes as they are, to another stream (of this or of a store of the same plan, layer and n_cells). */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_store_copy_stream(tqkv_store *dst, uint32_t dst_stream,
                                                           const tqkv_store *src, uint32_t src_stream);
/* Forgets every cell and gives their memory back. */
TQKV_API void tqkv_store_clear(tqkv_store *store);

/* Counters since creation. */
typedef struct tqkv_store_stats {
    uint64_t n_written;    /* tokens committed */
    uint64_t n_bad_rows;   /* head rows with NaN or Inf, stored as zero */
    uint64_t n_reencoded;  /* tokens moved to a narrower tier */
    uint64_t n_tokens[TQKV_TIERS_MAX]; /* tokens held now by tier */
} tqkv_store_stats;
TQKV_API void tqkv_store_get_stats(const tqkv_store *store, tqkv_store_stats *out);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_STORE_H */
