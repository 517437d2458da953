/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode: attention of a few query rows over the pages of a sequence.
 *
 *     block    KV head x up to R query rows x part of the tokens ("split") of one sequence
 *     warp     a run of tiles of 64 tokens of it, with memory for one tile of its own; no barrier inside
 *     merge    the warps of a block in shared memory, then the splits (decode_merge.cuh)
 *     finish   sums of V times the inverse of the transform on tensor cores, mean, output
 *
 * Where sequences are few, the splits of one KV head are a cluster: blocks that write to each other's
 * shared memory. Each merges a slice of the sums and finishes some of the channels. Elsewhere the last of
 * the splits merges what the others left in the workspace, and finishes all.
 *
 * A block begins with the queries of its frames (frames.cuh), while its first tiles are on their way. After a
 * store the queries come first, beside the store: until griddepcontrol.wait a block reads what was there before the store
 * (lengths, tables, q, image) and writes its products only, of which no store knows; codes follow the wait. The decode
 * that had these products before ended before the store began, as that is launched without the attribute.
 * Every byte of K and V is read once for up to R rows, by bulk copies of sections (1040 bytes at 4 bits
 * and 128 channels). While a warp works on V of a tile, K of its next tile is on its way, and the
 * reverse: 16 warps of 8 KB fill a multiprocessor of sm_90, and hide each other's latency.
 * docs/GPU.md has what other ways took.
 */
#include "cuda/cluster.cuh"
#include "cuda/columns.cuh"
#include "cuda/decode_merge.cuh"
#include "cuda/decode_tile.cuh"
#include "cuda/frames.cuh"
#include "cuda/ring.cuh"

