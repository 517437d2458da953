/* SPDX-License-Identifier: Apache-2.0 */
/*
 * New tokens into pages and copies. The calling thread decides where each run of tokens goes; then
 * tasks, one for each run, KV head and side, encode into disjoint bytes.
 */
#include <stdatomic.h>

#include "base/parallel.h"
#include "cache/paged_layer.h"
#include "format/block_rows.h"

typedef struct write_job {
    const tqkv_paged *paged;
    const tqkv_paged_batch *batch;
    atomic_size_t n_bad;
} write_job;

static tqkv_status reserve_runs(tqkv_paged *paged, size_t n)
{
    size_t bytes;

    if (n <= paged->n_runs_max)
        return TQKV_OK;
    TQKV_TRY(tqkvi_size_mul(n, sizeof(*paged->runs), &bytes));
    tqkvi_paged_run *runs = tqkvi_alloc(&paged->mem, bytes);
    if (!runs)
        return TQKV_ERR_NO_MEMORY;
    tqkvi_free(&paged->mem, paged->runs);
    paged->runs = runs;
    paged->n_runs_max = n;
    return TQKV_OK;
}

/* Blocks that tokens [first, end) of a sequence touch. */
static size_t count_runs(uint32_t first, uint32_t end)
{
    return first == end ? 0 : (end - 1) / TQKVI_BLOCK_TOKENS - first / TQKVI_BLOCK_TOKENS + 1;
}

/*
 * Makes room for a run in the copies of its block. Tokens after the run are forgotten, by copies
 * that it does not go to the run's as well: they are drafts, or what the block held before.
 */
static void place_copy(tqkvi_young_copies *copies, const tqkvi_paged_run *run, bool reached)
{
    const uint32_t before = (1u << run->slot) - 1;
    const uint32_t written = ((1u << run->n) - 1) << run->slot;

    if (reached) {
        const uint32_t copy = tqkvi_young_copies_take(copies, run->block);
        copies->valid[copy] = (uint16_t)((copies->valid[copy] & before) | written);
    } else if (copies->copy_of[run->block] != TQKVI_COPY_NONE) {
        copies->valid[copies->copy_of[run->block]] &= (uint16_t)before;
    }
}

/*
 * Whether copies get the block with this index when the newest token is in block `newest`: where
 * they reach, and those of tier 0 at the end of each page too, where a sequence may find it cached.
 */
static bool is_copied(const tqkv_paged *paged, uint32_t copies, uint32_t index, uint32_t newest)
{
    const uint32_t next_page = (index / paged->page_blocks + 1) * paged->page_blocks;

    return tqkvi_paged_reaches(paged, copies, index, newest) ||
           (paged->copies[copies].tier == 0 && next_page <= newest &&
            tqkvi_paged_reaches(paged, copies, index, next_page));
}

/* The runs of one sequence; returns their number. */
static size_t place_runs(tqkv_paged *paged, const tqkv_paged_batch *batch, uint32_t seq,
                         tqkvi_paged_run *runs)
{
    const uint32_t token = (uint32_t)batch->query_start[seq];
    const uint32_t n = (uint32_t)batch->query_start[seq + 1] - token;
    const uint32_t end = (uint32_t)batch->seq_lens[seq], first = end - n;
    const int32_t *table = batch->block_table + seq * batch->block_table_stride;
    size_t n_runs = 0;

    for (uint32_t p = first; p < end;) {
        const uint32_t index = p / TQKVI_BLOCK_TOKENS, slot = p % TQKVI_BLOCK_TOKENS;
        const uint32_t room = TQKVI_BLOCK_TOKENS - slot;
        tqkvi_paged_run *run = &runs[n_runs++];

        *run = (tqkvi_paged_run){.token = token + p - first,
                                 .n = end - p < room ? end - p : room,
                                 .slot = slot,
                                 .block = tqkvi_paged_block(paged, table, index),
                                 .base = tqkvi_paged_base(paged, (int32_t)(p - slot))};
        for (uint32_t i = 0; i < paged->n_copies; i++) {
            const bool reached = is_copied(paged, i, index, (end - 1) / TQKVI_BLOCK_TOKENS);
            place_copy(&paged->copies[i], run, reached);
            run->reached |= (uint32_t)reached << i;
        }
        p += run->n;
    }
    return n_runs;
}

/* One head and side of a run. */
typedef struct run_part {
    const tqkv_paged *paged;
    const tqkvi_paged_run *run;
    tqkv_side side;
    uint32_t g;
    const float *rows;                /* of the batch */
    const float *turn_cos, *turn_sin; /* of the base, or NULL */
} run_part;

