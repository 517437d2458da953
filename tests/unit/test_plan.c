/* SPDX-License-Identifier: Apache-2.0 */
/* Plans as objects: creation, rounding of transforms, sealing, built-in plans, public functions. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/half.h"
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

static void creation_gives_zeroed_arrays(void **unused)
{
    (void)unused;
    tqkv_plan_layer shapes[2] = {test_shape(6, 2, 32, 48), {.n_heads = 7, .k_dim = 5}};
    tqkv_plan *plan;
    shapes[0].window = 128;
    assert_int_equal(tqkvi_plan_create(NULL, shapes, 2, &plan), TQKV_OK);
    const tqkvi_layer_plan *layer = &plan->layers[0];
    assert_int_equal(layer->shape.window, 128);
    assert_ptr_equal(layer->shape.rope.inv_freq, layer->inv_freq);
    assert_ptr_not_equal(layer->inv_freq, shapes[0].rope.inv_freq);
    assert_memory_equal(layer->inv_freq, shapes[0].rope.inv_freq, 16 * sizeof(float));
    for (size_t side = 0; side < 2; side++) {
        const uint32_t dim = side == 0 ? 32 : 48;
        for (uint32_t g = 0; g < 2; g++) {
            const tqkvi_head_plan *head = &layer->heads[side][g];
            assert_int_equal((uintptr_t)head->mean % TQKV_ALIGN, 0);
            assert_int_equal((uintptr_t)head->transform % TQKV_ALIGN, 0);
            assert_int_equal((uintptr_t)head->weight % TQKV_ALIGN, 0);
            for (uint32_t i = 0; i < dim * dim; i++)
                assert_true(head->transform[i] == 0.0f && head->mean[i % dim] == 0.0f);
            for (uint32_t i = 0; i < dim / 16; i++)
                assert_true(head->weight[i] == 0.0f);
        }
    }
    assert_string_equal(plan->model, "");
    assert_null(plan->layers[1].heads[0]); /* no cache: the rest of its shape does not count */
    assert_int_equal(plan->layers[1].shape.k_dim, 0);
    assert_int_equal(plan->layers[1].shape.n_heads, 0);
    tqkvi_plan_destroy(plan);
    tqkvi_plan_destroy(NULL);
}

static void creation_refuses_bad_shapes(void **unused)
{
    (void)unused;
    static const float bad_freq[8] = {1, NAN, 1, 1, 1, 1, 1, 1}, fast[8] = {4.1f};
    const tqkv_plan_layer good = test_shape(4, 2, 32, 32);
    tqkv_plan_layer bad[18];
    size_t n = 0;
    for (size_t i = 0; i < 18; i++)
        bad[i] = good;
    bad[n++].n_kv_heads = 3;
    bad[n++].n_kv_heads = 8;
    bad[n++].n_heads = TQKVI_HEADS_MAX + 2;
    bad[n++].k_dim = 24;
    bad[n++].k_dim = 0;
    bad[n++].k_dim = 1040;
    bad[n++].v_dim = 8;
    bad[n++].v_dim = 0;
    bad[n++].is_latent = 1; /* with two KV heads */
    bad[n].n_kv_heads = 1;
    bad[n++].is_latent = 2;
    bad[n++].rope.style = 3;
    bad[n++].rope.n_rot = 31;
    bad[n++].rope.n_rot = 0;
    bad[n++].rope.n_rot = 34;
    bad[n++].rope.inv_freq = NULL;
    bad[n].rope.n_rot = 16;
    bad[n++].rope.inv_freq = bad_freq;
    bad[n].rope.n_rot = 16;
    bad[n++].rope.inv_freq = fast;
    tqkv_plan *plan = (tqkv_plan *)1;
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(tqkvi_plan_create(NULL, &bad[i], 1, &plan), TQKV_ERR_INVALID_ARG);
        assert_null(plan);
        assert_non_null(tqkvi_shape_fault(&bad[i]));
    }
    assert_int_equal(tqkvi_plan_create(NULL, &good, 0, &plan), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkvi_plan_create(NULL, NULL, 1, &plan), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkvi_plan_create(NULL, &good, TQKVI_LAYERS_MAX + 1, &plan),
                     TQKV_ERR_INVALID_ARG);
}

