/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cuts a call into tasks and merges what they found.
 *
 *     task = KV head x block of query rows x part of the blocks of all spans
 *
 * With one part the task writes the output itself. Otherwise each part leaves its sums in scratch
 * and a second round merges the parts of a block of rows, in order.
 */
#include "attn/attention.h"

#include <math.h>
#include <string.h>

#include "attn/attn_tile.h"
#include "base/alloc.h"
#include "base/parallel.h"

/* Enough to keep many threads busy, few enough that merging and making q' stay small. */
#define TASKS_MAX 64
#define TASKS_MIN 32
#define PART_BLOCKS_WANTED 128 /* or there are TASKS_MIN only: a part makes q' of its bases anew */
/* A part has at least that many blocks, so that making q' stays small beside reading the rows. */
#define PART_BLOCKS_MIN 16
/* q' of a latent takes as many products as the scores and the sums of v_dim / 2 tokens. */
#define LATENT_PART_BLOCKS_MIN 64

typedef struct attend_call {
    const tqkvi_attention *attention;
    uint32_t n_row_blocks, rows_per_block, n_rows; /* of one KV head */
    uint32_t n_parts, part_blocks;
    uint32_t n_blocks; /* of all spans */
    size_t n_tasks;    /* of attention; those beside it follow */
    uint8_t *work;     /* [n_workers] */
    size_t work_bytes;
    uint8_t *parts; /* [KV heads][row blocks][parts] sums */
    size_t part_bytes;
} attend_call;

/* Sums of one part: m, l, nonzero, used, then acc[2] of [rows][v_dim]. */
typedef struct part_sums {
    float m[TQKVI_ATTN_ROWS_MAX];
    float l[TQKVI_ATTN_ROWS_MAX];
    float nonzero[TQKVI_ATTN_ROWS_MAX];
    bool used[2];
} part_sums;

static size_t part_bytes(const tqkv_plan_layer *shape, size_t n_rows)
{
    return tqkvi_align_up(sizeof(part_sums) + 2 * n_rows * shape->v_dim * sizeof(float));
}

static uint32_t part_blocks_min(const tqkv_plan_layer *shape)
{
    return shape->is_latent ? LATENT_PART_BLOCKS_MIN : PART_BLOCKS_MIN;
}

static uint32_t parts_for(uint32_t n_tasks, uint32_t n_kv_heads, uint32_t n_row_blocks)
{
    const uint64_t n = (uint64_t)n_kv_heads * n_row_blocks;

    return n >= n_tasks ? 1 : tqkvi_div_up(n_tasks, (uint32_t)n);
}

/* Blocks of a part, of n_blocks; at most parts_for(TASKS_MAX, ...) parts come of it. */
static uint32_t blocks_of_part(const tqkv_plan_layer *shape, uint32_t frame_blocks,
                               uint32_t n_row_blocks, uint32_t n_blocks)
{
    const uint32_t blocks_min = part_blocks_min(shape);
    const uint32_t parts_max = parts_for(TASKS_MAX, shape->n_kv_heads, n_row_blocks);
    uint32_t n_parts = parts_max;

    if (n_blocks / n_parts < PART_BLOCKS_WANTED)
        n_parts = parts_for(TASKS_MIN, shape->n_kv_heads, n_row_blocks);
    if (n_parts > n_blocks / blocks_min)
        n_parts = n_blocks / blocks_min;
    if (n_parts <= 1)
        return n_blocks;
    const uint32_t n = tqkvi_div_up(n_blocks, n_parts);
    if (frame_blocks == 0 || n < frame_blocks)
        return tqkvi_div_up(n, blocks_min) * blocks_min;
    /* Whole frames, as a part makes q' of each anew that it has a piece of. */
    const uint32_t fewer = n / frame_blocks * frame_blocks;
    return tqkvi_div_up(n_blocks, fewer) <= parts_max ? fewer : fewer + frame_blocks;
}

