/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention reads pages and copies through spans of 16-token blocks, one call for the new tokens of
 * a sequence. Sequences with the same first pages (a system prompt) that decode together read
 * those in one call for all of them, which unpacks each block once:
 *
 *     group of sequences   shared blocks   one call, a query of each          ─┐ merged by
 *     each of them         other blocks    a call of its own, as without it   ─┘ log-sum-exp
 *
 * Shared are only blocks that all of them read in the page, at the last tier.
 */
#include "api/paged_attend.h"

#include <math.h>
#include <string.h>

#include "api/codec_view.h"
#include "base/parallel.h"

#define SPANS_MAX (TQKV_TIERS_MAX + 1) /* the last tier, the younger ones, the new tokens */
#define GROUP_MAX 32
#define SHARED_BLOCKS_MIN 8 /* fewer are not worth a call and a merge */

/* Blocks of a sequence, by index: [first, end). */
typedef struct block_range {
    uint32_t first, end;
} block_range;

/*
 * The blocks that one call of attention reads, in scratch: as they follow each other in the
 * sequence, then by tier. positions also has the blocks of the call's own tokens, at its end.
 */
typedef struct block_lists {
    const uint8_t **found;
    uint32_t *index; /* of found */
    uint8_t *tiers;  /* of found */
    const uint8_t **at;
    int32_t *bases, *positions; /* of at; positions: of first tokens */
} block_lists;

static size_t round_up(size_t bytes)
{
    return (bytes + TQKV_ALIGN - 1) / TQKV_ALIGN * TQKV_ALIGN;
}