static void running_out_of_memory_leaks_nothing(void **unused)
{
    (void)unused;
    const tqkv_plan_layer shapes[2] = {test_shape(4, 2, 16, 32), {.n_kv_heads = 0}};
    tqkv_status status = TQKV_ERR_NO_MEMORY;
    size_t step = 1;
    for (; status != TQKV_OK && step < ALLOC_STEPS_MAX; step++) {
        test_memory memory = {.fail_call = step};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_plan *plan = NULL;
        status = test_plan_make(&mem, 1, shapes, 2, 2, &plan); /* creates, names, seals */
        if (status != TQKV_OK) {
            assert_int_equal(status, TQKV_ERR_NO_MEMORY);
            assert_null(plan);
        }
        tqkvi_plan_destroy(plan);
        assert_int_equal(memory.n_live, 0);
    }
    assert_int_equal(status, TQKV_OK);
    assert_true(step > 15);
}

static void names_survive_a_failed_change(void **unused)
{
    (void)unused;
    const tqkv_plan_layer shape = test_shape(2, 1, 16, 16);
    for (size_t step = 1; step <= 3; step++) {
        test_memory memory = {0};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_plan *plan;
        assert_int_equal(test_plan_make(&mem, 1, &shape, 1, 1, &plan), TQKV_OK);
        memory.fail_call = memory.n_calls + step;
        assert_int_equal(tqkvi_plan_set_names(plan, "x", "y", "z"), TQKV_ERR_NO_MEMORY);
        assert_string_equal(plan->arch, "arch");
        assert_string_equal(plan->profile, "5x");
        tqkvi_plan_destroy(plan);
        assert_int_equal(memory.n_live, 0);
    }
}

/* Largest |rounded - m| over the column's largest |m|; the result must round to itself. */
static double rounding_error(const float *column, uint32_t dim)
{
    float rounded[TQKVI_DIM_MAX], again[TQKVI_DIM_MAX];
    double error = 0.0, largest = 0.0;
    memcpy(rounded, column, dim * sizeof(float));
    tqkvi_column_round(rounded, dim);
    memcpy(again, rounded, dim * sizeof(float));
    tqkvi_column_round(again, dim);
    assert_memory_equal(rounded, again, dim * sizeof(float));

    const float scale = tqkvi_power_of_two(tqkvi_column_exponent(rounded, dim));
    for (uint32_t i = 0; i < dim; i++) {
        const uint16_t half = tqkvi_float_to_half(rounded[i] / scale);
        assert_true(tqkvi_half_to_float(half) * scale == rounded[i]);
        error = fmax(error, fabs((double)rounded[i] - (double)column[i]));
        largest = fmax(largest, fabs((double)column[i]));
    }
    return largest > 0.0 ? error / largest : error;
}

static void columns_round_to_f16_times_a_power_of_two(void **unused)
{
    (void)unused;
    test_random random = {.state = 3};
    float column[48];
    for (int e = -100; e <= 125; e++) {
        for (int k = 0; k < 20; k++) {
            for (uint32_t i = 0; i < 48; i++)
                column[i] = ldexpf(test_random_normal(&random) / 8.0f, i % 3 == 0 ? e : e - (int)i);
            /* Half an ulp of f16. Columns below 2^-100 keep fewer bits. */
            const double error = rounding_error(column, 48);
            assert_true(error <= (e < -80 ? 1.0 : 0x1p-11));
        }
    }
    for (int e = -90; e <= 126; e++) {
        /* Rounds up to the next power of two, which changes the exponent. */
        for (uint32_t i = 0; i < 48; i++)
            column[i] = ldexpf(i % 2 ? 0x1.fffp+0f : 0x1.003p-11f, e);
        assert_true(rounding_error(column, 48) <= 0x1p-11);
    }
    memset(column, 0, sizeof(column));
    assert_int_equal(tqkvi_column_exponent(column, 48), 0);
    assert_true(rounding_error(column, 48) == 0.0);
    column[5] = 1e-44f;
    assert_int_equal(tqkvi_column_exponent(column, 48), TQKVI_EXPONENT_MIN);
    (void)rounding_error(column, 48);
}

