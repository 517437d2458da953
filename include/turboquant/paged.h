/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One layer of an engine that owns its cache as blocks, shares them between sequences and finds
 * them through block tables. The engine allocates, shares and forgets blocks as it likes; this
 * object knows how tokens lie in a block, and attends over block tables.
 *
 *     engine's block    block_tokens tokens, token_bytes of the old tier each
 *     beside the blocks copies of young tokens at the widths of the younger tiers
 *
 * The old tier is the plan's last one; in a layer with a window, the first that together with those
 * before it holds as many tokens, as older ones are never read, and the last may not store them.
 * Every token is encoded into its block at once, at the old tier's widths. A block that holds one
 * of the newest tokens of its sequence, or its first ones, also gets a copy in each younger tier that
 * reaches it, 16 tokens at a time; the last tokens of every block get one in tier 0, for sequences
 * that find the block in a prefix cache and go on behind it. A query at a position takes, for each
 * 16 tokens, the youngest tier that reaches them, so what it sees depends on the distance alone and
 * not on how tokens came together in batches. Copies are found by block and replaced by least
 * recent use: a token that has none (its sequence found the block in a prefix cache, or there are
 * more sequences than copies) is read from its block. Writing a token again makes the copies of it
 * and of those after it in its 16 invalid, so a rejected draft leaves nothing behind.
 *
 * A block must be written from its first token before it is read, each time the engine gives it to
 * other tokens. Blocks start as zeros. Blocks that the engine fills by other means (copies, loads from
 * elsewhere) are not seen by this object and must not be used.
 *
 *     tqkv_paged_write(paged, batch)            the new tokens of every sequence
 *     tqkv_paged_attend(paged, batch, args)     then their queries
 *
 * Threads: one call at a time per object. Nothing is allocated between create and destroy but by
 * tqkv_paged_write when a batch is larger than any before it, and pages of the address space that
 * are touched for the first time.
 */
#ifndef TURBOQUANT_PAGED_H
#define TURBOQUANT_PAGED_H

#include "store.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tqkv_paged tqkv_paged;

typedef struct tqkv_paged_config {
    size_t struct_bytes;   /* set by tqkv_paged_config_init */
    const tqkv_plan *plan; /* kept */
    uint32_t layer;        /* of the plan */
    uint32_t block_tokens; /* of the engine's blocks, a multiple of 16 */
    uint32_t n_blocks;     /* that the engine has */
    uint32_t n_sequences[TQKV_TIERS_MAX]; /* for which a younger tier holds copies at a time; may be
                                           * 0. Sinks: as tier 0. */
    uint32_t n_drafts;     /* tokens of a sequence that may be taken back after a batch */
    uint32_t n_batch_tokens; /* most new tokens of a batch: room for their copies beside those in use */
    const tqkv_rope *rope; /* NULL: the plan's; otherwise copied */
    const tqkv_allocator *mem; /* NULL: malloc for small objects and anonymous mmap for copies */
} tqkv_paged_config;

TQKV_API void tqkv_paged_config_init(tqkv_paged_config *config);

/*
 * Errors: TQKV_ERR_INVALID_ARG, TQKV_ERR_NO_MEMORY, TQKV_ERR_UNSUPPORTED (a plan whose frames are
 * not whole 16 tokens).
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_paged_create(const tqkv_paged_config *config, tqkv_paged **out);
TQKV_API void tqkv_paged_destroy(tqkv_paged *paged);

/* Index of the old tier of a layer; UINT32_MAX: no plan, or a layer that it has no cache for. */
TQKV_API uint32_t tqkv_paged_old_tier(const tqkv_plan *plan, uint32_t layer);
/* Bytes of one of the engine's blocks: block_tokens times token_bytes of the old tier. */
TQKV_API size_t tqkv_paged_block_bytes(const tqkv_paged *paged);
/*
 * Most bytes that an object with this config holds beside the blocks: copies and tables, but not the
 * codec's matrices, which belong to the plan as weights do. 0 for a bad config.
 */
TQKV_API size_t tqkv_paged_bytes(const tqkv_paged_config *config);

