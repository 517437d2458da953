/* SPDX-License-Identifier: Apache-2.0 */
/* store.h: checks arguments, then calls the cache; attention reads the cache through spans. */
#include <math.h>
#include <string.h>

#include "api/checks.h"
#include "api/codec_view.h"
#include "base/parallel.h"
#include "cache/restore.h"
#include "cache/token_batch.h"
#include "format/record.h"

#define CELLS_MAX INT32_MAX /* of all streams: cell numbers are kept in 32 bits */
#define SPANS_MAX (TQKV_TIERS_MAX + 2)

void tqkv_store_config_init(tqkv_store_config *config)
{
    if (config)
        *config = (tqkv_store_config){.struct_bytes = sizeof(*config), .n_streams = 1};
}

tqkv_status tqkv_store_create(const tqkv_store_config *config, tqkv_store **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!config || config->struct_bytes != sizeof(*config) || !tqkvi_is_allocator(config->mem) ||
        !tqkvi_is_cached_layer(config->plan, config->layer))
        return TQKV_ERR_INVALID_ARG;
    if (config->n_cells == 0 || config->n_streams == 0)
        return TQKV_ERR_INVALID_ARG;
    if ((uint64_t)config->n_cells * config->n_streams > CELLS_MAX)
        return TQKV_ERR_INVALID_ARG;
    if (!tqkvi_is_rope(config->rope, config->plan->layers[config->layer].shape.k_dim))
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_store_create(config, out);
}

void tqkv_store_destroy(tqkv_store *store)
{
    tqkvi_store_destroy(store);
}

size_t tqkv_store_bytes_at(const tqkv_store *store, size_t n_tokens)
{
    return store ? tqkvi_store_bytes_at(store, n_tokens) : 0;
}

size_t tqkv_store_bytes(const tqkv_store *store)
{
    return store ? tqkvi_store_bytes(store) : 0;
}

size_t tqkv_store_bytes_max(const tqkv_store *store)
{
    return store ? tqkvi_store_bytes_max(store) : 0;
}

tqkv_status tqkv_batch_create(const tqkv_allocator *mem, tqkv_batch **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    if (!tqkvi_is_allocator(mem))
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_batch_create(mem, out);
}

void tqkv_batch_destroy(tqkv_batch *batch)
{
    tqkvi_batch_destroy(batch);
}

tqkv_status tqkv_batch_begin(tqkv_batch *batch, tqkv_store *store, const int64_t *cells,
                             const int32_t *positions, size_t n)
{
    if (!batch)
        return TQKV_ERR_INVALID_ARG;
    if (batch->store)
        tqkvi_batch_commit(batch, NULL);
    if (!store || (!cells && n > 0) || n > (uint64_t)store->n_cells * store->n_streams)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_batch_begin(batch, store, cells, positions, n);
}

static bool is_side(tqkv_side side)
{
    return side == TQKV_SIDE_K || side == TQKV_SIDE_V;
}

static size_t row_floats(const tqkv_store *store, tqkv_side side)
{
    return (size_t)store->codec->n_kv_heads * tqkvi_shape_dim(&store->codec->layer->shape, side);
}

tqkv_status tqkv_batch_put(tqkv_batch *batch, tqkv_side side, const float *rows, size_t row_stride)
{
    if (!batch || !batch->store || !is_side(side) || (!rows && batch->n > 0))
        return TQKV_ERR_INVALID_ARG;
    if (batch->n > 1 && row_stride < row_floats(batch->store, side))
        return TQKV_ERR_INVALID_ARG;
    tqkvi_batch_put(batch, side, rows, row_stride);
    return TQKV_OK;
}

float *tqkv_batch_rows(tqkv_batch *batch, tqkv_side side)
{
    if (!batch || !batch->store || !is_side(side) || !batch->has_side[side])
        return NULL;
    batch->is_encoded = false; /* whoever reads rows may change them */
    return batch->rows[side];
}

tqkv_status tqkv_batch_commit(tqkv_batch *batch, const tqkv_parallel *parallel)
{
    if (!batch || !tqkvi_is_parallel(parallel))
        return TQKV_ERR_INVALID_ARG;
    if (batch->store)
        tqkvi_batch_commit(batch, parallel);
    return TQKV_OK;
}

