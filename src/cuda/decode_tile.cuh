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

template <int R> struct tqkvc_row_state {
    static constexpr int H = R / 4;
    float top[H]; /* largest score so far */
    float sum[H],
        nonzero[H]; /* of this lane's tokens; nonzero leaves out rows of V that are zero */
    float q_factor[H], q_mean[H];
    int q_start[H][2]; /* sums of the query's bytes in units of widths 4 to 6; see lookup.cuh */
    uint32_t limit[H]; /* tokens below it are seen */
};

/* Sections of one side of the blocks of a tile, in shared memory. */
struct tqkvc_sections {
    const uint8_t *first;
    uint32_t bytes;
    uint32_t last; /* blocks past this one repeat it: a tier may have tiles of fewer than four */

    __device__ __forceinline__ uint32_t offset(uint32_t block) const
    {
        return min(block, last) * bytes;
    }

    /* Scale bytes of tokens 2g and 2g + 1 of every block, two blocks a word. */
    __device__ __forceinline__ void load_scales(uint32_t g,
                                                uint32_t (&out)[TQKVC_TILE_BLOCKS / 2]) const
    {
#pragma unroll
        for (int b = 0; b < TQKVC_TILE_BLOCKS; b += 2)
            out[b / 2] =
                load_u16(first + offset(b) + 2 * g) | load_u16(first + offset(b + 1) + 2 * g) << 16;
    }
};

/* Neighbouring units of one width. */
struct tqkvc_run {
    uint16_t bits, n_units;
};

/*
 * Runs of N units of K and of V, of which lanes below 16 have the widths of K and the others those of V; N at most 16.
 * A run begins where a lane's width is not that of the lane before. One warp.
 */
template <int N>
static __device__ __forceinline__ void find_runs(uint64_t widths, uint32_t lane,
                                                 tqkvc_run (&runs)[2][N])
{
    const uint32_t unit = lane % 16, side = lane / 16;
    const uint32_t bits = (uint32_t)(widths >> 4 * unit) & 15u,
                   before = __shfl_up_sync(0xffffffffu, bits, 1);
    const bool begins = unit < N && (unit == 0 || bits != before);
    const uint32_t starts = __ballot_sync(0xffffffffu, begins) >> 16 * side & 0xffffu,
                   later = starts >> unit >> 1;

    if (begins)
        runs[side][__popc(starts & ((1u << unit) - 1))] = {
            (uint16_t)bits, (uint16_t)(later ? __ffs(later) : N - unit)};
}

/* Shared memory of a warp besides its tile. */
template <int D, int R> struct tqkvc_warp_memory {
    __align__(16) float sums[D / 16][32][R / 2]; /* of V: [unit][lane][channel g or g + 8, row] */
    tqkvc_queries<D, R> queries;
    tqkvc_run runs[2][D / 16]; /* of K and of V, in the tier that the warp is at */
};

