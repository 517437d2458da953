/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exact kernels of every table against ref, bit for bit, and the tables of levels. Outputs lie
 * between guard bytes.
 *
 *     test_kernels [--seed N] [--bench]      --bench also times these kernels of every table
 */
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
#include "kernels/kernels.h"
#include "kernels/levels.h"
#include "test_arrays.h"

#define DIM_MAX 1024
#define EPS 0x1p-23
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static uint64_t seed = 20240229;
static const uint8_t widths[] = {0, 1, 2, 3, 4, 5, 6, 8};

/* The tables of this CPU; the first one is ref. */
static const tqkvk_table *const *tables(size_t *n)
{
    const tqkvk_table *const *all = tqkvk_all(n);
    assert_true(*n >= 1);
    assert_string_equal(all[0]->name, "ref");
    return all;
}

/* ---- levels and dispatch ---- */

static void test_levels(void **state)
{
    (void)state;
    for (size_t w = 1; w < COUNT(widths); w++) {
        const uint32_t bits = widths[w];
        const tqkvk_width *width = &tqkvk_widths[bits];
        const int8_t *levels = tqkvk_levels(bits);
        const uint32_t half = 1u << (bits - 1);
        assert_int_equal(levels[2 * half - 1], 127);
        assert_int_equal(levels[0], -127);
        for (uint32_t i = 1; i < 2 * half; i++)
            assert_true(levels[i] > levels[i - 1] || (bits == 8 && i == 1));
        for (uint32_t m = 0; m + 1 < width->n_magnitudes; m++)
            assert_int_equal(width->thresholds[m], levels[half + m] + levels[half + m + 1]);
        assert_true(tqkvk_step(bits) == width->step);
        assert_true(tqkvk_distortion(bits) < .4 * tqkvk_distortion(widths[w - 1]));
    }
    assert_true(tqkvk_distortion(0) == 1.0);
    assert_true(tqkvk_distortion(TQKVI_BITS_PLAIN) == 0.0);
    assert_true(tqkvk_scale_value(0) == 0.0f && tqkvk_scale_value(128) == 1.0f &&
                tqkvk_scale_value(144) == 2.0f);
    for (int i = 17; i < 256; i++) {
        assert_true(tqkvk_scale_values[i] == 2.0f * tqkvk_scale_values[i - 16]);
        assert_true(fabs((double)tqkvk_scale_values[i] / exp2((i - 128) / 16.0) - 1.0) <= .5 * EPS);
        assert_true(fabs((double)tqkvk_scale_values[i] * (double)tqkvk_scale_inverses[i] - 1.0) <=
                    1.01 * EPS);
    }
}

/* What the library says about distortion is what its tables do to N(0, 1). */
static void test_distortion(void **state)
{
    (void)state;
    for (size_t w = 1; w < COUNT(widths); w++) {
        const uint32_t bits = widths[w];
        double sum = 0.0, mass = 0.0;
        for (double x = -8.0; x < 8.0; x += 1.0 / 512) {
            double best = HUGE_VAL;
            for (uint32_t c = 0; c < 1u << bits; c++)
                best =
                    fmin(best, fabs(x - (double)tqkvk_levels(bits)[c] * (double)tqkvk_step(bits)));
            sum += exp(-.5 * x * x) * best * best;
            mass += exp(-.5 * x * x);
        }
        assert_true(fabs(sum / mass / tqkvk_distortion(bits) - 1.0) < .01);
    }
}

/* The committed tables are what the generator writes. */
static void test_generator(void **state)
{
    (void)state;
    if (system("python3 -c '' >/dev/null 2>&1") != 0)
        skip();
    assert_int_equal(system("python3 '" TQKV_SOURCE_DIR
                            "/scripts/gen_levels.py' --check '" TQKV_SOURCE_DIR
                            "/src/kernels/levels.c'"),
                     0);
}

