/* SPDX-License-Identifier: Apache-2.0 */
#include "read_loop.h"

#include <stdlib.h>
#include <string.h>

#include "random_layer.h"
#include "spin_pool.h"
#include "tool.h"

enum { PARTS = 256, PART_BYTES = 1 << 20, LANES = 16, PART_WORDS = PART_BYTES / sizeof(uint64_t) };

struct read_loop {
    uint64_t *words;     /* [PARTS][PART_WORDS] */
    uint64_t sum[PARTS]; /* keeps the compiler from leaving the loop out */
    spin_pool *pool;
};

static void read_part(void *task, size_t i, size_t worker)
{
    read_loop *loop = task;
    const uint64_t *words = loop->words + i * PART_WORDS;
    uint64_t sums[LANES] = {0}, all = 0;
    (void)worker;
    for (size_t at = 0; at < PART_WORDS; at += LANES)
        for (size_t lane = 0; lane < LANES; lane++)
            sums[lane] += words[at + lane];
    for (size_t lane = 0; lane < LANES; lane++)
        all += sums[lane];
    loop->sum[i] = all;
}

read_loop *read_loop_create(uint32_t n_threads)
{
    read_loop *loop = tool_alloc(1, sizeof(*loop));
    loop->words = random_layer_alloc((size_t)PARTS * PART_BYTES);
    memset(loop->words, 1, (size_t)PARTS * PART_BYTES);
    loop->pool = spin_pool_create(n_threads);
    return loop;
}

void read_loop_destroy(read_loop *loop)
{
    if (!loop)
        return;
    spin_pool_destroy(loop->pool);
    free(loop->words);
    free(loop);
}

double read_loop_bytes(void)
{
    return (double)PARTS * PART_BYTES;
}

void read_loop_begin(void *loop)
{
    spin_pool_start(((read_loop *)loop)->pool);
}

void read_loop_run(void *loop)
{
    const tqkv_parallel *parallel = spin_pool_parallel(((read_loop *)loop)->pool);
    parallel->run(parallel->user, PARTS, read_part, loop);
}

void read_loop_end(void *loop)
{
    spin_pool_stop(((read_loop *)loop)->pool);
}