/* x, of which the compiler keeps nothing in registers that it could know before. */
static __device__ __forceinline__ uint32_t fresh(uint32_t x)
{
    uint32_t y;
    asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* body(tqkvc_bits, number of units) for each run of N units. */
template <int N, typename BODY>
static __device__ __forceinline__ void for_runs(const tqkvc_run *runs, BODY &&body)
{
#pragma unroll 1
    for (uint32_t left = N; left > 0; runs++) {
        const tqkvc_run run = *runs;
        with_width(run.bits, [&](auto width) { body(width, run.n_units); });
        left -= run.n_units;
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

    /* Row 1 less row 0 of the lane. */
    __device__ __forceinline__ int difference(int h) const
    {
        if constexpr (H == 1)
            return (c[0][2] - c[0][0]) * 256 + (c[0][3] - c[0][1]);
        else
            return (c[0][2 + h] - c[0][h]) * 256 + (c[1][2 + h] - c[1][h]);
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

/* Adds N units of the tile to the products. q: the lane's operands, a word for one unit, two for a pair. */
template <int BITS, int N, int D, int R>
static __device__ __forceinline__ void
score_units(const tqkvc_planes &planes, const uint32_t (&offsets)[TQKVC_TILE_BLOCKS],
            const tqkvc_table<BITS, TQKV_SIDE_K> &table, const uint32_t *q, uint32_t t,
            tqkvc_product<R> (&out)[TQKVC_TILE_BLOCKS])
{
    uint2 operand[R / 4];

#pragma unroll
    for (int h = 0; h < R / 4; h++) {
        const uint32_t *words = q + h * (D / 16) * 32;
        operand[h] =
            N == 2 ? *reinterpret_cast<const uint2 *>(words) : make_uint2(words[0], words[0]);
    }
#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        tqkvc_levels levels[N];
        if constexpr (N == 2)
            k_pair_levels<BITS>(planes.at(offsets[b]), t, table, levels);
        else
            k_levels<BITS>(planes.at(offsets[b]), t, table, levels[0]);
#pragma unroll
        for (int h = 0; h < R / 4; h++) {
            int(&c)[4] = out[b].c[h];
            if constexpr (N == 2) {
                multiply_k32_signed(c, levels[0].first[0], levels[1].first[0], levels[0].first[1],
                                    levels[1].first[1], operand[h].x, operand[h].y);
                if constexpr (tqkvc_has_second(BITS))
                    multiply_k32_signed(c, levels[0].second[0], levels[1].second[0],
                                        levels[0].second[1], levels[1].second[1], operand[h].x,
                                        operand[h].y);
            } else if constexpr (tqkvc_has_second(BITS)) {
                multiply_k32_signed(c, levels[0].first[0], levels[0].first[1], levels[0].second[0],
                                    levels[0].second[1], operand[h].x, operand[h].y);
            } else {
                multiply_k16(c, levels[0].first[0], levels[0].first[1], operand[h].x);
            }
        }
    }
}

/* Products of K with the query for the blocks of the tile. */
template <int D, int R>
static __device__ __forceinline__ void
score_tile(const tqkvc_sections &k, const tqkvc_warp_memory<D, R> &memory, tqkvc_rows tables,
           const tqkvc_row_state<R> &rows, uint32_t lane,
           tqkvc_product<R> (&out)[TQKVC_TILE_BLOCKS])
{
    const uint8_t *unit = k.first + TQKVC_BLOCK_TOKENS;
    const uint32_t *q = &memory.queries.operands[0][0][0];
    uint32_t offsets[TQKVC_TILE_BLOCKS];

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        offsets[b] = k.offset(b);
        out[b].start(rows.q_start);
    }
    for_runs<D / 16>(memory.runs[0], [&](auto width, uint32_t n) {
        constexpr int BITS = decltype(width)::value;
        const uint32_t here = fresh(lane), g = here / 4, t = here % 4;
        tqkvc_table<BITS, TQKV_SIDE_K> table;
        table.load(tables.row(BITS));
        const auto add = [&](auto count, uint32_t times) {
            constexpr int N = decltype(count)::value;
            const uint32_t *words = q + (N == 2 ? 32 * (t / 2) + 4 * g + t % 2 * 2 : here);
            tqkvc_planes planes;
            planes.start<BITS, N, TQKV_SIDE_K>(unit, here);
            q += times * N * 32;
            unit += times * N * 32 * BITS;
#pragma unroll 1
            for (; words < q; words += N * 32, planes = planes.at(N * 32 * BITS))
                score_units<BITS, N, D, R>(planes, offsets, table, words, t, out);
        };
        if constexpr (BITS == 0) {
            q += n * 32;
            return;
        }
        if constexpr (BITS <= 4)
            add(tqkvc_bits<2>(), n / 2);
        add(tqkvc_bits<1>(), BITS <= 4 ? n % 2 : n);
    });
}

/* Logarithm of the scale in byte i of block b: the byte becomes the last of 2^23. */
static __device__ __forceinline__ float scale_log(const uint32_t (&scales)[TQKVC_TILE_BLOCKS / 2],
                                                  int b, int i)
{
    const uint32_t x = permute(scales[b / 2], TQKVC_MAGIC, 0x7540u + 2 * (b % 2) + i);
    return fmaf(__uint_as_float(x), 0.0625f, -524288.0f - 8.0f);
}

/* Of one row of a lane: probabilities of the tile as 16 bits, two tokens a word. */
template <int R> struct tqkvc_probabilities {
    static constexpr int H = R / 4;
    uint32_t packed[TQKVC_TILE_BLOCKS][H];
    float old_factor[H], new_factor[H]; /* of the sums so far, and of what the tile adds */
};

constexpr float TQKVC_ZERO_LOG = -7.97f; /* byte 0 gives -8, byte 1 -7.94 */

/* The sums of a tile, relative to its top, to those of row h so far. */
template <int R>
static __device__ __forceinline__ void add_row(int h, float top, float sum, float nonzero,
                                               tqkvc_row_state<R> &rows,
                                               tqkvc_probabilities<R> &out)
{
    const float new_top = fmaxf(rows.top[h], top);
    const float old_factor = exp2_fast(rows.top[h] - new_top), factor = exp2_fast(top - new_top);

    rows.top[h] = new_top;
    rows.sum[h] = fmaf(sum, factor, rows.sum[h] * old_factor);
    rows.nonzero[h] = fmaf(nonzero, factor, rows.nonzero[h] * old_factor);
    out.old_factor[h] = old_factor;
    out.new_factor[h] = factor * (1.0f / TQKVC_P_MAX);
}

/*
 * Scores of a lane's rows to probabilities. CHECKED: tokens may be hidden or zero; otherwise all are
 * seen and none is zero. first_token: of the lane in the first block.
 */
template <bool CHECKED, int R>
static __device__ __forceinline__ void
weigh_rows(const tqkvc_product<R> (&products)[TQKVC_TILE_BLOCKS],
           const uint32_t (&k_scales)[TQKVC_TILE_BLOCKS / 2],
           const uint32_t (&v_scales)[TQKVC_TILE_BLOCKS / 2], uint32_t first_token,
           uint32_t end_token, tqkvc_row_state<R> &rows, tqkvc_probabilities<R> &out)
{
    constexpr int H = R / 4;
    float z[TQKVC_TILE_BLOCKS][2][H], v_log[TQKVC_TILE_BLOCKS][2], top[H], sum[H], nonzero[H];

#pragma unroll
    for (int h = 0; h < H; h++) {
        top[h] = TQKVC_LOWEST;
        sum[h] = nonzero[h] = 0;
    }
#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float k_log = scale_log(k_scales, b, i), k = exp2_fast(k_log);
            const uint32_t token = first_token + b * TQKVC_BLOCK_TOKENS + i;
            v_log[b][i] = scale_log(v_scales, b, i);
#pragma unroll
            for (int h = 0; h < H; h++) {
                float score =
                    fmaf((float)products[b].value(i, h), k * rows.q_factor[h], rows.q_mean[h]);
                if (CHECKED)
                    score = k_log > TQKVC_ZERO_LOG ? score : 0.0f;
                score += v_log[b][i];
                if (CHECKED)
                    score = token < min(rows.limit[h], end_token) ? score : -INFINITY;
                z[b][i][h] = score;
                top[h] = fmaxf(top[h], score);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < H; h++)
        for (int i = 4; i < 32; i *= 2)
            top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], i));
