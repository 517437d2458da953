/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a block of prefill has in shared memory, and what it does with a tile of tokens of one KV head there: codes to
 * levels, scores, probabilities, sums.
 *
 * The first warps of a block, four or eight, are its expanders, each four behind them read 64 rows. What is multiplied lies in
 * panels of rows of 128 bytes, whose pieces of 16 bytes are permuted by the row, as matrix instructions expect it:
 *
 *     queries   [rows][2 D bytes]         high bytes of all channels, then low bytes; channels i and i + 8 of a
 *                                         unit side by side (levels.cuh)
 *     keys      [tokens][D bytes]         the same order
 *     values    [D][tokens] f16
 *
 * Queries are whole numbers of 16 bits, so that scores are exact but for these, as in decode; probabilities are f16.
 * A score is in powers of two and lacks what a query makes with the mean of K: that is the same for all tokens of a
 * frame, so tops are moved instead where a frame begins. What is exponentiated is the score plus the logarithm of the
 * scale of V, so that probabilities are relative to the largest product of both.
 */
#ifndef TQKVC_PREFILL_TILE_CUH
#define TQKVC_PREFILL_TILE_CUH

#include "cuda/launch.h"
#include "cuda/levels.cuh"
#include "cuda/prefill_mma.cuh"

constexpr float TQKVC_LOWEST_TOP = -1e30f; /* instead of -inf, of which differences are NaN */
constexpr float TQKVC_TOP_SLACK = 8.0f;    /* a top may lag behind so far: f16 holds 2^8 well */

/* Levels of a tile. */
template <int D> struct __align__(1024) tqkvc_prefill_stage {
    using shape = tqkvc_prefill_shape<D>;
    uint8_t keys[shape::TOKENS * D], values[shape::TOKENS * D * 2];
    float k_scale[shape::TOKENS], v_log[shape::TOKENS], v_inverse[shape::TOKENS];
    uint32_t tier, zeros[3]; /* zeros: whether there are zero rows, of 32 tokens each */
    uint64_t full, empty;    /* barriers */
};

/* Behind it are stages, then rows of low parts, then codes. */
template <int D> struct __align__(1024) tqkvc_prefill_memory {
    using shape = tqkvc_prefill_shape<D>;
    uint8_t queries[shape::ROWS * D * 2];           /* or rows as f16 */
    uint32_t tables[TQKVC_WIDTHS][TQKVC_WORDS + 1]; /* words and step */
    float means[shape::ROWS], factors[shape::ROWS], sizes[shape::ROWS], shares[shape::ROWS];
    uint32_t places[shape::ROWS], limits[shape::ROWS];
    float largest[4 * shape::READERS][64]; /* products of a warp with 64 rows */
    float v_steps[4 * shape::READERS][shape::UNITS]; /* that sums are to be multiplied by */
    uint64_t staged[TQKVC_PREFILL_STAGED_MAX], drained[TQKVC_PREFILL_STAGED_MAX]; /* barriers: codes came, were read */
};

/* The sum of the nibbles below nibble u. */
static __device__ __forceinline__ uint32_t sum_widths(uint64_t widths, uint32_t u)
{
    const uint64_t below = widths & ((1ull << 4 * u) - 1), mask = 0x0f0f0f0f0f0f0f0full;

    return (uint32_t)(((below & mask) + (below >> 4 & mask)) * 0x0101010101010101ull >> 56);
}

/* Codes of a tile in shared memory: the sections of K and V of a block, then of the next. */
struct tqkvc_tile_codes {
    const uint8_t *first;
    uint32_t bytes[2]; /* of a section of K, of V */
    uint64_t widths[2];

    __device__ __forceinline__ const uint8_t *block(uint32_t b) const
    {
        return first + b * (bytes[0] + bytes[1]);
    }
};

