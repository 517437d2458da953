/* SPDX-License-Identifier: Apache-2.0 */
/* Building a store, finding and placing tokens, counting bytes. */
#include "cache/cell_store.h"

#include <string.h>

#include "format/block_rows.h"

static size_t round_up(size_t n, size_t unit)
{
    return (n + unit - 1) / unit * unit;
}

/* Slots of a pool: what it holds between commits, and room for one group of 16 more. */
static uint32_t pool_slots(const tqkv_store *store, uint32_t pool)
{
    const tqkv_plan_layer *shape = &store->codec->layer->shape;

    if (pool == store->n_young)
        return TQKVI_SINK_SLOTS;
    return (tqkvi_div_up(shape->tier_tokens[pool], TQKVI_BLOCK_TOKENS) + 1) * TQKVI_BLOCK_TOKENS;
}

static tqkv_status init_layouts(tqkv_store *store)
{
    const uint32_t n_heads = store->codec->n_kv_heads;
    size_t bytes;

    TQKV_TRY(tqkvi_size_mul((size_t)2 * store->plan->n_tiers * n_heads, sizeof(uint32_t), &bytes));
    store->sections = tqkvi_alloc(&store->mem, bytes);
    if (!store->sections)
        return TQKV_ERR_NO_MEMORY;
    store->table_bytes += bytes;

    uint32_t *next = store->sections;
    for (uint32_t tier = 0; tier < store->plan->n_tiers; tier++) {
        tqkvi_layer_block_layout(store->codec->layer, tier, next, &store->layouts[tier]);
        next += 2 * n_heads;
    }
    return TQKV_OK;
}

/* Bytes of the pages of one stream: old blocks, then the blocks of each pool. */
static tqkv_status measure_pages(tqkv_store *store, bool mapped)
{
    size_t total, part;

    TQKV_TRY(tqkvi_size_mul(store->n_blocks, store->layouts[store->n_young].block_bytes, &total));
    for (uint32_t i = 0; i < store->n_pools; i++) {
        const uint32_t tier = i < store->n_young ? i : 0;
        TQKV_TRY(tqkvi_size_mul(pool_slots(store, i) / TQKVI_BLOCK_TOKENS,
                                store->layouts[tier].block_bytes, &part));
        TQKV_TRY(tqkvi_size_add(total, part, &total));
    }
    const size_t unit = mapped ? tqkvi_zero_pages_unit() : TQKV_ALIGN;
    TQKV_TRY(tqkvi_size_add(total, unit, &total));
    store->stream_bytes = (total - 1) / unit * unit;
    return TQKV_OK;
}

static size_t stream_table_bytes(const tqkv_store *store)
{
    size_t bytes = round_up(store->n_blocks * sizeof(int32_t), sizeof(uint64_t)) +
                   2 * (size_t)store->n_words * sizeof(uint64_t);

    for (uint32_t i = 0; i < store->n_pools; i++)
        bytes += pool_slots(store, i) * TQKVI_SLOT_TABLE_BYTES;
    return round_up(bytes, TQKV_ALIGN);
}

static void init_stream(tqkv_store *store, uint32_t index)
{
    tqkvi_stream *stream = &store->streams[index];
    uint8_t *table = store->tables + index * stream_table_bytes(store);
    uint8_t *page = store->pages.data + index * store->stream_bytes;

    stream->is_old = (uint64_t *)(void *)table;
    stream->is_young = stream->is_old + store->n_words;
    stream->old_bases = (int32_t *)(void *)(stream->is_young + store->n_words);
    table = (uint8_t *)stream->is_old + 2 * (size_t)store->n_words * sizeof(uint64_t) +
            round_up(store->n_blocks * sizeof(int32_t), sizeof(uint64_t));
    stream->old = page;
    page += (size_t)store->n_blocks * store->layouts[store->n_young].block_bytes;
    for (uint32_t i = 0; i < store->n_pools; i++) {
        tqkvi_slot_pool *pool = &stream->pools[i];
        pool->tier = i < store->n_young ? i : 0;
        pool->n_slots = pool_slots(store, i);
        pool->cells = (uint32_t *)(void *)table;
        pool->order = pool->cells + pool->n_slots;
        pool->bases = (int32_t *)(void *)(pool->order + pool->n_slots);
        table += pool->n_slots * TQKVI_SLOT_TABLE_BYTES;
        pool->blocks = page;
        page +=
            (size_t)(pool->n_slots / TQKVI_BLOCK_TOKENS) * store->layouts[pool->tier].block_bytes;
        tqkvi_slot_pool_clear(pool);
    }
    for (uint32_t block = 0; block < store->n_blocks; block++)
        stream->old_bases[block] = TQKVI_BASE_NONE;
}

