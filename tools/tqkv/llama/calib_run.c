/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A piece of text is one micro-batch, so one event of the plugin has all of a layer's rows. The
 * cache meanwhile stores f16: what is seen is the model itself.
 */
#include "calib_run.h"

#include <stdlib.h>
#include <string.h>

#include "logit_math.h"
#include "model_weights.h"
#include "plan_view.h"
#include "progress.h"

enum { SNIPPETS = 4, SCORE_STEP = 2, LEAST_TOKENS = 256, FLOOR_GROUPS = 4 };

typedef enum run_mode { MODE_IDLE, MODE_OBSERVE, MODE_PERTURB } run_mode;

/* One piece for the sensitivities and what the model makes of it undisturbed. */
typedef struct probe {
    int32_t tokens[CALIB_PROBE_TOKENS];
    float *logits;     /* [n_scored][n_vocab] */
    logit_base *stats; /* [n_scored] */
} probe;

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

    run_mode mode;
    tqkv_status status; /* first failure inside an event */
    uint32_t failed_layer;
    bool *is_known;     /* [n_layers] a layer's shape was set */
    uint64_t *reserved; /* [n_layers] bytes of a layer's cells in f16, 0: not told */
    uint32_t layer;     /* to perturb */
    tqkv_side side;
    double bits; /* to what width */
    float *q_copy;
    size_t q_copy_floats;
    int32_t *counted; /* 0, 1, 2, ... for graphs that hide positions */

    uint32_t probe_tokens, n_scored;
    size_t n_probes;
    probe *probes;
    const float *test; /* logits being compared */
    const probe *current;
    double *row_kl;
    double floor; /* KL of a change that is next to nothing */
    double *kl;   /* [n_layers][2] above the floor */
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
                                   .rope = e->rope};
    float *w_o = model_weights_attention_output(run->weights, e->layer,
                                                (size_t)e->n_heads * e->v_dim, &n_out);
    const uint32_t resident = window ? plan_view_resident(window, UINT32_MAX) : 0;
    const tqkv_status status =
        tqkv_calib_set_layer(run->calib, e->layer, &shape, w_o, n_out, resident, parallel_of(run));
    free(w_o);
    run->is_known[e->layer] = status == TQKV_OK;
    return status;
}

/* Q of the event as [n][n_heads][k_dim] without gaps. */
static const float *contiguous_q(calib_run *run, const tqkv_plugin_event *e)
{
    const size_t token = (size_t)e->n_heads * e->k_dim, n = token * e->n_tokens;
    if (e->q_head_stride == e->k_dim && e->q_token_stride == token)
        return e->q;
    if (run->q_copy_floats < n) {
        run->q_copy = tool_grow(run->q_copy, n, sizeof(float));
        run->q_copy_floats = n;
    }
    for (uint32_t t = 0; t < e->n_tokens; t++) {
        for (uint32_t h = 0; h < e->n_heads; h++)
            memcpy(run->q_copy + t * token + (size_t)h * e->k_dim,
                   e->q + t * e->q_token_stride + h * e->q_head_stride, e->k_dim * sizeof(float));
    }
    return run->q_copy;
}

