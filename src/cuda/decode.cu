/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode: attention of a few query rows over the pages of a sequence.
 *
 *     block   KV head x up to R query rows x part of the tokens ("split") of one sequence
 *     warp    a run of tiles of 64 tokens of it, with memory for one tile of its own; no barrier inside
 *     merge   the warps of a block in shared memory; the splits by the last block that arrives
 *     finish  sums of V times the inverse of the transform on tensor cores, mean, output
 *
 * A block begins with the queries of its frames (frames.cuh), while its first tiles are on their way.
 * Every byte of K and V is read once for up to R rows, by bulk copies of sections (1040 bytes at 4 bits
 * and 128 channels). While a warp works on V of a tile, K of its next tile is on its way, and the
 * reverse: 16 warps of 8 KB fill a multiprocessor of sm_90, and hide each other's latency.
 * docs/GPU.md has what other ways took.
 */
#include "cuda/columns.cuh"
#include "cuda/decode_tile.cuh"
#include "cuda/frames.cuh"
#include "cuda/ring.cuh"

namespace
{

constexpr uint32_t ALL = 0xffffffffu;

template <int D, int R> struct block_memory {
    uint32_t tables[TQKVC_WIDTHS][TQKVC_WORDS + 1]; /* words and step */
    float stats[TQKVC_WARPS][3][R];                 /* top, sum, nonzero */
    float factors[TQKVC_SPLITS_MAX][R];
    float total[3][R];
    uint32_t is_last, pad[3];
    uint64_t barriers[TQKVC_WARPS][2]; /* of K and of V */
    tqkvc_warp_memory<D, R> warps[TQKVC_WARPS];
};

/* Floats of a part: sums as in tqkvc_warp_memory, then top, sum, nonzero of each row. */
template <int D, int R> constexpr uint32_t PART_FLOATS = D * R + 3 * R;

/* What the blocks of one sequence, KV head and row tile share. */
struct task {
    uint32_t seq, g, row_tile, split, length, first_tile, end_tile, n_parts;
};

__device__ task find_task(const tqkvc_decode &p)
{
    const uint32_t n = p.frames.n_row_tiles;
    task t = {
        .seq = blockIdx.z, .g = blockIdx.y / n, .row_tile = blockIdx.y % n, .split = blockIdx.x};
    t.length = max(p.frames.seq_lens[t.seq], 0);
    const uint32_t n_tiles = (t.length + TQKV_CUDA_TILE_TOKENS - 1) / TQKV_CUDA_TILE_TOKENS;
    const uint32_t each = (n_tiles + p.n_splits - 1) / p.n_splits;
    const uint32_t whole = (each + TQKVC_WARPS - 1) / TQKVC_WARPS * TQKVC_WARPS; /* warps alike */
    t.n_parts = n_tiles == 0 ? 1 : (n_tiles + whole - 1) / whole;
    t.first_tile = min(t.split * whole, n_tiles);
    t.end_tile = min(t.first_tile + whole, n_tiles);
    return t;
}

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

/* The queries of a frame, for a tier. */
template <int D, int R> __device__ void load_queries(worker<D, R> &w, uint32_t frame, uint32_t tier)
{
    constexpr uint32_t WORDS = sizeof(w.memory.q) / 16;
    const tqkvc_frames &f = w.p.frames;
    const size_t place =
        ((size_t)(w.t.seq * f.shape.n_kv_heads + w.t.g) * f.n_frames + frame) * f.shape.n_tiers +
        tier;
    const size_t at = place * f.n_row_tiles + w.t.row_tile;
    const uint4 *operands = reinterpret_cast<const uint4 *>(f.operands) + at * WORDS;
    const uint4 *rows = reinterpret_cast<const uint4 *>(f.rows) + at * R;
    uint4 *q = reinterpret_cast<uint4 *>(&w.memory.q[0][0][0]);

    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < (WORDS + 31) / 32; i++)
        if (32 * i + w.lane < WORDS)
            q[32 * i + w.lane] = __ldcg(operands + 32 * i + w.lane);
    for (uint32_t h = 0; h < R / 4; h++) {
        const uint32_t r = w.lane % 4 * (R / 4) + h;
        const uint4 row =
            w.t.row_tile * R + r < f.n_rows ? __ldcg(rows + r) : make_uint4(0, 0, 0, 0);
        w.rows.q_factor[h] = __uint_as_float(row.x) * w.p.scale_log2;
        w.rows.q_mean[h] = __uint_as_float(row.y) * w.p.scale_log2;
        w.rows.q_start[h][0] = (int)row.z;
        w.rows.q_start[h][1] = (int)row.w;
    }
    __syncwarp();
}