static void init_flags(tqkv_store *store)
{
    bool has_coded = false;

    for (uint32_t g = 0; g < store->codec->n_kv_heads; g++) {
        const bool plain = store->codec->heads[TQKV_SIDE_K][g].plain;
        has_coded |= !plain;
        store->has_plain_k |= plain;
    }
    store->has_bases = has_coded && store->codec->rope.style != TQKV_ROPE_NONE;
}

static tqkv_status init_store(tqkv_store *store, const tqkv_store_config *config)
{
    size_t bytes;

    TQKV_TRY(
        tqkvi_codec_create(config->plan, config->layer, config->rope, config->mem, &store->codec));
    init_flags(store);
    TQKV_TRY(init_layouts(store));

    TQKV_TRY(measure_pages(store, !config->mem));
    TQKV_TRY(tqkvi_size_mul(store->stream_bytes, store->n_streams, &bytes));
    TQKV_TRY(tqkvi_zero_pages_init(&store->pages, config->mem, bytes));

    TQKV_TRY(tqkvi_size_mul(stream_table_bytes(store), store->n_streams, &bytes));
    store->tables = tqkvi_alloc_zero(&store->mem, bytes);
    store->table_bytes += bytes;
    TQKV_TRY(tqkvi_size_mul(sizeof(*store->streams), store->n_streams, &bytes));
    store->streams = tqkvi_alloc_zero(&store->mem, bytes);
    store->table_bytes += bytes;
    if (!store->tables || !store->streams)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t i = 0; i < store->n_streams; i++)
        init_stream(store, i);
    return TQKV_OK;
}

tqkv_status tqkvi_store_create(const tqkv_store_config *config, tqkv_store **out)
{
    tqkv_allocator mem;

    *out = NULL;
    tqkvi_allocator_init(&mem, config->mem);
    tqkv_store *store = tqkvi_alloc_zero(&mem, sizeof(*store));
    if (!store)
        return TQKV_ERR_NO_MEMORY;
    store->mem = mem;
    store->plan = config->plan;
    store->layer = config->layer;
    store->n_cells = config->n_cells;
    store->n_streams = config->n_streams;
    store->n_blocks = tqkvi_div_up(config->n_cells, TQKVI_BLOCK_TOKENS);
    store->n_words = tqkvi_div_up(config->n_cells, 64);
    store->n_young = config->plan->n_tiers - 1;
    store->n_pools = store->n_young ? store->n_young + 1 : 0;
    store->table_bytes = sizeof(*store);

    const tqkv_status status = init_store(store, config);
    if (status != TQKV_OK) {
        tqkvi_store_destroy(store);
        return status;
    }
    *out = store;
    return TQKV_OK;
}

void tqkvi_store_destroy(tqkv_store *store)
{
    if (!store)
        return;
    const tqkv_allocator mem = store->mem;
    tqkvi_free(&mem, store->streams);
    tqkvi_free(&mem, store->tables);
    tqkvi_zero_pages_deinit(&store->pages);
    tqkvi_free(&mem, store->sections);
    tqkvi_codec_destroy(store->codec);
    tqkvi_free(&mem, store);
}

void tqkvi_store_clear_stream(tqkv_store *store, uint32_t index)
{
    tqkvi_stream *stream = &store->streams[index];

    for (uint32_t i = 0; i < store->n_pools; i++)
        tqkvi_slot_pool_clear(&stream->pools[i]);
    for (uint32_t block = 0; block < store->n_blocks; block++)
        stream->old_bases[block] = TQKVI_BASE_NONE;
    memset(stream->is_old, 0, store->n_words * sizeof(uint64_t));
    memset(stream->is_young, 0, store->n_words * sizeof(uint64_t));
    stream->n_old = stream->n_old_touched = 0;
    tqkvi_zero_pages_forget(&store->pages, index * store->stream_bytes, store->stream_bytes);
}

