/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queries of frames: q' = inverse R(-base) q for the frames of a block of decode, as whole numbers.
 *
 * The rows of a frame for each warp become columns in shared memory, as two f16 each; the block multiplies them
 * with the matrix of the head on tensor cores and writes operands for the tiers of the frames. Blocks
 * that share a frame write the same. While this runs the block's first tiles are on their way.
 */
#ifndef TQKVC_FRAMES_CUH
#define TQKVC_FRAMES_CUH

#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/query.cuh"

/* Frames [first_frame, end_frame) of a sequence, for one KV head and row tile. */
struct tqkvc_query_task {
    uint32_t seq, g, row_tile, length, first_frame, end_frame;
};

/* Shared memory. A column is a frame and a query row. */
template <int D, int R> struct tqkvc_query_memory {
    static constexpr int N = TQKVC_WARPS * R;
    union {
        tqkvc_columns<D, N> columns;
        float products[N][D + 4];
    };
    float factors[N], q_means[N];
};

static __device__ __forceinline__ float sum_lanes(float v)
{
    for (int i = 16; i > 0; i /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

static __device__ __forceinline__ float max_lanes(float v)
{
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(v))); /* v >= 0 */
}

/* What the rows of a frame are turned by and multiplied with, of a lane. */
template <int D> struct tqkvc_turn {
    static constexpr int N = D / 64; /* pairs of a lane */
    uint32_t at[2 * N];              /* their channels */
    float sine[N], cosine[N], mean[2 * N];

    __device__ __forceinline__ void find_channels(const tqkvc_frames &p, uint32_t lane)
    {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const tqkvc_pair pair = find_pair(p.shape, 32 * i + lane);
            at[2 * i] = pair.a;
            at[2 * i + 1] = pair.b;
        }
    }

    __device__ __forceinline__ void load(const tqkvc_frames &p, uint32_t g, uint32_t base,
                                         uint32_t lane)
    {
        const float *means =
            reinterpret_cast<const float *>(p.image + p.shape.parts.mean[0]) + g * D;
        const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bool turns = find_pair(p.shape, 32 * i + lane).turns;
            mean[2 * i] = __ldg(means + at[2 * i]);
            mean[2 * i + 1] = __ldg(means + at[2 * i + 1]);
            turn_fast(turns ? turns_per_position(__ldg(inv_freq + 32 * i + lane)) : 0.0,
                      (int32_t)base, sine[i], cosine[i]);
        }
    }
};

/* Turns a row by -base and puts it into a column, divided by its largest value. */
template <int D, int R>
static __device__ __forceinline__ void
put_row(const tqkvc_turn<D> &turn, const float (&q)[2 * tqkvc_turn<D>::N], uint32_t column,
        uint32_t lane, tqkvc_query_memory<D, R> &memory)
{
    constexpr int N = tqkvc_turn<D>::N;
    float x[2 * N], dot = 0, largest = 1e-30f;

#pragma unroll
    for (int i = 0; i < N; i++) {
        x[2 * i] = q[2 * i] * turn.cosine[i] + q[2 * i + 1] * turn.sine[i];
        x[2 * i + 1] = q[2 * i + 1] * turn.cosine[i] - q[2 * i] * turn.sine[i];
    }
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
        dot += x[i] * turn.mean[i];
        largest = fmaxf(largest, fabsf(x[i]));
    }
    dot = sum_lanes(dot);
    largest = max_lanes(largest);
    const float inverse = __fdividef(1.0f, largest);
#pragma unroll
    for (int i = 0; i < 2 * N; i++)
        memory.columns.set(column, turn.at[i], x[i] * inverse);
    if (lane == 0) {
        memory.factors[column] = largest;
        memory.q_means[column] = dot;
    }
}

/* What a warp makes of the queries of a pass: rows [first_row, end_row) of a frame; columns of frames follow. */
struct tqkvc_query_part {
    uint32_t frame, column, first_row, end_row;
};

/* Rows of a frame to columns; past the last row it is there again. ROWS: at once. One warp. */
template <int D, int R, int ROWS>
static __device__ __forceinline__ void
put_frame(const tqkvc_frames &p, const tqkvc_query_task &task, const tqkvc_query_part &part,
          uint32_t lane, tqkvc_query_memory<D, R> &memory)
{
    const uint32_t group = p.shape.n_heads / p.shape.n_kv_heads;
    tqkvc_turn<D> turn;

    turn.find_channels(p, lane);
#pragma unroll 1
    for (uint32_t r = part.first_row; r < part.end_row; r += ROWS) {
        size_t at[ROWS];
        float q[ROWS][2 * tqkvc_turn<D>::N];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const uint32_t row = min(task.row_tile * R + r + i, p.n_rows - 1), token = row / group;
            at[i] = ((size_t)(task.seq * p.q_len + token) * p.shape.n_heads + task.g * group + row -
                     token * group) *
                    D;
        }
        load_rows(p.q, at, turn.at, p.type, q);
        if (r == part.first_row) /* while those are on their way */
            turn.load(p, task.g, part.frame * p.frame_tokens, lane);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            put_row<D, R>(turn, q[i], part.column + r + i, lane, memory);
    }
}

/* Bit per tier that has tokens of the frame. */
static __device__ __forceinline__ uint32_t tiers_of(const tqkvc_frames &p,
                                                    const tqkvc_query_task &task, uint32_t frame,
                                                    uint32_t lane)
{
    const uint32_t each = p.frame_tokens / TQKV_CUDA_TILE_TOKENS;
    const uint32_t n =
        min((frame + 1) * each, (task.length + TQKV_CUDA_TILE_TOKENS - 1) / TQKV_CUDA_TILE_TOKENS);
    uint32_t found = 0;

    if (!p.tiers)
        return 1u << (p.shape.n_tiers - 1);
    for (uint32_t i = frame * each + lane; i < n; i += 32)
        found |= 1u << p.tiers[(size_t)task.seq * p.tiers_stride + i];
    return __reduce_or_sync(0xffffffffu, found);
}

