/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What one warp of decode does with a tile of 64 tokens of one KV head in shared memory.
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

constexpr float TQKVC_Q_MAX = 32512.0f;  /* the high byte stays within +-127 */
constexpr float TQKVC_P_MAX = 65535.0f;
constexpr float TQKVC_LOWEST = -1e30f;   /* instead of -inf, of which differences are NaN */
constexpr uint32_t TQKVC_MAGIC = 0x4b000000u; /* 2^23: adding it leaves a whole number in the low bits */

/* Shared memory of a warp besides its ring. */
template <int D, int R> struct tqkvc_warp_memory {
    float sums[D / 16][32][R / 2];        /* of V: [unit][lane][channel g or g + 8, row] */
    uint32_t q[R / 4][D / 16][32];        /* column operands: R = 8 has high bytes, then low bytes */
};

template <int R> struct tqkvc_row_state {
    static constexpr int H = R / 4;
    float top[H];           /* largest score so far */
    float sum[H], nonzero[H]; /* of this lane's tokens; nonzero leaves out rows of V that are zero */
    float q_factor[H], q_mean[H];
    int q_start[H][2];      /* sums of the query's bytes in units of shifted levels; see lookup.cuh */
    uint32_t limit[H];      /* tokens below it are seen */
};

/* Where the tile is and how its rows are cut. */
struct tqkvc_tile {
    const uint8_t *blocks; /* in shared memory, slot_bytes apart */
    uint32_t slot_bytes, k_bytes, first_token;
    uint64_t widths[2];
};

static __device__ __forceinline__ uint32_t unit_width(uint64_t widths, uint32_t unit)
{
    return (uint32_t)(widths >> (4 * unit)) & 15u;
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

/* Products of K with the query for the four blocks of the tile. */
template <int D, int R>
static __device__ __forceinline__ void score_tile(const tqkvc_tile &tile, const tqkvc_warp_memory<D, R> &memory,
                                                  const uint32_t (*tables)[16], const tqkvc_row_state<R> &rows,
                                                  uint32_t lane, tqkvc_product<R> (&out)[TQKVC_TILE_BLOCKS])
{
    constexpr int H = R / 4;
    const uint8_t *unit = tile.blocks + TQKVC_BLOCK_TOKENS;

    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++)
        out[b].start(rows.q_start);
#pragma unroll 1
    for (uint32_t u = 0; u < D / 16; u++) {
        const uint32_t bits = unit_width(tile.widths[0], u);
        uint32_t q[H];
        for (int h = 0; h < H; h++)
            q[h] = memory.q[h][u][lane];
        with_width(bits, [&](auto width) {
            constexpr int BITS = decltype(width)::value;
            tqkvc_table<BITS> table;
            table.load(tables[BITS]);
#pragma unroll
            for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
                tqkvc_levels levels;
                k_levels<BITS>(unit + b * tile.slot_bytes, lane / 4, lane % 4, table, levels);
                for (int h = 0; h < H; h++) {
                    multiply_k16(out[b].c[h], levels.negative[0], levels.negative[1], q[h]);
                    if constexpr (tqkvc_is_shifted(BITS))
                        multiply_k16(out[b].c[h], levels.positive[0], levels.positive[1], q[h]);
                }
            }
        });
        unit += 32 * bits;
    }
}

/* Probabilities of the tile, packed: [block][row] two tokens of 16 bits, and their sum. */
template <int R> struct tqkvc_probabilities {
    static constexpr int H = R / 4;
    uint32_t packed[TQKVC_TILE_BLOCKS][H];
    int sum[H];
    float old_factor[H], new_factor[H]; /* of the sums so far, and of what the tile adds */
};

/* z: scores plus the logarithm of the scale of V; -inf where a token is not seen. */
template <int R>
static __device__ __forceinline__ void weigh_row(const float (&z)[TQKVC_TILE_BLOCKS][2],
                                                 const float (&v_log)[TQKVC_TILE_BLOCKS][2], int h,
                                                 tqkvc_row_state<R> &rows, tqkvc_probabilities<R> &out)
{
    float top = TQKVC_LOWEST;
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++)
        top = fmaxf(top, fmaxf(z[b][0], z[b][1]));
    for (int i = 4; i < 32; i *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));

    float sum = 0, nonzero = 0;
    uint32_t whole = 0;
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        uint32_t p[2];
        for (int i = 0; i < 2; i++) {
            const bool on = v_log[b][i] > -7.97f; /* scale byte 0 has -8, 1 has -7.94 */
            const float e = exp2_fast(z[b][i] - top);
            const float share = e * exp2_fast(-v_log[b][i]);
            sum += share;
            nonzero += on ? share : 0.0f;
            p[i] = __float_as_uint(fmaf(on ? e : 0.0f, TQKVC_P_MAX, __uint_as_float(TQKVC_MAGIC)));
            whole += p[i] - TQKVC_MAGIC;
        }
        out.packed[b][h] = permute(p[0], p[1], 0x5410u);
    }
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

