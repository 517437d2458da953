/* SPDX-License-Identifier: Apache-2.0 */
/* The plan file as bytes: what is written comes back, what is damaged is refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "format/plan_file.h"
#include "test_memory.h"
#include "test_plan_make.h"

#define ALLOC_STEPS_MAX 200

static char logged[1024];

static void keep_text(void *user, tqkv_log_level level, const char *text)
{
    (void)user;
    (void)level;
    (void)snprintf(logged, sizeof(logged), "%s", text);
}

static const tqkv_logger logger = {.user = NULL, .write = keep_text};

/*
 * The file of a small plan, and where its parts begin. Names are "a model é", "arch", "5x"; one
 * RoPE table of 8 frequencies; layer 0 has 1 KV head, layer 1 no cache, layer 2 is latent.
 */
typedef struct file {
    tqkv_plan *plan;
    uint8_t *bytes;
    size_t n_bytes;
    size_t names, rope, layouts, layers, heads;
} file;

static int set_up(void **state)
{
    static file f;
    tqkv_plan_layer shapes[3] = {
        test_shape(2, 1, 16, 32), {.n_kv_heads = 0}, test_shape(2, 1, 16, 32)};
    shapes[2].is_latent = 1;
    if (test_plan_make(NULL, 7, shapes, 3, 2, &f.plan) != TQKV_OK ||
        tqkvi_plan_serialise(f.plan, &f.bytes, &f.n_bytes) != TQKV_OK)
        return -1;
    f.names = TQKVI_PLAN_HEADER_BYTES;
    f.rope = f.names + 2 + 10 + 2 + 4 + 2 + 2;
    f.layouts = f.rope + 8 + 8 * 4;
    f.layers = f.layouts;
    for (uint32_t i = 0; i < tqkvi_load_u32(f.bytes + 80); i++)
        f.layers += 2 + (size_t)tqkvi_load_u16(f.bytes + f.layers);
    f.heads = f.layers + 2 * (24 + 8) + 4;
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    file *f = *state;
    tqkvi_free(&f->plan->mem, f->bytes);
    tqkvi_plan_destroy(f->plan);
    return 0;
}

static uint8_t *copy_of(const file *f, size_t n_bytes)
{
    uint8_t *copy = calloc(n_bytes > 0 ? n_bytes : 1, 1);
    assert_non_null(copy);
    memcpy(copy, f->bytes, n_bytes < f->n_bytes ? n_bytes : f->n_bytes);
    return copy;
}

/* Makes length and fingerprint right, so that the fields behind them are looked at. */
static void repair(uint8_t *bytes, size_t n_bytes)
{
    tqkvi_store_u64(bytes + TQKVI_PLAN_LENGTH_AT, n_bytes);
    tqkvi_plan_fingerprint(bytes, n_bytes, bytes + TQKVI_PLAN_FINGERPRINT_AT);
}

static void check_same_head(const tqkvi_head_plan *a, const tqkvi_head_plan *b, uint32_t dim,
                            uint32_t n_tiers)
{
    for (uint32_t tier = 0; tier < n_tiers; tier++) {
        assert_int_equal(a->layout[tier].row_bytes, b->layout[tier].row_bytes);
        assert_memory_equal(a->layout[tier].bits, b->layout[tier].bits, dim / 16);
    }
    assert_memory_equal(a->mean, b->mean, dim * sizeof(float));
    assert_memory_equal(a->transform, b->transform, (size_t)dim * dim * sizeof(float));
    assert_memory_equal(a->weight, b->weight, dim / 16 * sizeof(float));
}