void tqkv_attend_args_init(tqkv_attend_args *args)
{
    if (args)
        *args = (tqkv_attend_args){.struct_bytes = sizeof(*args), .scale = 1};
}

size_t tqkv_store_scratch_bytes(const tqkv_store *store, uint32_t n_q, size_t n_workers)
{
    size_t bytes;

    if (!store)
        return 0;
    bytes = tqkvi_attention_scratch_bytes(&store->codec->layer->shape, n_q, n_workers);
    return bytes > SIZE_MAX - tqkvi_view_bytes(store->codec)
               ? SIZE_MAX
               : bytes + tqkvi_view_bytes(store->codec);
}

/* The old store, the pools, the batch, whose raw rows come last. Returns their number. */
static size_t fill_spans(const tqkv_store *store, const tqkv_batch *batch,
                         const tqkv_attend_args *args, tqkvi_span *spans)
{
    const tqkvi_stream *stream = &store->streams[args->stream];
    const uint32_t first_cell = args->stream * store->n_cells;
    const uint64_t *staged = batch ? batch->staged + (size_t)args->stream * store->n_words : NULL;
    size_t n = 0;

    if (stream->n_old_touched > 0 || args->mask)
        spans[n++] = (tqkvi_span){.n_tokens = store->n_cells,
                                  .tier = store->n_young,
                                  .layout = &store->layouts[store->n_young],
                                  .blocks = stream->old,
                                  .block_bases = stream->old_bases,
                                  .hidden = {store->n_pools ? stream->is_young : NULL, staged},
                                  .only = args->mask ? NULL : stream->is_old};
    for (uint32_t i = 0; i < store->n_pools; i++) {
        const tqkvi_slot_pool *pool = &stream->pools[i];
        if (pool->n_tokens > 0)
            spans[n++] = (tqkvi_span){.n_tokens = pool->n_blocks * TQKVI_BLOCK_TOKENS,
                                      .tier = pool->tier,
                                      .layout = &store->layouts[pool->tier],
                                      .blocks = pool->blocks,
                                      .slot_bases = pool->bases,
                                      .cells = pool->cells,
                                      .first_cell = first_cell,
                                      .hidden = {staged, NULL}};
    }
    if (batch)
        spans[n++] = (tqkvi_span){.n_tokens = (uint32_t)batch->n,
                                  .rows = {batch->rows[TQKV_SIDE_K], batch->rows[TQKV_SIDE_V]},
                                  .cells = batch->cells,
                                  .first_cell = first_cell};
    return n;
}

/* Fills rows that nobody has seen yet; few rows are encoded while attention runs. */
static tqkvi_beside prepare_batch(tqkv_batch *batch)
{
    tqkvi_batch_complete(batch);
    return (tqkvi_beside){.n_tasks = tqkvi_batch_encode_begin(batch),
                          .fn = tqkvi_batch_encode_task,
                          .user = batch};
}

static bool are_attend_args(const tqkv_store *store, const tqkv_attend_args *args)
{
    if (args->struct_bytes != sizeof(*args) || args->stream >= store->n_streams ||
        args->n_cells > store->n_cells)
        return false;
    if (args->n_q == 0)
        return true;
    if (!args->q || !args->out || !args->scratch || (uintptr_t)args->scratch % TQKV_ALIGN != 0)
        return false;
    if ((args->q_latent != NULL) != store->codec->layer->shape.is_latent)
        return false;
    if (args->mask && args->n_q > 1 && args->mask_row_stride < args->n_cells)
        return false;
    if ((uint64_t)args->n_q * store->codec->layer->shape.n_heads > UINT32_MAX)
        return false;
    return isfinite(args->scale) && isfinite(args->softcap) && args->softcap >= 0;
}

