/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tiles: gather blocks that are seen, score them, step the softmax, add up V.
 */
#include "attn/attn_tile.h"

#include <math.h>
#include <string.h>

#include "attn/attn_codes.h"

#define ARRAYS 14
#define TO_L2 2 /* of __builtin_prefetch; into L1 was slower, where there is less room to wait */

static size_t round_floats(size_t n)
{
    const size_t unit = TQKV_ALIGN / sizeof(float);

    return (n + unit - 1) / unit * unit;
}

uint32_t tqkvi_attn_rows(const tqkv_plan_layer *shape)
{
    const uint32_t dim = shape->k_dim > shape->v_dim ? shape->k_dim : shape->v_dim;

    return dim <= 64 ? TQKVI_ATTN_ROWS_MAX : dim <= 128 ? 96 : dim <= 256 ? 48 : 24;
}

/* Floats of the arrays, in the order of the struct. */
static void array_floats(const tqkv_plan_layer *shape, size_t n[ARRAYS])
{
    const size_t rows = tqkvi_attn_rows(shape), code_rows = (size_t)2 * TQKVI_CODE_ROWS_MAX;

    n[0] = n[1] = n[2] = rows * shape->k_dim;
    n[3] = (size_t)TQKVI_TILE_TOKENS * shape->k_dim;
    n[4] = (size_t)TQKVI_TILE_TOKENS * shape->v_dim;
    n[5] = n[6] = rows * TQKVI_TILE_TOKENS;
    n[7] = n[8] = rows * shape->v_dim;
    n[9] = code_rows * shape->k_dim / TQKV_UNIT_CHANNELS * sizeof(tqkvk_query_unit) / sizeof(float);
    n[10] = TQKVI_CODE_ROWS_MAX * TQKVI_TILE_TOKENS * sizeof(uint16_t) / sizeof(float);
    n[11] = n[12] = shape->is_latent ? rows * shape->v_dim : 0;
    n[13] = shape->is_latent ? rows * TQKVI_TILE_TOKENS : 0;
    for (int i = 0; i < ARRAYS; i++)
        n[i] = round_floats(n[i]) + TQKV_ALIGN / sizeof(float); /* kernels may read past the end */
}

size_t tqkvi_attn_work_bytes(const tqkv_plan_layer *shape)
{
    size_t n[ARRAYS], bytes = sizeof(tqkvi_attn_work);

    array_floats(shape, n);
    for (int i = 0; i < ARRAYS; i++)
        bytes += n[i] * sizeof(float);
    return bytes;
}

tqkvi_attn_work *tqkvi_attn_work_init(void *memory, const tqkvi_attention *attention, uint32_t g,
                                      uint32_t first_row, uint32_t n_rows)
{
    const tqkv_plan_layer *shape = &attention->layer->shape;
    const uint32_t group = shape->n_heads / shape->n_kv_heads;
    tqkvi_attn_work *work = memory;
    float *next = (float *)(work + 1);
    size_t n[ARRAYS];

    *work =
        (tqkvi_attn_work){.attention = attention, .g = g, .first_row = first_row, .n_rows = n_rows};
    work->sight = (tqkvi_sight){.kernels = attention->kernels,
                                .args = attention->args,
                                .first_q = first_row / group,
                                .last_q = (first_row + n_rows - 1) / group,
                                .window = attention->window,
                                .first_position = attention->first_position};
    float *q8, *w;
    float **const arrays[ARRAYS] = {
        &work->q,      &work->turned, &work->coded, &work->k,        &work->v,
        &work->s,      &work->bias,   &work->acc[0], &work->acc[1],  &q8,
        &w,            &work->q_latent, &work->coded_latent, &work->s_latent};
    array_floats(shape, n);
    for (int i = 0; i < ARRAYS; i++) {
        *arrays[i] = next;
        next += n[i];
    }
    work->q8 = (tqkvk_query_unit *)(void *)q8;
    work->w = (uint16_t *)(void *)w;
    for (uint32_t r = 0; r < n_rows; r++) {
        work->m[r] = -INFINITY;
        work->pending[SPACE_Y][r] = work->pending[SPACE_X][r] = 1;
    }
    memset(work->acc[SPACE_Y], 0, (size_t)n_rows * shape->v_dim * sizeof(float));
    memset(work->acc[SPACE_X], 0, (size_t)n_rows * shape->v_dim * sizeof(float));
    return work;
}

