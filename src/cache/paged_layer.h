/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One layer whose blocks belong to an engine: where tokens go, and which copy of 16 tokens a query
 * reads. A "block" is 16 tokens, as everywhere; the engine's own blocks, of any multiple of 16
 * tokens, are "pages" here. Block number = page * page_blocks + index in the page.
 *
 *     position of the query's block - position of a block = distance d
 *
 *     first blocks (sinks)       tier 0, always
 *     d <= reach of tier t       tier t, the youngest that reaches
 *     otherwise                  the last tier, in the page
 *
 * reach of tier t: blocks that hold the tokens of tiers 0..t.
 */
#ifndef TQKVI_PAGED_LAYER_H
#define TQKVI_PAGED_LAYER_H

#include "cache/young_copies.h"
#include "cache/zero_pages.h"
#include "codec/layer_codec.h"
#include "turboquant/paged.h"

#define TQKVI_COPIES_MAX TQKV_TIERS_MAX /* the younger tiers, and the sinks */

/* Up to 16 new tokens that share a block. */
typedef struct tqkvi_paged_run {
    uint32_t token; /* of the batch */
    uint32_t n, slot;
    uint32_t block;
    uint32_t reached; /* bit i: goes to copies[i] as well */
    int32_t base;
} tqkvi_paged_run;

struct tqkv_paged {
    tqkv_allocator mem;
    tqkv_codec *codec;
    uint32_t page_blocks, n_pages;
    uint32_t old_tier, n_sinks, frame_tokens;
    bool has_bases; /* K is turned to a base: some head is coded and there is RoPE */
    tqkvi_block_layout layouts[TQKV_TIERS_MAX];
    uint32_t *sections;                          /* memory of the layouts */
    uint32_t n_copies;                           /* entries of copies */
    uint32_t sinks;                              /* the one of the sinks, or TQKVI_COPY_NONE */
    tqkvi_young_copies copies[TQKVI_COPIES_MAX]; /* ascending reach; the sinks come last */
    uint8_t *tables;                             /* memory of their tables */
    tqkvi_zero_pages data;                       /* memory of their blocks */
    tqkvi_paged_run *runs;                       /* [n_runs_max] of the batch being written */
    size_t n_runs_max;
    uint64_t n_written, n_bad_rows, n_young, n_missing, n_shared;
};

/* config: checked. */
TQKV_NODISCARD tqkv_status tqkvi_paged_create(const tqkv_paged_config *config, tqkv_paged **out);
/* paged.h says which. The plan has the layer. */
uint32_t tqkvi_paged_old_tier(const tqkv_plan *plan, uint32_t layer);
/* Bytes of tables and copies. config: checked. */
size_t tqkvi_paged_bytes(const tqkv_paged_config *config);
/* Accepts NULL and a half-built object. */
void tqkvi_paged_destroy(tqkv_paged *paged);

/* Base of the tokens of a block at this position of its first token. */
int32_t tqkvi_paged_base(const tqkv_paged *paged, int32_t position);

/* The block with these 16 positions, of a sequence whose row of the block table is given. */
static inline uint32_t tqkvi_paged_block(const tqkv_paged *paged, const int32_t *table,
                                         uint32_t index)
{
    return (uint32_t)table[index / paged->page_blocks] * paged->page_blocks +
           index % paged->page_blocks;
}

static inline uint8_t *tqkvi_paged_page_block(const tqkv_paged *paged,
                                              const tqkv_paged_batch *batch, uint32_t block)
{
    return batch->blocks + (size_t)(block / paged->page_blocks) * batch->block_stride_bytes +
           (size_t)(block % paged->page_blocks) * paged->layouts[paged->old_tier].block_bytes;
}

/* Copies of tier 0 that the token behind these lacks, sinks included. table: checked. */
uint32_t tqkvi_paged_lost(const tqkv_paged *paged, const int32_t *table, uint32_t n_tokens);

/* See tqkv_paged_keep. table: checked. */
void tqkvi_paged_keep(tqkv_paged *paged, const int32_t *table, uint32_t n_tokens);

/* Whether copies hold the block with this index when the newest token is in block `newest`. */
bool tqkvi_paged_reaches(const tqkv_paged *paged, uint32_t copies, uint32_t index, uint32_t newest);

/* Where a query in block `newest` reads tokens [0, n_tokens) of a block. */
typedef struct tqkvi_paged_spot {
    const uint8_t *block;
    uint32_t tier;
} tqkvi_paged_spot;
tqkvi_paged_spot tqkvi_paged_find(tqkv_paged *paged, const tqkv_paged_batch *batch,
                                  const int32_t *table, uint32_t index, uint32_t n_tokens,
                                  uint32_t newest);

/* See tqkv_paged_write; batch: checked. */
TQKV_NODISCARD tqkv_status tqkvi_paged_write(tqkv_paged *paged, const tqkv_paged_batch *batch,
                                             const tqkv_parallel *parallel);

#endif /* TQKVI_PAGED_LAYER_H */
