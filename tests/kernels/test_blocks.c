/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows in blocks, and the kernels that read blocks: every table against ref, outputs between guard
 * bytes.
 *
 *     test_blocks [--seed N] [--bench]      --bench also times these kernels of every table
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "format/block_rows.h"
#include "kernels/kernels.h"
#include "test_arrays.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static uint64_t seed = 20240229;
static const uint8_t widths[] = {0, 1, 2, 3, 4, 5, 6, 8};

/* Widths of a row: all alike, or drawn from all. */
static tqkvi_layout random_layout(test_random *random, uint32_t n_units)
{
    uint8_t bits[TQKV_UNITS_MAX];
    tqkvi_layout layout;
    const bool mixed = test_random_u32(random) % 2;
    const uint32_t first = test_random_u32(random) % (uint32_t)COUNT(widths);
    for (uint32_t u = 0; u < n_units; u++)
        bits[u] = widths[mixed ? test_random_u32(random) % COUNT(widths) : first];
    assert_int_equal(tqkvi_layout_init(&layout, bits, n_units), TQKV_OK);
    return layout;
}

static uint32_t random_units(test_random *random, size_t i)
{
    return i % 50 == 0 ? TQKV_UNITS_MAX : i % 10 == 0 ? 36 : 1 + test_random_u32(random) % 9;
}

/*
 * The codes of a block, any bytes, at any alignment, and nothing behind them: sanitizers see a read
 * past the end.
 */
typedef struct codes {
    uint8_t *memory, *data;
    size_t bytes;
} codes;

static codes random_codes(test_random *random, const tqkvi_layout *layout)
{
    codes c = {.bytes = (size_t)TQKVI_BLOCK_TOKENS * layout->row_bytes};
    const size_t offset = test_random_u32(random) % 64;
    c.memory = malloc(c.bytes + offset + 1);
    assert_non_null(c.memory);
    c.data = c.memory + offset + 1;
    for (size_t i = 0; i < c.bytes; i++)
        c.data[i] = (uint8_t)test_random_u32(random);
    return c;
}

/* ---- rows ---- */

/* What is put into a slot comes out of it; together the slots cover every byte, each once. */
static void check_round_trip(test_random *random, const tqkvi_layout *layout, tqkv_side side)
{
    test_guarded block;
    uint8_t rows[TQKVI_BLOCK_TOKENS][TQKVI_ROW_BYTES_MAX], back[TQKVI_ROW_BYTES_MAX + 1];
    const size_t bytes = (size_t)TQKVI_BLOCK_TOKENS * layout->row_bytes;
    uint32_t sum = 0, want = 0;

    test_guarded_init(&block, bytes, test_random_u32(random) % 64);
    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++) {
        const uint32_t slot = (5 * i + 3) % TQKVI_BLOCK_TOKENS;
        for (uint32_t k = 0; k < layout->row_bytes; k++) {
            rows[slot][k] = (uint8_t)test_random_u32(random);
            want += rows[slot][k];
        }
        tqkvi_block_put_row(layout, side, block.data, slot, rows[slot]);
    }
    for (uint32_t slot = 0; slot < TQKVI_BLOCK_TOKENS; slot++) {
        back[layout->row_bytes] = TEST_GUARD_BYTE;
        tqkvi_block_get_row(layout, side, block.data, slot, back);
        assert_memory_equal(back, rows[slot], layout->row_bytes);
        assert_int_equal(back[layout->row_bytes], TEST_GUARD_BYTE);
    }
    for (size_t i = 0; i < bytes; i++)
        sum += block.data[i];
    assert_int_equal(sum, want);
    test_guarded_deinit(&block);
}

static void test_round_trip(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t i = 0; i < 300; i++) {
        const tqkvi_layout layout = random_layout(&random, random_units(&random, i));
        check_round_trip(&random, &layout, TQKV_SIDE_K);
        check_round_trip(&random, &layout, TQKV_SIDE_V);
    }
    const uint8_t plain[3] = {TQKVI_BITS_PLAIN, TQKVI_BITS_PLAIN, TQKVI_BITS_PLAIN};
    tqkvi_layout layout;
    assert_int_equal(tqkvi_layout_init(&layout, plain, 3), TQKV_OK);
    check_round_trip(&random, &layout, TQKV_SIDE_K);
    check_round_trip(&random, &layout, TQKV_SIDE_V);
}

