/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One tile of 32 tokens of a latent layer in a block of eight warps. A latent is key and value, so its levels are made
 * once, by the warp that owns these 64 channels, and read twice by the same warp: with channels as the inner dimension for
 * scores (ldmatrix transposes them), with tokens for sums. Warps meet over scores and weights alone.
 *
 *     codes ── expand ── v [channel][token], k [token][channel]    levels, which f16 holds
 *     score ── scores [warp][row][token]                           of the channels of each warp
 *     weigh ── p [row][token], factors of older sums               running maximum by row
 *     add   ── sums [row][64 channels of a warp]
 */
#ifndef TQKVC_LATENT_TILE_CUH
#define TQKVC_LATENT_TILE_CUH

#include <cuda_fp16.h>

#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/levels.cuh"
#include "cuda/ring.cuh"

constexpr int TQKVC_LATENT_TOKENS = 32, TQKVC_LATENT_WARPS = 8;
constexpr int TQKVC_LATENT_CHANNELS = TQKVC_LATENT_DIM / TQKVC_LATENT_WARPS; /* of a warp */

/* Pads put rows that ldmatrix reads together into different banks. M: tiles of 16 query rows. */
template <int M> struct tqkvc_latent_memory {
    static constexpr int ROWS = 16 * M, T = TQKVC_LATENT_TOKENS, WARPS = TQKVC_LATENT_WARPS;

    __align__(16) __half v[TQKVC_LATENT_DIM][T + 8];
    __align__(16) __half k[T][TQKVC_LATENT_K_DIM + 8];                       /* units in the order of levels.cuh */
    __align__(16) __half q[ROWS][TQKVC_LATENT_DIM + TQKVC_LATENT_K_DIM + 8]; /* divided by their factors, K as k */
    __align__(16) __half p[ROWS][T + 8];
    union __align__(16) {
        float scores[WARPS][ROWS][T + 4];
        float turned[ROWS][TQKVC_LATENT_K_DIM];
    };
    float factor[2][ROWS], bias[2][ROWS]; /* by side: of products with q; score of the mean */
    float alpha[ROWS];                    /* of older sums */
    float end[2][ROWS];                   /* factors of sums and of the mean, at last */
    __align__(16) float scale[WARPS][2][T]; /* of the tokens, 0: zero row, or no token; the same for all warps */
    float largest_scale;                    /* of V */
    float scale_values[256];
    __align__(16) uint32_t tables[TQKVC_WIDTHS][TQKVC_WORDS + 1];
    __align__(8) tqkvc_latent_units units[TQKV_TIERS_MAX];
    uint64_t barriers[2]; /* of tiles of codes */
    uint32_t tiers[2];
};

static __device__ __forceinline__ uint4 load_matrices(const __half *row)
{
    uint32_t x[4];
    load_operands(x, shared_address(row));
    return make_uint4(x[0], x[1], x[2], x[3]);
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

/* Step of a width; 1 for width 0, whose levels are 0. */
static __device__ __forceinline__ float step_of(tqkvc_rows tables, uint32_t bits)
{
    return bits == 0 ? 1.0f : tables.step((int)bits);
}

/*
 * N units of V of one width, one after another, of both blocks; by one warp. With HAS_STEP levels are multiplied by their
 * step, which rounds; otherwise v has them as they are.
 */
template <int N, bool HAS_STEP, int M>
static __device__ __forceinline__ void expand_v(tqkvc_latent_memory<M> &memory, const uint8_t *unit,
                                                uint32_t block_bytes, uint32_t u, uint32_t bits, uint32_t lane)
{
    const tqkvc_rows tables = {shared_address(memory.tables)};
    constexpr int STRIDE = TQKVC_LATENT_TOKENS + 8;

    with_width(bits, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const auto table = load_level_table<BITS>(tables);
        __half *to = &memory.v[16 * u + lane % 8][lane / 8 * 4];
        uint4 levels[N * 2];
#pragma unroll
        for (int i = 0; i < N * 2; i++) /* all loads before any store, which might be to the same place */
            levels[i] = v_row_levels<BITS>(unit + i % 2 * block_bytes + i / 2 * 32 * BITS, lane, table);
        if constexpr (HAS_STEP) {
            const __half2 step = __float2half2_rn(step_of(tables, BITS));
#pragma unroll
            for (int i = 0; i < N * 2; i++)
                levels[i] = make_uint4(times(levels[i].x, step), times(levels[i].y, step), times(levels[i].z, step),
                                       times(levels[i].w, step));
        }
#pragma unroll
        for (int i = 0; i < N * 2; i++) {
            __half *at = to + 16 * (i / 2) * STRIDE + 16 * (i % 2);
            *reinterpret_cast<uint2 *>(at) = make_uint2(levels[i].x, levels[i].y);
            *reinterpret_cast<uint2 *>(at + 8 * STRIDE) = make_uint2(levels[i].z, levels[i].w);
        }
    });
}

