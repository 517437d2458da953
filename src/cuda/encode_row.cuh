/* SPDX-License-Identifier: Apache-2.0 */
/*
 * "Encoding a row" of docs/FORMAT.md from step 4 on, by an octet: eight lanes of a warp, lane i with
 * channels 2i and 2i + 1 of every unit, so that it is lane i of the format's sums of squares. All octets
 * of a warp have rows of one head and take the same path. Octets may share the candidates of a row.
 *
 * Whole numbers ride in floats. A whole size q is kept as BASE + q * ONE, whose bits are those of BASE
 * plus q. One fused operation, cut off below, turns it to half levels: what comes out is a denormal,
 * whose bits are the number, and already the place in the table of levels. A level, read as bits of a
 * denormal, becomes a whole size in the same way. Every product is exact before it is cut.
 */
#ifndef TQKVC_ENCODE_ROW_CUH
#define TQKVC_ENCODE_ROW_CUH

#include "cuda/exact.cuh"
#include "cuda/image.h"

constexpr uint32_t TQKVC_FULL = 0xffffffffu;
constexpr uint32_t TQKVC_CANDIDATES = 16;
constexpr uint64_t TQKVC_NO_PLACE = ~0ull;
constexpr float TQKVC_Y_MAX = 4096.0f;

/* Of a width at a scale: sizes to half levels, and levels to sizes. */
struct __align__(8) tqkvc_factors {
    float slope; /* half levels = bits of slope * (size - BASE) */
    float value; /* size = value * level + BASE, level as bits */
};

/* Shared memory of an octet. Those of a warp are 8 words apart in the banks. */
struct __align__(32) tqkvc_octet {
    float sums[TQKVC_CANDIDATES][8]; /* of squares, by lane */
    tqkvc_factors factors[TQKVC_WIDTHS];
};
static_assert(sizeof(tqkvc_octet) / 4 % 32 == 24, "no conflicts of banks");

static __device__ __forceinline__ uint32_t octet_lane()
{
    return threadIdx.x % 8;
}

/* Whether all lanes of this octet say so. */
static __device__ __forceinline__ bool all_of_octet(bool v)
{
    return (__ballot_sync(TQKVC_FULL, v) >> (threadIdx.x & 24u) & 0xffu) == 0xffu;
}

template <typename T> static __device__ __forceinline__ T max_octet(T v)
{
    for (int n = 4; n > 0; n /= 2)
        v = max(v, __shfl_xor_sync(TQKVC_FULL, v, n));
    return v;
}

static __device__ __forceinline__ uint64_t min_octet(uint64_t v)
{
    for (int n = 4; n > 0; n /= 2)
        v = min(v, __shfl_xor_sync(TQKVC_FULL, v, n));
    return v;
}

/* ((0 + 2) + (4 + 6)) + ((1 + 3) + (5 + 7)) */
static __device__ __forceinline__ float sum_octet(float v)
{
    v = add(v, __shfl_xor_sync(TQKVC_FULL, v, 2));
    v = add(v, __shfl_xor_sync(TQKVC_FULL, v, 4));
    return add(v, __shfl_xor_sync(TQKVC_FULL, v, 1));
}

static __device__ __forceinline__ float sum_of_lanes(const float *v)
{
    return add(add(add(v[0], v[2]), add(v[4], v[6])), add(add(v[1], v[3]), add(v[5], v[7])));
}

/*
 * Number of thresholds [1..255] at or below value, at least 1. Threshold i is about
 * 2 ^ ((i - 128.5) / per_octave): the logarithm is right but for one, and the table decides.
 */
