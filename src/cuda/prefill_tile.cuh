/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a block of prefill has in shared memory, and what it does with a tile of tokens of one KV head there:
 * codes to levels, scores, probabilities, sums.
 *
 * Rows of queries are cut into 64 of four warps, one or two times (M): row 64 m + 16 warp + i. Operands lie in
 * panels of 64 channels, rows of 128 bytes, whose pieces of 16 bytes are permuted by the row: neither stores of
 * levels nor loads of operands meet in a bank.
 *
 *     queries   [D / 64][rows][64]      channels i and i + 8 of a unit side by side (levels.cuh)
 *     keys      [D / 64][tokens][64]    the same
 *     values    [D][tokens]
 *
 * A score is in powers of two and lacks what a query makes with the mean of K: that is the same for all tokens
 * of a frame, so tops are moved instead where a frame begins. What is exponentiated is the score plus the
 * logarithm of the scale of V, so that probabilities as f16 are relative to the largest product of both.
 */
#ifndef TQKVC_PREFILL_TILE_CUH
#define TQKVC_PREFILL_TILE_CUH

#include "cuda/launch.h"
#include "cuda/levels.cuh"
#include "cuda/ring.cuh"

constexpr float TQKVC_LOWEST_TOP = -1e30f; /* instead of -inf, of which differences are NaN */
constexpr float TQKVC_TOP_SLACK = 8.0f;    /* a top may lag behind so far: f16 holds 2^8 well */
constexpr uint32_t TQKVC_PREFILL_WARPS = 4;

template <int D> struct tqkvc_prefill_shape {
    static constexpr int M = D < 256 ? 2 : 1;
    static constexpr int ROWS = 64 * M;
    static constexpr int TOKENS = D < 256 ? 64 : 32;
    static constexpr int BLOCKS = TOKENS / TQKVC_BLOCK_TOKENS;
    static constexpr int UNITS = D / 16;
};

template <int D> struct __align__(1024) tqkvc_prefill_memory {
    using shape = tqkvc_prefill_shape<D>;
    uint8_t queries[shape::ROWS * D * 2];
    uint8_t keys[shape::TOKENS * D * 2], values[shape::TOKENS * D * 2]; /* or rows, as queries */
    uint32_t tables[TQKVC_WIDTHS][TQKVC_WORDS + 1];                     /* words and step */
    float k_scale[shape::TOKENS], v_log[shape::TOKENS], v_inverse[shape::TOKENS];
    float means[shape::ROWS], sizes[shape::ROWS], shares[shape::ROWS];
    uint32_t places[shape::ROWS], limits[shape::ROWS];
    float v_steps[TQKVC_PREFILL_WARPS][shape::UNITS]; /* that sums are to be multiplied by */
    uint64_t barrier;
    uint32_t tier;
};

/* Where the piece of 16 bytes of a row of N rows is: channels [8 piece, 8 piece + 8). */
template <int N> static __device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t piece)
{
    return piece / 8 * (N * 128) + row * 128 + ((piece ^ row) % 8) * 16;
}

/* The same in values: tokens [8 piece, 8 piece + 8) of a channel. */
template <int TOKENS>
static __device__ __forceinline__ uint32_t value_piece_at(uint32_t channel, uint32_t piece)
{
    return TOKENS == 64 ? channel * 128 + ((piece ^ channel) % 8) * 16
                        : channel * 64 + ((piece ^ channel / 2) % 4) * 16;
}

/* Four operands of 8 x 8, each of the rows whose addresses eight lanes give. */
static __device__ __forceinline__ void load_operands(uint32_t (&out)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

/* Row operand of 16 rows from `row` on and of unit u, of N rows. */
template <int N>
static __device__ __forceinline__ uint4 load_rows_operand(uint32_t base, uint32_t row, uint32_t u,
                                                          uint32_t lane)
{
    uint32_t a[4];

    load_operands(a, base + piece_at<N>(row + lane % 16, 2 * u + lane / 16));
    return make_uint4(a[0], a[1], a[2], a[3]);
}

/* Column operands of columns [column, column + 16) and of unit u: words 0, 1 of the first eight. */
template <int N>
static __device__ __forceinline__ void load_columns_operand(uint32_t (&out)[4], uint32_t base,
                                                            uint32_t column, uint32_t u, uint32_t lane)
{
    load_operands(out, base + piece_at<N>(column + lane % 8 + lane / 16 * 8, 2 * u + lane / 8 % 2));
}

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
                                                   tqkvc_prefill_memory<D> &shared)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t at = TQKVC_BLOCK_TOKENS + 32 * sum_widths(codes.widths[SIDE], u) +
                        (SIDE == TQKV_SIDE_V ? codes.bytes[0] : 0);

    with_width((uint32_t)(codes.widths[SIDE] >> 4 * u) & 15u, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto table = load_level_table<BITS>(tables);
#pragma unroll
        for (uint32_t b = 0; b < shape::BLOCKS; b++) {
            const uint8_t *unit = codes.block(b) + at;
            if constexpr (SIDE == TQKV_SIDE_K) {
                const uint32_t piece = 2 * u + lane / 16;
                *reinterpret_cast<uint4 *>(shared.keys +
                                           piece_at<shape::TOKENS>(16 * b + lane % 16, piece)) =
                    k_row_levels<BITS>(unit, lane, table);
            } else {
                const uint32_t channel = 16 * u + lane % 8, piece = 2 * b + lane / 16;
                const uint4 x = v_row_levels<BITS>(unit, lane, table);
                uint8_t *to = shared.values + value_piece_at<shape::TOKENS>(channel, piece) +
                              lane / 8 % 2 * 8;
                *reinterpret_cast<uint2 *>(to) = make_uint2(x.x, x.y);
                *reinterpret_cast<uint2 *>(to + 8 * shape::TOKENS * 2) = make_uint2(x.z, x.w);
            }
        }
    });
}