namespace
{

/* A warp and where it is. */
template <int D, int R> struct worker {
    const tqkvc_decode &p;
    const task &t;
    block_memory<D, R> &shared;
    tqkvc_warp_memory<D, R> &memory;
    uint8_t *tile; /* sections of K, then of V */
    uint64_t *barriers;
    tqkvc_rows tables;
    uint32_t lane;
    uint32_t phase = 0;   /* of both barriers */
    uint32_t all_see = 0; /* tokens that every row sees */
    tqkvc_row_state<R> rows;

    /* NULL where blocks are not a cluster. */
    __device__ __forceinline__ cluster_memory<D, R> *cluster() const
    {
        return find_cluster<D, R>(p, shared);
    }
};

template <int D, int R> __device__ void start_rows(worker<D, R> &w)
{
    const uint32_t group = w.p.frames.shape.n_heads / w.p.frames.shape.n_kv_heads;

    for (int h = 0; h < R / 4; h++) {
        const uint32_t row = w.t.row_tile * R + w.lane % 4 * (R / 4) + h;
        const int limit = (int)w.t.length - (int)w.p.frames.q_len + (int)(row / group) + 1;
        w.rows.limit[h] =
            row < w.p.frames.n_rows ? max(limit, 0) : w.t.length; /* others are not written */
        w.rows.top[h] = TQKVC_LOWEST;
        w.rows.sum[h] = w.rows.nonzero[h] = 0;
    }
    uint32_t least = w.rows.limit[0];
    for (int h = 1; h < R / 4; h++)
        least = min(least, w.rows.limit[h]);
    w.all_see = __reduce_min_sync(ALL, least);
    for (uint32_t i = w.lane; i < D * R; i += 32)
        (&w.memory.sums[0][0][0])[i] = 0;
}

template <int D, int R>
__device__ __forceinline__ const tqkvc_layout &layout_of(const worker<D, R> &w, uint32_t tier)
{
    const tqkvc_shape &shape = w.p.frames.shape;
    return reinterpret_cast<const tqkvc_layout *>(
        w.p.frames.image + shape.parts.layouts)[tier * shape.n_kv_heads + w.t.g];
}

/* ROWS rows of a frame, from `first` on, as whole numbers for a tier. One warp. */
template <int D, int R, int ROWS>
__device__ __forceinline__ void make_rows(const worker<D, R> &w, uint32_t frame, uint32_t first,
                                          uint32_t tier, tqkvc_queries<D, R> &out)
{
    const float *values =
        w.shared.products.values + ((frame - w.shared.first_frame) * R + first) * D;
    tqkvc_query_steps<D> steps;
    float4 product[ROWS][steps.N];

    steps.load(w.tables, layout_of(w, tier).widths[0], w.lane);
#pragma unroll
    for (int i = 0; i < ROWS * steps.N; i++)
        product[i / steps.N][i % steps.N] = reinterpret_cast<const float4 *>(
            values + i / steps.N * D + steps.unit(i % steps.N, w.lane) * 16)[w.lane % 4];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        make_query<D, R>(product[i], steps, first + i, w.lane, out);
}

/* The queries of a frame for a tier, unless the block has made them. */
template <int D, int R> __device__ void load_queries(worker<D, R> &w, uint32_t frame, uint32_t tier)
{
    const float *means = w.shared.products.means + (frame - w.shared.first_frame) * R;

    __syncwarp();
    if (!w.shared.shares_queries) {
#pragma unroll 1
        for (uint32_t first = 0; first < R; first += 4)
            make_rows<D, R, 4>(w, frame, first, tier, w.memory.queries);
        __syncwarp();
    }
    for (uint32_t h = 0; h < R / 4; h++) {
        const uint32_t r = w.lane % 4 * (R / 4) + h;
        const tqkvc_query_row row = w.memory.queries.rows[r];
        w.rows.q_factor[h] = row.factor * w.p.scale_log2;
        w.rows.q_mean[h] = means[r] * w.p.scale_log2;
        w.rows.q_start[h][0] = row.sums.x;
        w.rows.q_start[h][1] = row.sums.y;
    }
}

/* Tiles of one tier, of which one or a part of one is on its way into a warp's memory. */
template <int D, int R> struct segment {
    uint32_t tier, offset;     /* of the head's sections in a block */
    uint32_t block, end, each; /* blocks: next, last + 1, of a tile (1, 2 or 4) */
    uint32_t bytes[2];         /* of the sections of a block */
    uint32_t entry,
        in_page;  /* of this lane's block of the next tile: in the block table, in its page */
    int32_t page; /* read a tile ahead */
    const uint8_t *source; /* this lane's block of the tile whose V is still to be copied */

    __device__ __forceinline__ int32_t load_page(const worker<D, R> &w, uint32_t i) const
    {
        return __ldg(w.p.pages.block_table + (size_t)w.t.seq * w.p.pages.table_stride + i);
    }

    /* Tiles [first, end_tile); the first one is copied. */
    __device__ __forceinline__ void start(const worker<D, R> &w, uint32_t first, uint32_t end_tile,
                                          uint32_t in_tier)
    {
        const tqkvc_layout &layout = layout_of(w, in_tier);
        const uint32_t page_blocks = w.p.pages.page_tokens / TQKVC_BLOCK_TOKENS;

        tier = in_tier;
        each = w.p.tile_blocks[tier];
        block = first * TQKVC_TILE_BLOCKS;
        end = min(end_tile * TQKVC_TILE_BLOCKS,
                  (w.t.length + TQKVC_BLOCK_TOKENS - 1) / TQKVC_BLOCK_TOKENS);
        const uint32_t mine = block + (w.lane & (each - 1));
        entry = mine / page_blocks;
        in_page = mine % page_blocks;
        page = load_page(w, min(entry, (end - 1) / page_blocks));
        offset = layout.offset;
        bytes[0] = layout.bytes[0];
        bytes[1] = layout.bytes[1];
        copy(w, 0, 0);
        copy(w, 0, 1);
    }

    /* Copies one side of the tile `ahead` blocks on, if there is one; K first. */
    __device__ __forceinline__ void copy(const worker<D, R> &w, uint32_t ahead, int side)
    {
        const uint32_t at = block + ahead, page_blocks = w.p.pages.page_tokens / TQKVC_BLOCK_TOKENS;
        if (at >= end)
            return;
        if (side == 0) {
            source = static_cast<const uint8_t *>(w.p.pages.pool[tier]) +
                     (size_t)page * w.p.page_bytes[tier] +
                     (in_page * w.p.frames.shape.block_bytes[tier] + offset);
            if (page_blocks >= each) {
                in_page += each;
                entry += in_page >= page_blocks;
                in_page -= in_page >= page_blocks ? page_blocks : 0;
            } else {
                entry += each >> (page_blocks - 1); /* pages of one block or two */
            }
            if (at + each + (w.lane & (each - 1)) < end)
                page = load_page(w, entry);
        }
        ring_copy(&w.barriers[side], w.tile + side * each * bytes[0] + w.lane * bytes[side],
                  source + side * bytes[0], bytes[side], min(end - at, each), w.lane);
    }
};

/* What is left of a segment that was started. */
template <int D, int R> __device__ void run_segment(worker<D, R> &w, segment<D, R> &s)
{
    const uint32_t each = s.each, frame_blocks = w.p.frames.frame_tokens / TQKVC_BLOCK_TOKENS;
    const tqkvc_sections k = {w.tile, s.bytes[0], each - 1},
                         v = {w.tile + each * s.bytes[0], s.bytes[1], each - 1};
    uint32_t end_frame = 0;

    find_runs<D / 16>(layout_of(w, s.tier).widths[w.lane / 16], w.lane, w.memory.runs);
#pragma unroll 1
    for (; s.block < s.end; s.block += each) {
        const uint32_t token = s.block * TQKVC_BLOCK_TOKENS,
                       end_token = min(token + each * TQKVC_BLOCK_TOKENS, w.t.length);
        tqkvc_product<R> products[TQKVC_TILE_BLOCKS];
        tqkvc_probabilities<R> weights;
        uint32_t k_scales[TQKVC_TILE_BLOCKS / 2], v_scales[TQKVC_TILE_BLOCKS / 2];

        if (s.block >= end_frame) {
            load_queries(w, s.block / frame_blocks, s.tier);
            end_frame = (s.block / frame_blocks + 1) * frame_blocks;
        }
        ring_wait(&w.barriers[0], w.phase);
        k.load_scales(w.lane / 4, k_scales);
        score_tile<D, R>(k, w.memory, w.tables, w.rows, w.lane, products);
        __syncwarp();
        s.copy(w, each, 0);
        ring_wait(&w.barriers[1], w.phase);
        w.phase ^= 1u;
        v.load_scales(w.lane / 4, v_scales);
        weigh_tile<R>(products, k_scales, v_scales, token, end_token, w.all_see, w.lane, w.rows,
                      weights);
        add_values<D, R>(v, weights, w.tables, w.lane, w.memory);
        __syncwarp();
        s.copy(w, each, 1);
    }
}

/* First tile from `first` on that has another tier, and the tier before it. */
template <int D, int R>
__device__ uint32_t find_segment(const worker<D, R> &w, uint32_t first, uint32_t end,
                                 uint32_t *tier)
{
    const uint8_t *tiers = w.p.pages.tiers;
    if (!tiers) {
        *tier = w.p.frames.shape.n_tiers - 1;
        return end;
    }
    tiers += (size_t)w.t.seq * w.p.pages.tiers_stride;
    *tier = tiers[first];
    for (uint32_t i = first; i < end; i += 32) {
        const uint32_t other = __ballot_sync(ALL, i + w.lane < end && tiers[i + w.lane] != *tier);
        if (other)
            return i + __ffs(other) - 1;
    }
    return end;
}

/* Where the matrix of a side is. */
template <int D, int R>
__device__ __forceinline__ const uint8_t *matrix_of(const worker<D, R> &w, int side)
{
    return w.p.frames.image + w.p.frames.shape.parts.matrix[side] +
           (size_t)w.t.g * (D / 8) * UNIT_BYTES<D>;
}

/* The same with what was fetched. */
template <int D, int R>
__device__ __forceinline__ tqkvc_matrix<D> find_matrix(const worker<D, R> &w, int side)
{
    const uint4 *all = reinterpret_cast<const uint4 *>(matrix_of(w, side));

    if (!w.cluster())
        return {all, all, 0, NULL};
    return {all, reinterpret_cast<const uint4 *>(w.cluster()->matrix()), w.p.n_fetched,
            &w.cluster()->barriers[side]};
}

/* The first units of the matrix of K on their way to the memory of all blocks of the cluster, a share from each. */
template <int D, int R> __device__ void fetch_matrix(const worker<D, R> &w)
{
    const uint32_t n_bytes = w.p.n_fetched * UNIT_BYTES<D> / w.p.n_splits,
                   first = w.t.split * n_bytes;

    cluster_wait();
    if (threadIdx.x == 0 && n_bytes > 0)
        fetch(&w.cluster()->barriers[0], w.cluster()->matrix() + first, matrix_of(w, 0) + first,
              n_bytes, (uint16_t)((1u << w.p.n_splits) - 1));
}

/* The same of the inverse, where those were: units that this block finishes. By a warp that has least to do. */
template <int D, int R> __device__ void fetch_inverse(const worker<D, R> &w)
{
    const uint32_t n = w.p.n_splits, there = w.cluster()->count_units(w.t.split, n, w.p.n_fetched);

    if (threadIdx.x != THREADS - 1)
        return;
    for (uint32_t i = 0; i < there; i++)
        fetch(&w.cluster()->barriers[1], w.cluster()->matrix() + i * UNIT_BYTES<D>,
              matrix_of(w, 1) + (w.t.split + i * n) * UNIT_BYTES<D>, UNIT_BYTES<D>,
              (uint16_t)(1u << w.t.split));
}

/* Words of the tables that a thread copies to shared memory; they are used after the next barrier. */
struct table_words {
    static constexpr uint32_t N = TQKVC_WIDTHS * (TQKVC_WORDS + 1);
    uint32_t words[(N + THREADS - 1) / THREADS];

