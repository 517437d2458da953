/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queries of frames: q' = inverse R(-base) q for every frame of a sequence, as whole numbers.
 *
 * A block takes N = 8 or 32 columns, (frame, row) pairs of one sequence and KV head: turns them into
 * shared memory as two f16 each, multiplies them with the matrix of the head on tensor cores, and
 * writes operands for the tiers of the frame. It is a kernel of its own because 32 columns share a read
 * of the matrix; decode starts beside it and reads its first tiles meanwhile. With few columns, 8 to a
 * block take less time.
 */
#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/query.cuh"
#include "cuda/ring.cuh"

namespace
{

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

/* One row of queries before it is turned, and what its channels are turned by and multiplied with. */
template <int D> struct query_source {
    uint32_t row = ~0u;
    float a[D / 64], b[D / 64], mean_a[D / 64], mean_b[D / 64];
    double turns[D / 64]; /* of a pair a position, in whole turns */

    __device__ void load(const tqkvc_frames &p, uint32_t g, uint32_t new_row, uint32_t lane)
    {
        const uint32_t group = p.shape.n_heads / p.shape.n_kv_heads;
        const size_t q = ((size_t)(blockIdx.z * p.q_len + new_row / group) * p.shape.n_heads +
                          g * group + new_row % group) *
                         D;
        const float *mean =
            reinterpret_cast<const float *>(p.image + p.shape.parts.mean[0]) + g * D;
        const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);

        row = new_row;
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
            const tqkvc_pair pair = find_pair(p.shape, 32 * i + lane);
            a[i] = load_value(p.q, q + pair.a, p.type);
            b[i] = load_value(p.q, q + pair.b, p.type);
            mean_a[i] = mean[pair.a];
            mean_b[i] = mean[pair.b];
            turns[i] = pair.turns ? turns_per_position(inv_freq[32 * i + lane]) : 0.0;
        }
    }
};

/* Turns the row by -base and puts it into a column, divided by what is returned. */
template <int D, int N>
__device__ float load_column(const tqkvc_shape &shape, const query_source<D> &source, uint32_t base,
                             uint32_t column, uint32_t lane, tqkvc_columns<D, N> &columns,
                             float *q_mean)
{
    float a[D / 64], b[D / 64], dot = 0, largest = 0;

#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        float sine, cosine;
        turn_fast(source.turns[i], (int32_t)base, sine, cosine);
        a[i] = source.a[i] * cosine + source.b[i] * sine;
        b[i] = source.b[i] * cosine - source.a[i] * sine;
        dot += a[i] * source.mean_a[i] + b[i] * source.mean_b[i];
        largest = fmaxf(largest, fmaxf(fabsf(a[i]), fabsf(b[i])));
    }
    *q_mean = sum_lanes(dot);
    largest = fmaxf(max_lanes(largest), 1e-30f);
    const float inverse = 1.0f / largest;
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const tqkvc_pair pair = find_pair(shape, 32 * i + lane);
        columns.set(column, pair.a, a[i] * inverse);
        columns.set(column, pair.b, b[i] * inverse);
    }
    return largest;
}

/* Bit per tier that has tokens of the frame. */
__device__ uint32_t tiers_of(const tqkvc_frames &p, uint32_t frame, uint32_t length, uint32_t lane)
{
    const uint32_t each = p.frame_tokens / TQKV_CUDA_TILE_TOKENS;
    const uint32_t n =
        min((frame + 1) * each, (length + TQKV_CUDA_TILE_TOKENS - 1) / TQKV_CUDA_TILE_TOKENS);
    uint32_t found = 0;

    if (!p.tiers)
        return 1u << (p.shape.n_tiers - 1);
    for (uint32_t i = frame * each + lane; i < n; i += 32)
        found |= 1u << p.tiers[(size_t)blockIdx.z * p.tiers_stride + i];
    return __reduce_or_sync(0xffffffffu, found);
}

