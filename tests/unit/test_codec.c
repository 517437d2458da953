/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Properties of the codec on random plans: what is decoded encodes to the same bytes, bad input
 * becomes zero rows, and nothing decodes to NaN or infinity.
 *
 *     test_codec [--seed N]
 */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/half.h"
#include "codec/layer_codec.h"
#include "test_memory.h"
#include "test_plan_make.h"

#define DIM_MAX 256
#define N_TIERS 4
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static uint64_t seed = 20240301;
static const uint8_t widths[] = {0, 1, 2, 3, 4, 5, 6, 8};
static const uint32_t dims[] = {64, 80, 96, 128, 256};

/* Means, sizes and widths of a plan to test. */
typedef struct recipe {
    uint32_t dim;
    float mean;   /* size of the means */
    float spread; /* octaves between the widest and the narrowest channel behind the transform */
    float size;   /* of the widest channel */
    uint8_t bits[N_TIERS]; /* of every unit; 255: drawn at random */
    uint32_t rope_style;
} recipe;

static double dot(const double *a, const double *b, uint32_t n)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Columns of m: rows of a random rotation (Gram-Schmidt), divided by the sizes of the channels. */
static void fill_transform(test_random *random, const recipe *r, float *m)
{
    static double rows[DIM_MAX][DIM_MAX];
    for (uint32_t j = 0; j < r->dim; j++) {
        for (uint32_t i = 0; i < r->dim; i++)
            rows[j][i] = (double)test_random_normal(random);
        for (uint32_t k = 0; k < j; k++) {
            const double along = dot(rows[j], rows[k], r->dim);
            for (uint32_t i = 0; i < r->dim; i++)
                rows[j][i] -= along * rows[k][i];
        }
        const double length = sqrt(dot(rows[j], rows[j], r->dim));
        for (uint32_t i = 0; i < r->dim; i++)
            rows[j][i] /= length;
    }
    for (uint32_t j = 0; j < r->dim; j++) {
        const double size = (double)r->size * exp2(-(double)r->spread * j / r->dim);
        for (uint32_t i = 0; i < r->dim; i++)
            m[(size_t)i * r->dim + j] = (float)(rows[j][i] / size);
    }
    tqkvi_transform_round(m, r->dim);
}

static void fill_head(test_random *random, const recipe *r, tqkvi_head_plan *head)
{
    const uint32_t n_units = r->dim / TQKV_UNIT_CHANNELS;
    for (uint32_t tier = 0; tier < N_TIERS; tier++) {
        uint8_t bits[TQKV_UNITS_MAX];
        memset(bits, r->bits[tier], sizeof(bits));
        for (uint32_t u = 0; u < n_units && r->bits[tier] == 255; u++)
            bits[u] = widths[test_random_u32(random) % COUNT(widths)];
        assert_int_equal(tqkvi_layout_init(&head->layout[tier], bits, n_units), TQKV_OK);
    }
    for (uint32_t d = 0; d < r->dim; d++)
        head->mean[d] = r->mean * test_random_normal(random);
    for (uint32_t u = 0; u < n_units; u++)
        head->weight[u] = (float)exp2(-10.0 * test_random_uniform(random));
    fill_transform(random, r, head->transform);
}

/* One layer with one KV head. */
static tqkv_plan *make_plan(test_random *random, const recipe *r)
{
    tqkv_plan_layer shape = test_shape(3, 1, r->dim, r->dim);
    tqkv_plan *plan;
    shape.rope.style = r->rope_style;
    shape.rope.n_rot = r->dim / 2;
    if (r->rope_style == TQKV_ROPE_NONE)
        shape.rope = (tqkv_rope){.style = TQKV_ROPE_NONE};
    assert_int_equal(tqkvi_plan_create(NULL, &shape, 1, &plan), TQKV_OK);
    plan->n_tiers = N_TIERS;
    plan->frame_tokens = 256;
    plan->context = 4096;
    for (size_t side = 0; side < 2; side++)
        fill_head(random, r, &plan->layers[0].heads[side][0]);
    assert_int_equal(tqkvi_plan_seal(plan, NULL), TQKV_OK);
    return plan;
}

static tqkv_codec *make_codec(const tqkv_plan *plan)
{
    tqkv_codec *codec;
    assert_int_equal(tqkv_codec_create(plan, 0, NULL, NULL, &codec), TQKV_OK);
    return codec;
}

