/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a block of decode has in shared memory, and how sums of warps and of splits become one. Parts are
 * brought to their largest top and added; a cluster hands slices around, other blocks meet in the workspace.
 */
#ifndef TQKVC_DECODE_MERGE_CUH
#define TQKVC_DECODE_MERGE_CUH

#include "cuda/cluster.cuh"
#include "cuda/decode_tile.cuh"
#include "cuda/frames.cuh"

namespace
{

constexpr uint32_t ALL = 0xffffffffu;

constexpr uint32_t THREADS = 32 * TQKVC_WARPS;
template <int D, int R> struct block_memory {
    uint32_t tables[TQKVC_WIDTHS][TQKVC_WORDS + 1]; /* words and step */
    float4 stats[TQKVC_WARPS][R];                   /* top, sum, nonzero; of a warp */
    float4 part[R], total[R];                       /* of the block, of all splits */
    float factors[TQKVC_SPLITS_MAX][R];
    uint32_t is_last, shares_queries, first_frame, pad; /* first_frame: of the products */
    uint64_t barriers[TQKVC_WARPS][2]; /* of K and of V */
    tqkvc_products<D> products;
    tqkvc_warp_memory<D, R> warps[TQKVC_WARPS];
};

/* Of 16 channels in the high part of a matrix of a head. */
template <int D> constexpr uint32_t UNIT_BYTES = D / 16 * 32 * sizeof(uint4);

/* What a block of a cluster has besides; behind it are the units of a matrix that are fetched, of K, then of V. */
template <int D, int R> struct cluster_memory {
    float products[2][R][D], means[2][R];   /* of up to two frames */
    float4 parts[D * R / 4];                /* [block][slice of this one] */
    float4 stats[TQKVC_CLUSTER_MAX][R];     /* of blocks, as block_memory.part */
    float4 sums[D * R / 4];
    uint64_t barriers[4]; /* of the matrices of K and of V, of parts and stats, of sums */

    __device__ __forceinline__ uint8_t *matrix()
    {
        return reinterpret_cast<uint8_t *>(this + 1);
    }

    /* Units of V that block `rank` of n finishes and fetches. */
    static __device__ __forceinline__ uint32_t count_units(uint32_t rank, uint32_t n,
                                                           uint32_t n_fetched)
    {
        return min((D / 16 + n - 1 - rank) / n, n_fetched);
    }
};

/* Behind the block's own memory and its tiles; NULL where blocks are not a cluster. */
template <int D, int R>
__device__ __forceinline__ cluster_memory<D, R> *find_cluster(const tqkvc_decode &p,
                                                              block_memory<D, R> &shared)
{
    uint8_t *at = reinterpret_cast<uint8_t *>(&shared + 1) + TQKVC_WARPS * p.tile_bytes;
    return p.is_cluster ? reinterpret_cast<cluster_memory<D, R> *>(at) : NULL;
}

/* A part in the workspace: sums as in tqkvc_warp_memory, then top, sum, nonzero of each row. */
template <int D, int R> struct split_part {
    float4 sums[D * R / 4], stats[R];
};

/* Tiles [first, end) of a sequence. */
struct tile_range {
    uint32_t first, end;
};

/* What the blocks of one sequence, KV head and row tile share, and the tiles of this one. */
struct task {
    uint32_t seq, g, row_tile, split, length, n_parts;
    tile_range tiles;
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
    t.tiles = {min(t.split * whole, n_tiles), min((t.split + 1) * whole, n_tiles)};
    return t;
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
 * Factors that bring n parts, at most MAX, to one top, and the totals. get(part, row): its top, sum, nonzero. A
 * warp takes every fourth row, a lane every 32nd part.
 */
template <int R, int MAX, typename GET>
__device__ void find_factors(uint32_t n, GET &&get, float (*factors)[R], float4 (&total)[R])
{
    constexpr int N = (MAX + 31) / 32, LANES = MAX < 32 ? MAX : 32; /* of which lane 0 has the totals */
    const uint32_t lane = threadIdx.x % 32;

#pragma unroll 1
    for (uint32_t r = threadIdx.x / 32; r < R; r += TQKVC_WARPS) {
        float4 stats[N];
        float top = TQKVC_LOWEST, sum = 0, nonzero = 0;
#pragma unroll
        for (int k = 0; k < N; k++) {
            const uint32_t i = 32 * k + lane;
            stats[k] = i < n ? get(i, r) : make_float4(TQKVC_LOWEST, 0.0f, 0.0f, 0.0f);
            top = fmaxf(top, stats[k].x);
        }
        for (int d = LANES / 2; d > 0; d /= 2)
            top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float factor = exp2_fast(stats[k].x - top);
            if (32 * k + lane < n)
                factors[32 * k + lane][r] = factor;
            sum += stats[k].y * factor;
            nonzero += stats[k].z * factor;
        }
        for (int d = LANES / 2; d > 0; d /= 2) {
            sum += __shfl_xor_sync(ALL, sum, d);
            nonzero += __shfl_xor_sync(ALL, nonzero, d);
        }
        if (lane == 0)
            total[r] = make_float4(top, sum, nonzero, 0.0f);
    }
}

/* v += x times the factors of elements i .. i + 3, that are of two rows. */
template <int R>
__device__ __forceinline__ void add_scaled(float4 &v, const float4 &x, const float (&factors)[R],
                                           uint32_t i)
{
    const float2 f = *reinterpret_cast<const float2 *>(factors + element_row<R>(i));
    v.x += x.x * f.x;
    v.y += x.y * (R == 4 ? f.x : f.y);
    v.z += x.z * (R == 4 ? f.y : f.x);
    v.w += x.w * f.y;
}

/* Sums of all warps of the block; use(i, sums of elements 4 i .. 4 i + 3). */
template <int D, int R, typename USE>
__device__ void merge_warps(block_memory<D, R> &shared, USE &&use)
{
    find_factors<R, TQKVC_WARPS>(
        TQKVC_WARPS, [&](uint32_t i, uint32_t r) { return shared.stats[i][r]; }, shared.factors,
        shared.part);
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < D * R / 4; i += THREADS) {
        float4 v = {};
#pragma unroll
        for (int w = 0; w < TQKVC_WARPS; w++)
            add_scaled<R>(v, reinterpret_cast<float4 *>(shared.warps[w].sums)[i], shared.factors[w],
                          4 * i);
        use(i, v);
    }
}