static void test_dispatch(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    const char *isa = getenv("TQKV_ISA");
    const tqkvk_table *want = all[n - 1];
    for (size_t i = 0; i < n; i++) {
        const tqkvk_table *t = all[i];
        assert_true(t->transform && t->transform_half && t->hadamard && t->largest_bits &&
                    t->encode_rows &&
                    t->unpack_rows && t->unpack_block && t->half_to_float && t->float_to_half &&
                    t->dot_tile && t->softmax_step && t->accumulate_tile && t->round_query &&
                    t->score_blocks && t->scale_values && t->scale_scores && t->scale_weights && t->round_weights &&
                    t->weigh_blocks);
        if (isa && strcmp(isa, t->name) == 0)
            want = t;
    }
    assert_ptr_equal(tqkvk_get(), want);
    assert_int_equal(setenv("TQKV_ISA", want == all[0] ? "avx2" : "ref", 1),
                     0); /* too late to matter */
    assert_ptr_equal(tqkvk_get(), want);
}

/* ---- exact kernels ---- */

static void check_transform(test_random *random, size_t dim, float size)
{
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    float *m = test_random_floats(random, dim * dim, size);
    const size_t n_rows = 1 + test_random_u32(random) % 6;
    float *x = test_random_floats(random, n_rows * dim, 1.0f);
    float *want = test_aligned(n_rows * dim * sizeof(float));
    x[3] = -0.0f;
    x[5] = 1e-42f;
    x[7] = 1e30f;

    all[0]->transform(m, x, want, dim, n_rows);
    for (size_t j = 0; j < dim; j++) {
        double sum = 0.0, terms = 0.0;
        for (size_t i = 0; i < dim; i++) {
            sum += (double)m[i * dim + j] * (double)x[i];
            terms += fabs((double)m[i * dim + j] * (double)x[i]);
        }
        assert_true(fabs(sum - (double)want[j]) <= (double)dim * EPS * terms);
    }
    for (size_t i = 1; i < n; i++) {
        test_guarded y;
        test_guarded_init(&y, n_rows * dim * sizeof(float), 0);
        all[i]->transform(m, x, test_guarded_floats(&y), dim, n_rows);
        assert_memory_equal(y.data, want, n_rows * dim * sizeof(float));
        test_guarded_deinit(&y);
    }
    free(m);
    free(x);
    free(want);
}

/* f16 values of every size times powers of two: the bits of the matrix that they stand for. */
static void check_transform_half(test_random *random, size_t dim)
{
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    float *m = test_random_floats(random, dim * dim, 1.0f);
    float *factor = test_aligned(dim * sizeof(*factor));
    uint16_t *value = test_aligned(dim * dim * sizeof(*value));
    const size_t n_rows = 1 + test_random_u32(random) % 9;
    float *x = test_random_floats(random, n_rows * dim, 1.0f);
    float *want = test_aligned(n_rows * dim * sizeof(float));

    x[3] = -0.0f;
    x[5] = 1e-42f;
    x[7] = 1e30f;
    for (size_t j = 0; j < dim; j++)
        factor[j] = ldexpf(1.0f, j == 0 ? -100 : (int)(test_random_u32(random) % 40) - 20);
    for (size_t i = 0; i < dim * dim; i++) {
        value[i] = (uint16_t)test_random_u32(random); /* also subnormal, but finite */
        if ((value[i] & 0x7c00u) == 0x7c00u)
            value[i] &= 0x83ffu;
        m[i] = tqkvi_half_to_float(value[i]) * factor[i % dim];
    }
    all[0]->transform(m, x, want, dim, n_rows);
    for (size_t i = 0; i < n; i++) {
        const tqkvk_half_matrix half = {.value = value, .factor = factor};
        test_guarded y;
        test_guarded_init(&y, n_rows * dim * sizeof(float), 0);
        all[i]->transform_half(&half, x, test_guarded_floats(&y), dim, n_rows);
        assert_memory_equal(y.data, want, n_rows * dim * sizeof(float));
        test_guarded_deinit(&y);
    }
    free(m);
    free(factor);
    free(value);
    free(x);
    free(want);
}

static void test_transform_half(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t dim = 16; dim <= 272; dim += 16)
        for (int i = 0; i < 4; i++)
            check_transform_half(&random, dim);
    check_transform_half(&random, 1024);
}

static void test_transform(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t dim = 16; dim <= 272; dim += 16) {
        check_transform(&random, dim, 1.0f);
        check_transform(&random, dim, 1e-3f);
    }
    check_transform(&random, 1024, 10.0f);
}