/* A row of the model: `kind` picks its shape behind the transform. */
static void random_row(test_random *random, const tqkv_codec *codec, tqkv_side side, int32_t base,
                       uint32_t kind, float *x)
{
    const tqkvi_head_codec *head = &codec->heads[side][0];
    const uint32_t dim = head->dim;
    _Alignas(TQKV_ALIGN) float y[DIM_MAX + 16], row[DIM_MAX + 16];
    float cos_base[DIM_MAX / 2], sin_base[DIM_MAX / 2];
    const float size = (float)exp2(6.0 * test_random_uniform(random) - 3.0);

    for (uint32_t d = 0; d < dim; d++) {
        const float g = test_random_normal(random);
        switch (kind) {
        case 0: /* a spike */
            y[d] = g * (d == dim / 3 ? 60.0f : 1.0f);
            break;
        case 1: /* heavy tails */
            y[d] = g / (fabsf(test_random_normal(random)) + .02f);
            break;
        case 2: /* one magnitude */
            y[d] = g < 0.0f ? -size : size;
            break;
        case 3: /* past the largest scale */
            y[d] = 1e4f * g;
            break;
        case 4: /* one channel */
            y[d] = d == dim / 2 ? size : 0.0f;
            break;
        case 5: /* whole levels of 8 bits */
            y[d] = tqkvk_step(8) * 4.0f * rintf(6.0f * g);
            break;
        default:
            y[d] = size * g;
            break;
        }
    }
    codec->kernels->transform(head->inverse, y, row, dim, 1);
    for (uint32_t d = 0; d < dim; d++)
        x[d] = head->plan->mean[d] + row[d];
    if (side == TQKV_SIDE_K && codec->rope.style != TQKV_ROPE_NONE) {
        tqkvi_turn_init(&codec->rope, base, cos_base, sin_base);
        tqkvi_turn_apply(&codec->rope, cos_base, sin_base, false, x);
    }
}

typedef struct coded {
    uint8_t scale;
    uint8_t codes[2 * DIM_MAX];
} coded;

static size_t encode(const tqkv_codec *codec, tqkv_side side, uint32_t tier, int32_t base,
                     const float *x, coded *out)
{
    size_t n_bad;
    const uint32_t dim = codec->heads[side][0].dim;
    memset(out, 0, sizeof(*out));
    assert_int_equal(
        tqkv_codec_encode(codec, 0, side, tier, base, x, dim, 1, &out->scale, out->codes, &n_bad),
        TQKV_OK);
    return n_bad;
}

static void decode(const tqkv_codec *codec, tqkv_side side, uint32_t tier, int32_t base,
                   const coded *in, float *x)
{
    const uint32_t dim = codec->heads[side][0].dim;
    assert_int_equal(
        tqkv_codec_decode(codec, 0, side, tier, base, &in->scale, in->codes, 1, x, dim), TQKV_OK);
    for (uint32_t d = 0; d < dim; d++)
        assert_true(isfinite(x[d]));
}

static bool codes_again(const tqkv_codec *codec, tqkv_side side, uint32_t tier, int32_t base,
                        const coded *first, bool through_half)
{
    float x[DIM_MAX];
    coded again;
    decode(codec, side, tier, base, first, x);
    for (uint32_t d = 0; through_half && d < codec->heads[side][0].dim; d++)
        x[d] = tqkvi_half_to_float(tqkvi_float_to_half(x[d]));
    assert_int_equal(encode(codec, side, tier, base, x, &again), 0);
    return memcmp(first, &again, sizeof(again)) == 0;
}

/*
 * Whether half the gap between two levels at this scale is lost in the rounding of x: a row that
 * lies next to a mean of 1000 differs from it by a few units in the last place only.
 */
static bool below_rounding(const recipe *r, const coded *row)
{
    const double half_gap = .5 * (double)tqkvk_scale_value(row->scale) * (double)tqkvk_step(8);
    return half_gap < 8.0 * 0x1p-23 * 3.0 * (double)r->mean / (double)r->size;
}

/* Rows of every kind, both sides, every tier: number that do not come back, of *n_rows. */
static size_t count_changed(test_random *random, const recipe *r, uint32_t n_kinds,
                            bool through_half, size_t *n_rows)
{
    tqkv_plan *plan = make_plan(random, r);
    tqkv_codec *codec = make_codec(plan);
    float x[DIM_MAX];
    coded first;
    size_t n_changed = 0;

    *n_rows = 0;
    for (uint32_t i = 0; i < 40 * N_TIERS * 2; i++) {
        const tqkv_side side = i % 2 ? TQKV_SIDE_V : TQKV_SIDE_K;
        const uint32_t tier = i / 2 % N_TIERS;
        const int32_t base = (int32_t)(test_random_u32(random) % 200000);
        const uint32_t kind = 8 - test_random_u32(random) % n_kinds;
        random_row(random, codec, side, base, kind, x);
        assert_int_equal(encode(codec, side, tier, base, x, &first), 0);
        if (!codes_again(codec, side, tier, base, &first, through_half))
            n_changed += through_half || !below_rounding(r, &first);
        ++*n_rows;
    }
    tqkvi_codec_destroy(codec);
    tqkvi_plan_destroy(plan);
    return n_changed;
}