template <int D>
static __device__ __forceinline__ void load_steps(const tqkvc_frames &p, uint32_t g, uint32_t tier,
                                                  uint32_t lane, tqkvc_query_steps<D> &steps)
{
    const tqkvc_layout *layouts =
        reinterpret_cast<const tqkvc_layout *>(p.image + p.shape.parts.layouts);
    const tqkvc_tables *tables = reinterpret_cast<const tqkvc_tables *>(p.image);

    steps.load(*tables, layouts[tier * p.shape.n_kv_heads + g].widths[0], tier, lane);
}

/* Operands of rows of a frame for its tiers. steps: of the tier used last. One warp. */
template <int D, int R, int ROWS>
static __device__ __forceinline__ void
write_frame(const tqkvc_frames &p, const tqkvc_query_task &task, const tqkvc_query_part &part,
            uint32_t lane, const tqkvc_query_memory<D, R> &memory, tqkvc_query_steps<D> &steps)
{
    const size_t place = ((size_t)task.seq * p.shape.n_kv_heads + task.g) * p.n_frames + part.frame;

#pragma unroll 1
    for (uint32_t left = tiers_of(p, task, part.frame, lane); left != 0; left &= left - 1) {
        const uint32_t tier = __ffs(left) - 1;
        const size_t at = (place * p.shape.n_tiers + tier) * p.n_row_tiles + task.row_tile;
        if (steps.tier != tier)
            load_steps(p, task.g, tier, lane, steps);
#pragma unroll 1
        for (uint32_t first = part.first_row; first < part.end_row; first += ROWS) {
#pragma unroll
            for (uint32_t i = 0; i < ROWS; i++) {
                const uint32_t r = first + i, column = part.column + r;
                tqkvc_query_row row = make_query<D>(memory.products[column], steps, R, r, lane,
                                                    p.operands + at * (R / 4) * D * 2);
                row.factor *= memory.factors[column];
                row.mean = memory.q_means[column];
                if (lane == 0)
                    p.rows[at * R + r] = row;
            }
        }
    }
}

/* Products of the matrix with the columns, to where those were. */
template <int D, int R>
static __device__ __forceinline__ void multiply_queries(const tqkvc_frames &p, uint32_t g,
                                                        uint32_t warp, uint32_t lane,
                                                        tqkvc_query_memory<D, R> &memory)
{
    constexpr int N = tqkvc_query_memory<D, R>::N, TILES = D / 16 / TQKVC_WARPS;
    const uint4 *matrix =
        reinterpret_cast<const uint4 *>(p.image + p.shape.parts.matrix[0]) + (size_t)g * D * D / 4;
    const float *row_scale =
        reinterpret_cast<const float *>(p.image + p.shape.parts.row_scale[0]) + g * D;
    float c[TILES][N / 8][4], scale[TILES][2];

#pragma unroll
    for (uint32_t m = 0; m < TILES; m++) {
        const uint32_t j = (m * TQKVC_WARPS + warp) * 16 + lane / 4;
        scale[m][0] = __ldg(row_scale + j);
        scale[m][1] = __ldg(row_scale + j + 8);
        multiply_columns<false, 4>(matrix, m * TQKVC_WARPS + warp, memory.columns, lane, c[m]);
    }
    __syncthreads();
#pragma unroll
    for (uint32_t m = 0; m < TILES; m++) {
        const uint32_t j = (m * TQKVC_WARPS + warp) * 16 + lane / 4;
#pragma unroll
        for (uint32_t i = 0; i < N / 8 * 4; i++)
            memory.products[i / 4 * 8 + lane % 4 * 2 + i % 2][j + i % 4 / 2 * 8] =
                c[m][i / 4][i % 4] * scale[m][i % 4 / 2];
    }
}

/* All threads of a block. A pass makes a frame for each warp, or one frame for all of them. */
template <int D, int R>
static __device__ __forceinline__ void
make_queries(const tqkvc_frames &p, const tqkvc_query_task &task, tqkvc_query_memory<D, R> &memory)
{
    constexpr uint32_t EACH = R / TQKVC_WARPS;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool alone = task.end_frame - task.first_frame == 1;
    tqkvc_query_steps<D> steps;
    tqkvc_query_part part = {task.first_frame, 0, warp * EACH, (warp + 1) * EACH};

    load_steps(p, task.g, p.shape.n_tiers - 1, lane, steps); /* mostly the only one */
    if (!alone)
        part = {task.first_frame + warp, warp * R, 0, R};
#pragma unroll 1
    for (uint32_t start = task.first_frame; start < task.end_frame; start += TQKVC_WARPS) {
        const bool here = part.frame < task.end_frame;
        if (alone)
            put_frame<D, R, EACH>(p, task, part, lane, memory);
        else if (here)
            put_frame<D, R, 4>(p, task, part, lane, memory);
        __syncthreads();
        multiply_queries<D, R>(p, task.g, warp, lane, memory);
        __syncthreads();
        if (alone)
            write_frame<D, R, EACH>(p, task, part, lane, memory, steps);
        else if (here)
            write_frame<D, R, 4>(p, task, part, lane, memory, steps);
        __syncthreads();
        part.frame += TQKVC_WARPS;
    }
}

#endif /* TQKVC_FRAMES_CUH */