/* Butterflies against the matrix that they stand for, and every table against ref. */
static void check_hadamard(test_random *random, size_t dim, size_t block)
{
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    float *factor = test_random_floats(random, dim, 1.0f);
    float *block_x = test_random_floats(random, dim + 1, 3.0f);
    const float *x = block_x + test_random_u32(random) % 2;
    float *want = test_aligned(dim * sizeof(float));

    all[0]->hadamard(factor, x, want, dim, block);
    for (size_t j = 0; j < dim; j++) {
        double sum = 0.0, terms = 0.0;
        for (size_t i = j / block * block; i < j / block * block + block; i++) {
            const double term = (double)factor[i] * (double)x[i];
            size_t both = i & j & (block - 1);
            bool odd = false;
            for (; both != 0; both &= both - 1)
                odd = !odd;
            sum += odd ? -term : term;
            terms += fabs(term);
        }
        assert_true(fabs(sum - (double)want[j]) <= 12 * EPS * terms);
    }
    for (size_t i = 1; i < n; i++) {
        test_guarded y;
        test_guarded_init(&y, dim * sizeof(float), 0);
        all[i]->hadamard(factor, x, test_guarded_floats(&y), dim, block);
        assert_memory_equal(y.data, want, dim * sizeof(float));
        test_guarded_deinit(&y);
    }
    free(factor);
    free(block_x);
    free(want);
}

static void test_hadamard(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t dim = 16; dim <= 1024; dim += 16) {
        for (size_t block = 16; dim % block == 0; block *= 2)
            check_hadamard(&random, dim, block);
    }
}

/* Rows of zeros, with denormals, infinities and NaN of both signs in every place. */
static void test_largest_bits(void **state)
{
    (void)state;
    size_t n_tables;
    const tqkvk_table *const *all = tables(&n_tables);
    static const uint32_t values[] = {0,           0x80000000u, 1,           0x80000001u,
                                      0x7f7fffffu, 0xff7fffffu, 0x7f800000u, 0xff800000u,
                                      0x7f800001u, 0xffffffffu};
    test_random random = {seed};
    for (size_t i = 0; i < 3000; i++) {
        const size_t n = 16 * (test_random_u32(&random) % 9), offset = test_random_u32(&random) % 4;
        /* Ends where its block ends, so that sanitizers see a read past it. */
        float *block = malloc((offset + n + 1) * sizeof(float));
        assert_non_null(block);
        float *x = block + 1 + offset;
        uint32_t want = 0;
        memset(block, 0, (offset + n + 1) * sizeof(float));
        for (size_t k = 0; k < n && i % 7 != 0; k++) {
            const uint32_t draw = test_random_u32(&random);
            const uint32_t bits = draw % 16 == 0 ? values[draw / 16 % (i % COUNT(values) + 1)]
                                                 : draw >> 20 << 20 & 0xbf800000u;
            memcpy(x + k, &bits, sizeof(bits));
            want = (bits & 0x7fffffffu) > want ? bits & 0x7fffffffu : want;
        }
        for (size_t t = 0; t < n_tables; t++)
            assert_int_equal(all[t]->largest_bits(x, n), want);
        free(block);
    }
}

/* Every half, and floats around every half, at every offset of both arrays. */
static void test_half(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    enum { N = 65536 };
    uint16_t *halves = test_aligned(N * sizeof(uint16_t) + 64);
    for (size_t i = 0; i < N; i++)
        halves[i] = (uint16_t)i;
    for (size_t t = 0; t < n; t++) {
        for (size_t offset = 0; offset < 3; offset++) {
            test_guarded out;
            test_guarded_init(&out, (N - 3) * sizeof(float), 4 * offset);
            uint8_t *in = test_aligned(N * sizeof(uint16_t) + 64);
            memcpy(in + offset, halves, N * sizeof(uint16_t));
            all[t]->half_to_float(in + offset, test_guarded_floats(&out), N - 3);
            for (size_t i = 0; i < N - 3; i++) {
                const float want = tqkvi_half_to_float((uint16_t)i);
                const float got = test_guarded_floats(&out)[i];
                assert_true(isnan(want) ? isnan(got) : memcmp(&want, &got, sizeof(want)) == 0);
            }
            test_guarded_deinit(&out);
            free(in);
        }
    }
    free(halves);
}

