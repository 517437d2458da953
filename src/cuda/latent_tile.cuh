/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One tile of 32 tokens of a latent layer in a block of threads: codes to f16 in shared memory, scores, weights, sums.
 * A latent is key and value, so its levels are made once and read twice: with channels as the inner dimension for
 * scores (ldmatrix transposes them), with tokens for sums. A block has eight warps and 16 query rows, or twice eight and
 * 16 or 32 rows for each eight.
 *
 *     codes ── expand ── v [channel][token], k [token][channel]        level times step, which rounds to f16
 *     score ── scores [half of the channels][row][token]                each warp eight tokens and a half
 *     weigh ── p [row][token], factors of older sums                    running maximum by row
 *     add   ── sums [row][64 channels of a warp]
 */
#ifndef TQKVC_LATENT_TILE_CUH
#define TQKVC_LATENT_TILE_CUH

#include <cuda_fp16.h>

#include "cuda/columns.cuh"
#include "cuda/copies.cuh"
#include "cuda/launch.h"
#include "cuda/levels.cuh"
#include "cuda/ring.cuh"

constexpr int TQKVC_LATENT_TOKENS = 32, TQKVC_LATENT_GROUP = 8; /* warps that share query rows */

/* Pads put rows that ldmatrix reads together into different banks. M: tiles of 16 query rows. */
template <int M> struct tqkvc_latent_memory {
    static constexpr int ROWS = 16 * M, T = TQKVC_LATENT_TOKENS;
    static constexpr int GROUPS = M == 1 ? 1 : 2, WARPS = GROUPS * TQKVC_LATENT_GROUP, THREADS = 32 * WARPS;
    static constexpr int MINE = M / GROUPS; /* tiles of rows of a warp */

    __align__(16) __half v[TQKVC_LATENT_DIM][T + 8];
    __align__(16) __half k[T][TQKVC_LATENT_K_DIM + 8];                       /* channels of a unit in the order of levels.cuh */
    __align__(16) __half q[ROWS][TQKVC_LATENT_DIM + TQKVC_LATENT_K_DIM + 8]; /* divided by their factors, K as k */
    __align__(16) __half p[ROWS][T + 8];
    union __align__(16) {
        float scores[2][ROWS][T + 4];
        float turned[ROWS][TQKVC_LATENT_K_DIM];
    };
    float factor[2][ROWS], bias[2][ROWS]; /* by side: of products with q; score of the mean */
    float alpha[ROWS];                    /* of older sums */
    float end[2][ROWS];                   /* factors of sums and of the mean, at last */
    __align__(16) float scale[2][T];
    float largest_scale;     /* scale: of the tokens, 0: zero row, or no token; the largest of V */
    float scale_values[256];
    __align__(16) uint32_t tables[TQKVC_WIDTHS][TQKVC_WORDS + 1];
    __align__(8) tqkvc_latent_units units[TQKV_TIERS_MAX];
    uint64_t barriers[2]; /* of tiles of codes */
    uint32_t tiers[2];
};

static __device__ __forceinline__ uint4 load_matrices(const __half *row)
{
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(shared_address(row))
                 : "memory");
    return x;
}

static __device__ __forceinline__ uint4 load_transposed(const __half *row)
{
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(shared_address(row))
                 : "memory");
    return x;
}

static __device__ __forceinline__ uint32_t times(uint32_t halves, __half2 step)
{
    const __half2 x = __hmul2(*reinterpret_cast<const __half2 *>(&halves), step);
    return *reinterpret_cast<const uint32_t *>(&x);
}

/* Place of channel c of a unit of K in k and q. */
static __device__ __forceinline__ uint32_t latent_k_place(uint32_t c)
{
    return 8 * (c % 8 / 4) + 2 * (c % 4) + c / 8;
}

/* N units of V of one width, one after another, of both blocks; by one warp. */
template <int N, int M>
static __device__ __forceinline__ void expand_v(tqkvc_latent_memory<M> &memory, const uint8_t *unit,
                                                uint32_t block_bytes, uint32_t u, uint32_t bits, uint32_t lane)
{
    const tqkvc_rows tables = {shared_address(memory.tables)};
    constexpr int STRIDE = TQKVC_LATENT_TOKENS + 8;

    with_width(bits, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto table = load_level_table<BITS>(tables);
        const __half2 step = __float2half2_rn(BITS == 0 ? 0.0f : tables.step(BITS));
        __half *to = &memory.v[16 * u + lane % 8][lane / 8 * 4];
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int b = 0; b < TQKVC_LATENT_TOKENS / 16; b++) {
                const uint4 x = v_row_levels<BITS>(unit + b * block_bytes + i * 32 * BITS, lane, table);
                __half *at = to + 16 * i * STRIDE + 16 * b;
                *reinterpret_cast<uint2 *>(at) = make_uint2(times(x.x, step), times(x.y, step));
                *reinterpret_cast<uint2 *>(at + 8 * STRIDE) = make_uint2(times(x.z, step), times(x.w, step));
            }
    });
}