static void a_transform_rounds_by_columns(void **unused)
{
    (void)unused;
    test_random random = {.state = 4};
    float m[16 * 16], column[16];
    for (uint32_t i = 0; i < 256; i++)
        m[i] = ldexpf(test_random_normal(&random), (int)(i % 16));
    tqkvi_transform_column(m, 16, 7, column);
    tqkvi_column_round(column, 16);
    tqkvi_transform_round(m, 16);
    for (uint32_t i = 0; i < 16; i++)
        assert_true(m[i * 16 + 7] == column[i]);
}

static tqkv_plan *small_plan(void)
{
    const tqkv_plan_layer shapes[2] = {test_shape(4, 2, 32, 16), test_shape(4, 2, 32, 16)};
    tqkv_plan *plan;
    assert_int_equal(test_plan_make(NULL, 5, shapes, 2, 3, &plan), TQKV_OK);
    return plan;
}

static void sealing_counts_bytes_and_names_the_content(void **unused)
{
    (void)unused;
    tqkv_plan *plan = small_plan();
    uint8_t before[TQKV_FINGERPRINT_BYTES];
    const tqkvi_layer_plan *layer = &plan->layers[0];
    for (uint32_t tier = 0; tier < 3; tier++) {
        uint32_t n = 4; /* scales */
        for (uint32_t g = 0; g < 2; g++)
            n += layer->heads[0][g].layout[tier].row_bytes +
                 layer->heads[1][g].layout[tier].row_bytes;
        assert_int_equal(layer->shape.token_bytes[tier], n);
    }
    assert_int_equal(layer->shape.token_bytes[3], 0);

    memcpy(before, plan->fingerprint, sizeof(before));
    assert_int_equal(tqkvi_plan_seal(plan, &logger), TQKV_OK);
    assert_memory_equal(before, plan->fingerprint, sizeof(before));
    plan->layers[1].heads[1][1].mean[15] += 1.0f;
    assert_int_equal(tqkvi_plan_seal(plan, &logger), TQKV_OK);
    assert_memory_not_equal(before, plan->fingerprint, sizeof(before));
    tqkvi_plan_destroy(plan);
}

/* Seals a plan with one thing wrong; the text must say what. */
typedef void spoil_fn(tqkv_plan *plan);

static void refuses(spoil_fn *spoil, const char *text)
{
    tqkv_plan *plan = small_plan();
    spoil(plan);
    logged[0] = '\0';
    if (tqkvi_plan_seal(plan, &logger) != TQKV_ERR_INVALID_ARG)
        fail_msg("sealed, though %s is wrong", text);
    if (!strstr(logged, text))
        fail_msg("\"%s\" is not in \"%s\"", text, logged);
    assert_int_equal(tqkvi_plan_seal(plan, NULL), TQKV_ERR_INVALID_ARG);
    tqkvi_plan_destroy(plan);
}

static tqkvi_head_plan *some_head(tqkv_plan *plan)
{
    return &plan->layers[1].heads[TQKV_SIDE_K][1];
}