static void test_idempotent(void **state)
{
    (void)state;
    test_random random = {seed};
    size_t n_rows;
    for (uint32_t i = 0; i < 5 * 12; i++) {
        recipe r = {
            .dim = dims[i % 5], .size = 1.0f, .spread = 4.0f, .mean = 1.0f, .rope_style = i % 3};
        memcpy(r.bits,
               i / 5 % 3 == 0   ? (const uint8_t[]){8, 6, 5, 4}
               : i / 5 % 3 == 1 ? (const uint8_t[]){3, 2, 1, 0}
                                : (const uint8_t[]){255, 255, 255, 255},
               N_TIERS);
        if (i % 4 == 1) /* the largest means of real models, in channels of ordinary size */
            r.mean = 1000.0f, r.spread = 0.0f, r.size = 4.0f;
        if (i % 4 == 2)
            r.mean = 0.0f;
        if (i % 4 == 3) /* values of 1e9 and of 1e-9 */
            r.size = i % 8 == 3 ? 1e9f : 1e-9f, r.mean = r.size;
        assert_int_equal(count_changed(&random, &r, 9, false, &n_rows), 0);
    }
}

/* An engine saves its cache as f16 and reads it back: ordinary rows, widths up to 6. */
static void test_idempotent_half(void **state)
{
    (void)state;
    test_random random = {seed};
    size_t n_rows;
    for (uint32_t i = 0; i < 10; i++) {
        const recipe r = {.dim = dims[i % 5],
                          .size = 1.0f,
                          .spread = 1.0f,
                          .mean = .2f,
                          .bits = {6, 4, 3, 2},
                          .rope_style = TQKV_ROPE_HALVES};
        assert_int_equal(count_changed(&random, &r, 3, true, &n_rows), 0);
    }
    const recipe hard = {.dim = 64,
                         .size = 1.0f,
                         .spread = 6.0f,
                         .mean = 3.0f,
                         .bits = {8, 6, 4, 3},
                         .rope_style = TQKV_ROPE_HALVES};
    const size_t n_changed = count_changed(&random, &hard, 3, true, &n_rows);
    print_message("through f16, channels 6 octaves apart: %zu of %zu rows change\n", n_changed,
                  n_rows);
}

static const recipe ordinary = {.dim = 64,
                                .size = 1.0f,
                                .spread = 3.0f,
                                .mean = 1.0f,
                                .bits = {8, 4, 2, 255},
                                .rope_style = TQKV_ROPE_HALVES};

static bool is_zero_row(const coded *row)
{
    static const uint8_t zero[sizeof(row->codes)];
    return row->scale == 0 && memcmp(row->codes, zero, sizeof(zero)) == 0;
}

static void test_bad_rows(void **state)
{
    (void)state;
    test_random random = {seed};
    tqkv_plan *plan = make_plan(&random, &ordinary);
    tqkv_codec *codec = make_codec(plan);
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    float x[DIM_MAX], back[DIM_MAX];
    coded row;

    for (uint32_t i = 0; i < 200; i++) {
        const tqkv_side side = i % 2 ? TQKV_SIDE_V : TQKV_SIDE_K;
        random_row(&random, codec, side, 7, 8, x);
        x[test_random_u32(&random) % 64] = bad[i % 4];
        assert_int_equal(encode(codec, side, i % N_TIERS, 7, x, &row), 1);
        assert_true(is_zero_row(&row));
        decode(codec, side, i % N_TIERS, 7, &row, back);
        for (uint32_t d = 0; d < 64; d++)
            assert_true(back[d] == 0.0f);
    }
    for (uint32_t d = 0; d < 64; d++) /* finite, but not behind the transform */
        x[d] = d % 2 ? FLT_MAX : -FLT_MAX;
    (void)encode(codec, TQKV_SIDE_V, 0, 0, x, &row);
    decode(codec, TQKV_SIDE_V, 0, 0, &row, back);

    for (uint32_t d = 0; d < 64; d++)
        x[d] = d % 2 ? 0.0f : -0.0f;
    assert_int_equal(encode(codec, TQKV_SIDE_K, 1, 9, x, &row), 0);
    assert_true(is_zero_row(&row));
    tqkvi_codec_destroy(codec);
    tqkvi_plan_destroy(plan);
}

