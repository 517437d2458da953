/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prefill: attention of chunks of new tokens of several sequences over what is stored of them.
 *
 *     block    KV head x 128 query rows (64 of heads of 256 channels) x part of the tokens of one sequence
 *     tile     64 tokens (32): codes come by bulk copies, become levels in shared memory once for all rows
 *     frame    queries are made anew, as in decode, but by each warp for its own rows
 *     finish   sums of V times the inverse of the transform, mean, output
 *
 * The copy of a tile runs while the one before is multiplied; two blocks of a multiprocessor fill each other's
 * gaps. Where blocks are too few for the device, the tokens are split too: parts go to the workspace, finished,
 * and a second kernel merges them. docs/GPU.md has times.
 */
#include "cuda/prefill_queries.cuh"

namespace
{

constexpr uint32_t THREADS = 32 * TQKVC_PREFILL_WARPS;
constexpr uint32_t NONE = 0xffffffffu;

/* Rows and tokens of a block. */
struct block_range {
    uint32_t seq, q_start, n_rows, first_row, context;
    uint32_t all_see, some_see; /* tokens that every row sees; that any row does */
    uint32_t first_tile, end_tile;
};

/* Tokens that a row sees. */
__device__ __forceinline__ uint32_t find_limit(const tqkvc_prefill &p, const block_range &b,
                                               uint32_t n_queries, uint32_t row)
{
    const uint32_t group = p.frames.shape.n_heads / p.frames.shape.n_kv_heads;

    if (!p.args.is_causal)
        return b.context;
    return (uint32_t)max((int)b.context - (int)n_queries + (int)(row / group) + 1, 0);
}

/* False if there is nothing to do. The first rows of a sequence come last: under a causal mask they are short. */
template <int D> __device__ bool find_range(const tqkvc_prefill &p, block_range &b, uint32_t &n_queries)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t group = p.frames.shape.n_heads / p.frames.shape.n_kv_heads,
                   n_row_tiles = gridDim.x / p.n_splits, split = blockIdx.x / n_row_tiles;

    b.seq = blockIdx.z;
    b.q_start = (uint32_t)p.args.q_starts[b.seq];
    n_queries = min((uint32_t)max(p.args.q_starts[b.seq + 1] - (int)b.q_start, 0), p.args.max_q);
    b.first_row = blockIdx.x % n_row_tiles * shape::ROWS;
    if (b.first_row >= n_queries * group)
        return false;
    b.n_rows = min(n_queries * group - b.first_row, (uint32_t)shape::ROWS);
    b.context = min((uint32_t)max(p.args.context_lens[b.seq], 0), p.args.max_context);
    b.all_see = find_limit(p, b, n_queries, b.first_row);
    b.some_see = find_limit(p, b, n_queries, b.first_row + b.n_rows - 1);
    const uint32_t n_tiles = (b.context + shape::TOKENS - 1) / shape::TOKENS,
                   each = (n_tiles + p.n_splits - 1) / p.n_splits;
    b.first_tile = split * each;
    b.end_tile = min(min(b.first_tile + each, n_tiles), (b.some_see + shape::TOKENS - 1) / shape::TOKENS);
    return true;
}

