/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What one warp of decode does with a tile of up to 64 tokens of one KV head in shared memory.
 *
 * A warp serves R = 4 or 8 query rows. Queries and probabilities are integers of 16 bits, as two
 * bytes of which the higher counts 256 fold, so that they lose nothing beside K and V of 8 bits:
 *
 *     R = 4   columns 2r and 2r + 1 of a product are the high and the low byte of row r
 *     R = 8   column r is row r, in one product for high bytes and one for low bytes
 *
 * so lane 4 g + t holds rows t (R = 4) or 2t, 2t + 1 (R = 8), H = R / 4 of them. Scores are in
 * powers of two. Probabilities times the scales of V are relative to the largest of the tile, so
 * that far tokens keep their digits; the sums are relative to the largest so far.
 */
#ifndef TQKVC_DECODE_TILE_CUH
#define TQKVC_DECODE_TILE_CUH

#include "cuda/launch.h"
#include "cuda/lookup.cuh"
#include "cuda/query.cuh"

constexpr float TQKVC_P_MAX = 65535.0f;
constexpr float TQKVC_LOWEST = -1e30f; /* instead of -inf, of which differences are NaN */
constexpr uint32_t TQKVC_MAGIC =
    0x4b000000u; /* 2^23: adding it leaves a whole number in the low bits */

/* Shared memory of a warp besides its tile. */
template <int D, int R> struct tqkvc_warp_memory {
    float sums[D / 16][32][R / 2];               /* of V: [unit][lane][channel g or g + 8, row] */
    __align__(16) uint32_t q[R / 4][D / 16][32]; /* column operands; see query.cuh */
};

template <int R> struct tqkvc_row_state {
    static constexpr int H = R / 4;
    float top[H]; /* largest score so far */
    float sum[H],
        nonzero[H]; /* of this lane's tokens; nonzero leaves out rows of V that are zero */
    float q_factor[H], q_mean[H];
    int q_start[H][2]; /* sums of the query's bytes in units of shifted levels; see lookup.cuh */
    uint32_t limit[H]; /* tokens below it are seen */
};

/* Sections of one side of the blocks of a tile; blocks past the last one there repeat the first. */
struct tqkvc_sections {
    const uint8_t *first;
    uint32_t bytes, n_blocks;
    uint64_t widths;

    __device__ __forceinline__ uint32_t offset(uint32_t block) const
    {
        return block < n_blocks ? block * bytes : 0;
    }

    /* Scale bytes of tokens 2g and 2g + 1 of every block, two blocks a word. */
    __device__ __forceinline__ void load_scales(uint32_t g,
                                                uint32_t (&out)[TQKVC_TILE_BLOCKS / 2]) const
    {
        for (int b = 0; b < TQKVC_TILE_BLOCKS; b += 2)
            out[b / 2] =
                load_u16(first + offset(b) + 2 * g) | load_u16(first + offset(b + 1) + 2 * g) << 16;
    }
};

/* body(tqkvc_bits, first unit, number of units) for each run of units of one width. */
template <int N, typename BODY>
static __device__ __forceinline__ void for_runs(uint64_t widths, BODY &&body)
{
#pragma unroll 1
    for (uint32_t u = 0; u < N;) {
        const uint32_t bits = (uint32_t)widths & 15u;
        const uint64_t others = widths ^ bits * 0x1111111111111111ull;
        const uint32_t n = min(others ? (__ffsll((long long)others) - 1) / 4u : 16u, N - u);
        with_width(bits, [&](auto width) { body(width, u, n); });
        widths = n < 16 ? widths >> (4 * n) : 0;
        u += n;
    }
}

/* Sums of columns of the products of high and low bytes. */
template <int R> struct tqkvc_product {
    static constexpr int H = R / 4;
    int c[H][4];

    /* Row `half` of the two of a lane, row h of its query rows. */
    __device__ __forceinline__ int value(int half, int h) const
    {
        if constexpr (H == 1)
            return c[0][2 * half] * 256 + c[0][2 * half + 1];
        else
            return c[0][2 * half + h] * 256 + c[1][2 * half + h];
    }

    /* high and low bytes of every row start from these. */
    __device__ __forceinline__ void start(const int (&sums)[H][2])
    {
        for (int half = 0; half < 2; half++) {
            for (int h = 0; h < H; h++) {
                if constexpr (H == 1) {
                    c[0][2 * half] = sums[0][0];
                    c[0][2 * half + 1] = sums[0][1];
                } else {
                    c[0][2 * half + h] = sums[h][0];
                    c[1][2 * half + h] = sums[h][1];
                }
            }
        }
    }
};