/* Levels of unit u of a side. One warp. */
template <int D, int SIDE>
static __device__ __forceinline__ void expand_unit(const tqkvc_tile_codes &codes, uint32_t u,
                                                   tqkvc_rows tables, uint32_t lane,
                                                   tqkvc_prefill_stage<D> &stage)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t at = TQKVC_BLOCK_TOKENS + 32 * sum_widths(codes.widths[SIDE], u) +
                        (SIDE == TQKV_SIDE_V ? codes.bytes[0] : 0);
    const uint32_t token = lane / 16 * 8 + lane % 8, h = lane / 8 % 2; /* of K */
    const uint32_t channel = 16 * u + lane % 8;                        /* of V */

    with_width((uint32_t)(codes.widths[SIDE] >> 4 * u) & 15u, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto table = load_level_table<BITS>(tables);
#pragma unroll
        for (uint32_t b = 0; b < shape::BLOCKS; b++) {
            const uint8_t *unit = codes.block(b) + at;
            if constexpr (SIDE == TQKV_SIDE_K) {
                *reinterpret_cast<uint2 *>(stage.keys + shape::key_at(16 * b + token, u) + 8 * h) =
                    k_row_levels<BITS>(unit, token, h, table);
            } else {
                const uint4 x = v_row_levels<BITS>(unit, lane, table);
                uint8_t *to = stage.values + shape::value_at(channel, 2 * b + lane / 16) + lane / 8 % 2 * 8;
                *reinterpret_cast<uint2 *>(to) = make_uint2(x.x, x.y);
                *reinterpret_cast<uint2 *>(to + 8 * shape::TOKENS * 2) = make_uint2(x.z, x.w);
            }
        }
    });
}

/* Levels and scales of a tile, by the expanders. */
template <int D>
static __device__ __forceinline__ void expand_tile(const tqkvc_tile_codes &codes, tqkvc_rows tables,
                                                   uint32_t n_warps, uint32_t warp, uint32_t lane,
                                                   tqkvc_prefill_stage<D> &stage)
{
    using shape = tqkvc_prefill_shape<D>;

    const uint32_t token = 32 * (warp + shape::TOKENS / 32 - n_warps) + lane; /* of the last warps: the first copies */
    if (warp >= n_warps - shape::TOKENS / 32) {
        const uint8_t *block = codes.block(token / 16) + token % 16;
        const uint32_t k = block[0], v = block[codes.bytes[0]];
        const float v_log = ((float)v - 128.0f) * 0.0625f;
        stage.k_scale[token] = k == 0 ? 0.0f : exp2_fast(((float)k - 128.0f) * 0.0625f);
        stage.v_log[token] = v_log;
        stage.v_inverse[token] = exp2_fast(-v_log);
        const bool zeros = __any_sync(0xffffffffu, k == 0 || v == 0);
        if (lane == 0)
            stage.zeros[token / 32] = zeros;
    }
#pragma unroll 1
    for (uint32_t i = warp; i < 2 * shape::UNITS; i += n_warps)
        if (i < shape::UNITS)
            expand_unit<D, TQKV_SIDE_K>(codes, i, tables, lane, stage);
        else
            expand_unit<D, TQKV_SIDE_V>(codes, i - shape::UNITS, tables, lane, stage);
}

/* Of a lane's rows g and g + 8 of a warp. sum, and zero, which is of zero rows of V: of this lane's tokens. */
template <int D> struct tqkvc_prefill_rows {
    float top[2], sum[2], zero[2], factor[2];
    float sums[D / 8][4]; /* without the steps of V */
};

/* Scores to what is exponentiated. first: token of the tile; row: of the lane's first. */
template <int D, bool CHECKED>
static __device__ __forceinline__ void
scale_scores(const tqkvc_prefill_stage<D> &stage, const tqkvc_prefill_memory<D> &shared, uint32_t first,
             uint32_t row, uint32_t lane, const tqkvc_prefill_rows<D> &rows, const tqkvc_scores<D> &products,
             float (&z)[tqkvc_prefill_shape<D>::TOKENS / 8][4])
{
    using shape = tqkvc_prefill_shape<D>;

#pragma unroll
    for (int n = 0; n < shape::TOKENS / 8; n++) {
        const uint32_t token = 8 * n + 2 * (lane % 4);
        const float2 k = *reinterpret_cast<const float2 *>(stage.k_scale + token);
        const float2 v_log = *reinterpret_cast<const float2 *>(stage.v_log + token);
        const float scale[2] = {k.x, k.y}, add[2] = {v_log.x, v_log.y};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float &x = z[n][i];
            x = fmaf((float)products.value(n, i), scale[i % 2] * rows.factor[i / 2], add[i % 2]);
            if (CHECKED) {
                if (scale[i % 2] == 0.0f) /* a score of 0, of which the mean's part is to go */
                    x -= shared.means[row + i / 2 * 8];
                if (first + token + i % 2 >= shared.limits[row + i / 2 * 8])
                    x = -INFINITY;
            }
        }
    }
}