static void no_tiers(tqkv_plan *plan)
{
    plan->n_tiers = 0;
}
static void five_tiers(tqkv_plan *plan)
{
    plan->n_tiers = 5;
}
static void many_sinks(tqkv_plan *plan)
{
    plan->n_sinks = TQKVI_SINKS_MAX + 1;
}
static void no_frame(tqkv_plan *plan)
{
    plan->frame_tokens = 0;
}
static void long_frame(tqkv_plan *plan)
{
    plan->frame_tokens = TQKVI_FRAME_TOKENS_MAX + 1;
}
static void no_context(tqkv_plan *plan)
{
    plan->context = 0;
}
static void nan_bits(tqkv_plan *plan)
{
    plan->bits_total = NAN;
}
static void infinite_bits(tqkv_plan *plan)
{
    plan->bits_total = INFINITY;
}
static void bad_name(tqkv_plan *plan)
{
    plan->model[0] = '\xff';
}
static void endless_tier(tqkv_plan *plan)
{
    plan->layers[1].shape.tier_tokens[1] = (1u << 24) + 1;
}
static void limited_last_tier(tqkv_plan *plan)
{
    plan->layers[1].shape.tier_tokens[2] = 1;
}
static void odd_dim(tqkv_plan *plan)
{
    plan->layers[1].shape.k_dim = 33;
}
static void nan_mean(tqkv_plan *plan)
{
    some_head(plan)->mean[31] = NAN;
}
static void infinite_mean(tqkv_plan *plan)
{
    some_head(plan)->mean[31] = -INFINITY;
}
static void negative_weight(tqkv_plan *plan)
{
    some_head(plan)->weight[1] = -1.0f;
}
static void nan_weight(tqkv_plan *plan)
{
    some_head(plan)->weight[1] = NAN;
}
static void nan_transform(tqkv_plan *plan)
{
    some_head(plan)->transform[700] = NAN;
}
static void infinite_transform(tqkv_plan *plan)
{
    some_head(plan)->transform[700] = INFINITY;
}
static void exact_transform(tqkv_plan *plan)
{
    some_head(plan)->transform[700] = 1.0f / 3.0f;
}
static void short_layout(tqkv_plan *plan)
{
    some_head(plan)->layout[2].n_units = 1;
}
static void bad_width(tqkv_plan *plan)
{
    some_head(plan)->layout[2].bits[1] = 7;
}
static void bad_row_bytes(tqkv_plan *plan)
{
    some_head(plan)->layout[2].row_bytes++;
}
static void no_arrays(tqkv_plan *plan)
{
    tqkvi_free(&plan->mem, some_head(plan)->mean);
    some_head(plan)->mean = NULL;
}
static void half_plain(tqkv_plan *plan)
{
    const uint8_t plain[2] = {TQKVI_BITS_PLAIN, TQKVI_BITS_PLAIN};
    assert_int_equal(tqkvi_layout_init(&some_head(plan)->layout[1], plain, 2), TQKV_OK);
}

static void sealing_refuses_what_the_reader_would(void **unused)
{
    (void)unused;
    refuses(no_tiers, "n_tiers");
    refuses(five_tiers, "n_tiers");
    refuses(many_sinks, "n_sinks");
    refuses(no_frame, "frame_tokens");
    refuses(long_frame, "frame_tokens");
    refuses(no_context, "context");
    refuses(nan_bits, "bits_total");
    refuses(infinite_bits, "bits_total");
    refuses(bad_name, "UTF-8");
    refuses(endless_tier, "layer 1: tier_tokens");
    refuses(limited_last_tier, "layer 1: tier_tokens");
    refuses(odd_dim, "layer 1: k_dim");
    refuses(nan_mean, "layer 1, K head 1: mean");
    refuses(infinite_mean, "layer 1, K head 1: mean");
    refuses(negative_weight, "layer 1, K head 1: weight");
    refuses(nan_weight, "layer 1, K head 1: weight");
    refuses(nan_transform, "layer 1, K head 1: transform");
    refuses(infinite_transform, "layer 1, K head 1: transform");
    refuses(exact_transform, "not rounded");
    refuses(short_layout, "layout");
    refuses(bad_width, "width");
    refuses(bad_row_bytes, "width");
    refuses(no_arrays, "missing");
    refuses(half_plain, "f16 in every tier");
}

static void names_are_utf8(void **unused)
{
    (void)unused;
    static const char *const good[] = {"", "Qwen 2.5", "\xc2\x80\xdf\xbf",
                                       "\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80",
                                       "\xf0\x90\x80\x80\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\n",
                                      "a\x7f",
                                      "\x80",
                                      "\xc2",
                                      "\xc1\xbf",
                                      "\xe0\x9f\xbf",
                                      "\xed\xa0\x80",
                                      "\xf0\x8f\xbf\xbf",
                                      "\xf4\x90\x80\x80",
                                      "\xf8\x88\x80\x80\x80",
                                      "\xc3(",
                                      "\xe2\x82",
                                      "\xff"};
    char longest[TQKVI_NAME_BYTES_MAX + 1];
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++)
        assert_null(tqkvi_name_fault(good[i], strlen(good[i])));
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        assert_non_null(tqkvi_name_fault(bad[i], strlen(bad[i])));
    assert_non_null(tqkvi_name_fault("a\0b", 3));
    memset(longest, 'a', sizeof(longest));
    assert_null(tqkvi_name_fault(longest, TQKVI_NAME_BYTES_MAX));
    assert_non_null(tqkvi_name_fault(longest, TQKVI_NAME_BYTES_MAX + 1));
}

