/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md from step 4 on, by half a warp: lane d holds channel d of every
 * unit. Both halves of a warp work on a row each and take the same path.
 */
#ifndef TQKVC_ENCODE_ROW_CUH
#define TQKVC_ENCODE_ROW_CUH

#include "cuda/exact.cuh"
#include "cuda/image.h"

constexpr uint32_t TQKVC_FULL = 0xffffffffu;
constexpr float TQKVC_Y_MAX = 4096.0f;

/* Tables in shared memory. level[width][t]: the magnitude nearest to t half levels. */
struct tqkvc_encode_tables {
    tqkvc_tables plain;
    uint8_t level[TQKVC_WIDTHS][256];
};

static __device__ __forceinline__ void load_encode_tables(const void *image,
                                                          tqkvc_encode_tables &out)
{
    const uint32_t *from = static_cast<const uint32_t *>(image);
    for (uint32_t i = threadIdx.x; i < sizeof(tqkvc_tables) / 4; i += blockDim.x)
        reinterpret_cast<uint32_t *>(&out.plain)[i] = __ldg(from + i);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < TQKVC_WIDTHS * 256; i += blockDim.x) {
        const tqkvc_width &width = out.plain.widths[i / 256];
        out.level[i / 256][i % 256] = width.magnitude[width.nearest[i % 256]];
    }
}

static __device__ __forceinline__ float max_half_warp(float v)
{
    for (int n = 8; n > 0; n /= 2)
        v = fmaxf(v, __shfl_xor_sync(TQKVC_FULL, v, n));
    return v;
}

/* Of lanes 0..15, then the halving tree. */
static __device__ __forceinline__ float sum_half_warp(float v)
{
    for (int n = 8; n > 0; n /= 2)
        v = add(v, __shfl_xor_sync(TQKVC_FULL, v, n));
    return v;
}

/* Of pairs of lanes, whose lanes have the same: ((0 + 2) + (4 + 6)) + ((1 + 3) + (5 + 7)). */
static __device__ __forceinline__ float sum_pairs(float v)
{
    v = add(v, __shfl_xor_sync(TQKVC_FULL, v, 4));
    v = add(v, __shfl_xor_sync(TQKVC_FULL, v, 8));
    return add(v, __shfl_xor_sync(TQKVC_FULL, v, 2));
}

static __device__ __forceinline__ bool all_of_half(bool v)
{
    return (__ballot_sync(TQKVC_FULL, v) >> (threadIdx.x & 16u) & 0xffffu) == 0xffffu;
}

/* Number of thresholds [1..255] at or below value, at least 1. */
static __device__ __forceinline__ int count_thresholds(const float *thresholds, float value)
{
    int below = 0; /* thresholds[below] <= value, were there one at 0 */
    for (int step = 128; step > 0; step /= 2)
        if (below + step <= 255 && thresholds[below + step] <= value)
            below += step;
    return max(below, 1);
}

static __device__ __forceinline__ int clamp_scale(int c)
{
    return min(max(c, 1), 255);
}

static __device__ __forceinline__ float power_of_2(int exponent)
{
    return __int_as_float((127 + exponent) << 23);
}

/* To a whole number of at most 16 bits. */
static __device__ __forceinline__ uint32_t whole_16(float v)
{
    return (uint32_t)min(__float2int_rn(v), 65535);
}

