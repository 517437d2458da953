/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moving tokens to other positions, and copying streams.
 *
 * A base is only the angle that K's codes are turned back to. Turning K by delta more positions is
 * adding delta to the base, exactly, and no code changes. That is open to every young token (its
 * slot has its own base) and to a block of old ones that all move alike. Plain rows have no base.
 */
#include <string.h>

#include "cache/restore.h"
#include "cache/row_jobs.h"

static bool base_fits(int32_t base, int32_t delta)
{
    const int64_t sum = (int64_t)base + delta;

    return sum > TQKVI_BASE_NONE && sum <= INT32_MAX;
}

static tqkv_status check_shift(const tqkv_store *store, uint32_t first, const int32_t *deltas,
                               uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        tqkvi_spot spot;
        uint32_t pool;
        if (deltas[i] == 0 || !tqkvi_store_find(store, first + i, &spot, &pool))
            continue;
        if (store->codec->rope.style == TQKV_ROPE_NONE)
            return TQKV_ERR_UNSUPPORTED;
        if (store->has_bases && !base_fits(spot.base, deltas[i]))
            return TQKV_ERR_INVALID_ARG;
    }
    return TQKV_OK;
}

/* Whether all old cells of a block move by the same delta; those outside [first, end) move by 0. */
static bool moves_alike(const tqkvi_stream *stream, uint32_t block, uint32_t first, uint32_t end,
                        const int32_t *deltas, int32_t *delta)
{
    const uint32_t held = tqkvi_block_bits(stream->is_old, block);
    bool any = false;

    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++) {
        const uint32_t index = block * TQKVI_BLOCK_TOKENS + i;
        if (!(held >> i & 1))
            continue;
        const int32_t own = index >= first && index < end ? deltas[index - first] : 0;
        if (any && own != *delta)
            return false;
        *delta = own;
        any = true;
    }
    return any;
}

/* deltas: of indices [first, end) of the stream. */
static void shift_old(tqkv_store *store, uint32_t stream_index, uint32_t first, uint32_t end,
                      const int32_t *deltas)
{
    tqkvi_stream *stream = &store->streams[stream_index];

    for (uint32_t block = first / TQKVI_BLOCK_TOKENS; block * TQKVI_BLOCK_TOKENS < end; block++) {
        int32_t delta = 0;
        if (store->has_bases && !store->has_plain_k &&
            moves_alike(stream, block, first, end, deltas, &delta)) {
            stream->old_bases[block] += delta;
            continue;
        }
        for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++) {
            const uint32_t index = block * TQKVI_BLOCK_TOKENS + i;
            tqkvi_spot spot;
            uint32_t pool;
            if (index < first || index >= end || deltas[index - first] == 0 ||
                !tqkvi_bit(stream->is_old, index))
                continue;
            if (tqkvi_store_find(store, stream_index * store->n_cells + index, &spot, &pool))
                tqkvi_turn_token(store, &spot, &spot, deltas[index - first]);
        }
    }
}

static void shift_young(tqkv_store *store, uint32_t stream_index, uint32_t first, uint32_t end,
                        const int32_t *deltas)
{
    tqkvi_stream *stream = &store->streams[stream_index];
    const uint32_t first_cell = stream_index * store->n_cells;

    for (uint32_t p = 0; p < store->n_pools; p++) {
        tqkvi_slot_pool *pool = &stream->pools[p];
        for (uint32_t i = 0; i < pool->n_tokens; i++) {
            const uint32_t slot = pool->order[i];
            const uint32_t index = pool->cells[slot] - first_cell;
            tqkvi_spot spot;
            uint32_t found;
            if (index < first || index >= end || deltas[index - first] == 0)
                continue;
            if (store->has_bases && !store->has_plain_k)
                pool->bases[slot] += deltas[index - first];
            else if (tqkvi_store_find(store, pool->cells[slot], &spot, &found))
                tqkvi_turn_token(store, &spot, &spot, deltas[index - first]);
        }
    }
}

tqkv_status tqkvi_store_shift(tqkv_store *store, uint32_t first, const int32_t *deltas, uint32_t n)
{
    TQKV_TRY(check_shift(store, first, deltas, n));
    for (uint32_t done = 0; done < n;) {
        const uint32_t stream = (first + done) / store->n_cells;
        const uint32_t index = (first + done) % store->n_cells;
        const uint32_t left = n - done, room = store->n_cells - index;
        const uint32_t part = left < room ? left : room;
        shift_old(store, stream, index, index + part, deltas + done);
        shift_young(store, stream, index, index + part, deltas + done);
        done += part;
    }
    return TQKV_OK;
}

static bool same_rope(const tqkv_rope *a, const tqkv_rope *b)
{
    if (a->style != b->style || a->style == TQKV_ROPE_NONE)
        return a->style == b->style;
    return a->n_rot == b->n_rot &&
           memcmp(a->inv_freq, b->inv_freq, a->n_rot / 2 * sizeof(float)) == 0;
}

static void copy_pool(const tqkv_store *store, tqkvi_slot_pool *to, const tqkvi_slot_pool *from,
                      uint32_t to_cell, uint32_t from_cell)
{
    const size_t n = (size_t)from->n_blocks * TQKVI_BLOCK_TOKENS;

    memcpy(to->blocks, from->blocks,
           (size_t)from->n_blocks * store->layouts[from->tier].block_bytes);
    memcpy(to->bases, from->bases, n * sizeof(*to->bases));
    memcpy(to->order, from->order, from->n_tokens * sizeof(*to->order));
    for (size_t i = 0; i < n; i++)
        to->cells[i] = from->cells[i] == TQKVI_CELL_NONE ? TQKVI_CELL_NONE
                                                         : from->cells[i] - from_cell + to_cell;
    to->n_tokens = from->n_tokens;
    to->n_blocks = from->n_blocks;
    to->first_free = from->first_free;
}

tqkv_status tqkvi_store_copy_stream(tqkv_store *dst, uint32_t dst_stream, const tqkv_store *src,
                                    uint32_t src_stream)
{
    const tqkvi_stream *from = &src->streams[src_stream];
    tqkvi_stream *to = &dst->streams[dst_stream];
    const size_t block_bytes = src->layouts[src->n_young].block_bytes;

    if (dst->n_cells != src->n_cells || dst->layer != src->layer ||
        memcmp(dst->plan->fingerprint, src->plan->fingerprint, TQKV_FINGERPRINT_BYTES) != 0 ||
        !same_rope(&dst->codec->rope, &src->codec->rope))
        return TQKV_ERR_MISMATCH;
    if (from == to)
        return TQKV_OK;
    tqkvi_store_clear_stream(dst, dst_stream);
    for (uint32_t block = 0; block < src->n_blocks; block++)
        if (from->old_bases[block] != TQKVI_BASE_NONE)
            memcpy(to->old + block * block_bytes, from->old + block * block_bytes, block_bytes);
    memcpy(to->old_bases, from->old_bases, src->n_blocks * sizeof(*to->old_bases));
    memcpy(to->is_old, from->is_old, src->n_words * sizeof(*to->is_old));
    memcpy(to->is_young, from->is_young, src->n_words * sizeof(*to->is_young));
    to->n_old = from->n_old;
    to->n_old_touched = from->n_old_touched;
    for (uint32_t i = 0; i < src->n_pools; i++)
        copy_pool(src, &to->pools[i], &from->pools[i], dst_stream * dst->n_cells,
                  src_stream * src->n_cells);
    return TQKV_OK;
}
