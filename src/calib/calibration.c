/* SPDX-License-Identifier: Apache-2.0 */
/* Life of a calibration: creation, fixing the transforms, perturbing one group at a time. */
#include "calib/calibration.h"

#include <string.h>

#include "base/log.h"
#include "calib/allocate.h"
#include "calib/fit.h"

enum { CHUNK_TOKENS = 64, DRAFT_TIER = 0, DRAFT_CONTEXT = 1 /* a draft is never stored */ };

static char *copy_text(const tqkv_allocator *mem, const char *text)
{
    const size_t n = strlen(text ? text : "") + 1;
    char *copy = tqkvi_alloc(mem, n);

    if (copy)
        memcpy(copy, text ? text : "", n);
    return copy;
}

static uint32_t side_dim(const tqkv_plan_layer *shape, tqkv_side side)
{
    return side == TQKV_SIDE_K ? shape->k_dim : shape->v_dim;
}

uint32_t tqkvi_calib_units(const tqkv_calib *calib, uint32_t layer, tqkv_side side)
{
    const tqkv_plan_layer *shape = &calib->layers[layer].shape;

    return shape->n_kv_heads * (side_dim(shape, side) / TQKV_UNIT_CHANNELS);
}

double tqkvi_calib_loss(const tqkv_calib *calib, uint32_t layer, tqkv_side side, uint32_t unit)
{
    const tqkvi_group *group = &calib->groups[side][layer];

    return group->distortion[unit] * (group->sensitivity > 0.0 ? group->sensitivity : 1.0);
}

tqkv_status tqkvi_calib_create(const tqkv_calib_config *config, tqkv_calib **out)
{
    tqkv_allocator mem;
    tqkv_calib *calib;

    *out = NULL;
    tqkvi_allocator_init(&mem, config->mem);
    calib = tqkvi_alloc_zero(&mem, sizeof(*calib));
    if (!calib)
        return TQKV_ERR_NO_MEMORY;
    calib->mem = mem;
    if (config->log)
        calib->log = *config->log;
    calib->n_layers = config->n_layers;
    calib->frame_tokens = config->frame_tokens;
    calib->n_sinks = config->n_sinks;
    calib->gamma = config->gamma;
    calib->model = copy_text(&mem, config->model);
    calib->arch = copy_text(&mem, config->arch);
    calib->layers = tqkvi_alloc_zero(&mem, config->n_layers * sizeof(*calib->layers));
    calib->codecs = tqkvi_alloc_zero(&mem, config->n_layers * sizeof(tqkv_codec *));
    for (int side = 0; side < 2; side++)
        calib->groups[side] = tqkvi_alloc_zero(&mem, config->n_layers * sizeof(*calib->groups[side]));
    if (!calib->model || !calib->arch || !calib->layers || !calib->codecs || !calib->groups[0] || !calib->groups[1]) {
        tqkvi_calib_destroy(calib);
        return TQKV_ERR_NO_MEMORY;
    }
    *out = calib;
    return TQKV_OK;
}

static void drop_draft(tqkv_calib *calib)
{
    for (uint32_t l = 0; l < calib->n_layers; l++) {
        if (calib->codecs) {
            tqkv_codec_destroy(calib->codecs[l]);
            calib->codecs[l] = NULL;
        }
        for (int side = 0; side < 2; side++)
            if (calib->groups[side]) {
                tqkvi_free(&calib->mem, calib->groups[side][l].distortion);
                calib->groups[side][l].distortion = NULL;
            }
    }
    tqkv_plan_destroy(calib->draft);
    calib->draft = NULL;
}

void tqkvi_calib_destroy(tqkv_calib *calib)
{
    tqkv_allocator mem;

    if (!calib)
        return;
    mem = calib->mem;
    drop_draft(calib);
    for (uint32_t l = 0; calib->layers && l < calib->n_layers; l++)
        tqkvi_layer_stats_deinit(&calib->layers[l], &mem);
    tqkvi_free(&mem, calib->layers);
    tqkvi_free(&mem, calib->codecs);
    tqkvi_free(&mem, calib->groups[0]);
    tqkvi_free(&mem, calib->groups[1]);
    tqkvi_free(&mem, calib->model);
    tqkvi_free(&mem, calib->arch);
    tqkvi_free(&mem, calib);
}

