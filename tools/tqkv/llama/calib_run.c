/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A piece of text is one micro-batch, so one event of the plugin has all of a layer's rows. The
 * cache meanwhile stores f16: what is seen is the model itself.
 */
#include "calib_run.h"

#include <stdlib.h>
#include <string.h>

#include "model_weights.h"
#include "plan_view.h"
#include "progress.h"
#include "sensitivity.h"

enum { LEAST_TOKENS = 256 };

struct calib_run {
    host *h;
    workers *w;
    const gguf_head *model;
    const text_tokens *text;
    calib_options options;
    model_weights *weights;
    tqkv_calib *calib;
    host_ctx *ctx;
    uint32_t n_ctx;
    size_t n_pieces;
    uint32_t piece_tokens;
    int32_t *piece;

    progress bar;
    size_t n_pieces_done;

    bool is_observing;
    tqkv_status status; /* first failure inside an event */
    uint32_t failed_layer;
    tqkv_plan_layer *shapes; /* [n_layers]; n_kv_heads 0: not met */
    uint64_t *reserved;      /* [n_layers] bytes of a layer's cells in f16, 0: not told */
    float *q_copy;
    size_t q_copy_floats;
    int32_t *counted; /* 0, 1, 2, ... for graphs that hide positions */

    double *kl; /* [n_layers][2] */
};

static const tqkv_parallel *parallel_of(const calib_run *run)
{
    return workers_parallel(run->w);
}

/* ---- what the plugin shows ------------------------------------------------------------------- */

static tqkv_status meet_layer(calib_run *run, const tqkv_plugin_event *e)
{
    size_t n_out = 0;
    const uint64_t cell_bytes = 2 * (uint64_t)e->n_kv_heads * (e->k_dim + e->v_dim);
    const bool is_sliding =
        run->reserved[e->layer] && run->reserved[e->layer] / cell_bytes < run->n_ctx;
    const uint32_t window = e->window ? e->window : is_sliding ? run->model->window : 0;
    const tqkv_plan_layer shape = {.n_heads = e->n_heads,
                                   .n_kv_heads = e->n_kv_heads,
                                   .k_dim = e->k_dim,
                                   .v_dim = e->v_dim,
                                   .window = window,
                                   .rope = e->rope,
                                   .is_latent = e->q_latent != NULL};
    float *w_o = e->q_latent ? model_weights_latent_output(run->weights, e->layer, e->n_heads,
                                                           e->v_dim, &n_out)
                             : model_weights_attention_output(
                                   run->weights, e->layer, (size_t)e->n_heads * e->v_dim, &n_out);
    const uint32_t resident = window ? plan_view_resident(window, UINT32_MAX) : 0;
    const tqkv_status status =
        tqkv_calib_set_layer(run->calib, e->layer, &shape, w_o, n_out, resident, parallel_of(run));
    free(w_o);
    if (status == TQKV_OK) {
        run->shapes[e->layer] = shape;
        run->shapes[e->layer].rope = (tqkv_rope){0}; /* lives no longer than the event */
    }
    return status;
}

/* Q of the event as tqkv_calib_observe wants it. */
static const float *contiguous_q(calib_run *run, const tqkv_plugin_event *e)
{
    const size_t n_latent = e->q_latent ? e->v_dim : 0, dim = e->k_dim + n_latent;
    const size_t token = (size_t)e->n_heads * dim, n = token * e->n_tokens;
    if (!e->q_latent && e->q_head_stride == dim && e->q_token_stride == token)
        return e->q;
    if (run->q_copy_floats < n) {
        run->q_copy = tool_grow(run->q_copy, n, sizeof(float));
        run->q_copy_floats = n;
    }
    for (uint32_t t = 0; t < e->n_tokens; t++) {
        for (uint32_t h = 0; h < e->n_heads; h++) {
            const size_t from = t * e->q_token_stride + h * e->q_head_stride;
            float *to = run->q_copy + t * token + h * dim;
            memcpy(to, e->q + from, e->k_dim * sizeof(float));
            if (e->q_latent)
                memcpy(to + e->k_dim, e->q_latent + from, n_latent * sizeof(float));
        }
    }
    return run->q_copy;
}

