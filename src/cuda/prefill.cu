/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prefill: attention of chunks of new tokens of several sequences over what is stored of them.
 *
 *     block       KV head x 128 query rows (64 of heads of 256 channels) x part of the tokens of one sequence
 *     expanders   four warps, or eight: codes of a tile of 64 tokens (32) become levels in shared memory, for all rows
 *     readers     four warps for 64 rows: scores, probabilities, sums; queries of each frame; at the end the inverse
 *                 of the transform, mean, output
 *
 * Codes come by bulk copies, up to four tiles ahead; levels of a tile are made while those of the one before are read. Where
 * blocks are too few for the device, the tokens are split too: parts go to the workspace, finished, and a second kernel
 * merges them. docs/GPU.md has times.
 */
#include "cuda/copies.cuh"
#include "cuda/prefill_queries.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define TQKVC_IS_90 1
#else
#define TQKVC_IS_90 0
#endif

namespace
{

/* EXPANDERS: fours of warps. Two are faster where a warpgroup can leave registers to others, on sm_90a. */
template <int D, int EXPANDERS>
constexpr uint32_t THREADS = 128 * (EXPANDERS + tqkvc_prefill_shape<D>::READERS);

constexpr uint32_t NONE = 0xffffffffu;

/* Rows and tokens of a block. */
struct block_range {
    uint32_t seq, q_start, n_rows, first_row, context;
    uint32_t all_see, some_see; /* tokens that every row sees; that any row does */
    uint32_t first_tile, end_tile;
    uint32_t n_readers; /* fours of warps that have rows */
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

/* False if there are no rows. n_queries: of the sequence. */
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
    b.n_readers = (b.n_rows + 63) / 64;
    b.context = min((uint32_t)max(p.args.context_lens[b.seq], 0), p.args.max_context);
    b.all_see = find_limit(p, b, n_queries, b.first_row);
    b.some_see = find_limit(p, b, n_queries, b.first_row + b.n_rows - 1);
    const uint32_t n_tiles = (b.context + shape::TOKENS - 1) / shape::TOKENS,
                   each = (n_tiles + p.n_splits - 1) / p.n_splits;
    b.first_tile = split * each;
    b.end_tile = min(min(b.first_tile + each, n_tiles), (b.some_see + shape::TOKENS - 1) / shape::TOKENS);
    return true;
}

/* Tiles of codes on their way, by the first warp. A lane below the blocks of a tile has one of them. */
template <int D> struct tile_source {
    using shape = tqkvc_prefill_shape<D>;
    const tqkvc_prefill &p;
    const block_range &b;
    tqkvc_prefill_memory<D> &shared;
    uint8_t *codes; /* of the tiles that are there */
    uint32_t g, lane;
    int32_t page = 0; /* of the next tile, read one ahead */
    uint32_t tier = 0, entry = 0, in_page = 0; /* of this lane's block: in the block table, in its page */

    __device__ __forceinline__ void start(uint32_t tile)
    {
        const uint32_t block = tile * shape::BLOCKS + lane, n = p.args.pages.page_tokens / TQKVC_BLOCK_TOKENS;

        entry = block / n;
        in_page = block % n;
        look(tile);
    }

    __device__ __forceinline__ void look(uint32_t tile)
    {
        const tqkv_cuda_pages &pages = p.args.pages;
        if (tile >= b.end_tile)
            return;
        if (lane < shape::BLOCKS && tile * shape::TOKENS + lane * TQKVC_BLOCK_TOKENS < b.context)
            page = __ldg(pages.block_table + (size_t)b.seq * pages.table_stride + entry);
        tier = tier_of(p, b, tile * shape::TOKENS);
    }

    __device__ __forceinline__ void step()
    {
        const uint32_t n = p.args.pages.page_tokens / TQKVC_BLOCK_TOKENS;

        if (n < shape::BLOCKS) { /* pages of one block or two */
            entry += shape::BLOCKS >> (n - 1);
            return;
        }
        in_page += shape::BLOCKS;
        entry += in_page >= n;
        in_page -= in_page >= n ? n : 0;
    }

    static __device__ __forceinline__ uint32_t tier_of(const tqkvc_prefill &p, const block_range &b, uint32_t token)
    {
        const tqkv_cuda_pages &pages = p.args.pages;
        return pages.tiers ? __ldg(pages.tiers + (size_t)b.seq * pages.tiers_stride + token / TQKV_CUDA_TILE_TOKENS)
                           : p.frames.shape.n_tiers - 1;
    }

    static __device__ __forceinline__ const tqkvc_layout &layout_of(const tqkvc_prefill &p, uint32_t tier, uint32_t g)
    {
        return reinterpret_cast<const tqkvc_layout *>(
            p.frames.image + p.frames.shape.parts.layouts)[tier * p.frames.shape.n_kv_heads + g];
    }

    /* Copies the tile that was looked for, if there is one. */
    __device__ __forceinline__ void copy(uint32_t tile)
    {
        if (tile >= b.end_tile)
            return;
        const tqkvc_layout &layout = layout_of(p, tier, g);
        const uint32_t n_bytes = layout.bytes[0] + layout.bytes[1], first = tile * shape::BLOCKS,
                       place = (tile - b.first_tile) % (1u << p.staged_log);
        const uint8_t *source = static_cast<const uint8_t *>(p.args.pages.pool[tier]) +
                                (size_t)page * p.page_bytes[tier] +
                                (size_t)in_page * p.frames.shape.block_bytes[tier] + layout.offset;
        ring_copy(&shared.staged[place], codes + place * p.staged_bytes + lane * n_bytes, source, n_bytes,
                  min((b.context + TQKVC_BLOCK_TOKENS - 1) / TQKVC_BLOCK_TOKENS - first, (uint32_t)shape::BLOCKS),
                  lane);
        step();
        look(tile + 1);
    }
};

/* Memory of a block behind the fixed part. */
template <int D> struct block_memory {
    tqkvc_prefill_memory<D> &shared;
    tqkvc_prefill_stage<D> *stages;
    uint8_t *low, *matrix, *codes; /* low parts of rows and the matrix of K, or NULL */
};

template <int D> __device__ block_memory<D> find_memory(const tqkvc_prefill &p, uint8_t *base)
{
    using shape = tqkvc_prefill_shape<D>;
    uint8_t *stages = base + sizeof(tqkvc_prefill_memory<D>),
            *low = stages + p.n_stages * sizeof(tqkvc_prefill_stage<D>),
            *matrix = low + (p.has_low ? shape::ROWS * D * 2 : 0);

    return {*reinterpret_cast<tqkvc_prefill_memory<D> *>(base), reinterpret_cast<tqkvc_prefill_stage<D> *>(stages),
            p.has_low ? low : NULL, p.has_matrix ? matrix : NULL, matrix + (p.has_matrix ? D * D * 4 : 0)};
}

/* Barriers, at which all threads arrive (one of a warp would do, but racecheck does not see that), tables, places and
 * limits of rows. */
template <int D, int EXPANDERS>
__device__ void set_up(const tqkvc_prefill &p, const block_range &b, uint32_t n_queries, uint32_t g,
                       const block_memory<D> &memory)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t group = p.frames.shape.n_heads / p.frames.shape.n_kv_heads;
    const tqkvc_width *widths = reinterpret_cast<const tqkvc_tables *>(p.frames.image)->widths;
    tqkvc_prefill_memory<D> &shared = memory.shared;

    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 1u << p.staged_log; i++) {
            ring_barrier_init(&shared.staged[i]);
            init_barrier(&shared.drained[i], 128 * EXPANDERS);
        }
        for (uint32_t i = 0; i < p.n_stages; i++) {
            init_barrier(&memory.stages[i].full, 128 * EXPANDERS);
            init_barrier(&memory.stages[i].empty, 128 * b.n_readers);
        }
    }
    for (uint32_t i = threadIdx.x; i < TQKVC_WIDTHS * (TQKVC_WORDS + 1); i += blockDim.x)
        shared.tables[0][i] = __ldg(widths[i / (TQKVC_WORDS + 1)].words + i % (TQKVC_WORDS + 1));
    for (uint32_t i = threadIdx.x; i < shape::ROWS; i += blockDim.x) {
        const uint32_t row = b.first_row + min(i, b.n_rows - 1);
        shared.places[i] = (b.q_start + row / group) * p.frames.shape.n_heads + g * group + row % group;
        shared.limits[i] = min(find_limit(p, b, n_queries, row), b.context);
        shared.means[i] = 0;
    }
    for (uint32_t i = threadIdx.x; i < 4 * shape::READERS * shape::UNITS; i += blockDim.x)
        shared.v_steps[0][i] = 1.0f;
    __syncthreads();
}