    __device__ __forceinline__ void load(const uint8_t *image)
    {
        const tqkvc_width *widths = reinterpret_cast<const tqkvc_tables *>(image)->widths;
#pragma unroll
        for (uint32_t k = 0; k < (N + THREADS - 1) / THREADS; k++) {
            const uint32_t i = min(threadIdx.x + k * THREADS, N - 1);
            words[k] = __ldg(widths[i / (TQKVC_WORDS + 1)].words + i % (TQKVC_WORDS + 1));
        }
    }

    __device__ __forceinline__ void store(uint32_t *to) const
    {
#pragma unroll
        for (uint32_t k = 0; k < (N + THREADS - 1) / THREADS; k++)
            if (threadIdx.x + k * THREADS < N)
                to[threadIdx.x + k * THREADS] = words[k];
    }
};

/* The frames that the tiles of the block are in. */
template <int D, int R> __device__ tqkvc_query_task find_frames(const worker<D, R> &w)
{
    const uint32_t frame_tiles = w.p.frames.frame_tokens / TQKV_CUDA_TILE_TOKENS,
                   first = w.t.tiles.first / frame_tiles;
    const bool none = w.t.tiles.end == w.t.tiles.first;

    return {.seq = w.t.seq,
            .g = w.t.g,
            .first_row = w.t.row_tile * R,
            .first_frame = first,
            .end_frame = none ? first : (w.t.tiles.end + frame_tiles - 1) / frame_tiles};
}

/* Where their products go. */
template <int D, int R>
__device__ tqkvc_products<D> place_products(const worker<D, R> &w, const tqkvc_query_task &task)
{
    const tqkvc_frames &f = w.p.frames;
    const size_t place = (w.t.seq * f.shape.n_kv_heads + w.t.g) * f.n_row_tiles + w.t.row_tile;
    const size_t row = (place * f.n_frames + task.first_frame) * R;

    if (w.cluster() && task.end_frame - task.first_frame <= 2)
        return {w.cluster()->products[0][0], w.cluster()->means[0]};
    return {f.products + row * D, f.means + row};
}

/* Queries of one frame and tier for all warps of the block, by all of them. */
template <int D, int R>
__device__ void share_queries(worker<D, R> &w, uint32_t frame, uint32_t tier)
{
    constexpr uint32_t EACH = R / TQKVC_WARPS, N = sizeof(w.memory.queries) / sizeof(uint4);
    tqkvc_queries<D, R> &made = w.shared.warps[0].queries;

    make_rows<D, R, EACH>(w, frame, threadIdx.x / 32 * EACH, tier, made);
    __syncthreads();
    for (uint32_t i = w.lane; i < N && threadIdx.x >= 32; i += 32)
        reinterpret_cast<uint4 *>(&w.memory.queries)[i] = reinterpret_cast<const uint4 *>(&made)[i];
}

/* Returns when the kernel before has ended, and lets the next one begin. All threads, once. */
__device__ __forceinline__ void take_turn()
{
    wait_for_previous();
    let_next_start();
}

/*
 * Queries of the frames of the block, while start() brings its first tiles. Where all of its tiles are of one frame and
 * tier, its warps make the whole numbers together. All threads; ends with a barrier.
 */
template <int D, int R, typename START>
__device__ void make_queries(worker<D, R> &w, START &&start)
{
    const tqkvc_frames &f = w.p.frames;
    tqkvc_query_task task = {.seq = w.t.seq, .g = w.t.g, .first_row = w.t.row_tile * R};
    tqkvc_query_maker<D, R> maker;
    table_words tables;
    uint32_t tier = 0;

    static_assert(sizeof(tqkvc_query_memory<D, TQKVC_WARPS * R>) <= sizeof(w.shared.warps),
                  "made there");
    maker.load(f, task);
    tables.load(f.image);
    task = find_frames(w);
    const tqkvc_products<D> products = place_products(w, task);
    start();
    tables.store(w.shared.tables[0]);
    const bool share = task.end_frame - task.first_frame == 1 &&
                       find_segment(w, w.t.tiles.first, w.t.tiles.end, &tier) == w.t.tiles.end;
    if (threadIdx.x == 0) {
        w.shared.products = products;
        w.shared.first_frame = task.first_frame;
        w.shared.shares_queries = share;
    }
    maker.run(f, task, find_matrix(w, 0), products, &w.shared.warps);
    __syncthreads();
    if (w.cluster())
        fetch_inverse(w);
    if (share)
        share_queries(w, task.first_frame, tier);
}

template <int D, int R> __device__ void run_tiles(worker<D, R> &w)
{
    const uint32_t n = w.t.tiles.end - w.t.tiles.first, each = (n + TQKVC_WARPS - 1) / TQKVC_WARPS;
    uint32_t i = w.t.tiles.first + threadIdx.x / 32 * each, next = i;
    const uint32_t end = min(i + each, w.t.tiles.end);
    segment<D, R> s;
    const auto start = [&]() {
        uint32_t tier;
        next = find_segment(w, i, end, &tier);
        s.start(w, i, next, tier);
    };

    bool is_started = !w.p.after_store;
    make_queries(w, [&]() {
        if (is_started && i < end)
            start();
    });
    start_rows(w);
    if (!is_started)
        take_turn();
    while (i < end) {
        if (!is_started)
            start();
        run_segment(w, s);
        i = next;
        is_started = false;
    }
    for (int h = 0; h < R / 4; h++) {
        for (int d = 4; d < 32; d *= 2) {
            w.rows.sum[h] += __shfl_xor_sync(ALL, w.rows.sum[h], d);
            w.rows.nonzero[h] += __shfl_xor_sync(ALL, w.rows.nonzero[h], d);
        }
        if (w.lane < 4)
            w.shared.stats[threadIdx.x / 32][w.lane * (R / 4) + h] =
                make_float4(w.rows.top[h], w.rows.sum[h], w.rows.nonzero[h], 0.0f);
    }
}

/*
 * out = (inverse of sums + mean nonzero) / sum, for units first_unit, first_unit + step, .. of the
 * channels. columns: where the tiles were.
 */
template <int D, int R>
__device__ void finish(const tqkvc_decode &p, const task &t, const tqkvc_matrix<D> &matrix,
                       uint32_t first_unit, uint32_t step, const float4 (&total)[R],
                       const float *sums, tqkvc_columns<D, 8> &columns)
{
    constexpr float GAIN =
        16.0f; /* sums are below 1024; lifts small ones out of f16's subnormals */
    const tqkvc_shape &shape = p.frames.shape;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32,
                   group = shape.n_heads / shape.n_kv_heads;
    const float *row_scale =
        reinterpret_cast<const float *>(p.frames.image + shape.parts.row_scale[1]) + t.g * D;
    const float *mean =
        reinterpret_cast<const float *>(p.frames.image + shape.parts.mean[1]) + t.g * D;

    float4 traits; /* of channels lane / 4 and lane / 4 + 8 of a unit: row scales, means */
    const auto load_traits = [&](uint32_t i) {
        const uint32_t d = min(first_unit + i * step, D / 16 - 1) * 16 + lane / 4;
        traits = make_float4(__ldg(row_scale + d), __ldg(row_scale + d + 8), __ldg(mean + d),
                             __ldg(mean + d + 8));
    };

    load_traits(warp);
    /* With four rows the other columns are not read. */
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < D * R; i += THREADS) {
        const float sum = total[element_row<R>(i)].y, v = sum > 0 ? __fdividef(sums[i], sum) : 0.0f;
        columns.set(element_row<R>(i), element_channel<R>(i), v * GAIN);
    }
    __syncthreads();
    matrix.wait();
    for (uint32_t i = warp; first_unit + i * step < D / 16; i += TQKVC_WARPS) {
        const uint32_t m = first_unit + i * step, d = m * 16 + lane / 4;
        const float scale[2] = {traits.x / GAIN, traits.y / GAIN}, means[2] = {traits.z, traits.w};
        float c[1][4];

        if (i < matrix.n_fetched)
            multiply_columns<false, false, 8>(matrix.fetched, i, columns, lane, c);
        else
            multiply_columns<false, false, 8>(matrix.all, m, columns, lane, c);
        load_traits(i + TQKVC_WARPS);
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t r = lane % 4 * 2 + i % 2, row = t.row_tile * R + r;
            if (r >= R || row >= p.frames.n_rows)
                continue;
            const size_t at = (size_t)(t.seq * p.frames.q_len + row / group) * shape.n_heads +
                              t.g * group + row % group;
            const float sum = total[r].y, share = sum > 0 ? __fdividef(total[r].z, sum) : 0.0f;
            store_value(p.out, at * D + d + i / 2 * 8, p.frames.type,
                        c[0][i] * scale[i / 2] + means[i / 2] * share);
            if (p.lse && d + i / 2 == 0)
                p.lse[at] = sum > 0 ? (total[r].x + log2f(sum)) * TQKVC_LN_2 : -INFINITY;
        }
    }
}

