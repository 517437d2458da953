/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md from step 4 on, by half a warp: lane d holds channel d of every
 * unit, which is the order of every sum (lanes, then a halving tree). Both halves of a warp work on
 * a row each and take the same path.
 */
#ifndef TQKVC_ENCODE_ROW_CUH
#define TQKVC_ENCODE_ROW_CUH

#include "cuda/exact.cuh"
#include "cuda/image.h"

constexpr uint32_t TQKVC_FULL = 0xffffffffu;
constexpr float TQKVC_Y_MAX = 4096.0f;
constexpr float TQKVC_HALF_LEVELS_MAX = 254.0f;

/* Tables in shared memory. step_level[width][t]: step times the magnitude nearest to t half levels. */
struct tqkvc_encode_tables {
    tqkvc_tables plain;
    float step_level[TQKVC_WIDTHS][256];
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
        out.step_level[i / 256][i % 256] =
            mul(width.step, (float)width.magnitude[width.nearest[i % 256]]);
    }
}

static __device__ __forceinline__ float sum_half_warp(float v)
{
    for (int n = 8; n > 0; n /= 2)
        v = add(v, __shfl_xor_sync(TQKVC_FULL, v, n));
    return v;
}

static __device__ __forceinline__ float max_half_warp(float v)
{
    for (int n = 8; n > 0; n /= 2)
        v = fmaxf(v, __shfl_xor_sync(TQKVC_FULL, v, n));
    return v;
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

/* A row of N units at work: magnitudes of y, and of what y decodes to at a scale. */
template <int N> struct tqkvc_row_encoder {
    const tqkvc_encode_tables &tables;
    uint64_t widths;
    const float *weights; /* [N] */
    float size[N];

    __device__ __forceinline__ uint32_t bits(int u) const
    {
        return (uint32_t)(widths >> (4 * u)) & 15u;
    }

    /* Half levels of a magnitude at a scale, as an index of step_level and nearest. */
    __device__ __forceinline__ uint32_t half_levels(float v, int scale,
                                                    const tqkvc_width &width) const
    {
        const float t = mul(v, mul(tables.plain.scale_inverses[scale], width.inv_step2));
        return __float2uint_rz(fminf(t, TQKVC_HALF_LEVELS_MAX));
    }

    __device__ __forceinline__ float value(float v, int scale, int u) const
    {
        const uint32_t t = half_levels(v, scale, tables.plain.widths[bits(u)]);
        return mul(tables.plain.scale_values[scale], tables.step_level[bits(u)][t]);
    }

    __device__ __forceinline__ float coded_channels() const
    {
        int n = 0;
#pragma unroll
        for (int u = 0; u < N; u++)
            n += bits(u) != 0 ? TQKV_UNIT_CHANNELS : 0;
        return (float)n;
    }

    /* Mean square and relative peak of magnitudes. */
    __device__ __forceinline__ void find_range(const float (&v)[N], float n_coded, float &energy,
                                               float &peak) const
    {
        float squares = 0, largest = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            if (bits(u) == 0)
                continue;
            squares = add(squares, mul(v[u], v[u]));
            largest = fmaxf(largest, mul(v[u], tables.plain.widths[bits(u)].inv_peak));
        }
        energy = __fdiv_rn(sum_half_warp(squares), n_coded);
        peak = max_half_warp(largest);
    }

    /* Whether the decoded row would be found at this scale again, with a step to spare. */
    __device__ __forceinline__ bool is_stable(float energy, float peak, int scale) const
    {
        const float *energies = tables.plain.energy_thresholds,
                    *peaks = tables.plain.peak_thresholds;
        const bool low =
            scale + 4 > 255 || energies[scale + 4] > energy; /* its index is <= scale + 3 */
        const bool high = scale - 7 <= 1 || energies[scale - 7] <= energy;
        const bool at_peak =
            (scale == 1 || peaks[scale] <= peak) && (scale == 255 || peaks[scale + 1] > peak);
        return (low && high) || at_peak;
    }

    __device__ __forceinline__ float code(int scale, float (&values)[N]) const
    {
        float error = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            values[u] = 0;
            if (bits(u) == 0)
                continue;
            values[u] = value(size[u], scale, u);
            const float difference = add(size[u], -values[u]);
            error = add(error, mul(weights[u], mul(difference, difference)));
        }
        return sum_half_warp(error);
    }

    /* The scale of least error; the lowest of equals. */
    __device__ __forceinline__ int choose_scale(float n_coded) const
    {
        float energy, peak, values[N], best = INFINITY;
        int scale = 256;

        find_range(size, n_coded, energy, peak);
        const int e = count_thresholds(tables.plain.energy_thresholds, energy);
        const int p = count_thresholds(tables.plain.peak_thresholds, peak);
#pragma unroll 1
        for (int i = 0; i < 16; i++) {
            const int wanted = i < 13 ? e - 4 + i : p - 1 + (i - 13);
            const int c = min(max(wanted, 1), 255);
            const float error = code(c, values);
            find_range(values, n_coded, energy, peak);
            const bool better = error < best || (error == best && c < scale);
            if (c == wanted && better && is_stable(energy, peak, c)) {
                best = error;
                scale = c;
            }
        }
        return min(scale, 255);
    }

    /*
     * Scale and magnitude indices of the row; sizes become what they decode to. Lanes of a half agree.
     * zero: every value is 0.
     */
    __device__ __forceinline__ int encode(uint32_t (&magnitude)[N], bool *zero)
    {
        const float n_coded = coded_channels();
        const uint32_t half = threadIdx.x & 16u;
        float values[N], lower[N], energy, peak;
        int scale = choose_scale(n_coded);
        bool same = true, none = true;

        code(scale, values);
        find_range(values, n_coded, energy, peak);
        const int p = count_thresholds(tables.plain.peak_thresholds, peak);
#pragma unroll
        for (int u = 0; u < N; u++) {
            lower[u] = bits(u) == 0 ? 0.0f : value(values[u], p, u);
            same = same && lower[u] == values[u];
            none = none && values[u] == 0.0f;
        }
        same = (__ballot_sync(TQKVC_FULL, same) >> half & 0xffffu) == 0xffffu;
        *zero = (__ballot_sync(TQKVC_FULL, none) >> half & 0xffffu) == 0xffffu;
        const bool moves = scale > p && (scale - p) % 16 == 0 && same;
#pragma unroll
        for (int u = 0; u < N; u++) {
            const tqkvc_width &width = tables.plain.widths[bits(u)];
            magnitude[u] =
                width.nearest[half_levels(moves ? values[u] : size[u], moves ? p : scale, width)];
        }
        return moves ? p : scale;
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