static tqkv_status handle_event(calib_run *run, const tqkv_plugin_event *e)
{
    const int32_t *positions = e->positions ? e->positions : run->counted;
    char note[64];
    snprintf(note, sizeof(note), "%zu of %zu tokens", run->n_pieces_done * run->piece_tokens,
             run->n_pieces * run->piece_tokens);
    progress_set(&run->bar, (double)run->n_pieces_done + (double)e->layer / run->model->n_layers,
                 note);
    if (!run->shapes[e->layer].n_kv_heads) {
        const tqkv_status status = meet_layer(run, e);
        if (status != TQKV_OK)
            return status;
    }
    return tqkv_calib_observe(run->calib, e->layer, e->n_tokens, contiguous_q(run, e), e->k, e->v,
                              positions, e->scale, e->softcap, parallel_of(run));
}

static void on_event(void *user, const tqkv_plugin_event *e)
{
    calib_run *run = user;
    if (!run->is_observing || run->status != TQKV_OK || e->layer >= run->model->n_layers ||
        e->n_tokens > CALIB_PIECE_TOKENS)
        return;
    run->status = handle_event(run, e);
    run->failed_layer = e->layer;
}

/* Feeds a piece to an empty cache. */
static int show(calib_run *run, const int32_t *tokens, uint32_t n)
{
    host_ctx_clear(run->ctx);
    run->is_observing = true;
    const int rc = host_ctx_feed(run->ctx, tokens, n, n, 1);
    run->is_observing = false;
    if (rc == TOOL_OK && run->status != TQKV_OK)
        return tool_error("layer %u: %s", run->failed_layer, tqkv_status_text(run->status));
    return rc;
}

/* ---- life ------------------------------------------------------------------------------------ */

static void plan_pieces(calib_run *run)
{
    const size_t n = run->text->n, wanted = run->options.n_tokens < n ? run->options.n_tokens : n;
    run->n_pieces = (wanted + CALIB_PIECE_TOKENS - 1) / CALIB_PIECE_TOKENS;
    run->piece_tokens = (uint32_t)(wanted / run->n_pieces);
}

/* How many cells each layer has: fewer than the context means a sliding window. */
static void read_reserved(calib_run *run)
{
    tqkv_plugin_bytes total, *layers = tool_alloc(GGUF_LAYERS_MAX, sizeof(*layers));
    const size_t n = host_ctx_bytes(run->ctx, &total, layers, GGUF_LAYERS_MAX);
    for (size_t i = 0; i < n && i < GGUF_LAYERS_MAX; i++) {
        if (layers[i].layer < run->model->n_layers)
            run->reserved[layers[i].layer] = layers[i].f16_reserved;
    }
    free(layers);
}

int calib_run_create(host *h, workers *w, const gguf_head *model, const text_tokens *text,
                     const calib_options *options, calib_run **out)
{
    tqkv_calib_config config;
    *out = NULL;
    if (text->n < LEAST_TOKENS)
        return tool_error("the text has %zu tokens, at least %d are needed; give more with --text",
                          text->n, LEAST_TOKENS);
    calib_run *run = tool_alloc(1, sizeof(*run));
    *run = (calib_run){.h = h, .w = w, .model = model, .text = text, .options = *options};
    plan_pieces(run);
    /* Longer than a window and a micro-batch: a sliding layer shows by having fewer cells. */
    run->n_ctx =
        CALIB_PIECE_TOKENS + (model->window && model->window < 65536 ? model->window + 1024 : 0);
    run->piece = tool_alloc(CALIB_PIECE_TOKENS, sizeof(*run->piece));
    run->counted = tool_alloc(CALIB_PIECE_TOKENS, sizeof(*run->counted));
    for (int32_t t = 0; t < CALIB_PIECE_TOKENS; t++)
        run->counted[t] = t;
    run->shapes = tool_alloc(model->n_layers, sizeof(*run->shapes));
    run->reserved = tool_alloc(model->n_layers, sizeof(*run->reserved));
    run->kl = tool_alloc(2 * (size_t)model->n_layers, sizeof(*run->kl));

    tqkv_calib_config_init(&config);
    config.model = model->name;
    config.arch = model->arch;
    config.n_layers = model->n_layers;
    config.log = tool_logger();
    int rc = model_weights_open(options->model_path, &run->weights);
    if (rc == TOOL_OK) {
        const tqkv_status status = tqkv_calib_create(&config, &run->calib);
        rc = status == TQKV_OK ? TOOL_OK : tool_error("calibration: %s", tqkv_status_text(status));
    }
    if (rc == TOOL_OK)
        rc = host_ctx_create(h,
                             &(host_ctx_config){.cache = {.mode = "f16"},
                                                .n_ctx = run->n_ctx,
                                                .n_ubatch = CALIB_PIECE_TOKENS},
                             &run->ctx);
    if (rc != TOOL_OK) {
        calib_run_destroy(run);
        return rc;
    }
    read_reserved(run);
    host_observe(h, on_event, run);
    *out = run;
    return TOOL_OK;
}