/* Tiles of a block on their way, by its first warp. A lane below the blocks of a tile has one of them. */
template <int D> struct tile_source {
    using shape = tqkvc_prefill_shape<D>;
    const tqkvc_prefill &p;
    const block_range &b;
    uint32_t g, lane;
    int32_t page = 0; /* of the next tile, read one ahead */
    uint32_t tier = 0;

    __device__ __forceinline__ void look(uint32_t tile)
    {
        const tqkv_cuda_pages &pages = p.args.pages;
        const uint32_t token = tile * shape::TOKENS + lane * TQKVC_BLOCK_TOKENS;
        if (tile >= b.end_tile)
            return;
        if (lane < shape::BLOCKS && token < b.context)
            page = __ldg(pages.block_table + (size_t)b.seq * pages.table_stride +
                         token / pages.page_tokens);
        tier = pages.tiers ? __ldg(pages.tiers + (size_t)b.seq * pages.tiers_stride +
                                   tile * shape::TOKENS / TQKV_CUDA_TILE_TOKENS)
                           : p.frames.shape.n_tiers - 1;
    }

    /* Copies the tile that was looked for, if there is one. */
    __device__ __forceinline__ void copy(uint32_t tile, uint8_t *codes, tqkvc_prefill_memory<D> &shared)
    {
        if (tile >= b.end_tile)
            return;
        const tqkvc_layout &layout = reinterpret_cast<const tqkvc_layout *>(
            p.frames.image + p.frames.shape.parts.layouts)[tier * p.frames.shape.n_kv_heads + g];
        const uint32_t n_bytes = layout.bytes[0] + layout.bytes[1],
                       first = tile * shape::BLOCKS, in_page = p.args.pages.page_tokens / TQKVC_BLOCK_TOKENS;
        const uint8_t *source = static_cast<const uint8_t *>(p.args.pages.pool[tier]) +
                                (size_t)page * p.page_bytes[tier] +
                                (size_t)((first + lane) % in_page) * p.frames.shape.block_bytes[tier] +
                                layout.offset;
        if (lane == 0)
            shared.tier = tier;
        ring_copy(&shared.barrier, codes + lane * n_bytes, source, n_bytes,
                  min((b.context + TQKVC_BLOCK_TOKENS - 1) / TQKVC_BLOCK_TOKENS - first,
                      (uint32_t)shape::BLOCKS),
                  lane);
        look(tile + 1);
    }
};

/* Tables, places and limits of rows. */
template <int D>
__device__ void set_up(const tqkvc_prefill &p, const block_range &b, uint32_t n_queries, uint32_t g,
                       tqkvc_prefill_memory<D> &shared)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t group = p.frames.shape.n_heads / p.frames.shape.n_kv_heads;
    const tqkvc_width *widths = reinterpret_cast<const tqkvc_tables *>(p.frames.image)->widths;

    if (threadIdx.x < 32) {
        if (threadIdx.x == 0)
            ring_barrier_init(&shared.barrier);
        __syncwarp();
    }
    for (uint32_t i = threadIdx.x; i < TQKVC_WIDTHS * (TQKVC_WORDS + 1); i += THREADS)
        shared.tables[0][i] = __ldg(widths[i / (TQKVC_WORDS + 1)].words + i % (TQKVC_WORDS + 1));
    for (uint32_t i = threadIdx.x; i < shape::ROWS; i += THREADS) {
        const uint32_t row = b.first_row + min(i, b.n_rows - 1);
        shared.places[i] =
            (b.q_start + row / group) * p.frames.shape.n_heads + g * group + row % group;
        shared.limits[i] = min(find_limit(p, b, n_queries, row), b.context);
        shared.means[i] = 0;
    }
    for (uint32_t i = threadIdx.x; i < TQKVC_PREFILL_WARPS * shape::UNITS; i += THREADS)
        shared.v_steps[0][i] = 1.0f;
    __syncthreads();
}

/* Sums go on with the steps of another tier. */
template <int D>
__device__ void change_steps(const tqkvc_prefill_task<D> &t, uint64_t widths, tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    float *steps = t.shared.v_steps[t.warp];

#pragma unroll
    for (int u = 0; u < shape::UNITS; u++) {
        const uint32_t bits = unit_width(widths, u);
        const float old = steps[u], now = bits == 0 ? old : t.tables.step((int)bits),
                    factor = __fdividef(old, now);
        __syncwarp();
        if (t.lane == 0)
            steps[u] = now;
#pragma unroll
        for (int i = 0; i < 8 * shape::M; i++)
            rows.sums[i / 8][2 * u + i / 4 % 2][i % 4] *= factor;
    }
    __syncwarp();
}