/* Codes to levels, tile by tile, by the first warps. */
template <int D, int EXPANDERS>
__device__ void expand_tiles(const tqkvc_prefill &p, const block_range &b, uint32_t g, uint32_t warp,
                             const block_memory<D> &memory)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t lane = threadIdx.x % 32;
    const tqkvc_rows tables = {shared_address(memory.shared.tables)};
    tile_source<D> source = {p, b, memory.shared, memory.codes, g, lane};
    tqkvc_tile_codes codes;
    const uint32_t lag = p.staged_log > 0 ? 1 : 0;
    uint32_t tier = NONE, next = NONE; /* next: tier of the next tile */

    if (b.first_tile < b.end_tile)
        next = tile_source<D>::tier_of(p, b, b.first_tile * shape::TOKENS);
    if (warp == 0) {
        source.start(b.first_tile);
        for (uint32_t i = 0; i < 1u << p.staged_log; i++)
            source.copy(b.first_tile + i);
    }
#pragma unroll 1
    for (uint32_t i = 0; b.first_tile + i < b.end_tile; i++) {
        const uint32_t tile = b.first_tile + i, place = i % (1u << p.staged_log), now = next;
        tqkvc_prefill_stage<D> &stage = memory.stages[i & (p.n_stages - 1)];
        if (tile + 1 < b.end_tile)
            next = tile_source<D>::tier_of(p, b, (tile + 1) * shape::TOKENS);
        if (now != tier) {
            const tqkvc_layout &layout = tile_source<D>::layout_of(p, now, g);
            for (int side = 0; side < 2; side++) {
                codes.bytes[side] = layout.bytes[side];
                codes.widths[side] = layout.widths[side];
            }
            tier = now;
        }
        codes.first = memory.codes + place * p.staged_bytes;
        ring_wait(&memory.shared.staged[place], i >> p.staged_log & 1u);
        if (i >= p.n_stages)
            ring_wait(&stage.empty, ((i >> (p.n_stages - 1)) - 1) & 1u);
        expand_tile(codes, tables, 4 * EXPANDERS, warp, lane, stage);
        if (threadIdx.x == 0)
            stage.tier = tier;
        publish_operands();
        arrive_at(&stage.full);
        arrive_at(&memory.shared.drained[place]);
        if (warp == 0 && i >= lag) { /* into the place of the tile before, which all have read by now */
            const uint32_t free = i - lag;
            ring_wait(&memory.shared.drained[free % (1u << p.staged_log)], free >> p.staged_log & 1u);
            source.copy(b.first_tile + free + (1u << p.staged_log));
        }
    }
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
        for (int i = 0; i < 8; i++)
            rows.sums[2 * u + i / 4][i % 4] *= factor;
    }
    __syncwarp();
}

