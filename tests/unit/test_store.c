/* SPDX-License-Identifier: Apache-2.0 */
/* The store's contract: sizes, errors, failing memory, saving and restoring, counting bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "test_arrays.h"
#include "test_memory.h"
#include "test_store_make.h"

#define HEADS 2
#define K_DIM 32
#define V_DIM 48
#define K_FLOATS ((size_t)HEADS * K_DIM)
#define V_FLOATS ((size_t)HEADS * V_DIM)

static const uint32_t tier_tokens[] = {20, 33, 50};

static tqkv_plan *make_plan(uint32_t n_tiers)
{
    const tqkv_plan_layer shape = test_shape(4, HEADS, K_DIM, V_DIM);
    tqkv_plan *plan;

    if (n_tiers == 0)
        assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_OK);
    else
        assert_int_equal(test_tiered_plan(3, &shape, n_tiers, tier_tokens, 4, 64, &plan), TQKV_OK);
    return plan;
}

static tqkv_store_config make_config(const tqkv_plan *plan, uint32_t n_cells, uint32_t n_streams)
{
    tqkv_store_config config;

    tqkv_store_config_init(&config);
    config.plan = plan;
    config.n_cells = n_cells;
    config.n_streams = n_streams;
    return config;
}

static tqkv_store *make_store(const tqkv_plan *plan, uint32_t n_cells, uint32_t n_streams)
{
    const tqkv_store_config config = make_config(plan, n_cells, n_streams);
    tqkv_store *store;

    assert_int_equal(tqkv_store_create(&config, &store), TQKV_OK);
    return store;
}

/* Rows that depend on the cell alone. */
static void cell_row(int64_t cell, int side, float *row)
{
    test_random random = {.state = (uint64_t)cell * 2 + (uint64_t)side};

    test_fill_normal(&random, 1, row, side == 0 ? K_FLOATS : V_FLOATS);
}

/* Commits n tokens in cells first, first + 1, ... */
static tqkv_status append(tqkv_batch *batch, tqkv_store *store, int64_t first, size_t n,
                          const tqkv_parallel *parallel)
{
    int64_t *cells = malloc(n * sizeof(*cells) + 1);
    float *k = malloc(n * K_FLOATS * sizeof(*k) + 1), *v = malloc(n * V_FLOATS * sizeof(*v) + 1);

    for (size_t i = 0; i < n; i++) {
        cells[i] = first + (int64_t)i;
        cell_row(cells[i], 0, k + i * K_FLOATS);
        cell_row(cells[i], 1, v + i * V_FLOATS);
    }
    tqkv_status status = tqkv_batch_begin(batch, store, cells, NULL, n);
    if (status == TQKV_OK)
        status = tqkv_batch_put(batch, TQKV_SIDE_K, k, K_FLOATS);
    if (status == TQKV_OK)
        status = tqkv_batch_put(batch, TQKV_SIDE_V, v, V_FLOATS);
    if (status == TQKV_OK)
        status = tqkv_batch_commit(batch, parallel);
    free(cells);
    free(k);
    free(v);
    return status;
}

static void assert_same_bytes(const tqkv_store *a, const tqkv_store *b, int64_t n_cells)
{
    for (int side = 0; side < 2; side++) {
        const size_t most = tqkv_store_record_bytes(a, (tqkv_side)side);
        uint8_t *first = malloc(most), *second = malloc(most);
        size_t n_first, n_second;
        for (int64_t cell = 0; cell < n_cells; cell++) {
            assert_int_equal(tqkv_store_export(a, cell, (tqkv_side)side, first, &n_first), TQKV_OK);
            assert_int_equal(tqkv_store_export(b, cell, (tqkv_side)side, second, &n_second),
                             TQKV_OK);
            assert_int_equal(n_first, n_second);
            assert_memory_equal(first, second, n_first);
        }
        free(first);
        free(second);
    }
}

