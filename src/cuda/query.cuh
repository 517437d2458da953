/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A row of queries as whole numbers of 16 bits in two bytes, in the order of column operands: what
 * frames.cuh writes and decode_tile.cuh multiplies with.
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

/*
 * Four values to the words of a unit that lane t of a group reads; returns the sums of both bytes.
 * operands: [rows / 4][D / 16][32] of a row tile: with 4 rows columns 2r and 2r + 1 are the high and
 * the low bytes of row r, with 8 rows there is an operand of each.
 */
template <int D>
static __device__ __forceinline__ int2 put_query(uint32_t *operands, uint32_t rows_per_tile,
                                                 uint32_t r, uint32_t unit, uint32_t t,
                                                 const float (&v)[4], float factor)
{
    uint32_t high = 0, low = 0;
    int2 sums = {0, 0};

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int whole = __float2int_rn(v[i] * factor), upper = (whole + 128) >> 8,
                  lower = whole - upper * 256;
        high |= ((uint32_t)upper & 255u) << 8 * i;
        low |= ((uint32_t)lower & 255u) << 8 * i;
        sums.x += upper;
        sums.y += lower;
    }
    if (rows_per_tile == 4) {
        operands[unit * 32 + 8 * r + t] = high;
        operands[unit * 32 + 8 * r + 4 + t] = low;
    } else {
        operands[unit * 32 + 4 * r + t] = high;
        operands[(D / 16 + unit) * 32 + 4 * r + t] = low;
    }
    return sums;
}

/* Steps of a lane's channels in a tier, and whether their levels are one too low (lookup.cuh). */
template <int D> struct tqkvc_query_steps {
    static constexpr int N = (D + 127) / 128; /* words of a lane */
    uint32_t tier = ~0u;
    float step[N];
    bool corrected[N];

    __device__ __forceinline__ void load(const tqkvc_tables &tables, uint64_t widths,
                                         uint32_t new_tier, uint32_t lane)
    {
        tier = new_tier;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t bits =
                unit_width(widths, min((32 * i + lane) / 4, (uint32_t)D / 16 - 1));
            step[i] = tables.widths[bits].step;
            corrected[i] = tqkvc_has_second((int)bits);
        }
    }
};

/* Row r of a tile from its product with the matrix, [D]. One warp. */
template <int D>
static __device__ __forceinline__ tqkvc_query_row make_query(const float *product,
                                                             const tqkvc_query_steps<D> &steps,
                                                             uint32_t rows_per_tile, uint32_t r,
                                                             uint32_t lane, uint32_t *operands)
{
    constexpr uint32_t ALL = 0xffffffffu;
    constexpr int N = tqkvc_query_steps<D>::N;
    float v[N][4], largest = 0;
    int2 sums = {0, 0};

#pragma unroll
    for (int i = 0; i < N; i++) {
        const uint32_t unit = min((32 * i + lane) / 4, (uint32_t)D / 16 - 1),
                       at = 16 * unit + 2 * (lane % 4);
        const float x[4] = {product[at], product[at + 8], product[at + 1],
                            product[at + 9]}; /* see lookup.cuh */
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
        if (unit >= D / 16)
            continue;
        const int2 s = put_query<D>(operands, rows_per_tile, r, unit, lane % 4, v[i], factor);
        sums.x += steps.corrected[i] ? s.x : 0;
        sums.y += steps.corrected[i] ? s.y : 0;
    }
    return {largest * (1.0f / TQKVC_Q_MAX), 0.0f, __reduce_add_sync(ALL, sums.x),
            __reduce_add_sync(ALL, sums.y)};
}

#endif /* TQKVC_QUERY_CUH */