static void test_half_rounding(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    test_random random = {seed};
    enum { N = 4099 };
    float *x = test_aligned(N * sizeof(float));
    for (size_t round = 0; round < 40; round++) {
        for (size_t i = 0; i < N; i++) {
            uint32_t bits = test_random_u32(&random);
            if (i % 4 == 0) /* ties and their neighbours */
                bits = (bits & 0xffffe000u) | (uint32_t)(0x0fff + i / 4 % 3);
            if (i % 4 == 1) /* the range of halves */
                bits = (bits & 0x80ffffffu) | (0x33000000u + (uint32_t)(i / 4 % 20) * 0x1000000u);
            memcpy(x + i, &bits, sizeof(bits));
        }
        for (size_t t = 0; t < n; t++) {
            test_guarded out;
            test_guarded_init(&out, N * sizeof(uint16_t), round % 5);
            all[t]->float_to_half(x, out.data, N);
            for (size_t i = 0; i < N; i++) {
                uint16_t got;
                memcpy(&got, out.data + 2 * i, sizeof(got));
                assert_int_equal(isnan(x[i]) ? got & 0x7e00 : got,
                                 isnan(x[i]) ? 0x7e00 : tqkvi_float_to_half(x[i]));
            }
            test_guarded_deinit(&out);
        }
    }
    free(x);
}

/* Widths of a row: all alike, or drawn from a few, or drawn from all. */
static tqkvi_layout random_layout(test_random *random, uint32_t n_units)
{
    uint8_t bits[TQKV_UNITS_MAX];
    tqkvi_layout layout;
    const uint32_t kind = test_random_u32(random) % 3;
    const uint32_t first = test_random_u32(random) % (uint32_t)COUNT(widths);
    for (uint32_t u = 0; u < n_units; u++) {
        const uint32_t draw = test_random_u32(random);
        const uint32_t i = kind == 0 ? first : kind == 1 ? first + draw % 2 : draw;
        bits[u] = widths[i % COUNT(widths)];
    }
    assert_int_equal(tqkvi_layout_init(&layout, bits, n_units), TQKV_OK);
    return layout;
}

/* Rows that go through every branch of the search. */
static void random_row(test_random *random, size_t dim, float *y)
{
    const uint32_t kind = test_random_u32(random) % 15;
    const double octave = 16.0 * test_random_uniform(random) - 8.0;
    const float size = (float)exp2(octave);
    const float same = fabsf(test_random_normal(random));

    for (size_t d = 0; d < dim; d++) {
        const float g = test_random_normal(random);
        switch (kind) {
        case 0: /* one spike */
            y[d] = d == dim / 3 ? size * 9.0f : 0.0f;
            break;
        case 1: /* heavy tails */
            y[d] = size * g / (fabsf(test_random_normal(random)) + 1e-3f);
            break;
        case 2: /* one magnitude */
            y[d] = g < 0.0f ? -size * same : size * same;
            break;
        case 3: /* a few whole levels */
            y[d] = size * rintf(2.0f * g) * tqkvk_step(8) * 16.0f;
            break;
        case 4: /* huge and tiny */
            y[d] = g * (float)exp2(60.0 * test_random_uniform(random) - 30.0);
            break;
        case 5: /* out of reach */
            y[d] = g * (d % 2 ? 1e30f : 1e-30f);
            break;
        case 6: /* small for the smallest scale, denormals, signed zeros */
            y[d] = d % 3 == 0 ? -0.0f : g * (d % 3 == 1 ? 1e-41f : 1e-3f);
            break;
        case 8: /* tiny units beside large ones, large ones first or last */
            y[d] = size * g * (float)exp2(-9.0 * (double)(same < .7f ? d : dim - d) / (double)dim);
            break;
        case 9: /* about half of the smallest level of 8 bits: zeros at some scales, not at others */
            y[d] = d % 5 == 0 ? copysignf(.5f + 1e-6f * g, g) * tqkvk_step(8) *
                                    tqkvk_scale_value((uint8_t)(1 + (int)(4.0f * same) % 5))
                              : 0.0f;
            break;
        case 10: /* one far beyond the others */
            y[d] = d == dim / 2 ? size * 300.0f : size * g;
            break;
        case 7: /* sparse */
            y[d] = fabsf(g) > 1.2f ? size * g : 0.0f;
            break;
        default:
            y[d] = size * g;
            break;
        }
    }
}

static uint8_t encode_row(const tqkvk_table *table, const tqkvi_layout *layout, const float *weight,
                          const float *y, uint8_t *codes)
{
    uint8_t scale;
    table->encode_rows(layout, weight, y, 1, &scale, codes);
    return scale;
}

