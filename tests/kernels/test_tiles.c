/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bounded kernels of every table against sums in double, with bounds that grow with the data.
 * Outputs lie between guard bytes.
 *
 *     test_tiles [--seed N] [--bench]      --bench also times these kernels of every table
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

#include "kernels/kernels.h"
#include "test_arrays.h"

#define EPS 0x1p-23
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static uint64_t seed = 20240302;

static const size_t tile_n_q[] = {1, 2, 3, 4, 5, 6, 7, 8, 16, 65};
static const size_t tile_n_k[] = {0, 8, 16, 24, 64};
static const size_t tile_dim[] = {16, 32, 48, 64, 80, 96, 128, 256};

static void check_dot(const tqkvk_table *table, test_random *random, size_t n_q, size_t n_k,
                      size_t dim)
{
    const size_t stride = n_k + test_random_u32(random) % 3;
    float *q = test_random_floats(random, n_q * dim, 3.0f);
    float *k = test_random_floats(random, n_k * dim, 100.0f);
    test_guarded s;
    test_guarded_init(&s, n_q * stride * sizeof(float), 0);
    table->dot_tile(q, n_q, k, n_k, dim, test_guarded_floats(&s), stride);
    for (size_t a = 0; a < n_q; a++) {
        for (size_t b = 0; b < n_k; b++) {
            double sum = 0.0, terms = 0.0;
            for (size_t i = 0; i < dim; i++) {
                const double term = (double)q[a * dim + i] * (double)k[b * dim + i];
                sum += term;
                terms += fabs(term);
            }
            assert_true(fabs(sum - (double)test_guarded_floats(&s)[a * stride + b]) <=
                        (double)dim * EPS * terms);
        }
        for (size_t i = n_k * sizeof(float); i < stride * sizeof(float); i++)
            assert_int_equal(s.data[a * stride * sizeof(float) + i], TEST_GUARD_BYTE);
    }
    test_guarded_deinit(&s);
    free(q);
    free(k);
}

static void check_accumulate(const tqkvk_table *table, test_random *random, size_t n_q, size_t n_k,
                             size_t dim)
{
    const size_t stride = n_k + test_random_u32(random) % 3;
    float *p = test_random_floats(random, n_q * stride, 1.0f);
    float *v = test_random_floats(random, n_k * dim, 10.0f);
    float *f = test_random_floats(random, n_q, 1.0f);
    float *before = test_random_floats(random, n_q * dim, 50.0f);
    test_guarded o;
    test_guarded_init(&o, n_q * dim * sizeof(float), 0);
    memcpy(o.data, before, n_q * dim * sizeof(float));
    table->accumulate_tile(p, stride, n_q, v, n_k, dim, f, test_guarded_floats(&o));
    for (size_t a = 0; a < n_q; a++) {
        for (size_t i = 0; i < dim; i++) {
            double sum = (double)before[a * dim + i] * (double)f[a];
            double terms = fabs(sum);
            for (size_t b = 0; b < n_k; b++) {
                const double term = (double)p[a * stride + b] * (double)v[b * dim + i];
                sum += term;
                terms += fabs(term);
            }
            assert_true(fabs(sum - (double)test_guarded_floats(&o)[a * dim + i]) <=
                        ((double)n_k + 2.0) * EPS * terms);
        }
    }
    test_guarded_deinit(&o);
    free(p);
    free(v);
    free(f);
    free(before);
}

static void test_tiles(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < COUNT(tile_n_q) * COUNT(tile_n_k) * COUNT(tile_dim); i++) {
            const size_t n_q = tile_n_q[i % COUNT(tile_n_q)];
            const size_t n_k = tile_n_k[i / COUNT(tile_n_q) % COUNT(tile_n_k)];
            const size_t dim = tile_dim[i / COUNT(tile_n_q) / COUNT(tile_n_k)];
            check_dot(all[t], &random, n_q, n_k, dim);
            check_accumulate(all[t], &random, n_q, n_k, dim);
            check_accumulate(all[t], &random, n_q, n_k + 3, dim);
        }
    }
}