/* Products of K with the query for the blocks of the tile. */
template <int D, int R>
static __device__ __forceinline__ void
score_tile(const tqkvc_sections &k, const tqkvc_warp_memory<D, R> &memory,
           const uint32_t (*tables)[16], const tqkvc_row_state<R> &rows, uint32_t lane,
           tqkvc_product<R> (&out)[TQKVC_TILE_BLOCKS])
{
    const uint8_t *unit = k.first + TQKVC_BLOCK_TOKENS;
    uint32_t offsets[TQKVC_TILE_BLOCKS];

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        offsets[b] = k.offset(b);
        out[b].start(rows.q_start);
    }
    for_runs<D / 16>(k.widths, [&](auto width, uint32_t first, uint32_t n) {
        constexpr int BITS = decltype(width)::value;
        if constexpr (BITS == 0)
            return;
        tqkvc_table<BITS> table;
        table.load(tables[BITS]);
#pragma unroll 1
        for (uint32_t u = first; u < first + n; u++, unit += 32 * BITS) {
            uint32_t q[R / 4];
#pragma unroll
            for (int h = 0; h < R / 4; h++)
                q[h] = memory.q[h][u][lane];
#pragma unroll
            for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
                tqkvc_levels levels;
                k_levels<BITS>(unit + offsets[b], lane / 4, lane % 4, table, levels);
#pragma unroll
                for (int h = 0; h < R / 4; h++) {
                    multiply_k16(out[b].c[h], levels.negative[0], levels.negative[1], q[h]);
                    if constexpr (tqkvc_is_shifted(BITS))
                        multiply_k16(out[b].c[h], levels.positive[0], levels.positive[1], q[h]);
                }
            }
        }
    });
}

/* Probabilities of the tile, packed: [block][row] two tokens of 16 bits, and their sum. */
template <int R> struct tqkvc_probabilities {
    static constexpr int H = R / 4;
    uint32_t packed[TQKVC_TILE_BLOCKS][H];
    int sum[H];
    float old_factor[H], new_factor[H]; /* of the sums so far, and of what the tile adds */
};

/* Byte i of the scales of block b. */
static __device__ __forceinline__ uint32_t
scale_byte(const uint32_t (&scales)[TQKVC_TILE_BLOCKS / 2], int b, int i)
{
    return scales[b / 2] >> (16 * (b % 2) + 8 * i) & 255u;
}

/*
 * One row of a lane. CHECKED: tokens may be hidden or zero; otherwise all are seen and none is zero.
 * k: scales of K. v_log: logarithms of the scales of V, -8 for byte 0.
 */
template <bool CHECKED, int R>
static __device__ __forceinline__ void
weigh_row(const tqkvc_product<R> (&products)[TQKVC_TILE_BLOCKS],
          const float (&k)[TQKVC_TILE_BLOCKS][2], const float (&v_log)[TQKVC_TILE_BLOCKS][2],
          uint32_t first_token, uint32_t limit, int h, tqkvc_row_state<R> &rows,
          tqkvc_probabilities<R> &out)
{
    float z[TQKVC_TILE_BLOCKS][2], top = TQKVC_LOWEST, sum = 0, nonzero = 0;
    uint32_t whole = 0;

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float score =
                fmaf((float)products[b].value(i, h), k[b][i] * rows.q_factor[h], rows.q_mean[h]);
            if (CHECKED)
                score = k[b][i] > 0 ? score : 0.0f;
            z[b][i] = score + v_log[b][i];
            if (CHECKED)
                z[b][i] = first_token + b * TQKVC_BLOCK_TOKENS + i < limit ? z[b][i] : -INFINITY;
            top = fmaxf(top, z[b][i]);
        }
    }
    for (int i = 4; i < 32; i *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));
