/* SPDX-License-Identifier: Apache-2.0 */
/* Pools are small (about a thousand slots), so everything is a linear search over u32. */
#include "cache/slot_pool.h"

#include <string.h>

void tqkvi_slot_pool_clear(tqkvi_slot_pool *pool)
{
    for (uint32_t i = 0; i < pool->n_slots; i++)
        pool->cells[i] = TQKVI_CELL_NONE;
    pool->n_tokens = pool->n_blocks = pool->first_free = 0;
}

uint32_t tqkvi_slot_pool_add(tqkvi_slot_pool *pool, uint32_t cell, int32_t base)
{
    uint32_t slot = pool->first_free;

    while (pool->cells[slot] != TQKVI_CELL_NONE)
        slot++;
    pool->first_free = slot + 1;
    pool->cells[slot] = cell;
    pool->bases[slot] = base;
    pool->order[pool->n_tokens++] = slot;
    if (pool->n_blocks <= slot / TQKVI_BLOCK_TOKENS)
        pool->n_blocks = slot / TQKVI_BLOCK_TOKENS + 1;
    return slot;
}

bool tqkvi_slot_pool_find(const tqkvi_slot_pool *pool, uint32_t cell, uint32_t *slot)
{
    const uint32_t end = pool->n_blocks * TQKVI_BLOCK_TOKENS;

    for (uint32_t i = 0; i < end; i++) {
        if (pool->cells[i] == cell) {
            *slot = i;
            return true;
        }
    }
    return false;
}

static void free_slot(tqkvi_slot_pool *pool, uint32_t slot)
{
    pool->cells[slot] = TQKVI_CELL_NONE;
    if (slot < pool->first_free)
        pool->first_free = slot;
}

void tqkvi_slot_pool_remove(tqkvi_slot_pool *pool, uint32_t slot)
{
    uint32_t at = 0;

    while (pool->order[at] != slot)
        at++;
    pool->n_tokens--;
    memmove(pool->order + at, pool->order + at + 1, (pool->n_tokens - at) * sizeof(*pool->order));
    free_slot(pool, slot);
}

void tqkvi_slot_pool_remove_oldest(tqkvi_slot_pool *pool, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        free_slot(pool, pool->order[i]);
    pool->n_tokens -= n;
    memmove(pool->order, pool->order + n, pool->n_tokens * sizeof(*pool->order));
}
