/* SPDX-License-Identifier: Apache-2.0 */
/* Batches. A batch is lent to one store at a time and keeps its arrays between stores (rule 4). */
#include "cache/token_batch.h"

#include <string.h>

#include "cache/placing.h"
#include "cache/row_jobs.h"

tqkv_status tqkvi_batch_create(const tqkv_allocator *mem, tqkv_batch **out)
{
    tqkv_allocator allocator;

    *out = NULL;
    tqkvi_allocator_init(&allocator, mem);
    tqkv_batch *batch = tqkvi_alloc_zero(&allocator, sizeof(*batch));
    if (!batch)
        return TQKV_ERR_NO_MEMORY;
    batch->mem = allocator;
    *out = batch;
    return TQKV_OK;
}

void tqkvi_batch_destroy(tqkv_batch *batch)
{
    if (!batch)
        return;
    const tqkv_allocator mem = batch->mem;
    tqkvi_free(&mem, batch->cells);
    tqkvi_free(&mem, batch->positions);
    tqkvi_free(&mem, batch->spots);
    tqkvi_free(&mem, batch->rows[TQKV_SIDE_K]);
    tqkvi_free(&mem, batch->rows[TQKV_SIDE_V]);
    tqkvi_free(&mem, batch->staged);
    tqkvi_free(&mem, batch->early);
    tqkvi_free(&mem, batch);
}

/* A zeroed array of n elements instead of *array, which is lost even on failure. */
static tqkv_status renew(const tqkv_batch *batch, void **array, size_t n, size_t element_bytes)
{
    size_t bytes;

    tqkvi_free(&batch->mem, *array);
    *array = NULL;
    TQKV_TRY(tqkvi_size_mul(n, element_bytes, &bytes));
    *array = tqkvi_alloc_zero(&batch->mem, bytes);
    return *array ? TQKV_OK : TQKV_ERR_NO_MEMORY;
}

static tqkv_status reserve_tokens(tqkv_batch *batch, size_t n)
{
    void *cells = batch->cells, *positions = batch->positions, *spots = batch->spots;
    tqkv_status status;

    if (n <= batch->n_max)
        return TQKV_OK;
    batch->n_max = 0;
    status = renew(batch, &cells, n, sizeof(*batch->cells));
    batch->cells = cells;
    if (status == TQKV_OK)
        status = renew(batch, &positions, n, sizeof(*batch->positions));
    batch->positions = positions;
    if (status == TQKV_OK)
        status = renew(batch, &spots, n, sizeof(*batch->spots));
    batch->spots = spots;
    if (status == TQKV_OK)
        batch->n_max = n;
    return status;
}

static tqkv_status reserve_rows(tqkv_batch *batch, tqkv_side side, const tqkv_plan_layer *shape,
                                size_t n)
{
    void *rows = batch->rows[side];
    size_t n_floats;

    TQKV_TRY(
        tqkvi_size_mul(n, (size_t)shape->n_kv_heads * tqkvi_shape_dim(shape, side), &n_floats));
    if (n_floats <= batch->floats_max[side])
        return TQKV_OK;
    batch->floats_max[side] = 0;
    const tqkv_status status = renew(batch, &rows, n_floats, sizeof(float));
    batch->rows[side] = rows;
    if (status == TQKV_OK)
        batch->floats_max[side] = n_floats;
    return status;
}

static tqkv_status reserve_staged(tqkv_batch *batch, const tqkv_store *store)
{
    const size_t n_words = (size_t)store->n_words * store->n_streams;
    void *staged = batch->staged;

    if (n_words <= batch->words_max)
        return TQKV_OK;
    batch->words_max = 0;
    const tqkv_status status = renew(batch, &staged, n_words, sizeof(uint64_t));
    batch->staged = staged;
    if (status == TQKV_OK)
        batch->words_max = n_words;
    return status;
}