/* Levels of a unit of K of one block, by one warp. */
template <int M>
static __device__ __forceinline__ void expand_k(tqkvc_latent_memory<M> &memory, const uint8_t *unit, uint32_t u,
                                                uint32_t block, uint32_t bits, uint32_t lane)
{
    const tqkvc_rows tables = {shared_address(memory.tables)};
    const uint32_t token = lane / 16 * 8 + lane % 8, h = lane / 8 % 2;

    with_width(bits, [&](auto width) {
        constexpr int BITS = decltype(width)::value;
        const uint2 x = k_row_levels<BITS>(unit, token, h, load_level_table<BITS>(tables));
        const uint32_t low = x.x ^ TQKVC_BIASED, high = x.y ^ TQKVC_BIASED;
        *reinterpret_cast<uint4 *>(&memory.k[16 * block + token][16 * u + 8 * h]) =
            make_uint4(level_pair<false>(low, 0, 0x4140u), level_pair<false>(low, 0, 0x4342u),
                       level_pair<false>(high, 0, 0x4140u), level_pair<false>(high, 0, 0x4342u));
    });
}

/* Of what a warp has expanded: what numbers in v and k are to be multiplied with. */
struct tqkvc_latent_steps {
    float v, k;
};

/*
 * What this warp reads of a tile: four units of V, one of K of a block, scales. codes: the tile's blocks, each
 * K and V of 16 tokens. n: tokens that are there. Ends with what only this warp waits for.
 */
template <int M>
static __device__ __forceinline__ tqkvc_latent_steps expand(tqkvc_latent_memory<M> &memory, const uint8_t *codes,
                                                            uint32_t block_bytes, uint32_t tier, uint32_t n)
{
    const tqkvc_rows tables = {shared_address(memory.tables)};
    constexpr uint32_t OF_WARP = TQKVC_LATENT_CHANNELS / 16;
    const tqkvc_latent_units &units = memory.units[tier];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint8_t *section = codes + lane / 16 * block_bytes + lane % 16;
    const float of_k = lane < n ? memory.scale_values[section[0]] : 0.0f,
                of_v = lane < n ? memory.scale_values[section[units.v_section]] : 0.0f;

    memory.scale[warp][TQKV_SIDE_K][lane] = of_k;
    memory.scale[warp][TQKV_SIDE_V][lane] = of_v;
    if (warp == 0) {
        const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(of_v));
        if (lane == 0)
            memory.largest_scale = __uint_as_float(largest);
    }
    static_assert(TQKVC_LATENT_K_UNITS * 2 == TQKVC_LATENT_WARPS && OF_WARP == 4, "what a warp has");
    const uint32_t k = TQKVC_LATENT_V_UNITS + warp / 2, block = warp % 2;
    expand_k(memory, codes + block * block_bytes + units.offset[k], warp / 2, block, units.bits[k], lane);
    const uint32_t u = warp * OF_WARP, all_bits = *reinterpret_cast<const uint32_t *>(&units.bits[u]),
                   bits = all_bits & 255u;
    tqkvc_latent_steps steps = {1.0f, step_of(tables, units.bits[k])};
    if (all_bits == bits * 0x01010101u) {
        expand_v<OF_WARP, false>(memory, codes + units.offset[u], block_bytes, u, bits, lane);
        steps.v = step_of(tables, bits);
    } else {
#pragma unroll 1
        for (uint32_t i = u; i < u + OF_WARP; i++)
            expand_v<1, true>(memory, codes + units.offset[i], block_bytes, i, units.bits[i], lane);
    }
    __syncwarp();
    return steps;
}