/* Rows next to the mean come back next to it; only without a mean may they become zero. */
static void test_small_rows(void **state)
{
    (void)state;
    test_random random = {seed};
    for (uint32_t i = 0; i < 60; i++) {
        recipe r = {.dim = 64,
                    .size = 1.0f,
                    .spread = 0.0f,
                    .mean = i % 2 ? 1.0f : 0.0f,
                    .bits = {8, 255, 0, 3},
                    .rope_style = TQKV_ROPE_NONE};
        tqkv_plan *plan = make_plan(&random, &r);
        tqkv_codec *codec = make_codec(plan);
        const float *mean = plan->layers[0].heads[TQKV_SIDE_V][0].mean;
        const float sizes[] = {0.0f, 1e-44f, 1e-30f, 1e-5f, 2e-4f, 1e-3f};
        float x[DIM_MAX], back[DIM_MAX];
        coded row;
        for (uint32_t tier = 0; tier < N_TIERS; tier++) {
            for (size_t k = 0; k < COUNT(sizes); k++) {
                for (uint32_t d = 0; d < 64; d++)
                    x[d] = mean[d] + sizes[k] * test_random_normal(&random);
                assert_int_equal(encode(codec, TQKV_SIDE_V, tier, 0, x, &row), 0);
                decode(codec, TQKV_SIDE_V, tier, 0, &row, back);
                for (uint32_t d = 0; d < 64; d++)
                    assert_true(fabsf(back[d] - x[d]) < .03f);
                if (i % 2 == 0)
                    assert_true(codes_again(codec, TQKV_SIDE_V, tier, 0, &row, false));
            }
        }
        tqkvi_codec_destroy(codec);
        tqkvi_plan_destroy(plan);
    }
}

static void test_any_bytes_decode(void **state)
{
    (void)state;
    test_random random = {seed};
    for (uint32_t i = 0; i < 20; i++) {
        const recipe r = {.dim = dims[i % 5],
                          .size = i % 2 ? 1e6f : 1e-6f,
                          .spread = 10.0f,
                          .mean = 100.0f,
                          .bits = {8, 255, 255, (uint8_t)(i % 4 == 0 ? 1 : 5)},
                          .rope_style = i % 3};
        tqkv_plan *plan = make_plan(&random, &r);
        tqkv_codec *codec = make_codec(plan);
        float x[DIM_MAX];
        coded row;
        for (uint32_t k = 0; k < 256; k++) {
            for (size_t b = 0; b < sizeof(row.codes); b++)
                row.codes[b] = (uint8_t)test_random_u32(&random);
            row.scale = (uint8_t)k;
            decode(codec, k % 2 ? TQKV_SIDE_K : TQKV_SIDE_V, k / 2 % N_TIERS,
                   (int32_t)test_random_u32(&random), &row, x);
        }
        tqkvi_codec_destroy(codec);
        tqkvi_plan_destroy(plan);
    }
}

/* Normal rows lose about what tqkvk_distortion says, whatever transform and mean there are. */
static void test_distortion(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t w = 1; w < COUNT(widths); w++) {
        const recipe r = {.dim = 128,
                          .size = 1.0f,
                          .spread = 0.0f,
                          .mean = 3.0f,
                          .bits = {widths[w], 8, 8, 8},
                          .rope_style = TQKV_ROPE_PAIRS};
        tqkv_plan *plan = make_plan(&random, &r);
        tqkv_codec *codec = make_codec(plan);
        double error = 0.0;
        for (uint32_t i = 0; i < 200; i++) {
            _Alignas(TQKV_ALIGN) float x[DIM_MAX], y[DIM_MAX];
            float back[DIM_MAX];
            coded row;
            for (uint32_t d = 0; d < 128; d++)
                y[d] = test_random_normal(&random);
            codec->kernels->transform(codec->heads[0][0].inverse, y, x, 128, 1);
            for (uint32_t d = 0; d < 128; d++)
                x[d] += codec->heads[0][0].plan->mean[d];
            (void)encode(codec, TQKV_SIDE_K, 0, 0, x, &row);
            decode(codec, TQKV_SIDE_K, 0, 0, &row, back);
            for (uint32_t d = 0; d < 128; d++)
                error += (double)(back[d] - x[d]) * (double)(back[d] - x[d]) / (200 * 128);
        }
        print_message("%u bits: mean squared error %.3g, of the tables %.3g\n", widths[w], error,
                      tqkvk_distortion(widths[w]));
        assert_true(error < 1.15 * tqkvk_distortion(widths[w]));
        tqkvi_codec_destroy(codec);
        tqkvi_plan_destroy(plan);
    }
}