static void test_lengths(void **state)
{
    static const uint32_t lengths[] = {0, 1, 15, 16, 17, 47, 48, 49, 130};

    (void)state;
    for (uint32_t n_tiers = 0; n_tiers <= 4; n_tiers++) {
        for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
            tqkv_plan *plan = make_plan(n_tiers);
            const uint32_t n = lengths[i];
            tqkv_store *at_once = make_store(plan, n + 1, 1), *singly = make_store(plan, n + 1, 1);
            tqkv_batch *batch;
            const tqkv_parallel parallel = test_threads(4);
            assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
            assert_int_equal(append(batch, at_once, 0, n, &parallel), TQKV_OK);
            for (uint32_t t = 0; t < n; t++)
                assert_int_equal(append(batch, singly, t, 1, NULL), TQKV_OK);

            /* The same tiers. Codes may differ: those of the batch were made once. */
            tqkv_store_stats a, b;
            tqkv_store_get_stats(at_once, &a);
            tqkv_store_get_stats(singly, &b);
            assert_memory_equal(a.n_tokens, b.n_tokens, sizeof(a.n_tokens));
            assert_int_equal(a.n_written, n);
            assert_int_equal(tqkv_store_bytes(singly), tqkv_store_bytes_at(singly, n));
            assert_true(tqkv_store_bytes(at_once) <= tqkv_store_bytes_at(at_once, n));
            assert_true(tqkv_store_bytes_at(singly, n) <= tqkv_store_bytes_max(singly));
            /* Beyond its cells they are used in turn: every old block, and no more. */
            assert_true(tqkv_store_bytes_at(singly, n + 2) >= tqkv_store_bytes_at(singly, n + 1));
            assert_int_equal(tqkv_store_bytes_at(singly, n + 2),
                             tqkv_store_bytes_at(singly, SIZE_MAX));
            if (n_tiers <= 1)
                assert_same_bytes(at_once, singly, n + 1);
            tqkv_batch_destroy(batch);
            tqkv_store_destroy(at_once);
            tqkv_store_destroy(singly);
            tqkv_plan_destroy(plan);
        }
    }
}

/* f16 keeps f16 values as they are; the first tier of the test plans is close. */
static void test_rows_come_back(void **state)
{
    (void)state;
    for (uint32_t n_tiers = 0; n_tiers <= 4; n_tiers += 4) {
        tqkv_plan *plan = make_plan(n_tiers);
        tqkv_store *store = make_store(plan, 37, 2);
        tqkv_batch *batch;
        assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
        assert_int_equal(append(batch, store, 50, 14, NULL), TQKV_OK);
        for (int64_t cell = 48; cell < 66; cell++) {
            for (int side = 0; side < 2; side++) {
                const size_t n = side == 0 ? K_FLOATS : V_FLOATS;
                float want[V_FLOATS] = {0}, got[V_FLOATS];
                double error = 0, power = 0;
                if (cell >= 50 && cell < 64)
                    cell_row(cell, side, want);
                assert_int_equal(tqkv_store_read(store, cell, (tqkv_side)side, got), TQKV_OK);
                for (size_t i = 0; i < n; i++) {
                    error += pow((double)got[i] - (double)want[i], 2);
                    power += pow((double)want[i], 2);
                }
                assert_true(error <= (n_tiers == 0 ? 0x1p-22 : 0.004) * power);
            }
        }
        tqkv_batch_destroy(batch);
        tqkv_store_destroy(store);
        tqkv_plan_destroy(plan);
    }
}

static void test_workers_do_not_matter(void **state)
{
    const tqkv_parallel ways[] = {test_threads(1), test_threads(4), test_backwards(3)};
    tqkv_plan *plan = make_plan(4);
    tqkv_store *first = make_store(plan, 300, 1);
    tqkv_batch *batch;

    (void)state;
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    for (int64_t at = 0; at < 300; at += 60)
        assert_int_equal(append(batch, first, at, 60, NULL), TQKV_OK);
    for (size_t w = 0; w < 3; w++) {
        tqkv_store *store = make_store(plan, 300, 1);
        for (int64_t at = 0; at < 300; at += 60)
            assert_int_equal(append(batch, store, at, 60, &ways[w]), TQKV_OK);
        assert_same_bytes(first, store, 300);
        tqkv_store_destroy(store);
    }
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(first);
    tqkv_plan_destroy(plan);
}

