/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention reads pages and copies through spans of 16-token blocks, one call for the new tokens of
 * a sequence. Sequences with the same first pages (a system prompt) that decode together read
 * those in one call for all of them, which unpacks each block once:
 *
 *     group of sequences   shared blocks   one call, a query of each          ─┐ merged by
 *     each of them         other blocks    a call of its own, as without it   ─┘ log-sum-exp
 *
 * Shared are only blocks that all of them read at the same place, a copy or the page.
 */
#include "api/paged_attend.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "api/codec_view.h"
#include "base/alloc.h"
#include "base/parallel.h"

#define SPANS_MAX (TQKV_TIERS_MAX + 1) /* the last tier, the younger ones, the new tokens */
#define GROUP_MAX 32
#define SHARED_BLOCKS_MIN 8 /* fewer are not worth a call and a merge */

/*
 * The blocks that one call of attention reads, in scratch: as they follow each other in the
 * sequence, then by tier. positions also has the blocks of the call's own tokens, at its end.
 */
typedef struct block_lists {
    const uint8_t **found;
    uint32_t *index;  /* in the sequence, of found */
    uint8_t *tiers;   /* of found */
    uint32_t n_found;
    const uint8_t **at;
    int32_t *bases, *positions; /* of at; positions: of first tokens */
} block_lists;

static size_t lists_bytes(size_t n_blocks)
{
    return tqkvi_align_up(n_blocks * (2 * sizeof(uint8_t *) + 3 * sizeof(int32_t) + 1));
}

static block_lists lists_init(void *memory, size_t n_blocks)
{
    block_lists lists = {.at = memory};

    lists.found = lists.at + n_blocks;
    lists.bases = (int32_t *)(void *)(lists.found + n_blocks);
    lists.positions = lists.bases + n_blocks;
    lists.index = (uint32_t *)(void *)(lists.positions + n_blocks);
    lists.tiers = (uint8_t *)(lists.index + n_blocks);
    return lists;
}

static size_t blocks_max(uint32_t n_q, uint32_t seq_len)
{
    return (size_t)tqkvi_div_up(seq_len, TQKVI_BLOCK_TOKENS) +
           tqkvi_div_up(n_q, TQKVI_BLOCK_TOKENS);
}

/* Sequences [first, first + n) of the batch that have n_blocks whole blocks in common. */
typedef struct group {
    uint32_t first, n, n_blocks;
    uint32_t newest_min, newest_max; /* blocks of their new tokens, by index */
} group;

/*
 * Of a group, in scratch: queries, what they get from the shared blocks, lse of the others, and
 * which of n_blocks are shared.
 */
typedef struct group_rows {
    float *q, *out;         /* [GROUP_MAX][n_heads][dim] */
    float *lse, *other_lse; /* [GROUP_MAX][n_heads] */
    bool *is_shared;        /* [n_blocks] */
} group_rows;

static size_t group_bytes(const tqkv_plan_layer *shape, uint32_t seq_len)
{
    const size_t floats = shape->k_dim + shape->v_dim + 2;

    return tqkvi_align_up(GROUP_MAX * shape->n_heads * floats * sizeof(float) +
                          seq_len / TQKVI_BLOCK_TOKENS * sizeof(bool));
}

static group_rows group_rows_init(void *memory, const tqkv_plan_layer *shape)
{
    const size_t n = (size_t)GROUP_MAX * shape->n_heads;
    group_rows rows = {.q = memory};

    rows.out = rows.q + n * shape->k_dim;
    rows.lse = rows.out + n * shape->v_dim;
    rows.other_lse = rows.lse + n;
    rows.is_shared = (bool *)(void *)(rows.other_lse + n);
    return rows;
}

/* One tqkv_paged_attend. Scratch: heads of the view, rows of a group, then what calls need. */
typedef struct attend {
    tqkv_paged *paged;
    const tqkv_paged_batch *batch;
    const tqkv_attend_args *args;
    const tqkv_parallel *parallel;
    const tqkv_plan_layer *shape;
    const tqkvi_attn_head *heads;
    group_rows rows;
    uint8_t *scratch; /* of calls */
} attend;

size_t tqkvi_paged_scratch_bytes(const tqkv_paged *paged, uint32_t n_q, uint32_t seq_len,
                                 size_t n_workers)
{
    const tqkv_plan_layer *shape = &paged->codec->layer->shape;
    const uint32_t n_rows = n_q > GROUP_MAX ? n_q : GROUP_MAX;
    const size_t bytes = tqkvi_attention_scratch_bytes(shape, n_rows, n_workers);
    const size_t more = tqkvi_view_bytes(paged->codec) + group_bytes(shape, seq_len) +
                        lists_bytes(blocks_max(n_q, seq_len));

    return bytes > SIZE_MAX - more ? SIZE_MAX : bytes + more;
}