static void what_is_written_comes_back(void **state)
{
    const file *f = *state;
    tqkv_plan *plan;
    uint8_t *again;
    size_t n_again;
    assert_int_equal(tqkv_plan_read(f->bytes, f->n_bytes, &logger, &plan), TQKV_OK);
    assert_string_equal(plan->model, f->plan->model);
    assert_string_equal(plan->arch, f->plan->arch);
    assert_string_equal(plan->profile, f->plan->profile);
    assert_int_equal(plan->n_sinks, f->plan->n_sinks);
    assert_int_equal(plan->frame_tokens, f->plan->frame_tokens);
    assert_int_equal(plan->context, f->plan->context);
    assert_true(plan->bits_total == f->plan->bits_total);
    assert_memory_equal(plan->fingerprint, f->plan->fingerprint, sizeof(plan->fingerprint));
    for (uint32_t i = 0; i < 3; i++) {
        const tqkvi_layer_plan *a = &plan->layers[i], *b = &f->plan->layers[i];
        assert_int_equal(a->shape.n_heads, b->shape.n_heads);
        assert_int_equal(a->shape.is_latent, i == 2);
        assert_int_equal(a->shape.v_dim, b->shape.v_dim);
        assert_int_equal(a->shape.rope.style, b->shape.rope.style);
        assert_memory_equal(a->shape.tier_tokens, b->shape.tier_tokens,
                            sizeof(a->shape.tier_tokens));
        assert_memory_equal(a->shape.token_bytes, b->shape.token_bytes,
                            sizeof(a->shape.token_bytes));
        for (uint32_t k = 0; k < a->shape.rope.n_rot / 2; k++)
            assert_true(a->inv_freq[k] == b->inv_freq[k]);
        for (uint32_t g = 0; g < a->shape.n_kv_heads; g++) {
            check_same_head(&a->heads[0][g], &b->heads[0][g], 16, 2);
            check_same_head(&a->heads[1][g], &b->heads[1][g], 32, 2);
        }
    }
    assert_int_equal(tqkvi_plan_serialise(plan, &again, &n_again), TQKV_OK);
    assert_int_equal(n_again, f->n_bytes);
    assert_memory_equal(again, f->bytes, n_again);
    tqkvi_free(&plan->mem, again);
    tqkv_plan_destroy(plan);
}

static void builtin_plans_come_back(void **unused)
{
    (void)unused;
    tqkv_plan_layer shape = test_shape(9, 3, 48, 80);
    for (int kind = 0; kind < 4; kind++) {
        tqkv_plan *plan, *again;
        uint8_t *bytes;
        size_t n_bytes;
        shape.rope.style = kind < 2 ? TQKV_ROPE_PAIRS : TQKV_ROPE_NONE;
        assert_int_equal(tqkv_plan_builtin((tqkv_builtin)(kind % 2), &shape, &plan), TQKV_OK);
        assert_int_equal(tqkvi_plan_serialise(plan, &bytes, &n_bytes), TQKV_OK);
        assert_int_equal(tqkv_plan_read(bytes, n_bytes, &logger, &again), TQKV_OK);
        assert_memory_equal(plan->fingerprint, again->fingerprint, sizeof(plan->fingerprint));
        assert_true((again->layers[0].heads[0][2].transform == NULL) == (kind % 2 == 0));
        assert_int_equal(again->layers[0].shape.rope.n_rot, kind < 2 ? 48 : 0);
        tqkvi_free(&plan->mem, bytes);
        tqkv_plan_destroy(plan);
        tqkv_plan_destroy(again);
    }
}

