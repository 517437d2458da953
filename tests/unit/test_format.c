/* SPDX-License-Identifier: Apache-2.0 */
/* format: sizes of rows, and exported records with every field damaged in turn. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/sha256.h"
#include "format/record.h"
#include "test_plan_make.h"

static void rows_take_two_bytes_per_bit_and_unit(void **unused)
{
    (void)unused;
    const uint8_t bits[] = {0, 1, 2, 3, 4, 5, 6, 8};
    uint8_t plain[TQKV_UNITS_MAX];
    tqkvi_layout layout;
    assert_int_equal(tqkvi_layout_init(&layout, bits, 8), TQKV_OK);
    assert_int_equal(layout.row_bytes, 58);
    assert_int_equal(layout.n_units, 8);
    assert_memory_equal(layout.bits, bits, 8);

    memset(plain, TQKVI_BITS_PLAIN, sizeof(plain));
    assert_int_equal(tqkvi_layout_init(&layout, plain, TQKV_UNITS_MAX), TQKV_OK);
    assert_int_equal(layout.row_bytes, 2 * 16 * TQKV_UNITS_MAX);
}

static void widths_that_do_not_exist_are_refused(void **unused)
{
    (void)unused;
    uint8_t bits[TQKV_UNITS_MAX + 1] = {8, 8, 8};
    tqkvi_layout layout;
    assert_int_equal(tqkvi_layout_init(&layout, bits, 0), TQKV_ERR_CORRUPT);
    assert_int_equal(tqkvi_layout_init(&layout, bits, TQKV_UNITS_MAX + 1), TQKV_ERR_CORRUPT);
    for (int i = 0; i < 256; i++) {
        const int good = i <= 6 || i == 8;
        bits[2] = (uint8_t)i;
        assert_int_equal(tqkvi_layout_init(&layout, bits, 3), good ? TQKV_OK : TQKV_ERR_CORRUPT);
        if (!good)
            assert_int_equal(layout.n_units, 0);
    }
    bits[0] = TQKVI_BITS_PLAIN;
    bits[2] = TQKVI_BITS_PLAIN;
    assert_int_equal(tqkvi_layout_init(&layout, bits, 3), TQKV_ERR_CORRUPT);
}

typedef struct fixture {
    tqkv_plan *plan, *other;
    uint8_t *record;
    size_t n_bytes;
    tqkvi_record what;
} fixture;

static int set_up(void **state)
{
    static fixture f;
    const tqkv_plan_layer shapes[2] = {test_shape(4, 2, 32, 48), test_shape(4, 2, 32, 48)};
    if (test_plan_make(NULL, 1, shapes, 2, 3, &f.plan) != TQKV_OK ||
        test_plan_make(NULL, 2, shapes, 2, 3, &f.other) != TQKV_OK)
        return -1;
    f.what = (tqkvi_record){.layer = 1, .side = TQKV_SIDE_K, .tier = 2, .base = -256};
    f.n_bytes = tqkvi_record_bytes(f.plan, 1, TQKV_SIDE_K, 2);
    f.record = malloc(f.n_bytes + 1);
    if (!f.record)
        return -1;
    tqkvi_record_begin(f.plan, &f.what, f.record);
    for (size_t i = TQKVI_RECORD_HEADER_BYTES; i < f.n_bytes; i++)
        f.record[i] = (uint8_t)(i * 7 + 1);
    tqkvi_record_end(f.plan, &f.what, f.record);
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    fixture *f = *state;
    tqkvi_plan_destroy(f->plan);
    tqkvi_plan_destroy(f->other);
    free(f->record);
    return 0;
}

static tqkv_status unpack(const fixture *f, const uint8_t *bytes, size_t n_bytes)
{
    tqkvi_record found;
    return tqkvi_record_unpack(f->plan, f->what.layer, f->what.side, bytes, n_bytes, &found);
}

static void a_record_says_where_it_comes_from(void **state)
{
    const fixture *f = *state;
    const tqkvi_head_plan *heads = f->plan->layers[1].heads[0];
    tqkvi_record found;
    assert_int_equal(tqkvi_record_unpack(f->plan, 1, TQKV_SIDE_K, f->record, f->n_bytes, &found),
                     TQKV_OK);
    assert_int_equal(found.layer, 1);
    assert_int_equal(found.side, TQKV_SIDE_K);
    assert_int_equal(found.tier, 2);
    assert_int_equal(found.base, -256);
    assert_int_equal(tqkvi_record_head(f->plan, &found, 0), TQKVI_RECORD_HEADER_BYTES);
    assert_int_equal(tqkvi_record_head(f->plan, &found, 1),
                     TQKVI_RECORD_HEADER_BYTES + 1 + heads[0].layout[2].row_bytes);
    assert_int_equal(f->n_bytes, TQKVI_RECORD_HEADER_BYTES + 2 + heads[0].layout[2].row_bytes +
                                     heads[1].layout[2].row_bytes + TQKVI_RECORD_CHECK_BYTES);
    assert_int_equal((f->record[0] | f->record[1] << 8) & 0x7c00, 0x7c00); /* a NaN as f16 */
    assert_true((f->record[0] | f->record[1] << 8) & 0x03ff);
    size_t largest = 0;
    for (uint32_t tier = 0; tier < 3; tier++) {
        const size_t n = tqkvi_record_bytes(f->plan, 1, TQKV_SIDE_K, tier);
        largest = n > largest ? n : largest;
    }
    assert_int_equal(tqkvi_record_bytes_max(f->plan, 1, TQKV_SIDE_K), largest);
}