/* K of all cells, then V of all, or both of each cell; a clear in between changes nothing. */
static void test_round_trip(void **state)
{
    (void)state;
    for (uint32_t way = 0; way < 3; way++) {
        tqkv_plan *plan = make_plan(4);
        tqkv_store *from = make_store(plan, 211, 1), *to = make_store(plan, 211, 1);
        uint8_t record[4096];
        tqkv_batch *batch;
        assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
        assert_int_equal(append(batch, from, 0, 150, NULL), TQKV_OK);
        for (int64_t cell = 150; cell < 200; cell++)
            assert_int_equal(append(batch, from, cell, 1, NULL), TQKV_OK);
        if (way == 2) {
            assert_int_equal(append(batch, to, 3, 190, NULL), TQKV_OK);
            tqkv_store_clear(to);
        }
        for (int64_t i = 0; i < 400; i++) {
            const int64_t cell = way == 1 ? i / 2 : i % 200;
            const tqkv_side side = (way == 1 ? i % 2 : i / 200) ? TQKV_SIDE_V : TQKV_SIDE_K;
            size_t n_bytes;
            assert_int_equal(tqkv_store_export(from, cell, side, record, &n_bytes), TQKV_OK);
            assert_int_equal(tqkv_store_import(to, cell, side, record, n_bytes), TQKV_OK);
        }
        assert_same_bytes(from, to, 200);
        /* Both go on alike. */
        assert_int_equal(append(batch, to, 200, 11, NULL), TQKV_OK);
        tqkv_batch_destroy(batch);
        tqkv_store_destroy(from);
        tqkv_store_destroy(to);
        tqkv_plan_destroy(plan);
    }
}

/* A base that no position gives, and V before K: the only token of a block still decides. */
static void test_v_before_k(void **state)
{
    const int32_t deltas[] = {-1000003};
    tqkv_plan *plan = make_plan(1);
    tqkv_store *from = make_store(plan, 20, 1), *to = make_store(plan, 20, 1);
    uint8_t record[4096];
    tqkv_batch *batch;
    size_t n_bytes;

    (void)state;
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(append(batch, from, 18, 1, NULL), TQKV_OK);
    assert_int_equal(tqkv_store_shift(from, 18, deltas, 1), TQKV_OK);
    for (int side = 1; side >= 0; side--) {
        assert_int_equal(tqkv_store_export(from, 18, (tqkv_side)side, record, &n_bytes), TQKV_OK);
        assert_int_equal(tqkv_store_import(to, 18, (tqkv_side)side, record, n_bytes), TQKV_OK);
    }
    assert_same_bytes(from, to, 20);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(from);
    tqkv_store_destroy(to);
    tqkv_plan_destroy(plan);
}

/* Full tiers that get more records than they hold push older tokens on and lose none. */
static void test_import_into_full_tiers(void **state)
{
    tqkv_plan *plan = make_plan(4);
    tqkv_store *from = make_store(plan, 40, 1), *to = make_store(plan, 400, 1);
    uint8_t record[4096];
    tqkv_store_stats stats;
    tqkv_batch *batch;
    size_t n_bytes;

    (void)state;
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(append(batch, from, 10, 1, NULL), TQKV_OK);
    for (int64_t cell = 0; cell < 400; cell++) {
        assert_int_equal(tqkv_store_export(from, 10, TQKV_SIDE_K, record, &n_bytes), TQKV_OK);
        assert_int_equal(tqkv_store_import(to, cell, TQKV_SIDE_K, record, n_bytes), TQKV_OK);
        assert_int_equal(tqkv_store_export(from, 10, TQKV_SIDE_V, record, &n_bytes), TQKV_OK);
        assert_int_equal(tqkv_store_import(to, cell, TQKV_SIDE_V, record, n_bytes), TQKV_OK);
    }
    tqkv_store_get_stats(to, &stats);
    assert_int_equal(stats.n_tokens[0] + stats.n_tokens[1] + stats.n_tokens[2] + stats.n_tokens[3],
                     400);
    assert_true(stats.n_tokens[3] > 0);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(from);
    tqkv_store_destroy(to);
    tqkv_plan_destroy(plan);
}

