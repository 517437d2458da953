/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows in blocks, and the kernels that read blocks: every table against ref, outputs between guard
 * bytes.
 *
 *     test_blocks [--seed N] [--bench]      --bench also times these kernels of every table
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

/* ---- integer scores and weights ---- */

enum { BLOCKS_MAX = 4, QUERIES_MAX = 37 };

static const uint32_t largest_weights[] = {TQKVK_WEIGHT_MAX, TQKVK_COARSE_WEIGHT_MAX};
static const size_t query_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, QUERIES_MAX};

static tqkvk_query_unit *random_queries(test_random *random, size_t n, bool extreme)
{
    tqkvk_query_unit *q = test_aligned(n * sizeof(*q));
    for (size_t u = 0; u < n; u++) {
        q[u] = (tqkvk_query_unit){.factor = (float)test_random_uniform(random)};
        for (size_t d = 0; d < 16; d++) {
            const uint32_t draw = test_random_u32(random);
            const int value = (int)(draw % (2 * TQKVK_Q_MAX + 1)) - TQKVK_Q_MAX;
            q[u].q[d] = (int8_t)(extreme ? (u % 2 ? TQKVK_Q_MAX : -TQKVK_Q_MAX) : value);
            q[u].start -= 128 * q[u].q[d];
        }
    }
    return q;
}

/* kind 0: normal, 1: huge, 2: too small, 3: a NaN, 4: an infinity. */
static void check_rounded_unit(const float *y, const tqkvk_query_unit *q,
                               const tqkvk_query_unit *low, uint32_t kind)
{
    int32_t sum = 0, low_sum = 0;
    float top = 0;
    for (size_t d = 0; d < 16; d++) {
        const double got = (double)q->factor * q->q[d] + (double)low->factor * low->q[d];
        if (kind < 2)
            assert_true(fabs(got - (double)y[d]) <= .51 * (double)low->factor);
        else
            assert_true(q->q[d] == 0 && low->q[d] == 0);
        assert_true(abs(q->q[d]) <= TQKVK_Q_MAX && abs(low->q[d]) <= TQKVK_Q_MAX);
        sum += q->q[d];
        low_sum += low->q[d];
        top = fabsf(y[d]) > top ? fabsf(y[d]) : top;
    }
    assert_true(-128 * sum == q->start && -128 * low_sum == low->start);
    if (kind < 2)
        assert_true(q->factor == top / TQKVK_Q_MAX && low->factor == q->factor / TQKVK_LOW_PARTS);
    else
        assert_true(kind == 2 ? q->factor == 0 && low->factor == 0
                              : isnan(q->factor) && isnan(low->factor));
}

static void test_round_query(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    static const float sizes[] = {1, 1e36f, 1e-33f, 1, 1};
    for (size_t i = 0; i < 400; i++) {
        const size_t n_units = 1 + i % 12, bytes = n_units * sizeof(tqkvk_query_unit);
        const uint32_t kind = i % 8 < 4 ? 0 : (uint32_t)(i % 8 - 3);
        float *y = test_random_floats(&random, n_units * 16, sizes[kind]);
        tqkvk_query_unit *want = test_aligned(bytes), *want_low = test_aligned(bytes);
        for (size_t u = 0; u < n_units && kind >= 3; u++)
            y[16 * u + test_random_u32(&random) % 16] = kind == 3 ? NAN : -INFINITY;
        all[0]->round_query(y, n_units, want, want_low);
        for (size_t u = 0; u < n_units; u++)
            check_rounded_unit(y + 16 * u, &want[u], &want_low[u], kind);
        for (size_t t = 0; t < n; t++) {
            test_guarded q, low;
            test_guarded_init(&q, bytes, 0);
            test_guarded_init(&low, bytes, 0);
            all[t]->round_query(y, n_units, (tqkvk_query_unit *)(void *)q.data,
                                i % 3 ? (tqkvk_query_unit *)(void *)low.data : NULL);
            for (size_t u = 0; u < n_units && kind >= 3; u++) /* NaNs may differ */
                ((tqkvk_query_unit *)(void *)q.data)[u].factor = want[u].factor;
            assert_memory_equal(q.data, want, bytes);
            if (i % 3 && kind < 3)
                assert_memory_equal(low.data, want_low, bytes);
            test_guarded_deinit(&q);
            test_guarded_deinit(&low);
        }
        free(y);
        free(want);
        free(want_low);
    }
}