/* ---- transforms ------------------------------------------------------------------------------ */

typedef struct fit_task {
    tqkv_calib *calib;
    uint32_t layer;
    tqkv_status *status; /* [2 * n_kv_heads] */
} fit_task;

static void fit_one(void *arg, size_t i, size_t worker)
{
    const fit_task *task = arg;
    tqkv_calib *calib = task->calib;
    const tqkvi_layer_stats *stats = &calib->layers[task->layer];
    const tqkv_side side = i < stats->shape.n_kv_heads ? TQKV_SIDE_K : TQKV_SIDE_V;
    const size_t head = i % stats->shape.n_kv_heads;
    const uint32_t dim = side_dim(&stats->shape, side);

    (void)worker;
    task->status[i] = tqkvi_fit_head(&stats->heads[side][head], &calib->mem, dim, calib->gamma,
                                     &calib->draft->layers[task->layer].heads[side][head],
                                     calib->groups[side][task->layer].distortion + head * (dim / TQKV_UNIT_CHANNELS));
}

static tqkv_status fit_layer(tqkv_calib *calib, uint32_t layer, const tqkv_parallel *parallel)
{
    const uint32_t n_heads = calib->layers[layer].shape.n_kv_heads;
    tqkv_status status = TQKV_OK;
    fit_task task = {.calib = calib, .layer = layer};

    for (int side = 0; side < 2; side++) {
        const size_t n_units = tqkvi_calib_units(calib, layer, (tqkv_side)side);

        calib->groups[side][layer].distortion = tqkvi_alloc_zero(&calib->mem, n_units * sizeof(double));
        if (!calib->groups[side][layer].distortion)
            return TQKV_ERR_NO_MEMORY;
    }
    task.status = tqkvi_alloc_zero(&calib->mem, 2 * n_heads * sizeof(*task.status));
    if (!task.status)
        return TQKV_ERR_NO_MEMORY;
    tqkvi_run(parallel, 2 * (size_t)n_heads, fit_one, &task);
    for (uint32_t i = 0; i < 2 * n_heads && status == TQKV_OK; i++)
        status = task.status[i];
    tqkvi_free(&calib->mem, task.status);
    if (status == TQKV_ERR_INVALID_ARG)
        tqkvi_log(&calib->log, TQKV_LOG_ERROR, "layer %u saw no usable tokens: give more text", layer);
    return status;
}

/* Every unit of a group at one width, so that a draft can be sealed. */
static tqkv_status flat_layout(tqkv_calib *calib, uint32_t layer, tqkv_side side, uint8_t width)
{
    const tqkv_plan_layer *shape = &calib->layers[layer].shape;
    uint8_t bits[TQKV_UNITS_MAX];

    memset(bits, width, sizeof(bits));
    for (uint32_t g = 0; g < shape->n_kv_heads; g++)
        TQKV_TRY(tqkvi_layout_init(&calib->draft->layers[layer].heads[side][g].layout[DRAFT_TIER], bits,
                                   side_dim(shape, side) / TQKV_UNIT_CHANNELS));
    return TQKV_OK;
}