/* Queries for another frame or tier; tops go on from there. Returns the factor of products. */
template <int D>
__device__ float change_frame(const tqkvc_prefill_task<D> &t, uint32_t base, uint64_t widths, float size,
                              tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;

#pragma unroll
    for (int i = 0; i < 2 * shape::M; i++)
        rows.top[i / 2][i % 2] += t.shared.means[t.row(8 * i + t.lane / 4)];
    __syncwarp();
    const float factor = make_prefill_queries(t, base, widths, size);
#pragma unroll
    for (int i = 0; i < 2 * shape::M; i++)
        rows.top[i / 2][i % 2] -= t.shared.means[t.row(8 * i + t.lane / 4)];
    return factor;
}

template <int D>
__device__ void run_tiles(const tqkvc_prefill &p, const block_range &b, const tqkvc_prefill_task<D> &t,
                          uint8_t *staged, tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    tile_source<D> source = {p, b, t.g, t.lane};
    tqkvc_tile_codes codes = {.first = staged};
    uint32_t tier = NONE, frame = NONE;
    float factor = 0;

    if (t.warp == 0) {
        source.look(b.first_tile);
        source.copy(b.first_tile, staged, t.shared);
    }
    const float size = measure_rows(t);
#pragma unroll 1
    for (uint32_t tile = b.first_tile; tile < b.end_tile; tile++) {
        const uint32_t first = tile * shape::TOKENS, this_frame = first / p.frames.frame_tokens;
        ring_wait(&t.shared.barrier, (tile - b.first_tile) & 1u);
        __syncthreads(); /* keys and values are free */
        if (t.shared.tier != tier || this_frame != frame) {
            const tqkvc_layout &layout = reinterpret_cast<const tqkvc_layout *>(
                p.frames.image +
                p.frames.shape.parts.layouts)[t.shared.tier * p.frames.shape.n_kv_heads + t.g];
            for (int side = 0; side < 2; side++) {
                codes.bytes[side] = layout.bytes[side];
                codes.widths[side] = layout.widths[side];
            }
            factor = change_frame(t, this_frame * p.frames.frame_tokens, codes.widths[0], size, rows);
            if (t.shared.tier != tier)
                change_steps(t, codes.widths[1], rows);
            tier = t.shared.tier;
            frame = this_frame;
            __syncthreads();
        }
        const bool zeros = __syncthreads_or(expand_tile(codes, t.tables, t.warp, t.lane, t.shared));
        if (t.warp == 0)
            source.copy(tile + 1, staged, t.shared);
        tqkvc_scores<D> s;
        score_tile(t.shared, t.warp, t.lane, s);
        if (zeros || first + shape::TOKENS > b.all_see) {
            scale_scores<D, true>(t.shared, factor, first, t.warp, t.lane, s);
            weigh_scores<D, true>(t.shared, t.lane, rows, s);
        } else {
            scale_scores<D, false>(t.shared, factor, first, t.warp, t.lane, s);
            weigh_scores<D, false>(t.shared, t.lane, rows, s);
        }
        add_values(t.shared, t.lane, s, rows);
    }
}

template <int D>
__global__ void __launch_bounds__(THREADS, 2) prefill_kernel(const __grid_constant__ tqkvc_prefill p)
{
    using shape = tqkvc_prefill_shape<D>;
    extern __shared__ __align__(1024) uint8_t dynamic[];
    tqkvc_prefill_memory<D> &shared = *reinterpret_cast<tqkvc_prefill_memory<D> *>(dynamic);
    uint8_t *staged = dynamic + sizeof(tqkvc_prefill_memory<D>);
    block_range b;
    uint32_t n_queries;

    if (!find_range<D>(p, b, n_queries))
        return;
    const tqkvc_prefill_task<D> t = {
        p.frames, shared, {shared_address(shared.tables)}, blockIdx.y, threadIdx.x / 32, threadIdx.x % 32,
        p.scale_log2};
    set_up(p, b, n_queries, t.g, shared);

    tqkvc_prefill_rows<D> rows;
#pragma unroll
    for (int m = 0; m < shape::M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            rows.top[m][h] = TQKVC_LOWEST_TOP;
            rows.sum[m][h] = rows.zero[m][h] = 0;
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            rows.sums[m][i / 4][i % 4] = 0;
    }
    run_tiles(p, b, t, staged, rows);
    __syncthreads();

    tqkvc_prefill_output to = {p.args.out, p.args.lse, p.args.type, 0, b.n_rows};
    if (p.n_splits > 1) {
        const size_t first =
            (size_t)(blockIdx.x / (gridDim.x / p.n_splits)) * p.args.n_tokens * p.frames.shape.n_heads;
        to = {p.parts + first * D, p.part_lse + first, TQKV_CUDA_F32,
              (uint32_t)p.args.q_starts[0] * p.frames.shape.n_heads, b.n_rows};
    }
    finish_rows(t, to, rows);
}

