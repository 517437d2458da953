/* SPDX-License-Identifier: Apache-2.0 */
/* Tasks of up to 16 tokens of one head and side; all their scratch is on the worker's stack. */
#include "cache/row_jobs.h"

#include <string.h>

#include "base/parallel.h"
#include "format/block_rows.h"

#define GROUP_TOKENS 16

typedef struct row_scratch {
    _Alignas(TQKV_ALIGN) float codec[TQKVI_CODEC_SCRATCH_MAX];
    _Alignas(TQKV_ALIGN) float row[TQKVI_DIM_MAX + TQKV_ALIGN];
    tqkvi_held_turn from, to;
} row_scratch;

typedef struct move_job {
    tqkv_store *store;
    const tqkvi_move *moves;
    size_t n;
    uint32_t sides;
} move_job;

static bool turns(const tqkv_store *store, tqkv_side side, uint32_t g, int32_t base)
{
    return side == TQKV_SIDE_K && store->has_bases && base != 0 &&
           !store->codec->heads[side][g].plain;
}

static void hold_turn(const tqkv_store *store, int32_t base, tqkvi_held_turn *held)
{
    if (!held->known || held->base != base)
        tqkvi_codec_turn(store->codec, base, held->cos, held->sin);
    held->known = true;
    held->base = base;
}

/* NULL where nothing turns. */
static const tqkvi_held_turn *turn_for(const tqkv_store *store, tqkv_side side, uint32_t g,
                                       int32_t base, tqkvi_held_turn *held)
{
    if (!turns(store, side, g, base))
        return NULL;
    hold_turn(store, base, held);
    return held;
}

static bool encode_one(const tqkv_store *store, tqkv_side side, uint32_t g, const tqkvi_spot *spot,
                       const float *x, tqkvi_held_turn *held, float *scratch)
{
    const tqkvi_held_turn *t = turn_for(store, side, g, spot->base, held);
    uint8_t row[TQKVI_ROW_BYTES_MAX];

    const bool good =
        tqkvi_encode_row(store->codec, side, g, spot->tier, t ? t->cos : NULL, t ? t->sin : NULL, x,
                         tqkvi_spot_scale(store, spot, side, g), row, scratch);
    tqkvi_spot_put_row(store, spot, side, g, row);
    return good;
}

static void decode_one(const tqkv_store *store, tqkv_side side, uint32_t g, const tqkvi_spot *spot,
                       float *x, tqkvi_held_turn *held, float *scratch)
{
    const tqkvi_held_turn *t = turn_for(store, side, g, spot->base, held);
    uint8_t row[TQKVI_ROW_BYTES_MAX];

    tqkvi_spot_get_row(store, spot, side, g, row);
    tqkvi_decode_row(store->codec, side, g, spot->tier, t ? t->cos : NULL, t ? t->sin : NULL,
                     *tqkvi_spot_scale(store, spot, side, g), row, x, scratch);
}

static size_t group_end(size_t group, size_t n)
{
    const size_t end = (group + 1) * GROUP_TOKENS;

    return end < n ? end : n;
}

/* How many of n spots from the first one on have its tier and base; at most TQKVI_ROWS_AT_ONCE. */
static size_t count_alike(const tqkvi_spot *spots, size_t n)
{
    size_t i = 1;
    while (i < n && i < TQKVI_ROWS_AT_ONCE && spots[i].tier == spots[0].tier &&
           spots[i].base == spots[0].base)
        i++;
    return i;
}

typedef struct early_rows {
    uint8_t *scales, *codes;
    size_t row_bytes;
} early_rows;

/* What one head and side has in job->early, which is not NULL. */
static early_rows find_early(const tqkvi_encode_job *job, tqkv_side side, uint32_t g)
{
    const tqkv_store *store = job->store;
    const uint32_t tier = job->spots[0].tier;
    uint8_t *section = job->early + store->layouts[tier].section[side][g];

    return (early_rows){.scales = section,
                        .codes = section + TQKVI_BLOCK_TOKENS,
                        .row_bytes = tqkvi_codec_layout(store->codec, side, g, tier)->row_bytes};
}