static tqkv_status handle_event(calib_run *run, const tqkv_plugin_event *e)
{
    const int32_t *positions = e->positions ? e->positions : run->counted;
    if (run->mode == MODE_PERTURB) {
        if (e->layer != run->layer)
            return TQKV_OK;
        return tqkv_calib_perturb(run->calib, e->layer, run->side, (float)run->bits, e->n_tokens,
                                  positions, run->side == TQKV_SIDE_K ? e->k : e->v,
                                  parallel_of(run));
    }
    char note[64];
    snprintf(note, sizeof(note), "%zu of %zu tokens", run->n_pieces_done * run->piece_tokens,
             run->n_pieces * run->piece_tokens);
    progress_set(&run->bar, (double)run->n_pieces_done + (double)e->layer / run->model->n_layers,
                 note);
    if (!run->is_known[e->layer]) {
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
    if (run->mode == MODE_IDLE || run->status != TQKV_OK || e->layer >= run->model->n_layers ||
        e->n_tokens > CALIB_PIECE_TOKENS)
        return;
    run->status = handle_event(run, e);
    run->failed_layer = e->layer;
}

/* Feeds a piece to an empty cache. */
static int show(calib_run *run, run_mode mode, const int32_t *tokens, uint32_t n, uint32_t first,
                uint32_t step)
{
    host_ctx_clear(run->ctx);
    run->mode = mode;
    const int rc = host_ctx_feed(run->ctx, tokens, n, first, step);
    run->mode = MODE_IDLE;
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
    run->probe_tokens =
        (n < CALIB_PROBE_TOKENS ? (uint32_t)n : CALIB_PROBE_TOKENS) / SNIPPETS * SNIPPETS;
    run->n_scored = run->probe_tokens / SCORE_STEP;
    run->n_probes = run->options.n_probes;
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
    run->is_known = tool_alloc(model->n_layers, sizeof(*run->is_known));
    run->reserved = tool_alloc(model->n_layers, sizeof(*run->reserved));
    run->kl = tool_alloc(2 * (size_t)model->n_layers, sizeof(*run->kl));
    run->row_kl = tool_alloc(run->n_scored, sizeof(*run->row_kl));

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

void calib_run_destroy(calib_run *run)
{
    if (!run)
        return;
    host_observe(run->h, NULL, NULL);
    host_ctx_destroy(run->ctx);
    tqkv_calib_destroy(run->calib);
    model_weights_close(run->weights);
    for (size_t i = 0; run->probes && i < run->n_probes; i++) {
        free(run->probes[i].logits);
        free(run->probes[i].stats);
    }
    free(run->probes);
    free(run->q_copy);
    free(run->row_kl);
    free(run->kl);
    free(run->is_known);
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
        rc = show(run, MODE_OBSERVE, run->piece, (uint32_t)n, (uint32_t)n, 1);
        run->n_pieces_done = i + 1;
    }
    *seconds = progress_end(&run->bar, rc == TOOL_OK);
    bool has_any = false;
    for (uint32_t i = 0; i < run->model->n_layers; i++)
        has_any = has_any || run->is_known[i];
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

/* A probe is made of snippets from all over the text, so that few tokens see many kinds of it. */
static void make_probe(calib_run *run, size_t i)
{
    const uint32_t n = run->probe_tokens / SNIPPETS;
    const size_t n_snippets = SNIPPETS * run->n_probes;
    probe *p = &run->probes[i];
    for (size_t j = 0; j < SNIPPETS; j++) {
        const size_t number = j * run->n_probes + i;
        const size_t first = n_snippets > 1 ? (run->text->n - n) * number / (n_snippets - 1) : 0;
        memcpy(p->tokens + j * n, run->text->tokens + first, n * sizeof(*p->tokens));
    }
    if (host_first_token(run->h) >= 0)
        p->tokens[0] = host_first_token(run->h);
}

static void base_task(void *task, size_t i, size_t worker)
{
    calib_run *run = task;
    const size_t n_vocab = host_n_vocab(run->h);
    (void)worker;
    logit_base_init(&run->current->stats[i], run->current->logits + i * n_vocab, n_vocab);
}

static void kl_task(void *task, size_t i, size_t worker)
{
    calib_run *run = task;
    const size_t n_vocab = host_n_vocab(run->h);
    logit_diff diff;
    (void)worker;
    logit_compare(&diff, &run->current->stats[i], run->current->logits + i * n_vocab,
                  run->test + i * n_vocab, n_vocab);
    run->row_kl[i] = diff.kl;
}

static int show_probe(calib_run *run, run_mode mode, size_t i)
{
    run->current = &run->probes[i];
    const uint32_t n = run->probe_tokens;
    return show(run, mode, run->current->tokens, n, n - SCORE_STEP * (run->n_scored - 1) - 1,
                SCORE_STEP);
}

static int make_probes(calib_run *run)
{
    const size_t n_logits = (size_t)run->n_scored * host_n_vocab(run->h);
    int rc = TOOL_OK;
    run->probes = tool_alloc(run->n_probes, sizeof(*run->probes));
    for (size_t i = 0; i < run->n_probes && rc == TOOL_OK; i++) {
        probe *p = &run->probes[i];
        make_probe(run, i);
        p->logits = tool_alloc(n_logits, sizeof(float));
        p->stats = tool_alloc(run->n_scored, sizeof(*p->stats));
        rc = show_probe(run, MODE_IDLE, i);
        if (rc != TOOL_OK)
            break;
        memcpy(p->logits, host_ctx_logits(run->ctx), n_logits * sizeof(float));
        parallel_of(run)->run(parallel_of(run)->user, run->n_scored, base_task, run);
    }
    return rc;
}

/* Mean KL at the logits when one group is coarse. */
static int measure_group(calib_run *run, uint32_t layer, tqkv_side side, double bits, double *kl)
{
    double sum = 0;
    run->layer = layer;
    run->side = side;
    run->bits = bits;
    for (size_t i = 0; i < run->n_probes; i++) {
        const int rc = show_probe(run, MODE_PERTURB, i);
        if (rc != TOOL_OK)
            return rc;
        run->test = host_ctx_logits(run->ctx);
        parallel_of(run)->run(parallel_of(run)->user, run->n_scored, kl_task, run);
        for (uint32_t j = 0; j < run->n_scored; j++)
            sum += run->row_kl[j];
    }
    *kl = sum / ((double)run->n_probes * run->n_scored);
    return TOOL_OK;
}

static int set_sensitivity(const calib_run *run, uint32_t layer, tqkv_side side, double kl)
{
    const tqkv_status status = tqkv_calib_set_sensitivity(run->calib, layer, side, kl);
    return status == TQKV_OK
               ? TOOL_OK
               : tool_error("layer %u: sensitivity: %s", layer, tqkv_status_text(status));
}

/*
 * Hosts round activations to 8 bits before quantised weights, so that any change at all moves the
 * logits by a KL of some thousandths. 8 bits in a few groups show how much; it is no group's doing.
 */
static int measure_floor(calib_run *run)
{
    int rc = TOOL_OK;
    uint32_t n = 0;
    double sum = 0;
    for (uint32_t i = 1; i <= FLOOR_GROUPS && rc == TOOL_OK; i++) {
        const uint32_t layer = run->model->n_layers * i / (FLOOR_GROUPS + 1);
        double kl = 0;
        if (!run->is_known[layer])
            continue;
        rc = measure_group(run, layer, i % 2 ? TQKV_SIDE_K : TQKV_SIDE_V, 8, &kl);
        if (rc == TOOL_OK)
            rc = set_sensitivity(run, layer, i % 2 ? TQKV_SIDE_K : TQKV_SIDE_V,
                                 kl); /* measured again below */
        sum += kl;
        n++;
    }
    run->floor = n ? sum / n : 0;
    return rc;
}

static int perturb_group(calib_run *run, uint32_t layer, tqkv_side side)
{
    double kl;
    const int rc = measure_group(run, layer, side, run->options.probe_bits, &kl);
    if (rc != TOOL_OK)
        return rc;
    /* Below a twentieth of the floor nothing can be told apart. */
    kl = kl - run->floor > run->floor / 20 ? kl - run->floor : run->floor / 20;
    run->kl[2 * layer + (uint32_t)side] = kl;
    return set_sensitivity(run, layer, side, kl);
}

int calib_run_perturb(calib_run *run, int index, int n_phases, double *seconds)
{
    progress_begin(&run->bar, "sensitivity", index, n_phases, 2.0 * run->model->n_layers + 1);
    int rc = make_probes(run);
    if (rc == TOOL_OK)
        rc = measure_floor(run);
    for (uint32_t i = 0; i < 2 * run->model->n_layers && rc == TOOL_OK; i++) {
        char note[64];
        snprintf(note, sizeof(note), "layer %u %s", i / 2, i % 2 ? "V" : "K");
        progress_set(&run->bar, i + 1.0, note);
        if (run->is_known[i / 2])
            rc = perturb_group(run, i / 2, i % 2 ? TQKV_SIDE_V : TQKV_SIDE_K);
    }
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
