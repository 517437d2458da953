/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queries of frames: q' = inverse R(-base) q for every frame of a sequence, as whole numbers.
 *
 * A block takes N = 8, 16 or 32 columns, (sequence, frame, row), of one KV head: turns them into
 * shared memory as two f16 each, multiplies them with the matrix of the head on tensor cores, and
 * writes operands for the tiers of the frame. It is a kernel of its own because 32 columns share a read
 * of the matrix. Decode starts beside it and reads its first tiles meanwhile.
 */
#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/query.cuh"
#include "cuda/ring.cuh"

namespace
{

constexpr uint32_t N_WARPS = 8;

/* A column: frame and query row of a sequence; whether the sequence has that frame. */
struct column_place {
    uint32_t seq, frame, row, length;
    bool there;
};

__device__ column_place find_column(const tqkvc_frames &p, uint32_t column)
{
    const uint32_t n = p.n_frames * p.n_rows;
    column_place c = {.seq = min(column / n, p.n_seqs - 1),
                      .frame = column % n / p.n_rows,
                      .row = column % p.n_rows};
    c.length = max(p.seq_lens[c.seq], 0);
    c.there = column < n * p.n_seqs && (uint64_t)c.frame * p.frame_tokens < c.length;
    return c;
}

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
    uint32_t seq = ~0u, row = ~0u;
    float a[D / 64], b[D / 64], mean_a[D / 64], mean_b[D / 64];
    double turns[D / 64]; /* of a pair a position, in whole turns */

    __device__ void load(const tqkvc_frames &p, uint32_t g, const column_place &c, uint32_t lane)
    {
        const uint32_t group = p.shape.n_heads / p.shape.n_kv_heads;
        const size_t q = (((size_t)c.seq * p.q_len + c.row / group) * p.shape.n_heads + g * group +
                          c.row % group) *
                         D;
        const float *mean =
            reinterpret_cast<const float *>(p.image + p.shape.parts.mean[0]) + g * D;
        const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);

        seq = c.seq;
        row = c.row;
        size_t at[D / 32];
        float values[D / 32];
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
            const tqkvc_pair pair = find_pair(p.shape, 32 * i + lane);
            at[2 * i] = q + pair.a;
            at[2 * i + 1] = q + pair.b;
            mean_a[i] = mean[pair.a];
            mean_b[i] = mean[pair.b];
            turns[i] = pair.turns ? turns_per_position(inv_freq[32 * i + lane]) : 0.0;
        }
        load_values(p.q, at, p.type, values);
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
            a[i] = values[2 * i];
            b[i] = values[2 * i + 1];
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
__device__ uint32_t tiers_of(const tqkvc_frames &p, const column_place &c, uint32_t lane)
{
    const uint32_t each = p.frame_tokens / TQKV_CUDA_TILE_TOKENS;
    const uint32_t n =
        min((c.frame + 1) * each, (c.length + TQKV_CUDA_TILE_TOKENS - 1) / TQKV_CUDA_TILE_TOKENS);
    uint32_t found = 0;

    if (!p.tiers)
        return 1u << (p.shape.n_tiers - 1);
    for (uint32_t i = c.frame * each + lane; i < n; i += 32)
        found |= 1u << p.tiers[(size_t)c.seq * p.tiers_stride + i];
    return __reduce_or_sync(0xffffffffu, found);
}

/* Operands of one column for the tiers of its frame. product: [D]. steps: of the tier used last. */
template <int D>
__device__ void write_column(const tqkvc_frames &p, uint32_t g, const column_place &c,
                             const float *product, float factor, float q_mean, uint32_t lane,
                             tqkvc_query_steps<D> &steps)
{
    const tqkvc_layout *layouts =
        reinterpret_cast<const tqkvc_layout *>(p.image + p.shape.parts.layouts);
    const tqkvc_tables *tables = reinterpret_cast<const tqkvc_tables *>(p.image);
    const size_t place = ((size_t)c.seq * p.shape.n_kv_heads + g) * p.n_frames + c.frame;
    const uint32_t tile = c.row / p.rows_per_tile, r = c.row % p.rows_per_tile;

    for (uint32_t left = tiers_of(p, c, lane); left != 0; left &= left - 1) {
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
    constexpr uint32_t TILES =
        (D / 16 + N_WARPS - 1) / N_WARPS; /* 16 rows of the matrix, of a warp */
    const uint32_t g = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32,
                   first = blockIdx.x * N;
    float c[TILES][N / 8][4];
    query_source<D> source;
    tqkvc_query_steps<D> steps;

    /* Decode reads pages before it waits for this kernel: they, too, must be there when it starts. */
    wait_for_previous();
    let_next_start();
    if (!__syncthreads_or(find_column(p, first + lane % N).there))
        return;
#pragma unroll 1
    for (uint32_t i = warp; i < N; i += N_WARPS) { /* mostly one row */
        const column_place column = find_column(p, first + i);
        if (column.seq != source.seq || column.row != source.row)
            source.load(p, g, column, lane);
        float q_mean;
        const float factor = load_column<D, N>(p.shape, source, column.frame * p.frame_tokens, i,
                                               lane, memory.columns, &q_mean);
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
    for (uint32_t i = 0; i < TILES; i++)
        if (i * N_WARPS + warp < D / 16)
            multiply_columns<false, N == 8 ? 8 : 2>(matrix, i * N_WARPS + warp, memory.columns,
                                                    lane, c[i]);
    __syncthreads();
#pragma unroll
    for (uint32_t m = 0; m < TILES; m++) {
        const uint32_t j = (m * N_WARPS + warp) * 16 + lane / 4;
        if (j >= D)
            continue;
        const float scale[2] = {row_scale[j], row_scale[j + 8]};
#pragma unroll
        for (uint32_t i = 0; i < N / 8 * 4; i++)
            memory.products[i / 4 * 8 + lane % 4 * 2 + i % 2][j + i % 4 / 2 * 8] =
                c[m][i / 4][i % 4] * scale[i % 4 / 2];
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = warp; i < N; i += N_WARPS) {
        const column_place column = find_column(p, first + i);
        if (column.there)
            write_column<D>(p, g, column, memory.products[i], factors[i], q_means[i], lane, steps);
    }
}

/* The fewest columns a block with which there are not too many reads of the matrix; at most 32. */
template <int D> cudaError_t launch(const tqkvc_frames &p, cudaStream_t stream)
{
    constexpr uint32_t BLOCKS_FEW = 600;
    const uint32_t n_columns = p.n_frames * p.n_rows * p.n_seqs;
    uint32_t n = 8;

    while (n < 32 && (n_columns + n - 1) / n * p.shape.n_kv_heads > BLOCKS_FEW)
        n *= 2;
    const dim3 grid((n_columns + n - 1) / n, p.shape.n_kv_heads);
    return launch_beside(n == 8    ? frames_kernel<D, 8>
                         : n == 16 ? frames_kernel<D, 16>
                                   : frames_kernel<D, 32>,
                         grid, 32 * N_WARPS, 0, stream, p);
}

} // namespace

extern "C" tqkv_status tqkvc_launch_frames(const tqkvc_frames *frames, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    const cudaError_t error = frames->shape.dim == 64    ? launch<64>(*frames, s)
                              : frames->shape.dim == 128 ? launch<128>(*frames, s)
                                                         : launch<256>(*frames, s);
    (void)cudaGetLastError();
    return error == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