/* A row goes down the tiers from its own codes, and to its own tier without change. */
static void test_recode(void **state)
{
    (void)state;
    test_random random = {seed};
    recipe r = ordinary;
    memset(r.bits, 255, sizeof(r.bits));
    for (uint32_t i = 0; i < 30; i++) {
        r.dim = dims[i % 5];
        r.mean = i % 2 ? 1.0f : 0.0f;
        tqkv_plan *plan = make_plan(&random, &r);
        tqkv_codec *codec = make_codec(plan);
        _Alignas(TQKV_ALIGN) float scratch[TQKVI_CODEC_SCRATCH_MAX];
        float x[DIM_MAX];
        assert_true(tqkvi_codec_scratch_floats(codec) <= TQKVI_CODEC_SCRATCH_MAX);
        for (uint32_t k = 0; k < 100; k++) {
            const tqkv_side side = k % 2 ? TQKV_SIDE_V : TQKV_SIDE_K;
            const uint32_t from = k / 2 % N_TIERS, to = k / 8 % N_TIERS;
            coded first, second = {0}, third = {0};
            random_row(&random, codec, side, 0, k % 9, x);
            if (k == 50)
                memset(x, 0, sizeof(x));
            (void)encode(codec, side, from, 0, x, &first);
            tqkvi_recode_row(codec, side, 0, from, first.scale, first.codes, to, &second.scale,
                             second.codes, scratch);
            assert_true(from != to || memcmp(&first, &second, sizeof(first)) == 0);
            assert_true((first.scale != 0) || second.scale == 0);
            assert_true(codes_again(codec, side, to, 0, &second, false));
            tqkvi_recode_row(codec, side, 0, to, second.scale, second.codes, to, &third.scale,
                             third.codes, scratch);
            assert_memory_equal(&second, &third, sizeof(third));
        }
        tqkvi_codec_destroy(codec);
        tqkvi_plan_destroy(plan);
    }
}

/* Every table of kernels gives the same codes and the same decoded bits. */
static void test_tables_agree(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    for (uint32_t i = 0; i < 10; i++) {
        recipe r = ordinary;
        r.dim = dims[i % 5];
        memset(r.bits, 255, sizeof(r.bits));
        tqkv_plan *plan = make_plan(&random, &r);
        tqkv_codec *codec = make_codec(plan);
        for (uint32_t k = 0; k < 100; k++) {
            float x[DIM_MAX], want[DIM_MAX], got[DIM_MAX];
            coded first, other;
            random_row(&random, codec, TQKV_SIDE_K, 1234, k % 9, x);
            codec->kernels = all[0];
            (void)encode(codec, TQKV_SIDE_K, k % N_TIERS, 1234, x, &first);
            decode(codec, TQKV_SIDE_K, k % N_TIERS, 1234, &first, want);
            for (size_t t = 1; t < n; t++) {
                codec->kernels = all[t];
                (void)encode(codec, TQKV_SIDE_K, k % N_TIERS, 1234, x, &other);
                decode(codec, TQKV_SIDE_K, k % N_TIERS, 1234, &first, got);
                assert_memory_equal(&first, &other, sizeof(first));
                assert_memory_equal(want, got, r.dim * sizeof(float));
            }
        }
        tqkvi_codec_destroy(codec);
        tqkvi_plan_destroy(plan);
    }
}

static void test_plain(void **state)
{
    (void)state;
    test_random random = {seed};
    tqkv_plan_layer shape = test_shape(4, 2, 80, 64);
    tqkv_plan *plan;
    assert_int_equal(tqkv_plan_builtin(TQKV_BUILTIN_F16, &shape, &plan), TQKV_OK);
    tqkv_codec *codec = make_codec(plan);
    const float special[] = {NAN, 1e6f, -1e6f, 65519.0f, 1e-10f, -0.0f, 6e-8f, 1e-45f};
    float x[80], back[80];
    coded row;

    assert_int_equal(tqkv_codec_row_bytes(codec, 1, TQKV_SIDE_K, 0), 160);
    for (uint32_t i = 0; i < 300; i++) {
        for (uint32_t d = 0; d < 80; d++)
            x[d] = (float)exp2(20.0 * test_random_uniform(&random) - 10.0) *
                   test_random_normal(&random);
        if (i % 3 == 1) /* rows of small and special values */
            for (uint32_t d = 0; d < 80; d++)
                x[d] = special[test_random_u32(&random) % (COUNT(special) - 4) + 4] *
                       (i % 2 ? 1.0f : .01f);
        if (i % 3 == 2)
            x[i % 80] = special[i % COUNT(special)];
        const bool bad = i % 3 == 2 && i % COUNT(special) == 0;
        assert_int_equal(encode(codec, TQKV_SIDE_K, 0, 99, x, &row), bad);
        decode(codec, TQKV_SIDE_K, 0, -5, &row, back); /* no turn */
        for (uint32_t d = 0; d < 80; d++) {
            const float want =
                tqkvi_half_to_float(tqkvi_float_to_half(fmaxf(fminf(x[d], 65504.0f), -65504.0f)));
            assert_true(back[d] == (bad ? 0.0f : want));
        }
        assert_true(codes_again(codec, TQKV_SIDE_K, 0, 0, &row, true));
    }
    memset(row.codes, 0xff, sizeof(row.codes));
    row.scale = 1;
    decode(codec, TQKV_SIDE_K, 0, 0, &row, back);
    tqkvi_codec_destroy(codec);
    tqkv_plan_destroy(plan);
}