static __device__ __forceinline__ int count_thresholds(const float *thresholds, float per_octave,
                                                       float value)
{
    const int about = __float2int_rd(per_octave * __log2f(value) + 128.25f);
    const int below = min(max(about, 0), 255);
    return max(below < 255 && thresholds[below + 1] <= value ? below + 1 : below, 1);
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
static __device__ __forceinline__ int whole_16(float v)
{
    return min(__float2int_rn(v), 65535);
}

static __device__ __forceinline__ float add_squares(float sum, int a, int b, float factor)
{
    return __fmaf_rn(factor, (float)(a * a + b * b), sum);
}

/* What is the same for all rows of a head of N units. */
template <int N> struct tqkvc_row_layout {
    uint32_t bits[N]; /* of units */
    float weights[N];
    float n_coded; /* channels */
    bool only_8;

    /* widths: four bits a unit; more: of units from 16 on. */
    __device__ __forceinline__ tqkvc_row_layout(uint64_t widths, uint64_t more, const float *weights)
        : n_coded(0.0f), only_8(true)
    {
#pragma unroll
        for (int u = 0; u < N; u++) {
            bits[u] = (uint32_t)((u < TQKVC_UNITS_MAX ? widths : more) >> 4 * (u % TQKVC_UNITS_MAX)) & 15u;
            this->weights[u] = weights[u];
            n_coded += bits[u] == 0 ? 0.0f : 16.0f;
            only_8 = only_8 && (bits[u] == 0 || bits[u] == 8);
        }
    }
};

/* Scales to try: first, first + 1, ..., last and then n_more from more on. Each is there once. */
struct tqkvc_candidates {
    int first, last, more, n_more;

    __device__ __forceinline__ tqkvc_candidates(int energy, int peak, bool only_8)
        : first(clamp_scale(only_8 ? peak - 2 : energy - 4)),
          last(clamp_scale(only_8 ? peak + 3 : energy + 8)), more(0), n_more(0)
    {
        const int low = clamp_scale(peak - 1), high = clamp_scale(peak + 1);
        more = low < first ? low : max(low, last + 1);
        n_more = max((low < first ? min(high, first - 1) : high) - more + 1, 0);
    }

    __device__ __forceinline__ int count() const
    {
        return last - first + 1 + n_more;
    }

    __device__ __forceinline__ int scale(int i) const
    {
        return i <= last - first ? first + i : more + i - (last - first + 1);
    }
};

/* A row of N units at work. Its y is that of this lane. */
template <int N> struct tqkvc_row_encoder {
    static constexpr float ONE = 0x1p-32f, BASE = 0x1p-9f; /* bits(BASE + ONE) = bits(BASE) + 1 */

    const tqkvc_encode_tables &tables;
    tqkvc_octet &octet;
    const tqkvc_row_layout<N> &layout;
    const float (&y)[N][2];
    float whole[N][2]; /* BASE + q * ONE */
    int exponent, energy, peak;
    /* Of the scale that was found */
    uint32_t levels[N] = {}; /* of channel 2i, and << 16 of channel 2i + 1 */
    int scale = 1, lower = 1;  /* lower: where the largest level would be 127 */
    bool zero = true;          /* every level is 0 */

    /* octet: its factors of width 0 are 0. */
    __device__ __forceinline__ tqkvc_row_encoder(const tqkvc_encode_tables &tables, tqkvc_octet &octet,
                                                 const tqkvc_row_layout<N> &layout,
                                                 const float (&y)[N][2])
        : tables(tables), octet(octet), layout(layout), y(y)
    {
    }

    /* Magnitude of y; 0 where nothing is coded. */
    __device__ __forceinline__ float size(int u, int i) const
    {
        return layout.bits[u] == 0 ? 0.0f : fminf(fabsf(y[u][i]), TQKVC_Y_MAX);
    }

    __device__ __forceinline__ int whole_size(int u, int i) const
    {
        return __float_as_int(whole[u][i]) - __float_as_int(BASE);
    }

    /* Step 6. */
    __device__ __forceinline__ void measure()
    {
        float largest = 0x1p-7f, relative = 0, sum = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            const float of_unit = fmaxf(size(u, 0), size(u, 1));
            largest = fmaxf(largest, of_unit);
            relative = fmaxf(relative, mul(of_unit, tables.inv_peak[layout.bits[u]]));
        }
        largest = max_octet(largest);
        relative = max_octet(relative);
        exponent = 12 - ((__float_as_int(largest) >> 23) - 127);
        const float unit = mul(power_of_2(exponent), ONE);
#pragma unroll
        for (int u = 0; u < N; u++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                whole[u][i] = __fmaf_rn(size(u, i), unit, BASE);
            sum = add_squares(sum, whole_size(u, 0), whole_size(u, 1), 1.0f);
        }
        const float mean =
            mul(__fdiv_rn(sum_octet(sum), layout.n_coded), power_of_2(-2 * exponent));
        energy = count_thresholds(tables.energy_thresholds, 8.0f, mean);
        peak = count_thresholds(tables.peak_thresholds, 16.0f, relative);
    }

    /* F and V of step 8 for every width: lane i has width i + 1. */
    __device__ __forceinline__ void set_factors(int c)
    {
        const uint32_t width = octet_lane() + 1;
        const float inverse = mul(tables.scale_inverses[c], tables.inv_step2[width]);
        const float step = mul(tables.scale_values[c], tables.step[width]);
        const int f = whole_16(mul(inverse, power_of_2(15 - exponent)));
        const int v = whole_16(mul(step, power_of_2(7 + exponent)));

        __syncwarp(); /* nobody reads the ones before */
        octet.factors[width] = {mul((float)f, 0x1p-132f), mul((float)v, 0x1p110f)};
        __syncwarp();
    }

    /* Level of a channel, by set_factors. */
    __device__ __forceinline__ uint32_t find_level(int u, int i, const tqkvc_factors &factors) const
    {
        const uint32_t first = layout.bits[u] * (uint32_t)sizeof(tables.level[0]);
        const float offset = __fmaf_rn(-BASE, factors.slope, __uint_as_float(first)); /* exact */
        const float place = __fmaf_rz(whole[u][i], factors.slope, offset);
        return tables.level[0][min(__float_as_uint(place), first + 254u)];
    }

    /* What this lane of an octet has of the error, by set_factors. */
    __device__ __forceinline__ float error() const
    {
        float sum = 0;
#pragma unroll
        for (int u = 0; u < N; u++) {
            const tqkvc_factors factors = octet.factors[layout.bits[u]];
            int lack[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float level = __uint_as_float(find_level(u, i, factors));
                lack[i] = __float_as_int(whole[u][i]) -
                          __float_as_int(__fmaf_rz(level, factors.value, BASE));
            }
            sum = add_squares(sum, lack[0], lack[1], layout.weights[u]);
        }
        return sum;
    }

    /* The error of near candidates, by set_factors(c). */
    __device__ float exact_error(int c) const
    {
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int u = 0; u < N; u++) {
            const tqkvc_factors factors = octet.factors[layout.bits[u]];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float level = mul(tables.step[layout.bits[u]], (float)find_level(u, i, factors));
                const float lack = add(size(u, i), -mul(tables.scale_values[c], level));
                sum[i] = add(sum[i], mul(layout.weights[u], mul(lack, lack)));
            }
        }
