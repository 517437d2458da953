/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queries of frames: q' = inverse R(-base) q.
 *
 * The rows of a frame for each warp become columns in shared memory, as two f16 each; the block multiplies them
 * with the matrix of the head on tensor cores. Products stay in shared memory or go to the workspace, where blocks
 * that share a frame write the same; a warp makes whole numbers of them when it comes to a frame.
 * While this runs the block's first tiles are on their way.
 */
#ifndef TQKVC_FRAMES_CUH
#define TQKVC_FRAMES_CUH

#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/query.cuh"
#include "cuda/ring.cuh"

/* Frames [first_frame, end_frame) of a sequence, for one KV head and row tile. */
struct tqkvc_query_task {
    uint32_t seq, g, first_row, first_frame, end_frame;
};

/*
 * Products of the rows of the frames of a task. A unit is 16 floats in the order in which lanes take them: 2t, 2t + 8,
 * 2t + 1, 2t + 9 (lookup.cuh).
 */
template <int D> struct tqkvc_products {
    float *values; /* [frame, row][D / 16][16] */
    float *means;  /* [frame, row] turned row times mean of K */
};

/* A matrix of a head. The first units of 16 rows were fetched to shared memory, when the barrier says so. */
template <int D> struct tqkvc_matrix {
    const uint4 *all, *fetched;
    uint32_t n_fetched;
    uint64_t *barrier;

    __device__ __forceinline__ void wait() const
    {
        if (n_fetched > 0)
            ring_wait(barrier, 0);
    }

    __device__ __forceinline__ const uint4 *holder(uint32_t m) const
    {
        return m < n_fetched ? fetched : all;
    }
};

/* Shared memory. A column is a frame and a query row. */
template <int D, int N> struct tqkvc_query_memory {
    tqkvc_columns<D, N> columns;
    float factors[N];
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
    float inv_freq[N], mean[2 * N], sine[N], cosine[N];

    __device__ __forceinline__ void load(const tqkvc_frames &p, uint32_t g, uint32_t lane)
    {
        const float *means =
            reinterpret_cast<const float *>(p.image + p.shape.parts.mean[0]) + g * D;
        const float *inv_freqs = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const tqkvc_pair pair = find_pair(p.shape, 32 * i + lane);
            at[2 * i] = pair.a;
            at[2 * i + 1] = pair.b;
            mean[2 * i] = __ldg(means + pair.a);
            mean[2 * i + 1] = __ldg(means + pair.b);
            inv_freq[i] = pair.turns ? __ldg(inv_freqs + 32 * i + lane) : 0.0f;
        }
    }

    __device__ __forceinline__ void find_angles(uint32_t base)
    {
#pragma unroll
        for (int i = 0; i < N; i++)
            turn_fast(turns_per_position(inv_freq[i]), (int32_t)base, sine[i], cosine[i]);
    }
};

/* Rows of a row tile from `first` on, as a lane has them; past the last row it is there again. */
template <int D, int ROWS>
static __device__ __forceinline__ void
load_tile_rows(const tqkvc_frames &p, const tqkvc_query_task &task, uint32_t first,
               const tqkvc_turn<D> &turn, float (&q)[ROWS][2 * tqkvc_turn<D>::N])
{
    const uint32_t group = p.shape.n_heads / p.shape.n_kv_heads;
    size_t at[ROWS];

#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const uint32_t row = min(task.first_row + first + i, p.n_rows - 1), token = row / group;
        at[i] = ((size_t)(task.seq * p.q_len + token) * p.shape.n_heads + task.g * group + row -
                 token * group) *
                D;
    }
    load_rows(p.q, at, turn.at, p.type, q);
}

/*
 * Turns a row by -base and puts it into a column, divided by its largest value. Lane 0 gets its product with
 * the mean.
 */
template <int D, int N_COLUMNS>
static __device__ __forceinline__ float
put_row(const tqkvc_turn<D> &turn, const float (&q)[2 * tqkvc_turn<D>::N], uint32_t column,
        uint32_t lane, tqkvc_query_memory<D, N_COLUMNS> &memory)
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
    largest = max_lanes(largest);
    const float inverse = __fdividef(1.0f, largest);
#pragma unroll
    for (int i = 0; i < 2 * N; i++)
        memory.columns.set(column, turn.at[i], x[i] * inverse);
    if (lane == 0)
        memory.factors[column] = largest;
    return sum_lanes(dot);
}