/* Moves the tops where scores are far above them, and brings the sums there. */
template <int D>
static __device__ __forceinline__ void lift_tops(const float (&z)[tqkvc_prefill_shape<D>::TOKENS / 8][4],
                                                 tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    float top[2] = {-INFINITY, -INFINITY}, factor[2];
    bool lifts = false;

#pragma unroll
    for (int i = 0; i < shape::TOKENS / 2; i++)
        top[i % 4 / 2] = fmaxf(top[i % 4 / 2], z[i / 4][i % 4]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
        const bool is_far = top[h] > rows.top[h] + TQKVC_TOP_SLACK;
        top[h] = is_far ? top[h] : rows.top[h];
        factor[h] = exp2_fast(rows.top[h] - top[h]);
        rows.top[h] = top[h];
        lifts |= is_far;
    }
    if (!__any_sync(0xffffffffu, lifts))
        return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows.sum[h] *= factor[h];
        rows.zero[h] *= factor[h];
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++)
        rows.sums[i / 4][i % 4] *= factor[i % 4 / 2];
}

/* Scores to probabilities times the scales of V, two to a word. CHECKED: rows of V may be zero. */
template <int D, bool CHECKED>
static __device__ __forceinline__ void
weigh_scores(const tqkvc_prefill_stage<D> &stage, uint32_t lane, tqkvc_prefill_rows<D> &rows,
             const float (&z)[tqkvc_prefill_shape<D>::TOKENS / 8][4], tqkvc_weights<D> &out)
{
    using shape = tqkvc_prefill_shape<D>;

#pragma unroll
    for (int n = 0; n < shape::TOKENS / 8; n++) {
        const uint32_t token = 8 * n + 2 * (lane % 4);
        const float2 v = *reinterpret_cast<const float2 *>(stage.v_inverse + token);
        const float inverse[2] = {v.x, v.y};
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[i] = exp2_fast(z[n][i] - rows.top[i / 2]);
            rows.sum[i / 2] = fmaf(p[i], inverse[i % 2], rows.sum[i / 2]);
            if (CHECKED && stage.v_log[token + i % 2] <= -8.0f) {
                rows.zero[i / 2] = fmaf(p[i], inverse[i % 2], rows.zero[i / 2]);
                p[i] = 0.0f;
            }
        }
        out.words[n / 2][n % 2 * 2] = pack_halves(p[0], p[1]);
        out.words[n / 2][n % 2 * 2 + 1] = pack_halves(p[2], p[3]);
    }
}

/* A tile for 16 rows from `row` on in each of four warps. first: its token; all_see: of tokens. */
template <int D>
static __device__ __forceinline__ void
read_tile(const tqkvc_prefill_memory<D> &shared, const tqkvc_prefill_stage<D> &stage, uint32_t first,
          uint32_t all_see, uint32_t row, uint32_t lane, tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    tqkvc_scores<D> products;
    float z[shape::TOKENS / 8][4];
    tqkvc_weights<D> weights;
    const bool zeros = stage.zeros[0] || (shape::TOKENS > 32 && stage.zeros[1]);

    multiply_keys<D>(shared.queries, stage.keys, row, lane, products);
    if (zeros || first + shape::TOKENS > all_see) {
        scale_scores<D, true>(stage, shared, first, row + lane / 4, lane, rows, products, z);
        lift_tops<D>(z, rows);
        weigh_scores<D, true>(stage, lane, rows, z, weights);
    } else {
        scale_scores<D, false>(stage, shared, first, row + lane / 4, lane, rows, products, z);
        lift_tops<D>(z, rows);
        weigh_scores<D, false>(stage, lane, rows, z, weights);
    }
    multiply_values<D>(stage.values, lane, weights, rows.sums);
}

#endif /* TQKVC_PREFILL_TILE_CUH */