static size_t lists_bytes(size_t n_blocks)
{
    return round_up(n_blocks * (2 * sizeof(uint8_t *) + 3 * sizeof(int32_t) + 1));
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

/* Sequences [first, first + n) of the batch and what they share. */
typedef struct group {
    uint32_t first, n;
    block_range shared;
} group;

/* Of a group, in scratch: queries, what they get from the shared blocks, and lse of the others. */
typedef struct group_rows {
    float *q, *out;         /* [GROUP_MAX][n_heads][dim] */
    float *lse, *other_lse; /* [GROUP_MAX][n_heads] */
} group_rows;

static size_t group_bytes(const tqkv_plan_layer *shape)
{
    const size_t floats = shape->k_dim + shape->v_dim + 2;

    return round_up(GROUP_MAX * shape->n_heads * floats * sizeof(float));
}

static group_rows group_rows_init(void *memory, const tqkv_plan_layer *shape)
{
    const size_t n = (size_t)GROUP_MAX * shape->n_heads;
    group_rows rows = {.q = memory};

    rows.out = rows.q + n * shape->k_dim;
    rows.lse = rows.out + n * shape->v_dim;
    rows.other_lse = rows.lse + n;
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
    uint8_t *scratch;
} attend;

size_t tqkvi_paged_scratch_bytes(const tqkv_paged *paged, uint32_t n_q, uint32_t seq_len,
                                 size_t n_workers)
{
    const tqkv_plan_layer *shape = &paged->codec->layer->shape;
    const uint32_t n_rows = n_q > GROUP_MAX ? n_q : GROUP_MAX;
    const size_t bytes = tqkvi_attention_scratch_bytes(shape, n_rows, n_workers);
    const size_t more = tqkvi_view_bytes(paged->codec) + group_bytes(shape) +
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
    block_range shared;   /* which the group has read */
    float *lse;           /* of its tokens, or NULL */
    block_lists lists;
} part;

static uint32_t tokens_before(const part *p, uint32_t index)
{
    const uint32_t left = p->position - index * TQKVI_BLOCK_TOKENS;

    return left < TQKVI_BLOCK_TOKENS ? left : TQKVI_BLOCK_TOKENS;
}

/* Finds the blocks before the part that it can see and the group has not read. Returns how many. */
static uint32_t find_blocks(const attend *a, const part *p)
{
    const uint32_t window = a->shape->window;
    const uint32_t end = tqkvi_div_up(p->position, TQKVI_BLOCK_TOKENS);
    const uint32_t first =
        window > 0 && p->position >= window ? (p->position - window + 1) / TQKVI_BLOCK_TOKENS : 0;
    uint32_t n = 0;

    for (uint32_t index = first; index < end; index++) {
        if (index >= p->shared.first && index < p->shared.end)
            continue;
        const tqkvi_paged_spot spot =
            tqkvi_paged_find(a->paged, a->batch, p->table, index, tokens_before(p, index),
                             p->position / TQKVI_BLOCK_TOKENS);
        p->lists.found[n] = spot.block;
        p->lists.index[n] = index;
        p->lists.tiers[n++] = (uint8_t)spot.tier;
    }
    return n;
}

/* The spans of a part: its older blocks by tier, then its own tokens. Returns their number. */
static size_t fill_spans(const attend *a, const part *p, tqkvi_span *spans)
{
    const tqkv_paged *paged = a->paged;
    const block_lists *lists = &p->lists;
    const uint32_t n_found = find_blocks(a, p);
    size_t n = 0, n_spans = 0;

    for (uint32_t tier = paged->old_tier + 1; tier-- > 0;) {
        tqkvi_span span = {.tier = tier,
                           .layout = &paged->layouts[tier],
                           .block_at = lists->at + n,
                           .block_bases = lists->bases + n,
                           .block_positions = lists->positions + n};
        for (uint32_t i = 0; i < n_found; i++) {
            if (lists->tiers[i] != tier)
                continue;
            lists->at[n] = lists->found[i];
            lists->positions[n] = (int32_t)(lists->index[i] * TQKVI_BLOCK_TOKENS);
            lists->bases[n] = tqkvi_paged_base(paged, lists->positions[n]);
            span.n_tokens += tokens_before(p, lists->index[i]); /* only the last is not whole */
            n++;
        }
        if (span.n_tokens > 0)
            spans[n_spans++] = span;
    }
    spans[n_spans++] = (tqkvi_span){
        .n_tokens = p->n,
        .rows = {a->batch->k + (size_t)p->token * a->shape->n_kv_heads * a->shape->k_dim,
                 a->batch->v + (size_t)p->token * a->shape->n_kv_heads * a->shape->v_dim},
        .block_positions = lists->positions + n};
    for (uint32_t i = 0; i < p->n; i += TQKVI_BLOCK_TOKENS)
        lists->positions[n++] = (int32_t)(p->position + i);
    return n_spans;
}

static void attend_part(const attend *a, const part *p)
{
    tqkvi_span spans[SPANS_MAX];
    tqkv_attend_args own = *a->args;

    own.n_q = p->n;
    own.n_cells = UINT32_MAX;
    own.q += p->token * own.q_token_stride;
    own.out += p->token * own.out_token_stride;
    own.lse = p->lse;
    own.causal = 1;
    own.scratch = a->scratch + lists_bytes(blocks_max(p->n, p->position + p->n));
    attend_spans(a, spans, fill_spans(a, p, spans), &own, p->position);
}

static uint32_t n_new(const attend *a, uint32_t r)
{
    return (uint32_t)(a->batch->query_start[r + 1] - a->batch->query_start[r]);
}

static const int32_t *table_of(const attend *a, uint32_t r)
{
    return a->batch->block_table + r * a->batch->block_table_stride;
}

/* other_lse: of its one new token, if it is of a group; otherwise NULL. */
static void attend_sequence(const attend *a, uint32_t r, block_range shared, float *other_lse)
{
    const uint32_t token = (uint32_t)a->batch->query_start[r], n = n_new(a, r);
    const uint32_t position = (uint32_t)a->batch->seq_lens[r] - n;
    const uint32_t step = n <= a->batch->decode_tokens_max ? 1 : n;
    part p = {.table = table_of(a, r), .n = step, .shared = shared};

    for (uint32_t i = 0; i < n; i += step) {
        p.token = token + i;
        p.position = position + i;
        p.lists = lists_init(a->scratch, blocks_max(p.n, p.position + p.n));
        p.lse = other_lse ? other_lse
                          : (a->args->lse ? a->args->lse + (size_t)p.token * a->shape->n_heads : NULL);
        attend_part(a, &p);
    }
}

/* Up to which block the one new token of a sequence reads pages, sinks apart. */
static uint32_t end_of_pages(const attend *a, uint32_t r)
{
    const uint32_t newest = (uint32_t)(a->batch->seq_lens[r] - 1) / TQKVI_BLOCK_TOKENS;
    uint32_t end = newest;

    for (uint32_t i = 0; i < a->paged->n_copies; i++) {
        const uint32_t reach = a->paged->copies[i].reach;
        if (i != a->paged->sinks && end > (newest > reach ? newest - reach : 0))
            end = newest > reach ? newest - reach : 0;
    }
    return end;
}

/* How many of n_blocks first blocks two sequences share, in whole pages. */
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
 * would leave less than half of what is shared does not join.
 */
static group find_group(const attend *a, uint32_t r)
{
    const uint32_t first = tqkvi_div_up(a->paged->n_sinks, TQKVI_BLOCK_TOKENS);
    group g = {.first = r, .n = 1, .shared.first = first};

    if (n_new(a, r) != 1 || a->shape->window > 0)
        return g;
    g.shared.end = end_of_pages(a, r);
    for (uint32_t s = r + 1; s < a->batch->n_seqs && g.n < GROUP_MAX && n_new(a, s) == 1; s++) {
        uint32_t end = end_of_pages(a, s);
        end = common_blocks(a, r, s, end < g.shared.end ? end : g.shared.end);
        if (end < first + SHARED_BLOCKS_MIN || 2 * (end - first) < g.shared.end - first)
            break;
        g.shared.end = end;
        g.n++;
    }
    return g;
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

static void attend_shared(const attend *a, const group *g)
{
    const int32_t *table = table_of(a, g->first);
    const uint32_t n_blocks = g->shared.end - g->shared.first;
    const block_lists lists = lists_init(a->scratch, n_blocks);
    const tqkvi_span span = {.n_tokens = n_blocks * TQKVI_BLOCK_TOKENS,
                             .tier = a->paged->old_tier,
                             .layout = &a->paged->layouts[a->paged->old_tier],
                             .block_at = lists.at,
                             .block_bases = lists.bases,
                             .block_positions = lists.positions};
    tqkv_attend_args own = *a->args;

    for (uint32_t i = 0; i < n_blocks; i++) {
        const uint32_t index = g->shared.first + i;
        lists.at[i] = tqkvi_paged_page_block(a->paged, a->batch,
                                             tqkvi_paged_block(a->paged, table, index));
        lists.positions[i] = (int32_t)(index * TQKVI_BLOCK_TOKENS);
        lists.bases[i] = tqkvi_paged_base(a->paged, lists.positions[i]);
    }
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
    own.scratch = a->scratch + lists_bytes(n_blocks);
    attend_spans(a, &span, 1, &own, 0);
    a->paged->n_shared += (uint64_t)(g->n - 1) * n_blocks;
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
        float *out = a->args->out + token * a->args->out_token_stride + h * a->args->out_head_stride;
        for (size_t d = 0; d < dim; d++)
            out[d] = w_one * from[d] + w_other * out[d];
        if (a->args->lse)
            a->args->lse[token * n_heads + h] = lse;
    }
}

static void attend_group(const attend *a, const group *g)
{
    attend_shared(a, g);
    for (uint32_t i = 0; i < g->n; i++) {
        attend_sequence(a, g->first + i, g->shared,
                        a->rows.other_lse + (size_t)i * a->shape->n_heads);
        merge_shared(a, g, i);
    }
}

void tqkvi_paged_attend(tqkv_paged *paged, const tqkv_paged_batch *batch,
                        const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    const tqkv_plan_layer *shape = &paged->codec->layer->shape;
    uint8_t *rows = (uint8_t *)args->scratch + tqkvi_view_bytes(paged->codec);
    const attend a = {.paged = paged,
                      .batch = batch,
                      .args = args,
                      .parallel = parallel,
                      .shape = shape,
                      .heads = args->scratch,
                      .rows = group_rows_init(rows, shape),
                      .scratch = rows + group_bytes(shape)};
    group g;

    tqkvi_view_heads(paged->codec, args->scratch);
    for (uint32_t r = 0; r < batch->n_seqs; r += g.n) {
        g = find_group(&a, r);
        if (g.n > 1)
            attend_group(&a, &g);
        else
            attend_sequence(&a, r, (block_range){0, 0}, NULL);
    }
}