static void every_flipped_bit_is_found(void **state)
{
    const fixture *f = *state;
    for (size_t i = 0; i < f->n_bytes * 8; i++) {
        f->record[i / 8] ^= (uint8_t)(1 << i % 8);
        tqkvi_record found = {.tier = 9};
        const tqkv_status status =
            tqkvi_record_unpack(f->plan, 1, TQKV_SIDE_K, f->record, f->n_bytes, &found);
        f->record[i / 8] ^= (uint8_t)(1 << i % 8);
        assert_int_equal(status, i / 8 == 4 ? TQKV_ERR_VERSION : TQKV_ERR_CORRUPT);
        assert_int_equal(found.tier, 0);
    }
    assert_int_equal(unpack(f, f->record, f->n_bytes), TQKV_OK);
}

static void every_other_length_is_refused(void **state)
{
    const fixture *f = *state;
    for (size_t n = 0; n <= f->n_bytes + 1; n++) {
        if (n != f->n_bytes)
            assert_int_equal(unpack(f, f->record, n), TQKV_ERR_CORRUPT);
    }
}

/* Writes one byte and makes the check right again. */
static tqkv_status unpack_with(const fixture *f, size_t at, uint8_t value)
{
    uint8_t *copy = malloc(f->n_bytes);
    assert_non_null(copy);
    memcpy(copy, f->record, f->n_bytes);
    copy[at] = value;
    tqkvi_record_end(f->plan, &f->what, copy);
    const tqkv_status status = unpack(f, copy, f->n_bytes);
    free(copy);
    return status;
}

static void records_of_others_do_not_fit(void **state)
{
    const fixture *f = *state;
    tqkvi_record found;
    assert_int_equal(tqkvi_record_unpack(f->other, 1, TQKV_SIDE_K, f->record, f->n_bytes, &found),
                     TQKV_ERR_MISMATCH);
    assert_int_equal(tqkvi_record_unpack(f->plan, 0, TQKV_SIDE_K, f->record, f->n_bytes, &found),
                     TQKV_ERR_MISMATCH);
    assert_int_equal(tqkvi_record_unpack(f->plan, 1, TQKV_SIDE_V, f->record, f->n_bytes, &found),
                     TQKV_ERR_MISMATCH);
    assert_int_equal(unpack_with(f, 5, 1), TQKV_ERR_MISMATCH); /* side */
    assert_int_equal(unpack_with(f, 5, 2), TQKV_ERR_MISMATCH);
    assert_int_equal(unpack_with(f, 10, 0), TQKV_ERR_MISMATCH); /* layer */
    assert_int_equal(unpack_with(f, 23, (uint8_t)(f->record[23] + 1)),
                     TQKV_ERR_MISMATCH); /* fingerprint */
}