/* Strides and several rows at once. */
static void test_rows(void **state)
{
    (void)state;
    test_random random = {seed};
    tqkv_plan *plan = make_plan(&random, &ordinary);
    tqkv_codec *codec = make_codec(plan);
    enum { N = 5, STRIDE = 71 };
    const size_t row_bytes = tqkv_codec_row_bytes(codec, 0, TQKV_SIDE_K, 1);
    float x[N * STRIDE], back[N * STRIDE];
    uint8_t scales[N], codes[N * 2 * 64];
    size_t n_bad;

    assert_int_equal(row_bytes, 32);
    for (size_t i = 0; i < N * STRIDE; i++)
        x[i] = back[i] = test_random_normal(&random);
    x[2 * STRIDE + 3] = INFINITY;
    assert_int_equal(
        tqkv_codec_encode(codec, 0, TQKV_SIDE_K, 1, 77, x, STRIDE, N, scales, codes, &n_bad),
        TQKV_OK);
    assert_int_equal(n_bad, 1);
    assert_int_equal(
        tqkv_codec_decode(codec, 0, TQKV_SIDE_K, 1, 77, scales, codes, N, back, STRIDE), TQKV_OK);
    for (size_t r = 0; r < N; r++) {
        coded one;
        float single[64];
        (void)encode(codec, TQKV_SIDE_K, 1, 77, x + r * STRIDE, &one);
        assert_int_equal(one.scale, scales[r]);
        assert_memory_equal(one.codes, codes + r * row_bytes, row_bytes);
        decode(codec, TQKV_SIDE_K, 1, 77, &one, single);
        assert_memory_equal(single, back + r * STRIDE, sizeof(single));
        assert_memory_equal(x + r * STRIDE + 64, back + r * STRIDE + 64,
                            r + 1 < N ? (STRIDE - 64) * sizeof(float)
                                      : 0); /* the gap is not written */
    }
    tqkvi_codec_destroy(codec);
    tqkvi_plan_destroy(plan);
}

static void test_turn(void **state)
{
    (void)state;
    test_random random = {seed};
    const tqkv_plan_layer shape = test_shape(1, 1, 128, 128);
    const int32_t bases[] = {0, 1, -1, 255, 1 << 20, INT32_MAX, INT32_MIN};
    for (uint32_t i = 0; i < COUNT(bases) * 2; i++) {
        tqkv_rope rope = shape.rope;
        rope.style = i % 2 ? TQKV_ROPE_HALVES : TQKV_ROPE_PAIRS;
        rope.n_rot = 96;
        float c[48], s[48], x[128], row[128];
        tqkvi_turn_init(&rope, bases[i / 2], c, s);
        for (uint32_t d = 0; d < 128; d++)
            x[d] = row[d] = test_random_normal(&random);
        tqkvi_turn_apply(&rope, c, s, false, row);
        for (uint32_t k = 0; k < 48; k++) {
            const double angle = (double)bases[i / 2] * (double)rope.inv_freq[k];
            const uint32_t a = i % 2 ? k : 2 * k, b = i % 2 ? k + 48 : 2 * k + 1;
            assert_true(fabs((double)c[k] - cos(angle)) < 1e-7 &&
                        fabs((double)s[k] - sin(angle)) < 1e-7);
            const double want_a = (double)x[a] * cos(angle) - (double)x[b] * sin(angle);
            const double want_b = (double)x[b] * cos(angle) + (double)x[a] * sin(angle);
            const double bound = 3e-7 * (fabs((double)x[a]) + fabs((double)x[b]));
            assert_true(fabs((double)row[a] - want_a) < bound &&
                        fabs((double)row[b] - want_b) < bound);
        }
        assert_memory_equal(x + 96, row + 96, 32 * sizeof(float));
        tqkvi_turn_apply(&rope, c, s, true, row);
        for (uint32_t d = 0; d < 128; d++)
            assert_true(fabsf(row[d] - x[d]) < 3e-6f);
    }
}