static void test_bad_records(void **state)
{
    tqkv_plan *plan = make_plan(2);
    tqkv_store *store = make_store(plan, 40, 1), *before = make_store(plan, 40, 1);
    uint8_t record[4096];
    tqkv_batch *batch;
    size_t n_bytes;

    (void)state;
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(append(batch, store, 0, 20, NULL), TQKV_OK);
    assert_int_equal(tqkv_store_copy_stream(before, 0, store, 0), TQKV_OK);
    assert_int_equal(tqkv_store_export(store, 7, TQKV_SIDE_K, record, &n_bytes), TQKV_OK);
    for (size_t i = 0; i < n_bytes; i++) {
        record[i] ^= 4;
        assert_int_not_equal(tqkv_store_import(store, 8, TQKV_SIDE_K, record, n_bytes), TQKV_OK);
        record[i] ^= 4;
    }
    assert_int_equal(tqkv_store_import(store, 8, TQKV_SIDE_K, record, n_bytes - 1),
                     TQKV_ERR_CORRUPT);
    assert_int_equal(tqkv_store_import(store, 8, TQKV_SIDE_K, record, 0), TQKV_ERR_CORRUPT);
    assert_int_equal(tqkv_store_import(store, 8, TQKV_SIDE_V, record, n_bytes), TQKV_ERR_MISMATCH);
    assert_int_equal(tqkv_store_import(store, 40, TQKV_SIDE_K, record, n_bytes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_import(store, 8, TQKV_SIDE_K, NULL, n_bytes), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_import(NULL, 8, TQKV_SIDE_K, record, n_bytes),
                     TQKV_ERR_INVALID_ARG);

    /* A base means nothing to a store that does not turn K. */
    const tqkv_rope none = {.style = TQKV_ROPE_NONE};
    tqkv_store_config config = make_config(plan, 40, 1);
    tqkv_store *still;
    config.rope = &none;
    assert_int_equal(tqkv_store_create(&config, &still), TQKV_OK);
    assert_int_equal(append(batch, store, 39, 1, NULL), TQKV_OK);
    const int32_t deltas[1] = {64};
    assert_int_equal(tqkv_store_shift(store, 39, deltas, 1), TQKV_OK);
    assert_int_equal(tqkv_store_export(store, 39, TQKV_SIDE_K, record, &n_bytes), TQKV_OK);
    assert_int_equal(tqkv_store_import(still, 3, TQKV_SIDE_K, record, n_bytes), TQKV_ERR_MISMATCH);
    assert_int_equal(tqkv_store_copy_stream(still, 0, store, 0), TQKV_ERR_MISMATCH);
    assert_int_equal(append(batch, still, 3, 1, NULL), TQKV_OK);
    assert_int_equal(tqkv_store_shift(still, 3, deltas, 1), TQKV_ERR_UNSUPPORTED);
    assert_int_equal(tqkv_store_shift(still, 4, deltas, 1), TQKV_OK); /* nothing is there */
    assert_same_bytes(store, before, 39);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(still);
    tqkv_store_destroy(store);
    tqkv_store_destroy(before);
    tqkv_plan_destroy(plan);
}

static void test_create_errors(void **state)
{
    tqkv_plan *plan = make_plan(2);
    tqkv_store *store = (tqkv_store *)1;
    tqkv_store_config config;

    (void)state;
    assert_int_equal(tqkv_store_create(NULL, &store), TQKV_ERR_INVALID_ARG);
    assert_null(store);
#define REFUSED(change)                                                             \
    do {                                                                            \
        config = make_config(plan, 10, 1);                                          \
        change;                                                                     \
        assert_int_equal(tqkv_store_create(&config, &store), TQKV_ERR_INVALID_ARG); \
        assert_null(store);                                                         \
    } while (0)
    REFUSED(config.struct_bytes = 1);
    REFUSED(config.plan = NULL);
    REFUSED(config.layer = 1);
    REFUSED(config.n_cells = 0);
    REFUSED(config.n_streams = 0);
    REFUSED((config.n_cells = 1u << 31, config.n_streams = 4));
    const tqkv_allocator half = {.user = NULL};
    REFUSED(config.mem = &half);
    const float inv_freq[32] = {1};
    const tqkv_rope wide = {.style = TQKV_ROPE_PAIRS, .n_rot = K_DIM + 2, .inv_freq = inv_freq};
    REFUSED(config.rope = &wide);
    const tqkv_rope missing = {.style = TQKV_ROPE_PAIRS, .n_rot = K_DIM};
    REFUSED(config.rope = &missing);
    config = make_config(plan, 10, 1);
    assert_int_equal(tqkv_store_create(&config, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_create(NULL, NULL), TQKV_ERR_INVALID_ARG);
    tqkv_batch *batch = (tqkv_batch *)1;
    assert_int_equal(tqkv_batch_create(&half, &batch), TQKV_ERR_INVALID_ARG);
    assert_null(batch);
    tqkv_store_destroy(NULL);
    tqkv_batch_destroy(NULL);
    tqkv_store_clear(NULL);
    tqkv_store_config_init(NULL);
    tqkv_attend_args_init(NULL);
    tqkv_store_get_stats(NULL, NULL);
    assert_int_equal(
        tqkv_store_bytes(NULL) + tqkv_store_bytes_at(NULL, 1) + tqkv_store_bytes_max(NULL), 0);
    assert_int_equal(tqkv_store_record_bytes(NULL, TQKV_SIDE_K), 0);
    tqkv_plan_destroy(plan);
}

static void test_batch_errors(void **state)
{
    tqkv_plan *plan = make_plan(2);
    tqkv_store *store = make_store(plan, 40, 1);
    const int64_t twice[] = {3, 4, 3}, outside[] = {40}, negative[] = {-1}, good[] = {5};
    float row[V_FLOATS] = {1};
    tqkv_batch *batch;

    (void)state;
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(tqkv_batch_begin(NULL, store, good, NULL, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, NULL, good, NULL, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, store, NULL, NULL, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, store, good, NULL, 41), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, store, twice, NULL, 3), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, store, outside, NULL, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, store, negative, NULL, 1), TQKV_ERR_INVALID_ARG);
    /* After a failure the batch is closed. */
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_K, row, K_FLOATS), TQKV_ERR_INVALID_ARG);
    assert_null(tqkv_batch_rows(batch, TQKV_SIDE_K));
    assert_int_equal(tqkv_batch_commit(batch, NULL), TQKV_OK);
    assert_int_equal(tqkv_batch_commit(NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_begin(batch, store, twice, NULL, 2), TQKV_OK);
    assert_int_equal(tqkv_batch_put(batch, (tqkv_side)2, row, K_FLOATS), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_K, NULL, K_FLOATS), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_K, row, K_FLOATS - 1), TQKV_ERR_INVALID_ARG);
    /* Nothing was put: nothing is written, and the cells may be used again. */
    assert_int_equal(tqkv_batch_commit(batch, NULL), TQKV_OK);
    tqkv_store_stats stats;
    tqkv_store_get_stats(store, &stats);
    assert_int_equal(stats.n_written, 0);
    /* An open batch is committed by the next begin. */
    assert_int_equal(tqkv_batch_begin(batch, store, good, NULL, 1), TQKV_OK);
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_K, row, K_FLOATS), TQKV_OK);
    tqkv_batch_rows(batch, TQKV_SIDE_K)[1] = NAN; /* by an observer */
    assert_int_equal(tqkv_batch_begin(batch, store, good, NULL, 0), TQKV_OK);
    row[3] = INFINITY;
    assert_int_equal(tqkv_batch_begin(batch, store, good, NULL, 1), TQKV_OK);
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_V, row, V_FLOATS), TQKV_OK);
    assert_int_equal(tqkv_batch_commit(batch, NULL), TQKV_OK);
    tqkv_store_get_stats(store, &stats);
    assert_int_equal(stats.n_written, 2);
    assert_int_equal(stats.n_bad_rows, 2);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(store);
    tqkv_plan_destroy(plan);
}

