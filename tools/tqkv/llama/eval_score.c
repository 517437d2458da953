/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quality of caches: the base and every cache under test are fed the same tokens in the same
 * micro-batches, and after each one their logits are compared in memory.
 *
 * The second half of a piece is scored, as llama-perplexity does: there a token has at least half
 * the context behind it. Standard errors take tokens as independent; confidence intervals take
 * blocks of consecutive tokens so, since errors of neighbours go together.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "eval_types.h"
#include "logit_math.h"
#include "plan_view.h"
#include "progress.h"

#define BLOCK_TOKENS 64
#define BLOCKS_MIN 8
#define NORMAL_95 1.959964 /* half the width of 95 % of the normal distribution */

/* What is added up over some of the scored tokens. */
typedef struct sums {
    float *kl; /* [n_max] */
    size_t n, n_max;
    double nll_base, nll;
    size_t n_same;
} sums;

/* Every token counts in one of each. */
typedef struct cache_sums {
    sums all;
    sums *texts; /* [n_texts] */
    sums positions[EVAL_POSITIONS];
} cache_sums;

typedef struct run {
    eval_job *job;
    uint32_t n_ctx, n_ubatch, first_scored;
    host_ctx *base, *tests[EVAL_CACHES_MAX];
    cache_sums sums[EVAL_CACHES_MAX];
    size_t text;       /* being fed */
    logit_base *stats; /* [n_ubatch] */
    logit_diff *diffs; /* [n_ubatch] */
    int32_t *piece;
    progress bar;
    double n_done; /* tokens fed, over all contexts */
} run;

/* A chunk's logits; row i belongs to token first + i, and predicts the one after it. */
typedef struct rows {
    run *r;
    const float *base, *test;
    uint32_t n_vocab;
} rows;

static void stats_task(void *task, size_t i, size_t worker)
{
    rows *x = task;
    (void)worker;
    logit_base_init(&x->r->stats[i], x->base + i * x->n_vocab, x->n_vocab);
}

static void diff_task(void *task, size_t i, size_t worker)
{
    rows *x = task;
    (void)worker;
    logit_compare(&x->r->diffs[i], &x->r->stats[i], x->base + i * x->n_vocab,
                  x->test + i * x->n_vocab, x->n_vocab);
}

static void parallel_rows(const run *r, size_t n, tqkv_task_fn *fn, rows *x)
{
    const tqkv_parallel *parallel = workers_parallel(r->job->w);
    parallel->run(parallel->user, n, fn, x);
}

static void add_token(sums *sum, const logit_diff *diff, double nll_base, double nll)
{
    if (sum->n == sum->n_max) {
        sum->n_max = sum->n_max ? 2 * sum->n_max : 1024;
        sum->kl = tool_grow(sum->kl, sum->n_max, sizeof(*sum->kl));
    }
    sum->kl[sum->n++] = (float)diff->kl;
    sum->n_same += diff->has_same_best;
    sum->nll_base += nll_base;
    sum->nll += nll;
}

/* The last token of the piece predicts nothing that is known. */
static uint32_t end_scored(const run *r)
{
    return r->n_ctx - 1;
}

/* Parts are equal up to rounding: the first token of part i, and for all parts the end. */
static uint32_t first_of_part(const run *r, uint32_t i)
{
    const uint64_t n = end_scored(r) - r->first_scored;
    return r->first_scored + (uint32_t)(n * i / EVAL_POSITIONS);
}

/* The last part that begins at or before a token. */
static uint32_t part_of(const run *r, uint32_t token)
{
    const uint64_t n = end_scored(r) - r->first_scored, before = token - r->first_scored;
    return (uint32_t)(((before + 1) * EVAL_POSITIONS - 1) / n);
}

static void add_rows(run *r, cache_sums *to, const rows *x, uint32_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const int32_t next = r->piece[first + i + 1];
        const float *base = x->base + (size_t)i * x->n_vocab,
                    *test = x->test + (size_t)i * x->n_vocab;
        const double nll_base = r->stats[i].log_sum - (double)base[next],
                     nll = r->diffs[i].log_sum_test - (double)test[next];
        add_token(&to->all, &r->diffs[i], nll_base, nll);
        add_token(&to->texts[r->text], &r->diffs[i], nll_base, nll);
        add_token(&to->positions[part_of(r, first + i)], &r->diffs[i], nll_base, nll);
    }
}

static int feed(run *r, host_ctx *ctx, const char *label, uint32_t start, uint32_t n,
                uint32_t first)
{
    const int rc = host_ctx_feed(ctx, r->piece + start, n, first - start, 1);
    r->n_done += n;
    progress_set(&r->bar, r->n_done, label);
    return rc;
}