/* args: of this call alone. scratch: of the size that it needs. */
static void attend_spans(const attend *a, const tqkvi_span *spans, size_t n_spans,
                         const tqkv_attend_args *args, uint32_t position)
{
    const tqkv_codec *codec = a->paged->codec;
    const tqkvi_attention attention = {.kernels = codec->kernels,
                                       .layer = codec->layer,
                                       .heads = {a->heads, a->heads + codec->n_kv_heads},
                                       .turn = a->paged->has_bases ? tqkvi_view_turn : NULL,
                                       .turn_user = codec,
                                       .frame_blocks =
                                           codec->plan->frame_tokens / TQKVI_BLOCK_TOKENS,
                                       .spans = spans,
                                       .n_spans = n_spans,
                                       .args = args,
                                       .window = a->shape->window,
                                       .first_position = (int32_t)position};

    tqkvi_attend(&attention, a->parallel);
}

/* New tokens of a sequence that one call of attention takes. */
typedef struct part {
    const int32_t *table; /* of the sequence */
    uint32_t token, n;    /* of the batch */
    uint32_t position;    /* of the first one */
    uint32_t n_common;    /* blocks that a group has in common, some of which it has read */
    float *lse;           /* of its tokens, or NULL */
} part;

static uint32_t tokens_before(uint32_t position, uint32_t index)
{
    const uint32_t left = position - index * TQKVI_BLOCK_TOKENS;

    return left < TQKVI_BLOCK_TOKENS ? left : TQKVI_BLOCK_TOKENS;
}

static void add_found(block_lists *lists, uint32_t index, tqkvi_paged_spot spot)
{
    lists->found[lists->n_found] = spot.block;
    lists->index[lists->n_found] = index;
    lists->tiers[lists->n_found++] = (uint8_t)spot.tier;
}

/* Finds the blocks before the part that it can see and the group has not read. */
static void find_blocks(const attend *a, const part *p, block_lists *lists)
{
    const uint32_t window = a->shape->window;
    const uint32_t end = tqkvi_div_up(p->position, TQKVI_BLOCK_TOKENS);
    const uint32_t first =
        window > 0 && p->position >= window ? (p->position - window + 1) / TQKVI_BLOCK_TOKENS : 0;

    for (uint32_t index = first; index < end; index++)
        if (index >= p->n_common || !a->rows.is_shared[index])
            add_found(lists, index,
                      tqkvi_paged_find(a->paged, a->batch, p->table, index,
                                       tokens_before(p->position, index),
                                       p->position / TQKVI_BLOCK_TOKENS));
}

/* Blocks that were found, before a position, in a span for each tier. Returns how many spans. */
static size_t fill_spans(const attend *a, const block_lists *lists, uint32_t position,
                         tqkvi_span *spans)
{
    const tqkv_paged *paged = a->paged;
    size_t n = 0, n_spans = 0;

    for (uint32_t tier = paged->old_tier + 1; tier-- > 0;) {
        tqkvi_span span = {.tier = tier,
                           .layout = &paged->layouts[tier],
                           .block_at = lists->at + n,
                           .block_bases = lists->bases + n,
                           .block_positions = lists->positions + n};
        for (uint32_t i = 0; i < lists->n_found; i++) {
            if (lists->tiers[i] != tier)
                continue;
            lists->at[n] = lists->found[i];
            lists->positions[n] = (int32_t)(lists->index[i] * TQKVI_BLOCK_TOKENS);
            lists->bases[n] = tqkvi_paged_base(paged, lists->positions[n]);
            /* Only the last one is not whole. */
            span.n_tokens += tokens_before(position, lists->index[i]);
            n++;
        }
        if (span.n_tokens > 0)
            spans[n_spans++] = span;
    }
    return n_spans;
}

/* The part's own tokens. */
static tqkvi_span new_tokens(const attend *a, const part *p, const block_lists *lists)
{
    int32_t *positions = lists->positions + lists->n_found;
    const size_t first = (size_t)p->token * a->shape->n_kv_heads;

    for (uint32_t i = 0; i < p->n; i += TQKVI_BLOCK_TOKENS)
        positions[i / TQKVI_BLOCK_TOKENS] = (int32_t)(p->position + i);
    return (tqkvi_span){.n_tokens = p->n,
                        .rows = {a->batch->k + first * a->shape->k_dim,
                                 a->batch->v + first * a->shape->v_dim},
                        .block_positions = positions};
}