#pragma unroll
        for (int n = 4; n > 0; n /= 2)
#pragma unroll
            for (int i = 0; i < 2; i++)
                sum[i] = add(sum[i], __shfl_xor_sync(TQKVC_FULL, sum[i], n));
        return add(sum[0], sum[1]);
    }

    /*
     * Places of candidates start, start + step, ... in the order of all: near ones, error, scale. Lane i
     * gets that of the i-th of them in place[0], and of the (i + 8)-th in place[1].
     */
    __device__ __forceinline__ void rank(int start, int step, uint64_t (&place)[2])
    {
        const tqkvc_candidates all(energy, peak, layout.only_8);
        const int n = (int)__reduce_max_sync(
            TQKVC_FULL, (unsigned)max((all.count() - start + step - 1) / step, 0));
        const auto scale_of = [&](int i) {
            return all.scale(min(start + i * step, all.count() - 1));
        };
        bool any_near = false;

#pragma unroll 1
        for (int i = 0; i < n; i++) {
            set_factors(scale_of(i));
            octet.sums[i][octet_lane()] = error();
        }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = (int)octet_lane() + 8 * h;
            place[h] = TQKVC_NO_PLACE;
            if (start + i * step < all.count()) {
                const float e = sum_of_lanes(octet.sums[i]);
                const bool is_near = e <= mul(16.0f, layout.n_coded);
                any_near = any_near || is_near;
                place[h] = place_of(is_near, e, scale_of(i));
            }
        }
        if (!__any_sync(TQKVC_FULL, any_near))
            return;
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            set_factors(scale_of(i));
            const float e = exact_error(scale_of(i));