/* Queries for another frame or tier; tops go on from there. By the four warps of the rows. */
template <int D>
__device__ void change_frame(const tqkvc_prefill_task<D> &t, uint32_t base, uint64_t widths, tqkvc_prefill_rows<D> &rows)
{
#pragma unroll
    for (int h = 0; h < 2; h++)
        rows.top[h] += t.shared.means[t.row(8 * h + t.lane / 4)];
    sync_warps(2 + t.warp / 4, 4);
    make_prefill_queries(t, base, widths);
    publish_operands();
    sync_warps(2 + t.warp / 4, 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows.top[h] -= t.shared.means[t.row(8 * h + t.lane / 4)];
        rows.factor[h] = t.shared.factors[t.row(8 * h + t.lane / 4)];
    }
}

/* The matrix of a side on its way to shared memory, by all readers. */
template <int D>
__device__ void fetch_matrix(const tqkvc_prefill_task<D> &t, uint32_t n_readers, const block_memory<D> &memory, int side)
{
    const uint4 *from = t.matrix(side);

    for (uint32_t i = 32 * t.warp + t.lane; memory.matrix && i < D * D / 4; i += 128 * n_readers)
        copy_16(memory.matrix + 16 * i, from + i);
    copy_commit();
}

template <int D>
__device__ void read_tiles(const tqkvc_prefill &p, const block_range &b, const tqkvc_prefill_task<D> &t,
                           const block_memory<D> &memory, tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    uint32_t tier = NONE, frame = NONE;

    if (b.first_tile < b.end_tile) {
        fetch_matrix(t, b.n_readers, memory, 0);
        measure_rows(t);
        copy_wait<0>();
        sync_warps(4, 4 * b.n_readers);
    }
#pragma unroll 1
    for (uint32_t i = 0; b.first_tile + i < b.end_tile; i++) {
        tqkvc_prefill_stage<D> &stage = memory.stages[i & (p.n_stages - 1)];
        const uint32_t first = (b.first_tile + i) * shape::TOKENS, this_frame = first / p.frames.frame_tokens;
        ring_wait(&stage.full, i >> (p.n_stages - 1) & 1u);
        if (stage.tier != tier || this_frame != frame) {
            const tqkvc_layout &layout = tile_source<D>::layout_of(p, stage.tier, t.g);
            change_frame(t, this_frame * p.frames.frame_tokens, layout.widths[0], rows);
            if (stage.tier != tier)
                change_steps(t, layout.widths[1], rows);
            tier = stage.tier;
            frame = this_frame;
        }
        read_tile(t.shared, stage, first, b.all_see, t.row(0), t.lane, rows);
        arrive_at(&stage.empty);
    }
}