/* n_blocks sections; all bits set for the largest levels. */
static void random_blocks(test_random *random, const tqkvi_layout *layout, size_t n_blocks,
                          bool extreme, codes *c, const uint8_t **data)
{
    for (size_t p = 0; p < n_blocks; p++) {
        c[p] = random_codes(random, layout);
        if (extreme)
            memset(c[p].data, 0xff, c[p].bytes);
        data[p] = c[p].data;
    }
}

/* Score of a query with a row of levels times steps: the terms' sum, and the sum of their sizes. */
static double exact_score(const tqkvi_layout *layout, const tqkvk_query_unit *q, const float *row,
                          double *terms)
{
    double score = 0;
    *terms = 0;
    for (uint32_t u = 0; u < layout->n_units; u++) {
        const double step = (double)tqkvk_step(layout->bits[u]);
        double sum = 0;
        for (size_t d = 0; d < 16 && step > 0; d++)
            sum += q[u].q[d] * rint((double)row[16 * u + d] / step);
        score += sum * step * (double)q[u].factor;
        *terms += fabs(sum * step * (double)q[u].factor);
    }
    return score;
}

static void check_scores(test_random *random, size_t i)
{
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    const bool extreme = i % 5 == 0;
    const tqkvi_layout layout = random_layout(random, random_units(random, i));
    const size_t n_q = query_counts[i % COUNT(query_counts)];
    const size_t n_blocks = 1 + test_random_u32(random) % BLOCKS_MAX;
    const size_t n_tokens = n_blocks * TQKVI_BLOCK_TOKENS, dim = 16 * (size_t)layout.n_units;
    const size_t stride = i % 2 ? 64 : n_tokens;
    const uint8_t *data[BLOCKS_MAX];
    codes c[BLOCKS_MAX];
    float *rows = test_aligned(n_tokens * dim * sizeof(float));
    float *start = test_random_floats(random, n_q * stride, 1);

    random_blocks(random, &layout, n_blocks, extreme, c, data);
    for (size_t p = 0; p < n_blocks; p++)
        all[0]->unpack_block(&layout, TQKV_SIDE_K, data[p], rows + p * TQKVI_BLOCK_TOKENS * dim);
    tqkvk_query_unit *q = random_queries(random, n_q * layout.n_units, extreme);
    for (size_t t = 0; t < n; t++) {
        test_guarded out;
        test_guarded_init(&out, n_q * stride * sizeof(float), 0);
        memcpy(out.data, start, n_q * stride * sizeof(float));
        all[t]->score_blocks(&layout, data, n_blocks, q, n_q, test_guarded_floats(&out), stride);
        for (size_t k = 0; k < n_q * n_tokens; k++) {
            const size_t a = k / n_tokens, b = k % n_tokens;
            const double old = (double)start[a * stride + b];
            double terms;
            const double want =
                old + exact_score(&layout, q + a * layout.n_units, rows + b * dim, &terms);
            assert_true(fabs((double)test_guarded_floats(&out)[a * stride + b] - want) <=
                        (layout.n_units + 2) * 0x1p-23 * (terms + fabs(old)));
        }
        test_guarded_deinit(&out);
    }
    for (size_t p = 0; p < n_blocks; p++)
        free(c[p].memory);
    free(q);
    free(rows);
    free(start);
}

static void test_score_blocks(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t i = 0; i < 240; i++)
        check_scores(&random, i);
}