#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        uint32_t p[2][H];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool on = !CHECKED || v_log[b][i] > TQKVC_ZERO_LOG;
            const float inverse = exp2_fast(-v_log[b][i]);
#pragma unroll
            for (int h = 0; h < H; h++) {
                const float e = exp2_fast(z[b][i][h] - top[h]);
                sum[h] = fmaf(e, inverse, sum[h]);
                if (CHECKED)
                    nonzero[h] = fmaf(on ? e : 0.0f, inverse, nonzero[h]);
                p[i][h] =
                    __float_as_uint(fmaf(on ? e : 0.0f, TQKVC_P_MAX, __uint_as_float(TQKVC_MAGIC)));
            }
        }
#pragma unroll
        for (int h = 0; h < H; h++)
            out.packed[b][h] = permute(p[0][h], p[1][h], 0x5410u);
    }
#pragma unroll
    for (int h = 0; h < H; h++)
        add_row<R>(h, top[h], sum[h], CHECKED ? nonzero[h] : sum[h], rows, out);
}

/* Bit 7 of some bytes, but of none if no byte is 0. */
static __device__ __forceinline__ uint32_t find_zeros(uint32_t x)
{
    return (x - 0x01010101u) & ~x & 0x80808080u;
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
    const uint32_t zeros = find_zeros(k_scales[0]) | find_zeros(k_scales[1]) |
                           find_zeros(v_scales[0]) | find_zeros(v_scales[1]);
    const bool whole = end_token == first_token + TQKV_CUDA_TILE_TOKENS && end_token <= all_see;
    const uint32_t token = first_token + 2 * (lane / 4);

    if (__any_sync(0xffffffffu, zeros != 0) || !whole)
        weigh_rows<true, R>(products, k_scales, v_scales, token, end_token, rows, out);
    else
        weigh_rows<false, R>(products, k_scales, v_scales, token, end_token, rows, out);
}

