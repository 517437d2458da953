/* SPDX-License-Identifier: Apache-2.0 */
/* paged.h: checks arguments. */
#include <math.h>

#include "api/checks.h"
#include "api/paged_attend.h"
#include "base/parallel.h"

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

uint32_t tqkv_paged_old_tier(const tqkv_plan *plan, uint32_t layer)
{
    return tqkvi_is_cached_layer(plan, layer) ? tqkvi_paged_old_tier(plan, layer) : UINT32_MAX;
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
                                  .n_missing = paged->n_missing,
                                  .n_shared = paged->n_shared};
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

size_t tqkv_paged_scratch_bytes(const tqkv_paged *paged, uint32_t n_q, uint32_t seq_len,
                                size_t n_workers)
{
    return paged ? tqkvi_paged_scratch_bytes(paged, n_q, seq_len, n_workers) : 0;
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
    if ((args->q_latent != NULL) != paged->codec->layer->shape.is_latent)
        return false;
    if ((uint64_t)args->n_q * paged->codec->layer->shape.n_heads > UINT32_MAX)
        return false;
    return isfinite(args->scale) && isfinite(args->softcap) && args->softcap >= 0;
}

tqkv_status tqkv_paged_attend(tqkv_paged *paged, const tqkv_paged_batch *batch,
                              const tqkv_attend_args *args, const tqkv_parallel *parallel)
{
    if (!paged || !is_batch(paged, batch) || !tqkvi_is_parallel(parallel) ||
        !are_attend_args(paged, batch, args))
        return TQKV_ERR_INVALID_ARG;
    if (args->n_q > 0)
        tqkvi_paged_attend(paged, batch, args, parallel);
    return TQKV_OK;
}

tqkv_status tqkv_paged_keep(tqkv_paged *paged, const int32_t *block_table, uint32_t seq_len)
{
    if (!paged || (seq_len > 0 && !block_table) || !are_pages(paged, block_table, seq_len))
        return TQKV_ERR_INVALID_ARG;
    tqkvi_paged_keep(paged, block_table, seq_len);
    return TQKV_OK;
}