template <int D, int R>
__device__ __forceinline__ const tqkvc_layout &layout_of(const worker<D, R> &w, uint32_t tier)
{
    const tqkvc_shape &shape = w.p.frames.shape;
    return reinterpret_cast<const tqkvc_layout *>(
        w.p.frames.image + shape.parts.layouts)[tier * shape.n_kv_heads + w.t.g];
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
        offset = layout.offset;
        bytes[0] = layout.bytes[0];
        bytes[1] = layout.bytes[1];
        const uint32_t fit = w.p.tile_bytes / (bytes[0] + bytes[1]);
        each = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
        block = first * TQKVC_TILE_BLOCKS;
        end = min(end_tile * TQKVC_TILE_BLOCKS,
                  (w.t.length + TQKVC_BLOCK_TOKENS - 1) / TQKVC_BLOCK_TOKENS);
        const uint32_t mine = block + (w.lane & (each - 1));
        entry = mine / page_blocks;
        in_page = mine % page_blocks;
        page = load_page(w, min(entry, (end - 1) / page_blocks));
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

    if (w.lane < 2)
        find_runs<D / 16>(layout_of(w, s.tier).widths[w.lane], w.memory.runs[w.lane]);
#pragma unroll 1
    for (; s.block < s.end; s.block += each) {
        const uint32_t token = s.block * TQKVC_BLOCK_TOKENS,
                       end_token = min(token + each * TQKVC_BLOCK_TOKENS, w.t.length);
        tqkvc_product<R> products[TQKVC_TILE_BLOCKS];
        tqkvc_probabilities<R> weights;
        uint32_t k_scales[TQKVC_TILE_BLOCKS / 2], v_scales[TQKVC_TILE_BLOCKS / 2];

        if (s.block >= end_frame) {
            load_queries<D, R>(w, s.block / frame_blocks, s.tier);
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

/* Queries of the frames that the tiles of the block are in. All threads of it. */
template <int D, int R> __device__ void make_block_queries(worker<D, R> &w)
{
    const uint32_t frame_tiles = w.p.frames.frame_tokens / TQKV_CUDA_TILE_TOKENS;
    const tqkvc_query_task task = {.seq = w.t.seq,
                                   .g = w.t.g,
                                   .row_tile = w.t.row_tile,
                                   .length = w.t.length,
                                   .first_frame = w.t.first_tile / frame_tiles,
                                   .end_frame = (w.t.end_tile + frame_tiles - 1) / frame_tiles};

    static_assert(sizeof(tqkvc_query_memory<D, R>) <= sizeof(w.shared.warps), "made there");
    make_queries<D, R>(w.p.frames, task,
                       *reinterpret_cast<tqkvc_query_memory<D, R> *>(&w.shared.warps));
}

template <int D, int R> __device__ void run_tiles(worker<D, R> &w)
{
    const uint32_t n = w.t.end_tile - w.t.first_tile, each = (n + TQKVC_WARPS - 1) / TQKVC_WARPS;
    uint32_t i = w.t.first_tile + threadIdx.x / 32 * each, next = i;
    const uint32_t end = min(i + each, w.t.end_tile);
    segment<D, R> s;
    const auto start = [&]() {
        uint32_t tier;
        next = find_segment(w, i, end, &tier);
        s.start(w, i, next, tier);
    };

    if (i < end)
        start();
    make_block_queries(w);
    start_rows(w);
    while (i < end) {
        run_segment(w, s);
        i = next;
        if (i < end)
            start();
    }
    float(*stats)[R] = w.shared.stats[threadIdx.x / 32];
    for (int h = 0; h < R / 4; h++) {
        for (int d = 4; d < 32; d *= 2) {
            w.rows.sum[h] += __shfl_xor_sync(ALL, w.rows.sum[h], d);
            w.rows.nonzero[h] += __shfl_xor_sync(ALL, w.rows.nonzero[h], d);
        }
        if (w.lane < 4) {
            const uint32_t r = w.lane * (R / 4) + h;
            stats[0][r] = w.rows.top[h];
            stats[1][r] = w.rows.sum[h];
            stats[2][r] = w.rows.nonzero[h];
        }
    }
}

/* Row of element i of the sums. */
template <int R> __device__ uint32_t element_row(uint32_t i)
{
    return i / (R / 2) % 4 * (R / 4) + i % (R / 4);
}

/* Channel of element i of the sums. */
template <int R> __device__ uint32_t element_channel(uint32_t i)
{
    return i / (16 * R) * 16 + i / (R / 2) % 32 / 4 + i % (R / 2) / (R / 4) * 8;
}

/*
 * Factors that bring n parts, at most MAX, to one top, and the totals. get(part, what, row): top, sum, nonzero. A
 * warp takes every fourth row, a lane every 32nd part.
 */
template <int R, int MAX, typename GET>
__device__ void find_factors(uint32_t n, GET &&get, float (*factors)[R], float (*total)[R])
{
    constexpr int N = (MAX + 31) / 32;
    const uint32_t lane = threadIdx.x % 32;

#pragma unroll 1
    for (uint32_t r = threadIdx.x / 32; r < R; r += TQKVC_WARPS) {
        float values[N][3], top = TQKVC_LOWEST, sum = 0, nonzero = 0;
#pragma unroll
        for (int k = 0; k < N; k++) {
            const uint32_t i = 32 * k + lane;
#pragma unroll
            for (int what = 0; what < 3; what++)
                values[k][what] = i < n ? get(i, what, r) : what == 0 ? TQKVC_LOWEST : 0.0f;
            top = fmaxf(top, values[k][0]);
        }
        for (int d = 16; d > 0; d /= 2)
            top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float factor = exp2_fast(values[k][0] - top);
            if (32 * k + lane < n)
                factors[32 * k + lane][r] = factor;
            sum += values[k][1] * factor;
            nonzero += values[k][2] * factor;
        }
        for (int d = 16; d > 0; d /= 2) {
            sum += __shfl_xor_sync(ALL, sum, d);
            nonzero += __shfl_xor_sync(ALL, nonzero, d);
        }
        if (lane == 0) {
            total[0][r] = top;
            total[1][r] = sum;
            total[2][r] = nonzero;
        }
    }
}

/* Sums of all warps to those of the first warp. */
template <int D, int R> __device__ void merge_warps(block_memory<D, R> &shared)
{
    find_factors<R, TQKVC_WARPS>(
        TQKVC_WARPS, [&](uint32_t i, int what, uint32_t r) { return shared.stats[i][what][r]; },
        shared.factors, shared.total);
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < D * R; i += 32 * TQKVC_WARPS) {
        float v = 0;
#pragma unroll
        for (int w = 0; w < TQKVC_WARPS; w++)
            v += (&shared.warps[w].sums[0][0][0])[i] * shared.factors[w][element_row<R>(i)];
        (&shared.warps[0].sums[0][0][0])[i] = v;
    }
    __syncthreads();
}

/* Leaves the part of this block; true in the block that was last, with the sums of all in place. */
template <int D, int R>
__device__ bool merge_splits(const tqkvc_decode &p, const task &t, block_memory<D, R> &shared)
{
    float *sums = &shared.warps[0].sums[0][0][0];
    const size_t place = (size_t)t.seq * gridDim.y + blockIdx.y;
    float *parts = p.parts + place * p.n_splits * PART_FLOATS<D, R>;
    float *mine = parts + (size_t)t.split * PART_FLOATS<D, R>;

    for (uint32_t i = threadIdx.x; i < D * R; i += 32 * TQKVC_WARPS)
        __stcg(mine + i, sums[i]);
    if (threadIdx.x < 3 * R)
        __stcg(mine + D * R + threadIdx.x, (&shared.total[0][0])[threadIdx.x]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        shared.is_last = atomicAdd(p.arrivals + place, 1u) == t.n_parts - 1;
    __syncthreads();
    if (!shared.is_last)
        return false;
    __threadfence();
    if (threadIdx.x == 0)
        p.arrivals[place] = 0;
    find_factors<R, TQKVC_SPLITS_MAX>(
        t.n_parts,
        [&](uint32_t i, int what, uint32_t r) {
            return __ldcg(parts + (size_t)i * PART_FLOATS<D, R> + D * R + what * R + r);
        },
        shared.factors, shared.total);
    __syncthreads();
    for (uint32_t i = 4 * threadIdx.x; i < D * R; i += 4 * 32 * TQKVC_WARPS) {
        float v[4] = {};
#pragma unroll 16
        for (uint32_t s = 0; s < t.n_parts; s++) {
            const float4 x =
                __ldcg(reinterpret_cast<const float4 *>(parts + (size_t)s * PART_FLOATS<D, R> + i));
            v[0] += x.x * shared.factors[s][element_row<R>(i)];
            v[1] += x.y * shared.factors[s][element_row<R>(i + 1)];
            v[2] += x.z * shared.factors[s][element_row<R>(i + 2)];
            v[3] += x.w * shared.factors[s][element_row<R>(i + 3)];
        }
        *reinterpret_cast<float4 *>(sums + i) = *reinterpret_cast<const float4 *>(v);
    }
    __syncthreads();
    return true;
}

/* out = (inverse of sums + mean nonzero) / sum. columns: where the tiles were. */
template <int D, int R>
__device__ void finish(const tqkvc_decode &p, const task &t, block_memory<D, R> &shared,
                       tqkvc_columns<D, 8> &columns)
{
    constexpr float GAIN =
        16.0f; /* sums are below 1024; lifts small ones out of f16's subnormals */
    const tqkvc_shape &shape = p.frames.shape;
    const uint32_t lane = threadIdx.x % 32, group = shape.n_heads / shape.n_kv_heads;
    const uint4 *matrix = reinterpret_cast<const uint4 *>(p.frames.image + shape.parts.matrix[1]) +
                          (size_t)t.g * D * D / 4;
    const float *row_scale =
        reinterpret_cast<const float *>(p.frames.image + shape.parts.row_scale[1]) + t.g * D;
    const float *mean =
        reinterpret_cast<const float *>(p.frames.image + shape.parts.mean[1]) + t.g * D;

    /* With four rows the other columns are not read. */
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < D * R; i += 32 * TQKVC_WARPS) {
        const float sum = shared.total[1][element_row<R>(i)];
        const float v = sum > 0 ? __fdividef((&shared.warps[0].sums[0][0][0])[i], sum) : 0.0f;
        columns.set(element_row<R>(i), element_channel<R>(i), v * GAIN);
    }
    __syncthreads();
    for (uint32_t m = threadIdx.x / 32; m < D / 16; m += TQKVC_WARPS) {
        const uint32_t d = m * 16 + lane / 4;
        const float scale[2] = {__ldg(row_scale + d) / GAIN, __ldg(row_scale + d + 8) / GAIN},
                    means[2] = {__ldg(mean + d), __ldg(mean + d + 8)};
        float c[1][4];

        multiply_columns<false, 8>(matrix, m, columns, lane, c);
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t r = lane % 4 * 2 + i % 2, row = t.row_tile * R + r;
            if (r >= R || row >= p.frames.n_rows)
                continue;
            const size_t at = (size_t)(t.seq * p.frames.q_len + row / group) * shape.n_heads +
                              t.g * group + row % group;
            const float sum = shared.total[1][r];
            const float share = sum > 0 ? __fdividef(shared.total[2][r], sum) : 0.0f;
            store_value(p.out, at * D + d + i / 2 * 8, p.frames.type,
                        c[0][i] * scale[i / 2] + means[i / 2] * share);
            if (p.lse && d + i / 2 == 0)
                p.lse[at] = sum > 0 ? (shared.total[0][r] + log2f(sum)) * 0.69314718f : -INFINITY;
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
    const tqkvc_tables *tables = reinterpret_cast<const tqkvc_tables *>(p.frames.image);

    wait_for_previous();
    const task t = find_task(p);
    for (uint32_t i = threadIdx.x; i < TQKVC_WIDTHS * (TQKVC_WORDS + 1); i += 32 * TQKVC_WARPS)
        (&shared.tables[0][0])[i] = reinterpret_cast<const uint32_t *>(
            tables->widths + i / (TQKVC_WORDS + 1))[i % (TQKVC_WORDS + 1)];
    if (lane < 2)
        ring_barrier_init(&shared.barriers[warp][lane]);
    if (t.split >= t.n_parts)
        return;
    __syncthreads();

    uint8_t *tiles = dynamic + sizeof(block_memory<D, R>);
    worker<D, R> w = {p,
                      t,
                      shared,
                      shared.warps[warp],
                      tiles + warp * p.tile_bytes,
                      shared.barriers[warp],
                      {fresh(shared_address(shared.tables))},
                      lane};
    run_tiles(w);
    let_next_start();
    __syncthreads();
    merge_warps(shared);
    if (t.n_parts == 1 || merge_splits(p, t, shared))
        finish(p, t, shared, *reinterpret_cast<tqkvc_columns<D, 8> *>(tiles));
}

template <int D, int R, int BLOCKS> tqkv_status launch(const tqkvc_decode &p, cudaStream_t stream)
{
    const size_t bytes = tqkvc_decode_shared_bytes(D, R, p.tile_bytes);
    const auto kernel = decode_kernel<D, R, BLOCKS>;

    static_assert(sizeof(block_memory<D, R>) % 16 == 0, "tiles are 16-aligned");
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) !=
        cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    const dim3 grid(p.n_splits, p.frames.shape.n_kv_heads * p.frames.n_row_tiles, p.frames.n_seqs);
    const cudaError_t error = launch_beside(kernel, grid, 32 * TQKVC_WARPS, bytes, stream, p);
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

template <int D> size_t shared_bytes(uint32_t rows_per_tile)
{
    return rows_per_tile == 4 ? sizeof(block_memory<D, 4>) : sizeof(block_memory<D, 8>);
}

} // namespace

extern "C" size_t tqkvc_decode_shared_bytes(uint32_t dim, uint32_t rows_per_tile,
                                            uint32_t tile_bytes)
{
    const size_t fixed = dim == 64    ? shared_bytes<64>(rows_per_tile)
                         : dim == 128 ? shared_bytes<128>(rows_per_tile)
                                      : shared_bytes<256>(rows_per_tile);
    return fixed + TQKVC_WARPS * (size_t)tile_bytes;
}

extern "C" tqkv_status tqkvc_launch_decode(const tqkvc_decode *decode, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    return decode->frames.shape.dim == 64    ? launch_rows<64>(*decode, s)
           : decode->frames.shape.dim == 128 ? launch_rows<128>(*decode, s)
                                             : launch_rows<256>(*decode, s);
}
