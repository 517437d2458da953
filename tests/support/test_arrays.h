/* SPDX-License-Identifier: Apache-2.0 */
/* Arrays for kernels: aligned, random, guarded. And a clock for --bench. */
#ifndef TEST_ARRAYS_H
#define TEST_ARRAYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "test_plan_make.h"

#define TEST_GUARD_BYTE 0xa5

/* Output of a kernel: `bytes` at an offset from 64-byte alignment, guard bytes on both sides. */
typedef struct test_guarded {
    uint8_t *block, *data;
    size_t bytes;
} test_guarded;

/* On TQKV_ALIGN and readable TQKV_ALIGN bytes past its end; free() frees it. */
void *test_aligned(size_t bytes);
float *test_random_floats(test_random *random, size_t n, float size);

void test_guarded_init(test_guarded *guarded, size_t bytes, size_t offset);
/* Fails the test when a guard byte has changed. */
void test_guarded_deinit(test_guarded *guarded);

static inline float *test_guarded_floats(const test_guarded *guarded)
{
    return (float *)(void *)guarded->data;
}

/*
 * Prints the ns that fn(arg) takes, divided by `parts`: median and minimum of 15 runs of about a
 * millisecond.
 */
void test_time(const char *label, void (*fn)(void *arg), void *arg, double parts);

/* Reads [--seed N] [--bench] and prints the seed. Returns whether --bench is there. */
bool test_arguments(int argc, char **argv, uint64_t *seed);

#endif /* TEST_ARRAYS_H */
