/* SPDX-License-Identifier: Apache-2.0 */
#include "sensitivity.h"

#include <stdlib.h>
#include <string.h>

#include "logit_math.h"
#include "tool.h"

enum {
    NEAR_TOKENS = 64, /* before the scored ones: left exact where attention reaches further */
    FLOOR_GROUPS = 4
};
#define FLOOR_BITS 8
#define KL_LEAST 1e-9

typedef struct group {
    uint32_t layer;
    tqkv_side side;
    size_t values; /* of a token */
} group;

typedef struct probing {
    const sensitivity_job *job;
    host_ctx *ctx;
    uint32_t n_old, n_scored;
    int32_t *tokens; /* [n_old + n_scored] */
    int32_t *positions;
    float *base; /* [n_scored][n_vocab] logits of the undisturbed model */
    logit_base *stats;
    const float *test;
    double *row_kl;
    float *rows, *coarse; /* [n_old][values] */
    double *distortion;   /* [n_layers][2] sums over probes */
    double floor;         /* sum over probes */
    double n_done;
} probing;

static const tqkv_parallel *parallel_of(const probing *p)
{
    return workers_parallel(p->job->w);
}

static group group_of(const sensitivity_job *job, uint32_t layer, tqkv_side side)
{
    const tqkv_plan_layer *shape = &job->layers[layer];
    const uint32_t dim = side == TQKV_SIDE_K ? shape->k_dim : shape->v_dim;
    return (group){layer, side, (size_t)shape->n_kv_heads * dim};
}

static void step(probing *p, const group *g)
{
    char note[64];
    snprintf(note, sizeof(note), "layer %u %s", g->layer, g->side == TQKV_SIDE_K ? "K" : "V");
    p->n_done++;
    progress_set(p->job->bar, p->n_done, note);
}

static void base_task(void *user, size_t i, size_t worker)
{
    probing *p = user;
    const size_t n_vocab = host_n_vocab(p->job->h);
    (void)worker;
    logit_base_init(&p->stats[i], p->base + i * n_vocab, n_vocab);
}

static void kl_task(void *user, size_t i, size_t worker)
{
    probing *p = user;
    const size_t n_vocab = host_n_vocab(p->job->h);
    logit_diff diff;
    (void)worker;
    logit_compare(&diff, &p->stats[i], p->base + i * n_vocab, p->test + i * n_vocab, n_vocab);
    p->row_kl[i] = diff.kl;
}

/* Feeds the scored tokens to what the cache holds. */
static int score(probing *p)
{
    host_ctx_trim(p->ctx, p->n_old);
    return host_ctx_feed(p->ctx, p->tokens + p->n_old, p->n_scored, 0, 1);
}

/* Mean KL when one group is coarse; the cache is as before afterwards. */
static int measure_group(probing *p, const group *g, double bits, double *kl, double *distortion)
{
    const uint32_t near = p->job->layers[g->layer].window ? 0 : NEAR_TOKENS;
    const uint32_t n = p->n_old > 2 * near ? p->n_old - near : p->n_old;
    int rc = host_ctx_get_rows(p->ctx, g->layer, g->side, 0, n, p->rows);
    if (rc != TOOL_OK)
        return rc;
    memcpy(p->coarse, p->rows, n * g->values * sizeof(*p->rows));
    const tqkv_status status =
        tqkv_calib_perturb(p->job->calib, g->layer, g->side, (float)bits, n, p->positions,
                           p->coarse, distortion, parallel_of(p));
    if (status != TQKV_OK)
        return tool_error("layer %u: %s", g->layer, tqkv_status_text(status));
    rc = host_ctx_set_rows(p->ctx, g->layer, g->side, 0, n, p->coarse);
    if (rc == TOOL_OK)
        rc = score(p);
    if (rc == TOOL_OK)
        rc = host_ctx_set_rows(p->ctx, g->layer, g->side, 0, n, p->rows);
    if (rc != TOOL_OK)
        return rc;
    p->test = host_ctx_logits(p->ctx);
    parallel_of(p)->run(parallel_of(p)->user, p->n_scored, kl_task, p);
    *kl = 0;
    for (uint32_t i = 0; i < p->n_scored; i++)
        *kl += p->row_kl[i] / p->n_scored;
    return TOOL_OK;
}

/*
 * Hosts round activations to 8 bits before quantised weights, so that any change at all moves the
 * logits by a KL of some thousandths. 8 bits in a few groups show how much; it is no group's doing.
 */
static int measure_floor(probing *p)
{
    const sensitivity_job *job = p->job;
    double sum = 0;
    uint32_t n = 0;
    for (uint32_t i = 1; i <= FLOOR_GROUPS; i++) {
        const group g = group_of(job, job->n_layers * i / (FLOOR_GROUPS + 1),
                                 i % 2 ? TQKV_SIDE_K : TQKV_SIDE_V);
        double kl, distortion;
        step(p, &g);
        if (!g.values)
            continue;
        const int rc = measure_group(p, &g, FLOOR_BITS, &kl, &distortion);
        if (rc != TOOL_OK)
            return rc;
        sum += kl;
        n++;
    }
    p->floor += n ? sum / n : 0;
    return TOOL_OK;
}