static void check_weigh(test_random *random, size_t i)
{
    const uint32_t most = largest_weights[i / 5 % 2];
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    const bool extreme = i % 5 == 0;
    const tqkvi_layout layout = random_layout(random, random_units(random, i));
    const size_t n_q = query_counts[i % COUNT(query_counts)];
    const size_t n_blocks = 1 + test_random_u32(random) % BLOCKS_MAX;
    const size_t n_tokens = n_blocks * TQKVI_BLOCK_TOKENS, dim = 16 * (size_t)layout.n_units;
    const size_t stride = n_tokens + i % 3;
    const uint8_t *data[BLOCKS_MAX];
    codes c[BLOCKS_MAX];
    float *rows = test_aligned(n_tokens * dim * sizeof(float));
    float *f = test_random_floats(random, n_q, 1), *g = test_random_floats(random, n_q, .1f);
    float *o = test_random_floats(random, n_q * dim, 1);
    uint16_t *w = test_aligned(n_q * stride * sizeof(*w));

    random_blocks(random, &layout, n_blocks, extreme, c, data);
    for (size_t p = 0; p < n_blocks; p++)
        all[0]->unpack_block(&layout, TQKV_SIDE_V, data[p], rows + p * TQKVI_BLOCK_TOKENS * dim);
    for (size_t b = 0; b < n_q * stride; b++)
        w[b] = (uint16_t)(extreme ? most : test_random_u32(random) % (most + 1));
    for (size_t t = 0; t < n; t++) {
        test_guarded out;
        test_guarded_init(&out, n_q * dim * sizeof(float), 0);
        memcpy(out.data, o, n_q * dim * sizeof(float));
        all[t]->weigh_blocks(&layout, data, n_blocks, most, w, stride, n_q, f, g,
                             test_guarded_floats(&out));
        for (size_t k = 0; k < n_q * dim; k++) {
            const size_t a = k / dim;
            const double old = (double)o[k] * (double)f[a];
            double sum = 0;
            const double step = (double)tqkvk_step(layout.bits[k % dim / 16]);
            for (size_t b = 0; b < n_tokens && step > 0; b++)
                sum += w[a * stride + b] * rint((double)rows[b * dim + k % dim] / step);
            sum *= step * (double)g[a];
            const double bound = 0x1p-21 * (fabs(old) + fabs(sum));
            assert_true(fabs((double)test_guarded_floats(&out)[k] - old - sum) <= bound);
        }
        test_guarded_deinit(&out);
    }
    for (size_t p = 0; p < n_blocks; p++)
        free(c[p].memory);
    free(rows);
    free(f);
    free(g);
    free(o);
    free(w);
}

static void test_weigh_blocks(void **state)
{
    (void)state;
    test_random random = {seed};
    for (size_t i = 0; i < 240; i++)
        check_weigh(&random, i);
}

static void test_scale_values(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    uint8_t bytes[256];
    for (size_t t = 0; t < n; t++) {
        for (size_t count = 16; count <= 256; count += 16) {
            const size_t first = 256 - count;
            test_guarded out;
            test_guarded_init(&out, count * sizeof(float), 4 * (count % 3));
            for (size_t b = 0; b < count; b++)
                bytes[first + b] = (uint8_t)(first + b);
            all[t]->scale_values(bytes + first, count, test_guarded_floats(&out));
            for (size_t b = 0; b < count; b++)
                assert_true(test_guarded_floats(&out)[b] == tqkvk_scale_value(bytes[first + b]));
            test_guarded_deinit(&out);
        }
    }
}

static void test_scale_scores(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    enum { N = 64 };
    float *scale = test_aligned(N * sizeof(float));
    float *start = test_random_floats(&random, N, 3);
    for (size_t b = 0; b < N; b++)
        scale[b] = tqkvk_scale_value((uint8_t)(b % 7 == 0 ? 0 : test_random_u32(&random)));
    for (size_t t = 0; t < n; t++) {
        for (size_t count = 16; count <= N; count += 16) {
            test_guarded out;
            test_guarded_init(&out, count * sizeof(float), 4 * t);
            memcpy(out.data, start, count * sizeof(float));
            all[t]->scale_scores(test_guarded_floats(&out), scale, count, .3f);
            for (size_t b = 0; b < count; b++) {
                const double product = (double)start[b] * (double)scale[b];
                const double want = scale[b] == 0.0f ? 0 : product + (double).3f;
                assert_true(fabs((double)test_guarded_floats(&out)[b] - want) <=
                            0x1p-22 * (fabs(product) + .3));
            }
            test_guarded_deinit(&out);
        }
    }
    free(scale);
    free(start);
}

static void check_scale_weights(const tqkvk_table *table, const float *start, const float *scale,
                                size_t n, size_t offset)
{
    test_guarded out;
    double sum = 0, want_sum = 0;

    test_guarded_init(&out, n * sizeof(float), offset);
    memcpy(out.data, start, n * sizeof(float));
    const float kept = table->scale_weights(test_guarded_floats(&out), scale, n);
    for (size_t b = 0; b < n; b++) {
        want_sum += scale[b] == 0.0f ? 0 : (double)start[b];
        sum += fabs((double)start[b]);
        assert_true(test_guarded_floats(&out)[b] == start[b] * scale[b]);
    }
    assert_true(fabs((double)kept - want_sum) <= (double)n * 0x1p-23 * sum);
    test_guarded_deinit(&out);
}

