/* SPDX-License-Identifier: Apache-2.0 */
/* paged.h: checks arguments; attention reads pages and copies through spans of 16-token blocks. */
#include <math.h>
#include <string.h>

#include "api/checks.h"
#include "api/codec_view.h"
#include "base/parallel.h"
#include "cache/paged_layer.h"

#define SPANS_MAX (TQKV_TIERS_MAX + 1) /* the last tier, the younger ones, the new tokens */

void tqkv_paged_config_init(tqkv_paged_config *config)
{
    if (config)
        *config = (tqkv_paged_config){.struct_bytes = sizeof(*config)};
}

void tqkv_paged_batch_init(tqkv_paged_batch *batch)
{
    if (batch)
        *batch = (tqkv_paged_batch){.struct_bytes = sizeof(*batch), .decode_tokens_max = 1};
}

static bool is_config(const tqkv_paged_config *config)
{
    if (!config || config->struct_bytes != sizeof(*config) || !tqkvi_is_allocator(config->mem) ||
        !tqkvi_is_cached_layer(config->plan, config->layer))
        return false;
    if (config->block_tokens == 0 || config->block_tokens % TQKVI_BLOCK_TOKENS != 0 ||
        config->n_blocks == 0)
        return false;
    if ((uint64_t)config->n_blocks * config->block_tokens > INT32_MAX)
        return false;
    return tqkvi_is_rope(config->rope, config->plan->layers[config->layer].shape.k_dim);
}

tqkv_status tqkv_paged_create(const tqkv_paged_config *config, tqkv_paged **out)
{
    if (!out)
        return TQKV_ERR_INVALID_ARG;
    *out = NULL;
    return is_config(config) ? tqkvi_paged_create(config, out) : TQKV_ERR_INVALID_ARG;
}

void tqkv_paged_destroy(tqkv_paged *paged)
{
    tqkvi_paged_destroy(paged);
}

size_t tqkv_paged_bytes(const tqkv_paged_config *config)
{
    return is_config(config) ? tqkvi_paged_bytes(config) : 0;
}

size_t tqkv_paged_block_bytes(const tqkv_paged *paged)
{
    return paged ? (size_t)paged->page_blocks * paged->layouts[paged->old_tier].block_bytes : 0;
}

void tqkv_paged_get_stats(const tqkv_paged *paged, tqkv_paged_stats *out)
{
    if (!out)
        return;
    *out = (tqkv_paged_stats){.n_written = 0};
    if (paged)
        *out = (tqkv_paged_stats){.n_written = paged->n_written,
                                  .n_bad_rows = paged->n_bad_rows,
                                  .n_young = paged->n_young,
                                  .n_missing = paged->n_missing};
}

static bool are_pages(const tqkv_paged *paged, const int32_t *table, uint32_t n_tokens)
{
    const uint32_t n_pages = tqkvi_div_up(n_tokens, paged->page_blocks * TQKVI_BLOCK_TOKENS);

    for (uint32_t i = 0; i < n_pages; i++)
        if (table[i] < 0 || (uint32_t)table[i] >= paged->n_pages)
            return false;
    return true;
}

/* Lengths and block numbers of one sequence. */
static bool is_sequence(const tqkv_paged *paged, const tqkv_paged_batch *batch, uint32_t r)
{
    const int32_t len = batch->seq_lens[r];
    const int64_t n = (int64_t)batch->query_start[r + 1] - batch->query_start[r];
    const uint32_t page_tokens = paged->page_blocks * TQKVI_BLOCK_TOKENS;

    if (n < 0 || len < n)
        return false;
    if (batch->n_seqs > 1 && batch->block_table_stride < tqkvi_div_up((uint32_t)len, page_tokens))
        return false;
    return are_pages(paged, batch->block_table + r * batch->block_table_stride, (uint32_t)len);
}

static bool is_batch(const tqkv_paged *paged, const tqkv_paged_batch *batch)
{
    if (!batch || batch->struct_bytes != sizeof(*batch) ||
        batch->block_stride_bytes < tqkv_paged_block_bytes(paged))
        return false;
    if (batch->n_seqs == 0)
        return true;
    if (!batch->blocks || !batch->query_start || !batch->seq_lens || !batch->block_table ||
        batch->query_start[0] != 0)
        return false;
    for (uint32_t r = 0; r < batch->n_seqs; r++)
        if (!is_sequence(paged, batch, r))
            return false;
    return batch->query_start[batch->n_seqs] == 0 || (batch->k && batch->v);
}

