/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The young tokens of one tier and stream: slots in blocks, and the order in which they were
 * written. A new token takes the lowest free slot, so the blocks in use stay together.
 */
#ifndef TQKVI_SLOT_POOL_H
#define TQKVI_SLOT_POOL_H

#include <stdbool.h>

#include "format/row_layout.h"

#define TQKVI_CELL_NONE UINT32_MAX

typedef struct tqkvi_slot_pool {
    uint32_t tier;
    uint32_t n_slots;    /* a multiple of TQKVI_BLOCK_TOKENS; 0: no such pool */
    uint32_t n_tokens;   /* slots in use */
    uint32_t n_blocks;   /* in use since the pool was cleared: slots past them were never written */
    uint32_t first_free; /* no slot below is free */
    uint8_t *blocks;
    uint32_t *cells; /* [n_slots] TQKVI_CELL_NONE: free */
    int32_t *bases;  /* [n_slots] */
    uint32_t *order; /* [n_tokens] slots, oldest first */
} tqkvi_slot_pool;

/* Bytes of cells, bases and order of one slot. */
#define TQKVI_SLOT_TABLE_BYTES (2 * sizeof(uint32_t) + sizeof(int32_t))

/* Forgets every token. */
void tqkvi_slot_pool_clear(tqkvi_slot_pool *pool);

/* Takes a slot for the youngest token; there must be one. */
uint32_t tqkvi_slot_pool_add(tqkvi_slot_pool *pool, uint32_t cell, int32_t base);

/* Slot of a cell; false if it is not here. */
bool tqkvi_slot_pool_find(const tqkvi_slot_pool *pool, uint32_t cell, uint32_t *slot);

void tqkvi_slot_pool_remove(tqkvi_slot_pool *pool, uint32_t slot);

/* Removes the n oldest tokens. */
void tqkvi_slot_pool_remove_oldest(tqkvi_slot_pool *pool, uint32_t n);

#endif /* TQKVI_SLOT_POOL_H */