static void test_scale_weights(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    enum { N = 64 };
    float *scale = test_aligned(N * sizeof(float));
    float *start = test_random_floats(&random, N, 3);
    for (size_t b = 0; b < N; b++) {
        scale[b] = tqkvk_scale_value((uint8_t)(b % 5 == 3 ? 0 : test_random_u32(&random)));
        start[b] = fabsf(start[b]);
    }
    for (size_t t = 0; t < n; t++)
        for (size_t count = 16; count <= N; count += 16)
            check_scale_weights(all[t], start, scale, count, 4 * t);
    free(scale);
    free(start);
}

/* Weights of several kinds: even, steep, one alone, none, too small to count. */
static void random_weights(test_random *random, size_t i, float *p, float *scale, size_t n)
{
    static const float steepness[] = {0, .5f, 3, 20};
    for (size_t b = 0; b < n; b++) {
        p[b] = expf(-steepness[i % 4] * fabsf(test_random_normal(random)));
        const uint8_t byte = (uint8_t)(120 + test_random_u32(random) % 16);
        scale[b] = tqkvk_scale_value(i % 8 < 4 ? byte : 77);
        if (i % 5 == 1)
            p[b] = b == n / 2 ? 1.0f : .003f;
        if (i % 5 == 2 && b % 3 == 0)
            scale[b] = 0;
        if (i % 16 == 15)
            p[b] *= i % 32 == 31 ? 0 : 1e-36f;
    }
}

static void check_rounding(const tqkvk_table *table, const float *p, const float *scale, size_t n,
                           uint32_t most)
{
    const tqkvk_table *ref = tqkvk_all(&(size_t){0})[0];
    uint16_t want[64];
    test_guarded out;
    float kept, want_kept;
    double top = 0;

    test_guarded_init(&out, n * sizeof(*want), 2 * (n % 5));
    uint16_t *w = (uint16_t *)(void *)out.data;
    const float g = table->round_weights(p, scale, n, most, w, &kept);
    assert_true(ref->round_weights(p, scale, n, most, want, &want_kept) == g);
    assert_memory_equal(w, want, n * sizeof(*want));
    assert_true(fabsf(kept - want_kept) <= 64 * 0x1p-24f * want_kept);
    for (size_t b = 0; b < n; b++)
        top = fmax(top, (double)(p[b] * scale[b]));
    assert_true(fabs((double)g * most - top) <= 0x1p-22 * top + 1e-40);
    for (size_t b = 0; b < n && top >= (double)TQKVK_TINY; b++) {
        const double v = (double)p[b] * (double)scale[b];
        assert_true(w[b] <= most);
        assert_true(fabs((double)g * w[b] - v) <= .5 * (double)g + 0x1p-22 * top);
    }
    test_guarded_deinit(&out);
}

static void test_round_weights(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    float *p = test_aligned(64 * sizeof(float)), *scale = test_aligned(64 * sizeof(float));
    for (size_t i = 0; i < 2000; i++) {
        const size_t count = 16 * (1 + i % 4);
        random_weights(&random, i / 4, p, scale, count);
        for (size_t t = 0; t < n; t++)
            check_rounding(all[t], p, scale, count, largest_weights[i / 16 % 2]);
    }
    free(p);
    free(scale);
}

/* ---- --bench ---- */

enum { UNITS = 8, TILE = 4 };

typedef struct bench {
    const tqkvk_table *table;
    tqkvi_layout layout;
    tqkv_side side;
    size_t n_q;
    uint8_t *codes;
    uint32_t most; /* of the weights */
    uint16_t *w;
    const uint8_t *blocks[TILE];
    tqkvk_query_unit *q;
    float *f, *s, *scale, *out;
} bench;

static void bench_unpack(void *arg)
{
    const bench *b = arg;
    b->table->unpack_block(&b->layout, b->side, b->codes, b->out);
}