static void fields_that_contradict_each_other_are_refused(void **state)
{
    const fixture *f = *state;
    assert_int_equal(unpack_with(f, 6, 2), TQKV_OK);
    assert_int_equal(unpack_with(f, 6, 0), TQKV_ERR_CORRUPT); /* tier of another length */
    assert_int_equal(unpack_with(f, 6, 3), TQKV_ERR_CORRUPT);
    assert_int_equal(unpack_with(f, 7, 1), TQKV_ERR_CORRUPT);
    assert_int_equal(unpack_with(f, 8, 1), TQKV_ERR_CORRUPT);
    assert_int_equal(unpack_with(f, 24, (uint8_t)(f->record[24] + 1)), TQKV_ERR_CORRUPT);
    assert_int_equal(unpack_with(f, 27, 1), TQKV_ERR_CORRUPT);
    assert_int_equal(unpack_with(f, 15, 0), TQKV_OK); /* any base will do for K */
}

static void values_have_no_base(void **state)
{
    const fixture *f = *state;
    tqkvi_record what = {.layer = 0, .side = TQKV_SIDE_V, .tier = 0, .base = 0}, found;
    const size_t n = tqkvi_record_bytes(f->plan, 0, TQKV_SIDE_V, 0);
    uint8_t *bytes = calloc(n, 1);
    assert_non_null(bytes);
    tqkvi_record_begin(f->plan, &what, bytes);
    tqkvi_record_end(f->plan, &what, bytes);
    assert_int_equal(tqkvi_record_unpack(f->plan, 0, TQKV_SIDE_V, bytes, n, &found), TQKV_OK);
    what.base = 1;
    tqkvi_record_begin(f->plan, &what, bytes);
    tqkvi_record_end(f->plan, &what, bytes);
    assert_int_equal(tqkvi_record_unpack(f->plan, 0, TQKV_SIDE_V, bytes, n, &found),
                     TQKV_ERR_CORRUPT);
    free(bytes);
}

static void plain_rows_hold_numbers(void **unused)
{
    (void)unused;
    const tqkv_plan_layer shape = test_shape(2, 1, 16, 16);
    tqkv_plan *plan;
    assert_int_equal(tqkvi_plan_create_builtin(NULL, TQKV_BUILTIN_F16, &shape, &plan), TQKV_OK);
    const tqkvi_record what = {.layer = 0, .side = TQKV_SIDE_K, .tier = 0, .base = 0};
    const size_t n = tqkvi_record_bytes(plan, 0, TQKV_SIDE_K, 0);
    uint8_t bytes[128] = {0};
    tqkvi_record found;
    assert_true(n <= sizeof(bytes));
    tqkvi_record_begin(plan, &what, bytes);
    tqkvi_record_end(plan, &what, bytes);
    assert_int_equal(tqkvi_record_unpack(plan, 0, TQKV_SIDE_K, bytes, n, &found), TQKV_OK);
    for (uint32_t i = 0; i < 16; i++) {
        uint8_t *value = bytes + tqkvi_record_head(plan, &what, 0) + 1 + 2 * i;
        value[1] = i % 2 ? 0x7c : 0xfe;
        tqkvi_record_end(plan, &what, bytes);
        assert_int_equal(tqkvi_record_unpack(plan, 0, TQKV_SIDE_K, bytes, n, &found),
                         TQKV_ERR_CORRUPT);
        value[1] = 0x7b;
    }
    tqkvi_plan_destroy(plan);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_take_two_bytes_per_bit_and_unit),
        cmocka_unit_test(widths_that_do_not_exist_are_refused),
        cmocka_unit_test(a_record_says_where_it_comes_from),
        cmocka_unit_test(every_flipped_bit_is_found),
        cmocka_unit_test(every_other_length_is_refused),
        cmocka_unit_test(records_of_others_do_not_fit),
        cmocka_unit_test(fields_that_contradict_each_other_are_refused),
        cmocka_unit_test(values_have_no_base),
        cmocka_unit_test(plain_rows_hold_numbers),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