static int run_chunk(run *r, uint32_t start, uint32_t n)
{
    const uint32_t first = start > r->first_scored ? start : r->first_scored;
    const uint32_t end = start + n < end_scored(r) ? start + n : end_scored(r);
    const uint32_t n_rows = end > first ? end - first : 0;
    rows x = {.r = r, .n_vocab = host_n_vocab(r->job->h)};

    int rc = feed(r, r->base, "base", start, n, n_rows ? first : start + n);
    if (rc == TOOL_OK && n_rows) {
        x.base = host_ctx_logits(r->base);
        parallel_rows(r, n_rows, stats_task, &x);
    }
    for (size_t i = 0; i < r->job->n_caches && rc == TOOL_OK; i++) {
        rc = feed(r, r->tests[i], r->job->caches[i].label, start, n, n_rows ? first : start + n);
        if (rc != TOOL_OK || !n_rows)
            continue;
        x.test = host_ctx_logits(r->tests[i]);
        parallel_rows(r, n_rows, diff_task, &x);
        add_rows(r, &r->sums[i], &x, first, n_rows);
    }
    return rc;
}

static int run_piece(run *r, size_t first)
{
    text_piece(r->job->h, &r->job->texts[r->text], first, r->n_ctx, r->piece);
    host_ctx_clear(r->base);
    for (size_t i = 0; i < r->job->n_caches; i++)
        host_ctx_clear(r->tests[i]);
    int rc = TOOL_OK;
    for (uint32_t start = 0; start < r->n_ctx && rc == TOOL_OK; start += r->n_ubatch) {
        const uint32_t left = r->n_ctx - start;
        rc = run_chunk(r, start, left < r->n_ubatch ? left : r->n_ubatch);
    }
    return rc;
}