/* y: [n_rows][dim] */
static void check_rows(test_random *random, const tqkvi_layout *layout, const float *weight,
                       const float *y, size_t n_rows)
{
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    const size_t n_bytes = n_rows * layout->row_bytes;
    uint8_t *want = test_aligned(n_bytes), *want_scales = test_aligned(n_rows);
    all[0]->encode_rows(layout, weight, y, n_rows, want_scales, want);

    for (size_t r = 0; r < n_rows; r++)
        assert_true(want_scales[r] >= 1);
    for (size_t t = 1; t < n; t++) {
        test_guarded codes, scales;
        test_guarded_init(&codes, n_bytes, test_random_u32(random) % 64);
        test_guarded_init(&scales, n_rows, test_random_u32(random) % 64);
        all[t]->encode_rows(layout, weight, y, n_rows, scales.data, codes.data);
        assert_memory_equal(scales.data, want_scales, n_rows);
        assert_memory_equal(codes.data, want, n_bytes);
        test_guarded_deinit(&codes);
        test_guarded_deinit(&scales);
    }
    free(want);
    free(want_scales);
}

static void random_weight(test_random *random, uint32_t n_units, float *weight)
{
    const double octaves = test_random_u32(random) % 2 ? 20.0 : 3.0;
    for (uint32_t u = 0; u < n_units; u++)
        weight[u] = (float)exp2(-octaves * test_random_uniform(random));
}

static void test_encode_rows(void **state)
{
    (void)state;
    test_random random = {seed};
    float *y = test_aligned(9 * DIM_MAX * sizeof(float));
    float *weight = test_aligned(TQKV_UNITS_MAX * sizeof(float));
    for (size_t i = 0; i < 4000; i++) {
        const uint32_t n_units = i % 100 == 0 ? 64 : 1 + test_random_u32(&random) % 9;
        const size_t dim = n_units * TQKV_UNIT_CHANNELS, n_rows = test_random_u32(&random) % 10;
        tqkvi_layout layout = random_layout(&random, n_units);
        if (i % 4 == 0) { /* what the first tier of every plan has */
            memset(layout.bits, 8, n_units);
            layout.row_bytes = 16 * n_units;
        }
        random_weight(&random, n_units, weight);
        for (size_t r = 0; r < n_rows; r++)
            random_row(&random, dim, y + r * dim);
        check_rows(&random, &layout, weight, y, n_rows);
    }
    free(y);
    free(weight);
}

/* Values on the thresholds of every width and one ulp beside them. */
static void test_encode_ties(void **state)
{
    (void)state;
    test_random random = {seed};
    float *y = test_aligned(64 * sizeof(float));
    float *weight = test_aligned(4 * sizeof(float));
    for (size_t i = 0; i < 4; i++)
        weight[i] = 1.0f;
    for (size_t i = 0; i < 4000; i++) {
        const uint8_t bits = widths[1 + i % (COUNT(widths) - 1)];
        const tqkvk_width *width = &tqkvk_widths[bits];
        const uint8_t four[4] = {bits, bits, bits, bits};
        tqkvi_layout layout;
        assert_int_equal(tqkvi_layout_init(&layout, four, 4), TQKV_OK);
        for (size_t d = 0; d < 64; d++) {
            const uint32_t draw = test_random_u32(&random);
            const uint32_t m = width->n_magnitudes > 1 ? draw % (width->n_magnitudes - 1) : 0;
            float v = .5f * (float)width->thresholds[m] * width->step;
            v = draw & 0x10000   ? nextafterf(v, HUGE_VALF)
                : draw & 0x20000 ? nextafterf(v, 0.0f)
                                 : v;
            y[d] = (draw & 0x40000 ? -v : v) * tqkvk_scale_values[100 + i % 60];
        }
        check_rows(&random, &layout, weight, y, 1);
    }
    free(y);
    free(weight);
}

