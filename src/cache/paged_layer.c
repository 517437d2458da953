/* SPDX-License-Identifier: Apache-2.0 */
/* Building the object, and finding what a query reads. */
#include "cache/paged_layer.h"

/* What a config asks for, before any memory is taken. */
typedef struct measures {
    uint32_t n_blocks;
    uint32_t n_copies; /* as in tqkv_paged */
    uint32_t tier[TQKVI_COPIES_MAX], reach[TQKVI_COPIES_MAX], count[TQKVI_COPIES_MAX];
    uint32_t kept[TQKVI_COPIES_MAX];
    size_t table_bytes[TQKVI_COPIES_MAX], data_bytes[TQKVI_COPIES_MAX];
    size_t sections_bytes;
    uint32_t sinks; /* entry of the sinks, or TQKVI_COPY_NONE */
} measures;

uint32_t tqkvi_paged_old_tier(const tqkv_plan *plan, uint32_t layer)
{
    const tqkv_plan_layer *shape = &plan->layers[layer].shape;
    uint64_t n_tokens = 0;

    for (uint32_t tier = 0; tier + 1 < plan->n_tiers; tier++) {
        n_tokens += shape->tier_tokens[tier];
        if (shape->window != 0 && n_tokens >= shape->window)
            return tier;
    }
    return plan->n_tiers - 1;
}

/* n_kept: for each sequence, on top of per_sequence. */
static void add_copies(measures *m, const tqkv_paged_config *config, uint32_t tier, uint64_t reach,
                       uint64_t per_sequence, uint64_t n_kept)
{
    const tqkv_plan_layer *shape = &config->plan->layers[config->layer].shape;
    const uint64_t wanted = (per_sequence + n_kept) * config->n_sequences[tier] +
                            tqkvi_div_up(config->n_batch_tokens, TQKVI_BLOCK_TOKENS);
    const uint32_t i = m->n_copies;

    if (config->n_sequences[tier] == 0)
        return;
    m->n_copies++;
    m->tier[i] = tier;
    m->reach[i] = (uint32_t)reach;
    m->count[i] = wanted < m->n_blocks ? (uint32_t)wanted : m->n_blocks;
    m->kept[i] = m->count[i] < m->n_blocks ? (uint32_t)(n_kept * config->n_sequences[tier]) : 0;
    m->table_bytes[i] = tqkvi_young_copies_bytes(m->count[i], m->kept[i], m->n_blocks);
    /* Below 2^27 blocks (is_config) of less than 2^29 bytes: fits in 64 bits. */
    m->data_bytes[i] = (size_t)m->count[i] * TQKVI_BLOCK_TOKENS * shape->token_bytes[tier];
}

/*
 * Copies per sequence: the query's block, those within reach, the one that has just left it (in a
 * list by use it may be newer than one that another sequence still needs), and those of drafts. A batch
 * is written before it is attended, so its blocks come on top. Of the youngest tier, as many as are
 * within reach may be kept for prefixes (tqkv_paged_keep). Sinks of cached prompts that no
 * sequence uses now are kept as well, as many again.
 */
static measures measure(const tqkv_paged_config *config)
{
    const tqkv_plan *plan = config->plan;
    const tqkv_plan_layer *shape = &plan->layers[config->layer].shape;
    const uint32_t old_tier = tqkvi_paged_old_tier(plan, config->layer);
    const uint32_t window =
        shape->window ? tqkvi_div_up(shape->window, TQKVI_BLOCK_TOKENS) : UINT32_MAX;
    measures m = {.n_blocks = config->n_blocks * (config->block_tokens / TQKVI_BLOCK_TOKENS),
                  .sections_bytes =
                      (size_t)2 * plan->n_tiers * shape->n_kv_heads * sizeof(uint32_t),
                  .sinks = TQKVI_COPY_NONE};
    uint64_t n_tokens = 0;

    for (uint32_t tier = 0; tier < old_tier; tier++) {
        n_tokens += shape->tier_tokens[tier];
        const uint64_t held = (n_tokens + TQKVI_BLOCK_TOKENS - 1) / TQKVI_BLOCK_TOKENS;
        const uint64_t reach = held < window ? held : window;
        if (shape->tier_tokens[tier] > 0)
            add_copies(&m, config, tier, reach,
                       reach + 2 + tqkvi_div_up(config->n_drafts, TQKVI_BLOCK_TOKENS),
                       tier == 0 ? reach : 0);
    }
    if (plan->n_sinks > 0 && old_tier > 0) {
        const uint32_t n = tqkvi_div_up(plan->n_sinks, TQKVI_BLOCK_TOKENS);
        m.sinks = config->n_sequences[0] > 0 ? m.n_copies : TQKVI_COPY_NONE;
        add_copies(&m, config, 0, n, 2 * (uint64_t)n, 0);
    }
    return m;
}