/* n rows that are alike, from the job's token t on. Returns the number of bad ones. */
static size_t encode_alike(const tqkvi_encode_job *job, tqkv_side side, uint32_t g, size_t t, size_t n,
                           row_scratch *scratch)
{
    const tqkv_store *store = job->store;
    const tqkvi_spot *spots = &job->spots[t];
    const size_t dim = tqkvi_shape_dim(&store->codec->layer->shape, side);
    const size_t stride = store->codec->n_kv_heads * dim;
    const bool shared = job->turn.known && job->turn.base == spots[0].base &&
                        turns(store, side, g, spots[0].base);
    const tqkvi_held_turn *to =
        shared ? &job->turn : turn_for(store, side, g, spots[0].base, &scratch->to);
    const size_t row_bytes = tqkvi_codec_layout(store->codec, side, g, spots[0].tier)->row_bytes;
    uint8_t codes[TQKVI_ROWS_AT_ONCE * TQKVI_ROW_BYTES_MAX], scales[TQKVI_ROWS_AT_ONCE];

    const size_t n_bad = tqkvi_encode_few(
        store->codec, side, g, spots[0].tier, to ? to->cos : NULL, to ? to->sin : NULL,
        job->rows[side] + t * stride + g * dim, stride, n, scales, codes, scratch->codec);
    if (job->early) {
        const early_rows early = find_early(job, side, g);
        memcpy(early.scales + t, scales, n);
        memcpy(early.codes + t * row_bytes, codes, n * row_bytes);
        return n_bad;
    }
    for (size_t i = 0; i < n; i++) {
        *tqkvi_spot_scale(store, &spots[i], side, g) = scales[i];
        tqkvi_spot_put_row(store, &spots[i], side, g, codes + i * row_bytes);
    }
    return n_bad;
}

void tqkvi_encode_task(void *user, size_t i, size_t worker)
{
    tqkvi_encode_job *job = user;
    const size_t n_heads = job->store->codec->n_kv_heads;
    const tqkv_side side = (tqkv_side)(i & 1);
    const size_t group = i / 2 / n_heads;
    const uint32_t g = (uint32_t)(i / 2 % n_heads);
    row_scratch scratch;
    size_t n_bad = 0;

    (void)worker;
    if (!job->rows[side])
        return;
    scratch.to.known = false;
    const size_t end = group_end(group, job->n);
    for (size_t t = group * GROUP_TOKENS, n; t < end; t += n) {
        n = count_alike(&job->spots[t], end - t);
        n_bad += encode_alike(job, side, g, t, n, &scratch);
    }
    if (n_bad)
        atomic_fetch_add(&job->n_bad, n_bad);
}

void tqkvi_encode_begin(tqkvi_encode_job *job, tqkv_store *store, const float *k, const float *v,
                        const tqkvi_spot *spots, size_t n, uint8_t *early)
{
    job->store = store;
    job->rows[TQKV_SIDE_K] = k;
    job->rows[TQKV_SIDE_V] = v;
    job->spots = spots;
    job->n = n;
    job->early = early;
    job->turn.known = false;
    atomic_init(&job->n_bad, 0);
    if (k && n > 0 && store->has_bases && spots[0].base != 0)
        hold_turn(store, spots[0].base, &job->turn);
}

size_t tqkvi_encode_tasks(const tqkvi_encode_job *job)
{
    return (job->n + GROUP_TOKENS - 1) / GROUP_TOKENS * job->store->codec->n_kv_heads * 2;
}

void tqkvi_encode_place(const tqkvi_encode_job *job)
{
    const tqkv_store *store = job->store;

    for (uint32_t i = 0; i < 2 * store->codec->n_kv_heads; i++) {
        const tqkv_side side = (tqkv_side)(i & 1);
        const early_rows early = find_early(job, side, i / 2);
        for (size_t t = 0; t < job->n; t++) {
            *tqkvi_spot_scale(store, &job->spots[t], side, i / 2) = early.scales[t];
            tqkvi_spot_put_row(store, &job->spots[t], side, i / 2,
                               early.codes + t * early.row_bytes);
        }
    }
}