static void attend_part(const attend *a, const part *p)
{
    const size_t n_blocks = blocks_max(p->n, p->position + p->n);
    block_lists lists = lists_init(a->scratch, n_blocks);
    tqkvi_span spans[SPANS_MAX];
    tqkv_attend_args own = *a->args;

    find_blocks(a, p, &lists);
    size_t n_spans = fill_spans(a, &lists, p->position, spans);
    spans[n_spans++] = new_tokens(a, p, &lists);
    own.n_q = p->n;
    own.n_cells = UINT32_MAX;
    own.q += p->token * own.q_token_stride;
    if (own.q_latent)
        own.q_latent += p->token * own.q_token_stride;
    own.out += p->token * own.out_token_stride;
    own.lse = p->lse;
    own.causal = 1;
    own.scratch = a->scratch + lists_bytes(n_blocks);
    attend_spans(a, spans, n_spans, &own, p->position);
}

static uint32_t n_new(const attend *a, uint32_t r)
{
    return (uint32_t)(a->batch->query_start[r + 1] - a->batch->query_start[r]);
}

static const int32_t *table_of(const attend *a, uint32_t r)
{
    return a->batch->block_table + r * a->batch->block_table_stride;
}

/* of_group: blocks that its group has in common, 0 without one. lse: of its new tokens, or NULL. */
static void attend_sequence(const attend *a, uint32_t r, uint32_t of_group, float *lse)
{
    const uint32_t n = n_new(a, r), step = n <= a->batch->decode_tokens_max ? 1 : n;

    for (uint32_t i = 0; i < n; i += step) {
        const part p = {.table = table_of(a, r),
                        .token = (uint32_t)a->batch->query_start[r] + i,
                        .n = step,
                        .position = (uint32_t)a->batch->seq_lens[r] - n + i,
                        .n_common = of_group,
                        .lse = lse ? lse + (size_t)i * a->shape->n_heads : NULL};
        attend_part(a, &p);
    }
}

/* How many of the first n_blocks blocks two sequences have in common, in whole pages. */
static uint32_t common_blocks(const attend *a, uint32_t r, uint32_t s, uint32_t n_blocks)
{
    const int32_t *one = table_of(a, r), *other = table_of(a, s);
    uint32_t n = 0;

    while (n < n_blocks && one[n / a->paged->page_blocks] == other[n / a->paged->page_blocks])
        n += a->paged->page_blocks;
    return n < n_blocks ? n : n_blocks;
}

/*
 * The sequences from r on that decode behind the same blocks, in the order of the batch. One that
 * would leave less than half of those does not join. Latents are read alone: all query heads share a
 * tile of theirs already, and q' would be made twice, for the shared part and the rest.
 */
static group find_group(const attend *a, uint32_t r)
{
    const uint32_t newest = (uint32_t)(a->batch->seq_lens[r] - 1) / TQKVI_BLOCK_TOKENS;
    group g = {.first = r, .n = 1, .n_blocks = newest, .newest_min = newest, .newest_max = newest};

    if (n_new(a, r) != 1 || a->shape->window > 0 || a->shape->is_latent)
        return g;
    for (uint32_t s = r + 1; s < a->batch->n_seqs && g.n < GROUP_MAX && n_new(a, s) == 1; s++) {
        const uint32_t block = (uint32_t)(a->batch->seq_lens[s] - 1) / TQKVI_BLOCK_TOKENS;
        const uint32_t n = common_blocks(a, r, s, block < g.n_blocks ? block : g.n_blocks);
        if (n < SHARED_BLOCKS_MIN || 2 * n < g.n_blocks)
            break;
        g.n_blocks = n;
        g.newest_min = block < g.newest_min ? block : g.newest_min;
        g.newest_max = block > g.newest_max ? block : g.newest_max;
        g.n++;
    }
    return g;
}

/* A block that the first and the last of a group read at the same place is read there by all. */
static void find_shared(const attend *a, const group *g, block_lists *lists)
{
    const int32_t *table = table_of(a, g->first);

    for (uint32_t index = 0; index < g->n_blocks; index++) {
        const tqkvi_paged_spot near = tqkvi_paged_find(a->paged, a->batch, table, index,
                                                       TQKVI_BLOCK_TOKENS, g->newest_min);
        const tqkvi_paged_spot far = tqkvi_paged_find(a->paged, a->batch, table, index,
                                                      TQKVI_BLOCK_TOKENS, g->newest_max);
        a->rows.is_shared[index] = near.block == far.block;
        if (a->rows.is_shared[index])
            add_found(lists, index, near);
    }
}