static void test_cell_errors(void **state)
{
    tqkv_plan *plan = make_plan(2), *other_plan = make_plan(3);
    tqkv_store *store = make_store(plan, 40, 2), *other = make_store(other_plan, 40, 2);
    tqkv_store *smaller = make_store(plan, 39, 2);
    float row[V_FLOATS] = {0};
    uint8_t record[4096];
    size_t n_bytes = 1;
    int32_t deltas[81] = {0};
    tqkv_batch *batch;

    (void)state;
    assert_int_equal(tqkv_store_read(NULL, 0, TQKV_SIDE_K, row), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_read(store, 80, TQKV_SIDE_K, row), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_read(store, -1, TQKV_SIDE_K, row), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_read(store, 0, (tqkv_side)7, row), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_read(store, 0, TQKV_SIDE_K, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_write(store, 0, TQKV_SIDE_K, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_write(store, 80, TQKV_SIDE_K, NULL, row), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_export(store, 0, TQKV_SIDE_K, NULL, &n_bytes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(n_bytes, 0);
    assert_int_equal(tqkv_store_export(store, 0, TQKV_SIDE_K, record, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_shift(store, 0, NULL, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_shift(store, 0, deltas, 81), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_shift(store, 80, deltas, 1), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_shift(store, 0, NULL, 0), TQKV_OK);
    assert_int_equal(tqkv_store_copy_stream(store, 2, store, 0), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_copy_stream(store, 0, NULL, 0), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_store_copy_stream(store, 0, other, 0), TQKV_ERR_MISMATCH);
    assert_int_equal(tqkv_store_copy_stream(store, 0, smaller, 0), TQKV_ERR_MISMATCH);
    /* A base that would not fit in 32 bits, and nothing changed. */
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(append(batch, store, 0, 40, NULL), TQKV_OK);
    deltas[0] = INT32_MAX - 10;
    assert_int_equal(tqkv_store_shift(store, 39, deltas, 1), TQKV_OK);
    assert_int_equal(tqkv_store_shift(store, 39, deltas, 1), TQKV_ERR_INVALID_ARG);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(store);
    tqkv_store_destroy(other);
    tqkv_store_destroy(smaller);
    tqkv_plan_destroy(plan);
    tqkv_plan_destroy(other_plan);
}

/* A uniform shift of whole blocks and young tokens changes no code, and back again no byte. */
static void test_shift_is_exact(void **state)
{
    tqkv_plan *plan = make_plan(3);
    tqkv_store *store = make_store(plan, 160, 1), *before = make_store(plan, 160, 1);
    int32_t there[160], back[160];
    tqkv_batch *batch;

    (void)state;
    for (int i = 0; i < 160; i++)
        back[i] = -(there[i] = -37);
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(append(batch, store, 0, 160, NULL), TQKV_OK);
    assert_int_equal(tqkv_store_copy_stream(before, 0, store, 0), TQKV_OK);
    assert_int_equal(tqkv_store_shift(store, 0, there, 160), TQKV_OK);
    assert_int_equal(tqkv_store_shift(store, 0, back, 160), TQKV_OK);
    assert_same_bytes(store, before, 160);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(store);
    tqkv_store_destroy(before);
    tqkv_plan_destroy(plan);
}

/* Many tokens in the first positions: 64 become sinks, and they stay in the first tier. */
static void test_sinks(void **state)
{
    tqkv_plan *plan = make_plan(3);
    tqkv_store *store = make_store(plan, 400, 1);
    int64_t cells[100];
    int32_t positions[100];
    float k[100 * K_FLOATS], v[100 * V_FLOATS];
    test_random random = {.state = 1};
    tqkv_store_stats stats;
    tqkv_batch *batch;

    (void)state;
    for (int i = 0; i < 100; i++) {
        cells[i] = i;
        positions[i] = i % 4;
    }
    test_fill_normal(&random, 1, k, 100 * K_FLOATS);
    test_fill_normal(&random, 1, v, 100 * V_FLOATS);
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    assert_int_equal(tqkv_batch_begin(batch, store, cells, positions, 100), TQKV_OK);
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_K, k, K_FLOATS), TQKV_OK);
    assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_V, v, V_FLOATS), TQKV_OK);
    assert_int_equal(tqkv_batch_commit(batch, NULL), TQKV_OK);
    assert_int_equal(append(batch, store, 100, 300, NULL), TQKV_OK);
    tqkv_store_get_stats(store, &stats);
    assert_true(stats.n_tokens[0] >= 64 + 20 && stats.n_tokens[0] <= 64 + 35);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(store);
    tqkv_plan_destroy(plan);
}

/* Attention of as many queries as tokens were staged; what comes out is not looked at. */
static void attend(tqkv_store *store, const tqkv_batch *batch, uint32_t n_q,
                   const tqkv_parallel *parallel)
{
    const size_t n_workers = parallel ? parallel->n_workers : 1;
    const size_t q_floats = (size_t)n_q * 4 * K_DIM, out_floats = (size_t)n_q * 4 * V_DIM;
    tqkv_attend_args args;
    test_random random = {.state = 5};

    tqkv_attend_args_init(&args);
    float *q = test_random_floats(&random, q_floats, 1);
    float *out = test_aligned(out_floats * sizeof(*out));
    args.n_q = n_q;
    args.n_cells = 150;
    args.q = q;
    args.out = out;
    args.q_head_stride = K_DIM;
    args.out_head_stride = V_DIM;
    args.q_token_stride = (size_t)4 * K_DIM;
    args.out_token_stride = (size_t)4 * V_DIM;
    args.causal = 1;
    args.scratch = test_aligned(tqkv_store_scratch_bytes(store, n_q, n_workers));
    assert_int_equal(tqkv_store_attend(store, batch, &args, parallel), TQKV_OK);
    free(args.scratch);
    free(q);
    free(out);
}

typedef enum early_way { EARLY_NOT, EARLY_ONCE, EARLY_THEN_PUT, EARLY_THEN_CHANGED } early_way;

/* Tokens whose frames do not follow their cells, some of which overflow behind the transform. */
static void write_early(tqkv_batch *batch, tqkv_store *store, early_way way, size_t n,
                        const tqkv_parallel *parallel)
{
    for (size_t first = 0; first + n <= 150; first += n) {
        int64_t cells[20];
        int32_t positions[20];
        float k[20 * K_FLOATS], v[20 * V_FLOATS];
        for (size_t i = 0; i < n; i++) {
            cells[i] = (int64_t)(first + i) * 7 % 150;
            positions[i] = (int32_t)(first + i) * 5;
            cell_row(cells[i], 0, k + i * K_FLOATS);
            cell_row(cells[i], 1, v + i * V_FLOATS);
            for (size_t d = 0; cells[i] % 11 == 0 && d < V_DIM; d++)
                v[i * V_FLOATS + d] = d % 2 ? 3e38f : -3e38f;
        }
        assert_int_equal(tqkv_batch_begin(batch, store, cells, positions, n), TQKV_OK);
        assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_K, k, K_FLOATS), TQKV_OK);
        if (way != EARLY_THEN_PUT)
            assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_V, v, V_FLOATS), TQKV_OK);
        if (way == EARLY_THEN_CHANGED)
            tqkv_batch_rows(batch, TQKV_SIDE_K)[0] += 9;
        for (int i = 0; i < 2 && way != EARLY_NOT; i++)
            attend(store, batch, (uint32_t)n, parallel);
        if (way == EARLY_THEN_PUT)
            assert_int_equal(tqkv_batch_put(batch, TQKV_SIDE_V, v, V_FLOATS), TQKV_OK);
        if (way == EARLY_THEN_CHANGED)
            tqkv_batch_rows(batch, TQKV_SIDE_K)[0] = k[0];
        assert_int_equal(tqkv_batch_commit(batch, parallel), TQKV_OK);
    }
}

