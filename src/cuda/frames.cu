/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queries of frames: q' = inverse R(-base) q for every frame of a sequence, and (R(-base) q).mean.
 *
 * A block takes N = 8 or 32 columns, (frame, row) pairs of one sequence and KV head: turns them into shared
 * memory as two f16 each, then multiplies them with the matrix of the head on tensor cores. For 32
 * heads of 128 channels, 4096 tokens in frames of 256 are 512 columns, 17 MFLOP with both halves:
 * 2 % of the time of attention at 4 bits. It is a kernel of its own because 32 columns share a read
 * of the matrix; decode starts beside it and reads its first tiles meanwhile. With few columns, 8 to a
 * block take less time.
 */
#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/ring.cuh"

namespace {

constexpr int N_WARPS = 4;

__device__ float sum_lanes(float v)
{
    for (int i = 16; i > 0; i /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

__device__ float max_lanes(float v)
{
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(v))); /* v >= 0 */
}

/* Turns the query of one column and puts it there, divided by what is returned. */
template <int D, int N>
__device__ float load_column(const tqkvc_frames &p, uint32_t seq, uint32_t g, uint32_t frame, uint32_t row,
                             uint32_t column, uint32_t lane, tqkvc_columns<D, N> &columns, float *q_mean)
{
    const uint32_t group = p.shape.n_heads / p.shape.n_kv_heads;
    const size_t q = ((size_t)(seq * p.q_len + row / group) * p.shape.n_heads + g * group + row % group) * D;
    const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
    const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.mean[0]) + g * D;
    float a[D / 64], b[D / 64], dot = 0, largest = 0;

    for (int i = 0; i < D / 64; i++) {
        const tqkvc_pair pair = find_pair(p.shape, 32 * i + lane);
        const float x = load_value(p.q, q + pair.a, p.type), y = load_value(p.q, q + pair.b, p.type);
        float sine = 0, cosine = 1;
        if (pair.turns)
            turn_fast(inv_freq[32 * i + lane], (int32_t)(frame * p.frame_tokens), sine, cosine);
        a[i] = x * cosine + y * sine; /* by -base */
        b[i] = y * cosine - x * sine;
        dot += a[i] * mean[pair.a] + b[i] * mean[pair.b];
        largest = fmaxf(largest, fmaxf(fabsf(a[i]), fabsf(b[i])));
    }
    *q_mean = sum_lanes(dot);
    largest = fmaxf(max_lanes(largest), 1e-30f);
    for (int i = 0; i < D / 64; i++) {
        const tqkvc_pair pair = find_pair(p.shape, 32 * i + lane);
        columns.set(column, pair.a, a[i] / largest);
        columns.set(column, pair.b, b[i] / largest);
    }
    return largest;
}

template <int D, int N>
__global__ void __launch_bounds__(32 * N_WARPS) frames_kernel(const __grid_constant__ tqkvc_frames p)
{
    __shared__ tqkvc_columns<D, N> columns;
    __shared__ float factor[N];
    const uint32_t g = blockIdx.y, seq = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t length = max(p.seq_lens[seq], 0);
    const uint32_t n_frames = (length + p.frame_tokens - 1) / p.frame_tokens;
    const uint32_t n = min(n_frames, p.n_frames) * p.n_rows, first = blockIdx.x * N;
    const size_t place = (size_t)(seq * p.shape.n_kv_heads + g) * p.n_frames * p.n_rows;

    let_next_start();
    if (first >= n)
        return;
#pragma unroll 2
    for (uint32_t i = warp; i < N; i += N_WARPS) {
        const uint32_t column = min(first + i, n - 1); /* columns past the last repeat it */
        float q_mean;
        const float largest =
            load_column<D, N>(p, seq, g, column / p.n_rows, column % p.n_rows, i, lane, columns, &q_mean);
        if (lane == 0) {
            factor[i] = largest;
            p.q_mean[place + column] = q_mean;
        }
    }
    __syncthreads();

    const uint4 *matrix = reinterpret_cast<const uint4 *>(p.image + p.shape.parts.matrix[0]) + (size_t)g * D * D / 4;
    const float *row_scale = reinterpret_cast<const float *>(p.image + p.shape.parts.row_scale[0]) + g * D;
    for (uint32_t m = warp; m < D / 16; m += N_WARPS) {
        float c[N / 8][4];
        multiply_columns<D, N>(matrix, m, columns, lane, c);
        for (uint32_t i = 0; i < N / 8 * 4; i++) {
            const uint32_t column = i / 4 * 8 + lane % 4 * 2 + i % 2, j = m * 16 + lane / 4 + i % 4 / 2 * 8;
            if (first + column < n)
                p.coded[(place + first + column) * D + j] = c[i / 4][i % 4] * (row_scale[j] * factor[column]);
        }
    }
}

/* Blocks of 8 columns while those of 32 would not fill the device. */
template <int D> void launch(const tqkvc_frames &p, cudaStream_t stream)
{
    constexpr uint32_t BLOCKS_FEW = 512;
    const uint32_t n_columns = p.n_frames * p.n_rows, heads = p.shape.n_kv_heads * p.n_seqs;
    const bool few = (n_columns + 31) / 32 * heads < BLOCKS_FEW;
    const dim3 grid((n_columns + (few ? 7 : 31)) / (few ? 8 : 32), p.shape.n_kv_heads, p.n_seqs);

    if (few)
        frames_kernel<D, 8><<<grid, 32 * N_WARPS, 0, stream>>>(p);
    else
        frames_kernel<D, 32><<<grid, 32 * N_WARPS, 0, stream>>>(p);
}

} // namespace

extern "C" tqkv_status tqkvc_launch_frames(const tqkvc_frames *frames, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    switch (frames->shape.dim) {
    case 64:
        launch<64>(*frames, s);
        break;
    case 128:
        launch<128>(*frames, s);
        break;
    default:
        launch<256>(*frames, s);
        break;
    }
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
