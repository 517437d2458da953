/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies of blocks at a younger tier's widths, for an engine that owns the blocks themselves.
 *
 *     copy_of[block] ──> copy: valid tokens, the block it is of, its neighbours by use
 *     list by use:  head <-> newest <-> ... <-> oldest <-> head
 *
 * A copy is taken when a token of its block is written; without a free one the least recently used
 * one changes hands, but for those of the n_kept blocks that were last asked to be kept.
 */
#ifndef TQKVI_YOUNG_COPIES_H
#define TQKVI_YOUNG_COPIES_H

#include <stdbool.h>

#include "base/alloc.h"

#define TQKVI_COPY_NONE UINT32_MAX

typedef struct tqkvi_young_copies {
    uint32_t tier;
    uint32_t reach;     /* blocks back from that of the query; of sinks: blocks from the start */
    uint32_t n_copies;  /* > 0 */
    uint8_t *data;      /* [n_copies] blocks of the tier, owned by the caller */
    uint32_t *copy_of;  /* [n_blocks] or TQKVI_COPY_NONE */
    uint32_t *block_of; /* [n_copies] or TQKVI_COPY_NONE */
    uint16_t *valid;    /* [n_copies] bit i: token i of the block */
    uint32_t *newer, *older; /* [n_copies + 1] ring by use; its last entry is the head */
    uint32_t n_kept, next_kept;
    uint32_t *kept;   /* [n_kept] blocks or TQKVI_COPY_NONE, replaced in turn */
    uint8_t *is_kept; /* [n_blocks] */
} tqkvi_young_copies;

/* Bytes of the tables, a multiple of 8. n_kept: less than n_copies, or n_copies is n_blocks. */
size_t tqkvi_young_copies_bytes(uint32_t n_copies, uint32_t n_kept, uint32_t n_blocks);
/* Lays the tables out in memory of that size (aligned, kept) and empties them. */
void tqkvi_young_copies_init(tqkvi_young_copies *copies, void *memory, uint32_t n_copies,
                             uint32_t n_kept, uint32_t n_blocks);

/* The copy of a block, used now; an empty one is taken if it has none. */
uint32_t tqkvi_young_copies_take(tqkvi_young_copies *copies, uint32_t block);
void tqkvi_young_copies_use(tqkvi_young_copies *copies, uint32_t copy);
/* A copy of this block, if it has one, stays until n_kept other blocks were named here. */
void tqkvi_young_copies_keep(tqkvi_young_copies *copies, uint32_t block);

#endif /* TQKVI_YOUNG_COPIES_H */