/*
 * Sums of all blocks, to all blocks. A block of n gets a slice of each part, adds them up and hands the sums on. All
 * threads that share an element add it up, and hand it to different blocks.
 */
template <int D, int R>
__device__ void merge_cluster(uint32_t n, uint32_t rank, block_memory<D, R> &shared,
                              cluster_memory<D, R> &cluster)
{
    const uint32_t slice = D * R / 4 / n, n_shares = max(THREADS / slice, 1);

    merge_warps(shared, [&](uint32_t i, const float4 &v) {
        push(&cluster.parts[rank * slice + i % slice], &cluster.barriers[2], i / slice, v);
    });
    if (threadIdx.x < n * R)
        push(&cluster.stats[rank][threadIdx.x % R], &cluster.barriers[2], threadIdx.x / R,
             shared.part[threadIdx.x % R]);
    ring_wait(&cluster.barriers[2], 0);
    __syncthreads(); /* factors are free */
    find_factors<R, TQKVC_CLUSTER_MAX>(
        n, [&](uint32_t i, uint32_t r) { return cluster.stats[i][r]; }, shared.factors,
        shared.total);
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x % slice; i < slice; i += THREADS) {
        const uint32_t at = rank * slice + i;
        float4 v = {};
#pragma unroll 16
        for (uint32_t k = 0; k < n; k++)
            add_scaled<R>(v, cluster.parts[k * slice + i], shared.factors[k], 4 * at);
        for (uint32_t k = threadIdx.x / slice % n_shares; k < n; k += n_shares)
            push(&cluster.sums[at], &cluster.barriers[3], k, v);
    }
    ring_wait(&cluster.barriers[3], 0);
}

/* Leaves the part of this block; true in the block that was last, with the sums of all in `sums`. */
template <int D, int R>
__device__ bool merge_splits(const tqkvc_decode &p, const task &t, block_memory<D, R> &shared,
                             float4 *sums)
{
    const size_t place = (size_t)t.seq * gridDim.y + blockIdx.y;
    split_part<D, R> *parts = static_cast<split_part<D, R> *>(p.parts) + place * p.n_splits;

    for (uint32_t i = threadIdx.x; i < D * R / 4; i += THREADS)
        __stcg(&parts[t.split].sums[i], sums[i]);
    if (threadIdx.x < R)
        __stcg(&parts[t.split].stats[threadIdx.x], shared.part[threadIdx.x]);
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
        t.n_parts, [&](uint32_t i, uint32_t r) { return __ldcg(&parts[i].stats[r]); },
        shared.factors, shared.total);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < D * R / 4; i += THREADS) {
        float4 v = {};
#pragma unroll 16
        for (uint32_t s = 0; s < t.n_parts; s++)
            add_scaled<R>(v, __ldcg(&parts[s].sums[i]), shared.factors[s], 4 * i);
        sums[i] = v;
    }
    __syncthreads();
    return true;
}

} // namespace

#endif /* TQKVC_DECODE_MERGE_CUH */