/* Encodes the rows into a block of a tier. Returns the number of bad rows. */
static size_t encode_rows(const run_part *part, uint32_t tier, uint8_t *block)
{
    const tqkv_paged *paged = part->paged;
    const tqkvi_paged_run *run = part->run;
    const tqkv_side side = part->side;
    const uint32_t g = part->g;
    _Alignas(TQKV_ALIGN) float scratch[TQKVI_CODEC_SCRATCH_MAX];
    const size_t dim = tqkvi_shape_dim(&paged->codec->layer->shape, side);
    const tqkvi_layout *layout = tqkvi_codec_layout(paged->codec, side, g, tier);
    uint8_t *scales = block + paged->layouts[tier].section[side][g];
    const size_t stride = (size_t)paged->codec->n_kv_heads * dim;
    uint8_t codes[TQKVI_ROWS_AT_ONCE * TQKVI_ROW_BYTES_MAX];
    size_t n_bad = 0;

    for (uint32_t t = 0; t < run->n; t += TQKVI_ROWS_AT_ONCE) {
        const uint32_t n = run->n - t < TQKVI_ROWS_AT_ONCE ? run->n - t : TQKVI_ROWS_AT_ONCE;
        const float *x = part->rows + (run->token + t) * stride + g * dim;
        n_bad += tqkvi_encode_few(paged->codec, side, g, tier, part->turn_cos, part->turn_sin, x,
                                  stride, n, &scales[run->slot + t], codes, scratch);
        for (uint32_t i = 0; i < n; i++)
            tqkvi_block_put_row(layout, side, scales + TQKVI_BLOCK_TOKENS, run->slot + t + i,
                                codes + i * layout->row_bytes);
    }
    return n_bad;
}

static void write_task(void *user, size_t i, size_t worker)
{
    write_job *job = user;
    const tqkv_paged *paged = job->paged;
    float turn_cos[TQKVI_DIM_MAX / 2], turn_sin[TQKVI_DIM_MAX / 2];
    run_part part = {.paged = paged,
                     .run = &paged->runs[i / 2 / paged->codec->n_kv_heads],
                     .side = (tqkv_side)(i & 1),
                     .g = (uint32_t)(i / 2 % paged->codec->n_kv_heads)};
    const tqkvi_paged_run *run = part.run;

    (void)worker;
    part.rows = part.side == TQKV_SIDE_K ? job->batch->k : job->batch->v;
    if (part.side == TQKV_SIDE_K && run->base != 0 &&
        !paged->codec->heads[part.side][part.g].plain) {
        tqkvi_codec_turn(paged->codec, run->base, turn_cos, turn_sin);
        part.turn_cos = turn_cos;
        part.turn_sin = turn_sin;
    }
    for (uint32_t c = 0; c < paged->n_copies; c++) {
        const tqkvi_young_copies *copies = &paged->copies[c];
        const uint32_t copy = copies->copy_of[run->block]; /* a later run may have taken it */
        if ((run->reached >> c & 1) && copy != TQKVI_COPY_NONE)
            (void)encode_rows(&part, copies->tier,
                              copies->data +
                                  (size_t)copy * paged->layouts[copies->tier].block_bytes);
    }
    const size_t n_bad =
        encode_rows(&part, paged->old_tier, tqkvi_paged_page_block(paged, job->batch, run->block));
    if (n_bad)
        atomic_fetch_add(&job->n_bad, n_bad);
}

tqkv_status tqkvi_paged_write(tqkv_paged *paged, const tqkv_paged_batch *batch,
                              const tqkv_parallel *parallel)
{
    write_job job = {.paged = paged, .batch = batch};
    size_t n_runs = 0, n_tokens = 0;

    for (uint32_t r = 0; r < batch->n_seqs; r++) {
        const uint32_t n = (uint32_t)(batch->query_start[r + 1] - batch->query_start[r]);
        n_runs += count_runs((uint32_t)batch->seq_lens[r] - n, (uint32_t)batch->seq_lens[r]);
        n_tokens += n;
    }
    TQKV_TRY(reserve_runs(paged, n_runs));
    n_runs = 0;
    for (uint32_t r = 0; r < batch->n_seqs; r++)
        n_runs += place_runs(paged, batch, r, paged->runs + n_runs);
    tqkvi_run(parallel, n_runs * paged->codec->n_kv_heads * 2, write_task, &job);
    paged->n_written += n_tokens;
    paged->n_bad_rows += atomic_load(&job.n_bad);
    return TQKV_OK;
}