void tqkvi_encode_rows(tqkv_store *store, const float *k, const float *v, const tqkvi_spot *spots,
                       size_t n, const tqkv_parallel *parallel)
{
    tqkvi_encode_job job;

    tqkvi_encode_begin(&job, store, k, v, spots, n, NULL);
    tqkvi_run(parallel, tqkvi_encode_tasks(&job), tqkvi_encode_task, &job);
    store->n_bad_rows += atomic_load(&job.n_bad);
}

static void move_one(const move_job *job, const tqkvi_move *move, tqkv_side side, uint32_t g,
                     row_scratch *scratch)
{
    tqkv_store *store = job->store;
    const bool turns =
        side == TQKV_SIDE_K && store->has_bases && !store->codec->heads[side][g].plain;

    if (turns && move->from.base != move->to.base) {
        decode_one(store, side, g, &move->from, scratch->row, &scratch->from, scratch->codec);
        (void)encode_one(store, side, g, &move->to, scratch->row, &scratch->to, scratch->codec);
        return;
    }
    uint8_t from[TQKVI_ROW_BYTES_MAX], to[TQKVI_ROW_BYTES_MAX];
    tqkvi_spot_get_row(store, &move->from, side, g, from);
    tqkvi_recode_row(store->codec, side, g, move->from.tier,
                     *tqkvi_spot_scale(store, &move->from, side, g), from, move->to.tier,
                     tqkvi_spot_scale(store, &move->to, side, g), to, scratch->codec);
    tqkvi_spot_put_row(store, &move->to, side, g, to);
}

static void move_task(void *user, size_t i, size_t worker)
{
    const move_job *job = user;
    const size_t n_heads = job->store->codec->n_kv_heads;
    const tqkv_side side = (tqkv_side)(i & 1);
    const size_t group = i / 2 / n_heads;
    const uint32_t g = (uint32_t)(i / 2 % n_heads);
    row_scratch scratch;

    (void)worker;
    if (!(job->sides & TQKVI_SIDE_BIT(side)))
        return;
    scratch.from.known = scratch.to.known = false;
    for (size_t t = group * GROUP_TOKENS; t < group_end(group, job->n); t++)
        move_one(job, &job->moves[t], side, g, &scratch);
}

void tqkvi_move_rows(tqkv_store *store, const tqkvi_move *moves, size_t n, uint32_t sides,
                     const tqkv_parallel *parallel)
{
    move_job job = {.store = store, .moves = moves, .n = n, .sides = sides};

    tqkvi_run(parallel, (n + GROUP_TOKENS - 1) / GROUP_TOKENS * store->codec->n_kv_heads * 2,
              move_task, &job);
}

void tqkvi_decode_rows(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side, float *row)
{
    const size_t dim = tqkvi_shape_dim(&store->codec->layer->shape, side);
    row_scratch scratch;

    scratch.from.known = false;
    for (uint32_t g = 0; g < store->codec->n_kv_heads; g++)
        decode_one(store, side, g, spot, row + g * dim, &scratch.from, scratch.codec);
}

void tqkvi_turn_token(tqkv_store *store, const tqkvi_spot *from, const tqkvi_spot *to,
                      int32_t delta)
{
    const tqkv_rope *rope = &store->codec->rope;
    row_scratch scratch;
    tqkvi_held_turn by_delta;

    scratch.from.known = scratch.to.known = false;
    if (delta != 0)
        tqkvi_turn_init(rope, delta, by_delta.cos, by_delta.sin);
    for (uint32_t g = 0; g < store->codec->n_kv_heads; g++) {
        decode_one(store, TQKV_SIDE_K, g, from, scratch.row, &scratch.from, scratch.codec);
        if (delta != 0)
            tqkvi_turn_apply(rope, by_delta.cos, by_delta.sin, false, scratch.row);
        (void)encode_one(store, TQKV_SIDE_K, g, to, scratch.row, &scratch.to, scratch.codec);
    }
}

void tqkvi_zero_rows(const tqkv_store *store, const tqkvi_spot *spot, tqkv_side side)
{
    static const uint8_t zeros[TQKVI_ROW_BYTES_MAX];

    for (uint32_t g = 0; g < store->codec->n_kv_heads; g++) {
        *tqkvi_spot_scale(store, spot, side, g) = 0;
        tqkvi_spot_put_row(store, spot, side, g, zeros);
    }
}