size_t tqkvi_paged_bytes(const tqkv_paged_config *config)
{
    const measures m = measure(config);
    size_t bytes = sizeof(tqkv_paged) + m.sections_bytes;

    for (uint32_t i = 0; i < m.n_copies; i++)
        bytes += m.table_bytes[i] + m.data_bytes[i];
    return bytes;
}

static tqkv_status init_layouts(tqkv_paged *paged, uint32_t n_tiers, size_t bytes)
{
    const size_t n_sections = (size_t)2 * paged->codec->n_kv_heads;

    paged->sections = tqkvi_alloc(&paged->mem, bytes);
    if (!paged->sections)
        return TQKV_ERR_NO_MEMORY;
    for (uint32_t tier = 0; tier < n_tiers; tier++)
        tqkvi_layer_block_layout(paged->codec->layer, tier, paged->sections + tier * n_sections,
                                 &paged->layouts[tier]);
    return TQKV_OK;
}

static tqkv_status init_copies(tqkv_paged *paged, const measures *m, const tqkv_allocator *mem)
{
    size_t data_bytes = 0, table_bytes = 0;

    for (uint32_t i = 0; i < m->n_copies; i++) {
        data_bytes += m->data_bytes[i];
        table_bytes += m->table_bytes[i];
    }
    if (data_bytes == 0)
        return TQKV_OK;
    paged->tables = tqkvi_alloc(&paged->mem, table_bytes);
    if (!paged->tables)
        return TQKV_ERR_NO_MEMORY;
    TQKV_TRY(tqkvi_zero_pages_init(&paged->data, mem, data_bytes));

    uint8_t *table = paged->tables, *data = paged->data.data;
    paged->n_copies = m->n_copies;
    for (uint32_t i = 0; i < m->n_copies; i++) {
        tqkvi_young_copies *copies = &paged->copies[i];
        tqkvi_young_copies_init(copies, table, m->count[i], m->kept[i], m->n_blocks);
        copies->tier = m->tier[i];
        copies->reach = m->reach[i];
        copies->data = data;
        table += m->table_bytes[i];
        data += m->data_bytes[i];
    }
    return TQKV_OK;
}

static tqkv_status init_paged(tqkv_paged *paged, const tqkv_paged_config *config)
{
    const measures m = measure(config);

    paged->sinks = m.sinks;
    TQKV_TRY(
        tqkvi_codec_create(config->plan, config->layer, config->rope, config->mem, &paged->codec));
    for (uint32_t g = 0; g < paged->codec->n_kv_heads; g++)
        paged->has_bases |= !paged->codec->heads[TQKV_SIDE_K][g].plain &&
                            paged->codec->rope.style != TQKV_ROPE_NONE;
    if (paged->has_bases && paged->frame_tokens % TQKVI_BLOCK_TOKENS != 0)
        return TQKV_ERR_UNSUPPORTED;
    TQKV_TRY(init_layouts(paged, config->plan->n_tiers, m.sections_bytes));
    return init_copies(paged, &m, config->mem);
}

tqkv_status tqkvi_paged_create(const tqkv_paged_config *config, tqkv_paged **out)
{
    tqkv_allocator mem;

    *out = NULL;
    tqkvi_allocator_init(&mem, config->mem);
    tqkv_paged *paged = tqkvi_alloc_zero(&mem, sizeof(*paged));
    if (!paged)
        return TQKV_ERR_NO_MEMORY;
    paged->mem = mem;
    paged->page_blocks = config->block_tokens / TQKVI_BLOCK_TOKENS;
    paged->n_pages = config->n_blocks;
    paged->old_tier = tqkvi_paged_old_tier(config->plan, config->layer);
    paged->n_sinks = config->plan->n_sinks;
    paged->frame_tokens = config->plan->frame_tokens;

    const tqkv_status status = init_paged(paged, config);
    if (status != TQKV_OK) {
        tqkvi_paged_destroy(paged);
        return status;
    }
    *out = paged;
    return TQKV_OK;
}