static tqkv_status reserve_early(tqkv_batch *batch, const tqkv_store *store, size_t n)
{
    const size_t bytes = store->layouts[0].block_bytes;
    void *early = batch->early;

    if (n > TQKVI_EARLY_TOKENS || bytes <= batch->early_max)
        return TQKV_OK;
    batch->early_max = 0;
    const tqkv_status status = renew(batch, &early, bytes, 1);
    batch->early = early;
    if (status == TQKV_OK)
        batch->early_max = bytes;
    return status;
}

static uint64_t *staged_of(const tqkv_batch *batch, const tqkv_store *store, uint32_t cell)
{
    return batch->staged + (size_t)(cell / store->n_cells) * store->n_words;
}

static void close_batch(tqkv_batch *batch)
{
    for (size_t i = 0; i < batch->n; i++)
        tqkvi_bit_clear(staged_of(batch, batch->store, batch->cells[i]),
                        batch->cells[i] % batch->store->n_cells);
    batch->n = 0;
    batch->store = NULL;
}

tqkv_status tqkvi_batch_begin(tqkv_batch *batch, tqkv_store *store, const int64_t *cells,
                              const int32_t *positions, size_t n)
{
    const tqkv_plan_layer *shape = &store->codec->layer->shape;
    const int64_t n_cells = (int64_t)store->n_cells * store->n_streams;

    TQKV_TRY(reserve_tokens(batch, n));
    TQKV_TRY(reserve_rows(batch, TQKV_SIDE_K, shape, n));
    TQKV_TRY(reserve_rows(batch, TQKV_SIDE_V, shape, n));
    TQKV_TRY(reserve_staged(batch, store));
    TQKV_TRY(reserve_early(batch, store, n));
    batch->store = store;
    batch->is_encoded = false;
    batch->has_side[TQKV_SIDE_K] = batch->has_side[TQKV_SIDE_V] = false;
    for (size_t i = 0; i < n; i++) {
        const uint32_t cell = (uint32_t)cells[i];
        if (cells[i] < 0 || cells[i] >= n_cells ||
            tqkvi_bit(staged_of(batch, store, cell), cell % store->n_cells)) {
            close_batch(batch);
            return TQKV_ERR_INVALID_ARG;
        }
        batch->cells[i] = cell;
        batch->positions[i] = positions ? positions[i] : (int32_t)(cell % store->n_cells);
        tqkvi_bit_set(staged_of(batch, store, cell), cell % store->n_cells);
        batch->n = i + 1;
    }
    return TQKV_OK;
}

void tqkvi_batch_put(tqkv_batch *batch, tqkv_side side, const float *rows, size_t row_stride)
{
    tqkv_store *store = batch->store;
    const size_t dim = tqkvi_shape_dim(&store->codec->layer->shape, side);
    const size_t n_heads = store->codec->n_kv_heads;
    float *to = batch->rows[side];

    batch->is_encoded = false;
    for (size_t i = 0; i < batch->n; i++) {
        for (size_t g = 0; g < n_heads; g++, to += dim) {
            const float *from = rows + i * row_stride + g * dim;
            if (store->codec->kernels->largest_bits(from, dim) < TQKVK_BITS_INFINITE) {
                memcpy(to, from, dim * sizeof(*to));
            } else {
                memset(to, 0, dim * sizeof(*to));
                store->n_bad_rows++;
            }
        }
    }
    batch->has_side[side] = true;
}

void tqkvi_batch_complete(tqkv_batch *batch)
{
    const tqkv_store *store = batch->store;

    for (int side = 0; side < 2; side++) {
        const size_t floats = (size_t)store->codec->n_kv_heads *
                              tqkvi_shape_dim(&store->codec->layer->shape, (tqkv_side)side);
        for (size_t i = 0; i < batch->n && !batch->has_side[side]; i++) {
            float *row = batch->rows[side] + i * floats;
            tqkvi_spot spot;
            uint32_t pool;
            if (tqkvi_store_find(store, batch->cells[i], &spot, &pool))
                tqkvi_decode_rows(store, &spot, (tqkv_side)side, row);
            else
                memset(row, 0, floats * sizeof(*row));
        }
        batch->has_side[side] = true;
    }
}