/* Operands of one column for the tiers of its frame. product: [D]. steps: of the tier used last. */
template <int D>
__device__ void write_column(const tqkvc_frames &p, uint32_t g, uint32_t frame, uint32_t row,
                             uint32_t length, const float *product, float factor, float q_mean,
                             uint32_t lane, tqkvc_query_steps<D> &steps)
{
    const tqkvc_layout *layouts =
        reinterpret_cast<const tqkvc_layout *>(p.image + p.shape.parts.layouts);
    const tqkvc_tables *tables = reinterpret_cast<const tqkvc_tables *>(p.image);
    const size_t place = ((size_t)blockIdx.z * p.shape.n_kv_heads + g) * p.n_frames + frame;
    const uint32_t tile = row / p.rows_per_tile, r = row % p.rows_per_tile;

    for (uint32_t left = tiers_of(p, frame, length, lane); left != 0; left &= left - 1) {
        const uint32_t tier = __ffs(left) - 1;
        const size_t at = (place * p.shape.n_tiers + tier) * p.n_row_tiles + tile;
        if (steps.tier != tier)
            steps.load(*tables, layouts[tier * p.shape.n_kv_heads + g].widths[0], tier, lane);
        tqkvc_query_row out = make_query<D>(product, steps, p.rows_per_tile, r, lane,
                                            p.operands + at * (p.rows_per_tile / 4) * D * 2);
        out.factor *= factor;
        out.mean = q_mean;
        if (lane == 0)
            p.rows[at * p.rows_per_tile + r] = out;
    }
}

/*
 * Loops over columns are not unrolled: straight code of eight columns is read once by each warp, and
 * fetching it took more time than running it.
 */
template <int D, int N>
__global__ void __launch_bounds__(32 * N_WARPS)
    frames_kernel(const __grid_constant__ tqkvc_frames p)
{
    __shared__ union {
        tqkvc_columns<D, N> columns;
        float products[N][D + 4];
    } memory;
    __shared__ float factors[N], q_means[N];
    const uint32_t g = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t length = max(p.seq_lens[blockIdx.z], 0);
    const uint32_t n_frames = (length + p.frame_tokens - 1) / p.frame_tokens;
    const uint32_t n = min(n_frames, p.n_frames) * p.n_rows, first = blockIdx.x * N;
    float c[D / 16 / N_WARPS][N / 8][4];
    query_source<D> source;
    tqkvc_query_steps<D> steps;

    let_next_start();
    if (first >= n)
        return;
#pragma unroll 1
    for (uint32_t i = warp; i < N; i += N_WARPS) {     /* mostly one row */
        const uint32_t column = min(first + i, n - 1); /* columns past the last repeat it */
        if (column % p.n_rows != source.row)
            source.load(p, g, column % p.n_rows, lane);
        float q_mean;
        const float factor = load_column<D, N>(p.shape, source, column / p.n_rows * p.frame_tokens,
                                               i, lane, memory.columns, &q_mean);
        if (lane == 0) {
            factors[i] = factor;
            q_means[i] = q_mean;
        }
    }
    __syncthreads();

    const uint4 *matrix =
        reinterpret_cast<const uint4 *>(p.image + p.shape.parts.matrix[0]) + (size_t)g * D * D / 4;
    const float *row_scale =
        reinterpret_cast<const float *>(p.image + p.shape.parts.row_scale[0]) + g * D;
#pragma unroll
    for (uint32_t m = 0; m < D / 16 / N_WARPS; m++)
        multiply_columns<D, N, N == 8 ? 8 : 2>(matrix, m * N_WARPS + warp, memory.columns, lane,
                                               c[m]);
    __syncthreads();
#pragma unroll
    for (uint32_t m = 0; m < D / 16 / N_WARPS; m++) {
        const uint32_t j = (m * N_WARPS + warp) * 16 + lane / 4;
        const float scale[2] = {row_scale[j], row_scale[j + 8]};
#pragma unroll
        for (uint32_t i = 0; i < N / 8 * 4; i++)
            memory.products[i / 4 * 8 + lane % 4 * 2 + i % 2][j + i % 4 / 2 * 8] =
                c[m][i / 4][i % 4] * scale[i % 4 / 2];
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = warp; i < min((uint32_t)N, n - first); i += N_WARPS)
        write_column<D>(p, g, (first + i) / p.n_rows, (first + i) % p.n_rows, length,
                        memory.products[i], factors[i], q_means[i], lane, steps);
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