void tqkvi_store_clear(tqkv_store *store)
{
    for (uint32_t i = 0; i < store->n_streams; i++)
        tqkvi_store_clear_stream(store, i);
}

size_t tqkvi_store_bytes(const tqkv_store *store)
{
    size_t bytes = store->table_bytes;

    for (uint32_t i = 0; i < store->n_streams; i++) {
        const tqkvi_stream *stream = &store->streams[i];
        bytes += (size_t)stream->n_old_touched * store->layouts[store->n_young].block_bytes;
        for (uint32_t p = 0; p < store->n_pools; p++)
            bytes += (size_t)stream->pools[p].n_blocks *
                     store->layouts[stream->pools[p].tier].block_bytes;
    }
    return bytes;
}

size_t tqkvi_store_bytes_max(const tqkv_store *store)
{
    return store->table_bytes + store->pages.n_bytes;
}

/*
 * Tokens at positions 0, 1, ... in cells 0, 1, ... written one at a time: the pools see their
 * largest sizes then, so more tokens in a batch never take more. More tokens than cells: the cells
 * are used in turn, as a sliding window does, and every old block has been touched.
 */
size_t tqkvi_store_bytes_at(const tqkv_store *store, size_t n_tokens)
{
    const tqkv_plan_layer *shape = &store->codec->layer->shape;
    const size_t n = n_tokens < store->n_cells ? n_tokens : store->n_cells;
    size_t n_sinks =
        store->plan->n_sinks < TQKVI_SINK_SLOTS ? store->plan->n_sinks : TQKVI_SINK_SLOTS;
    size_t bytes = 0;

    if (store->n_pools == 0)
        n_sinks = 0;
    if (n_sinks > n)
        n_sinks = n;
    bytes +=
        round_up(n_sinks, TQKVI_BLOCK_TOKENS) / TQKVI_BLOCK_TOKENS * store->layouts[0].block_bytes;
    size_t flow = n - n_sinks;
    for (uint32_t i = 0; i < store->n_young; i++) {
        const size_t held = shape->tier_tokens[i];
        /* Beyond the first tier tokens arrive 16 at a time. */
        const size_t most = i == 0 ? held + 15 : (held + 15) / 16 * 16;
        const size_t peak = flow < most ? flow : most;
        bytes +=
            round_up(peak, TQKVI_BLOCK_TOKENS) / TQKVI_BLOCK_TOKENS * store->layouts[i].block_bytes;
        flow = flow >= held + 16 ? (flow - held) / 16 * 16 : 0;
    }
    if (flow > 0) {
        const size_t in_order =
            (n_sinks + flow - 1) / TQKVI_BLOCK_TOKENS - n_sinks / TQKVI_BLOCK_TOKENS + 1;
        const size_t blocks = n_tokens > store->n_cells ? store->n_blocks : in_order;
        bytes += blocks * store->layouts[store->n_young].block_bytes;
    }
    return store->table_bytes + bytes * store->n_streams;
}

void tqkvi_store_get_stats(const tqkv_store *store, tqkv_store_stats *out)
{
    *out = (tqkv_store_stats){.n_written = store->n_written,
                              .n_bad_rows = store->n_bad_rows,
                              .n_reencoded = store->n_reencoded};
    for (uint32_t i = 0; i < store->n_streams; i++) {
        const tqkvi_stream *stream = &store->streams[i];
        out->n_tokens[store->n_young] += stream->n_old;
        for (uint32_t p = 0; p < store->n_pools; p++)
            out->n_tokens[stream->pools[p].tier] += stream->pools[p].n_tokens;
    }
}

int32_t tqkvi_store_base(const tqkv_store *store, int32_t position)
{
    const int32_t base =
        store->has_bases ? tqkvi_frame_base(position, store->plan->frame_tokens) : 0;

    return base == TQKVI_BASE_NONE ? base + 1 : base;
}