/* Few tokens are encoded while attention runs: the same bytes and counters as without attention. */
static void test_early_encoding(void **state)
{
    static const size_t sizes[] = {1, 3, 16, 17};
    const tqkv_parallel ways[] = {test_threads(1), test_threads(4), test_backwards(3)};
    tqkv_batch *batch;

    (void)state;
    assert_int_equal(tqkv_batch_create(NULL, &batch), TQKV_OK);
    for (uint32_t i = 0; i < 5 * 4 * 3 * 3; i++) {
        tqkv_plan *plan = make_plan(i % 5);
        tqkv_store *late = make_store(plan, 150, 1), *early = make_store(plan, 150, 1);
        const size_t n = sizes[i / 5 % 4];
        const early_way way = (early_way)(EARLY_ONCE + i / 20 % 3);
        tqkv_store_stats a, b;
        write_early(batch, late, EARLY_NOT, n, NULL);
        write_early(batch, early, way, n, &ways[i / 60]);
        assert_same_bytes(late, early, 150);
        tqkv_store_get_stats(late, &a);
        tqkv_store_get_stats(early, &b);
        assert_memory_equal(&a, &b, sizeof(a));
        assert_true(i % 5 == 0 || a.n_bad_rows > 0);
        tqkv_store_destroy(late);
        tqkv_store_destroy(early);
        tqkv_plan_destroy(plan);
    }
    tqkv_batch_destroy(batch);
}