/* Levels and scales of a tile, by all threads. True if this thread has seen a zero row. */
template <int D>
static __device__ __forceinline__ bool expand_tile(const tqkvc_tile_codes &codes, tqkvc_rows tables,
                                                   uint32_t warp, uint32_t lane,
                                                   tqkvc_prefill_memory<D> &shared)
{
    using shape = tqkvc_prefill_shape<D>;
    bool zero = false;

    if (threadIdx.x < shape::TOKENS) {
        const uint8_t *block = codes.block(threadIdx.x / 16) + threadIdx.x % 16;
        const uint32_t k = block[0], v = block[codes.bytes[0]];
        const float v_log = ((float)v - 128.0f) * 0.0625f;
        zero = k == 0 || v == 0;
        shared.k_scale[threadIdx.x] = k == 0 ? 0.0f : exp2_fast(((float)k - 128.0f) * 0.0625f);
        shared.v_log[threadIdx.x] = v_log;
        shared.v_inverse[threadIdx.x] = exp2_fast(-v_log);
    }
#pragma unroll 1
    for (uint32_t u = warp; u < shape::UNITS; u += TQKVC_PREFILL_WARPS)
        expand_unit<D, TQKV_SIDE_K>(codes, u, tables, lane, shared);
#pragma unroll 1
    for (uint32_t u = warp; u < shape::UNITS; u += TQKVC_PREFILL_WARPS)
        expand_unit<D, TQKV_SIDE_V>(codes, u, tables, lane, shared);
    return zero;
}

/* Of a lane: scores, then probabilities, of its rows 16 warp + g and g + 8 of each 64. */
template <int D> struct tqkvc_scores {
    float c[tqkvc_prefill_shape<D>::M][tqkvc_prefill_shape<D>::TOKENS / 8][4];
};

template <int D>
static __device__ __forceinline__ void score_tile(const tqkvc_prefill_memory<D> &shared,
                                                  uint32_t warp, uint32_t lane, tqkvc_scores<D> &s)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t queries = shared_address(shared.queries), keys = shared_address(shared.keys);

#pragma unroll
    for (int m = 0; m < shape::M; m++)