/* BLOCKS: of a multiprocessor, for which registers are to be enough. */
template <int D, int R, int BLOCKS>
__global__ void __launch_bounds__(32 * TQKVC_WARPS, BLOCKS)
    decode_kernel(const __grid_constant__ tqkvc_decode p)
{
    extern __shared__ __align__(128) uint8_t dynamic[];
    block_memory<D, R> &shared = *reinterpret_cast<block_memory<D, R> *>(dynamic);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    uint8_t *tiles = dynamic + sizeof(block_memory<D, R>);
    cluster_memory<D, R> *cluster = find_cluster(p, shared);

    if (lane < 2)
        ring_barrier_init(&shared.barriers[warp][lane]);
    if (cluster) {
        if (threadIdx.x == 0) {
            const uint32_t n_inverse =
                cluster->count_units(blockIdx.x, p.n_splits, p.n_fetched);
            expect_bytes(&cluster->barriers[0], p.n_fetched * UNIT_BYTES<D>);
            expect_bytes(&cluster->barriers[1], n_inverse * UNIT_BYTES<D>);
            expect_bytes(&cluster->barriers[2], sizeof(cluster->parts) + p.n_splits * R * 16);
            expect_bytes(&cluster->barriers[3], sizeof(cluster->sums));
        }
        cluster_arrive();
    }
    if (!p.after_store)
        take_turn();
    const task t = find_task(p);
    if (t.split >= t.n_parts && !cluster) {
        if (p.after_store) /* when all blocks have ended, the store has */
            take_turn();
        return;
    }
    worker<D, R> w = {p,
                      t,
                      shared,
                      shared.warps[warp],
                      tiles + warp * p.tile_bytes,
                      shared.barriers[warp],
                      {fresh(shared_address(shared.tables))},
                      lane};
    if (cluster)
        fetch_matrix(w);
    else
        __syncthreads();
    run_tiles(w);
    __syncthreads();

    tqkvc_columns<D, 8> &columns = *reinterpret_cast<tqkvc_columns<D, 8> *>(tiles);
    const tqkvc_matrix<D> inverse = find_matrix(w, 1);
    if (cluster) {
        merge_cluster(p.n_splits, t.split, shared, *cluster);
        finish(p, t, inverse, t.split, p.n_splits, shared.total,
               reinterpret_cast<const float *>(cluster->sums), columns);
        return;
    }
    float4 *sums = reinterpret_cast<float4 *>(shared.warps[0].sums);
    merge_warps(shared, [&](uint32_t i, const float4 &v) { sums[i] = v; });
    __syncthreads();
    if (t.n_parts > 1 && !merge_splits(p, t, shared, sums))
        return;
    finish(p, t, inverse, 0, 1, t.n_parts > 1 ? shared.total : shared.part,
           reinterpret_cast<const float *>(sums), columns);
}