static tqkv_status use_all(const tqkv_plan *plan, const tqkv_allocator *mem)
{
    tqkv_store_config config = make_config(plan, 50, 2);
    tqkv_store *store;
    tqkv_batch *batch = NULL;

    config.mem = mem;
    tqkv_status status = tqkv_store_create(&config, &store);
    if (status == TQKV_OK)
        status = tqkv_batch_create(mem, &batch);
    for (size_t n = 1; n <= 50 && status == TQKV_OK; n += 13)
        status = append(batch, store, (int64_t)(50 - n), n, NULL);
    if (status == TQKV_OK) {
        float row[V_FLOATS];
        status = tqkv_store_copy_stream(store, 1, store, 0);
        tqkv_store_clear(store);
        assert_int_equal(tqkv_store_read(store, 60, TQKV_SIDE_V, row), TQKV_OK);
        for (size_t i = 0; i < V_FLOATS; i++)
            assert_true(row[i] == 0);
    }
    /* A batch whose memory failed is closed, empty, and of use again for what it still holds. */
    if (status != TQKV_OK && batch)
        assert_int_equal(tqkv_batch_begin(batch, store, NULL, NULL, 0) == TQKV_OK ||
                             tqkv_batch_commit(batch, NULL) == TQKV_OK,
                         1);
    tqkv_batch_destroy(batch);
    tqkv_store_destroy(store);
    return status;
}

static void test_failing_memory(void **state)
{
    (void)state;
    for (uint32_t n_tiers = 0; n_tiers <= 3; n_tiers++) {
        tqkv_plan *plan = make_plan(n_tiers);
        size_t step = 1;
        for (;; step++) {
            test_memory memory = {.fail_call = step};
            const tqkv_allocator mem = test_memory_allocator(&memory);
            const tqkv_status status = use_all(plan, &mem);
            assert_int_equal(memory.n_live, 0);
            if (status == TQKV_OK)
                break;
            assert_int_equal(status, TQKV_ERR_NO_MEMORY);
        }
        assert_true(step > 8);
        tqkv_plan_destroy(plan);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_rows_come_back),
        cmocka_unit_test(test_workers_do_not_matter),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_v_before_k),
        cmocka_unit_test(test_import_into_full_tiers),
        cmocka_unit_test(test_bad_records),
        cmocka_unit_test(test_create_errors),
        cmocka_unit_test(test_batch_errors),
        cmocka_unit_test(test_cell_errors),
        cmocka_unit_test(test_shift_is_exact),
        cmocka_unit_test(test_sinks),
        cmocka_unit_test(test_early_encoding),
        cmocka_unit_test(test_failing_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