#pragma unroll
        for (int i = 0; i < shape::TOKENS / 2; i++)
            s.c[m][i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int u = 0; u < shape::UNITS; u++) {
        uint4 a[shape::M];
#pragma unroll
        for (int m = 0; m < shape::M; m++)
            a[m] = load_rows_operand<shape::ROWS>(queries, 64 * m + 16 * warp, u, lane);
#pragma unroll
        for (int n = 0; n < shape::TOKENS / 16; n++) {
            uint32_t b[4];
            load_columns_operand<shape::TOKENS>(b, keys, 16 * n, u, lane);
#pragma unroll
            for (int m = 0; m < shape::M; m++) {
                multiply_f16(s.c[m][2 * n], a[m], b[0], b[1]);
                multiply_f16(s.c[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* Of a lane's rows, two of each 64. sum, and zero, which is of zero rows of V: of this lane's tokens. */
template <int D> struct tqkvc_prefill_rows {
    static constexpr int M = tqkvc_prefill_shape<D>::M;
    float top[M][2], sum[M][2], zero[M][2];
    float sums[M][D / 8][4]; /* without the steps of V */
};

/* Scores to what is exponentiated. factor: of products, with the scale. first: token of the tile. */
template <int D, bool CHECKED>
static __device__ __forceinline__ void
scale_scores(const tqkvc_prefill_memory<D> &shared, float factor, uint32_t first, uint32_t warp,
             uint32_t lane, tqkvc_scores<D> &s)
{
    using shape = tqkvc_prefill_shape<D>;

#pragma unroll
    for (int n = 0; n < shape::TOKENS / 8; n++) {
        const uint32_t token = 8 * n + 2 * (lane % 4);
        const float2 k = *reinterpret_cast<const float2 *>(shared.k_scale + token);
        const float2 v_log = *reinterpret_cast<const float2 *>(shared.v_log + token);
        const float scale[2] = {k.x * factor, k.y * factor}, add[2] = {v_log.x, v_log.y};
#pragma unroll
        for (int m = 0; m < shape::M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &x = s.c[m][n][i];
                x = fmaf(x, scale[i % 2], add[i % 2]);
                if (CHECKED) {
                    const uint32_t row = 64 * m + 16 * warp + lane / 4 + i / 2 * 8;
                    if (scale[i % 2] == 0.0f) /* a score of 0, of which the mean's part is to go */
                        x -= shared.means[row];
                    if (first + token + i % 2 >= shared.limits[row])
                        x = -INFINITY;
                }
            }
        }
    }
}

/* Moves the tops of rows m where scores are far above them, and brings the sums there. */
template <int D>
static __device__ __forceinline__ void lift_tops(const tqkvc_scores<D> &s, int m,
                                                 tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    float top[2] = {-INFINITY, -INFINITY}, factor[2];
    bool lifts = false;

#pragma unroll
    for (int i = 0; i < shape::TOKENS / 2; i++)
        top[i % 4 / 2] = fmaxf(top[i % 4 / 2], s.c[m][i / 4][i % 4]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
        const bool is_far = top[h] > rows.top[m][h] + TQKVC_TOP_SLACK;
        top[h] = is_far ? top[h] : rows.top[m][h];
        factor[h] = exp2_fast(rows.top[m][h] - top[h]);
        rows.top[m][h] = top[h];
        lifts |= is_far;
    }
    if (!__any_sync(0xffffffffu, lifts))
        return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        rows.sum[m][h] *= factor[h];
        rows.zero[m][h] *= factor[h];
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++)
        rows.sums[m][i / 4][i % 4] *= factor[i % 4 / 2];
}

/* Scores to probabilities times the scales of V. CHECKED: rows of V may be zero. */
template <int D, bool CHECKED>
static __device__ __forceinline__ void weigh_scores(const tqkvc_prefill_memory<D> &shared,
                                                    uint32_t lane, tqkvc_prefill_rows<D> &rows,
                                                    tqkvc_scores<D> &s)
{
    using shape = tqkvc_prefill_shape<D>;

#pragma unroll
    for (int m = 0; m < shape::M; m++)
        lift_tops<D>(s, m, rows);
#pragma unroll
    for (int n = 0; n < shape::TOKENS / 8; n++) {
        const uint32_t token = 8 * n + 2 * (lane % 4);
        const float2 v = *reinterpret_cast<const float2 *>(shared.v_inverse + token);
        const float inverse[2] = {v.x, v.y};
#pragma unroll
        for (int m = 0; m < shape::M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &x = s.c[m][n][i];
                const bool on = !CHECKED || shared.v_log[token + i % 2] > -8.0f;
                x = exp2_fast(x - rows.top[m][i / 2]);
                rows.sum[m][i / 2] = fmaf(x, inverse[i % 2], rows.sum[m][i / 2]);
                if (CHECKED && !on) {
                    rows.zero[m][i / 2] = fmaf(x, inverse[i % 2], rows.zero[m][i / 2]);
                    x = 0.0f;
                }
            }
        }
    }
}

static __device__ __forceinline__ uint32_t pack_halves(float a, float b)
{
    const __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&x);
}

/* Probabilities of 16 tokens from 16 n on as a row operand. */
template <int D>
static __device__ __forceinline__ uint4 probability_operand(const tqkvc_scores<D> &s, int m, int n)
{
    return make_uint4(pack_halves(s.c[m][2 * n][0], s.c[m][2 * n][1]),
                      pack_halves(s.c[m][2 * n][2], s.c[m][2 * n][3]),
                      pack_halves(s.c[m][2 * n + 1][0], s.c[m][2 * n + 1][1]),
                      pack_halves(s.c[m][2 * n + 1][2], s.c[m][2 * n + 1][3]));
}

template <int D>
static __device__ __forceinline__ void add_values(const tqkvc_prefill_memory<D> &shared,
                                                  uint32_t lane, const tqkvc_scores<D> &s,
                                                  tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t values = shared_address(shared.values);

#pragma unroll
    for (int n = 0; n < shape::TOKENS / 16; n++) {
        uint4 a[shape::M];
#pragma unroll
        for (int m = 0; m < shape::M; m++)
            a[m] = probability_operand<D>(s, m, n);
#pragma unroll
        for (int u = 0; u < shape::UNITS; u++) {
            uint32_t b[4];
            load_operands(b, values + value_piece_at<shape::TOKENS>(
                                          16 * u + lane % 8 + lane / 16 * 8, 2 * n + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < shape::M; m++) {
                multiply_f16(rows.sums[m][2 * u], a[m], b[0], b[1]);
                multiply_f16(rows.sums[m][2 * u + 1], a[m], b[2], b[3]);
            }
        }
    }
}

#endif /* TQKVC_PREFILL_TILE_CUH */