tqkv_status tqkv_paged_write(tqkv_paged *paged, const tqkv_paged_batch *batch,
                             const tqkv_parallel *parallel)
{
    if (!paged || !is_batch(paged, batch) || !tqkvi_is_parallel(parallel))
        return TQKV_ERR_INVALID_ARG;
    return tqkvi_paged_write(paged, batch, parallel);
}

uint32_t tqkv_paged_lost(const tqkv_paged *paged, const int32_t *block_table, uint32_t seq_len)
{
    if (!paged || (seq_len > 0 && !block_table) || !are_pages(paged, block_table, seq_len))
        return UINT32_MAX;
    return tqkvi_paged_lost(paged, block_table, seq_len);
}

/*
 * The blocks that one call of attention reads, in scratch: as they follow each other in the
 * sequence, then by tier. positions also has the blocks of the call's own tokens, at its end.
 */
typedef struct block_lists {
    const uint8_t **found;
    uint8_t *tiers; /* of found */
    const uint8_t **at;
    int32_t *bases, *positions; /* of at; positions: of first tokens */
} block_lists;

static size_t lists_bytes(size_t n_blocks)
{
    const size_t bytes = n_blocks * (2 * sizeof(uint8_t *) + 2 * sizeof(int32_t) + 1);

    return (bytes + TQKV_ALIGN - 1) / TQKV_ALIGN * TQKV_ALIGN;
}

static block_lists lists_init(void *memory, size_t n_blocks)
{
    block_lists lists = {.at = memory};

    lists.found = lists.at + n_blocks;
    lists.bases = (int32_t *)(void *)(lists.found + n_blocks);
    lists.positions = lists.bases + n_blocks;
    lists.tiers = (uint8_t *)(lists.positions + n_blocks);
    return lists;
}

static size_t blocks_max(uint32_t n_q, uint32_t seq_len)
{
    return (size_t)tqkvi_div_up(seq_len, TQKVI_BLOCK_TOKENS) +
           tqkvi_div_up(n_q, TQKVI_BLOCK_TOKENS);
}

size_t tqkv_paged_scratch_bytes(const tqkv_paged *paged, uint32_t n_q, uint32_t seq_len,
                                size_t n_workers)
{
    if (!paged)
        return 0;
    const size_t bytes = tqkvi_attention_scratch_bytes(&paged->codec->layer->shape, n_q, n_workers);
    const size_t more = tqkvi_view_bytes(paged->codec) + lists_bytes(blocks_max(n_q, seq_len));
    return bytes > SIZE_MAX - more ? SIZE_MAX : bytes + more;
}

static bool are_attend_args(const tqkv_paged *paged, const tqkv_paged_batch *batch,
                            const tqkv_attend_args *args)
{
    const uint32_t n_tokens = batch->n_seqs ? (uint32_t)batch->query_start[batch->n_seqs] : 0;

    if (!args || args->struct_bytes != sizeof(*args) || args->n_q != n_tokens)
        return false;
    if (args->n_q == 0)
        return true;
    if (!args->q || !args->out || !args->scratch || (uintptr_t)args->scratch % TQKV_ALIGN != 0)
        return false;
    if (args->mask || args->slopes)
        return false;
    if ((uint64_t)args->n_q * paged->codec->layer->shape.n_heads > UINT32_MAX)
        return false;
    return isfinite(args->scale) && isfinite(args->softcap) && args->softcap >= 0;
}

/* New tokens of a sequence that one call of attention takes. */
typedef struct part {
    tqkv_paged *paged;
    const tqkv_paged_batch *batch;
    const int32_t *table; /* of the sequence */
    uint32_t token, n;    /* of the batch */
    uint32_t position;    /* of the first one */
    block_lists lists;
} part;

static uint32_t tokens_before(const part *p, uint32_t index)
{
    const uint32_t left = p->position - index * TQKVI_BLOCK_TOKENS;

    return left < TQKVI_BLOCK_TOKENS ? left : TQKVI_BLOCK_TOKENS;
}