/*
 * Column operands of a block's probabilities. V has bytes of two channels in turn (lookup.cuh), so
 * operands have zeros in turn: token, 0, token', 0 for channels 0..7, and the same a byte on for 8..15;
 * word 0 is of tokens 4t, 4t + 1, word 1 of 4t + 2, 4t + 3.
 */
struct tqkvc_operand {
    uint32_t even[2], odd[2];
};

/* [R / 4]: high and low bytes for R = 8, both in one for R = 4. */
template <int R>
static __device__ __forceinline__ void
spread_probabilities(const uint32_t (&packed)[R / 4], uint32_t lane, tqkvc_operand (&out)[R / 4])
{
    /* Lane (g, t) wants tokens 4t .. 4t + 3 of column g; lanes (2t, .) and (2t + 1, .) have them. */
    const uint32_t g = lane / 4, t = lane % 4, source = 8 * t + g / 2;

#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t x = __shfl_sync(0xffffffffu, packed[0], source + 4 * i);
        if constexpr (R == 4) {
            out[0].even[i] = permute(x, 0, g & 1 ? 0x4240u : 0x4341u);
        } else {
            const uint32_t y = __shfl_sync(0xffffffffu, packed[1], source + 4 * i);
            x = g & 1 ? y : x;
            out[0].even[i] = permute(x, 0, 0x4341u);
            out[1].even[i] = permute(x, 0, 0x4240u);
        }
#pragma unroll
        for (int h = 0; h < R / 4; h++)
            out[h].odd[i] = out[h].even[i] << 8;
    }
}

/*
 * Adds the tile to the sums of N units, for the rows of a lane: out[0] has channels g and g + 8. Pairs,
 * of widths of one table, have the operand's rows for channels as v_pair_levels says.
 */