/* Parts of all rows to the output; one warp a row. */
template <int D> __global__ void merge_parts(const __grid_constant__ tqkvc_prefill p)
{
    const uint32_t n_heads = p.frames.shape.n_heads, lane = threadIdx.x % 32,
                   first = (uint32_t)p.args.q_starts[0] * n_heads,
                   n_rows = (uint32_t)p.args.q_starts[p.args.n_seqs] * n_heads - first,
                   row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const size_t stride = (size_t)p.args.n_tokens * n_heads;
    float top = -INFINITY, total = 0, out[D / 32] = {};

    if (row >= n_rows || row >= stride)
        return;
    for (uint32_t s = 0; s < p.n_splits; s++)
        top = fmaxf(top, p.part_lse[s * stride + row]);
    for (uint32_t s = 0; s < p.n_splits && top > -INFINITY; s++) {
        const float share = __expf(p.part_lse[s * stride + row] - top);
        total += share;
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            out[i] = fmaf(share, p.parts[(s * stride + row) * D + 32 * i + lane], out[i]);
    }
    const float factor = total > 0 ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; i++)
        store_value(p.args.out, (size_t)(first + row) * D + 32 * i + lane, p.args.type, out[i] * factor);
    if (lane == 0 && p.args.lse)
        p.args.lse[first + row] = total > 0 ? top + __logf(total) : -INFINITY;
}

template <int D> tqkv_status launch(const tqkvc_prefill &p, cudaStream_t stream)
{
    constexpr uint32_t MERGE_ROWS = 8;
    const uint32_t group = p.frames.shape.n_heads / p.frames.shape.n_kv_heads;
    const uint32_t n_row_tiles =
        (p.args.max_q * group + tqkvc_prefill_shape<D>::ROWS - 1) / tqkvc_prefill_shape<D>::ROWS;
    const size_t bytes = sizeof(tqkvc_prefill_memory<D>) + p.staged_bytes;

    if (cudaFuncSetAttribute(prefill_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) !=
        cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    prefill_kernel<D><<<dim3(n_row_tiles * p.n_splits, p.frames.shape.n_kv_heads, p.args.n_seqs), THREADS,
                        bytes, stream>>>(p);
    if (p.n_splits > 1)
        merge_parts<D><<<(p.args.n_tokens * p.frames.shape.n_heads + MERGE_ROWS - 1) / MERGE_ROWS,
                         32 * MERGE_ROWS, 0, stream>>>(p);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}

} // namespace

extern "C" uint32_t tqkvc_prefill_rows_of_block(uint32_t dim)
{
    return dim == 64    ? tqkvc_prefill_shape<64>::ROWS
           : dim == 128 ? tqkvc_prefill_shape<128>::ROWS
                        : tqkvc_prefill_shape<256>::ROWS;
}

extern "C" uint32_t tqkvc_prefill_blocks_of_tile(uint32_t dim)
{
    return dim == 256 ? tqkvc_prefill_shape<256>::BLOCKS : tqkvc_prefill_shape<128>::BLOCKS;
}

extern "C" tqkv_status tqkvc_launch_prefill(const tqkvc_prefill *prefill, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    return prefill->frames.shape.dim == 64    ? launch<64>(*prefill, s)
           : prefill->frames.shape.dim == 128 ? launch<128>(*prefill, s)
                                              : launch<256>(*prefill, s);
}