/* A step of 16 channels of q, from `column` on, times these channels of N * 8 tokens: b by eight tokens. */
template <int N, int M>
static __device__ __forceinline__ void add_products(const tqkvc_latent_memory<M> &memory, uint32_t column,
                                                    const uint2 (&b)[N], float (&sums)[M][N][4])
{
    const uint32_t lane = threadIdx.x % 32;

#pragma unroll
    for (int m = 0; m < M; m++) {
        const uint4 a = load_matrices(&memory.q[16 * m + lane % 16][column + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < N; n++)
            multiply_f16(sums[m][n], a, b[n].x, b[n].y);
    }
}

/* Adds a unit of K of 16 tokens, from `first` on, to scores that this warp has written. */
template <int M>
static __device__ __forceinline__ void score_keys(const tqkvc_latent_memory<M> &memory, uint32_t unit, uint32_t first,
                                                  float step, float (&scores)[16 * M][TQKVC_LATENT_TOKENS + 4])
{
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint4 x = load_matrices(&memory.k[first + lane / 16 * 8 + lane % 8][16 * unit + lane / 8 % 2 * 8]);
    const uint2 b[2] = {{x.x, x.y}, {x.z, x.w}};
    float sums[M][2][4] = {};

    add_products(memory, TQKVC_LATENT_DIM + 16 * unit, b, sums);
#pragma unroll
    for (int i = 0; i < 2 * 2 * M; i++) { /* row half, eight tokens */
        const uint32_t row = i / 2 * 8 + lane / 4, t = first + i % 2 * 8 + lane % 4 * 2;
        const float factor = memory.factor[TQKV_SIDE_K][row] * step;
        const float2 scale = *reinterpret_cast<const float2 *>(&memory.scale[warp][TQKV_SIDE_K][t]);
        const float *key = &sums[i / 4][i % 2][i / 2 % 2 * 2];
        float2 *to = reinterpret_cast<float2 *>(&scores[row][t]); /* of this lane */
        *to = make_float2(to->x + factor * scale.x * key[0], to->y + factor * scale.y * key[1]);
    }
}

/* What the channels of this warp add to the scores, without the means. */
template <int M>
static __device__ __forceinline__ void score(tqkvc_latent_memory<M> &memory, const tqkvc_latent_steps &steps)
{
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[M][4][4] = {};

#pragma unroll
    for (uint32_t i = 0; i < TQKVC_LATENT_CHANNELS / 16; i++) {
        const uint32_t channel = warp * TQKVC_LATENT_CHANNELS + 16 * i;
        const __half *row = &memory.v[channel + lane % 16][lane / 16 * 8];
        const uint4 x = load_transposed(row), y = load_transposed(row + 16);
        const uint2 b[4] = {{x.x, x.y}, {x.z, x.w}, {y.x, y.y}, {y.z, y.w}};
        add_products(memory, channel, b, sums);
    }
    const uint32_t t = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * 2 * M; i++) { /* row half, eight tokens */
        const float v = memory.factor[TQKV_SIDE_V][i / 4 * 8 + lane / 4] * steps.v;
        const float2 scale = *reinterpret_cast<const float2 *>(&memory.scale[warp][TQKV_SIDE_V][i % 4 * 8 + t]);
        float *x = &sums[i / 8][i % 4][i / 4 % 2 * 2];
        x[0] *= v * scale.x;
        x[1] *= v * scale.y;
    }
#pragma unroll
    for (int i = 0; i < 4 * 2 * M; i++) {
        const float *x = &sums[i / 8][i % 4][i / 4 % 2 * 2];
        *reinterpret_cast<float2 *>(&memory.scores[warp][i / 4 * 8 + lane / 4][i % 4 * 8 + t]) = make_float2(x[0], x[1]);
    }
    score_keys(memory, warp / 2, warp % 2 * 16, steps.k, memory.scores[warp]);
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
    constexpr uint32_t OF_ROW = TQKVC_LATENT_WARPS * 32 / (16 * M), N = TQKVC_LATENT_TOKENS / OF_ROW;
    const uint32_t row = threadIdx.x / OF_ROW, start = threadIdx.x % OF_ROW * N;
    const float bias_k = memory.bias[TQKV_SIDE_K][row], bias_v = memory.bias[TQKV_SIDE_V][row];
    const float unit = fmaxf(mine.unit, memory.largest_scale);
    const float shrink = unit > 0 ? mine.unit / unit : 1.0f, inverse = unit > 0 ? 1.0f / unit : 0.0f;
    float s[N], top = mine.top;

#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        const uint32_t t = start + i;
        s[i] = (memory.scale[0][TQKV_SIDE_K][t] != 0.0f ? bias_k : 0.0f) +
               (memory.scale[0][TQKV_SIDE_V][t] != 0.0f ? bias_v : 0.0f);
#pragma unroll
        for (uint32_t w = 0; w < TQKVC_LATENT_WARPS; w++)
            s[i] += memory.scores[w][row][t];
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
        const float p = exp2_fast(s[i] - from), scale = memory.scale[0][TQKV_SIDE_V][start + i];
        mine.sum += p;
        mine.sum_of_mean += scale != 0.0f ? p : 0.0f;
        memory.p[row][start + i] = __float2half_rn(p * (scale * inverse));
    }
    if (start == 0)
        memory.alpha[row] = alpha * shrink;
    mine.top = top;
    mine.unit = unit;
}

/*
 * Adds the tile to the sums of this warp's channels: [row tile][channels in eights][as a product]. shrink: of older sums,
 * whose numbers had another step.
 */
template <int M>
static __device__ __forceinline__ void add_values(const tqkvc_latent_memory<M> &memory, float shrink,
                                                  float (&sums)[M][8][4])
{
    const uint32_t lane = threadIdx.x % 32, channel = threadIdx.x / 32 * TQKVC_LATENT_CHANNELS;
    uint4 p[M][2];

#pragma unroll
    for (int m = 0; m < M; m++) {
        const __half *row = &memory.p[16 * m + lane % 16][lane / 16 * 8];
        const float upper = memory.alpha[16 * m + lane / 4] * shrink,
                    lower = memory.alpha[16 * m + 8 + lane / 4] * shrink;
        p[m][0] = load_matrices(row);
        p[m][1] = load_matrices(row + 16);
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
        for (int m = 0; m < M; m++) {
            multiply_f16(sums[m][i], p[m][0], b.x, b.y);
            multiply_f16(sums[m][i], p[m][1], b.z, b.w);
        }
    }
}

#endif /* TQKVC_LATENT_TILE_CUH */