/* size: spread of the scores; they reach both sides of what exp can hold. */
static void check_softmax(const tqkvk_table *table, test_random *random, size_t n, double size,
                          float m, float l)
{
    test_guarded s;
    test_guarded_init(&s, n * sizeof(float), 0);
    float *scores = test_guarded_floats(&s);
    double *x = malloc((n + 1) * sizeof(double));
    assert_non_null(x);
    double top = (double)m;
    for (size_t b = 0; b < n; b++) {
        scores[b] =
            test_random_u32(random) % 8 == 0 ? -INFINITY : (float)size * test_random_normal(random);
        x[b] = (double)scores[b];
        top = fmax(top, x[b]);
    }
    float m_new = m, l_new = l;
    const float factor = table->softmax_step(scores, n, &m_new, &l_new);
    const bool empty = top == -INFINITY;
    const double want_factor = empty ? 1.0 : exp((double)m - top);
    double sum = (double)l * want_factor;

    assert_true((double)m_new == top);
    assert_true(fabs((double)factor - want_factor) <= 4 * EPS * want_factor + 0x1p-126);
    for (size_t b = 0; b < n; b++) {
        /* The difference is rounded before exp sees it. */
        const double want = empty ? 0.0 : exp((double)((float)x[b] - (float)top));
        assert_true(fabs((double)scores[b] - want) <= 4 * EPS * want + 0x1p-126);
        sum += want;
    }
    assert_true(fabs((double)l_new - sum) <= ((double)n + 6.0) * EPS * sum + 0x1p-120);
    test_guarded_deinit(&s);
    free(x);
}

static void test_softmax(void **state)
{
    (void)state;
    size_t n;
    const tqkvk_table *const *all = tqkvk_all(&n);
    test_random random = {seed};
    const double sizes[] = {0.0, 1e-3, 1.0, 30.0, 1e4, 1e30};
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < 600; i++) {
            const size_t n_scores = 8 * (i % 17);
            const double size = sizes[i % COUNT(sizes)];
            const float m = i % 3 == 0 ? -INFINITY : (float)size * test_random_normal(&random);
            check_softmax(all[t], &random, n_scores, size, m, i % 3 == 0 ? 0.0f : 5.5f);
        }
        float none[8], m = -INFINITY, l = 0.0f;
        for (size_t b = 0; b < 8; b++)
            none[b] = -INFINITY;
        assert_true(all[t]->softmax_step(none, 8, &m, &l) == 1.0f);
        assert_true(none[7] == 0.0f && m == -INFINITY && l == 0.0f);
    }
}

/* ---- --bench ---- */

typedef struct bench {
    const tqkvk_table *table;
    size_t dim, n_q;
    float *q, *rows, *s, *f, *o;
} bench;

static void bench_dot(void *arg)
{
    const bench *b = arg;
    b->table->dot_tile(b->q, b->n_q, b->rows, 64, b->dim, b->s, 64);
}

static void bench_softmax(void *arg)
{
    const bench *b = arg;
    float m = 0.0f, l = 0.0f;
    (void)b->table->softmax_step(b->s, 64, &m, &l);
}

static void bench_accumulate(void *arg)
{
    const bench *b = arg;
    b->table->accumulate_tile(b->s, 64, b->n_q, b->rows, 64, b->dim, b->f, b->o);
}

static void bench_table(const tqkvk_table *table, size_t dim)
{
    static const size_t n_q[] = {1, 2, 3, 4, 8, 64};
    char label[64];
    test_random random = {seed};
    bench b = {.table = table, .dim = dim};
    b.q = test_random_floats(&random, 64 * dim, .1f);
    b.rows = test_random_floats(&random, 64 * dim, .1f);
    b.s = test_random_floats(&random, 64 * 64, 1.0f);
    b.f = test_random_floats(&random, 64, .1f);
    b.o = test_random_floats(&random, 64 * dim, 1.0f);
    for (size_t i = 0; i < COUNT(n_q); i++) {
        b.n_q = n_q[i];
        snprintf(label, sizeof(label), "%s d=%zu dot %zu x 64", table->name, dim, n_q[i]);
        test_time(label, bench_dot, &b, 1.0);
        snprintf(label, sizeof(label), "%s d=%zu accumulate %zu x 64", table->name, dim, n_q[i]);
        test_time(label, bench_accumulate, &b, 1.0);
    }
    snprintf(label, sizeof(label), "%s softmax of 64", table->name);
    test_time(label, bench_softmax, &b, 1.0);
    free(b.q);
    free(b.rows);
    free(b.s);
    free(b.f);
    free(b.o);
}

int main(int argc, char **argv)
{
    const bool with_bench = test_arguments(argc, argv, &seed);

    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_softmax),
    };
    const int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (with_bench) {
        size_t n;
        const tqkvk_table *const *all = tqkvk_all(&n);
        for (size_t t = 0; t < n; t++) {
            bench_table(all[t], 64);
            bench_table(all[t], 128);
        }
    }
    return n_failed;
}
