/* SPDX-License-Identifier: Apache-2.0 */
/* The public launches of cuda.h: check, choose a configuration, hand over to the device code. */
#include "cuda/launch.h"

#include <math.h>
#include <stdbool.h>

#include <cuda_runtime_api.h>

#include "base/alloc.h"

#define SHARED_BYTES_MAX (227u * 1024u) /* of a block on sm_90; smaller devices say so themselves */
#define SHARED_BYTES_RESERVED 1024u     /* beside what a block asks for */
#define TILES_OF_BLOCK 1.5f /* tiles of a warp that take as long as the rest of what a block does */
#define FETCHED_UNITS_MAX 8u /* of a matrix; all of 128 channels */
#define LOG2_E 1.44269504f
#define SEQUENCES_MAX 65535u /* of a grid's third dimension */
#define COUNTERS 16384u /* of arrivals: one place in the workspace for all sizes, so that no call writes there */
#define PREFILL_ROWS_MAX (1u << 30)    /* tokens times heads */
#define PREFILL_SPLITS_MAX 32
#define TILES_OF_PREFILL_BLOCK 8.0f /* tiles that take as long as the rest of what a block does */
#define LATENT_TOKENS 32u /* of a tile */
#define LATENT_TILES_OF_BLOCK 6.0f /* as above */
#define LATENT_TILES_MIN 1u /* of a part */

static bool type_is_good(tqkv_cuda_type type)
{
    return type == TQKV_CUDA_F32 || type == TQKV_CUDA_F16 || type == TQKV_CUDA_BF16;
}

static bool pages_are_good(const tqkvc_shape *shape, const tqkv_cuda_pages *pages)
{
    const uint32_t n = pages->page_tokens;

    if (!pages->block_table || (n != 16 && n != 32 && (n == 0 || n % TQKV_CUDA_TILE_TOKENS != 0)))
        return false;
    for (uint32_t tier = pages->tiers ? 0 : shape->n_tiers - 1; tier < shape->n_tiers; tier++)
        if (!pages->pool[tier])
            return false;
    return true;
}

static uint32_t page_bytes(const tqkvc_shape *shape, uint32_t tier, uint32_t page_tokens)
{
    return shape->block_bytes[tier] * (page_tokens / TQKVC_BLOCK_TOKENS);
}

/* How decode is cut for given sizes: the same for the workspace and the launch. */
typedef struct decode_plan {
    uint32_t n_rows, rows_per_tile, n_row_tiles, n_frames, frame_tokens, tile_bytes, n_blocks,
        n_splits;
    bool is_of_hopper; /* device code may launch clusters and start early */
    bool is_cluster;
    uint32_t n_fetched;
    size_t products_bytes, means_bytes, parts_bytes, arrivals_bytes;
} decode_plan;

static uint32_t device_attribute(enum cudaDeviceAttr attribute)
{
    int device = 0, value = 0;

    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return (uint32_t)value;
}

/*
 * Memory of a warp for codes: of each tier from first_whole on it holds four blocks (two or one, where four
 * of the last tier leave no room for the rest of what a block of threads needs), of each other tier at
 * least one. Tiers that have no room for four blocks are read two or one at a time.
 */
static uint32_t choose_tile_bytes(const tqkvc_shape *shape, uint32_t rows_per_tile,
                                  uint32_t first_whole)
{
    const size_t fixed = tqkvc_decode_shared_bytes(shape->dim, rows_per_tile, 0, false);
    const uint32_t room = (uint32_t)(SHARED_BYTES_MAX - fixed) / TQKVC_WARPS;
    const uint32_t columns = 2 * 8 * (shape->dim + 8) * 2; /* that the end puts there */
    uint32_t n_blocks = TQKVC_TILE_BLOCKS, bytes = tqkvi_div_up(columns, TQKVC_WARPS * 16) * 16;

    while (n_blocks > 1 && n_blocks * shape->section_bytes_max[shape->n_tiers - 1] > room)
        n_blocks /= 2;
    for (uint32_t tier = 0; tier < shape->n_tiers; tier++) {
        const uint32_t n = tier >= first_whole ? n_blocks : 1;
        const uint32_t tile = n * shape->section_bytes_max[tier];
        bytes = tile > bytes ? tile : bytes;
    }
    return bytes;
}