size_t tqkvi_batch_encode_begin(tqkv_batch *batch)
{
    if (batch->is_encoded || batch->n > TQKVI_EARLY_TOKENS)
        return 0;
    for (size_t i = 0; i < batch->n; i++)
        batch->spots[i] =
            (tqkvi_spot){.base = tqkvi_store_base(batch->store, batch->positions[i])};
    tqkvi_encode_begin(&batch->job, batch->store, batch->rows[TQKV_SIDE_K],
                       batch->rows[TQKV_SIDE_V], batch->spots, batch->n, batch->early);
    batch->is_encoded = true;
    return tqkvi_encode_tasks(&batch->job);
}

void tqkvi_batch_encode_task(void *user, size_t i, size_t worker)
{
    tqkv_batch *batch = user;

    tqkvi_encode_task(&batch->job, i, worker);
}

/* Whether the tokens went where their rows in `early` can go as they are. */
static bool went_as_encoded(const tqkv_batch *batch)
{
    bool same = batch->is_encoded;

    for (size_t i = 0; i < batch->n && same; i++)
        same = batch->spots[i].tier == 0 &&
               batch->spots[i].base == tqkvi_store_base(batch->store, batch->positions[i]);
    return same;
}

/* Places the tokens of one stream; their spots are known afterwards. */
static void place_stream(tqkv_batch *batch, uint32_t stream, const tqkv_parallel *parallel)
{
    tqkv_store *store = batch->store;
    tqkvi_outflow flow;
    size_t n_new = 0, i_new = 0;

    /* Older copies go first: they neither age nor take a sink's slot. */
    for (size_t i = 0; i < batch->n; i++)
        if (batch->cells[i] / store->n_cells == stream)
            tqkvi_store_remove(store, batch->cells[i]);
    for (size_t i = 0; i < batch->n; i++) {
        if (batch->cells[i] / store->n_cells != stream)
            continue;
        batch->spots[i].block = NULL;
        if (tqkvi_takes_sink(store, stream, batch->positions[i]))
            batch->spots[i] = tqkvi_store_add_young(store, store->n_young, batch->cells[i],
                                                    tqkvi_store_base(store, batch->positions[i]));
        else
            n_new++;
    }
    tqkvi_make_way(store, stream, n_new, &flow, parallel);
    for (size_t i = 0; i < batch->n; i++)
        if (batch->cells[i] / store->n_cells == stream && !batch->spots[i].block)
            batch->spots[i] = tqkvi_place_new(store, &flow, i_new++, batch->cells[i],
                                              tqkvi_store_base(store, batch->positions[i]));
}

void tqkvi_batch_commit(tqkv_batch *batch, const tqkv_parallel *parallel)
{
    tqkv_store *store = batch->store;

    if (tqkvi_batch_is_live(batch)) {
        tqkvi_batch_complete(batch);
        uint32_t first = UINT32_MAX, last = 0;
        for (size_t i = 0; i < batch->n; i++) {
            const uint32_t stream = batch->cells[i] / store->n_cells;
            first = stream < first ? stream : first;
            last = stream > last ? stream : last;
        }
        for (uint32_t stream = first; stream <= last; stream++)
            place_stream(batch, stream, parallel);
        if (went_as_encoded(batch)) {
            tqkvi_encode_place(&batch->job);
            store->n_bad_rows += atomic_load(&batch->job.n_bad);
        } else {
            tqkvi_encode_rows(store, batch->rows[TQKV_SIDE_K], batch->rows[TQKV_SIDE_V],
                              batch->spots, batch->n, parallel);
        }
        store->n_written += batch->n;
    }
    close_batch(batch);
}