static tqkvi_spot old_spot(const tqkv_store *store, const tqkvi_stream *stream, uint32_t index)
{
    const uint32_t block = index / TQKVI_BLOCK_TOKENS;

    return (tqkvi_spot){.block = stream->old +
                                 (size_t)block * store->layouts[store->n_young].block_bytes,
                        .slot = index % TQKVI_BLOCK_TOKENS,
                        .tier = store->n_young,
                        .base = stream->old_bases[block]};
}

static tqkvi_spot young_spot(const tqkv_store *store, const tqkvi_slot_pool *pool, uint32_t slot)
{
    const size_t block_bytes = store->layouts[pool->tier].block_bytes;

    return (tqkvi_spot){.block = pool->blocks + slot / TQKVI_BLOCK_TOKENS * block_bytes,
                        .slot = slot % TQKVI_BLOCK_TOKENS,
                        .tier = pool->tier,
                        .base = pool->bases[slot]};
}

bool tqkvi_store_find(const tqkv_store *store, uint32_t cell, tqkvi_spot *spot, uint32_t *pool)
{
    const tqkvi_stream *stream = tqkvi_store_stream(store, cell);
    const uint32_t index = cell % store->n_cells;
    uint32_t slot;

    *pool = store->n_pools;
    if (tqkvi_bit(stream->is_old, index)) {
        *spot = old_spot(store, stream, index);
        return true;
    }
    if (!tqkvi_bit(stream->is_young, index))
        return false;
    for (uint32_t i = 0; i < store->n_pools; i++) {
        if (tqkvi_slot_pool_find(&stream->pools[i], cell, &slot)) {
            *spot = young_spot(store, &stream->pools[i], slot);
            *pool = i;
            return true;
        }
    }
    return false;
}

void tqkvi_store_remove(tqkv_store *store, uint32_t cell)
{
    tqkvi_stream *stream = tqkvi_store_stream(store, cell);
    const uint32_t index = cell % store->n_cells;
    uint32_t slot;

    if (tqkvi_bit(stream->is_old, index)) {
        tqkvi_bit_clear(stream->is_old, index);
        stream->n_old--;
    }
    if (!tqkvi_bit(stream->is_young, index))
        return;
    tqkvi_bit_clear(stream->is_young, index);
    for (uint32_t i = 0; i < store->n_pools; i++)
        if (tqkvi_slot_pool_find(&stream->pools[i], cell, &slot))
            tqkvi_slot_pool_remove(&stream->pools[i], slot);
}

tqkvi_spot tqkvi_store_add_old(tqkv_store *store, uint32_t cell, int32_t base)
{
    tqkvi_stream *stream = tqkvi_store_stream(store, cell);
    const uint32_t index = cell % store->n_cells;
    const uint32_t block = index / TQKVI_BLOCK_TOKENS;

    if (stream->old_bases[block] == TQKVI_BASE_NONE)
        stream->n_old_touched++;
    if (tqkvi_block_bits(stream->is_old, block) == 0)
        stream->old_bases[block] = base;
    if (!tqkvi_bit(stream->is_old, index))
        stream->n_old++;
    tqkvi_bit_set(stream->is_old, index);
    return old_spot(store, stream, index);
}

tqkvi_spot tqkvi_store_add_young(tqkv_store *store, uint32_t pool, uint32_t cell, int32_t base)
{
    tqkvi_stream *stream = tqkvi_store_stream(store, cell);

    tqkvi_bit_set(stream->is_young, cell % store->n_cells);
    return young_spot(store, &stream->pools[pool],
                      tqkvi_slot_pool_add(&stream->pools[pool], cell, base));
}

static uint8_t *spot_codes(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side,
                           uint32_t g)
{
    return spot->block + store->layouts[spot->tier].section[side][g] + TQKVI_BLOCK_TOKENS;
}

void tqkvi_spot_put_row(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side, uint32_t g,
                        const uint8_t *row)
{
    tqkvi_block_put_row(tqkvi_codec_layout(store->codec, side, g, spot->tier), side,
                        spot_codes(store, spot, side, g), spot->slot, row);
}

void tqkvi_spot_get_row(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side, uint32_t g,
                        uint8_t *row)
{
    tqkvi_block_get_row(tqkvi_codec_layout(store->codec, side, g, spot->tier), side,
                        spot_codes(store, spot, side, g), spot->slot, row);
}