/* T T^t must be gain^2 times the identity. */
static void check_orthogonal(const float *m, uint32_t dim, double gain)
{
    for (uint32_t a = 0; a < dim; a++) {
        for (uint32_t b = 0; b < dim; b++) {
            double sum = 0.0;
            for (uint32_t j = 0; j < dim; j++)
                sum += (double)m[(size_t)a * dim + j] * (double)m[(size_t)b * dim + j];
            assert_true(fabs(sum - (a == b ? gain * gain : 0.0)) <= gain * gain * 0x1p-10);
        }
    }
}

static void q8_is_a_hadamard_transform(void **unused)
{
    (void)unused;
    static const uint32_t dims[][2] = {{16, 32}, {64, 128}, {80, 48}, {192, 256}};
    for (size_t i = 0; i < 4; i++) {
        const tqkv_plan_layer shape = test_shape(6, 2, dims[i][0], dims[i][1]);
        tqkv_plan *plan;
        uint8_t bits[TQKV_UNITS_MAX];
        tqkv_plan_info info;
        assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &plan), TQKV_OK);
        tqkv_plan_get_info(plan, &info);
        assert_string_equal(info.profile, "q8");
        assert_int_equal(info.n_tiers, 1);
        assert_int_equal(info.n_layers, 1);
        const uint32_t token_bytes = 2 * (dims[i][0] + dims[i][1] + 2);
        assert_int_equal(plan->layers[0].shape.token_bytes[0], token_bytes);
        assert_true(info.bits_total == token_bytes * 8.0 / (2.0 * (dims[i][0] + dims[i][1])));
        for (size_t side = 0; side < 2; side++) {
            const tqkvi_head_plan *head = &plan->layers[0].heads[side][1];
            assert_int_equal(tqkv_plan_get_bits(plan, 0, 1, (tqkv_side)side, 0, bits), TQKV_OK);
            for (uint32_t u = 0; u < dims[i][side] / 16; u++)
                assert_true(bits[u] == 8 && head->weight[u] == 1.0f);
            for (uint32_t k = 0; k < dims[i][side]; k++)
                assert_true(head->mean[k] == 0.0f);
            check_orthogonal(head->transform, dims[i][side], side == 0 ? 1.0 : 8.0);
        }
        tqkv_plan_destroy(plan);
    }
}

static void f16_has_no_arrays(void **unused)
{
    (void)unused;
    tqkv_plan_layer shape = test_shape(8, 8, 1024, 1024);
    tqkv_plan *plan;
    uint8_t bits[TQKV_UNITS_MAX];
    float weights[TQKV_UNITS_MAX];
    memset(weights, 0xff, sizeof(weights));
    shape.window = 77;
    shape.tier_tokens[0] = 5;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_OK);
    assert_null(plan->layers[0].heads[0][7].transform);
    assert_int_equal(plan->layers[0].shape.token_bytes[0], 8 * 2 * (2048 + 1));
    assert_int_equal(plan->layers[0].shape.tier_tokens[0], 0);
    assert_int_equal(plan->layers[0].shape.window, 77);
    assert_int_equal(tqkv_plan_get_bits(plan, 0, 7, TQKV_SIDE_V, 0, bits), TQKV_OK);
    assert_int_equal(tqkv_plan_get_weights(plan, 0, 7, TQKV_SIDE_V, weights), TQKV_OK);
    for (uint32_t i = 0; i < TQKV_UNITS_MAX; i++)
        assert_true(bits[i] == 16 && weights[i] == 0.0f);
    tqkv_plan_destroy(plan);
}