/* A unit of K of one block, by one warp. */
template <int M>
static __device__ __forceinline__ void expand_k(tqkvc_latent_memory<M> &memory, const uint8_t *unit, uint32_t u,
                                                uint32_t block, uint32_t bits, uint32_t lane)
{
    const tqkvc_rows tables = {shared_address(memory.tables)};
    const uint32_t token = lane / 16 * 8 + lane % 8, h = lane / 8 % 2;

    with_width(bits, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto table = load_level_table<BITS>(tables);
        const __half2 step = __float2half2_rn(BITS == 0 ? 0.0f : tables.step(BITS));
        const uint2 x = k_row_levels<BITS>(unit, token, h, table);
        const uint32_t low = x.x ^ TQKVC_BIASED, high = x.y ^ TQKVC_BIASED;
        const uint4 halves = {
            times(level_pair<false>(low, 0, 0x4140u), step), times(level_pair<false>(low, 0, 0x4342u), step),
            times(level_pair<false>(high, 0, 0x4140u), step), times(level_pair<false>(high, 0, 0x4342u), step)};
        *reinterpret_cast<uint4 *>(&memory.k[16 * block + token][16 * u + 8 * h]) = halves;
    });
}

/* codes: the tile's blocks, each K and V of 16 tokens. n: tokens that are there. Ends without a barrier. */
template <int M>
static __device__ __forceinline__ void expand(tqkvc_latent_memory<M> &memory, const uint8_t *codes,
                                              uint32_t block_bytes, uint32_t tier, uint32_t n)
{
    constexpr uint32_t WARPS = tqkvc_latent_memory<M>::WARPS, OF_WARP = TQKVC_LATENT_V_UNITS / WARPS;
    const tqkvc_latent_units &units = memory.units[tier];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = WARPS - 1 - warp;

    static_assert(TQKVC_LATENT_K_UNITS * 2 == TQKVC_LATENT_GROUP, "a unit of a block each");
    if (warp < TQKVC_LATENT_GROUP) {
        const uint32_t k = warp / 2, block = warp % 2;
        expand_k(memory, codes + block * block_bytes + units.offset[TQKVC_LATENT_V_UNITS + k], k, block,
                 units.bits[TQKVC_LATENT_V_UNITS + k], lane);
    }
    if (side < 2) { /* the last warps: scales */
        const uint8_t *section = codes + lane / 16 * block_bytes + (side == TQKV_SIDE_V ? units.v_section : 0);
        const float scale = lane < n ? memory.scale_values[section[lane % 16]] : 0.0f;
        memory.scale[side][lane] = scale;
        const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(scale));
        if (side == TQKV_SIDE_V && lane == 0)
            memory.largest_scale = __uint_as_float(largest);
    }
    const uint32_t u = warp * OF_WARP, bits = units.bits[u];
    bool is_alike = true;
#pragma unroll
    for (uint32_t i = 1; i < OF_WARP; i++)
        is_alike = is_alike && units.bits[u + i] == bits;
    if (is_alike) {
        expand_v<OF_WARP>(memory, codes + units.offset[u], block_bytes, u, bits, lane);
        return;
    }
#pragma unroll 1
    for (uint32_t i = u; i < u + OF_WARP; i++)
        expand_v<1>(memory, codes + units.offset[i], block_bytes, i, units.bits[i], lane);
}

/* Scores without the means: those of eight tokens and half of the channels of either side, by each warp of a group. */
template <int M> static __device__ __forceinline__ void score(tqkvc_latent_memory<M> &memory)
{
    constexpr int MINE = tqkvc_latent_memory<M>::MINE;
    constexpr uint32_t V_STEPS = TQKVC_LATENT_DIM / 64, K_AT = TQKVC_LATENT_DIM; /* 32 channels a step */
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % TQKVC_LATENT_GROUP,
                   first_row = threadIdx.x / 32 / TQKVC_LATENT_GROUP * MINE * 16;
    const uint32_t first = warp % 4 * 8, half = warp / 4;
    float latent[MINE][2][4] = {}, key[MINE][4] = {}; /* two chains of products */

#pragma unroll
    for (uint32_t i = 0; i < V_STEPS; i++) {
        const uint32_t column = 32 * (half * V_STEPS + i);
        const uint4 b = load_transposed(&memory.v[column + lane][first]);
#pragma unroll
        for (int m = 0; m < MINE; m++) {
            const __half *row = &memory.q[first_row + 16 * m + lane % 16][column + lane / 16 * 8];
            multiply_f16(latent[m][0], load_matrices(row), b.x, b.y);
            multiply_f16(latent[m][1], load_matrices(row + 16), b.z, b.w);
        }
    }
    const uint4 b = load_matrices(&memory.k[first + lane % 8][32 * half + lane / 8 * 8]);
#pragma unroll
    for (int m = 0; m < MINE; m++) {
        const __half *row = &memory.q[first_row + 16 * m + lane % 16][K_AT + 32 * half + lane / 16 * 8];
        multiply_f16(key[m], load_matrices(row), b.x, b.y);
        multiply_f16(key[m], load_matrices(row + 16), b.z, b.w);
    }

    const uint32_t t = first + lane % 4 * 2;
    const float2 of_k = *reinterpret_cast<const float2 *>(&memory.scale[TQKV_SIDE_K][t]),
                 of_v = *reinterpret_cast<const float2 *>(&memory.scale[TQKV_SIDE_V][t]);
#pragma unroll
    for (int i = 0; i < 2 * MINE; i++) {
        const uint32_t row = first_row + 8 * i + lane / 4;
        const float k = memory.factor[TQKV_SIDE_K][row], v = memory.factor[TQKV_SIDE_V][row];
        const float *a = &key[i / 2][i % 2 * 2], *x = &latent[i / 2][0][i % 2 * 2], *y = &latent[i / 2][1][i % 2 * 2];
        *reinterpret_cast<float2 *>(&memory.scores[half][row][t]) = make_float2(
            k * of_k.x * a[0] + v * of_v.x * (x[0] + y[0]), k * of_k.y * a[1] + v * of_v.y * (x[1] + y[1]));
    }
}