static void load_queries(const attend *a, const group *g)
{
    const size_t dim = a->shape->k_dim;
    float *to = a->rows.q;

    for (uint32_t i = 0; i < g->n; i++) {
        const size_t token = (size_t)a->batch->query_start[g->first + i];
        for (size_t h = 0; h < a->shape->n_heads; h++, to += dim)
            memcpy(to, a->args->q + token * a->args->q_token_stride + h * a->args->q_head_stride,
                   dim * sizeof(*to));
    }
}

/* lists: of the shared blocks. */
static void attend_shared(const attend *a, const group *g, const block_lists *lists)
{
    tqkvi_span spans[SPANS_MAX];
    tqkv_attend_args own = *a->args;
    const uint32_t position = g->n_blocks * TQKVI_BLOCK_TOKENS;

    load_queries(a, g);
    own.n_q = g->n;
    own.n_cells = UINT32_MAX;
    own.q = a->rows.q;
    own.q_head_stride = a->shape->k_dim;
    own.q_token_stride = a->shape->n_heads * own.q_head_stride;
    own.out = a->rows.out;
    own.out_head_stride = a->shape->v_dim;
    own.out_token_stride = a->shape->n_heads * own.out_head_stride;
    own.lse = a->rows.lse;
    own.sinks = NULL; /* each sequence counts them once, with its other blocks */
    own.causal = 0;
    own.scratch = a->scratch + lists_bytes(g->n_blocks);
    attend_spans(a, spans, fill_spans(a, lists, position, spans), &own, position);
    a->paged->n_shared += (uint64_t)(g->n - 1) * lists->n_found;
}

/* Adds the shared part to the output of sequence i of the group. */
static void merge_shared(const attend *a, const group *g, uint32_t i)
{
    const size_t token = (size_t)a->batch->query_start[g->first + i], n_heads = a->shape->n_heads;
    const size_t dim = a->shape->v_dim;

    for (size_t h = 0; h < n_heads; h++) {
        const float one = a->rows.lse[i * n_heads + h], other = a->rows.other_lse[i * n_heads + h];
        const float top = one > other ? one : other;
        const float lse = top + logf(expf(one - top) + expf(other - top));
        const float w_one = expf(one - lse), w_other = expf(other - lse);
        const float *from = a->rows.out + (i * n_heads + h) * dim;
        float *out =
            a->args->out + token * a->args->out_token_stride + h * a->args->out_head_stride;
        for (size_t d = 0; d < dim; d++)
            out[d] = w_one * from[d] + w_other * out[d];
        if (a->args->lse)
            a->args->lse[token * n_heads + h] = lse;
    }
}

static float *lse_of(const attend *a, uint32_t r)
{
    const size_t first = (size_t)a->batch->query_start[r] * a->shape->n_heads;

    return a->args->lse ? a->args->lse + first : NULL;
}

static void attend_group(const attend *a, const group *g)
{
    block_lists lists = lists_init(a->scratch, g->n_blocks);

    find_shared(a, g, &lists);
    const bool pays = lists.n_found >= SHARED_BLOCKS_MIN;
    if (pays)
        attend_shared(a, g, &lists);
    for (uint32_t i = 0; i < g->n; i++) {
        const uint32_t r = g->first + i;
        if (!pays) {
            attend_sequence(a, r, 0, lse_of(a, r));
            continue;
        }
        attend_sequence(a, r, g->n_blocks, a->rows.other_lse + (size_t)i * a->shape->n_heads);
        merge_shared(a, g, i);
    }
}

void tqkvi_paged_attend(tqkv_paged *paged, const tqkv_paged_batch *batch,
                        const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    const tqkv_plan_layer *shape = &paged->codec->layer->shape;
    uint8_t *rows = (uint8_t *)args->scratch + tqkvi_view_bytes(paged->codec);
    attend a = {.paged = paged,
                .batch = batch,
                .args = args,
                .parallel = parallel,
                .shape = shape,
                .heads = args->scratch,
                .rows = group_rows_init(rows, shape)};
    group g;

    tqkvi_view_heads(paged->codec, args->scratch);
    for (uint32_t r = 0; r < batch->n_seqs; r += g.n) {
        g = find_group(&a, r);
        a.scratch = rows + group_bytes(shape, (uint32_t)batch->seq_lens[r]);
        if (g.n > 1)
            attend_group(&a, &g);
        else
            attend_sequence(&a, r, 0, lse_of(&a, r));
    }
}