tqkv_status tqkv_store_attend(tqkv_store *store, const tqkv_batch *batch,
                              const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    if (!store || !args || !tqkvi_is_parallel(parallel) || !are_attend_args(store, args))
        return TQKV_ERR_INVALID_ARG;
    if (batch && batch->store != store)
        return TQKV_ERR_INVALID_ARG;
    if (args->n_q == 0)
        return TQKV_OK;
    if (batch && !tqkvi_batch_is_live(batch))
        batch = NULL;
    tqkvi_beside beside = {.n_tasks = 0};
    if (batch)
        beside = prepare_batch((tqkv_batch *)(uintptr_t)batch);

    const tqkv_codec *codec = store->codec;
    tqkvi_attn_head *heads = args->scratch;
    tqkv_attend_args inner = *args;
    tqkvi_span spans[SPANS_MAX];
    inner.scratch = (uint8_t *)args->scratch + tqkvi_view_bytes(store->codec);
    tqkvi_view_heads(codec, heads);
    const tqkvi_attention attention = {.kernels = codec->kernels,
                                       .layer = codec->layer,
                                       .heads = {heads, heads + codec->n_kv_heads},
                                       .turn = store->has_bases ? tqkvi_view_turn : NULL,
                                       .turn_user = codec,
                                       .frame_blocks =
                                           codec->plan->frame_tokens / TQKVI_BLOCK_TOKENS,
                                       .spans = spans,
                                       .n_spans = fill_spans(store, batch, &inner, spans),
                                       .args = &inner,
                                       .beside = beside};
    tqkvi_attend(&attention, parallel);
    return TQKV_OK;
}

static bool is_cell(const tqkv_store *store, int64_t cell)
{
    return store && cell >= 0 && cell < (int64_t)store->n_cells * store->n_streams;
}

tqkv_status tqkv_store_read(const tqkv_store *store, int64_t cell, tqkv_side side, float *row)
{
    if (!is_cell(store, cell) || !is_side(side) || !row)
        return TQKV_ERR_INVALID_ARG;
    tqkvi_store_read(store, (uint32_t)cell, side, row);
    return TQKV_OK;
}

tqkv_status tqkv_store_write(tqkv_store *store, int64_t cell, tqkv_side side,
                             const int32_t *position, const float *row)
{
    if (!is_cell(store, cell) || !is_side(side) || !row)
        return TQKV_ERR_INVALID_ARG;
    const int32_t own = (int32_t)(cell % store->n_cells);
    tqkvi_store_write(store, (uint32_t)cell, side, position ? *position : own, row);
    return TQKV_OK;
}

size_t tqkv_store_record_bytes(const tqkv_store *store, tqkv_side side)
{
    return store && is_side(side) ? tqkvi_record_bytes_max(store->plan, store->layer, side) : 0;
}

tqkv_status tqkv_store_export(const tqkv_store *store, int64_t cell, tqkv_side side,
                              uint8_t *record, size_t *n_bytes)
{
    if (n_bytes)
        *n_bytes = 0;
    if (!is_cell(store, cell) || !is_side(side) || !record || !n_bytes)
        return TQKV_ERR_INVALID_ARG;
    *n_bytes = tqkvi_store_export(store, (uint32_t)cell, side, record);
    return TQKV_OK;
}

tqkv_status tqkv_store_import(tqkv_store *store, int64_t cell, tqkv_side side,
                              const uint8_t *record, size_t n_bytes)
{
    if (!is_cell(store, cell) || !is_side(side) || !record)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_store_import(store, (uint32_t)cell, side, record, n_bytes);
}

tqkv_status tqkv_store_shift(tqkv_store *store, int64_t first, const int32_t *deltas, size_t n)
{
    if (!store || (n > 0 && (!deltas || !is_cell(store, first))))
        return TQKV_ERR_INVALID_ARG;
    if (n == 0)
        return TQKV_OK;
    if (n > (uint64_t)store->n_cells * store->n_streams - (uint64_t)first)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_store_shift(store, (uint32_t)first, deltas, (uint32_t)n);
}

tqkv_status tqkv_store_copy_stream(tqkv_store *dst, uint32_t dst_stream, const tqkv_store *src,
                                   uint32_t src_stream)
{
    if (!dst || !src || dst_stream >= dst->n_streams || src_stream >= src->n_streams)
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_store_copy_stream(dst, dst_stream, src, src_stream);
}

void tqkv_store_clear(tqkv_store *store)
{
    if (store)
        tqkvi_store_clear(store);
}

void tqkv_store_get_stats(const tqkv_store *store, tqkv_store_stats *out)
{
    if (!out)
        return;
    *out = (tqkv_store_stats){.n_written = 0};
    if (store)
        tqkvi_store_get_stats(store, out);
}