template <int D, int R, int BLOCKS> tqkv_status launch(const tqkvc_decode &p, cudaStream_t stream)
{
    const size_t bytes = tqkvc_decode_shared_bytes(D, R, p.tile_bytes, p.is_cluster) +
                         p.n_fetched * UNIT_BYTES<D>;
    const auto kernel = decode_kernel<D, R, BLOCKS>;
    const uint32_t n_cluster = p.is_cluster ? p.n_splits : 1;

    static_assert(sizeof(block_memory<D, R>) % 16 == 0, "tiles are 16-aligned");
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) !=
            cudaSuccess ||
        (n_cluster > TQKVC_CLUSTER_PORTABLE &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
             cudaSuccess)) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    const dim3 grid(p.n_splits, p.frames.shape.n_kv_heads * p.frames.n_row_tiles, p.frames.n_seqs);
    const cudaError_t error = launch_clusters(kernel, grid, n_cluster, THREADS, bytes, p.is_early, stream, p);
    (void)cudaGetLastError();
    return error == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}

/* Eight rows want 168 registers, with which three blocks fit; where shared memory has room, four are faster. */
template <int D> tqkv_status launch_rows(const tqkvc_decode &p, cudaStream_t stream)
{
    if (p.frames.rows_per_tile == 4)
        return launch<D, 4, 4>(p, stream);
    if constexpr (D < 256)
        if (p.n_blocks >= 4)
            return launch<D, 8, 4>(p, stream);
    return launch<D, 8, 3>(p, stream);
}