static float dot_mean(const float *q, const float *mean, size_t dim)
{
    float sums[TQKV_UNIT_CHANNELS] = {0}, sum = 0;

    for (size_t d = 0; d < dim; d += TQKV_UNIT_CHANNELS)
        for (size_t i = 0; i < TQKV_UNIT_CHANNELS; i++)
            sums[i] += q[d + i] * mean[d + i];
    for (size_t i = 0; i < TQKV_UNIT_CHANNELS; i++)
        sum += sums[i];
    return sum;
}

/*
 * The rows of a part of the queries, times the softmax scale. A unit at a time, a fixed count, which
 * compilers turn into vector code.
 */
static void load_rows_of_q(const tqkvi_attn_work *work, const float *q, size_t dim, float *out)
{
    const tqkv_attend_args *args = work->attention->args;
    const tqkv_plan_layer *shape = &work->attention->layer->shape;
    const uint32_t group = shape->n_heads / shape->n_kv_heads;

    for (uint32_t r = 0; r < work->n_rows; r++) {
        const uint32_t row = work->first_row + r;
        const size_t h = (size_t)work->g * group + row % group;
        const float *from = q + row / group * args->q_token_stride + h * args->q_head_stride;
        for (size_t d = 0; d < dim; d += TQKV_UNIT_CHANNELS)
            for (size_t i = d; i < d + TQKV_UNIT_CHANNELS; i++)
                out[r * dim + i] = from[i] * args->scale;
    }
}

/* Latents do not turn: their q' serves every base. */
static void load_q_latent(tqkvi_attn_work *work)
{
    const tqkvi_attention *attention = work->attention;
    const tqkvi_attn_head *head = &attention->heads[TQKV_SIDE_V][work->g];
    const size_t dim = attention->layer->shape.v_dim;

    load_rows_of_q(work, attention->args->q_latent, dim, work->q_latent);
    if (!head->inverse)
        return;
    for (uint32_t r = 0; r < work->n_rows; r++)
        work->latent_mean[r] = dot_mean(work->q_latent + r * dim, head->mean, dim);
    attention->kernels->dot_tile(work->q_latent, work->n_rows, head->inverse, dim, dim,
                                 work->coded_latent, dim);
}

void tqkvi_attn_load_q(tqkvi_attn_work *work)
{
    const tqkv_plan_layer *shape = &work->attention->layer->shape;

    load_rows_of_q(work, work->attention->args->q, shape->k_dim, work->q);
    if (shape->is_latent)
        load_q_latent(work);
}

/* Whether a head's matrix is read as f16, which few rows wait for. */
static bool reads_half(const tqkvi_attn_work *work, const tqkvi_attn_head *head)
{
    return head->few.value && work->n_rows <= TQKVI_CODE_ROWS_MAX;
}

/* Makes q' of a base for every row. */
static void set_base(tqkvi_attn_work *work, int32_t base)
{
    const tqkvi_attention *attention = work->attention;
    const tqkvi_attn_head *head = &attention->heads[TQKV_SIDE_K][work->g];
    const size_t dim = attention->layer->shape.k_dim;

    if (work->has_base && (work->base == base || !attention->turn))
        return;
    memcpy(work->turned, work->q, work->n_rows * dim * sizeof(float));
    if (attention->turn)
        attention->turn(attention->turn_user, base, work->turned, work->n_rows);
    for (uint32_t r = 0; r < work->n_rows; r++)
        work->q_mean[r] = dot_mean(work->turned + r * dim, head->mean, dim);
    if (reads_half(work, head))
        attention->kernels->transform_half(&head->few, work->turned, work->coded, dim,
                                           work->n_rows);
    else
        attention->kernels->dot_tile(work->turned, work->n_rows, head->inverse, dim, dim,
                                     work->coded, dim);
    work->has_base = true;
    work->base = base;
    work->rounded_parts = 0;
}