static void builtins_refuse_what_they_cannot_do(void **unused)
{
    (void)unused;
    tqkv_plan *plan = (tqkv_plan *)1;
    tqkv_plan_layer shape = test_shape(4, 2, 32, 32);
    assert_int_equal(tqkv_plan_builtin((tqkv_builtin)2, &shape, &plan), TQKV_ERR_INVALID_ARG);
    assert_null(plan);
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, NULL, &plan), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, NULL), TQKV_ERR_INVALID_ARG);
    shape.k_dim = 40;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_Q8, &shape, &plan), TQKV_ERR_UNSUPPORTED);
    shape.k_dim = 32;
    shape.v_dim = 1040;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_ERR_UNSUPPORTED);
    shape.v_dim = 0;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_ERR_INVALID_ARG);
    shape = test_shape(4, 0, 32, 32);
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_ERR_INVALID_ARG);
    shape = test_shape(4, 3, 32, 32);
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_ERR_INVALID_ARG);
}

static void builtins_survive_a_lack_of_memory(void **unused)
{
    (void)unused;
    const tqkv_plan_layer shape = test_shape(4, 2, 16, 16);
    tqkv_status status = TQKV_ERR_NO_MEMORY;
    for (size_t step = 1; status != TQKV_OK && step < ALLOC_STEPS_MAX; step++) {
        test_memory memory = {.fail_call = step};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        tqkv_plan *plan = NULL;
        status = tqkvi_plan_create_builtin(&mem, TQKV_BUILTIN_Q8, &shape, &plan);
        assert_true(status == TQKV_OK || (status == TQKV_ERR_NO_MEMORY && !plan));
        tqkvi_plan_destroy(plan);
        assert_int_equal(memory.n_live, 0);
    }
    assert_int_equal(status, TQKV_OK);
}

/* A layer of 16 query heads over 4 KV heads, one without a cache, and one of 8 over 8. */
static tqkv_plan *plan_of_many_heads(void)
{
    const tqkv_plan_layer shapes[] = {test_shape(16, 4, 32, 48), {.n_heads = 0},
                                      test_shape(8, 8, 16, 16)};
    tqkv_plan *plan;
    assert_int_equal(test_plan_make(NULL, 5, shapes, 3, 3, &plan), TQKV_OK);
    return plan;
}

static void assert_same_head(const tqkvi_head_plan *a, const tqkvi_head_plan *b, uint32_t dim)
{
    assert_memory_equal(a->layout, b->layout, sizeof(a->layout));
    assert_memory_equal(a->mean, b->mean, dim * sizeof(float));
    assert_memory_equal(a->transform, b->transform, (size_t)dim * dim * sizeof(float));
    assert_memory_equal(a->weight, b->weight, dim / TQKV_UNIT_CHANNELS * sizeof(float));
}

static void shares_have_the_heads_of_their_rank(void **unused)
{
    (void)unused;
    tqkv_plan *plan = plan_of_many_heads();
    for (uint32_t n_ranks = 1; n_ranks <= 8; n_ranks *= 2) {
        uint32_t token_bytes[3] = {0};
        for (uint32_t rank = 0; rank < n_ranks; rank++) {
            tqkv_plan *share;
            assert_int_equal(tqkv_plan_share(plan, rank, n_ranks, &share), TQKV_OK);
            assert_int_equal(share->n_sinks, plan->n_sinks);
            assert_int_equal(share->layers[1].shape.n_kv_heads, 0);
            assert_true((memcmp(share->fingerprint, plan->fingerprint, 32) == 0) == (n_ranks == 1));
            for (uint32_t i = 0; i < 3; i += 2) {
                const tqkv_plan_layer *whole = &plan->layers[i].shape, *own = &share->layers[i].shape;
                assert_int_equal(own->n_heads * n_ranks, whole->n_heads);
                assert_int_equal(own->tier_tokens[0], whole->tier_tokens[0]);
                /* The KV head that each query head of the whole plan asks. */
                for (uint32_t h = 0; h < own->n_heads; h++) {
                    const uint32_t g = h / (own->n_heads / own->n_kv_heads);
                    const uint32_t of_whole =
                        (rank * own->n_heads + h) / (whole->n_heads / whole->n_kv_heads);
                    for (uint32_t side = 0; side < 2; side++)
                        assert_same_head(&share->layers[i].heads[side][g],
                                         &plan->layers[i].heads[side][of_whole],
                                         side ? whole->v_dim : whole->k_dim);
                }
                token_bytes[i] += own->token_bytes[0];
            }
            tqkv_plan_destroy(share);
        }
        assert_int_equal(token_bytes[2], plan->layers[2].shape.token_bytes[0]);
        assert_int_equal(token_bytes[0], /* two ranks of eight have the same KV head */
                         plan->layers[0].shape.token_bytes[0] * (n_ranks == 8 ? 2 : 1));
    }
    tqkv_plan_destroy(plan);
}