/*
 * New tokens of several sequences, all borrowed. Tokens of sequence r are [query_start[r],
 * query_start[r + 1]) of the batch and the last positions of its seq_lens[r] tokens. Position p is
 * token p % block_tokens of block block_table[r * block_table_stride + p / block_tokens], which
 * lies at blocks + number * block_stride_bytes, of any alignment.
 */
typedef struct tqkv_paged_batch {
    size_t struct_bytes; /* set by tqkv_paged_batch_init */
    uint8_t *blocks;     /* the engine's first block of this layer */
    size_t block_stride_bytes;
    uint32_t n_seqs;
    const int32_t *query_start; /* [n_seqs + 1] ascending from 0 */
    const int32_t *seq_lens;    /* [n_seqs] with the new tokens */
    const int32_t *block_table; /* [n_seqs][>= blocks of its sequence] */
    size_t block_table_stride;  /* elements */
    const float *k, *v;         /* [n_tokens][n_kv_heads][dim] f32, RoPE applied, contiguous; of a latent
                                 * layer (plan.h): K the rotated key, V the latent */
    uint32_t decode_tokens_max; /* a sequence with at most that many new tokens is attended as if
                                 * each had come alone, so that drafts change nothing; default 1 */
} tqkv_paged_batch;

TQKV_API void tqkv_paged_batch_init(tqkv_paged_batch *batch);

/* Errors: TQKV_ERR_INVALID_ARG (a table or a length out of range), TQKV_ERR_NO_MEMORY; nothing written then. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_paged_write(tqkv_paged *paged, const tqkv_paged_batch *batch,
                                                     const tqkv_parallel *parallel);

/*
 * Causal attention of every new token over its sequence, after tqkv_paged_write of the same batch. The new
 * tokens of a sequence see each other as they came, older ones through their codes, all of them in
 * the tiers that the first one wants. A layer with a window (of the plan) sees that many tokens, its
 * own included.
 * Sequences that follow each other in the batch, have one new token each and the same first blocks
 * read those together, where it pays: faster, and rounded differently than alone. Not in latent layers.
 * args: n_q new tokens of the batch; q, out and lse have a row for each, as has q_latent in latent
 * layers, which want it, and nowhere else. stream, n_cells, causal are not used; mask and slopes must
 * be NULL.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_paged_attend(tqkv_paged *paged, const tqkv_paged_batch *batch,
                                                      const tqkv_attend_args *args, const tqkv_parallel *parallel);

/* Scratch for sequences of up to seq_len tokens with up to n_q new ones; SIZE_MAX if too large. */
TQKV_API size_t tqkv_paged_scratch_bytes(const tqkv_paged *paged, uint32_t n_q, uint32_t seq_len,
                                         size_t n_workers);

/*
 * Copies that the next token of a sequence wants and that are gone: of its newest tokens, as tier 0
 * has them, and of its sinks, 16 tokens each. 0 right after they were written; of a sequence that an
 * engine finds in a prefix cache, what reading those tokens again would bring back. block_table: blocks
 * of its seq_len tokens, as in a batch. UINT32_MAX: no object, or a block out of range.
 */
TQKV_API uint32_t tqkv_paged_lost(const tqkv_paged *paged, const int32_t *block_table, uint32_t seq_len);

/*
 * Other sequences may go on behind these tokens, as one does that an engine finds in a prefix
 * cache: copies of the newest, as tier 0 has them, are not replaced. There is room for the ends of as
 * many prefixes as tier 0 has sequences; the one named first is let go. block_table: as in
 * tqkv_paged_lost. Errors: TQKV_ERR_INVALID_ARG.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_paged_keep(tqkv_paged *paged, const int32_t *block_table,
                                                    uint32_t seq_len);

typedef struct tqkv_paged_stats {
    uint64_t n_written;  /* tokens */
    uint64_t n_bad_rows; /* head rows with NaN or Inf, stored as zero */
    uint64_t n_young;    /* look-ups of 16 tokens that a copy answered */
    uint64_t n_missing;  /* those that a copy would have answered if there had been one */
    uint64_t n_shared;   /* reads of 16 tokens that another sequence's read served */
} tqkv_paged_stats;
TQKV_API void tqkv_paged_get_stats(const tqkv_paged *paged, tqkv_paged_stats *out);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_PAGED_H */