static void load_raw(tqkvi_attn_work *work, tqkv_side side, float *out)
{
    const tqkvi_attn_tile *tile = &work->tile;
    const tqkv_plan_layer *shape = &work->attention->layer->shape;
    const size_t dim = side == TQKV_SIDE_K ? shape->k_dim : shape->v_dim;
    const size_t stride = dim * shape->n_kv_heads;

    for (uint32_t p = 0; p < tile->n_blocks; p++) {
        const size_t first = (size_t)tile->block[p] * TQKVI_BLOCK_TOKENS;
        for (size_t i = 0; i < TQKVI_BLOCK_TOKENS; i++, out += dim) {
            if (first + i < tile->span->n_tokens)
                memcpy(out, tile->span->rows[side] + (first + i) * stride + work->g * dim,
                       dim * sizeof(*out));
            else
                memset(out, 0, dim * sizeof(*out));
        }
    }
}

/* Coded rows of the tile to out, without their scales. */
static void load_coded(tqkvi_attn_work *work, tqkv_side side, float *out)
{
    const tqkvk_table *kernels = work->attention->kernels;
    const tqkvi_layout *layout = tqkvi_attn_layout(work, side);
    const bool plain = !work->attention->heads[side][work->g].inverse;
    const size_t floats = (size_t)TQKVI_BLOCK_TOKENS * layout->n_units * TQKV_UNIT_CHANNELS;

    for (uint32_t p = 0; p < work->tile.n_blocks; p++, out += floats) {
        const uint8_t *codes = tqkvi_attn_section(work, side, p) + TQKVI_BLOCK_TOKENS;
        if (plain)
            kernels->half_to_float(codes, out, floats);
        else
            kernels->unpack_block(layout, side, codes, out);
    }
}

static void load_rows(tqkvi_attn_work *work, tqkv_side side, float *out)
{
    if (work->tile.span->layout)
        load_coded(work, side, out);
    else
        load_raw(work, side, out);
}

static void load_scales(tqkvi_attn_work *work, tqkv_side side)
{
    for (uint32_t p = 0; p < work->tile.n_blocks; p++)
        work->attention->kernels->scale_values(tqkvi_attn_section(work, side, p),
                                               TQKVI_BLOCK_TOKENS,
                                               work->scale[side] + (size_t)p * TQKVI_BLOCK_TOKENS);
}

static void load_bias(tqkvi_attn_work *work)
{
    const tqkvi_attn_tile *tile = &work->tile;
    const tqkvi_sight *sight = &work->sight;

    for (uint32_t q = sight->first_q; q <= sight->last_q; q++) {
        float *bias = work->bias + (size_t)(q - sight->first_q) * TQKVI_TILE_TOKENS;
        bool used = false;
        for (uint32_t p = 0; p < tile->n_blocks; p++, bias += TQKVI_BLOCK_TOKENS)
            used |= tqkvi_sight_bias(sight, tile->span, tile->block[p], tile->visible[p], q, bias);
        work->bias_used[q - sight->first_q] = used;
    }
}

/* 16 scores at a time, a fixed count, which compilers turn into vector code. */
static void add_bias(float *restrict s, size_t n, const float *restrict bias, float slope)
{
    for (size_t i = 0; i < n; i += TQKVI_BLOCK_TOKENS)
        for (size_t j = i; j < i + TQKVI_BLOCK_TOKENS; j++)
            s[j] = bias[j] == -INFINITY ? -INFINITY : s[j] + slope * bias[j];
}

/* Softcap and mask of row r. */
static void fix_scores(tqkvi_attn_work *work, uint32_t r, size_t n)
{
    const tqkv_attend_args *args = work->attention->args;
    const tqkv_plan_layer *shape = &work->attention->layer->shape;
    const uint32_t group = shape->n_heads / shape->n_kv_heads;
    const uint32_t q = (work->first_row + r) / group - work->sight.first_q;
    float *s = work->s + (size_t)r * TQKVI_TILE_TOKENS;

    if (args->softcap != 0)
        for (size_t i = 0; i < n; i++)
            s[i] = args->softcap * tanhf(s[i] / args->softcap);
    if (work->bias_used[q]) {
        const float slope =
            args->slopes ? args->slopes[work->g * group + (work->first_row + r) % group] : 1;
        add_bias(s, n, work->bias + (size_t)q * TQKVI_TILE_TOKENS, slope);
    }
}

