/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Step 3 of "Encoding a row" of docs/FORMAT.md for all rows of a block. The order of sums is part of the
 * format, so a channel is D fused multiply-adds in f32, one after another: there is nothing here for
 * tensor cores. The matrix passes through shared memory, all of it at once where rows are few. A thread
 * has a tile of 8 x 8 rows and channels where rows are many, otherwise one channel of all rows.
 */
#ifndef TQKVC_TRANSFORM_CUH
#define TQKVC_TRANSFORM_CUH

#include "cuda/copies.cuh"
#include "cuda/encode_row.cuh"

/*
 * What a block of store is, for heads of D channels. Few rows: 1 or 8; many: 64 or 128, a tile of 8 x 8 a
 * thread. Strides leave no conflicts of banks.
 */
template <int D, int ROWS> struct tqkvc_store_shape {
    static constexpr bool IS_MANY = ROWS > 8;
    static constexpr int THREADS = IS_MANY ? ROWS * D / 64 : ROWS == 1 && D < 256 ? 128 : 256;
    static constexpr int BLOCKS = /* of a multiprocessor */
        !IS_MANY ? (ROWS == 8 && D < 256 ? 2 : 1) : D == 128 ? 4 : D == 64 ? 3 : 2;
    static constexpr int OCTETS = THREADS / 8;
    static constexpr int OF_ROW = OCTETS > ROWS ? OCTETS / ROWS : 1; /* octets, if a block has one tier */
    /*
     * Tiers that a block may have, and those under way at once. Rows of latents share one place for levels; many rows of
     * 256 channels have no registers for a loop over tiers.
     */
    static constexpr int TIERS_MAX = D > 256 || (D == 256 && IS_MANY) ? 1 : 4;
    static constexpr int TIERS = IS_MANY ? 1 : TIERS_MAX;
    static constexpr bool IS_DIRECT = ROWS == 1 && D > 256; /* the matrix does not pass through shared memory */
    static constexpr int CHANNELS = IS_MANY || D <= THREADS ? 1 : D / THREADS; /* of a thread that has no tile */
    static constexpr int STEP = IS_MANY ? 8 : 4096 / D; /* rows of the matrix in a stage */
    static constexpr int STEPS = D / STEP;
    static constexpr int STAGES = IS_MANY ? 2 : STEPS < 4 ? STEPS : 4;
    static constexpr int STAGE_BYTES = STEP * D * 4;
    static constexpr int Z_STRIDE = IS_MANY ? ROWS + 4 : ROWS;
    static constexpr int Y_STRIDE = D + 8;
};

/* By all threads of the block. */
static __device__ __forceinline__ void copy_block(void *to, const void *from, uint32_t n_bytes)
{
    for (uint32_t i = 16 * threadIdx.x; i < n_bytes; i += 16 * blockDim.x)
        copy_16(static_cast<uint8_t *>(to) + i, static_cast<const uint8_t *>(from) + i);
}