/* Where docs/FORMAT.md says that bytes of token 6 are. */
static void test_places(void **state)
{
    static const struct place {
        uint8_t bits, row_byte;
        uint32_t k, v;
    } places[] = {
        {1, 1, 6 * 2 + 1, 8 + 1 * 4 + 2},
        {2, 1, 6 * 4 + 1, 16 + 1 * 4 + 2},
        {4, 1, 6 * 4 + 1, 32 + 1 * 4 + 2},
        {4, 7, 64 + 6 * 4 + 3, 32 + 7 * 4 + 2},
        {3, 4 + 1, 64 + 6 * 2 + 1, 64 + 8 + 1 * 4 + 2},
        {8, 8 + 1, 128 + 6 * 4 + 1, 128 + 32 + 1 * 4 + 2},
    };

    (void)state;
    for (size_t i = 0; i < COUNT(places); i++) {
        const struct place *p = &places[i];
        uint8_t row[16] = {0}, block[256] = {0};
        tqkvi_layout layout;
        assert_int_equal(tqkvi_layout_init(&layout, &p->bits, 1), TQKV_OK);
        row[p->row_byte] = 0x5a;
        tqkvi_block_put_row(&layout, TQKV_SIDE_K, block, 6, row);
        assert_int_equal(block[p->k], 0x5a);
        memset(block, 0, sizeof(block));
        tqkvi_block_put_row(&layout, TQKV_SIDE_V, block, 6, row);
        assert_int_equal(block[p->v], 0x5a);
    }
}

/* ---- unpack_block ---- */

static void check_unpack(test_random *random, const tqkvi_layout *layout, tqkv_side side)
{
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;
    const size_t bytes = TQKVI_BLOCK_TOKENS * dim * sizeof(float);
    const codes c = random_codes(random, layout);
    uint8_t row[TQKVI_ROW_BYTES_MAX];
    float *want = test_aligned(bytes);

    for (uint32_t slot = 0; slot < TQKVI_BLOCK_TOKENS; slot++) {
        tqkvi_block_get_row(layout, side, c.data, slot, row);
        all[0]->unpack_rows(layout, row, 1, want + slot * dim);
    }
    for (size_t t = 0; t < n; t++) {
        test_guarded out;
        test_guarded_init(&out, bytes, 0);
        all[t]->unpack_block(layout, side, c.data, test_guarded_floats(&out));
        assert_memory_equal(out.data, want, bytes);
        test_guarded_deinit(&out);
    }
    free(c.memory);
    free(want);
}

static void test_unpack_block(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t i = 0; i < 400; i++) {
        const tqkvi_layout layout = random_layout(&random, random_units(&random, i));
        check_unpack(&random, &layout, TQKV_SIDE_K);
        check_unpack(&random, &layout, TQKV_SIDE_V);
    }
}

/* ---- --bench ---- */

typedef struct bench {
    const tqkvk_table *table;
    tqkvi_layout layout;
    tqkv_side side;
    uint8_t *codes;
    float *out;
} bench;

static void bench_unpack(void *arg)
{
    const bench *b = arg;
    b->table->unpack_block(&b->layout, b->side, b->codes, b->out);
}

static void bench_table(const tqkvk_table *table)
{
    enum { UNITS = 8 };
    test_random random = {seed};
    bench b = {.table = table};
    b.codes = test_aligned(16 * 16 * UNITS);
    b.out = test_aligned(16 * UNITS * 16 * sizeof(float));
    for (size_t i = 0; i < 16 * 16 * UNITS; i++)
        b.codes[i] = (uint8_t)test_random_u32(&random);
    for (size_t w = 1; w <= COUNT(widths); w++) {
        uint8_t bits[UNITS];
        char label[64], name[32];
        for (size_t u = 0; u < UNITS; u++)
            bits[u] = w == COUNT(widths) ? (uint8_t[]){4, 4, 3, 3, 3, 2, 2, 1}[u] : widths[w];
        assert_int_equal(tqkvi_layout_init(&b.layout, bits, UNITS), TQKV_OK);
        snprintf(name, sizeof(name), w == COUNT(widths) ? "44333221 bits" : "%u bits", bits[0]);
        for (int side = 0; side < 2; side++) {
            b.side = (tqkv_side)side;
            snprintf(label, sizeof(label), "%s d=128 unpack_block %c %s", table->name, "KV"[side],
                     name);
            test_time(label, bench_unpack, &b, 1.0);
        }
    }
    free(b.codes);
    free(b.out);
}

int main(int argc, char **argv)
{
    const bool with_bench = test_arguments(argc, argv, &seed);

    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_unpack_block),
    };
    const int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (with_bench) {
        size_t n;
        const tqkvk_table *const *all = tqkvk_all(&n);
        for (size_t t = 0; t < n; t++)
            bench_table(all[t]);
    }
    return n_failed;
}