/* Whether the tile's rows of a side are coded, and if so, whether they are read as integers. */
static bool is_coded(const tqkvi_attn_work *work, tqkv_side side)
{
    return work->tile.span->layout && work->attention->heads[side][work->g].inverse;
}

static bool reads_codes(const tqkvi_attn_work *work, tqkv_side side)
{
    return is_coded(work, side) && work->n_rows <= TQKVI_CODE_ROWS_MAX &&
           !work->attention->layer->shape.is_latent;
}

/* Scores of every row with the tile's K, before softcap and mask. */
static void score_tile(tqkvi_attn_work *work, size_t n)
{
    const tqkvk_table *kernels = work->attention->kernels;
    const size_t dim = work->attention->layer->shape.k_dim;
    const bool coded = is_coded(work, TQKV_SIDE_K);

    if (coded) {
        load_scales(work, TQKV_SIDE_K);
        set_base(work, work->tile.base);
    }
    if (reads_codes(work, TQKV_SIDE_K)) {
        tqkvi_codes_score(work);
    } else {
        load_rows(work, TQKV_SIDE_K, work->k);
        kernels->dot_tile(coded ? work->coded : work->q, work->n_rows, work->k, n, dim, work->s,
                          TQKVI_TILE_TOKENS);
    }
    for (uint32_t r = 0; r < work->n_rows && coded; r++)
        kernels->scale_scores(work->s + (size_t)r * TQKVI_TILE_TOKENS, work->scale[TQKV_SIDE_K], n,
                              work->q_mean[r]);
}

/* Adds the latents' part of the scores: the tile's V, unpacked in work->v, as keys. */
static void score_latents(tqkvi_attn_work *work, size_t n)
{
    const tqkvk_table *kernels = work->attention->kernels;
    const size_t dim = work->attention->layer->shape.v_dim;
    const bool coded = is_coded(work, TQKV_SIDE_V);

    kernels->dot_tile(coded ? work->coded_latent : work->q_latent, work->n_rows, work->v, n, dim,
                      work->s_latent, TQKVI_TILE_TOKENS);
    for (uint32_t r = 0; r < work->n_rows; r++) {
        float *s = work->s + (size_t)r * TQKVI_TILE_TOKENS;
        float *part = work->s_latent + (size_t)r * TQKVI_TILE_TOKENS;
        if (coded)
            kernels->scale_scores(part, work->scale[TQKV_SIDE_V], n, work->latent_mean[r]);
        for (size_t i = 0; i < n; i++)
            s[i] += part[i];
    }
}

/* Scores of row r to weights of the tile's V, and the row's part of the sums. */
static void step_row(tqkvi_attn_work *work, uint32_t r, size_t n, int space)
{
    float *s = work->s + (size_t)r * TQKVI_TILE_TOKENS;

    fix_scores(work, r, n);
    const float f = work->attention->kernels->softmax_step(s, n, &work->m[r], &work->l[r]);
    work->nonzero[r] *= f;
    if (reads_codes(work, TQKV_SIDE_V))
        work->nonzero[r] += tqkvi_codes_round_weights(work, r);
    else if (space == SPACE_Y)
        work->nonzero[r] +=
            work->attention->kernels->scale_weights(s, work->scale[TQKV_SIDE_V], n);
    work->f[r] = f * work->pending[space][r];
    work->pending[space][r] = 1;
    work->pending[!space][r] *= f;
}

/*
 * Starts to load what this head has in the block a tile after the tile's block p. Sections of
 * other heads lie in between, so that the processor does not do it by itself; and it can wait for
 * so many lines only, so that a block at a time is asked for. Inlined, or GCC takes a function that
 * only prefetches for one without effect.
 */
static inline __attribute__((always_inline)) void ask_for(const tqkvi_attn_work *work,
                                                          const tqkvi_span *span, uint32_t block)
{
    const tqkvi_head_plan *head = &work->attention->layer->heads[TQKV_SIDE_V][work->g];
    const uint8_t *line = tqkvi_span_section(span, block, TQKV_SIDE_K, work->g);
    const uint8_t *end = tqkvi_span_section(span, block, TQKV_SIDE_V, work->g) +
                         (size_t)TQKVI_BLOCK_TOKENS * (1 + head->layout[span->tier].row_bytes);

    for (; line < end; line += TQKV_ALIGN)
        __builtin_prefetch(line, 0, TO_L2);
}