template <int BITS, int N, int R>
static __device__ __forceinline__ void
sum_units(const tqkvc_planes &planes, const uint32_t (&offsets)[TQKVC_TILE_BLOCKS],
          const tqkvc_table<BITS, TQKV_SIDE_V> &table, uint32_t g,
          const tqkvc_operand (&p)[TQKVC_TILE_BLOCKS][R / 4], int (&out)[N][2][R / 4])
{
    constexpr int H = R / 4;
    tqkvc_product<R> sums[2] = {};

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        tqkvc_levels levels[2] = {};
        if constexpr (N == 2) {
            v_pair_levels<BITS>(planes.at(offsets[b]), g, table, levels);
            levels[0].second[0] = levels[1].first[0];
            levels[0].second[1] = levels[1].first[1];
        } else {
            v_levels<BITS>(planes.at(offsets[b]), g, table, levels[0]);
        }
        const tqkvc_levels &a = levels[0];
#pragma unroll
        for (int h = 0; h < H; h++) {
            const tqkvc_operand &operand = p[b][h];
            if constexpr (BITS == 8) {
                multiply_k16_unsigned(sums[0].c[h], a.first[0], a.first[1],
                                      permute(operand.even[0], operand.even[1], 0x6420u));
            } else {
                multiply_k32(sums[0].c[h], a.first[0], a.second[0], a.first[1], a.second[1],
                             operand.even[0], operand.even[1]);
                multiply_k32(sums[1].c[h], a.first[0], a.second[0], a.first[1], a.second[1],
                             operand.odd[0], operand.odd[1]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < H; h++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if constexpr (BITS == 8) {
                out[0][i][h] = sums[0].value(i, h);
            } else if constexpr (tqkvc_has_second(BITS)) {
                out[0][i][h] = sums[i].difference(h);
            } else {
#pragma unroll
                for (int n = 0; n < N; n++)
                    out[n][i][h] = sums[i].value(n, h);
            }
        }
    }
}

/* sums, of a lane: what they were, and what the tile adds. */
template <int R>
static __device__ __forceinline__ void add_sums(const int (&added)[2][R / 4],
                                                const float (&old_factor)[R / 4],
                                                const float (&factor)[R / 4], float *sums)
{
    constexpr int H = R / 4;
    struct __align__(2 * R) values
    {
        float v[2][H];
    };
    values now = *reinterpret_cast<const values *>(sums);

#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < H; h++)
            now.v[i][h] = fmaf((float)added[i][h], factor[h], now.v[i][h] * old_factor[h]);
    *reinterpret_cast<values *>(sums) = now;
}

/* Units without codes in this tier are only brought to the new top. */
template <int D, int R>
static __device__ __forceinline__ void
add_values(const tqkvc_sections &v, const tqkvc_probabilities<R> &weights, tqkvc_rows tables,
           uint32_t lane, tqkvc_warp_memory<D, R> &memory)
{
    constexpr int H = R / 4;
    const uint8_t *unit = v.first + TQKVC_BLOCK_TOKENS;
    float(*sums)[R / 2] = memory.sums[0];
    tqkvc_operand p[TQKVC_TILE_BLOCKS][H];
    uint32_t offsets[TQKVC_TILE_BLOCKS];

#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        offsets[b] = v.offset(b);
        spread_probabilities<R>(weights.packed[b], lane, p[b]);
    }
    for_runs<D / 16>(memory.runs[1], [&](auto width, uint32_t n) {
        constexpr int BITS = decltype(width)::value;
        const uint32_t here = fresh(lane);
        tqkvc_table<BITS, TQKV_SIDE_V> table;
        const float step = tables.step(BITS);
        float factor[H];
#pragma unroll
        for (int h = 0; h < H; h++)
            factor[h] = weights.new_factor[h] * step;
        table.load(tables.row(BITS));
        const auto add = [&](auto count, uint32_t times) {
            constexpr int N = decltype(count)::value;
            float(*to)[R / 2] = sums + (N == 2 ? here / 16 * 32 + here % 16 : here);
            tqkvc_planes planes;
            planes.start<BITS, N, TQKV_SIDE_V>(unit, here);
            sums += times * N * 32;
            unit += times * N * 32 * BITS;
#pragma unroll 1
            for (; to < sums; to += N * 32, planes = planes.at(N * 32 * BITS)) {
                int added[N][2][H] = {};
                if constexpr (BITS != 0)
                    sum_units<BITS, N, R>(planes, offsets, table, here / 4, p, added);
#pragma unroll
                for (int n = 0; n < N; n++) /* those of a pair: v_pair_levels */
                    add_sums<R>(added[n], weights.old_factor, factor, to[16 * n]);
            }
        };
        if constexpr (BITS >= 1 && BITS <= 3)
            add(tqkvc_bits<2>(), n / 2);
        add(tqkvc_bits<1>(), BITS >= 1 && BITS <= 3 ? n % 2 : n);
    });
}

#endif /* TQKVC_DECODE_TILE_CUH */