static int compare_floats(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Half the width of 95 % of Student's t: the first terms of its expansion in 1 / freedom. */
static double student_95(double freedom)
{
    const double z = NORMAL_95, z3 = z * z * z, z5 = z3 * z * z;
    return z + (z3 + z) / (4 * freedom) + (5 * z5 + 16 * z3 + 3 * z) / (96 * freedom * freedom);
}

/* By the means of blocks, equal up to one token. The order must be that of the text. */
static double half_interval(const sums *sum, double mean)
{
    const size_t n_blocks = (sum->n + BLOCK_TOKENS / 2) / BLOCK_TOKENS;
    double square = 0;
    if (n_blocks < BLOCKS_MIN)
        return NAN;
    for (size_t i = 0, first = 0; i < n_blocks; i++) {
        const size_t end = sum->n * (i + 1) / n_blocks;
        double block = 0;
        for (size_t j = first; j < end; j++)
            block += (double)sum->kl[j] / (double)(end - first);
        square += (block - mean) * (block - mean);
        first = end;
    }
    const double freedom = (double)(n_blocks - 1);
    return student_95(freedom) * sqrt(square / freedom / (double)n_blocks);
}

static void summarise(const sums *sum, eval_quality *out)
{
    const double n = (double)sum->n;
    double mean = 0, square = 0;
    for (size_t i = 0; i < sum->n; i++)
        mean += (double)sum->kl[i] / n;
    for (size_t i = 0; i < sum->n; i++)
        square += ((double)sum->kl[i] - mean) * ((double)sum->kl[i] - mean);
    out->kl_ci95 = half_interval(sum, mean);
    qsort(sum->kl, sum->n, sizeof(*sum->kl), compare_floats);
    out->n = sum->n;
    out->kl_mean = mean;
    out->kl_error = sum->n > 1 ? sqrt(square / (n - 1) / n) : 0;
    out->kl_median = (double)sum->kl[sum->n / 2];
    out->kl_p999 = (double)sum->kl[(size_t)(0.999 * (n - 1) + 0.5)];
    out->top1 = (double)sum->n_same / n;
    out->ppl_base = exp(sum->nll_base / n);
    out->ppl = exp(sum->nll / n);
}

static void summarise_cache(const run *r, const cache_sums *from, eval_score *out)
{
    summarise(&from->all, &out->all);
    out->texts = tool_alloc(r->job->n_texts, sizeof(*out->texts));
    double square = 0; /* of all tokens: these texts, not a sample of texts */
    for (size_t i = 0; i < r->job->n_texts; i++) {
        const eval_quality *text = &out->texts[i];
        summarise(&from->texts[i], &out->texts[i]);
        square += pow((double)text->n / (double)out->all.n * text->kl_ci95, 2);
    }
    out->all.kl_ci95 = sqrt(square);
    for (uint32_t i = 0; i < EVAL_POSITIONS; i++)
        summarise(&from->positions[i], &out->positions[i]);
    for (uint32_t i = 0; i <= EVAL_POSITIONS; i++)
        out->first_position[i] = first_of_part(r, i);
}

static void free_sums(cache_sums *sum, size_t n_texts)
{
    for (size_t i = 0; i < n_texts; i++)
        free(sum->texts[i].kl);
    for (size_t i = 0; i < EVAL_POSITIONS; i++)
        free(sum->positions[i].kl);
    free(sum->all.kl);
    free(sum->texts);
}

void eval_score_deinit(eval_score *score)
{
    free(score->texts);
    *score = (eval_score){0};
}

/*
 * Bytes held at the end of the last piece. The plugin tells them of one context, the newest; what
 * others of ours hold is what the library says of their plan. All hold the same tokens, so the
 * f16 size is the same for all.
 */
static int read_bytes(run *r, eval_score *scores)
{
    tqkv_plugin_bytes bytes;
    double f16 = 0;
    host_ctx_bytes(r->base, &bytes, NULL, 0);
    f16 = (double)bytes.f16_held;
    for (size_t i = 0; i < r->job->n_caches; i++) {
        host_ctx_bytes(r->tests[i], &bytes, NULL, 0);
        scores[i].held_bytes = (double)bytes.held;
        f16 = bytes.f16_held ? (double)bytes.f16_held : f16;
    }
    for (size_t i = 0; i < r->job->n_caches; i++) {
        const eval_cache *cache = &r->job->caches[i];
        double plan_f16 = 0;
        tqkv_plan *plan;
        scores[i].f16_bytes = f16;
        if (cache->stock_bits > 0)
            scores[i].held_bytes = f16 * cache->stock_bits / 16;
        if (scores[i].held_bytes > 0 || !cache->cache.plan_path)
            continue;
        int rc = plan_view_load(cache->cache.plan_path, &plan);
        if (rc == TOOL_OK)
            rc = plan_view_bytes(plan, r->n_ctx, &scores[i].held_bytes, &plan_f16);
        tqkv_plan_destroy(plan);
        if (rc != TOOL_OK)
            return rc;
    }
    return TOOL_OK;
}

static int open_contexts(run *r)
{
    eval_job *job = r->job;
    host_ctx_config config = {.n_ctx = r->n_ctx, .n_ubatch = r->n_ubatch};
    config.cache =
        job->has_stock_base ? (host_cache){.stock_type = "f16"} : (host_cache){.mode = "f16"};
    int rc = host_ctx_create(job->h, &config, &r->base);
    for (size_t i = 0; i < job->n_caches && rc == TOOL_OK; i++) {
        config.cache = job->caches[i].cache;
        rc = host_ctx_create(job->h, &config, &r->tests[i]);
    }
    return rc;
}

int eval_score_run(eval_job *job, const eval_setting *setting, eval_score *scores)
{
    run *r = tool_alloc(1, sizeof(*r));
    char phase[64];
    r->job = job;
    r->n_ctx = setting->n_ctx;
    r->n_ubatch = setting->n_ubatch;
    r->first_scored = setting->n_ctx / 2;
    r->piece = tool_alloc(r->n_ctx, sizeof(*r->piece));
    r->stats = tool_alloc(r->n_ubatch, sizeof(*r->stats));
    r->diffs = tool_alloc(r->n_ubatch, sizeof(*r->diffs));
    for (size_t i = 0; i < job->n_caches; i++)
        r->sums[i].texts = tool_alloc(job->n_texts, sizeof(*r->sums[i].texts));
    snprintf(phase, sizeof(phase), "-c %u -ub %u", r->n_ctx, r->n_ubatch);
    progress_begin(&r->bar, job->phase ? job->phase : phase, ++job->step, job->n_steps,
                   (double)(job->n_texts * job->n_pieces * (job->n_caches + 1)) * r->n_ctx);

    int rc = open_contexts(r);
    for (r->text = 0; r->text < job->n_texts; r->text++) {
        for (size_t j = 0; j < job->n_pieces && rc == TOOL_OK; j++)
            rc = run_piece(r, j * r->n_ctx);
    }
    for (size_t i = 0; i < job->n_caches && rc == TOOL_OK; i++)
        summarise_cache(r, &r->sums[i], &scores[i]);
    if (rc == TOOL_OK)
        rc = read_bytes(r, scores);
    progress_end(&r->bar, rc == TOOL_OK);

    for (size_t i = 0; i < job->n_caches; i++) {
        host_ctx_destroy(r->tests[i]);
        free_sums(&r->sums[i], job->n_texts);
    }
    host_ctx_destroy(r->base);
    free(r->diffs);
    free(r->stats);
    free(r->piece);
    free(r);
    return rc;
}