static inline __attribute__((always_inline)) void load_ahead(const tqkvi_attn_work *work,
                                                             uint32_t p)
{
    const tqkvi_span *span = work->tile.span;
    const uint32_t block = work->tile.block[p] + TQKVI_TILE_BLOCKS;

    if (span->layout && p < work->tile.n_blocks && block < work->tile.end)
        ask_for(work, span, block);
}

void tqkvi_attn_ask_first(const tqkvi_attn_work *work, const tqkvi_span *span, uint32_t first, uint32_t end)
{
    if (!span->layout || !span->cells)
        return;
    for (uint32_t block = first; block < end && block < first + TQKVI_TILE_BLOCKS; block++) {
        __builtin_prefetch(span->cells + (size_t)block * TQKVI_BLOCK_TOKENS);
        __builtin_prefetch(span->slot_bases + (size_t)block * TQKVI_BLOCK_TOKENS);
        ask_for(work, span, block);
    }
}

static void flush(tqkvi_attn_work *work)
{
    const tqkv_plan_layer *shape = &work->attention->layer->shape;
    const size_t n = (size_t)work->tile.n_blocks * TQKVI_BLOCK_TOKENS;

    if (n == 0)
        return;
    const bool codes = reads_codes(work, TQKV_SIDE_V);
    const int space = is_coded(work, TQKV_SIDE_V) ? SPACE_Y : SPACE_X;
    load_ahead(work, 0);
    score_tile(work, n);
    load_ahead(work, 1);
    load_bias(work);
    if (space == SPACE_Y)
        load_scales(work, TQKV_SIDE_V);
    if (!codes)
        load_rows(work, TQKV_SIDE_V, work->v);
    if (shape->is_latent)
        score_latents(work, n);
    load_ahead(work, 2);
    for (uint32_t r = 0; r < work->n_rows; r++)
        step_row(work, r, n, space);
    load_ahead(work, 3);
    if (codes)
        tqkvi_codes_weigh(work);
    else
        work->attention->kernels->accumulate_tile(work->s, TQKVI_TILE_TOKENS, work->n_rows, work->v,
                                                  n, shape->v_dim, work->f, work->acc[space]);
    work->used[space] = true;
    work->tile.n_blocks = 0;
}

static void add_block(tqkvi_attn_work *work, uint32_t block, uint32_t visible, int32_t base)
{
    tqkvi_attn_tile *tile = &work->tile;

    if (tile->n_blocks == TQKVI_TILE_BLOCKS || (tile->n_blocks > 0 && tile->base != base))
        flush(work);
    tile->base = base;
    tile->block[tile->n_blocks] = block;
    tile->visible[tile->n_blocks] = visible;
    tile->n_blocks++;
}

/* Tokens of a block differ in their bases: once over the blocks for each base. */
static void walk_by_base(tqkvi_attn_work *work, const tqkvi_span *span, uint32_t first,
                         uint32_t end)
{
    int64_t after = INT64_MIN;
    int32_t base;

    while (tqkvi_span_next_base(span, first, end, work->attention->args, after, &base)) {
        for (uint32_t block = first; block < end; block++) {
            uint32_t seen = tqkvi_span_same_base(span, block, base);
            if (seen)
                seen &= tqkvi_sight_block(&work->sight, span, block);
            if (seen)
                add_block(work, block, seen, base);
        }
        after = base;
    }
}

void tqkvi_attn_walk(tqkvi_attn_work *work, const tqkvi_span *span, uint32_t first, uint32_t end)
{
    const bool coded_k = span->layout && work->attention->heads[TQKV_SIDE_K][work->g].inverse;
    const bool turns = coded_k && work->attention->turn;
    const bool by_slot = turns && span->slot_bases;
    const int32_t *one_base =
        by_slot ? tqkvi_span_one_base(span, first, end, work->attention->args) : NULL;

    work->tile.span = span;
    work->tile.end = end;
    if (by_slot && !one_base) {
        walk_by_base(work, span, first, end);
    } else {
        for (uint32_t block = first; block < end; block++) {
            const uint32_t seen = tqkvi_sight_block(&work->sight, span, block);
            if (seen)
                add_block(work, block, seen,
                          one_base ? *one_base : turns ? span->block_bases[block] : 0);
        }
    }
    flush(work);
}