static void shares_of_latents_have_all_of_them(void **unused)
{
    (void)unused;
    tqkv_plan_layer shape = test_shape(16, 1, 32, 48);
    shape.is_latent = 1;
    tqkv_plan *plan, *share;
    assert_int_equal(test_plan_make(NULL, 6, &shape, 1, 3, &plan), TQKV_OK);
    for (uint32_t rank = 0; rank < 4; rank++) {
        assert_int_equal(tqkv_plan_share(plan, rank, 4, &share), TQKV_OK);
        const tqkv_plan_layer *own = &share->layers[0].shape;
        assert_int_equal(own->n_heads, 4);
        assert_int_equal(own->n_kv_heads, 1);
        assert_int_equal(own->is_latent, 1);
        assert_memory_equal(own->token_bytes, plan->layers[0].shape.token_bytes, sizeof(own->token_bytes));
        assert_same_head(&share->layers[0].heads[0][0], &plan->layers[0].heads[0][0], 32);
        assert_same_head(&share->layers[0].heads[1][0], &plan->layers[0].heads[1][0], 48);
        tqkv_plan_destroy(share);
    }
    tqkv_plan_destroy(plan);
}

static void shares_that_do_not_exist_are_refused(void **unused)
{
    (void)unused;
    tqkv_plan *plan = plan_of_many_heads(), *share = (tqkv_plan *)1;
    tqkv_status status = TQKV_ERR_NO_MEMORY;
    assert_int_equal(tqkv_plan_share(plan, 0, 3, &share), TQKV_ERR_UNSUPPORTED);
    assert_null(share);
    assert_int_equal(tqkv_plan_share(plan, 0, 16, &share), TQKV_ERR_UNSUPPORTED);
    assert_int_equal(tqkv_plan_share(plan, 2, 2, &share), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_share(plan, 0, 0, &share), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_share(NULL, 0, 1, &share), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_share(plan, 0, 1, NULL), TQKV_ERR_INVALID_ARG);
    for (size_t step = 1; status != TQKV_OK && step < ALLOC_STEPS_MAX; step++) {
        test_memory memory = {.fail_call = step};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        status = tqkvi_plan_create_share(&mem, plan, 1, 2, &share);
        assert_true(status == TQKV_OK || (status == TQKV_ERR_NO_MEMORY && !share));
        tqkvi_plan_destroy(share);
        assert_int_equal(memory.n_live, 0);
    }
    assert_int_equal(status, TQKV_OK);
    tqkv_plan_destroy(plan);
}

