/* SPDX-License-Identifier: Apache-2.0 */
/* Single cells: K and V of a token arrive apart, and each keeps the codes that it came with. */
#include "cache/restore.h"

#include <string.h>

#include "cache/placing.h"
#include "cache/row_jobs.h"
#include "format/record.h"

void tqkvi_store_read(const tqkv_store *store, uint32_t cell, tqkv_side side, float *row)
{
    const size_t floats =
        (size_t)store->codec->n_kv_heads * tqkvi_shape_dim(&store->codec->layer->shape, side);
    tqkvi_spot spot;
    uint32_t pool;

    if (tqkvi_store_find(store, cell, &spot, &pool))
        tqkvi_decode_rows(store, &spot, side, row);
    else
        memset(row, 0, floats * sizeof(*row));
}

static tqkv_side other(tqkv_side side)
{
    return side == TQKV_SIDE_K ? TQKV_SIDE_V : TQKV_SIDE_K;
}

/*
 * The token of a cell now lives in `pool` (n_pools: the old store), as its youngest. The side
 * that is not `side` comes along from where the token was, or is zero.
 */
static tqkvi_spot resettle(tqkv_store *store, uint32_t cell, uint32_t pool, int32_t base,
                           tqkv_side side)
{
    tqkvi_stream *stream = tqkvi_store_stream(store, cell);
    const uint32_t index = cell % store->n_cells;
    tqkvi_move move;
    uint32_t from_pool, slot = 0;
    const bool had = tqkvi_store_find(store, cell, &move.from, &from_pool);
    const bool was_young = had && from_pool < store->n_pools;

    if (was_young)
        (void)tqkvi_slot_pool_find(&stream->pools[from_pool], cell, &slot);
    if (had && !was_young) {
        tqkvi_bit_clear(stream->is_old, index);
        stream->n_old--;
    }
    move.to = pool < store->n_pools ? tqkvi_store_add_young(store, pool, cell, base)
                                    : tqkvi_store_add_old(store, cell, base);
    if (had && move.from.block == move.to.block && move.from.slot == move.to.slot)
        return move.to; /* without young tiers a cell has one place */
    if (had)
        tqkvi_move_rows(store, &move, 1, TQKVI_SIDE_BIT(other(side)), NULL);
    else
        tqkvi_zero_rows(store, &move.to, other(side));
    if (was_young) {
        tqkvi_slot_pool_remove(&stream->pools[from_pool], slot);
        if (pool == store->n_pools)
            tqkvi_bit_clear(stream->is_young, index);
    }
    return move.to;
}

void tqkvi_store_write(tqkv_store *store, uint32_t cell, tqkv_side side, int32_t position,
                       const float *row)
{
    const uint32_t stream = cell / store->n_cells;
    const int32_t base = tqkvi_store_base(store, position);
    tqkvi_spot spot;
    uint32_t pool = store->n_pools;

    if (side == TQKV_SIDE_K || !tqkvi_store_find(store, cell, &spot, &pool)) {
        if (tqkvi_takes_sink(store, stream, position)) {
            pool = store->n_young;
        } else if (store->n_young) {
            tqkvi_outflow flow;
            tqkvi_make_way(store, stream, 1, &flow, NULL);
            pool = 0;
        } else {
            pool = store->n_pools;
        }
        spot = resettle(store, cell, pool, base, side);
        store->n_written++;
    }
    tqkvi_encode_rows(store, side == TQKV_SIDE_K ? row : NULL, side == TQKV_SIDE_V ? row : NULL,
                      &spot, 1, NULL);
}

