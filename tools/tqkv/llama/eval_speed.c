/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tokens per second: every cache is filled to the depth in micro-batches of 512, then all of them
 * decode a few tokens in turn, several rounds, so that what else the machine does hits all alike.
 * At the end the newest cache of ours is emptied, to compare the process with the bytes it claimed.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "eval_types.h"
#include "progress.h"

enum {
    FILL_UBATCH = 512,
    COPY_TOKENS = 1024,
    ROUNDS = 4,
    ROUND_TOKENS = 8,
    EXTRA_TOKENS = 1 + ROUNDS * ROUND_TOKENS
};

typedef struct timed {
    eval_job *job;
    uint32_t depth;
    host_ctx *contexts[EVAL_CACHES_MAX];
    double rates[EVAL_CACHES_MAX][ROUNDS];
    int32_t *piece;
    progress bar;
    double n_done;
} timed;

static double resident_bytes(void)
{
    unsigned long total, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%lu %lu", &total, &resident) != 2)
        resident = 0;
    if (file)
        fclose(file);
    return (double)resident * (double)sysconf(_SC_PAGESIZE);
}

static int feed(timed *x, size_t i, uint32_t start, uint32_t n)
{
    const int rc = host_ctx_feed(x->contexts[i], x->piece + start, n, n, 1);
    x->n_done += n;
    progress_set(&x->bar, x->n_done, x->job->caches[i].label);
    return rc;
}

static uint32_t chunk_tokens(uint32_t start, uint32_t end)
{
    return end - start < FILL_UBATCH ? end - start : FILL_UBATCH;
}

/* Feeds the first two micro-batches and copies them until the depth. */
static int fill_by_copying(timed *x, size_t i)
{
    int rc = TOOL_OK;
    uint32_t start = 0;
    for (; start < COPY_TOKENS && rc == TOOL_OK; start += FILL_UBATCH)
        rc = feed(x, i, start, FILL_UBATCH);
    if (rc == TOOL_OK && host_ctx_repeat(x->contexts[i], x->depth)) {
        x->n_done += x->depth - COPY_TOKENS;
        return TOOL_OK;
    }
    for (; start < x->depth && rc == TOOL_OK; start += FILL_UBATCH)
        rc = feed(x, i, start, chunk_tokens(start, x->depth));
    return rc;
}

static int fill_by_feeding(timed *x, size_t i, eval_speed *speed)
{
    tqkv_plugin_bytes bytes = {0};
    int rc = TOOL_OK;
    const double started = tool_seconds();
    for (uint32_t start = 0; start < x->depth && rc == TOOL_OK; start += FILL_UBATCH)
        rc = feed(x, i, start, chunk_tokens(start, x->depth));
    speed->prefill = x->depth / (tool_seconds() - started);
    host_ctx_bytes(x->contexts[i], &bytes, NULL, 0);
    speed->held_bytes = (double)bytes.held;
    return rc;
}

/*
 * Empties a cache and compares what the process gives back with what the cache claimed to hold.
 * (While a cache fills, the host's masks grow with it.) Only the newest context can be asked.
 */
static void measure_memory(timed *x, size_t i, eval_speed *speed)
{
    tqkv_plugin_bytes full = {0}, empty = {0};
    host_ctx_bytes(x->contexts[i], &full, NULL, 0);
    if (!full.held)
        return;
    const double resident = resident_bytes();
    host_ctx_clear(x->contexts[i]);
    host_ctx_bytes(x->contexts[i], &empty, NULL, 0);
    speed->rss_freed = resident - resident_bytes();
    speed->held_freed = (double)full.held - (double)empty.held;
}

/* Fills one cache; what is measured meanwhile goes to *speed. */
static int fill(timed *x, size_t i, eval_speed *speed)
{
    const host_cache *cache = &x->job->caches[i].cache;
    const bool is_copied = x->job->has_quick_fill && cache->stock_type &&
                           strcmp(cache->stock_type, "f16") != 0 && x->depth > COPY_TOKENS;
    const host_ctx_config config = {.cache = *cache,
                                    .n_ctx = x->depth + EXTRA_TOKENS,
                                    .n_ubatch = FILL_UBATCH,
                                    .can_repeat = is_copied};
    int rc = host_ctx_create(x->job->h, &config, &x->contexts[i]);
    speed->depth = x->depth;
    if (rc == TOOL_OK)
        rc = is_copied ? fill_by_copying(x, i) : fill_by_feeding(x, i, speed);
    /* The first token after a copy pays for turning the keys. */
    if (rc == TOOL_OK)
        rc = feed(x, i, x->depth, 1);
    return rc;
}

static int decode_round(timed *x, size_t round)
{
    for (size_t i = 0; i < x->job->n_caches; i++) {
        const double started = tool_seconds();
        for (uint32_t t = 0; t < ROUND_TOKENS; t++) {
            const uint32_t at = x->depth + 1 + (uint32_t)round * ROUND_TOKENS + t;
            const int rc = host_ctx_feed(x->contexts[i], x->piece + at, 1, 0, 1);
            if (rc != TOOL_OK)
                return rc;
        }
        x->rates[i][round] = ROUND_TOKENS / (tool_seconds() - started);
        x->n_done += ROUND_TOKENS;
        progress_set(&x->bar, x->n_done, x->job->caches[i].label);
    }
    return TOOL_OK;
}

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int eval_speed_run(eval_job *job, uint32_t depth, eval_speed *speeds)
{
    timed *x = tool_alloc(1, sizeof(*x));
    x->job = job;
    x->depth = depth;
    x->piece = tool_alloc(depth + EXTRA_TOKENS, sizeof(*x->piece));
    text_piece(job->h, &job->texts[0], 0, depth + EXTRA_TOKENS, x->piece);
    progress_begin(&x->bar, "speed", ++job->step, job->n_steps,
                   (double)job->n_caches * (depth + EXTRA_TOKENS));
    int rc = TOOL_OK;
    for (size_t i = 0; i < job->n_caches && rc == TOOL_OK; i++)
        rc = fill(x, i, &speeds[i]);
    for (size_t round = 0; round < ROUNDS && rc == TOOL_OK; round++)
        rc = decode_round(x, round);
    progress_end(&x->bar, rc == TOOL_OK);
    for (size_t i = 0; i < job->n_caches; i++) {
        double *rates = x->rates[i];
        qsort(rates, ROUNDS, sizeof(*rates), compare_doubles);
        speeds[i].decode = (rates[ROUNDS / 2 - 1] + rates[ROUNDS / 2]) / 2;
        speeds[i].decode_least = rates[0];
        speeds[i].decode_most = rates[ROUNDS - 1];
        if (rc == TOOL_OK && x->contexts[i])
            measure_memory(x, i, &speeds[i]);
        host_ctx_destroy(x->contexts[i]);
    }
    free(x->piece);
    free(x);
    return rc;
}
