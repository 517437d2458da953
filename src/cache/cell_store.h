/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The store: where the token of each cell lies, and its codes. README.md of this folder has the
 * rules that comments cite as "rule n".
 *
 *     batch ──> tier 0 ──> tier 1 ──> ... ──> old store      sinks: tier 0 that never ages
 *               pool       pool               a block of 16 cells each
 *
 * A cell of a stream is in one of four states:
 *
 *     never written    neither bit; its row in the old store is zero
 *     old              is_old: its codes are in the old store, at its own place
 *     young            is_young: its codes are in a slot of one of the pools
 *     staged           a bit of the open batch, above any of these (token_batch.h)
 */
#ifndef TQKVI_CELL_STORE_H
#define TQKVI_CELL_STORE_H

#include "cache/slot_pool.h"
#include "cache/zero_pages.h"
#include "codec/layer_codec.h"
#include "turboquant/store.h"

#define TQKVI_BASE_NONE INT32_MIN /* of an old block that was never written */
#define TQKVI_SINK_SLOTS 64

typedef struct tqkvi_stream {
    uint8_t *old;                          /* [n_blocks] blocks of the last tier */
    int32_t *old_bases;                    /* [n_blocks] */
    uint64_t *is_old, *is_young;           /* bitsets over the cells of the stream */
    uint32_t n_old;                        /* cells in is_old */
    uint32_t n_old_touched;                /* blocks with a base */
    tqkvi_slot_pool pools[TQKV_TIERS_MAX]; /* [n_young] tiers, then the sinks */
} tqkvi_stream;

struct tqkv_store {
    tqkv_allocator mem;
    const tqkv_plan *plan;
    uint32_t layer;
    tqkv_codec *codec;
    uint32_t n_cells, n_streams, n_blocks, n_words; /* of one stream; words of a bitset */
    uint32_t n_young;                               /* tiers before the last */
    uint32_t n_pools; /* n_young and the sinks; 0 without young tiers */
    bool has_bases;   /* K is turned to a base: some head is coded and there is RoPE */
    bool has_plain_k; /* some head keeps K as it came */
    tqkvi_block_layout layouts[TQKV_TIERS_MAX];
    uint32_t *sections; /* memory of the layouts */
    tqkvi_zero_pages pages;
    size_t stream_bytes; /* of pages */
    uint8_t *tables;     /* memory of bases, bitsets and pools */
    size_t table_bytes;  /* everything but the pages */
    tqkvi_stream *streams;
    uint64_t n_written, n_bad_rows, n_reencoded;
};

/* Where the codes of a token lie. */
typedef struct tqkvi_spot {
    uint8_t *block;
    uint32_t slot; /* in the block */
    uint32_t tier;
    int32_t base;
} tqkvi_spot;

/* config: checked. mem NULL: see tqkv_store_config. */
TQKV_NODISCARD tqkv_status tqkvi_store_create(const tqkv_store_config *config, tqkv_store **out);
/* Accepts NULL and a half-built store. */
void tqkvi_store_destroy(tqkv_store *store);
void tqkvi_store_clear(tqkv_store *store);
void tqkvi_store_clear_stream(tqkv_store *store, uint32_t stream);

size_t tqkvi_store_bytes(const tqkv_store *store);
size_t tqkvi_store_bytes_at(const tqkv_store *store, size_t n_tokens);
size_t tqkvi_store_bytes_max(const tqkv_store *store);
void tqkvi_store_get_stats(const tqkv_store *store, tqkv_store_stats *out);

static inline tqkvi_stream *tqkvi_store_stream(const tqkv_store *store, uint32_t cell)
{
    return &store->streams[cell / store->n_cells];
}

/* base of a token at a position: the start of its frame. */
int32_t tqkvi_store_base(const tqkv_store *store, int32_t position);

/* The token of a cell; false if it was never written. pool: index of its pool, or n_pools. */
bool tqkvi_store_find(const tqkv_store *store, uint32_t cell, tqkvi_spot *spot, uint32_t *pool);

/* Forgets the token of a cell, if any. Its codes stay until the slot is used again. */
void tqkvi_store_remove(tqkv_store *store, uint32_t cell);

/* The place of an old cell; base: of an empty block, otherwise the block's own stays. */
tqkvi_spot tqkvi_store_add_old(tqkv_store *store, uint32_t cell, int32_t base);
/* A slot of a pool, which must have one. */
tqkvi_spot tqkvi_store_add_young(tqkv_store *store, uint32_t pool, uint32_t cell, int32_t base);

static inline uint8_t *tqkvi_spot_scale(const tqkv_store *store, const tqkvi_spot *spot,
                                        tqkv_side side, uint32_t g)
{
    return spot->block + store->layouts[spot->tier].section[side][g] + spot->slot;
}

/* The row of a spot in the row format: [row_bytes of its layout] in, */
void tqkvi_spot_put_row(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side, uint32_t g,
                        const uint8_t *row);
/* and out. */
void tqkvi_spot_get_row(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side, uint32_t g,
                        uint8_t *row);

static inline bool tqkvi_bit(const uint64_t *set, uint32_t i)
{
    return set[i / 64] >> (i % 64) & 1;
}

static inline void tqkvi_bit_set(uint64_t *set, uint32_t i)
{
    set[i / 64] |= (uint64_t)1 << (i % 64);
}

static inline void tqkvi_bit_clear(uint64_t *set, uint32_t i)
{
    set[i / 64] &= ~((uint64_t)1 << (i % 64));
}

/* Bits of the 16 cells of a block. */
static inline uint32_t tqkvi_block_bits(const uint64_t *set, uint32_t block)
{
    return (uint32_t)(set[block / 4] >> (16 * (block % 4))) & 0xffff;
}

#endif /* TQKVI_CELL_STORE_H */
