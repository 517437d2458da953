/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tokens per second: every cache is filled to a depth, then all of them decode a few tokens in turn, several
 * rounds, so that what else the machine does hits all alike; then, where it is asked for, all of them read
 * a prompt of 512 tokens in turn. What was timed is forgotten, and the caches are filled to the next depth.
 * At the end the newest cache of ours is emptied, to compare the process with the bytes it claimed.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "eval_types.h"
#include "progress.h"

enum {
    UBATCH = 512,
    COPY_TOKENS = 1024, /* that are computed before copying begins */
    DECODE_ROUNDS = 24,    /* unless the user says, */
    DECODE_ROUNDS_MIN = 4, /* or they take long */
    DECODE_TOKENS = 8, /* of a round, after one that is not timed */
    PREFILL_ROUNDS = 3,
    EXTRA_TOKENS = UBATCH
};
/* No further round of decoding begins once those of all caches have taken so long. */
static const double DECODE_SECONDS = 10;
/* A cache whose rounds of prefill have taken so long is timed no more. */
static const double PREFILL_SECONDS = 20;

typedef struct phase_rates {
    double values[EVAL_ROUNDS_MAX];
    size_t n;
    double seconds; /* of all rounds */
} phase_rates;

typedef struct timed {
    eval_job *job;
    const eval_speed_setting *setting;
    host_ctx *contexts[EVAL_CACHES_MAX];
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

/* Appends the next n tokens of the text. */
static int feed(timed *x, size_t i, uint32_t n)
{
    host_ctx *ctx = x->contexts[i];
    const int rc = host_ctx_feed(ctx, x->piece + host_ctx_n_tokens(ctx), n, n, 1);
    x->n_done += n;
    progress_set(&x->bar, x->n_done, x->job->caches[i].label);
    return rc;
}

static int feed_until(timed *x, size_t i, uint32_t n_target)
{
    int rc = TOOL_OK;
    while (rc == TOOL_OK && host_ctx_n_tokens(x->contexts[i]) < n_target) {
        const uint32_t left = n_target - host_ctx_n_tokens(x->contexts[i]);
        rc = feed(x, i, left < UBATCH ? left : UBATCH);
    }
    return rc;
}

/* The first token after a copy pays for turning the keys. */
static int feed_one_and_forget(timed *x, size_t i, uint32_t depth)
{
    const int rc = feed(x, i, 1);
    host_ctx_trim(x->contexts[i], depth);
    return rc;
}

/* Ours is never copied: age decides how wide a token is stored, and a copy is as old as what it is of. */
static bool is_copied(const timed *x, size_t i)
{
    return x->setting->has_quick_fill && x->job->caches[i].cache.stock_type;
}

static int fill(timed *x, size_t i, uint32_t depth)
{
    host_ctx *ctx = x->contexts[i];
    if (!is_copied(x, i))
        return feed_until(x, i, depth);
    int rc = feed_until(x, i, depth < COPY_TOKENS ? depth : COPY_TOKENS);
    const uint32_t n_computed = host_ctx_n_tokens(ctx);
    if (rc == TOOL_OK && depth > n_computed && host_ctx_repeat(ctx, depth)) {
        x->n_done += depth - n_computed;
        rc = feed_one_and_forget(x, i, depth);
    }
    return rc == TOOL_OK ? feed_until(x, i, depth) : rc;
}

/* One round of a phase: one token that is not timed, if it decodes, and then n, `step` at a time. */
static int time_round(timed *x, size_t i, uint32_t depth, uint32_t n, uint32_t step,
                      phase_rates *rates)
{
    int rc = step == 1 ? feed(x, i, 1) : TOOL_OK;
    const double started = tool_seconds();
    for (uint32_t t = 0; t < n && rc == TOOL_OK; t += step)
        rc = feed(x, i, step);
    const double taken = tool_seconds() - started;
    rates->seconds += taken;
    rates->values[rates->n++] = n / taken;
    host_ctx_trim(x->contexts[i], depth);
    return rc;
}

static eval_rate summary(phase_rates *rates)
{
    eval_rate out = {.n_rounds = rates->n};
    if (rates->n)
        out.rounds = spread_of(rates->values, rates->n);
    return out;
}

/* All caches in turn, at one depth. speeds: [n_caches]. */
static int time_depth(timed *x, uint32_t depth, uint32_t n_threads, eval_speed *speeds)
{
    const size_t n_caches = x->job->n_caches;
    phase_rates decode[EVAL_CACHES_MAX] = {0}, prefill[EVAL_CACHES_MAX] = {0};
    const size_t n_rounds = x->setting->n_rounds ? x->setting->n_rounds : DECODE_ROUNDS;
    const double started = tool_seconds();
    int rc = TOOL_OK;
    for (size_t i = 0; i < n_caches; i++) {
        host_ctx_set_threads(x->contexts[i], n_threads);
        if (depth == 0) /* not only without tokens, but as new */
            host_ctx_clear(x->contexts[i]);
    }
    for (size_t round = 0; round < n_rounds && rc == TOOL_OK; round++) {
        if (!x->setting->n_rounds && round >= DECODE_ROUNDS_MIN &&
            tool_seconds() - started > DECODE_SECONDS)
            break;
        for (size_t turn = 0; turn < n_caches && rc == TOOL_OK; turn++) {
            const size_t i = (turn + round) % n_caches;
            rc = time_round(x, i, depth, DECODE_TOKENS, 1, &decode[i]);
        }
    }
    for (size_t round = 0; x->setting->has_prefill && round < PREFILL_ROUNDS; round++)
        for (size_t i = 0; i < n_caches && rc == TOOL_OK; i++)
            if (prefill[i].seconds < PREFILL_SECONDS)
                rc = time_round(x, i, depth, UBATCH, UBATCH, &prefill[i]);
    for (size_t i = 0; i < n_caches; i++) {
        host_ctx_set_threads(x->contexts[i], host_n_threads(x->job->h));
        speeds[i].cache = x->job->caches[i].label;
        speeds[i].depth = depth;
        speeds[i].n_threads = n_threads;
        speeds[i].decode = summary(&decode[i]);
        speeds[i].prefill = summary(&prefill[i]);
    }
    return rc;
}

static double held_bytes(host_ctx *ctx)
{
    tqkv_plugin_bytes bytes = {0};
    host_ctx_bytes(ctx, &bytes, NULL, 0);
    return (double)bytes.held;
}

/*
 * Empties a cache and compares what the process gives back with what the cache claimed to hold.
 * (While a cache fills, the host's masks grow with it.) Only the newest context can be asked.
 */
static void measure_memory(timed *x, size_t i, eval_speed *speed)
{
    const double held = held_bytes(x->contexts[i]);
    if (!(held > 0))
        return;
    const double resident = resident_bytes();
    host_ctx_clear(x->contexts[i]);
    speed->rss_freed = resident - resident_bytes();
    speed->held_freed = held - held_bytes(x->contexts[i]);
}

static int create_contexts(timed *x, uint32_t n_ctx)
{
    int rc = TOOL_OK;
    for (size_t i = 0; i < x->job->n_caches && rc == TOOL_OK; i++) {
        const host_ctx_config config = {.cache = x->job->caches[i].cache,
                                        .n_ctx = n_ctx,
                                        .n_ubatch = UBATCH,
                                        .may_be_short = true,
                                        .can_repeat = is_copied(x, i)};
        rc = host_ctx_create(x->job->h, &config, &x->contexts[i]);
    }
    return rc;
}

/* The first prompt of a context pays for memory that is touched for the first time. */
static int warm_up(timed *x)
{
    int rc = TOOL_OK;
    for (size_t i = 0; i < x->job->n_caches && rc == TOOL_OK; i++) {
        rc = feed(x, i, UBATCH);
        host_ctx_clear(x->contexts[i]);
    }
    return rc;
}

static int time_all(timed *x, eval_speed *speeds)
{
    const eval_speed_setting *s = x->setting;
    const size_t n_caches = x->job->n_caches;
    int rc = s->has_prefill ? warm_up(x) : TOOL_OK;
    for (size_t d = 0; d < s->n_depths && rc == TOOL_OK; d++) {
        for (size_t i = 0; i < n_caches && rc == TOOL_OK; i++)
            rc = fill(x, i, s->depths[d]);
        for (size_t t = 0; t < s->n_thread_counts && rc == TOOL_OK; t++)
            rc = time_depth(x, s->depths[d], s->n_threads[t],
                            speeds + (d * s->n_thread_counts + t) * n_caches);
    }
    return rc;
}

uint32_t eval_speed_tokens(const eval_speed_setting *s)
{
    return s->n_depths ? s->depths[s->n_depths - 1] + EXTRA_TOKENS : 0;
}

/* For the bar: of all caches. */
static double n_tokens_fed(const eval_job *job, const eval_speed_setting *s)
{
    const size_t n_rounds = s->n_rounds ? s->n_rounds : DECODE_ROUNDS;
    const double n_timed = (double)n_rounds * (1.0 + DECODE_TOKENS) +
                           (s->has_prefill ? PREFILL_ROUNDS * (double)UBATCH : 0);
    const double n_warm = s->has_prefill ? UBATCH : 0;
    return (double)job->n_caches * (n_warm + s->depths[s->n_depths - 1] +
                                    (double)(s->n_depths * s->n_thread_counts) * n_timed);
}

int eval_speed_run(eval_job *job, const eval_speed_setting *setting, eval_speed *speeds)
{
    const uint32_t n_ctx = eval_speed_tokens(setting);
    timed *x = tool_alloc(1, sizeof(*x));
    x->job = job;
    x->setting = setting;
    x->piece = tool_alloc(n_ctx, sizeof(*x->piece));
    text_piece(job->h, &job->texts[0], 0, n_ctx, x->piece);
    progress_begin(&x->bar, "speed", ++job->step, job->n_steps, n_tokens_fed(job, setting));
    int rc = create_contexts(x, n_ctx);
    if (rc == TOOL_OK)
        rc = time_all(x, speeds);
    progress_end(&x->bar, rc == TOOL_OK);
    eval_speed *last = speeds + (setting->n_depths * setting->n_thread_counts - 1) * job->n_caches;
    for (size_t i = 0; i < job->n_caches; i++) {
        if (rc == TOOL_OK)
            measure_memory(x, i, &last[i]);
        host_ctx_destroy(x->contexts[i]);
    }
    free(x->piece);
    free(x);
    return rc;
}