size_t tqkvi_store_export(const tqkv_store *store, uint32_t cell, tqkv_side side, uint8_t *bytes)
{
    tqkvi_record record = {.layer = store->layer, .side = side, .tier = store->n_young};
    tqkvi_spot spot;
    uint32_t pool;
    const bool has_token = tqkvi_store_find(store, cell, &spot, &pool);
    const size_t n_bytes =
        tqkvi_record_bytes(store->plan, store->layer, side, has_token ? spot.tier : record.tier);

    memset(bytes, 0, n_bytes);
    if (has_token) {
        record.tier = spot.tier;
        record.base = side == TQKV_SIDE_K ? spot.base : 0;
        record.sink = store->n_pools && pool == store->n_young;
    }
    tqkvi_record_begin(store->plan, &record, bytes);
    for (uint32_t g = 0; has_token && g < store->codec->n_kv_heads; g++) {
        uint8_t *to = bytes + tqkvi_record_head(store->plan, &record, g);
        to[0] = *tqkvi_spot_scale(store, &spot, side, g);
        tqkvi_spot_get_row(store, &spot, side, g, to + 1);
    }
    tqkvi_record_end(store->plan, &record, bytes);
    return n_bytes;
}

/* Pool that a record names; a sink that finds no room is an ordinary token. */
static uint32_t pool_of(const tqkv_store *store, uint32_t stream, const tqkvi_record *record,
                        uint32_t now)
{
    if (record->tier >= store->n_young)
        return store->n_pools;
    if (record->sink && (now == store->n_young || tqkvi_takes_sink(store, stream, 0)))
        return store->n_young;
    return record->tier;
}

/* Base that the token has from now on: its slot's, or its block's, which the only token decides. */
static void adopt_base(tqkv_store *store, uint32_t cell, uint32_t pool, tqkvi_spot *spot,
                       int32_t base)
{
    tqkvi_stream *stream = tqkvi_store_stream(store, cell);
    const uint32_t block = cell % store->n_cells / TQKVI_BLOCK_TOKENS;
    uint32_t slot;

    if (pool < store->n_pools) {
        if (tqkvi_slot_pool_find(&stream->pools[pool], cell, &slot))
            stream->pools[pool].bases[slot] = base;
        spot->base = base;
        return;
    }
    const uint32_t held = tqkvi_block_bits(stream->is_old, block);
    if ((held & (held - 1)) == 0)
        stream->old_bases[block] = base;
    spot->base = stream->old_bases[block];
}

tqkv_status tqkvi_store_import(tqkv_store *store, uint32_t cell, tqkv_side side,
                               const uint8_t *bytes, size_t n_bytes)
{
    const uint32_t stream = cell / store->n_cells;
    tqkvi_record record;
    tqkvi_spot spot;
    uint32_t now;

    TQKV_TRY(tqkvi_record_unpack(store->plan, store->layer, side, bytes, n_bytes, &record));
    if (record.base == TQKVI_BASE_NONE)
        return TQKV_ERR_CORRUPT;
    if (record.base != 0 && !store->has_bases)
        return TQKV_ERR_MISMATCH;

    bool had = tqkvi_store_find(store, cell, &spot, &now);
    const uint32_t pool = pool_of(store, stream, &record, had ? now : store->n_pools);
    if (!had || now != pool) {
        if (pool < store->n_young) {
            tqkvi_make_slot(store, stream, pool);
            had = tqkvi_store_find(store, cell, &spot, &now);
        }
        int32_t base = had ? spot.base : tqkvi_store_base(store, (int32_t)(cell % store->n_cells));
        if (side == TQKV_SIDE_K)
            base = record.base;
        spot = resettle(store, cell, pool, base, side);
    }
    if (side == TQKV_SIDE_K)
        adopt_base(store, cell, pool, &spot, record.base);
    for (uint32_t g = 0; g < store->codec->n_kv_heads; g++) {
        const uint8_t *from = bytes + tqkvi_record_head(store->plan, &record, g);
        *tqkvi_spot_scale(store, &spot, side, g) = from[0];
        tqkvi_spot_put_row(store, &spot, side, g, from + 1);
    }
    if (side == TQKV_SIDE_K && spot.base != record.base) {
        tqkvi_spot as_written = spot; /* the codes mean what they say under the record's base */
        as_written.base = record.base;
        tqkvi_turn_token(store, &as_written, &spot, 0);
    }
    return TQKV_OK;
}
