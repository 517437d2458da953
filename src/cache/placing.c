/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tokens leave the oldest tier first, so a tier is never asked to hold more than its slots: what
 * leaves it is gone before what enters it comes.
 */
#include "cache/placing.h"

#include "cache/row_jobs.h"

#define MOVES_AT_ONCE 64

/* Tier where the token at place x of a tier's queue ends; oldest first, arrivals at the end. */
static uint32_t final_tier(const tqkv_store *store, const tqkvi_outflow *flow, uint32_t tier,
                           uint64_t x)
{
    while (tier < store->n_young && x < flow->leave[tier]) {
        tier++;
        if (tier < store->n_young)
            x += flow->held[tier];
    }
    return tier;
}

static tqkvi_spot place(tqkv_store *store, uint32_t tier, uint32_t cell, int32_t base)
{
    return tier < store->n_young ? tqkvi_store_add_young(store, tier, cell, base)
                                 : tqkvi_store_add_old(store, cell, base);
}

/* The oldest tokens [first, first + n) of a tier go where they end. They stay in its pool. */
static void move_some(tqkv_store *store, uint32_t stream_index, uint32_t tier,
                      const tqkvi_outflow *flow, uint32_t first, uint32_t n,
                      const tqkv_parallel *parallel)
{
    tqkvi_stream *stream = &store->streams[stream_index];
    const tqkvi_slot_pool *pool = &stream->pools[tier];
    const size_t block_bytes = store->layouts[tier].block_bytes;
    tqkvi_move moves[MOVES_AT_ONCE];

    for (uint32_t i = 0; i < n; i++) {
        const uint32_t slot = pool->order[first + i];
        const uint32_t cell = pool->cells[slot];
        const uint32_t to = final_tier(store, flow, tier, first + i);
        moves[i].from =
            (tqkvi_spot){.block = pool->blocks + slot / TQKVI_BLOCK_TOKENS * block_bytes,
                         .slot = slot % TQKVI_BLOCK_TOKENS,
                         .tier = tier,
                         .base = pool->bases[slot]};
        if (to == store->n_young)
            tqkvi_bit_clear(stream->is_young, cell % store->n_cells);
        moves[i].to = place(store, to, cell, pool->bases[slot]);
    }
    tqkvi_move_rows(store, moves, n, TQKVI_SIDES_BOTH, parallel);
}

static void move_leavers(tqkv_store *store, uint32_t stream_index, const tqkvi_outflow *flow,
                         const tqkv_parallel *parallel)
{
    for (uint32_t tier = store->n_young; tier-- > 0;) {
        tqkvi_slot_pool *pool = &store->streams[stream_index].pools[tier];
        const uint64_t leave =
            flow->leave[tier] < flow->held[tier] ? flow->leave[tier] : flow->held[tier];
        for (uint32_t i = 0; i < leave; i += MOVES_AT_ONCE) {
            const uint32_t left = (uint32_t)leave - i;
            move_some(store, stream_index, tier, flow, i,
                      left < MOVES_AT_ONCE ? left : MOVES_AT_ONCE, parallel);
        }
        tqkvi_slot_pool_remove_oldest(pool, (uint32_t)leave);
        store->n_reencoded += leave;
    }
}

void tqkvi_make_way(tqkv_store *store, uint32_t stream, size_t n, tqkvi_outflow *flow,
                    const tqkv_parallel *parallel)
{
    uint64_t arrive = n;

    *flow = (tqkvi_outflow){.leave = {0}};
    for (uint32_t tier = 0; tier < store->n_young; tier++) {
        const uint64_t keep = store->codec->layer->shape.tier_tokens[tier];
        flow->held[tier] = store->streams[stream].pools[tier].n_tokens;
        const uint64_t total = flow->held[tier] + arrive;
        arrive = total >= keep + TQKVI_BLOCK_TOKENS
                     ? (total - keep) / TQKVI_BLOCK_TOKENS * TQKVI_BLOCK_TOKENS
                     : 0;
        flow->leave[tier] = arrive;
    }
    move_leavers(store, stream, flow, parallel);
}

void tqkvi_make_slot(tqkv_store *store, uint32_t stream, uint32_t tier)
{
    tqkvi_outflow flow = {.leave = {0}};
    uint64_t arrive = 1;

    for (uint32_t i = 0; i < store->n_young; i++) {
        const tqkvi_slot_pool *pool = &store->streams[stream].pools[i];
        flow.held[i] = pool->n_tokens;
        if (i < tier)
            continue;
        if (pool->n_tokens + arrive > pool->n_slots)
            flow.leave[i] = TQKVI_BLOCK_TOKENS;
        arrive = flow.leave[i];
    }
    move_leavers(store, stream, &flow, NULL);
}

tqkvi_spot tqkvi_place_new(tqkv_store *store, const tqkvi_outflow *flow, size_t i, uint32_t cell,
                           int32_t base)
{
    const uint64_t x = store->n_young ? flow->held[0] + i : 0;

    return place(store, final_tier(store, flow, 0, x), cell, base);
}

bool tqkvi_takes_sink(const tqkv_store *store, uint32_t stream, int64_t position)
{
    if (store->n_pools == 0 || position < 0 || position >= (int64_t)store->plan->n_sinks)
        return false;
    const tqkvi_slot_pool *sinks = &store->streams[stream].pools[store->n_young];
    return sinks->n_tokens < sinks->n_slots;
}