/* What a thread keeps of its row; `sum` and `sum_of_mean` of its own tokens only. */
struct tqkvc_latent_row {
    float top = -INFINITY, sum = 0.0f, sum_of_mean = 0.0f; /* top: log2 */
    float unit = 0.0f; /* of the sums of all rows: the largest scale of V so far */
};

/*
 * Weights of the tile's tokens, the first of which is `first`; a row sees tokens before its limit. They are f16, so they
 * are divided by the largest scale so far, and are at most 1.
 */
template <int M>
static __device__ __forceinline__ void weigh(tqkvc_latent_memory<M> &memory, tqkvc_latent_row &mine, int32_t first,
                                             int32_t limit)
{
    constexpr uint32_t OF_ROW = tqkvc_latent_memory<M>::THREADS / (16 * M), N = TQKVC_LATENT_TOKENS / OF_ROW;
    const uint32_t row = threadIdx.x / OF_ROW, start = threadIdx.x % OF_ROW * N;
    const float bias_k = memory.bias[TQKV_SIDE_K][row], bias_v = memory.bias[TQKV_SIDE_V][row];
    const float unit = fmaxf(mine.unit, memory.largest_scale);
    const float shrink = unit > 0 ? mine.unit / unit : 1.0f, inverse = unit > 0 ? 1.0f / unit : 0.0f;
    float s[N], top = mine.top;

#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        const uint32_t t = start + i;
        s[i] = memory.scores[0][row][t] + memory.scores[1][row][t] +
               (memory.scale[TQKV_SIDE_K][t] != 0.0f ? bias_k : 0.0f) +
               (memory.scale[TQKV_SIDE_V][t] != 0.0f ? bias_v : 0.0f);
        if (first + (int32_t)t >= limit)
            s[i] = -INFINITY;
        top = fmaxf(top, s[i]);
    }
#pragma unroll
    for (uint32_t n = OF_ROW / 2; n > 0; n /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, n));
    const float from = top == -INFINITY ? 0.0f : top;
    const float alpha = exp2_fast(mine.top - from);
    mine.sum *= alpha;
    mine.sum_of_mean *= alpha;
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        const float p = exp2_fast(s[i] - from), scale = memory.scale[TQKV_SIDE_V][start + i];
        mine.sum += p;
        mine.sum_of_mean += scale != 0.0f ? p : 0.0f;
        memory.p[row][start + i] = __float2half_rn(p * (scale * inverse));
    }
    if (start == 0)
        memory.alpha[row] = alpha * shrink;
    mine.top = top;
    mine.unit = unit;
}

/* Adds the tile to the sums of this warp's 64 channels: [row tile][channels in eights][as a product]. */
template <int M>
static __device__ __forceinline__ void add_values(tqkvc_latent_memory<M> &memory,
                                                  float (&sums)[tqkvc_latent_memory<M>::MINE][8][4])
{
    constexpr int MINE = tqkvc_latent_memory<M>::MINE;
    const uint32_t lane = threadIdx.x % 32, channel = threadIdx.x / 32 % TQKVC_LATENT_GROUP * 64,
                   first_row = threadIdx.x / 32 / TQKVC_LATENT_GROUP * MINE * 16;
    uint4 p[MINE][2];

#pragma unroll
    for (int m = 0; m < MINE; m++) {
        const uint32_t row = first_row + 16 * m;
        const float upper = memory.alpha[row + lane / 4], lower = memory.alpha[row + 8 + lane / 4];
        p[m][0] = load_matrices(&memory.p[row + lane % 16][lane / 16 * 8]);
        p[m][1] = load_matrices(&memory.p[row + lane % 16][lane / 16 * 8 + 16]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sums[m][i][0] *= upper;
            sums[m][i][1] *= upper;
            sums[m][i][2] *= lower;
            sums[m][i][3] *= lower;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 b = load_matrices(&memory.v[channel + 8 * i + lane % 8][lane / 8 * 8]);
#pragma unroll
        for (int m = 0; m < MINE; m++) {
            multiply_f16(sums[m][i], p[m][0], b.x, b.y);
            multiply_f16(sums[m][i], p[m][1], b.z, b.w);
        }
    }
}

#endif /* TQKVC_LATENT_TILE_CUH */