static void leave_context(calib_run *run)
{
    host_observe(run->h, NULL, NULL);
    host_ctx_destroy(run->ctx);
    run->ctx = NULL;
}

void calib_run_destroy(calib_run *run)
{
    if (!run)
        return;
    leave_context(run);
    tqkv_calib_destroy(run->calib);
    model_weights_close(run->weights);
    free(run->q_copy);
    free(run->kl);
    free(run->shapes);
    free(run->reserved);
    free(run->counted);
    free(run->piece);
    free(run);
}

size_t calib_run_n_tokens(const calib_run *run)
{
    return run->n_pieces * run->piece_tokens;
}

/* ---- phases ---------------------------------------------------------------------------------- */

int calib_run_observe(calib_run *run, int index, int n_phases, double *seconds)
{
    const size_t n = run->piece_tokens, n_free = run->text->n - run->n_pieces * n;
    int rc = TOOL_OK;
    progress_begin(&run->bar, "observe", index, n_phases, (double)run->n_pieces);
    for (size_t i = 0; i < run->n_pieces && rc == TOOL_OK; i++) {
        /* Pieces lie evenly over the whole text. */
        const size_t gap = run->n_pieces > 1 ? n_free * i / (run->n_pieces - 1) : 0;
        text_piece(run->h, run->text, i * n + gap, (uint32_t)n, run->piece);
        rc = show(run, run->piece, (uint32_t)n);
        run->n_pieces_done = i + 1;
    }
    *seconds = progress_end(&run->bar, rc == TOOL_OK);
    leave_context(run);
    bool has_any = false;
    for (uint32_t i = 0; i < run->model->n_layers; i++)
        has_any = has_any || run->shapes[i].n_kv_heads;
    if (rc == TOOL_OK && !has_any)
        rc = tool_error("architecture '%s': no layer stored keys and values in the plugin's cache",
                        run->model->arch);
    return rc;
}

int calib_run_prepare(calib_run *run, int index, int n_phases, double *seconds)
{
    progress_begin(&run->bar, "transforms", index, n_phases, 0);
    const tqkv_status status = tqkv_calib_prepare(run->calib, parallel_of(run));
    *seconds = progress_end(&run->bar, status == TQKV_OK);
    return status == TQKV_OK ? TOOL_OK : tool_error("transforms: %s", tqkv_status_text(status));
}

int calib_run_perturb(calib_run *run, int index, int n_phases, double *seconds)
{
    const sensitivity_job job = {.h = run->h,
                                 .w = run->w,
                                 .calib = run->calib,
                                 .text = run->text,
                                 .layers = run->shapes,
                                 .n_layers = run->model->n_layers,
                                 .n_probes = run->options.n_probes,
                                 .bits = run->options.probe_bits,
                                 .bar = &run->bar};
    progress_begin(&run->bar, "sensitivity", index, n_phases, sensitivity_steps(&job));
    const int rc = sensitivity_measure(&job, run->kl);
    *seconds = progress_end(&run->bar, rc == TOOL_OK);
    return rc;
}

int calib_run_solve(calib_run *run, const tqkv_profile *profile, tqkv_plan **out)
{
    const tqkv_status status = tqkv_calib_solve(run->calib, profile, out);
    if (status != TQKV_OK)
        return tool_error("profile %s (%.2f bits): %s", profile->name, profile->bits_total,
                          tqkv_status_text(status));
    return TOOL_OK;
}

double calib_run_kl(const calib_run *run, uint32_t layer, tqkv_side side)
{
    return run->kl[2 * layer + (uint32_t)side];
}