static void bench_score(void *arg)
{
    const bench *b = arg;
    b->table->score_blocks(&b->layout, b->blocks, TILE, b->q, b->n_q, b->s, 64);
}

static void bench_weigh(void *arg)
{
    const bench *b = arg;
    b->table->weigh_blocks(&b->layout, b->blocks, TILE, b->most, b->w, 64, b->n_q, b->f, b->f,
                           b->out);
}

static void bench_scale(void *arg)
{
    const bench *b = arg;
    b->table->scale_scores(b->s, b->scale, 64, .1f);
}

static void bench_round(void *arg)
{
    const bench *b = arg;
    float kept;
    (void)b->table->round_weights(b->scale, b->scale, 64, b->most, b->w, &kept);
}

static void bench_widths(bench *b)
{
    char label[96], name[32];

    for (size_t w = 1; w <= COUNT(widths); w++) {
        uint8_t bits[UNITS];
        for (size_t u = 0; u < UNITS; u++)
            bits[u] = w == COUNT(widths) ? (uint8_t[]){4, 4, 3, 3, 3, 2, 2, 1}[u] : widths[w];
        assert_int_equal(tqkvi_layout_init(&b->layout, bits, UNITS), TQKV_OK);
        for (size_t p = 0; p < TILE; p++)
            b->blocks[p] = b->codes + p * TQKVI_BLOCK_TOKENS * b->layout.row_bytes;
        snprintf(name, sizeof(name), w == COUNT(widths) ? "44333221 bits" : "%u bits", bits[0]);
        for (int side = 0; side < 2; side++) {
            b->side = (tqkv_side)side;
            snprintf(label, sizeof(label), "%s d=128 unpack_block %c %s", b->table->name,
                     "KV"[side], name);
            test_time(label, bench_unpack, b, 1.0);
        }
        for (b->n_q = 1; b->n_q <= 16; b->n_q *= 4) {
            snprintf(label, sizeof(label), "%s d=128 score %zu x 64, %s", b->table->name, b->n_q,
                     name);
            test_time(label, bench_score, b, 1.0);
            for (size_t i = 0; i < COUNT(largest_weights); i++) {
                b->most = largest_weights[i];
                snprintf(label, sizeof(label), "%s d=128 weigh %zu x 64, %s, weights to %u",
                         b->table->name, b->n_q, name, b->most);
                test_time(label, bench_weigh, b, 1.0);
            }
        }
    }
}

static void bench_table(const tqkvk_table *table)
{
    enum { DIM = 16 * UNITS, CODES = TILE * 16 * 16 * UNITS };
    test_random random = {seed};
    char label[64];
    bench b = {.table = table};
    b.codes = test_aligned(CODES);
    b.w = test_aligned(16 * 64 * sizeof(*b.w));
    b.q = random_queries(&random, 16 * UNITS, false);
    b.s = test_random_floats(&random, 16 * 64, .5f);
    b.f = test_random_floats(&random, 16, .5f);
    b.scale = test_random_floats(&random, 64, .5f);
    b.out = test_random_floats(&random, 16 * DIM, .5f);
    for (size_t i = 0; i < 16 * 64; i++)
        b.w[i] = i % 128;
    for (size_t i = 0; i < 64; i++)
        b.scale[i] = fabsf(b.scale[i]);
    for (size_t i = 0; i < CODES; i++)
        b.codes[i] = (uint8_t)test_random_u32(&random);
    bench_widths(&b);
    snprintf(label, sizeof(label), "%s scale_scores of 64", table->name);
    test_time(label, bench_scale, &b, 1.0);
    snprintf(label, sizeof(label), "%s round_weights of 64", table->name);
    test_time(label, bench_round, &b, 1.0);
    free(b.codes);
    free(b.w);
    free(b.q);
    free(b.s);
    free(b.f);
    free(b.scale);
    free(b.out);
}

int main(int argc, char **argv)
{
    const bool with_bench = test_arguments(argc, argv, &seed);

    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),   cmocka_unit_test(test_places),
        cmocka_unit_test(test_unpack_block), cmocka_unit_test(test_round_query),
        cmocka_unit_test(test_score_blocks), cmocka_unit_test(test_weigh_blocks),
        cmocka_unit_test(test_scale_values), cmocka_unit_test(test_scale_scores),
        cmocka_unit_test(test_scale_weights), cmocka_unit_test(test_round_weights),
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