/* A row codes to itself, at the scale and with the bytes that made it. */
static void test_encode_again(void **state)
{
    (void)state;
    test_random random = {seed};
    const tqkvk_table *kernels = tqkvk_get();
    float *y = test_aligned(DIM_MAX * sizeof(float));
    float *weight = test_aligned(TQKV_UNITS_MAX * sizeof(float));
    uint8_t codes[2 * DIM_MAX], again[2 * DIM_MAX];
    for (size_t i = 0; i < 40000; i++) {
        const uint32_t n_units = 1 + test_random_u32(&random) % 8;
        const tqkvi_layout layout = random_layout(&random, n_units);
        random_weight(&random, n_units, weight);
        random_row(&random, n_units * TQKV_UNIT_CHANNELS, y);
        const uint8_t scale = encode_row(kernels, &layout, weight, y, codes);
        kernels->unpack_rows(&layout, codes, 1, y);
        for (uint32_t d = 0; d < n_units * TQKV_UNIT_CHANNELS; d++) {
            const float noise = (float)(test_random_uniform(&random) - .5) * 8.0f * (float)EPS;
            y[d] = tqkvk_scale_value(scale) * y[d];
            y[d] += i % 2 ? y[d] * noise : 0.0f;
        }
        assert_int_equal(encode_row(kernels, &layout, weight, y, again), scale);
        assert_memory_equal(codes, again, layout.row_bytes);
    }
    free(y);
    free(weight);
}

/*
 * Equal channels whose level is a tie between 125 and 126 of 8 bits: 126 exists at twice the scale
 * too, as 63, and rounding decides which of the scales has the smaller error.
 */
static void test_encode_two_scales(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    test_random random = {seed};
    const uint8_t bits[1] = {8};
    const float weight[1] = {1.0f};
    _Alignas(64) float y[32];
    uint8_t codes[16], again[16];
    tqkvi_layout layout;
    assert_int_equal(tqkvi_layout_init(&layout, bits, 1), TQKV_OK);
    for (uint32_t i = 0; i < 16 * 12 * 7; i++) {
        const int scale = 224 + (int)(i % 16);
        const uint32_t n_equal = 2 + i / 16 % 12;
        float v = 125.5f * tqkvk_step(8) * tqkvk_scale_values[scale];
        for (uint32_t k = 0; k < i / 192; k++)
            v = nextafterf(v, k < 3 ? HUGE_VALF : 0.0f);
        for (uint32_t d = 0; d < 16; d++)
            y[d] = d < n_equal ? v : 0.0f;
        check_rows(&random, &layout, weight, y, 1);
        for (size_t t = 0; t < n; t++) {
            _Alignas(64) float back[32];
            const uint8_t first = encode_row(all[t], &layout, weight, y, codes);
            all[t]->unpack_rows(&layout, codes, 1, back);
            for (uint32_t d = 0; d < 16; d++)
                back[d] = tqkvk_scale_value(first) * back[d];
            assert_int_equal(encode_row(all[t], &layout, weight, back, again), first);
            assert_memory_equal(codes, again, sizeof(codes));
        }
    }
}

/* Random bytes are valid codes of every width. Offsets go through all of a vector. */
static void test_unpack_rows(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tables(&n);
    test_random random = {seed};
    for (size_t i = 0; i < 600; i++) {
        const uint32_t n_units = i % 50 == 0 ? 64 : 1 + test_random_u32(&random) % 9;
        const size_t dim = n_units * TQKV_UNIT_CHANNELS;
        const tqkvi_layout layout = random_layout(&random, n_units);
        const size_t n_rows = i % 7 == 0 ? 64 : test_random_u32(&random) % 5;
        const size_t bytes = n_rows * layout.row_bytes;
        /* Ends where its block ends, so that sanitizers see a read past it. */
        uint8_t *block = malloc(bytes + 64);
        assert_non_null(block);
        memset(block, 0, bytes + 64);
        uint8_t *codes = block + 64 - i % 64;
        float *want = test_aligned(n_rows * dim * sizeof(float));
        for (size_t k = 0; k < bytes; k++)
            codes[k] = (uint8_t)test_random_u32(&random);
        all[0]->unpack_rows(&layout, codes, n_rows, want);
        for (size_t t = 1; t < n; t++) {
            test_guarded out;
            test_guarded_init(&out, n_rows * dim * sizeof(float), 0);
            all[t]->unpack_rows(&layout, codes, n_rows, test_guarded_floats(&out));
            assert_memory_equal(out.data, want, n_rows * dim * sizeof(float));
            test_guarded_deinit(&out);
        }
        free(block);
        free(want);
    }
}

/* ---- --bench ---- */

/* Everything a timed call may need. */
typedef struct bench {
    const tqkvk_table *table;
    size_t dim;
    tqkvi_layout layout;
    float *m, *y, *weight, *rows, *out;
    uint8_t *codes;
} bench;