/* Turns rows and puts them into columns from `column` on. means: of the first. One warp. */
template <int D, int ROWS, int N>
static __device__ __forceinline__ void
put_rows(const tqkvc_turn<D> &turn, const float (&q)[ROWS][2 * tqkvc_turn<D>::N], uint32_t column,
         uint32_t lane, tqkvc_query_memory<D, N> &memory, float *means)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float mean = put_row(turn, q[i], column + i, lane, memory);
        if (lane == 0)
            means[i] = mean;
    }
}

/* Products of the matrix with the columns, which are rows from first_row on of n_rows. */
template <int D, int N>
static __device__ __forceinline__ void
multiply_queries(const tqkvc_matrix<D> &matrix, const float *row_scale, uint32_t first_row,
                 uint32_t n_rows, const tqkvc_query_memory<D, N> &memory,
                 const tqkvc_products<D> &products)
{
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

#pragma unroll 1
    for (uint32_t m = warp; m < D / 16; m += TQKVC_WARPS) {
        const float scale[2] = {__ldg(row_scale + m * 16 + lane / 4),
                                __ldg(row_scale + m * 16 + lane / 4 + 8)};
        float c[N / 8][4];

        multiply_columns<false, false, 8>(matrix.holder(m), m, memory.columns, lane, c);
#pragma unroll
        for (uint32_t i = 0; i < N / 4; i++) {
            const uint32_t column = i / 2 * 8 + lane % 4 * 2 + i % 2, row = first_row + column;
            const float factor = memory.factors[column];
            if (row < n_rows)
                reinterpret_cast<float2 *>(products.values + (row * (D / 16) + m) * 16)[lane / 4] =
                    make_float2(c[i / 2][i % 2] * scale[0] * factor,
                                c[i / 2][i % 2 + 2] * scale[1] * factor);
        }
    }
}

/*
 * The queries of a task, by all threads of a block. A pass makes a frame for each warp; one frame is made by all of
 * them, each with EACH rows, which are loaded before anything is known of the sequence.
 */
template <int D, int R> struct tqkvc_query_maker {
    static constexpr uint32_t EACH = R / TQKVC_WARPS;
    tqkvc_turn<D> turn;
    float q[EACH][2 * tqkvc_turn<D>::N];

    __device__ __forceinline__ void load(const tqkvc_frames &p, const tqkvc_query_task &task)
    {
        turn.load(p, task.g, threadIdx.x % 32);
        load_tile_rows<D>(p, task, threadIdx.x / 32 * EACH, turn, q);
    }

    __device__ __forceinline__ void run(const tqkvc_frames &p, const tqkvc_query_task &task,
                                        const tqkvc_matrix<D> &matrix,
                                        const tqkvc_products<D> &products, void *memory)
    {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint32_t n_frames = task.end_frame - task.first_frame;
        const float *row_scale =
            reinterpret_cast<const float *>(p.image + p.shape.parts.row_scale[0]) + task.g * D;

        if (n_frames == 1) {
            auto &columns = *static_cast<tqkvc_query_memory<D, 8> *>(memory);
            turn.find_angles(task.first_frame * p.frame_tokens);
            put_rows(turn, q, warp * EACH, lane, columns, products.means + warp * EACH);
            matrix.wait();
            __syncthreads();
            multiply_queries(matrix, row_scale, 0, R, columns, products);
            return;
        }
        auto &columns = *static_cast<tqkvc_query_memory<D, TQKVC_WARPS * R> *>(memory);
        matrix.wait();
#pragma unroll 1
        for (uint32_t done = 0; done < n_frames; done += TQKVC_WARPS) {
            if (done > 0)
                __syncthreads(); /* columns were read */
            if (done + warp < n_frames) {
                turn.find_angles((task.first_frame + done + warp) * p.frame_tokens);
#pragma unroll 1
                for (uint32_t r = 0; r < R; r += 4) {
                    float rows[4][2 * tqkvc_turn<D>::N];
                    load_tile_rows<D>(p, task, r, turn, rows);
                    put_rows(turn, rows, warp * R + r, lane, columns,
                             products.means + (done + warp) * R + r);
                }
            }
            __syncthreads();
            multiply_queries(matrix, row_scale, done * R, n_frames * R, columns, products);
        }
    }
};

#endif /* TQKVC_FRAMES_CUH */
