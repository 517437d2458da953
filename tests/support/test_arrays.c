/* SPDX-License-Identifier: Apache-2.0 */
#include "test_arrays.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define GUARD 64
#define RUNS 15

void *test_aligned(size_t bytes)
{
    void *p = aligned_alloc(TQKV_ALIGN, (bytes + 63) / 64 * 64 + TQKV_ALIGN);
    assert_non_null(p);
    return p;
}

float *test_random_floats(test_random *random, size_t n, float size)
{
    float *p = test_aligned(n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        p[i] = size * test_random_normal(random);
    return p;
}

void test_guarded_init(test_guarded *guarded, size_t bytes, size_t offset)
{
    guarded->block = test_aligned(bytes + offset + 2 * GUARD);
    memset(guarded->block, TEST_GUARD_BYTE, bytes + offset + 2 * GUARD);
    guarded->data = guarded->block + GUARD + offset;
    guarded->bytes = bytes;
}

void test_guarded_deinit(test_guarded *guarded)
{
    for (const uint8_t *p = guarded->block; p < guarded->data; p++)
        assert_int_equal(*p, TEST_GUARD_BYTE);
    for (size_t i = 0; i < GUARD; i++)
        assert_int_equal(guarded->data[guarded->bytes + i], TEST_GUARD_BYTE);
    free(guarded->block);
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

static double run_ns(void (*fn)(void *arg), void *arg, size_t n_calls)
{
    const double start = now_ns();
    for (size_t i = 0; i < n_calls; i++)
        fn(arg);
    return now_ns() - start;
}

void test_time(const char *label, void (*fn)(void *arg), void *arg, double parts)
{
    double ns[RUNS];
    size_t n_calls = 1;
    while (run_ns(fn, arg, n_calls) < 1e6)
        n_calls *= 2;
    for (size_t r = 0; r < RUNS; r++) {
        const double taken = run_ns(fn, arg, n_calls) / (double)n_calls / parts;
        size_t at = r;
        for (; at > 0 && ns[at - 1] > taken; at--)
            ns[at] = ns[at - 1];
        ns[at] = taken;
    }
    printf("%-40s median %10.1f ns  min %10.1f ns\n", label, ns[RUNS / 2], ns[0]);
}

bool test_arguments(int argc, char **argv, uint64_t *seed)
{
    bool with_bench = false;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--bench") == 0)
            with_bench = true;
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
            *seed = strtoull(argv[++i], NULL, 0);
    }
    printf("seed %llu\n", (unsigned long long)*seed);
    return with_bench;
}