static void bench_transform(void *arg)
{
    const bench *b = arg;
    b->table->transform(b->m, b->y, b->out, b->dim, 1);
}

/* 64 different rows, so that branches cannot learn one row by heart. */
static void bench_encode(void *arg)
{
    const bench *b = arg;
    uint8_t scales[64];
    b->table->encode_rows(&b->layout, b->weight, b->rows, 64, scales, b->codes);
}

static void bench_unpack(void *arg)
{
    const bench *b = arg;
    b->table->unpack_rows(&b->layout, b->codes, 64, b->out);
}

static void bench_half_to_float(void *arg)
{
    const bench *b = arg;
    b->table->half_to_float(b->codes, b->out, 64 * b->dim);
}

static void bench_float_to_half(void *arg)
{
    const bench *b = arg;
    b->table->float_to_half(b->rows, b->codes, 64 * b->dim);
}

static void bench_widths(bench *b)
{
    for (size_t w = 1; w <= COUNT(widths); w++) {
        char label[64], name[32];
        uint8_t bits[TQKV_UNITS_MAX];
        const bool mixed = w == COUNT(widths);
        for (size_t u = 0; u < COUNT(bits); u++)
            bits[u] = mixed ? (uint8_t[]){5, 4, 2, 2}[u % 4] : widths[w];
        assert_int_equal(tqkvi_layout_init(&b->layout, bits, (uint32_t)b->dim / 16), TQKV_OK);
        snprintf(name, sizeof(name), mixed ? "5,4,2,2 bits" : "%u bits", bits[0]);
        snprintf(label, sizeof(label), "%s d=%zu encode_rows %s", b->table->name, b->dim, name);
        test_time(label, bench_encode, b, 64.0);
        snprintf(label, sizeof(label), "%s d=%zu unpack_rows 64 x %s", b->table->name, b->dim,
                 name);
        test_time(label, bench_unpack, b, 1.0);
    }
}

static void bench_table(const tqkvk_table *table, size_t dim)
{
    char label[64];
    test_random random = {seed};
    bench b = {.table = table, .dim = dim};
    b.m = test_random_floats(&random, dim * dim, .1f);
    b.y = test_random_floats(&random, dim, 1.0f);
    b.weight = test_random_floats(&random, TQKV_UNITS_MAX, 0.0f);
    b.rows = test_random_floats(&random, 64 * dim, 1.0f);
    b.out = test_aligned(64 * dim * sizeof(float));
    b.codes = test_aligned(64 * dim * 2);
    for (size_t i = 0; i < TQKV_UNITS_MAX; i++)
        b.weight[i] = 1.0f;

    snprintf(label, sizeof(label), "%s d=%zu transform", table->name, dim);
    test_time(label, bench_transform, &b, 1.0);
    bench_widths(&b);
    snprintf(label, sizeof(label), "%s d=%zu float_to_half 64 rows", table->name, dim);
    test_time(label, bench_float_to_half, &b, 1.0);
    snprintf(label, sizeof(label), "%s d=%zu half_to_float 64 rows", table->name, dim);
    test_time(label, bench_half_to_float, &b, 1.0);
    free(b.m);
    free(b.y);
    free(b.weight);
    free(b.rows);
    free(b.out);
    free(b.codes);
}

int main(int argc, char **argv)
{
    const bool with_bench = test_arguments(argc, argv, &seed);

    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_levels),       cmocka_unit_test(test_distortion),
        cmocka_unit_test(test_generator),    cmocka_unit_test(test_dispatch),
        cmocka_unit_test(test_transform),    cmocka_unit_test(test_transform_half),
        cmocka_unit_test(test_hadamard),
        cmocka_unit_test(test_largest_bits),
        cmocka_unit_test(test_half),         cmocka_unit_test(test_half_rounding),
        cmocka_unit_test(test_encode_rows),  cmocka_unit_test(test_encode_ties),
        cmocka_unit_test(test_encode_again), cmocka_unit_test(test_encode_two_scales),
        cmocka_unit_test(test_unpack_rows),
    };
    const int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (with_bench) {
        size_t n;
        const tqkvk_table *const *all = tables(&n);
        for (size_t t = 0; t < n; t++) {
            bench_table(all[t], 64);
            bench_table(all[t], 128);
        }
    }
    return n_failed;
}