/* Blocks of threads that a multiprocessor has shared memory for: 0 where it has too little for one. */
static uint32_t blocks_in_memory(const tqkvc_shape *shape, uint32_t rows_per_tile,
                                 uint32_t tile_bytes)
{
    const uint32_t sm_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const size_t bytes = tqkvc_decode_shared_bytes(shape->dim, rows_per_tile, tile_bytes, false);

    return bytes > SHARED_BYTES_MAX ? 0 : (uint32_t)(sm_bytes / (bytes + SHARED_BYTES_RESERVED));
}

/* Blocks that a multiprocessor holds, by shared memory and registers. */
static uint32_t choose_blocks(const tqkvc_shape *shape, const decode_plan *plan)
{
    const uint32_t n = blocks_in_memory(shape, plan->rows_per_tile, plan->tile_bytes);

    return n < 1 ? 1 : n > TQKVC_BLOCKS_MAX ? TQKVC_BLOCKS_MAX : n;
}

/*
 * Room for four blocks of younger tiers too, from the oldest of them on, as far as it costs a multiprocessor
 * no block of threads: n_blocks, and the splits that follow from it, stay as they are.
 */
static void widen_tiles(const tqkvc_shape *shape, decode_plan *plan)
{
    for (uint32_t first_whole = shape->n_tiers - 1; first_whole-- > 0;) {
        const uint32_t bytes = choose_tile_bytes(shape, plan->rows_per_tile, first_whole);
        if (blocks_in_memory(shape, plan->rows_per_tile, bytes) < plan->n_blocks)
            return;
        plan->tile_bytes = bytes;
    }
}

static uint32_t choose_splits(const tqkvc_shape *shape, const decode_plan *plan, uint32_t n_seqs,
                              uint32_t max_tokens)
{
    const uint32_t n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
    const uint32_t slots = n_sm > 0 ? n_sm * plan->n_blocks : 1, /* sizes are asked without a device too */
                   n = n_seqs * shape->n_kv_heads * plan->n_row_tiles;
    const uint32_t n_tiles = tqkvi_div_up(max_tokens, TQKV_CUDA_TILE_TOKENS);
    const uint32_t by_tiles = tqkvi_div_up(n_tiles, TQKVC_WARPS); /* a tile for each warp */
    const uint32_t most = by_tiles < TQKVC_SPLITS_MAX ? by_tiles : TQKVC_SPLITS_MAX;
    uint32_t best = 1;
    float least = INFINITY;

    if (n > COUNTERS)
        return 1;
    /* Rounds of blocks, in tiles of a warp, and what each block costs besides. */
    for (uint32_t splits = 1; splits <= most; splits++) {
        const uint32_t tiles = tqkvi_div_up(by_tiles, splits),
                       rounds = tqkvi_div_up(n * tqkvi_div_up(by_tiles, tiles), slots);
        const float cost = (float)rounds * ((float)tiles + TILES_OF_BLOCK);
        if (cost < least) {
            least = cost;
            best = splits;
        }
    }
    return best;
}

/* More than 8 blocks are not portable; those of compute capability 9 take 16. */
static uint32_t largest_cluster(void)
{
    if (device_attribute(cudaDevAttrClusterLaunch) == 0)
        return 1;
    return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 ? TQKVC_CLUSTER_MAX
                                                                    : TQKVC_CLUSTER_PORTABLE;
}

/*
 * Whether splits are a cluster: if they are few, and each block has a multiprocessor of its own. Then there
 * are 2, 4, 8 or 16; blocks without tokens cost nothing.
 * Where blocks fill the device, clusters leave gaps, and waiting for each other costs more than it saves.
 * Half of the memory of a multiprocessor is left to the next launch, so that it starts in time; what remains
 * of the other is for a matrix.
 */