/* Fills the cache with the old tokens of probe i and keeps what the model makes of it. */
static int load_probe(probing *p, uint32_t i)
{
    const sensitivity_job *job = p->job;
    const uint32_t n = p->n_old + p->n_scored;
    const size_t gap = job->n_probes > 1 ? (job->text->n - n) * i / (job->n_probes - 1) : 0;
    text_piece(job->h, job->text, gap, n, p->tokens);
    host_ctx_clear(p->ctx);
    int rc = host_ctx_feed(p->ctx, p->tokens, p->n_old, p->n_old, 1);
    if (rc == TOOL_OK)
        rc = score(p);
    if (rc != TOOL_OK)
        return rc;
    memcpy(p->base, host_ctx_logits(p->ctx),
           (size_t)p->n_scored * host_n_vocab(job->h) * sizeof(float));
    parallel_of(p)->run(parallel_of(p)->user, p->n_scored, base_task, p);
    return TOOL_OK;
}

static int measure_probe(probing *p, uint32_t i, double *kl)
{
    const sensitivity_job *job = p->job;
    int rc = load_probe(p, i);
    if (rc == TOOL_OK)
        rc = measure_floor(p);
    for (uint32_t j = 0; j < 2 * job->n_layers && rc == TOOL_OK; j++) {
        const group g = group_of(job, j / 2, j % 2 ? TQKV_SIDE_V : TQKV_SIDE_K);
        double group_kl, distortion;
        step(p, &g);
        if (!g.values)
            continue;
        rc = measure_group(p, &g, job->bits, &group_kl, &distortion);
        if (rc != TOOL_OK)
            break;
        kl[j] += group_kl;
        p->distortion[j] += distortion;
    }
    return rc;
}

static int tell(const probing *p, double *kl)
{
    const sensitivity_job *job = p->job;
    const double n = job->n_probes, floor = p->floor / n;
    for (uint32_t j = 0; j < 2 * job->n_layers; j++) {
        if (!job->layers[j / 2].n_kv_heads || !(p->distortion[j] > 0))
            continue; /* a group without values, or all zero */
        /* Below a twentieth of the floor nothing can be told apart. */
        const double above = kl[j] / n - floor;
        kl[j] = above > floor / 20 ? above : floor / 20;
        kl[j] = kl[j] > KL_LEAST ? kl[j] : KL_LEAST;
        const tqkv_status status =
            tqkv_calib_set_sensitivity(job->calib, j / 2, j % 2 ? TQKV_SIDE_V : TQKV_SIDE_K, kl[j],
                                       p->distortion[j] / n);
        if (status != TQKV_OK)
            return tool_error("layer %u: sensitivity: %s", j / 2, tqkv_status_text(status));
    }
    return TOOL_OK;
}

static size_t largest_row(const sensitivity_job *job)
{
    size_t most = 0;
    for (uint32_t j = 0; j < 2 * job->n_layers; j++) {
        const group g = group_of(job, j / 2, j % 2 ? TQKV_SIDE_V : TQKV_SIDE_K);
        most = g.values > most ? g.values : most;
    }
    return most;
}

double sensitivity_steps(const sensitivity_job *job)
{
    return (double)job->n_probes * (2.0 * job->n_layers + FLOOR_GROUPS);
}

int sensitivity_measure(const sensitivity_job *job, double *kl)
{
    const size_t wanted = SENSITIVITY_OLD_TOKENS + SENSITIVITY_SCORED_TOKENS;
    const uint32_t n = (uint32_t)(job->text->n < wanted ? job->text->n : wanted);
    probing p = {.job = job, .n_scored = SENSITIVITY_SCORED_TOKENS};
    if (p.n_scored > n / 8)
        p.n_scored = n / 8;
    p.n_old = n - p.n_scored;
    p.tokens = tool_alloc(n, sizeof(*p.tokens));
    p.positions = tool_alloc(n, sizeof(*p.positions));
    for (uint32_t t = 0; t < n; t++)
        p.positions[t] = (int32_t)t;
    p.base = tool_alloc((size_t)p.n_scored * host_n_vocab(job->h), sizeof(float));
    p.stats = tool_alloc(p.n_scored, sizeof(*p.stats));
    p.row_kl = tool_alloc(p.n_scored, sizeof(*p.row_kl));
    p.rows = tool_alloc(p.n_old * largest_row(job), sizeof(float));
    p.coarse = tool_alloc(p.n_old * largest_row(job), sizeof(float));
    p.distortion = tool_alloc(2 * (size_t)job->n_layers, sizeof(double));

    int rc = host_ctx_create(job->h,
                             &(host_ctx_config){.cache = {.mode = "f16"},
                                                .n_ctx = n,
                                                .n_ubatch = p.n_old,
                                                .keeps_all = true},
                             &p.ctx);
    for (uint32_t i = 0; i < job->n_probes && rc == TOOL_OK; i++)
        rc = measure_probe(&p, i, kl);
    if (rc == TOOL_OK)
        rc = tell(&p, kl);
    host_ctx_destroy(p.ctx);
    free(p.distortion);
    free(p.coarse);
    free(p.rows);
    free(p.row_kl);
    free(p.stats);
    free(p.base);
    free(p.positions);
    free(p.tokens);
    return rc;
}