#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        uint32_t p[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool on = !CHECKED || v_log[b][i] > -7.97f; /* scale byte 1 has -7.94 */
            const float e = exp2_fast(z[b][i] - top);
            const float share = e * exp2_fast(-v_log[b][i]);
            sum += share;
            if (CHECKED)
                nonzero += on ? share : 0.0f;
            p[i] = __float_as_uint(fmaf(on ? e : 0.0f, TQKVC_P_MAX, __uint_as_float(TQKVC_MAGIC)));
            whole += p[i];
        }
        out.packed[b][h] = permute(p[0], p[1], 0x5410u);
    }
    if (!CHECKED)
        nonzero = sum;
    whole -= 2 * TQKVC_TILE_BLOCKS * TQKVC_MAGIC;
    for (int i = 4; i < 32; i *= 2)
        whole += __shfl_xor_sync(0xffffffffu, whole, i);

    const float new_top = fmaxf(rows.top[h], top);
    const float old_factor = exp2_fast(rows.top[h] - new_top), factor = exp2_fast(top - new_top);
    rows.top[h] = new_top;
    rows.sum[h] = rows.sum[h] * old_factor + sum * factor;
    rows.nonzero[h] = rows.nonzero[h] * old_factor + nonzero * factor;
    out.sum[h] = (int)whole;
    out.old_factor[h] = old_factor;
    out.new_factor[h] = factor / TQKVC_P_MAX;
}

template <bool CHECKED, int R>
static __device__ __forceinline__ void
weigh_rows(const tqkvc_product<R> (&products)[TQKVC_TILE_BLOCKS],
           const uint32_t (&k_scales)[TQKVC_TILE_BLOCKS / 2],
           const uint32_t (&v_scales)[TQKVC_TILE_BLOCKS / 2], uint32_t first_token,
           uint32_t end_token, uint32_t lane, tqkvc_row_state<R> &rows, tqkvc_probabilities<R> &out)
{
    float k[TQKVC_TILE_BLOCKS][2], v_log[TQKVC_TILE_BLOCKS][2];

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t byte = scale_byte(k_scales, b, i);
            k[b][i] = exp2_fast((float)byte * 0.0625f - 8.0f);
            if (CHECKED && byte == 0)
                k[b][i] = 0.0f;
            v_log[b][i] = (float)scale_byte(v_scales, b, i) * 0.0625f - 8.0f;
        }
    }
#pragma unroll
    for (int h = 0; h < R / 4; h++)
        weigh_row<CHECKED, R>(products, k, v_log, first_token + 2 * (lane / 4),
                              min(rows.limit[h], end_token), h, rows, out);
}

/* Whether any of the four bytes is 0. */
static __device__ __forceinline__ bool has_zero(uint32_t x)
{
    return ((x - 0x01010101u) & ~x & 0x80808080u) != 0;
}

/* Scores to probabilities of tokens [first_token, end_token), of which all rows see those below all_see. */
template <int R>
static __device__ __forceinline__ void
weigh_tile(const tqkvc_product<R> (&products)[TQKVC_TILE_BLOCKS],
           const uint32_t (&k_scales)[TQKVC_TILE_BLOCKS / 2],
           const uint32_t (&v_scales)[TQKVC_TILE_BLOCKS / 2], uint32_t first_token,
           uint32_t end_token, uint32_t all_see, uint32_t lane, tqkvc_row_state<R> &rows,
           tqkvc_probabilities<R> &out)
{
    const bool zeros = has_zero(k_scales[0]) || has_zero(k_scales[1]) || has_zero(v_scales[0]) ||
                       has_zero(v_scales[1]);
    const bool whole = end_token == first_token + TQKV_CUDA_TILE_TOKENS && end_token <= all_see;

    if (__any_sync(0xffffffffu, zeros) || !whole)
        weigh_rows<true, R>(products, k_scales, v_scales, first_token, end_token, lane, rows, out);
    else
        weigh_rows<false, R>(products, k_scales, v_scales, first_token, end_token, lane, rows, out);
}

/* Column operands of the probabilities of a block: [high or low for R = 8]; k is a token. */
template <int R>
static __device__ __forceinline__ void spread_probabilities(const uint32_t (&packed)[R / 4],
                                                            uint32_t lane, uint32_t (&out)[R / 4])
{
    /* Lane (g, t) wants tokens 4t .. 4t + 3 of column g; lanes (2t, .) and (2t + 1, .) have them. */
    const uint32_t g = lane / 4, t = lane % 4, source = 8 * t + g / 2;
    uint32_t x = __shfl_sync(0xffffffffu, packed[0], source);
    uint32_t y = __shfl_sync(0xffffffffu, packed[0], source + 4);
    if constexpr (R == 4) {
        out[0] = permute(x, y, g & 1 ? 0x6420u : 0x7531u);
    } else {
        const uint32_t x1 = __shfl_sync(0xffffffffu, packed[1], source);
        const uint32_t y1 = __shfl_sync(0xffffffffu, packed[1], source + 4);
        x = g & 1 ? x1 : x;
        y = g & 1 ? y1 : y;
        out[0] = permute(x, y, 0x7531u);
        out[1] = permute(x, y, 0x6420u);
    }
}

