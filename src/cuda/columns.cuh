/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products of the matrix of a KV head (image.h) with columns in shared memory: queries of a frame,
 * sums of values, rows of codes. Columns are sums of two f16 each. With both parts of the matrix the product leaves out
 * low times low and is good to about 2^-21 of its largest term, with the high one alone to 2^-12 of each term.
 */
#ifndef TQKVC_COLUMNS_CUH
#define TQKVC_COLUMNS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/image.h"
#include "cuda/mma.cuh"

/* N columns of D values. The pad of 8 puts the eight columns that a warp reads into different banks. */
template <int D, int N> struct tqkvc_columns {
    __half high[N][D + 8], low[N][D + 8];

    __device__ __forceinline__ void set(uint32_t column, uint32_t i, float v)
    {
        high[column][i] = __float2half_rn(v);
        low[column][i] = __float2half_rn(v - __half2float(high[column][i]));
    }
};

static __device__ __forceinline__ uint32_t transposed(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* An operand of 16 x 16. */
static __device__ __forceinline__ uint4 transposed(const uint4 &x)
{
    return make_uint4(transposed(x.x), transposed(x.z), transposed(x.y), transposed(x.w));
}

/*
 * Rows 16 m .. 16 m + 15 of matrix, or of the transposed matrix, times all columns: c[n] is the product
 * with columns 8 n .. 8 n + 7. BOTH: parts of the matrix.
 */
template <bool TRANSPOSED, bool BOTH, int UNROLL, int D, int N>
static __device__ __forceinline__ void
multiply_columns(const uint4 *matrix, uint32_t m, const tqkvc_columns<D, N> &columns,
                 uint32_t lane, float (&c)[N / 8][4])
{
    const uint32_t g = lane / 4, t = lane % 4;

    float small[1 + BOTH][N / 8][4] = {}; /* chains of products of their own */

#pragma unroll
    for (uint32_t n = 0; n < N / 8; n++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            c[n][i] = 0.0f;
#pragma unroll UNROLL
    for (uint32_t k = 0; k < D / 16; k++) {
        const uint32_t at = TRANSPOSED ? k * (D / 16) + m : m * (D / 16) + k;
        const uint4 *operand = matrix + (size_t)at * 32 + lane;
        uint4 high = operand[0], low = {};
        if (BOTH)
            low = operand[D * D / 8];
        if (TRANSPOSED) {
            high = transposed(high);
            low = transposed(low);
        }
#pragma unroll
        for (uint32_t n = 0; n < N / 8; n++) {
            const uint32_t *b_high =
                reinterpret_cast<const uint32_t *>(&columns.high[8 * n + g][16 * k + 2 * t]);
            const uint32_t *b_low =
                reinterpret_cast<const uint32_t *>(&columns.low[8 * n + g][16 * k + 2 * t]);
            multiply_f16(c[n], high, b_high[0], b_high[4]);
            multiply_f16(small[0][n], high, b_low[0], b_low[4]);
            if constexpr (BOTH)
                multiply_f16(small[1][n], low, b_high[0], b_high[4]);
        }
    }
#pragma unroll
    for (uint32_t n = 0; n < N / 8; n++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            c[n][i] += BOTH ? small[0][n][i] + small[BOTH][n][i] : small[0][n][i];
}

static __device__ __forceinline__ float load_value(const void *p, size_t i, tqkv_cuda_type type)
{
    if (type == TQKV_CUDA_F32)
        return static_cast<const float *>(p)[i];
    if (type == TQKV_CUDA_F16)
        return __half2float(static_cast<const __half *>(p)[i]);
    return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
}

/* Values at[..] of several rows, which start at values row[..]; their loads do not wait for each other. */
template <int ROWS, int K>
static __device__ __forceinline__ void load_rows(const void *p, const size_t (&row)[ROWS],
                                                 const uint32_t (&at)[K], tqkv_cuda_type type,
                                                 float (&out)[ROWS][K])
{
    if (type == TQKV_CUDA_F32) {
#pragma unroll
        for (int i = 0; i < ROWS * K; i++)
            out[i / K][i % K] = (static_cast<const float *>(p) + row[i / K])[at[i % K]];
        return;
    }
    uint16_t halves[ROWS][K];
#pragma unroll
    for (int i = 0; i < ROWS * K; i++)
        halves[i / K][i % K] = (static_cast<const uint16_t *>(p) + row[i / K])[at[i % K]];
#pragma unroll
    for (int i = 0; i < ROWS * K; i++)
        out[i / K][i % K] = type == TQKV_CUDA_F16
                                ? __half2float(__ushort_as_half(halves[i / K][i % K]))
                                : __uint_as_float((uint32_t)halves[i / K][i % K] << 16);
}

static __device__ __forceinline__ void store_value(void *p, size_t i, tqkv_cuda_type type, float v)
{
    if (type == TQKV_CUDA_F32)
        static_cast<float *>(p)[i] = v;
    else if (type == TQKV_CUDA_F16)
        static_cast<__half *>(p)[i] = __float2half_rn(v);
    else
        static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(v);
}

/* Which two channels RoPE turns together as pair i of D / 2, and whether it turns them at all. */
struct tqkvc_pair {
    uint32_t a, b;
    bool turns;
};

static __device__ __forceinline__ tqkvc_pair find_pair(const tqkvc_shape &shape, uint32_t i)
{
    const uint32_t n = shape.n_rot / 2;
    if (i >= n)
        return {shape.n_rot + 2 * (i - n), shape.n_rot + 2 * (i - n) + 1, false};
    return shape.rope_style == TQKV_ROPE_PAIRS ? tqkvc_pair{2 * i, 2 * i + 1, true}
                                               : tqkvc_pair{i, i + n, true};
}

static __device__ __forceinline__ double turns_per_position(float inv_freq)
{
    return (double)inv_freq * 0.15915494309189535;
}

/* Sine and cosine good enough for outputs: about 1e-6, any position. turns: of a position. */
static __device__ __forceinline__ void turn_fast(double turns, int32_t position, float &sine,
                                                 float &cosine)
{
    const double angle = (double)position * turns;
    __sincosf(6.2831853f * (float)(angle - rint(angle)), &sine, &cosine); /* within +-pi: 2^-21 */
}

#endif /* TQKVC_COLUMNS_CUH */