template <int R>
static __device__ __forceinline__ void weigh_tile(const tqkvc_tile &tile, const tqkvc_product<R> (&products)[TQKVC_TILE_BLOCKS],
                                                  uint32_t lane, tqkvc_row_state<R> &rows, tqkvc_probabilities<R> &out)
{
    const uint32_t g = lane / 4;
    float k_scale[TQKVC_TILE_BLOCKS][2], v_log[TQKVC_TILE_BLOCKS][2];

    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
        const uint8_t *block = tile.blocks + b * tile.slot_bytes;
        const uint32_t k = load_u16(block + 2 * g), v = load_u16(block + tile.k_bytes + 2 * g);
        for (int i = 0; i < 2; i++) {
            const uint32_t byte = k >> 8 * i & 255u;
            k_scale[b][i] = byte == 0 ? 0.0f : exp2_fast(((int)byte - 128) * 0.0625f);
            v_log[b][i] = ((int)(v >> 8 * i & 255u) - 128) * 0.0625f;
        }
    }
    for (int h = 0; h < R / 4; h++) {
        float z[TQKVC_TILE_BLOCKS][2];
        for (int b = 0; b < TQKVC_TILE_BLOCKS; b++) {
            for (int i = 0; i < 2; i++) {
                const float dot = (float)products[b].value(i, h) * rows.q_factor[h];
                const float score = k_scale[b][i] > 0 ? fmaf(dot, k_scale[b][i], rows.q_mean[h]) : 0.0f;
                const uint32_t token = tile.first_token + b * TQKVC_BLOCK_TOKENS + 2 * g + i;
                z[b][i] = token < rows.limit[h] ? score + v_log[b][i] : -INFINITY;
            }
        }
        weigh_row<R>(z, v_log, h, rows, out);
    }
}

/* Column operands of the probabilities of a block: [high or low for R = 8]; k is a token. */
template <int R>
static __device__ __forceinline__ void spread_probabilities(const uint32_t (&packed)[R / 4], uint32_t lane, uint32_t (&out)[R / 4])
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
static __device__ __forceinline__ void sum_unit(const uint8_t *unit, uint32_t slot_bytes, const tqkvc_table<BITS> &table,
                                                uint32_t lane, const uint32_t (&p)[TQKVC_TILE_BLOCKS][R / 4],
                                                tqkvc_product<R> &out)
{
#pragma unroll
    for (int b = 0; b < TQKVC_TILE_BLOCKS; b += 2) {
        tqkvc_levels first, second;
        v_levels<BITS>(unit + b * slot_bytes, lane / 4, lane % 4, table, first);
        v_levels<BITS>(unit + (b + 1) * slot_bytes, lane / 4, lane % 4, table, second);
        const uint32_t negative[4] = {first.negative[0], first.negative[1], second.negative[0], second.negative[1]};
        const uint32_t positive[4] = {first.positive[0], first.positive[1], second.positive[0], second.positive[1]};
        for (int h = 0; h < R / 4; h++) {
            multiply_k32(out.c[h], negative, p[b][h], p[b + 1][h]);
            if constexpr (tqkvc_is_shifted(BITS))
                multiply_k32(out.c[h], positive, p[b][h], p[b + 1][h]);
        }
    }
}

/* steps: by width. */
template <int D, int R>
static __device__ __forceinline__ void add_values(const tqkvc_tile &tile, const tqkvc_probabilities<R> &weights,
                                                  const uint32_t (*tables)[16], const float *steps, uint32_t lane,
                                                  tqkvc_warp_memory<D, R> &memory)
{
    constexpr int H = R / 4;
    const uint8_t *unit = tile.blocks + tile.k_bytes + TQKVC_BLOCK_TOKENS;
    uint32_t p[TQKVC_TILE_BLOCKS][H];

    for (int b = 0; b < TQKVC_TILE_BLOCKS; b++)
        spread_probabilities<R>(weights.packed[b], lane, p[b]);
#pragma unroll 1
    for (uint32_t u = 0; u < D / 16; u++) {
        const uint32_t bits = unit_width(tile.widths[1], u);
        tqkvc_product<R> product;
        with_width(bits, [&](auto width) {
            constexpr int BITS = decltype(width)::value;
            int start[H][2];
            for (int h = 0; h < H; h++) {
                start[h][0] = 0;
                start[h][1] = tqkvc_is_shifted(BITS) ? weights.sum[h] : 0;
            }
            product.start(start);
            tqkvc_table<BITS> table;
            table.load(tables[BITS]);
            sum_unit<BITS, R>(unit, tile.slot_bytes, table, lane, p, product);
        });
        if (bits == 0) /* of this tier; others may have added to the sums */
            product = {};
        float *sums = memory.sums[u][lane];
        for (int half = 0; half < 2; half++)
            for (int h = 0; h < H; h++)
                sums[half * H + h] = fmaf((float)product.value(half, h), weights.new_factor[h] * steps[bits],
                                          sums[half * H + h] * weights.old_factor[h]);
        unit += 32 * bits;
    }
}

#endif /* TQKVC_DECODE_TILE_CUH */