#pragma unroll
            for (int h = 0; h < 2; h++)
                if ((int)octet_lane() + 8 * h == i && place[h] >> 48 == 0)
                    place[h] = place_of(true, e, scale_of(i));
        }
    }

    static __device__ __forceinline__ uint64_t place_of(bool is_near, float error, int c)
    {
        return (uint64_t)!is_near << 48 | (uint64_t)__float_as_uint(error) << 16 | (uint64_t)c << 8;
    }

    /* Levels of the row at a scale. Returns the largest; mean: their mean square, times the steps'. */
    __device__ __forceinline__ uint32_t code(int c, uint32_t (&out)[N], float *mean)
    {
        uint32_t largest = 0;
        float sum = 0;

        set_factors(c);
#pragma unroll
        for (int u = 0; u < N; u++) {
            const tqkvc_factors factors = octet.factors[layout.bits[u]];
            const float step = tables.step[layout.bits[u]];
            const uint32_t a = find_level(u, 0, factors), b = find_level(u, 1, factors);
            out[u] = a | b << 16;
            largest = max(largest, max(a, b));
            sum = add_squares(sum, (int)a, (int)b, mul(step, step));
        }
        *mean = __fdiv_rn(sum_octet(sum), layout.n_coded);
        return max_octet(largest);
    }

    /* Step 9: whether the decoded row would be found at this scale again. */
    __device__ __forceinline__ bool is_stable(int c, int peak_again, float mean) const
    {
        if (layout.only_8)
            return peak_again - 1 <= c && c <= peak_again + 2;
        const int again =
            clamp_scale(c + count_thresholds(tables.energy_thresholds, 8.0f, mean) - 128);
        return (again - 3 <= c && c <= again + 7) || c == peak_again;
    }

    /*
     * The best stable one of candidates start, start + step, ..., of which there are at most 16. Returns its
     * place, TQKVC_NO_PLACE if none is stable; octets that share a row compare them. The octets of a
     * warp call this together.
     */
    __device__ __forceinline__ uint64_t find_scale(int start, int step)
    {
        uint64_t place[2], found = TQKVC_NO_PLACE;
        bool is_done = false;

        measure();
        rank(start, step, place);
        do {
            const uint64_t best = min_octet(min(place[0], place[1]));
            is_done = is_done || best == TQKVC_NO_PLACE;
            const int c = is_done ? 1 : (int)(best >> 8 & 255u);
            uint32_t tried[N];
            float mean;
            const uint32_t largest = code(c, tried, &mean);
            const int again = clamp_scale(c + tables.level_octaves[largest]);
            for (int h = 0; h < 2; h++)
                place[h] = place[h] == best ? TQKVC_NO_PLACE : place[h];
            if (!is_done && is_stable(c, again, mean)) {
                is_done = true;
                found = best;
                scale = c;
                lower = again;
                zero = largest == 0;
#pragma unroll
                for (int u = 0; u < N; u++)
                    levels[u] = tried[u];
            }
        } while (!__all_sync(TQKVC_FULL, is_done));
        return found;
    }

    __device__ __forceinline__ uint32_t level(int u, int i) const
    {
        return levels[u] >> (16 * i) & 0xffffu;
    }

    /* Steps 10 and 11: the form that is kept. Levels double where the lower scale has it. */
    __device__ __forceinline__ void choose_form()
    {
        const bool asked = scale > lower && (scale - lower) % 16 == 0;
        const int octaves = asked ? (scale - lower) / 16 : 0;

        if (__any_sync(TQKVC_FULL, asked)) {
            bool exists = asked;
#pragma unroll
            for (int u = 0; u < N; u++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t wanted = level(u, i) << octaves, bits = layout.bits[u];
                    exists = exists && (bits == 0 || (wanted <= 127u && tables.index[bits][wanted] !=
                                                                            TQKVC_NO_MAGNITUDE));
                }
            if (all_of_octet(exists)) {
#pragma unroll
                for (int u = 0; u < N; u++)
                    levels[u] <<= octaves;
                scale = lower;
            }
        }
        scale = zero ? 1 : scale;
    }

    /* Step 13, of a row that is not zero; of any unit, also one of width 0. */
    __device__ __forceinline__ uint32_t code_of(int u, int i) const
    {
        return find_code(tables, layout.bits[u], level(u, i), signbit(y[u][i]));
    }

    static __device__ __forceinline__ uint32_t find_code(const tqkvc_encode_tables &tables, uint32_t bits,
                                                         uint32_t level, bool is_negative)
    {
        const uint32_t half = (1u << bits) / 2, magnitude = tables.index[bits][level];
        return !is_negative ? half + magnitude : bits == 8 ? half - magnitude : half - 1 - magnitude;
    }

    /* Levels of this lane in a unit, with the signs: bits 15 and 31. */
    __device__ __forceinline__ uint32_t signed_levels(int u) const
    {
        return levels[u] | (signbit(y[u][0]) ? 0x8000u : 0u) | (signbit(y[u][1]) ? 0x80000000u : 0u);
    }
};

