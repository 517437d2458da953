/* SPDX-License-Identifier: Apache-2.0 */
/* Parts of the plugin that need no host, and what it does where there is none. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dlfcn.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "float_bits.h"
#include "worker_pool.c"

/* --- the pool --- */

enum { TASKS = 300 };

typedef struct job {
    atomic_int runs[TASKS];
    atomic_int busy[64]; /* tasks that run as this worker now */
    atomic_int n_workers_seen;
} job;

static void count(void *task, size_t i, size_t worker)
{
    job *j = task;

    assert_true(worker < 64);
    if (atomic_fetch_add(&j->busy[worker], 1) != 0)
        abort(); /* two tasks with the scratch of one worker */
    if ((int)worker + 1 > atomic_load(&j->n_workers_seen))
        atomic_store(&j->n_workers_seen, (int)worker + 1);
    atomic_fetch_add(&j->runs[i], 1);
    for (volatile int k = 0; k < 200; k = k + 1)
        ;
    atomic_fetch_sub(&j->busy[worker], 1);
}

static void test_pool_runs_every_task_once(void **state)
{
    tqkvp_pool *pool = tqkvp_pool_create(NULL);
    static job j;

    (void)state;
    assert_non_null(pool);
    assert_int_equal(tqkvp_pool_threads(pool), 1);
    for (int round = 0; round < 400; round++) {
        const int n_threads = 1 + round / 7 % 5;
        const size_t n = (size_t)(round * 13 % TASKS);
        tqkvp_pool_set_threads(pool, n_threads);
        const tqkv_parallel *parallel = tqkvp_pool_parallel(pool);
        assert_int_equal(parallel->n_workers, n_threads);
        atomic_store(&j.n_workers_seen, 0);
        parallel->run(parallel->user, n, count, &j);
        assert_true(atomic_load(&j.n_workers_seen) <= n_threads);
        for (size_t i = 0; i < TASKS; i++)
            assert_int_equal(atomic_exchange(&j.runs[i], 0), i < n);
    }
    tqkvp_pool_set_threads(pool, 0);
    assert_int_equal(tqkvp_pool_threads(pool), 1);
    tqkvp_pool_destroy(pool);
    tqkvp_pool_destroy(NULL);
}

/* --- 16-bit floats --- */

/* The nearest f16 by search among all of them, ties to the even one. */
static uint16_t nearest_f16(double x)
{
    uint16_t best = 0;
    double best_error = INFINITY;

    for (uint32_t h = 0; h < 0x7c00u; h++) {
        const double error = fabs(fabs(x) - (double)tqkvp_f16_to_f32((uint16_t)h));
        if (error < best_error || (error == best_error && h % 2 == 0)) {
            best = (uint16_t)h;
            best_error = error;
        }
    }
    return best;
}

static void test_f16(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000u; h++) {
        const float x = tqkvp_f16_to_f32((uint16_t)h);
        if (tqkvp_f16_is_nan((uint16_t)h))
            assert_true(isnan(x) && tqkvp_f16_is_nan(tqkvp_f32_to_f16(x)));
        else
            assert_int_equal(tqkvp_f32_to_f16(x), h);
    }
    const float some[] = {1.0f + 0x1p-11f, 1.0f + 3 * 0x1p-11f, 0x1p-25f, 0x1.8p-24f, 3e-8f, 6.1e-5f,
                          65503.0f,        0.1f,                123.456f, 2.5e-7f};
    for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++) {
        assert_int_equal(tqkvp_f32_to_f16(some[i]), nearest_f16((double)some[i]));
        assert_int_equal(tqkvp_f32_to_f16(-some[i]), 0x8000u | nearest_f16((double)some[i]));
    }
    assert_int_equal(tqkvp_f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(tqkvp_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(tqkvp_f32_to_f16(INFINITY), 0x7c00);
}

static void test_bf16(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000u; h++) {
        const float x = tqkvp_bf16_to_f32((uint16_t)h);
        if (!isnan(x))
            assert_int_equal(tqkvp_f32_to_bf16(x), h);
    }
    assert_int_equal(tqkvp_f32_to_bf16(1.0f + 0x1p-8f), 0x3f80);     /* tie, down to even */
    assert_int_equal(tqkvp_f32_to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82); /* tie, up to even */
    assert_true(isnan(tqkvp_bf16_to_f32(tqkvp_f32_to_bf16(NAN))));
}

/* --- no host --- */

static void test_no_host(void **state)
{
    void *plugin = dlopen(TQKV_PLUGIN_PATH, RTLD_NOW | RTLD_LOCAL);

    (void)state;
    if (!plugin)
        fail_msg("%s", dlerror());
    void *(*init)(void);
    void *symbol = dlsym(plugin, "ggml_backend_init");
    assert_non_null(symbol);
    memcpy(&init, &symbol, sizeof(init));
    assert_null(init());
    assert_null(init()); /* refusing is not for ever, and not a crash */
    /* nothing else is exported: the library inside must not meet another copy of itself */
    assert_null(dlsym(plugin, "tqkv_version"));
    dlclose(plugin);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_runs_every_task_once),
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_no_host),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