static tqkv_status make_draft(tqkv_calib *calib, const tqkv_parallel *parallel)
{
    tqkv_plan_layer *shapes = tqkvi_alloc(&calib->mem, calib->n_layers * sizeof(*shapes));
    tqkv_status status;

    if (!shapes)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t l = 0; l < calib->n_layers; l++)
        shapes[l] = calib->layers[l].shape;
    status = tqkvi_plan_create(&calib->mem, shapes, calib->n_layers, &calib->draft);
    tqkvi_free(&calib->mem, shapes);
    TQKV_TRY(status);
    calib->draft->n_tiers = 1;
    calib->draft->n_sinks = calib->n_sinks;
    calib->draft->frame_tokens = calib->frame_tokens;
    calib->draft->context = DRAFT_CONTEXT;
    TQKV_TRY(tqkvi_plan_set_names(calib->draft, calib->model, calib->arch, "draft"));
    for (uint32_t l = 0; l < calib->n_layers; l++) {
        if (calib->layers[l].shape.n_kv_heads == 0)
            continue;
        TQKV_TRY(fit_layer(calib, l, parallel));
        TQKV_TRY(flat_layout(calib, l, TQKV_SIDE_K, 8));
        TQKV_TRY(flat_layout(calib, l, TQKV_SIDE_V, 8));
    }
    TQKV_TRY(tqkvi_plan_seal(calib->draft, &calib->log));
    for (uint32_t l = 0; l < calib->n_layers; l++)
        if (calib->layers[l].shape.n_kv_heads)
            TQKV_TRY(tqkv_codec_create(calib->draft, l, NULL, &calib->mem, &calib->codecs[l]));
    return TQKV_OK;
}

tqkv_status tqkvi_calib_prepare(tqkv_calib *calib, const tqkv_parallel *parallel)
{
    const tqkv_status status = make_draft(calib, parallel);

    if (status != TQKV_OK)
        drop_draft(calib);
    return status;
}

/* ---- perturbation ---------------------------------------------------------------------------- */

/* Widths of the group's heads at `bits` per value, by the group's own losses. */
static tqkv_status perturb_layout(tqkv_calib *calib, uint32_t layer, tqkv_side side, float bits)
{
    const tqkv_plan_layer *shape = &calib->layers[layer].shape;
    const uint32_t per_head = side_dim(shape, side) / TQKV_UNIT_CHANNELS;
    const uint32_t n_units = shape->n_kv_heads * per_head;
    const uint32_t merge = tqkvi_fit_band(side_dim(shape, side)) / TQKV_UNIT_CHANNELS;
    tqkvi_band *bands = tqkvi_alloc(&calib->mem, n_units / merge * sizeof(*bands));
    uint8_t widths[TQKV_UNITS_MAX];
    tqkv_status status = TQKV_OK;

    if (!bands)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t b = 0; b < n_units / merge; b++)
        bands[b] = (tqkvi_band){.loss = calib->groups[side][layer].distortion[b * merge], .price = 1.0};
    tqkvi_allocate(bands, n_units / merge, 8, (double)bits * (double)(n_units / merge) + 1e-6);
    for (uint32_t g = 0; g < shape->n_kv_heads && status == TQKV_OK; g++) {
        for (uint32_t u = 0; u < per_head; u++)
            widths[u] = bands[(g * per_head + u) / merge].bits;
        status = tqkvi_layout_init(&calib->draft->layers[layer].heads[side][g].layout[DRAFT_TIER], widths, per_head);
    }
    tqkvi_free(&calib->mem, bands);
    return status;
}

typedef struct perturb_task {
    const tqkv_calib *calib;
    const tqkv_codec *codec;
    const tqkvi_group *group;
    tqkv_side side;
    uint32_t n_sinks, frame_tokens, n_heads, dim;
    size_t n, n_chunks, scratch_floats;
    const int32_t *positions;
    float *rows, *scratch;
    double *error; /* [n_heads * n_chunks] */
} perturb_task;

/* Weighted squared error of a row that moved by delta (turned into the frame already). */
static double weighted_error(const perturb_task *task, size_t head, const float *delta, float *y)
{
    const tqkvi_head_codec *codec = &task->codec->heads[task->side][head];
    const size_t n_units = task->dim / TQKV_UNIT_CHANNELS;
    double sum = 0.0;

    task->codec->kernels->transform(codec->plan->transform, delta, y, task->dim, 1);
    for (size_t i = 0; i < task->dim; i++)
        sum += task->group->distortion[head * n_units + i / TQKV_UNIT_CHANNELS] * (double)y[i] * (double)y[i];
    return sum;
}

