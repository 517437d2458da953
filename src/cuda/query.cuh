/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A row of queries as whole numbers of 16 bits in two bytes, in the order of column operands: from what
 * frames.cuh makes to what decode_tile.cuh multiplies with.
 */
#ifndef TQKVC_QUERY_CUH
#define TQKVC_QUERY_CUH

#include "cuda/launch.h"
#include "cuda/lookup.cuh"

constexpr float TQKVC_Q_MAX = 32512.0f; /* the high byte stays within +-127 */

static __device__ __forceinline__ uint32_t unit_width(uint64_t widths, uint32_t unit)
{
    return (uint32_t)(widths >> (4 * unit)) & 15u;
}

/* What a row takes beside its operands. */
struct tqkvc_query_row {
    float factor; /* of the whole numbers */
    int2 sums;    /* of its high and low bytes in units of widths 4 to 6; see lookup.cuh */
};

/* A row tile of queries of a frame for one tier. operands: of columns, see put_query. */
template <int D, int R> struct tqkvc_queries {
    __align__(16) uint32_t operands[R / 4][D / 16][32];
    tqkvc_query_row rows[R];
};

/*
 * Four values to the words of a unit that lane t of a group reads; returns the sums of both bytes, of the high ones
 * 2^16 fold: sums of 256 bytes fit 16 bits.
 * operands: with R = 4 columns 2r and 2r + 1 are the high and the low bytes of row r, with R = 8 there is an
 * operand of each.
 */
template <int D, int R>
static __device__ __forceinline__ int put_query(uint32_t (&operands)[R / 4][D / 16][32],
                                                 uint32_t r, uint32_t unit, uint32_t t,
                                                 const float (&v)[4], float factor)
{
    uint32_t high = 0, low = 0;
    int sums = 0;

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int whole = __float2int_rn(v[i] * factor), upper = (whole + 128) >> 8,
                  lower = whole - upper * 256;
        high |= ((uint32_t)upper & 255u) << 8 * i;
        low |= ((uint32_t)lower & 255u) << 8 * i;
        sums += upper * 65536 + lower;
    }
    if constexpr (R == 4) {
        operands[0][unit][8 * r + t] = high;
        operands[0][unit][8 * r + 4 + t] = low;
    } else {
        operands[0][unit][4 * r + t] = high;
        operands[1][unit][4 * r + t] = low;
    }
    return sums;
}

/* Steps of a lane's units in a tier, and whether their levels are one too low (lookup.cuh). */
template <int D> struct tqkvc_query_steps {
    static constexpr int N = (D + 127) / 128; /* units of a lane */
    float step[N];
    bool corrected[N];

    static __device__ __forceinline__ uint32_t unit(int i, uint32_t lane)
    {
        return min((32 * i + lane) / 4, (uint32_t)D / 16 - 1);
    }

    __device__ __forceinline__ void load(tqkvc_rows tables, uint64_t widths, uint32_t lane)
    {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t bits = unit_width(widths, unit(i, lane));
            step[i] = tables.step((int)bits);
            corrected[i] = tqkvc_has_second((int)bits);
        }
    }
};

/* Row r from its product with the matrix, of which a lane has four values of each of its units. One warp. */
template <int D, int R>
static __device__ __forceinline__ void
make_query(const float4 (&product)[tqkvc_query_steps<D>::N], const tqkvc_query_steps<D> &steps,
           uint32_t r, uint32_t lane, tqkvc_queries<D, R> &out)
{
    constexpr uint32_t ALL = 0xffffffffu;
    constexpr int N = tqkvc_query_steps<D>::N;
    float v[N][4], largest = 0;
    int sums = 0;

#pragma unroll
    for (int i = 0; i < N; i++) {
        const float x[4] = {product[i].x, product[i].y, product[i].z, product[i].w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[i][k] = x[k] * steps.step[i];
            largest = fmaxf(largest, fabsf(v[i][k]));
        }
    }
    largest = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(largest)));
    const float factor = largest > 0 ? __fdividef(TQKVC_Q_MAX, largest) : 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const uint32_t unit = (32 * i + lane) / 4;
        if (D < 128 && unit >= D / 16)
            continue;
        const int both = put_query<D, R>(out.operands, r, unit, lane % 4, v[i], factor);
        sums += steps.corrected[i] ? both : 0;
    }
    sums = __reduce_add_sync(ALL, sums);
    const int low = (int16_t)sums;
    if (lane == 0)
        out.rows[r] = {largest * (1.0f / TQKVC_Q_MAX), {(sums - low) >> 16, low}};
}

#endif /* TQKVC_QUERY_CUH */
