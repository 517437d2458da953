/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gather: stored tokens of several sequences of a latent layer to rows, for engines that make keys and values of all
 * heads from them. A warp decodes a token: its latent, which stays in coded space, then its rotated key, by the inverse
 * and the turn of its frame.
 */
#include "cuda/coded_row.cuh"
#include "cuda/columns.cuh"
#include "cuda/launch.h"

namespace
{

constexpr uint32_t WARPS = 8, OF_WARP = 4; /* tokens */
constexpr uint32_t V = TQKVC_LATENT_DIM, K = TQKVC_LATENT_K_DIM;

/* Sequence of a row: the last one that starts at or before it, and has rows. */
__device__ uint32_t find_sequence(const int32_t *starts, uint32_t n, uint32_t row)
{
    uint32_t low = 0, high = n; /* starts[low] <= row < starts[high] */

    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if ((uint32_t)starts[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

struct gather_memory {
    float matrix[K][K + 1]; /* [j][i], what makes channel i of j */
    float coded[WARPS][K];
};

/* K of a token from its coded row in shared memory. */
__device__ void write_key(const tqkvc_gather &p, const gather_memory &memory, uint32_t warp, uint32_t lane, bool zero,
                          int32_t base, size_t at)
{
    const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.mean[TQKV_SIDE_K]);
    const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
    const tqkvc_pair pair = find_pair(p.shape, lane);
    float a = zero ? 0.0f : mean[pair.a], b = zero ? 0.0f : mean[pair.b], sine = 0.0f, cosine = 1.0f;

    for (uint32_t j = 0; j < K; j++) {
        a += memory.matrix[j][pair.a] * memory.coded[warp][j];
        b += memory.matrix[j][pair.b] * memory.coded[warp][j];
    }
    if (pair.turns)
        turn_fast(turns_per_position(inv_freq[lane]), base, sine, cosine);
    store_value(p.args.out, at + pair.a, p.args.type, a * cosine - b * sine);
    store_value(p.args.out, at + pair.b, p.args.type, b * cosine + a * sine);
}

__global__ void __launch_bounds__(32 * WARPS) gather_kernel(const __grid_constant__ tqkvc_gather p)
{
    __shared__ gather_memory memory;
    const tqkvc_tables &tables = *reinterpret_cast<const tqkvc_tables *>(p.image);
    const float *matrix = reinterpret_cast<const float *>(p.image + p.shape.parts.query_matrix);
    const float *coded_mean = reinterpret_cast<const float *>(p.image + p.shape.parts.coded_mean);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    for (uint32_t i = threadIdx.x; i < K * K; i += blockDim.x)
        memory.matrix[i % K][i / K] = matrix[i];
    __syncthreads();
    for (uint32_t i = 0; i < OF_WARP; i++) {
        const uint32_t row = (blockIdx.x * OF_WARP + i) * WARPS + warp;
        if (row >= p.args.n_tokens || row >= (uint32_t)p.args.starts[p.args.n_seqs])
            return;
        const uint32_t seq = find_sequence(p.args.starts, p.args.n_seqs, row);
        const uint32_t token = (uint32_t)(p.args.firsts[seq] + (int32_t)row - p.args.starts[seq]), slot = token % 16;
        const tqkvc_sections stored =
            find_sections(p.args.pages, p.shape, p.image, p.page_bytes, seq, token, 0);
        const float k_scale = tables.encode.scale_values[stored.k[slot]],
                    v_scale = tables.encode.scale_values[stored.v[slot]];
        const uint64_t *widths = stored.layout->widths;
        const size_t at = (size_t)row * p.args.out_stride;

        for_each_coded<V / 16>(tables, stored.v + TQKVC_BLOCK_TOKENS, widths[TQKV_SIDE_V], stored.layout->more_widths,
                               TQKV_SIDE_V, slot, lane, [&](uint32_t d, float x) {
                                   store_value(p.args.out, at + d, p.args.type,
                                               v_scale == 0.0f ? 0.0f : v_scale * x + coded_mean[d]);
                               });
        for_each_coded<K / 16>(tables, stored.k + TQKVC_BLOCK_TOKENS, widths[TQKV_SIDE_K], 0, TQKV_SIDE_K, slot, lane,
                               [&](uint32_t d, float x) { memory.coded[warp][d] = k_scale == 0.0f ? 0.0f : k_scale * x; });
        __syncwarp();
        write_key(p, memory, warp, lane, k_scale == 0.0f, (int32_t)(token / p.shape.frame_tokens * p.shape.frame_tokens),
                  at + V);
        __syncwarp();
    }
}

} // namespace

extern "C" tqkv_status tqkvc_launch_gather(const tqkvc_gather *gather, void *stream)
{
    const uint32_t n = WARPS * OF_WARP;

    gather_kernel<<<(gather->args.n_tokens + n - 1) / n, 32 * WARPS, 0, static_cast<cudaStream_t>(stream)>>>(*gather);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