/* Task i: head i / n_chunks, tokens of chunk i % n_chunks. */
static void perturb_chunk(void *arg, size_t i, size_t worker)
{
    const perturb_task *task = arg;
    const size_t head = i / task->n_chunks, first = i % task->n_chunks * CHUNK_TOKENS;
    const size_t end = first + CHUNK_TOKENS < task->n ? first + CHUNK_TOKENS : task->n;
    const tqkv_rope *rope = &task->codec->rope;
    const bool turned = task->side == TQKV_SIDE_K && rope->n_rot > 0;
    float cosine[TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS / 2], sine[TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS / 2];
    _Alignas(TQKV_ALIGN) float delta[TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS + TQKV_ALIGN / sizeof(float)];
    _Alignas(TQKV_ALIGN) float y[TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS + TQKV_ALIGN / sizeof(float)];
    uint8_t codes[TQKV_UNITS_MAX * TQKV_UNIT_CHANNELS + TQKV_ALIGN];
    float *scratch = task->scratch + i * task->scratch_floats;
    int32_t base = -1;

    (void)worker;
    for (size_t t = first; t < end; t++) {
        float *x = task->rows + (t * task->n_heads + head) * task->dim;
        const int32_t wanted = tqkvi_frame_base(task->positions[t], task->frame_tokens);
        uint8_t scale;

        if (task->positions[t] < (int32_t)task->n_sinks)
            continue;
        if (turned && wanted != base)
            tqkvi_turn_init(rope, wanted, cosine, sine);
        base = wanted;
        memcpy(delta, x, task->dim * sizeof(*x));
        (void)tqkvi_encode_row(task->codec, task->side, (uint32_t)head, DRAFT_TIER, turned ? cosine : NULL,
                               turned ? sine : NULL, x, &scale, codes, scratch);
        tqkvi_decode_row(task->codec, task->side, (uint32_t)head, DRAFT_TIER, turned ? cosine : NULL,
                         turned ? sine : NULL, scale, codes, x, scratch);
        for (size_t d = 0; d < task->dim; d++)
            delta[d] = x[d] - delta[d];
        if (turned)
            tqkvi_turn_apply(rope, cosine, sine, true, delta);
        task->error[i] += weighted_error(task, head, delta, y);
    }
}

tqkv_status tqkvi_calib_perturb(tqkv_calib *calib, uint32_t layer, tqkv_side side, float bits, size_t n,
                                const int32_t *positions, float *rows, double *distortion,
                                const tqkv_parallel *parallel)
{
    const tqkv_plan_layer *shape = &calib->layers[layer].shape;
    perturb_task task = {.calib = calib,
                         .codec = calib->codecs[layer],
                         .group = &calib->groups[side][layer],
                         .side = side,
                         .n_sinks = calib->n_sinks,
                         .frame_tokens = calib->frame_tokens,
                         .n_heads = shape->n_kv_heads,
                         .dim = side_dim(shape, side),
                         .n = n,
                         .n_chunks = (n + CHUNK_TOKENS - 1) / CHUNK_TOKENS,
                         .positions = positions,
                         .rows = rows};
    const size_t n_tasks = task.n_heads * task.n_chunks;
    double sum = 0.0;
    tqkv_status status;

    if (!task.codec)
        return TQKV_ERR_INVALID_ARG;
    TQKV_TRY(perturb_layout(calib, layer, side, bits));
    task.scratch_floats = (tqkvi_codec_scratch_floats(task.codec) + 31) / 16 * 16;
    task.scratch = tqkvi_alloc(&calib->mem, n_tasks * task.scratch_floats * sizeof(float));
    task.error = tqkvi_alloc_zero(&calib->mem, n_tasks * sizeof(*task.error));
    status = task.scratch && task.error ? TQKV_OK : TQKV_ERR_NO_MEMORY;
    if (status == TQKV_OK) {
        tqkvi_run(parallel, n_tasks, perturb_chunk, &task);
        for (size_t i = 0; i < n_tasks; i++)
            sum += task.error[i];
        *distortion = sum / (double)n;
    }
    tqkvi_free(&calib->mem, task.error);
    tqkvi_free(&calib->mem, task.scratch);
    return status;
}