static void test_invert(void **state)
{
    (void)state;
    test_random random = {seed};
    static float m[DIM_MAX * DIM_MAX], inverse[DIM_MAX * DIM_MAX];
    static double work[2 * DIM_MAX * DIM_MAX];
    for (uint32_t i = 0; i < 10; i++) {
        const recipe r = {.dim = dims[i % 5], .size = 10.0f, .spread = 8.0f};
        fill_transform(&random, &r, m);
        assert_true(tqkvi_invert(m, r.dim, inverse, work));
        for (uint32_t k = 0; k < 200; k++) {
            const uint32_t a = test_random_u32(&random) % r.dim,
                           b = test_random_u32(&random) % r.dim;
            double sum = 0.0, terms = 0.0;
            for (uint32_t d = 0; d < r.dim; d++) {
                const double term = (double)m[a * r.dim + d] * (double)inverse[d * r.dim + b];
                sum += term;
                terms += fabs(term);
            }
            assert_true(fabs(sum - (a == b ? 1.0 : 0.0)) <= 1e-7 * terms + 1e-12);
        }
        for (uint32_t d = 0; d < r.dim; d++) /* two rows alike */
            m[3 * r.dim + d] = 0.0f;
        assert_false(tqkvi_invert(m, r.dim, inverse, work));
    }
    const float swap[4] = {0.0f, 2.0f, 4.0f, 0.0f};
    assert_true(tqkvi_invert(swap, 2, inverse, work));
    assert_true(inverse[0] == 0.0f && inverse[1] == .25f && inverse[2] == .5f &&
                inverse[3] == 0.0f);
}