template <int D> size_t shared_bytes(uint32_t rows_per_tile, bool is_cluster)
{
    return rows_per_tile == 4
               ? sizeof(block_memory<D, 4>) + (is_cluster ? sizeof(cluster_memory<D, 4>) : 0)
               : sizeof(block_memory<D, 8>) + (is_cluster ? sizeof(cluster_memory<D, 8>) : 0);
}

} // namespace

extern "C" uint32_t tqkvc_decode_code(void)
{
    cudaFuncAttributes attributes;

    if (cudaFuncGetAttributes(&attributes, decode_kernel<128, 4, 4>) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return (uint32_t)attributes.ptxVersion;
}

extern "C" size_t tqkvc_decode_shared_bytes(uint32_t dim, uint32_t rows_per_tile,
                                            uint32_t tile_bytes, bool is_cluster)
{
    const size_t fixed = dim == 64    ? shared_bytes<64>(rows_per_tile, is_cluster)
                         : dim == 128 ? shared_bytes<128>(rows_per_tile, is_cluster)
                                      : shared_bytes<256>(rows_per_tile, is_cluster);
    return fixed + TQKVC_WARPS * (size_t)tile_bytes;
}

extern "C" tqkv_status tqkvc_launch_decode(const tqkvc_decode *decode, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    return decode->frames.shape.dim == 64    ? launch_rows<64>(*decode, s)
           : decode->frames.shape.dim == 128 ? launch_rows<128>(*decode, s)
                                             : launch_rows<256>(*decode, s);
}