/* Finds the blocks before the part that it can see: [first, first + the result). */
static uint32_t find_blocks(const part *p, uint32_t *first)
{
    const uint32_t window = p->paged->codec->layer->shape.window;
    const uint32_t end = tqkvi_div_up(p->position, TQKVI_BLOCK_TOKENS);

    *first =
        window > 0 && p->position >= window ? (p->position - window + 1) / TQKVI_BLOCK_TOKENS : 0;
    for (uint32_t index = *first; index < end; index++) {
        const tqkvi_paged_spot spot =
            tqkvi_paged_find(p->paged, p->batch, p->table, index, tokens_before(p, index),
                             p->position / TQKVI_BLOCK_TOKENS);
        p->lists.found[index - *first] = spot.block;
        p->lists.tiers[index - *first] = (uint8_t)spot.tier;
    }
    return end - *first;
}

/* The spans of a part: its older blocks by tier, then its own tokens. Returns their number. */
static size_t fill_spans(const part *p, tqkvi_span *spans)
{
    const tqkv_paged *paged = p->paged;
    const tqkv_plan_layer *shape = &paged->codec->layer->shape;
    const block_lists *lists = &p->lists;
    uint32_t first;
    const uint32_t n_found = find_blocks(p, &first);
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
            lists->positions[n] = (int32_t)((first + i) * TQKVI_BLOCK_TOKENS);
            lists->bases[n] = tqkvi_paged_base(paged, lists->positions[n]);
            span.n_tokens += tokens_before(p, first + i); /* only the last block is not whole */
            n++;
        }
        if (span.n_tokens > 0)
            spans[n_spans++] = span;
    }
    spans[n_spans++] =
        (tqkvi_span){.n_tokens = p->n,
                     .rows = {p->batch->k + (size_t)p->token * shape->n_kv_heads * shape->k_dim,
                              p->batch->v + (size_t)p->token * shape->n_kv_heads * shape->v_dim},
                     .block_positions = lists->positions + n};
    for (uint32_t i = 0; i < p->n; i += TQKVI_BLOCK_TOKENS)
        lists->positions[n++] = (int32_t)(p->position + i);
    return n_spans;
}

static void attend_part(const part *p, const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    const tqkv_codec *codec = p->paged->codec;
    const tqkvi_attn_head *heads = args->scratch;
    const size_t n_heads = codec->layer->shape.n_heads;
    tqkvi_span spans[SPANS_MAX];
    tqkv_attend_args own = *args;

    own.n_q = p->n;
    own.n_cells = UINT32_MAX;
    own.q += p->token * args->q_token_stride;
    own.out += p->token * args->out_token_stride;
    own.lse = args->lse ? args->lse + p->token * n_heads : NULL;
    own.causal = 1;
    own.scratch = (uint8_t *)p->lists.at + lists_bytes(blocks_max(p->n, p->position + p->n));
    const tqkvi_attention attention = {.kernels = codec->kernels,
                                       .layer = codec->layer,
                                       .heads = {heads, heads + codec->n_kv_heads},
                                       .turn = p->paged->has_bases ? tqkvi_view_turn : NULL,
                                       .turn_user = codec,
                                       .spans = spans,
                                       .n_spans = fill_spans(p, spans),
                                       .args = &own,
                                       .window = codec->layer->shape.window,
                                       .first_position = (int32_t)p->position};
    tqkvi_attend(&attention, parallel);
}

static void attend_sequence(tqkv_paged *paged, const tqkv_paged_batch *batch, uint32_t r,
                            const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    const uint32_t token = (uint32_t)batch->query_start[r];
    const uint32_t n = (uint32_t)batch->query_start[r + 1] - token;
    const uint32_t position = (uint32_t)batch->seq_lens[r] - n;
    const uint32_t step = n <= batch->decode_tokens_max ? 1 : n;
    part p = {.paged = paged,
              .batch = batch,
              .table = batch->block_table + r * batch->block_table_stride};

    for (uint32_t i = 0; i < n; i += step) {
        p.token = token + i;
        p.n = step;
        p.position = position + i;
        p.lists = lists_init((uint8_t *)args->scratch + tqkvi_view_bytes(paged->codec),
                             blocks_max(p.n, p.position + p.n));
        attend_part(&p, args, parallel);
    }
}

tqkv_status tqkv_paged_attend(tqkv_paged *paged, const tqkv_paged_batch *batch,
                              const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    if (!paged || !is_batch(paged, batch) || !tqkvi_is_parallel(parallel) ||
        !are_attend_args(paged, batch, args))
        return TQKV_ERR_INVALID_ARG;
    if (args->n_q > 0)
        tqkvi_view_heads(paged->codec, args->scratch);
    for (uint32_t r = 0; r < batch->n_seqs; r++)
        attend_sequence(paged, batch, r, args, parallel);
    return TQKV_OK;
}