/* Products of V with the probabilities, two blocks at a time. */
template <int BITS, int R>
static __device__ __forceinline__ void
sum_unit(const uint8_t *unit, const uint32_t (&offsets)[TQKVC_TILE_BLOCKS],
         const tqkvc_table<BITS> &table, uint32_t lane,
         const uint32_t (&p)[TQKVC_TILE_BLOCKS][R / 4], tqkvc_product<R> &out)
{
#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b += 2) {
        tqkvc_levels first, second;
        v_levels<BITS>(unit + offsets[b], lane / 4, lane % 4, table, first);
        v_levels<BITS>(unit + offsets[b + 1], lane / 4, lane % 4, table, second);
        const uint32_t negative[4] = {first.negative[0], first.negative[1], second.negative[0],
                                      second.negative[1]};
        const uint32_t positive[4] = {first.positive[0], first.positive[1], second.positive[0],
                                      second.positive[1]};
#pragma unroll
        for (int h = 0; h < R / 4; h++) {
            multiply_k32(out.c[h], negative, p[b][h], p[b + 1][h]);
            if constexpr (tqkvc_is_shifted(BITS))
                multiply_k32(out.c[h], positive, p[b][h], p[b + 1][h]);
        }
    }
}

/* Sums of a unit: what they were, and what the tile adds. */
template <int R>
static __device__ __forceinline__ void add_unit(const tqkvc_product<R> &product,
                                                const float (&old_factor)[R / 4],
                                                const float (&new_factor)[R / 4], float *sums)
{
    constexpr int H = R / 4;
    float v[2 * H];

    if constexpr (H == 1)
        *reinterpret_cast<float2 *>(v) = *reinterpret_cast<const float2 *>(sums);
    else
        *reinterpret_cast<float4 *>(v) = *reinterpret_cast<const float4 *>(sums);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int h = 0; h < H; h++)
            v[half * H + h] =
                fmaf((float)product.value(half, h), new_factor[h], v[half * H + h] * old_factor[h]);
    if constexpr (H == 1)
        *reinterpret_cast<float2 *>(sums) = *reinterpret_cast<const float2 *>(v);
    else
        *reinterpret_cast<float4 *>(sums) = *reinterpret_cast<const float4 *>(v);
}

/* steps: by width. Units without codes in this tier are only brought to the new top. */
template <int D, int R>
static __device__ __forceinline__ void add_values(const tqkvc_sections &v,
                                                  const tqkvc_probabilities<R> &weights,
                                                  const uint32_t (*tables)[16], const float *steps,
                                                  uint32_t lane, tqkvc_warp_memory<D, R> &memory)
{
    constexpr int H = R / 4;
    const uint8_t *unit = v.first + TQKVC_BLOCK_TOKENS;
    uint32_t p[TQKVC_TILE_BLOCKS][H], offsets[TQKVC_TILE_BLOCKS];

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        offsets[b] = v.offset(b);
        spread_probabilities<R>(weights.packed[b], lane, p[b]);
    }
    for_runs<D / 16>(v.widths, [&](auto width, uint32_t first, uint32_t n) {
        constexpr int BITS = decltype(width)::value;
        tqkvc_table<BITS> table;
        float factor[H];
        int start[H][2];
#pragma unroll
        for (int h = 0; h < H; h++) {
            factor[h] = weights.new_factor[h] * steps[BITS];
            start[h][0] = 0;
            start[h][1] = tqkvc_is_shifted(BITS) ? weights.sum[h] : 0;
        }
        table.load(tables[BITS]);
#pragma unroll 1
        for (uint32_t u = first; u < first + n; u++, unit += 32 * BITS) {
            tqkvc_product<R> product;
            if constexpr (BITS != 0) {
                product.start(start);
                sum_unit<BITS, R>(unit, offsets, table, lane, p, product);
            } else {
                product = {};
            }
            add_unit<R>(product, weights.old_factor, factor, memory.sums[u][lane]);
        }
    });
}

#endif /* TQKVC_DECODE_TILE_CUH */