static void test_arguments(void **state)
{
    (void)state;
    test_random random = {seed};
    tqkv_plan *plan = make_plan(&random, &ordinary);
    tqkv_codec *codec = make_codec(plan), *other = (tqkv_codec *)plan;
    uint8_t scales[2] = {0}, codes[256] = {0};
    float x[128] = {0};
    size_t n_bad = 5;

    assert_int_equal(tqkv_codec_create(NULL, 0, NULL, NULL, &other), TQKV_ERR_INVALID_ARG);
    assert_null(other);
    assert_int_equal(tqkv_codec_create(plan, 1, NULL, NULL, &other), TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_codec_create(plan, 0, NULL, NULL, NULL), TQKV_ERR_INVALID_ARG);
    tqkv_rope rope = {.style = 7, .n_rot = 2, .inv_freq = x};
    assert_int_equal(tqkv_codec_create(plan, 0, &rope, NULL, &other), TQKV_ERR_INVALID_ARG);
    rope = (tqkv_rope){.style = TQKV_ROPE_PAIRS, .n_rot = 66, .inv_freq = x};
    assert_int_equal(tqkv_codec_create(plan, 0, &rope, NULL, &other), TQKV_ERR_INVALID_ARG);
    tqkv_codec_destroy(NULL);

    assert_int_equal(tqkv_codec_row_bytes(NULL, 0, TQKV_SIDE_K, 0), 0);
    assert_int_equal(tqkv_codec_row_bytes(codec, 1, TQKV_SIDE_K, 0), 0);
    assert_int_equal(tqkv_codec_row_bytes(codec, 0, (tqkv_side)2, 0), 0);
    assert_int_equal(tqkv_codec_row_bytes(codec, 0, TQKV_SIDE_K, N_TIERS), 0);
#define ENCODE(codec, head, side, tier, x, stride, n, scales, codes) \
    tqkv_codec_encode(codec, head, side, tier, 0, x, stride, n, scales, codes, &n_bad)
    assert_int_equal(ENCODE(NULL, 0, TQKV_SIDE_K, 0, x, 64, 1, scales, codes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(n_bad, 0);
    assert_int_equal(ENCODE(codec, 1, TQKV_SIDE_K, 0, x, 64, 1, scales, codes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(ENCODE(codec, 0, TQKV_SIDE_K, 4, x, 64, 1, scales, codes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(ENCODE(codec, 0, TQKV_SIDE_K, 0, x, 63, 1, scales, codes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(ENCODE(codec, 0, TQKV_SIDE_K, 0, NULL, 64, 1, scales, codes),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(ENCODE(codec, 0, TQKV_SIDE_K, 0, x, 64, 1, NULL, codes), TQKV_ERR_INVALID_ARG);
    assert_int_equal(ENCODE(codec, 0, TQKV_SIDE_K, 0, x, 64, 1, scales, NULL),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(ENCODE(codec, 0, TQKV_SIDE_K, 0, NULL, 0, 0, NULL, NULL), TQKV_OK);
    assert_int_equal(tqkv_codec_encode(codec, 0, TQKV_SIDE_V, 0, 0, x, 64, 2, scales, codes, NULL),
                     TQKV_OK);
#undef ENCODE
    assert_int_equal(tqkv_codec_decode(codec, 0, TQKV_SIDE_K, 0, 0, scales, NULL, 1, x, 64),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_codec_decode(codec, 0, TQKV_SIDE_K, 9, 0, scales, codes, 1, x, 64),
                     TQKV_ERR_INVALID_ARG);
    assert_int_equal(tqkv_codec_decode(codec, 0, TQKV_SIDE_K, 0, 0, scales, codes, 1, x, 9),
                     TQKV_ERR_INVALID_ARG);
    tqkv_codec_destroy(codec);

    /* No inverse; and one that would decode past the range of f32. */
    float *m = plan->layers[0].heads[0][0].transform;
    memset(m, 0, 64 * sizeof(float));
    assert_int_equal(tqkv_codec_create(plan, 0, NULL, NULL, &other), TQKV_ERR_INVALID_ARG);
    for (size_t i = 0; i < 64 * 64; i++)
        m[i] = i % 65 == 0 ? 1e-36f : 0.0f;
    assert_int_equal(tqkv_codec_create(plan, 0, NULL, NULL, &other), TQKV_ERR_INVALID_ARG);
    assert_null(other);
    tqkvi_plan_destroy(plan);
}

/* A RoPE table that is given counts, not the plan's. Layouts without codes need no codes. */
static void test_rope_and_no_codes(void **state)
{
    (void)state;
    test_random random = {seed};
    recipe r = ordinary;
    r.bits[3] = 0;
    tqkv_plan *plan = make_plan(&random, &r);
    const float inv_freq[1] = {1.5707964f};
    const tqkv_rope rope = {.style = TQKV_ROPE_PAIRS, .n_rot = 2, .inv_freq = inv_freq};
    tqkv_codec *codec;
    float x[64], back[64];
    uint8_t scale = 9;

    assert_int_equal(tqkv_codec_create(plan, 0, &rope, NULL, &codec), TQKV_OK);
    const float *mean = codec->heads[TQKV_SIDE_K][0].plan->mean;
    for (uint32_t d = 0; d < 64; d++)
        x[d] = test_random_normal(&random);
    assert_int_equal(tqkv_codec_encode(codec, 0, TQKV_SIDE_K, 3, 1, x, 64, 1, &scale, NULL, NULL),
                     TQKV_OK);
    assert_int_equal(scale, 1);
    assert_int_equal(tqkv_codec_decode(codec, 0, TQKV_SIDE_K, 3, 1, &scale, NULL, 1, back, 64),
                     TQKV_OK);
    assert_true(fabsf(back[0] + mean[1]) < 1e-5f &&
                fabsf(back[1] - mean[0]) < 1e-5f); /* a quarter turn */
    assert_memory_equal(back + 2, mean + 2, 62 * sizeof(float));
    tqkv_codec_destroy(codec);
    tqkvi_plan_destroy(plan);
}

static void test_no_memory(void **state)
{
    (void)state;
    tqkv_plan_layer shapes[2] = {test_shape(4, 2, 64, 80), {0}};
    tqkv_plan *plan;
    assert_int_equal(test_plan_make(NULL, seed, shapes, 2, 3, &plan), TQKV_OK);
    tqkv_codec *codec = NULL;
    size_t n_failed = 0;
    while (!codec) {
        test_memory memory = {.fail_call = n_failed + 1};
        const tqkv_allocator mem = test_memory_allocator(&memory);
        const tqkv_status status = tqkv_codec_create(plan, 0, NULL, &mem, &codec);
        if (status == TQKV_OK) {
            tqkv_codec_destroy(codec);
            assert_int_equal(memory.n_live, 0);
            break;
        }
        assert_int_equal(status, TQKV_ERR_NO_MEMORY);
        assert_null(codec);
        assert_int_equal(memory.n_live, 0);
        n_failed++;
    }
    assert_true(n_failed > 10);
    assert_int_equal(tqkv_codec_create(plan, 1, NULL, NULL, &codec),
                     TQKV_OK); /* a layer without a cache */
    assert_int_equal(tqkv_codec_row_bytes(codec, 0, TQKV_SIDE_K, 0), 0);
    tqkv_codec_destroy(codec);
    tqkv_plan_destroy(plan);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--seed") == 0)
        seed = strtoull(argv[2], NULL, 0);
    printf("seed %llu\n", (unsigned long long)seed);

    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_idempotent),
        cmocka_unit_test(test_idempotent_half),
        cmocka_unit_test(test_bad_rows),
        cmocka_unit_test(test_small_rows),
        cmocka_unit_test(test_any_bytes_decode),
        cmocka_unit_test(test_distortion),
        cmocka_unit_test(test_recode),
        cmocka_unit_test(test_tables_agree),
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_turn),
        cmocka_unit_test(test_invert),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_rope_and_no_codes),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