template <int D, int ROWS> struct tqkvc_transform {
    using shape = tqkvc_store_shape<D, ROWS>;

    /* A matrix on its way, STEP rows at a time. */
    float (&stages)[shape::STAGES][shape::STEP * D];
    const float *matrix; /* [D][D] */

    /* A group, also where no rows are left. */
    __device__ __forceinline__ void fetch(int step)
    {
        if (step < shape::STEPS)
            copy_block(stages[step % shape::STAGES], matrix + (size_t)step * shape::STEP * D,
                       shape::STAGE_BYTES);
        copy_commit();
    }

    /* All stages but the last are groups of their own; what is copied next goes with that one. */
    __device__ __forceinline__ void start()
    {
        if constexpr (!shape::IS_DIRECT) {
            for (int step = 0; step < shape::STAGES - 1; step++)
                fetch(step);
            copy_block(stages[shape::STAGES - 1], matrix + (size_t)(shape::STAGES - 1) * shape::STEP * D,
                       shape::STAGE_BYTES);
        }
    }

    /* Calls add(rows of the matrix, number of the first) for one stage after the other. */
    template <typename ADD> __device__ __forceinline__ void for_each_step(ADD add)
    {
#pragma unroll 1
        for (int step = 0; step < shape::STEPS; step++) {
            copy_wait<shape::STAGES - 1>();
            __syncthreads();
            add(stages[step % shape::STAGES], step * shape::STEP);
            if (shape::STEPS > shape::STAGES) {
                __syncthreads();
                fetch(step + shape::STAGES);
            } else {
                copy_commit(); /* an empty group: the next stage is waited for as the others are */
            }
        }
        __syncthreads();
    }

    /* z: [D][Z_STRIDE], y: [ROWS][Y_STRIDE], which may be the same memory. */
    __device__ __forceinline__ void multiply(const float *z, float *y)
    {
        if constexpr (shape::IS_MANY)
            multiply_tiles(z, y);
        else if constexpr (shape::IS_DIRECT)
            multiply_directly(z, y);
        else
            multiply_channels(z, y);
        __syncthreads();
    }

    /* A thread has CHANNELS channels, THREADS apart, of all rows, which are 1 or 8. */
    __device__ __forceinline__ void multiply_channels(const float *z, float *y)
    {
        constexpr int CHANNELS = shape::CHANNELS;
        const uint32_t d = threadIdx.x;
        float sum[CHANNELS][ROWS] = {};

        for_each_step([&](const float *m, int first) {
            if (d >= D)
                return;
#pragma unroll 8
            for (int i = 0; i < shape::STEP; i++) {
                float rows[ROWS];
                if constexpr (ROWS == 1) {
                    rows[0] = z[first + i];
                } else {
                    load_4(z + (first + i) * ROWS, rows);
                    load_4(z + (first + i) * ROWS + 4, rows + 4);
                }
#pragma unroll
                for (int c = 0; c < CHANNELS; c++) {
                    const float factor = m[i * D + c * shape::THREADS + d];
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        sum[c][r] = __fmaf_rn(factor, rows[r], sum[c][r]);
                }
            }
        });
        if (d < D)
#pragma unroll
            for (int i = 0; i < CHANNELS * ROWS; i++)
                y[i % ROWS * shape::Y_STRIDE + i / ROWS * shape::THREADS + d] = sum[i / ROWS][i % ROWS];
    }

    /* One row, so that nothing of the matrix is read twice: a thread has two channels, and many loads on their way. */
    __device__ __forceinline__ void multiply_directly(const float *z, float *y)
    {
        const float2 *of_thread = reinterpret_cast<const float2 *>(matrix) + threadIdx.x;
        float2 sum = {};

        static_assert(shape::CHANNELS == 2 || !shape::IS_DIRECT, "two channels");
        copy_wait<0>();
        __syncthreads();
#pragma unroll 32
        for (int i = 0; i < D; i++) {
            const float2 factors = __ldg(of_thread + i * (D / 2));
            sum.x = __fmaf_rn(factors.x, z[i], sum.x);
            sum.y = __fmaf_rn(factors.y, z[i], sum.y);
        }
        __syncthreads(); /* y may be where z is */
        *reinterpret_cast<float2 *>(y + 2 * threadIdx.x) = sum;
    }

    /*
     * A warp has 32 rows and 64 channels, in halves that are ROWS / 2 and D / 2 apart: four rows and four
     * channels of each half are a thread's.
     */
    __device__ __forceinline__ void multiply_tiles(const float *z, float *y)
    {
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const uint32_t d = 4 * (warp % (D / 64) * 8 + lane % 8),
                       row = 4 * (warp / (D / 64) * 4 + lane / 8);
        float sum[8][8] = {};

        for_each_step([&](const float *m, int first) {
#pragma unroll 4
            for (int i = 0; i < shape::STEP; i++) {
                const float *of_i = z + (first + i) * shape::Z_STRIDE + row;
                float factors[8], rows[8];
                load_4(m + i * D + d, factors);
                load_4(m + i * D + d + D / 2, factors + 4);
                load_4(of_i, rows);
                load_4(of_i + ROWS / 2, rows + 4);
#pragma unroll
                for (int r = 0; r < 8; r++)
#pragma unroll
                    for (int c = 0; c < 8; c++)
                        sum[r][c] = __fmaf_rn(factors[c], rows[r], sum[r][c]);
            }
        });
#pragma unroll
        for (int r = 0; r < 8; r++) {
            float *of_row = y + (row + r % 4 + r / 4 * (ROWS / 2)) * shape::Y_STRIDE + d;
#pragma unroll
            for (int h = 0; h < 2; h++)
                *reinterpret_cast<float4 *>(of_row + h * (D / 2)) = make_float4(
                    sum[r][4 * h], sum[r][4 * h + 1], sum[r][4 * h + 2], sum[r][4 * h + 3]);
        }
    }

    static __device__ __forceinline__ void load_4(const float *from, float *to)
    {
        const float4 v = *reinterpret_cast<const float4 *>(from);
        to[0] = v.x;
        to[1] = v.y;
        to[2] = v.z;
        to[3] = v.w;
    }
};

/*
 * The same of one row by an octet, where the matrix is Walsh-Hadamard times the factors in its first
 * column. Channel d of the row is at z[stride * d]; y is that of this lane.
 */
template <int D>
static __device__ __forceinline__ void butterflies(const float *__restrict__ matrix, const float *z,
                                                   uint32_t stride, float (&y)[D / 16][2])
{
    const uint32_t lane = octet_lane();

#pragma unroll
    for (int u = 0; u < D / 16; u++) {
        const uint32_t d = 16 * u + 2 * lane;
        const float a = mul(__ldg(matrix + d * D), z[stride * d]),
                    b = mul(__ldg(matrix + (d + 1) * D), z[stride * (d + 1)]);
        y[u][0] = add(a, b);
        y[u][1] = add(a, -b);
        for (uint32_t n = 1; n < 8; n *= 2)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float other = __shfl_xor_sync(TQKVC_FULL, y[u][i], n);
                y[u][i] = add(other, lane & n ? -y[u][i] : y[u][i]);
            }
    }
#pragma unroll
    for (int n = 1; n < D / 16; n *= 2)
#pragma unroll
        for (int u = 0; u < D / 16; u++) {
            if (u & n)
                continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float a = y[u][i], b = y[u + n][i];
                y[u][i] = add(a, b);
                y[u + n][i] = add(a, -b);
            }
        }
}

#endif /* TQKVC_TRANSFORM_CUH */