/* 64 rows of a block by four warps: tiles, then the output. warp: of all readers. */
template <int D>
__device__ void read_rows(const tqkvc_prefill &p, const block_range &b, uint32_t g, uint32_t warp,
                          const block_memory<D> &memory)
{
    const uint4 *matrix = reinterpret_cast<const uint4 *>(memory.matrix);
    tqkvc_prefill_task<D> t = {p.frames, memory.shared, memory.low, {matrix, matrix},
                               {shared_address(memory.shared.tables)}, g, warp, threadIdx.x % 32, p.scale_log2};
    tqkvc_prefill_rows<D> rows;

    for (int side = 0; side < 2 && !memory.matrix; side++)
        t.matrices[side] = t.matrix(side);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows.top[h] = TQKVC_LOWEST_TOP;
        rows.sum[h] = rows.zero[h] = rows.factor[h] = 0;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++)
        rows.sums[i / 4][i % 4] = 0;
    read_tiles(p, b, t, memory, rows);
    sync_warps(4, 4 * b.n_readers); /* the matrix of K was read */
    fetch_matrix(t, b.n_readers, memory, 1);
    copy_wait<0>();
    sync_warps(4, 4 * b.n_readers);

    tqkvc_prefill_output to = {p.args.out, p.args.lse, p.args.type, 0, b.n_rows};
    if (p.n_splits > 1) {
        const size_t first =
            (size_t)(blockIdx.x / (gridDim.x / p.n_splits)) * p.args.n_tokens * p.frames.shape.n_heads;
        to = {p.parts + first * D, p.part_lse + first, TQKV_CUDA_F32,
              (uint32_t)p.args.q_starts[0] * p.frames.shape.n_heads, b.n_rows};
    }
    finish_rows(t, to, rows);
}

/* Registers of expanders and readers where there are two fours of expanders: they add up to what all had. */
template <int D> struct registers {
    static constexpr int OF_EXPANDERS = D < 256 ? 88 : 128, OF_READERS = D < 256 ? 168 : 240;
    static_assert(256 * OF_EXPANDERS + 128 * tqkvc_prefill_shape<D>::READERS * OF_READERS <= 65536, "of a multiprocessor");
};