static void arguments_are_checked(void **state)
{
    const file *f = *state;
    tqkv_plan *plan = (tqkv_plan *)1;
    assert_int_equal(tqkv_plan_read(NULL, 10, NULL, &plan), TQKV_ERR_INVALID_ARG);
    assert_null(plan);
    assert_int_equal(tqkv_plan_read(f->bytes, f->n_bytes, NULL, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_read(f->bytes, 0, NULL, &plan), TQKV_ERR_CORRUPT);
}

static void every_flipped_byte_is_found(void **state)
{
    const file *f = *state;
    uint8_t *copy = copy_of(f, f->n_bytes);
    for (size_t i = 0; i < f->n_bytes; i++) {
        tqkv_plan *plan = (tqkv_plan *)1;
        copy[i] ^= (uint8_t)(1 << i % 8);
        const tqkv_status status = tqkv_plan_read(copy, f->n_bytes, &logger, &plan);
        copy[i] ^= (uint8_t)(1 << i % 8);
        assert_int_equal(status, i >= 8 && i < 12 ? TQKV_ERR_VERSION : TQKV_ERR_CORRUPT);
        assert_null(plan);
    }
    free(copy);
}

/* With a right fingerprint: refused, or a plan that is written as the same bytes. */
static void damage_behind_a_right_fingerprint_is_harmless(void **state)
{
    const file *f = *state;
    size_t n_good = 0;
    for (size_t i = TQKVI_PLAN_HEADER_BYTES - 40; i < f->n_bytes; i++) {
        static const uint8_t masks[] = {0x01, 0x80, 0xff};
        for (size_t k = 0; k < sizeof(masks); k++) {
            uint8_t *copy = copy_of(f, f->n_bytes);
            tqkv_plan *plan;
            copy[i] ^= masks[k];
            repair(copy, f->n_bytes);
            if (tqkv_plan_read(copy, f->n_bytes, &logger, &plan) == TQKV_OK) {
                uint8_t *again;
                size_t n_again;
                assert_int_equal(tqkvi_plan_serialise(plan, &again, &n_again), TQKV_OK);
                assert_int_equal(n_again, f->n_bytes);
                assert_memory_equal(again, copy, n_again);
                tqkvi_free(&plan->mem, again);
                tqkv_plan_destroy(plan);
                n_good++;
            }
            free(copy);
        }
    }
    assert_true(n_good > 0);
}

static void every_truncation_is_found(void **state)
{
    const file *f = *state;
    for (size_t n = 0; n < f->n_bytes; n++) {
        uint8_t *copy = copy_of(f, n);
        tqkv_plan *plan = NULL;
        assert_int_equal(tqkv_plan_read(copy, n, &logger, &plan), TQKV_ERR_CORRUPT);
        if (n >= TQKVI_PLAN_HEADER_BYTES) {
            repair(copy, n);
            assert_int_equal(tqkv_plan_read(copy, n, &logger, &plan), TQKV_ERR_CORRUPT);
        }
        assert_null(plan);
        free(copy);
    }
}

/* Puts `n` bytes of `value` at `at`; the text must have the field and where it is. */
static void refuses(const file *f, size_t at, size_t n, uint32_t value, const char *field,
                    size_t where)
{
    uint8_t *copy = copy_of(f, f->n_bytes);
    char text[128];
    tqkv_plan *plan = NULL;
    for (size_t i = 0; i < n; i++)
        copy[at + i] = (uint8_t)(value >> 8 * i);
    repair(copy, f->n_bytes);
    logged[0] = '\0';
    if (tqkv_plan_read(copy, f->n_bytes, &logger, &plan) != TQKV_ERR_CORRUPT)
        fail_msg("%s: %u at byte %zu was not refused", field, value, at);
    (void)snprintf(text, sizeof(text), "%s at byte %zu: ", field, where);
    if (!strstr(logged, text) || !strstr(logged, "calibrate again"))
        fail_msg("\"%s\" is not in \"%s\"", text, logged);
    assert_int_equal(tqkv_plan_read(copy, f->n_bytes, NULL, &plan), TQKV_ERR_CORRUPT);
    free(copy);
}

static void numbers_of_the_header_are_checked(void **state)
{
    const file *f = *state;
    refuses(f, 12, 4, 1, "header", 12);
    refuses(f, 84, 4, 1, "header", 84);
    refuses(f, 56, 4, 0, "header", 56);
    refuses(f, 56, 4, TQKVI_LAYERS_MAX + 1, "header", 56);
    refuses(f, 56, 4, 3000, "n_layers", 56);
    refuses(f, 60, 4, 0, "header", 56);
    refuses(f, 60, 4, 5, "header", 56);
    refuses(f, 64, 4, 0x10001, "header", 56);
    refuses(f, 68, 4, 0, "header", 56);
    refuses(f, 72, 4, 0, "header", 56);
    refuses(f, 76, 4, 4, "n_ropes", 76);
    refuses(f, 80, 4, 0x7fffffff, "n_layouts", 80);
    refuses(f, 94, 2, 0x7ff0, "header", 56);
    refuses(f, 94, 2, 0xbff0, "header", 56);
}

static void names_are_checked(void **state)
{
    const file *f = *state;
    refuses(f, f->names, 2, 0xffff, "model", f->names + 2);
    refuses(f, f->names, 2, 1025, "model", f->names);
    refuses(f, f->names + 3, 1, 0x0a, "model", f->names);
    refuses(f, f->names + 14, 1, 0x80, "arch", f->names + 12);
    refuses(f, f->rope - 2, 1, 0, "profile", f->rope - 4);
}

static void catalogues_are_checked(void **state)
{
    const file *f = *state;
    refuses(f, f->rope, 4, 3, "rope", f->rope);
    refuses(f, f->rope, 4, 0, "rope", f->rope);
    refuses(f, f->rope + 4, 4, 15, "rope", f->rope);
    refuses(f, f->rope + 4, 4, 1026, "rope", f->rope);
    refuses(f, f->rope + 8, 4, 0x7fc00000, "rope", f->rope);
    refuses(f, f->rope + 8, 4, 0xc0800001, "rope", f->rope);
    refuses(f, f->layouts, 2, 0, "layout", f->layouts);
    refuses(f, f->layouts, 2, 65, "layout", f->layouts);
    refuses(f, f->layouts, 2, 0xffff, "layout", f->layouts + 2);
    refuses(f, f->layouts + 2, 1, 7, "layout", f->layouts);
    /* The first layout is the smallest: with 16 it would come after the second. */
    refuses(f, f->layouts + 2, 1, 16, "layout", f->layouts + 3);
}

static void shapes_are_checked(void **state)
{
    const file *f = *state;
    refuses(f, f->layers, 4, 3, "layer", f->layers);
    refuses(f, f->layers + 4, 4, 4097, "layer", f->layers);
    refuses(f, f->layers + 8, 4, 17, "layer", f->layers);
    refuses(f, f->layers + 8, 4, 0, "layer", f->layers);
    refuses(f, f->layers + 12, 4, 1040, "layer", f->layers);
    refuses(f, f->layers + 20, 4, 1, "layer", f->layers);
    refuses(f, f->layers + 24, 4, 0x80000000, "layer", f->layers);
    refuses(f, f->layers + 28, 4, 64, "layer", f->layers);
    refuses(f, f->layers + 32, 4, 2, "layer", f->layers + 32); /* a cache where there was none */
}

static void heads_are_checked(void **state)
{
    const file *f = *state;
    const size_t mean = f->heads + 8, weight = mean + 16 * 4, exponents = weight + 4,
                 values = exponents + 16;
    refuses(f, f->heads, 4, 1000, "head layout", f->heads);
    refuses(f, mean + 4, 4, 0x7f800000, "head", f->heads);
    refuses(f, weight, 4, 0xbf800000, "head", f->heads);
    refuses(f, weight, 4, 0x7fc00000, "head", f->heads);
    refuses(f, exponents + 3, 1, 113, "transform exponent", exponents + 3);
    refuses(f, exponents + 3, 1, 155, "transform exponent", exponents + 3); /* -101 */
    refuses(f, values + 2 * 37, 2, 0x7bff, "transform exponent",
            exponents + 5); /* would be one higher */
    refuses(f, values + 2 * 37, 2, 0x7c00, "transform", values + 2 * 37);
    refuses(f, values + 2 * 37, 2, 0xfe00, "transform", values + 2 * 37);
}

static void entries_that_nobody_uses_are_refused(void **state)
{
    const file *f = *state;
    const uint32_t first = tqkvi_load_u32(f->bytes + f->heads),
                   second = tqkvi_load_u32(f->bytes + f->heads + 4);
    assert_int_not_equal(first, second);
    refuses(f, f->heads + 4, 4, first, "layout", f->n_bytes);
}

static void bytes_after_the_end_are_refused(void **state)
{
    const file *f = *state;
    uint8_t *copy = copy_of(f, f->n_bytes + 1);
    tqkv_plan *plan;
    assert_int_equal(tqkv_plan_read(copy, f->n_bytes + 1, &logger, &plan), TQKV_ERR_CORRUPT);
    assert_non_null(strstr(logged, "length at byte 16"));
    repair(copy, f->n_bytes + 1);
    assert_int_equal(tqkv_plan_read(copy, f->n_bytes + 1, &logger, &plan), TQKV_ERR_CORRUPT);
    assert_non_null(strstr(logged, "end at byte"));
    free(copy);
}

static void other_files_are_named(void **state)
{
    const file *f = *state;
    uint8_t *copy = copy_of(f, f->n_bytes);
    tqkv_plan *plan;
    assert_int_equal(tqkv_plan_read("GGUF and more", 13, &logger, &plan), TQKV_ERR_CORRUPT);
    assert_non_null(strstr(logged, "not a .tqkv plan"));
    tqkvi_store_u32(copy + TQKVI_PLAN_VERSION_AT, 7);
    assert_int_equal(tqkv_plan_read(copy, f->n_bytes, &logger, &plan), TQKV_ERR_VERSION);
    assert_non_null(strstr(logged, "7, and this build reads 0"));
    free(copy);
}

/* No file, whatever it says, may take more memory than a small multiple of its length. */
static void memory_is_bounded_by_the_length_of_the_file(void **state)
{
    const file *f = *state;
    const size_t ends[] = {TQKVI_PLAN_HEADER_BYTES, f->layers, f->n_bytes};
    for (size_t at = 56; at + 4 <= f->heads + 8; at++) {
        for (size_t k = 0; k < 6; k++) {
            static const uint32_t values[] = {0xffffffff, 0x10000, 4096, 1024, 1008, 256};
            for (size_t e = 0; e < sizeof(ends) / sizeof(*ends); e++) {
                const size_t n = ends[e];
                if (at + 4 > n)
                    continue;
                test_memory memory = {0};
                const tqkv_allocator mem = test_memory_allocator(&memory);
                uint8_t *copy = copy_of(f, n);
                tqkv_plan *plan;
                tqkvi_store_u32(copy + at, values[k]);
                repair(copy, n);
                (void)!tqkvi_plan_parse(&mem, copy, n, NULL, &plan);
                tqkvi_plan_destroy(plan);
                assert_true(memory.largest <= 100 * n + 4096);
                assert_int_equal(memory.n_live, 0);
                free(copy);
            }
        }
    }
}

static void running_out_of_memory_leaks_nothing(void **state)
{
    const file *f = *state;
    tqkv_status status = TQKV_ERR_NO_MEMORY;
    for (size_t step = 1; status != TQKV_OK && step < ALLOC_STEPS_MAX; step++) {
        test_memory memory = {.fail_call = step};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_plan *plan = (tqkv_plan *)1;
        status = tqkvi_plan_parse(&mem, f->bytes, f->n_bytes, &logger, &plan);
        assert_true(status == TQKV_OK || (status == TQKV_ERR_NO_MEMORY && !plan));
        tqkvi_plan_destroy(plan);
        assert_int_equal(memory.n_live, 0);
    }
    assert_int_equal(status, TQKV_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_comes_back),
        cmocka_unit_test(builtin_plans_come_back),
        cmocka_unit_test(arguments_are_checked),
        cmocka_unit_test(every_flipped_byte_is_found),
        cmocka_unit_test(damage_behind_a_right_fingerprint_is_harmless),
        cmocka_unit_test(every_truncation_is_found),
        cmocka_unit_test(numbers_of_the_header_are_checked),
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test(catalogues_are_checked),
        cmocka_unit_test(shapes_are_checked),
        cmocka_unit_test(heads_are_checked),
        cmocka_unit_test(entries_that_nobody_uses_are_refused),
        cmocka_unit_test(bytes_after_the_end_are_refused),
        cmocka_unit_test(other_files_are_named),
        cmocka_unit_test(memory_is_bounded_by_the_length_of_the_file),
        cmocka_unit_test(running_out_of_memory_leaks_nothing),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