/* A row of N units at work: lane d of a half warp has channel d of every unit. */
template <int N> struct tqkvc_row_encoder {
    const tqkvc_encode_tables &tables;
    uint64_t widths;
    const float *weights; /* [N] */
    float size[N];        /* magnitudes */
    int whole[N];         /* the same times 2 ^ exponent */
    int exponent;
    int energy, peak;
    float n_coded;
    bool only_8;

    __device__ __forceinline__ uint32_t bits(int u) const
    {
        return (uint32_t)(widths >> (4 * u)) & 15u;
    }

    /* sum + factor * (v of this lane ^ 2 + v of its neighbour ^ 2) */
    static __device__ __forceinline__ float add_squares(float sum, int v, float factor)
    {
        const int square = v * v;
        return __fmaf_rn(factor, (float)(square + __shfl_xor_sync(TQKVC_FULL, square, 1)), sum);
    }

    /* Fills everything from `whole` on. */
    __device__ __forceinline__ void measure()
    {
        float largest = 0x1p-7f, relative = 0, sum = 0;
        int n = 0;
        only_8 = true;
#pragma unroll
        for (int u = 0; u < N; u++) {
            if (bits(u) == 0)
                continue;
            largest = fmaxf(largest, size[u]);
            relative = fmaxf(relative, mul(size[u], tables.plain.widths[bits(u)].inv_peak));
            only_8 = only_8 && bits(u) == 8;
            n += TQKV_UNIT_CHANNELS;
        }
        n_coded = (float)n;
        exponent = 12 - ((__float_as_int(max_half_warp(largest)) >> 23) - 127);
#pragma unroll
        for (int u = 0; u < N; u++) {
            whole[u] = bits(u) == 0 ? 0 : __float2int_rn(mul(size[u], power_of_2(exponent)));
            if (bits(u) != 0)
                sum = add_squares(sum, whole[u], 1.0f);
        }
        const float mean = mul(__fdiv_rn(sum_pairs(sum), n_coded), power_of_2(-2 * exponent));
        energy = count_thresholds(tables.plain.energy_thresholds, mean);
        peak = count_thresholds(tables.plain.peak_thresholds, max_half_warp(relative));
    }

    /*
     * What turns whole sizes to half levels (low 16 bits) and levels to whole sizes (high), at a
     * scale; lane w has those of width w.
     */
    __device__ __forceinline__ uint32_t factors(int scale) const
    {
        const tqkvc_width &width = tables.plain.widths[min(threadIdx.x % 16, TQKVC_WIDTHS - 1u)];
        const float inverse = mul(tables.plain.scale_inverses[scale], width.inv_step2);
        const float step = mul(tables.plain.scale_values[scale], width.step);
        return whole_16(mul(inverse, power_of_2(15 - exponent))) |
               whole_16(mul(step, power_of_2(7 + exponent))) << 16;
    }

    /* Half levels of unit u, as an index of level and nearest. of_widths: factors(). */
    __device__ __forceinline__ uint32_t half_levels(int u, uint32_t factor) const
    {
        return min((uint32_t)whole[u] * (factor & 0xffffu) >> 15, 254u);
    }

    static __device__ __forceinline__ uint32_t factor_of(uint32_t of_widths, uint32_t width)
    {
        return __shfl_sync(TQKVC_FULL, of_widths, (threadIdx.x & 16u) + width);
    }

    __device__ __forceinline__ float error(int scale) const
    {
        const uint32_t of_widths = factors(scale);
        float sum = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            if (bits(u) == 0)
                continue;
            const uint32_t factor = factor_of(of_widths, bits(u));
            const uint32_t level = tables.level[bits(u)][half_levels(u, factor)];
            sum = add_squares(sum, whole[u] - (int)(level * (factor >> 16) >> 7), weights[u]);
        }
        return sum_pairs(sum);
    }

    __device__ float exact_error(int scale) const
    {
        const uint32_t of_widths = factors(scale);
        float sum = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            if (bits(u) == 0)
                continue;
            const uint32_t t = half_levels(u, factor_of(of_widths, bits(u)));
            const float level = mul(tables.plain.widths[bits(u)].step, (float)tables.level[bits(u)][t]);
            const float difference = add(size[u], -mul(tables.plain.scale_values[scale], level));
            sum = add(sum, mul(weights[u], mul(difference, difference)));
        }
        return sum_half_warp(sum);
    }

    /*
     * Lane i gets the place of candidate i in the order of all: rows that may have been decoded from it,
     * error, scale. Lanes without a candidate get the last place.
     */
    __device__ __forceinline__ uint64_t rank() const
    {
        const int n = only_8 ? 6 : 16;
        uint64_t place = ~0ull;
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            const int c = clamp_scale(only_8 ? peak - 2 + i : i < 13 ? energy - 4 + i : peak - 14 + i);
            float e = error(c);
            const bool near_row = e <= mul(16.0f, n_coded);
            if (__any_sync(TQKVC_FULL, near_row)) {
                const float exact = exact_error(c);
                e = near_row ? exact : e;
            }
            if (threadIdx.x % 16 == i)
                place = (uint64_t)!near_row << 48 | (uint64_t)__float_as_uint(e) << 16 | c << 8;
        }
        return place;
    }

    /* Levels of the row at a scale. Returns the largest; mean: their mean square, times the steps'. */
    __device__ __forceinline__ uint32_t code(int scale, uint32_t (&levels)[N], float *mean) const
    {
        const uint32_t of_widths = factors(scale);
        uint32_t largest = 0;
        float sum = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            levels[u] = 0;
            if (bits(u) == 0)
                continue;
            const float step = tables.plain.widths[bits(u)].step;
            levels[u] = tables.level[bits(u)][half_levels(u, factor_of(of_widths, bits(u)))];
            largest = max(largest, levels[u]);
            sum = add_squares(sum, (int)levels[u], mul(step, step));
        }
        for (int n = 8; n > 0; n /= 2)
            largest = max(largest, __shfl_xor_sync(TQKVC_FULL, largest, n));
        *mean = __fdiv_rn(sum_pairs(sum), n_coded);
        return largest;
    }

    /* Whether the decoded row would be found at this scale again, with a step to spare. */
    __device__ __forceinline__ bool is_stable(int scale, int peak_again, float mean) const
    {
        if (only_8)
            return peak_again - 1 <= scale && scale <= peak_again + 2;
        const int again =
            clamp_scale(scale + count_thresholds(tables.plain.energy_thresholds, mean) - 128);
        return (again - 3 <= scale && scale <= again + 7) || scale == peak_again;
    }

    /*
     * Scale and magnitude indices of the row. Lanes of a half agree, and both halves of the warp call
     * this together. zero: every value is 0.
     */
    __device__ __forceinline__ int encode(uint32_t (&magnitude)[N], bool *zero)
    {
        uint32_t levels[N], tried[N];
        int scale = 0, lower = 0;

        measure();
        uint64_t place = rank();
        while (!__all_sync(TQKVC_FULL, scale != 0)) {
            uint64_t best = place;
            for (int n = 8; n > 0; n /= 2)
                best = min(best, __shfl_xor_sync(TQKVC_FULL, best, n));
            const int c = (int)(best >> 8 & 255u);
            float mean;
            const uint32_t largest = code(c, tried, &mean);
            const int again = clamp_scale(c + tables.plain.level_octaves[largest]);
            place = place == best ? ~0ull : place;
            if (scale == 0 && is_stable(c, again, mean)) {
                scale = c;
                lower = again;
                *zero = largest == 0;
#pragma unroll
                for (int u = 0; u < N; u++)
                    levels[u] = tried[u];
            }
        }
        return find_form(scale, lower, *zero, levels, magnitude);
    }

    /* The form that is kept: that of the lower scale, if it is whole octaves below and has all levels. */
    __device__ __forceinline__ int find_form(int scale, int lower, bool zero,
                                             const uint32_t (&levels)[N],
                                             uint32_t (&magnitude)[N]) const
    {
        const bool asked = scale > lower && (scale - lower) % 16 == 0;
        const int octaves = asked ? (scale - lower) / 16 : 0;
        bool exists = asked;
#pragma unroll
        for (int u = 0; u < N; u++) {
            const uint32_t wanted = levels[u] << octaves;
            exists = exists && (bits(u) == 0 ||
                                (wanted <= 127u && tables.level[bits(u)][2 * wanted] == wanted));
        }
        const bool moves = all_of_half(exists);
#pragma unroll
        for (int u = 0; u < N; u++)
            magnitude[u] =
                tables.plain.widths[bits(u)].nearest[2 * (levels[u] << (moves ? octaves : 0))];
        return zero ? 1 : moves ? lower : scale;
    }
};

/* Where byte i of a plane of n bytes a row of the token in a slot is, in the block's plane. */
static __device__ __forceinline__ uint32_t block_byte(uint32_t side, uint32_t n, uint32_t slot,
                                                      uint32_t i)
{
    return side == TQKV_SIDE_V ? slot / 4 * 4 * n + 4 * i + slot % 4
                               : i / 4 * 64 + min(n, 4u) * slot + i % 4;
}

/* Joins the codes of sixteen lanes to the bytes of a plane of w bits; lanes below 2 w write them. */
static __device__ __forceinline__ void put_plane(uint8_t *plane, uint32_t side, uint32_t slot,
                                                 uint32_t w, uint32_t code, bool writes)
{
    const uint32_t d = threadIdx.x % 16, n = 2 * w;
    uint32_t byte = (code & ((1u << w) - 1)) << (d / n * w);
    for (uint32_t i = 8; i > 0; i /= 2) {
        const uint32_t other = __shfl_xor_sync(TQKVC_FULL, byte, i);
        byte |= i >= n ? other : 0u;
    }
    if (writes && d < n)
        plane[block_byte(side, n, slot, d)] = (uint8_t)byte;
}

#endif /* TQKVC_ENCODE_ROW_CUH */