template <int D, int EXPANDERS>
__global__ void __launch_bounds__(THREADS<D, EXPANDERS>, 1) prefill_kernel(const __grid_constant__ tqkvc_prefill p)
{
    if constexpr (EXPANDERS == 1 || TQKVC_IS_90) {
        extern __shared__ __align__(1024) uint8_t dynamic[];
        const block_memory<D> memory = find_memory<D>(p, dynamic);
        const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), g = blockIdx.y;
        block_range b;
        uint32_t n_queries;

        if (!find_range<D>(p, b, n_queries))
            return;
        set_up<D, EXPANDERS>(p, b, n_queries, g, memory);
        if (warp < 4 * EXPANDERS) {
            if constexpr (EXPANDERS == 2)
                change_registers<registers<D>::OF_EXPANDERS, false>();
            expand_tiles<D, EXPANDERS>(p, b, g, warp, memory);
        } else {
            if constexpr (EXPANDERS == 2)
                change_registers<registers<D>::OF_READERS, true>();
            if (warp < 4 * (EXPANDERS + b.n_readers))
                read_rows(p, b, g, warp - 4 * EXPANDERS, memory);
        }
    }
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

/* With as much of what helps as shared memory takes. 0: there is too little for anything. */
template <int D> size_t choose_memory(tqkvc_prefill &p, size_t most)
{
    static constexpr struct {
        bool has_low, has_matrix;
        uint32_t n_stages, staged_log;
    } CHOICES[] = {{true, true, 2, 2},  {true, true, 2, 1},  {true, false, 2, 2}, {true, false, 2, 1},
                   {true, false, 1, 0}, {false, false, 2, 1}, {false, false, 1, 0}};

    for (const auto &choice : CHOICES) {
        p.has_low = choice.has_low;
        p.has_matrix = choice.has_matrix;
        p.n_stages = choice.n_stages;
        p.staged_log = choice.staged_log;
        const size_t bytes = sizeof(tqkvc_prefill_memory<D>) + p.n_stages * sizeof(tqkvc_prefill_stage<D>) +
                             (p.has_low ? tqkvc_prefill_shape<D>::ROWS * D * 2 : 0) + (p.has_matrix ? D * D * 4 : 0) +
                             ((size_t)p.staged_bytes << p.staged_log);
        if (bytes <= most)
            return bytes;
    }
    return 0;
}

/* Whether the kernel with two fours of expanders is there. */
template <int D> bool has_many_expanders()
{
    cudaFuncAttributes attributes;

    if (cudaFuncGetAttributes(&attributes, prefill_kernel<D, 2>) == cudaSuccess)
        return attributes.ptxVersion == 90;
    (void)cudaGetLastError();
    return false;
}

template <int D> tqkv_status launch(tqkvc_prefill p, cudaStream_t stream)
{
    constexpr uint32_t MERGE_ROWS = 8;
    const uint32_t group = p.frames.shape.n_heads / p.frames.shape.n_kv_heads;
    const uint32_t n_row_tiles =
        (p.args.max_q * group + tqkvc_prefill_shape<D>::ROWS - 1) / tqkvc_prefill_shape<D>::ROWS;
    const size_t bytes = choose_memory<D>(p, p.shared_bytes_max);

    const bool many = has_many_expanders<D>();
    const auto kernel = many ? prefill_kernel<D, 2> : prefill_kernel<D, 1>;
    const uint32_t n_threads = many ? THREADS<D, 2> : THREADS<D, 1>;

    if (bytes == 0 || cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) !=
                          cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    kernel<<<dim3(n_row_tiles * p.n_splits, p.frames.shape.n_kv_heads, p.args.n_seqs), n_threads, bytes, stream>>>(p);
    if (p.n_splits > 1)
        merge_parts<D><<<(p.args.n_tokens * p.frames.shape.n_heads + MERGE_ROWS - 1) / MERGE_ROWS,
                         32 * MERGE_ROWS, 0, stream>>>(p);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}

} // namespace

extern "C" uint32_t tqkvc_prefill_rows_of_block(uint32_t dim)
{
    return dim == 256 ? tqkvc_prefill_shape<256>::ROWS : tqkvc_prefill_shape<128>::ROWS;
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