static void weights_are_told(void **unused)
{
    (void)unused;
    tqkv_plan *plan = small_plan();
    float weights[TQKV_UNITS_MAX] = {0};
    assert_int_equal(tqkv_plan_get_weights(plan, 1, 1, TQKV_SIDE_K, weights), TQKV_OK);
    assert_memory_equal(weights, some_head(plan)->weight, 2 * sizeof(*weights));
    assert_true(weights[0] > 0.0f && weights[2] == 0.0f);
    assert_int_equal(tqkv_plan_get_weights(plan, 1, 1, TQKV_SIDE_V, weights), TQKV_OK);
    assert_memory_equal(weights, plan->layers[1].heads[TQKV_SIDE_V][1].weight, sizeof(*weights));

    assert_int_equal(tqkv_plan_get_weights(plan, 2, 1, TQKV_SIDE_K, weights), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_weights(plan, 1, 2, TQKV_SIDE_K, weights), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_weights(plan, 1, 1, (tqkv_side)2, weights),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_weights(plan, 1, 1, TQKV_SIDE_K, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_weights(NULL, 1, 1, TQKV_SIDE_K, weights), TQKV_ERR_INVALID_ARG);
    tqkv_plan_destroy(plan);
}

static void questions_out_of_range_are_refused(void **unused)
{
    (void)unused;
    tqkv_plan *plan = small_plan();
    tqkv_plan_layer layer = {.n_heads = 9};
    tqkv_plan_info info;
    uint8_t bits[TQKV_UNITS_MAX];
    assert_int_equal(tqkv_plan_get_layer(plan, 1, &layer), TQKV_OK);
    assert_int_equal(layer.k_dim, 32);
    assert_int_equal(layer.rope.n_rot, 32);
    assert_int_equal(tqkv_plan_get_layer(plan, 2, &layer), TQKV_ERR_INVALID_ARG);
    assert_int_equal(layer.n_heads, 0);
    assert_int_equal(tqkv_plan_get_layer(NULL, 0, &layer), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_layer(plan, 0, NULL), TQKV_ERR_INVALID_ARG);

    assert_int_equal(tqkv_plan_get_bits(plan, 1, 1, TQKV_SIDE_K, 2, bits), TQKV_OK);
    assert_memory_equal(bits, some_head(plan)->layout[2].bits, 2);
    assert_int_equal(tqkv_plan_get_bits(plan, 2, 1, TQKV_SIDE_K, 2, bits), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_bits(plan, 1, 2, TQKV_SIDE_K, 2, bits), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_bits(plan, 1, 1, (tqkv_side)2, 2, bits), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_bits(plan, 1, 1, TQKV_SIDE_K, 3, bits), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_bits(plan, 1, 1, TQKV_SIDE_K, 2, NULL), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_plan_get_bits(NULL, 1, 1, TQKV_SIDE_K, 2, bits), TQKV_ERR_INVALID_ARG);

    tqkv_plan_get_info(plan, &info);
    assert_string_equal(info.model, "a model \xc3\xa9");
    assert_string_equal(info.arch, "arch");
    assert_int_equal(info.n_sinks, 4);
    assert_int_equal(info.frame_tokens, 256);
    assert_int_equal(info.context, 8192);
    assert_memory_equal(info.fingerprint, plan->fingerprint, sizeof(info.fingerprint));
    tqkv_plan_get_info(NULL, &info);
    assert_string_equal(info.model, "");
    assert_int_equal(info.n_layers, 0);
    tqkv_plan_get_info(plan, NULL);
    tqkv_plan_destroy(plan);
    tqkv_plan_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(creation_gives_zeroed_arrays),
        cmocka_unit_test(creation_refuses_bad_shapes),
        cmocka_unit_test(running_out_of_memory_leaks_nothing),
        cmocka_unit_test(names_survive_a_failed_change),
        cmocka_unit_test(columns_round_to_f16_times_a_power_of_two),
        cmocka_unit_test(a_transform_rounds_by_columns),
        cmocka_unit_test(sealing_counts_bytes_and_names_the_content),
        cmocka_unit_test(sealing_refuses_what_the_reader_would),
        cmocka_unit_test(names_are_utf8),
        cmocka_unit_test(q8_is_a_hadamard_transform),
        cmocka_unit_test(f16_has_no_arrays),
        cmocka_unit_test(builtins_refuse_what_they_cannot_do),
        cmocka_unit_test(builtins_survive_a_lack_of_memory),
        cmocka_unit_test(shares_have_the_heads_of_their_rank),
        cmocka_unit_test(shares_of_latents_have_all_of_them),
        cmocka_unit_test(shares_that_do_not_exist_are_refused),
        cmocka_unit_test(weights_are_told),
        cmocka_unit_test(questions_out_of_range_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