void tqkvi_paged_destroy(tqkv_paged *paged)
{
    if (!paged)
        return;
    const tqkv_allocator mem = paged->mem;
    tqkvi_free(&mem, paged->runs);
    tqkvi_zero_pages_deinit(&paged->data);
    tqkvi_free(&mem, paged->tables);
    tqkvi_free(&mem, paged->sections);
    tqkvi_codec_destroy(paged->codec);
    tqkvi_free(&mem, paged);
}

int32_t tqkvi_paged_base(const tqkv_paged *paged, int32_t position)
{
    return paged->has_bases ? tqkvi_frame_base(position, paged->frame_tokens) : 0;
}

bool tqkvi_paged_reaches(const tqkv_paged *paged, uint32_t copies, uint32_t index, uint32_t newest)
{
    const bool is_sink = index < tqkvi_div_up(paged->n_sinks, TQKVI_BLOCK_TOKENS);

    if (copies == paged->sinks)
        return is_sink;
    return !is_sink && newest - index <= paged->copies[copies].reach;
}

/* Whether the copy of a block has its first n_tokens tokens. */
static bool has_tokens(const tqkvi_young_copies *copies, uint32_t block, uint32_t n_tokens)
{
    const uint32_t needed = (1u << n_tokens) - 1;
    const uint32_t copy = copies->copy_of[block];

    return copy != TQKVI_COPY_NONE && (copies->valid[copy] & needed) == needed;
}

uint32_t tqkvi_paged_lost(const tqkv_paged *paged, const int32_t *table, uint32_t n_tokens)
{
    uint32_t n_lost = 0;

    for (uint32_t first = 0; first < n_tokens; first += TQKVI_BLOCK_TOKENS) {
        const uint32_t index = first / TQKVI_BLOCK_TOKENS, left = n_tokens - first;
        const uint32_t block = tqkvi_paged_block(paged, table, index);
        for (uint32_t i = 0; i < paged->n_copies; i++)
            if (paged->copies[i].tier == 0 &&
                tqkvi_paged_reaches(paged, i, index, n_tokens / TQKVI_BLOCK_TOKENS))
                n_lost += !has_tokens(&paged->copies[i], block,
                                      left < TQKVI_BLOCK_TOKENS ? left : TQKVI_BLOCK_TOKENS);
    }
    return n_lost;
}

void tqkvi_paged_keep(tqkv_paged *paged, const int32_t *table, uint32_t n_tokens)
{
    const uint32_t newest = n_tokens / TQKVI_BLOCK_TOKENS;

    if (paged->n_copies == 0 || paged->copies[0].tier != 0)
        return;
    const uint32_t reach = paged->copies[0].reach;
    const uint32_t first = newest > reach ? newest - reach : 0;
    for (uint32_t index = first; index * TQKVI_BLOCK_TOKENS < n_tokens; index++)
        tqkvi_young_copies_keep(&paged->copies[0], tqkvi_paged_block(paged, table, index));
}

tqkvi_paged_spot tqkvi_paged_find(tqkv_paged *paged, const tqkv_paged_batch *batch,
                                  const int32_t *table, uint32_t index, uint32_t n_tokens,
                                  uint32_t newest)
{
    const uint32_t block = tqkvi_paged_block(paged, table, index);
    tqkvi_paged_spot spot = {NULL, paged->old_tier};
    bool missing = false;

    /* Copies in older tiers are used too: their turn comes when the younger ones no longer reach. */
    for (uint32_t i = 0; i < paged->n_copies; i++) {
        tqkvi_young_copies *copies = &paged->copies[i];
        const uint32_t copy = copies->copy_of[block];
        if (!tqkvi_paged_reaches(paged, i, index, newest))
            continue;
        if (!has_tokens(copies, block, n_tokens)) {
            missing |= !spot.block;
            continue;
        }
        tqkvi_young_copies_use(copies, copy);
        if (!spot.block)
            spot = (tqkvi_paged_spot){copies->data +
                                          (size_t)copy * paged->layouts[copies->tier].block_bytes,
                                      copies->tier};
    }
    paged->n_young += spot.block != NULL;
    paged->n_missing += missing;
    if (!spot.block)
        spot.block = tqkvi_paged_page_block(paged, batch, block);
    return spot;
}