static void choose_cluster(const tqkvc_shape *shape, uint32_t n_places, decode_plan *plan)
{
    const uint32_t unit_bytes = shape->dim * 32;
    const size_t half = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2,
                 used = tqkvc_decode_shared_bytes(shape->dim, plan->rows_per_tile, plan->tile_bytes,
                                                  true) +
                        SHARED_BYTES_RESERVED;

    uint32_t n = 1;
    while (n < plan->n_splits)
        n *= 2;
    plan->is_cluster = n > 1 && plan->is_of_hopper && n <= largest_cluster() &&
                       n * n_places <= device_attribute(cudaDevAttrMultiProcessorCount) &&
                       used <= half;
    if (!plan->is_cluster)
        return;
    plan->n_splits = n;
    const uint32_t room = (uint32_t)((half - used) / unit_bytes), units = shape->dim / TQKV_UNIT_CHANNELS,
                   most = units < FETCHED_UNITS_MAX ? units : FETCHED_UNITS_MAX;
    plan->n_fetched = room < most ? room : most;
}

static size_t aligned(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static bool plan_decode(const tqkv_cuda_layer *layer, uint32_t n_seqs, uint32_t q_len,
                        uint32_t max_tokens, decode_plan *plan)
{
    const tqkvc_shape *shape = &layer->shape;

    if (n_seqs == 0 || n_seqs > SEQUENCES_MAX || q_len == 0 || q_len > TQKV_CUDA_Q_MAX ||
        max_tokens == 0 || max_tokens > 1u << 30)
        return false;
    *plan = (decode_plan){.n_rows = q_len * (shape->n_heads / shape->n_kv_heads)};
    plan->rows_per_tile = plan->n_rows <= 4 ? 4 : 8;
    plan->n_row_tiles = tqkvi_div_up(plan->n_rows, plan->rows_per_tile);
    /* Without RoPE every base is the same. */
    plan->frame_tokens = shape->n_rot == 0 ? 1u << 30 : shape->frame_tokens;
    plan->n_frames = tqkvi_div_up(max_tokens, plan->frame_tokens);
    plan->tile_bytes = choose_tile_bytes(shape, plan->rows_per_tile, shape->n_tiers - 1);
    plan->n_blocks = choose_blocks(shape, plan);
    plan->n_splits = choose_splits(shape, plan, n_seqs, max_tokens);
    widen_tiles(shape, plan);
    /* A device without code of its own runs that of an older one. */
    plan->is_of_hopper = tqkvc_decode_code() >= 90;
    choose_cluster(shape, n_seqs * shape->n_kv_heads * plan->n_row_tiles, plan);

    const size_t tiles = (size_t)n_seqs * shape->n_kv_heads * plan->n_row_tiles;
    const size_t rows = tiles * plan->n_frames * plan->rows_per_tile;
    const size_t part_floats = (size_t)(shape->dim + 4) * plan->rows_per_tile;
    plan->products_bytes = aligned(rows * shape->dim * sizeof(float));
    plan->means_bytes = aligned(rows * sizeof(float));
    plan->parts_bytes =
        aligned(tiles * plan->n_splits * part_floats * sizeof(float));
    plan->arrivals_bytes = COUNTERS * sizeof(uint32_t);
    return tqkvc_decode_shared_bytes(shape->dim, plan->rows_per_tile, plan->tile_bytes, false) <=
           SHARED_BYTES_MAX;
}

/* The tiles of query rows of a block, tiles of codes in memory and parts of the tokens. False: sizes are refused. */
static bool plan_latent(const tqkvc_shape *shape, uint32_t n_seqs, uint32_t q_len, uint32_t max_tokens,
                        tqkvc_latent_decode *p)
{
    const uint32_t n_sm = device_attribute(cudaDevAttrMultiProcessorCount),
                   room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                   of_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    float least = INFINITY;

    if (n_seqs == 0 || n_seqs > SEQUENCES_MAX || q_len == 0 || q_len > TQKV_CUDA_Q_MAX || max_tokens == 0 ||
        max_tokens > 1u << 30)
        return false;
    p->n_rows = q_len * shape->n_heads;
    for (uint32_t tier = 0; tier < shape->n_tiers; tier++) {
        const uint32_t bytes = LATENT_TOKENS / TQKVC_BLOCK_TOKENS * shape->block_bytes[tier];
        p->staged_bytes = bytes > p->staged_bytes ? bytes : p->staged_bytes;
    }
    p->row_tiles = p->n_rows <= 16 ? 1 : p->n_rows <= 32 ? 2 : 4;
    while (p->row_tiles > 1 && tqkvc_latent_shared_bytes(p->row_tiles, p->staged_bytes, 1) > room)
        p->row_tiles /= 2;
    /* With 16 rows two blocks of a multiprocessor gain more than a second tile of codes. */
    const uint32_t one = tqkvc_latent_shared_bytes(p->row_tiles, p->staged_bytes, 1) + SHARED_BYTES_RESERVED,
                   two = one + p->staged_bytes, most = p->row_tiles == 1 && 2 * one <= of_sm ? 2 : 1;
    p->n_stages = two - SHARED_BYTES_RESERVED <= room && most * two <= of_sm ? 2 : 1;
    const uint32_t slots = n_sm * most;
    const uint32_t n = n_seqs * tqkvi_div_up(p->n_rows, 16 * p->row_tiles),
                   n_tiles = tqkvi_div_up(max_tokens, LATENT_TOKENS);
    p->n_splits = 1;
    for (uint32_t splits = 1; splits <= TQKVC_SPLITS_MAX && splits * LATENT_TILES_MIN <= n_tiles && slots > 0;
         splits++) {
        const uint32_t rounds = tqkvi_div_up(n * splits, slots);
        const float cost = (float)rounds * ((float)tqkvi_div_up(n_tiles, splits) + LATENT_TILES_OF_BLOCK);
        if (cost < least) {
            least = cost;
            p->n_splits = splits;
        }
    }
    return true;
}

static size_t latent_part_rows(const tqkvc_latent_decode *p, uint32_t n_seqs)
{
    return p->n_splits > 1 ? (size_t)n_seqs * p->n_rows * p->n_splits : 0;
}

static size_t latent_bytes(const tqkvc_shape *shape, uint32_t n_seqs, uint32_t q_len, uint32_t max_tokens)
{
    tqkvc_latent_decode p = {0};

    if (!plan_latent(shape, n_seqs, q_len, max_tokens, &p))
        return 0;
    return aligned(latent_part_rows(&p, n_seqs) * (TQKVC_LATENT_DIM + 2) * sizeof(float) + 1);
}

static tqkv_status decode_latent(const tqkv_cuda_layer *layer, const void *image,
                                 const tqkv_cuda_decode_args *args, void *stream)
{
    const tqkvc_shape *shape = &layer->shape;
    tqkvc_latent_decode p = {.shape = *shape,
                             .image = image,
                             .pages = args->pages,
                             .q = args->q,
                             .out = args->out,
                             .lse = args->lse,
                             .seq_lens = args->seq_lens,
                             .parts = args->workspace,
                             .n_seqs = args->n_seqs,
                             .q_len = args->q_len,
                             .max_tokens = args->max_tokens,
                             .frame_tokens = shape->n_rot == 0 ? 1u << 30 : shape->frame_tokens,
                             .type = args->type,
                             .scale_log2 = args->scale * LOG2_E};

    if (!plan_latent(shape, args->n_seqs, args->q_len, args->max_tokens, &p))
        return TQKV_ERR_INVALID_ARG;
    p.part_sums = p.parts + latent_part_rows(&p, args->n_seqs) * TQKVC_LATENT_DIM;
    for (uint32_t tier = 0; tier < shape->n_tiers; tier++)
        p.page_bytes[tier] = page_bytes(shape, tier, args->pages.page_tokens);
    return tqkvc_launch_latent_decode(&p, stream);
}

size_t tqkv_cuda_decode_bytes(const tqkv_cuda_layer *layer, uint32_t n_seqs, uint32_t q_len,
                              uint32_t max_tokens)
{
    decode_plan plan;

    if (layer && layer->shape.is_latent)
        return latent_bytes(&layer->shape, n_seqs, q_len, max_tokens);
    if (!layer || !plan_decode(layer, n_seqs, q_len, max_tokens, &plan))
        return 0;
    return plan.arrivals_bytes + plan.products_bytes + plan.means_bytes + plan.parts_bytes;
}

tqkv_status tqkv_cuda_decode(const tqkv_cuda_layer *layer, const void *image,
                             const tqkv_cuda_decode_args *args, void *stream)
{
    decode_plan plan;

    if (!layer || !image || !args || !args->q || !args->out || !args->seq_lens ||
        !args->workspace || !type_is_good(args->type) ||
        !pages_are_good(&layer->shape, &args->pages))
        return TQKV_ERR_INVALID_ARG;
    if (layer->shape.is_latent)
        return decode_latent(layer, image, args, stream);
    if (!plan_decode(layer, args->n_seqs, args->q_len, args->max_tokens, &plan))
        return TQKV_ERR_INVALID_ARG;

    /* Counters first: where they are, and what else is there, does not depend on the sizes of a call. */
    uint8_t *next = args->workspace;
    tqkvc_decode p = {.frames = {.shape = layer->shape,
                                 .image = image,
                                 .q = args->q,
                                 .seq_lens = args->seq_lens,
                                 .n_seqs = args->n_seqs,
                                 .q_len = args->q_len,
                                 .n_rows = plan.n_rows,
                                 .n_frames = plan.n_frames,
                                 .frame_tokens = plan.frame_tokens,
                                 .rows_per_tile = plan.rows_per_tile,
                                 .n_row_tiles = plan.n_row_tiles,
                                 .type = args->type},
                      .pages = args->pages,
                      .out = args->out,
                      .lse = args->lse,
                      .n_splits = plan.n_splits,
                      .is_cluster = plan.is_cluster,
                      .n_fetched = plan.n_fetched,
                      .n_blocks = plan.n_blocks,
                      .tile_bytes = plan.tile_bytes,
                      .scale_log2 = args->scale * LOG2_E,
                      .is_early = plan.is_of_hopper,
                      .after_store = plan.is_of_hopper && args->after_store != 0};
    p.arrivals = (uint32_t *)(void *)next;
    next += plan.arrivals_bytes;
    p.frames.products = (float *)(void *)next;
    next += plan.products_bytes;
    p.frames.means = (float *)(void *)next;
    next += plan.means_bytes;
    p.parts = next;
    for (uint32_t tier = 0; tier < layer->shape.n_tiers; tier++) {
        const uint32_t fit = plan.tile_bytes / layer->shape.section_bytes_max[tier];
        p.page_bytes[tier] = page_bytes(&layer->shape, tier, args->pages.page_tokens);
        p.tile_blocks[tier] = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
    }

    return tqkvc_launch_decode(&p, stream);
}

static size_t prefill_part_bytes(const tqkvc_shape *shape, uint32_t n_tokens)
{
    return (size_t)n_tokens * shape->n_heads * (shape->dim + 1) * sizeof(float);
}

static bool prefill_sizes_are_good(const tqkv_cuda_layer *layer, uint32_t n_seqs, uint32_t n_tokens,
                                   uint32_t max_q, uint32_t max_context)
{
    const uint32_t n_heads = layer->shape.n_heads;

    return n_seqs > 0 && n_seqs <= SEQUENCES_MAX && max_context <= 1u << 30 &&
           n_tokens <= PREFILL_ROWS_MAX / n_heads && max_q <= n_tokens;
}

/*
 * Parts of the tokens, so that blocks fill the device: rounds of blocks, in tiles of 64 tokens, and what each block
 * costs besides. bytes: of the workspace.
 */
static uint32_t choose_prefill_splits(const tqkvc_shape *shape, uint32_t n_seqs, uint32_t n_tokens,
                                      uint32_t max_q, uint32_t max_context, size_t bytes)
{
    const uint32_t group = shape->n_heads / shape->n_kv_heads,
                   rows = tqkvc_prefill_rows_of_block(shape->dim);
    const uint32_t slots = device_attribute(cudaDevAttrMultiProcessorCount),
                   by_longest = n_seqs * tqkvi_div_up(max_q * group, rows),
                   by_all = n_tokens * group / rows + n_seqs,
                   n = (by_longest < by_all ? by_longest : by_all) * shape->n_kv_heads;
    const uint32_t n_tiles = tqkvi_div_up(max_context, TQKV_CUDA_TILE_TOKENS);
    const size_t part = prefill_part_bytes(shape, n_tokens);
    uint32_t best = 1;
    float least = INFINITY;

    for (uint32_t splits = 1; splits <= PREFILL_SPLITS_MAX && splits <= n_tiles; splits++) {
        if (splits > 1 && (part * splits > bytes || n * (splits - 1) >= slots))
            break;
        const uint32_t rounds = slots > 0 ? tqkvi_div_up(n * splits, slots) : 1;
        const float cost =
            (float)rounds * ((float)tqkvi_div_up(n_tiles, splits) + TILES_OF_PREFILL_BLOCK);
        if (cost < least) {
            least = cost;
            best = splits;
        }
    }
    return best;
}

size_t tqkv_cuda_prefill_bytes(const tqkv_cuda_layer *layer, uint32_t n_seqs, uint32_t n_tokens,
                               uint32_t max_q, uint32_t max_context)
{
    if (!layer || !prefill_sizes_are_good(layer, n_seqs, n_tokens, max_q, max_context))
        return 0;
    const uint32_t splits =
        choose_prefill_splits(&layer->shape, n_seqs, n_tokens, max_q, max_context, SIZE_MAX);
    return splits == 1 ? 0 : splits * prefill_part_bytes(&layer->shape, n_tokens);
}

tqkv_status tqkv_cuda_prefill(const tqkv_cuda_layer *layer, const void *image,
                              const tqkv_cuda_prefill_args *args, void *stream)
{
    if (!layer || !image || !args || !args->q_starts || !args->context_lens ||
        !type_is_good(args->type) || !pages_are_good(&layer->shape, &args->pages) ||
        (!args->workspace && args->workspace_bytes > 0) ||
        !prefill_sizes_are_good(layer, args->n_seqs, args->n_tokens, args->max_q, args->max_context))
        return TQKV_ERR_INVALID_ARG;
    if (layer->shape.is_latent)
        return TQKV_ERR_UNSUPPORTED;
    if (args->n_tokens == 0 || args->max_q == 0)
        return TQKV_OK;
    if (!args->q || !args->out)
        return TQKV_ERR_INVALID_ARG;

    const tqkvc_shape *shape = &layer->shape;
    tqkvc_prefill p = {.frames = {.shape = *shape,
                                  .image = image,
                                  .q = args->q,
                                  .frame_tokens = shape->n_rot == 0 ? 1u << 30 : shape->frame_tokens,
                                  .type = args->type},
                       .args = *args,
                       .shared_bytes_max = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                       .scale_log2 = args->scale * LOG2_E};
    p.n_splits = choose_prefill_splits(shape, args->n_seqs, args->n_tokens, args->max_q,
                                       args->max_context, args->workspace_bytes);
    p.parts = args->workspace;
    p.part_lse = p.parts + (size_t)p.n_splits * args->n_tokens * shape->n_heads * shape->dim;
    for (uint32_t tier = 0; tier < shape->n_tiers; tier++) {
        const uint32_t bytes =
            tqkvc_prefill_blocks_of_tile(shape->dim) * shape->section_bytes_max[tier];
        p.page_bytes[tier] = page_bytes(shape, tier, args->pages.page_tokens);
        p.staged_bytes = bytes > p.staged_bytes ? bytes : p.staged_bytes;
    }
    return tqkvc_launch_prefill(&p, stream);
}

tqkv_status tqkv_cuda_store(const tqkv_cuda_layer *layer, const void *image,
                            const tqkv_cuda_store_args *args, void *stream)
{
    if (!layer || !image || !args || args->page_tokens == 0 ||
        args->page_tokens % TQKVC_BLOCK_TOKENS != 0 || !type_is_good(args->type))
        return TQKV_ERR_INVALID_ARG;
    tqkvc_store p = {.shape = layer->shape, .image = image, .args = *args};
    for (uint32_t tier = 0; tier < TQKV_TIERS_MAX; tier++) {
        if (!args->slots[tier])
            continue;
        if (tier >= layer->shape.n_tiers || !args->pool[tier])
            return TQKV_ERR_INVALID_ARG;
        p.tiers[p.n_tiers++] = tier;
        p.page_bytes[tier] = page_bytes(&layer->shape, tier, args->page_tokens);
    }
    if (args->n_tokens == 0 || p.n_tiers == 0)
        return TQKV_OK;
    const size_t k_row = (size_t)layer->shape.n_kv_heads * layer->shape.dim,
                 v_row = layer->shape.is_latent ? TQKVC_LATENT_DIM : k_row;
    if (!args->k || !args->v || !args->positions || args->k_token_stride < k_row ||
        args->v_token_stride < v_row)
        return TQKV_ERR_INVALID_ARG;
    return tqkvc_launch_store(&p, stream);
}

tqkv_status tqkv_cuda_unpack(const tqkv_cuda_layer *layer, const void *image,
                             const tqkv_cuda_unpack_args *args, void *stream)
{
    if (!layer || !image || !args || !args->k || !args->v ||
        args->first % TQKV_CUDA_TILE_TOKENS != 0 || !type_is_good(args->type) ||
        !pages_are_good(&layer->shape, &args->pages))
        return TQKV_ERR_INVALID_ARG;
    if (layer->shape.is_latent)
        return TQKV_ERR_UNSUPPORTED;
    if (args->n_tokens == 0)
        return TQKV_OK;
    tqkvc_unpack p = {.shape = layer->shape, .image = image, .args = *args};
    for (uint32_t tier = 0; tier < layer->shape.n_tiers; tier++)
        p.page_bytes[tier] = page_bytes(&layer->shape, tier, args->pages.page_tokens);
    return tqkvc_launch_unpack(&p, stream);
}

tqkv_status tqkv_cuda_gather(const tqkv_cuda_layer *layer, const void *image,
                             const tqkv_cuda_gather_args *args, void *stream)
{
    if (!layer || !image || !args || !args->out || !args->starts || !args->firsts || args->n_seqs == 0 ||
        args->out_stride < TQKVC_LATENT_DIM + TQKVC_LATENT_K_DIM || !type_is_good(args->type) ||
        !pages_are_good(&layer->shape, &args->pages))
        return TQKV_ERR_INVALID_ARG;
    if (!layer->shape.is_latent)
        return TQKV_ERR_UNSUPPORTED;
    if (args->n_tokens == 0)
        return TQKV_OK;
    tqkvc_gather p = {.shape = layer->shape, .image = image, .args = *args};
    for (uint32_t tier = 0; tier < layer->shape.n_tiers; tier++)
        p.page_bytes[tier] = page_bytes(&layer->shape, tier, args->pages.page_tokens);
    return tqkvc_launch_gather(&p, stream);
}

tqkv_status tqkv_cuda_page_tables(const tqkv_cuda_page_tables_args *args, void *stream)
{
    if (!args || (args->n_young > 0 && (!args->copy_of || !args->page_of || !args->used)) || !args->is_sink ||
        !args->clock || !args->query_start || !args->seq_lens || !args->block_table || !args->positions || !args->tier_slots ||
        !args->places || !args->tiers || !args->lengths || !args->youngest || (!args->slots && args->n_tokens > 0) ||
        args->n_young >= TQKV_TIERS_MAX || args->n_copies >= TQKVC_COPIES_MAX || args->n_seqs == 0 ||
        args->n_seqs >= SEQUENCES_MAX || args->n_seqs > args->max_seqs || args->n_tokens > args->max_tokens ||
        args->max_tokens > args->slots_stride || args->n_width == 0 || args->n_width > args->table_stride ||
        args->n_width > args->places_stride)
        return TQKV_ERR_INVALID_ARG;
    return tqkvc_launch_page_tables(args, stream);
}

tqkv_status tqkv_cuda_merge(void *out_a, float *lse_a, const void *out_b, const float *lse_b,
                            size_t n_rows, uint32_t dim, tqkv_cuda_type type, void *stream)
{
    if (!out_a || !lse_a || !out_b || !lse_b || dim == 0 || !type_is_good(type) ||
        n_rows > (size_t)1 << 33)
        return TQKV_ERR_INVALID_ARG;
    return n_rows == 0 ? TQKV_OK
                       : tqkvc_launch_merge(out_a, lse_a, out_b, lse_b, n_rows, dim, type, stream);
}
