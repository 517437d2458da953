/* SPDX-License-Identifier: Apache-2.0 */
/* An allocator that counts, checks and fails on command. */
#ifndef TEST_MEMORY_H
#define TEST_MEMORY_H

#include "turboquant/types.h"

typedef struct test_memory {
    size_t n_live;    /* blocks given and not freed */
    size_t n_calls;   /* of alloc */
    size_t fail_call; /* this call (counted from 1) and all later ones give NULL; 0: none */
    size_t largest;   /* bytes of the largest request */
    size_t bytes_max; /* requests above it give NULL; 0: no limit */
} test_memory;

/* memory: kept. */
tqkv_allocator test_memory_allocator(test_memory *memory);

#endif /* TEST_MEMORY_H */