size_t tqkvi_attention_scratch_bytes(const tqkv_plan_layer *shape, uint32_t n_q, size_t n_workers)
{
    const uint32_t rows = tqkvi_attn_rows(shape);
    const uint64_t n_rows = (uint64_t)n_q * (shape->n_heads / shape->n_kv_heads);
    size_t bytes, parts = 0;

    /* Fewer row blocks mean more parts: the worst number of row blocks up to n_q's counts. */
    for (uint64_t n = 1; n <= n_rows / rows + 1; n++) {
        const uint32_t n_parts = parts_for(TASKS_MAX, shape->n_kv_heads, (uint32_t)n);
        if (n_parts == 1)
            break;
        const size_t held = (size_t)shape->n_kv_heads * n * n_parts *
                            part_bytes(shape, n_rows < rows ? n_rows : rows);
        parts = held > parts ? held : parts;
    }
    if (tqkvi_size_mul(tqkvi_attn_work_bytes(shape), n_workers ? n_workers : 1, &bytes) !=
            TQKV_OK ||
        tqkvi_size_add(bytes, parts, &bytes) != TQKV_OK)
        return SIZE_MAX;
    return bytes;
}

typedef struct block_range {
    uint32_t first, end;
} block_range;

/* The blocks of a span of n that are in the part [first, end), which counts from the span's first block. */
static block_range blocks_in_part(uint32_t n, int64_t first, int64_t end)
{
    return (block_range){(uint32_t)(first < 0 ? 0 : first < n ? first : n),
                         (uint32_t)(end < 0 ? 0 : end < n ? end : n)};
}

/* Walks the blocks [first, end) of the spans as if they lay one after another, when the first ones of each are on their way. */
static void walk_part(tqkvi_attn_work *work, const tqkvi_attention *attention, uint32_t first,
                      uint32_t end)
{
    for (int walks = 0; walks < 2; walks++) {
        int64_t start = 0;
        for (size_t i = 0; i < attention->n_spans && start < end; i++) {
            const tqkvi_span *span = &attention->spans[i];
            const uint32_t n = tqkvi_span_blocks(span, attention->args);
            const block_range range = blocks_in_part(n, first - start, end - start);
            if (range.first < range.end && walks)
                tqkvi_attn_walk(work, span, range.first, range.end);
            else if (range.first < range.end)
                tqkvi_attn_ask_first(work, span, range.first, range.end);
            start += n;
        }
    }
}

static tqkvi_attn_work *open_rows(const attend_call *call, size_t worker, size_t rows_index)
{
    const uint32_t g = (uint32_t)(rows_index / call->n_row_blocks);
    const uint32_t first = (uint32_t)(rows_index % call->n_row_blocks) * call->rows_per_block;
    const uint32_t left = call->n_rows - first;

    return tqkvi_attn_work_init(call->work + worker * call->work_bytes, call->attention, g, first,
                                left < call->rows_per_block ? left : call->rows_per_block);
}

static void save_part(tqkvi_attn_work *work, uint8_t *memory)
{
    const size_t n = (size_t)work->n_rows * work->attention->layer->shape.v_dim;
    part_sums *part = (part_sums *)(void *)memory;
    float *acc = (float *)(void *)(memory + sizeof(*part));

    tqkvi_attn_settle(work);
    memcpy(part->m, work->m, work->n_rows * sizeof(*part->m));
    memcpy(part->l, work->l, work->n_rows * sizeof(*part->l));
    memcpy(part->nonzero, work->nonzero, work->n_rows * sizeof(*part->nonzero));
    memcpy(part->used, work->used, sizeof(part->used));
    for (int space = 0; space < 2; space++)
        if (work->used[space])
            memcpy(acc + (size_t)space * n, work->acc[space], n * sizeof(*acc));
}