void tqkvi_attn_settle(tqkvi_attn_work *work)
{
    const size_t dim = work->attention->layer->shape.v_dim;

    for (int space = 0; space < 2; space++) {
        for (uint32_t r = 0; r < work->n_rows && work->used[space]; r++) {
            const float f = work->pending[space][r];
            work->pending[space][r] = 1;
            for (size_t d = 0; d < dim && f != 1; d++)
                work->acc[space][r * dim + d] *= f;
        }
    }
}

static void write_with_mean(const float *restrict acc, const float *restrict mean,
                            float mean_factor, float factor, size_t dim, float *restrict out)
{
    for (size_t d = 0; d < dim; d += TQKV_UNIT_CHANNELS)
        for (size_t i = d; i < d + TQKV_UNIT_CHANNELS; i++)
            out[i] = (acc[i] + mean_factor * mean[i]) * factor;
}

static void write_row(const tqkvi_attn_work *work, uint32_t r)
{
    const tqkvi_attention *attention = work->attention;
    const tqkv_attend_args *args = attention->args;
    const tqkv_plan_layer *shape = &attention->layer->shape;
    const tqkvi_attn_head *head = &attention->heads[TQKV_SIDE_V][work->g];
    const uint32_t group = shape->n_heads / shape->n_kv_heads;
    const uint32_t row = work->first_row + r;
    const size_t t = row / group, h = (size_t)work->g * group + row % group;
    const float *acc = work->acc[SPACE_X] + (size_t)r * shape->v_dim;
    float *out = args->out + t * args->out_token_stride + h * args->out_head_stride;
    float m = work->m[r], l = work->l[r], f = 1;

    if (args->sinks) {
        const float top = m > args->sinks[h] ? m : args->sinks[h];
        f = m == -INFINITY ? 0 : expf(m - top);
        l = top == -INFINITY ? 0 : l * f + expf(args->sinks[h] - top);
        m = top;
    }
    const float factor = l > 0 ? f / l : 0;
    const float mean_factor = work->used[SPACE_Y] ? work->nonzero[r] : 0;
    if (head->inverse)
        write_with_mean(acc, head->mean, mean_factor, factor, shape->v_dim, out);
    else
        for (size_t d = 0; d < shape->v_dim; d++)
            out[d] = acc[d] * factor;
    if (args->lse)
        args->lse[t * shape->n_heads + h] = l > 0 ? m + logf(l) : -INFINITY;
}

static void add_floats(float *restrict sum, const float *restrict part, size_t n)
{
    for (size_t d = 0; d < n; d += TQKV_UNIT_CHANNELS)
        for (size_t i = d; i < d + TQKV_UNIT_CHANNELS; i++)
            sum[i] += part[i];
}

/* The sums of coded V, through the inverse, to those of plain V. */
static void uncode_sums(tqkvi_attn_work *work)
{
    const tqkvi_attention *attention = work->attention;
    const tqkvi_attn_head *head = &attention->heads[TQKV_SIDE_V][work->g];
    const size_t dim = attention->layer->shape.v_dim, n = work->n_rows * dim;
    float *plain = work->acc[SPACE_X];

    if (reads_half(work, head)) {
        float *part = work->v; /* room for TQKVI_TILE_TOKENS rows */
        attention->kernels->transform_half(&head->few, work->acc[SPACE_Y], part, dim,
                                           work->n_rows);
        add_floats(plain, part, n);
        return;
    }
    for (uint32_t r = 0; r < work->n_rows; r++)
        work->f[r] = 1;
    attention->kernels->accumulate_tile(work->acc[SPACE_Y], dim, work->n_rows, head->inverse, dim,
                                        dim, work->f, plain);
}

void tqkvi_attn_finish(tqkvi_attn_work *work)
{
    tqkvi_attn_settle(work);
    if (work->used[SPACE_Y])
        uncode_sums(work);
    for (uint32_t r = 0; r < work->n_rows; r++)
        write_row(work, r);
}