/* Where byte i of a plane of n bytes a row of the token in a slot is, in the block's plane. */
static __device__ __forceinline__ uint32_t block_byte(uint32_t side, uint32_t n, uint32_t slot,
                                                      uint32_t i)
{
    return side == TQKV_SIDE_V ? slot / 4 * 4 * n + 4 * i + slot % 4
                               : i / 4 * 64 + min(n, 4u) * slot + i % 4;
}

/* Joins the codes of an octet, a and b of a lane, to the bytes of a plane of w bits: two a lane, below w. */
static __device__ __forceinline__ uint32_t join_plane(uint32_t w, uint32_t a, uint32_t b)
{
    const uint32_t mask = (1u << w) - 1, shift = octet_lane() & (0u - w);
    uint32_t bytes = (a & mask) << shift | (b & mask) << shift << 8;
#pragma unroll
    for (uint32_t i = 4; i > 0; i /= 2) {
        const uint32_t other = __shfl_xor_sync(TQKVC_FULL, bytes, i);
        bytes |= i >= w ? other : 0u;
    }
    return bytes;
}

static __device__ __forceinline__ void put_plane(uint8_t *plane, uint32_t side, uint32_t slot,
                                                 uint32_t w, uint32_t bytes)
{
    const uint32_t lane = octet_lane();
    if (lane >= w)
        return;
    if (side == TQKV_SIDE_K) {
        *reinterpret_cast<uint16_t *>(plane + block_byte(side, 2 * w, slot, 2 * lane)) =
            (uint16_t)bytes;
    } else {
        plane[block_byte(side, 2 * w, slot, 2 * lane)] = (uint8_t)bytes;
        plane[block_byte(side, 2 * w, slot, 2 * lane + 1)] = (uint8_t)(bytes >> 8);
    }
}

#endif /* TQKVC_ENCODE_ROW_CUH */