static void merge_part(tqkvi_attn_work *work, const uint8_t *memory)
{
    const size_t dim = work->attention->layer->shape.v_dim;
    const part_sums *part = (const part_sums *)(const void *)memory;
    const float *acc = (const float *)(const void *)(memory + sizeof(*part));

    for (uint32_t r = 0; r < work->n_rows; r++) {
        const float m = work->m[r] > part->m[r] ? work->m[r] : part->m[r];
        if (m == -INFINITY)
            continue;
        const float old = expf(work->m[r] - m), new = expf(part->m[r] - m);
        work->m[r] = m;
        work->l[r] = work->l[r] * old + part->l[r] * new;
        work->nonzero[r] = work->nonzero[r] * old + part->nonzero[r] * new;
        for (size_t space = 0; space < 2; space++) {
            float *to = work->acc[space] + r * dim;
            const float *from = acc + (space * work->n_rows + r) * dim;
            if (part->used[space])
                for (size_t d = 0; d < dim; d++)
                    to[d] = to[d] * old + from[d] * new;
            else if (work->used[space])
                for (size_t d = 0; d < dim; d++)
                    to[d] *= old;
        }
    }
    work->used[0] |= part->used[0];
    work->used[1] |= part->used[1];
}

static void attend_task(void *user, size_t i, size_t worker)
{
    const attend_call *call = user;
    const uint32_t part = (uint32_t)(i % call->n_parts);
    tqkvi_attn_work *work = open_rows(call, worker, i / call->n_parts);
    const uint32_t first = part * call->part_blocks;
    const uint32_t left = call->n_blocks - first;

    tqkvi_attn_load_q(work);
    walk_part(work, call->attention, first,
              first + (left < call->part_blocks ? left : call->part_blocks));
    if (call->n_parts == 1)
        tqkvi_attn_finish(work);
    else
        save_part(work, call->parts + i * call->part_bytes);
}

static void call_task(void *user, size_t i, size_t worker)
{
    const attend_call *call = user;
    const tqkvi_beside *beside = &call->attention->beside;

    if (i < call->n_tasks)
        attend_task(user, i, worker);
    else
        beside->fn(beside->user, i - call->n_tasks, worker);
}

static void merge_task(void *user, size_t i, size_t worker)
{
    const attend_call *call = user;
    tqkvi_attn_work *work = open_rows(call, worker, i);

    for (uint32_t part = 0; part < call->n_parts; part++)
        merge_part(work, call->parts + (i * call->n_parts + part) * call->part_bytes);
    tqkvi_attn_finish(work);
}

void tqkvi_attend(const tqkvi_attention *attention, const tqkv_parallel *parallel)
{
    const tqkv_plan_layer *shape = &attention->layer->shape;
    const size_t n_workers = parallel ? parallel->n_workers : 1;
    attend_call call = {.attention = attention,
                        .rows_per_block = tqkvi_attn_rows(shape),
                        .n_rows = attention->args->n_q * (shape->n_heads / shape->n_kv_heads),
                        .work = attention->args->scratch,
                        .work_bytes = tqkvi_attn_work_bytes(shape)};

    if (call.n_rows == 0)
        return;
    for (size_t i = 0; i < attention->n_spans; i++)
        call.n_blocks += tqkvi_span_blocks(&attention->spans[i], attention->args);
    call.n_row_blocks = tqkvi_div_up(call.n_rows, call.rows_per_block);

    call.part_blocks = blocks_of_part(shape, attention->turn ? attention->frame_blocks : 0,
                                      call.n_row_blocks, call.n_blocks);
    call.n_parts = call.n_blocks == 0 ? 1 : tqkvi_div_up(call.n_blocks, call.part_blocks);
    call.parts = call.work + n_workers * call.work_bytes;
    call.part_bytes =
        part_bytes(shape, call.n_rows < call.rows_per_block ? call.n_rows : call.rows_per_block);

    const size_t n_rows_tasks = (size_t)shape->n_kv_heads * call.n_row_blocks;
    call.n_tasks = n_rows_tasks * call.n_parts;
    tqkvi_run(parallel, call.n_tasks + attention->beside.n_tasks, call_task, &call);
    if (call.n_parts > 1)
        tqkvi_run(parallel, n_rows_tasks, merge_task, &call);
}
