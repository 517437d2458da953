/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products of prefill on tensor cores: 64 query rows in four warps times a tile of K, probabilities times V. With the
 * instructions of a warpgroup on sm_90a, which read shared memory by themselves; elsewhere with those of a warp.
 */
#ifndef TQKVC_PREFILL_MMA_CUH
#define TQKVC_PREFILL_MMA_CUH

#include <cuda_fp16.h>

#include "cuda/mma.cuh"
#include "cuda/ring.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TQKVC_WARPGROUPS 1
#else
#define TQKVC_WARPGROUPS 0
#endif

constexpr uint32_t TQKVC_PREFILL_STAGED_MAX = 4; /* tiles of codes */

/* One thread; then a barrier among those that use it. */
static __device__ __forceinline__ void init_barrier(uint64_t *barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}

static __device__ __forceinline__ void arrive_at(uint64_t *barrier)
{
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
                 : "memory");
}

/* Some warps of a block; id: 1 to 15. */
static __device__ __forceinline__ void sync_warps(uint32_t id, uint32_t n_warps)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(32 * n_warps) : "memory");
}

/* Registers of a thread, where a block was given fewer for all: four warps give some away, four others take them. */
template <int N, bool TAKES> static __device__ __forceinline__ void change_registers()
{
#if TQKVC_WARPGROUPS
    if constexpr (TAKES)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

/* Where the piece of 16 bytes of a row is: panels of 128 bytes of N rows, pieces permuted by the row. */
template <int N> static __host__ __device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t piece)
{
    return piece / 8 * (N * 128) + row * 128 + ((piece ^ row) % 8) * 16;
}

/* The same for rows of 64 bytes. */
static __host__ __device__ __forceinline__ uint32_t narrow_piece_at(uint32_t row, uint32_t piece)
{
    return row * 64 + ((piece ^ row / 2) % 4) * 16;
}

template <int D> struct tqkvc_prefill_shape {
    static constexpr int READERS = D < 256 ? 2 : 1; /* of four warps and 64 rows */
    static constexpr int ROWS = 64 * READERS;
    static constexpr int TOKENS = D < 256 ? 64 : 32; /* of a tile */
    static constexpr int BLOCKS = TOKENS / 16;
    static constexpr int UNITS = D / 16;

    static __device__ __forceinline__ uint32_t key_at(uint32_t token, uint32_t unit)
    {
        return D == 64 ? narrow_piece_at(token, unit) : piece_at<TOKENS>(token, unit);
    }

    static __device__ __forceinline__ uint32_t value_at(uint32_t channel, uint32_t piece)
    {
        return TOKENS == 32 ? narrow_piece_at(channel, piece) : piece_at<D>(channel, piece);
    }
};

/* Of a lane: products of 16 bits with the tokens of a tile, as high and low bytes. */
template <int D> struct tqkvc_scores {
    int high[tqkvc_prefill_shape<D>::TOKENS / 8][4], low[tqkvc_prefill_shape<D>::TOKENS / 8][4];

    __device__ __forceinline__ int value(int n, int i) const
    {
        return high[n][i] * 256 + low[n][i];
    }
};

/* Probabilities of a lane as row operands: of 16 tokens each. */
template <int D> struct tqkvc_weights {
    uint32_t words[tqkvc_prefill_shape<D>::TOKENS / 16][4];
};

static __device__ __forceinline__ uint32_t pack_halves(float a, float b)
{
    const __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&x);
}

/* Row operand of 16 rows from `row` on, pieces 2 k and 2 k + 1, of N rows. */
template <int N>
static __device__ __forceinline__ uint4 load_rows_operand(uint32_t base, uint32_t row, uint32_t k,
                                                          uint32_t lane)
{
    uint32_t a[4];

    load_operands(a, base + piece_at<N>(row + lane % 16, 2 * k + lane / 16));
    return make_uint4(a[0], a[1], a[2], a[3]);
}

/* Lanes' parts of the addresses of column operands: 16 columns, pieces of each. */
static __device__ __forceinline__ uint32_t operand_column(uint32_t lane)
{
    return lane % 8 + lane / 16 * 8;
}

static __device__ __forceinline__ uint32_t operand_piece(uint32_t lane)
{
    return lane / 8 % 2;
}

/* Column operands of columns [column, column + 16), pieces 2 k and 2 k + 1: words 0, 1 of the first eight. */
template <int N>
static __device__ __forceinline__ void load_columns_operand(uint32_t (&out)[4], uint32_t base,
                                                            uint32_t column, uint32_t k, uint32_t lane)
{
    load_operands(out, base + piece_at<N>(column + operand_column(lane), 2 * k + operand_piece(lane)));
}

/* Between writes of threads and what matrix instructions of a warpgroup read. */
static __device__ __forceinline__ void publish_operands()
{
#if TQKVC_WARPGROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if TQKVC_WARPGROUPS

/* Of rows of 128 bytes, or of 64, that start at an address; eight of them, then the next eight. */
static __device__ __forceinline__ uint64_t describe(uint32_t address, bool narrow)
{
    return (uint64_t)(address >> 4 & 0x3fff) | 1ull << 16 | (narrow ? 32ull : 64ull) << 32 |
           (narrow ? 2ull : 1ull) << 62;
}

static __device__ __forceinline__ void start_products()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void end_products()
{
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define TQKVC_EIGHT(c, n) "+" c((x)[n][0]), "+" c((x)[n][1]), "+" c((x)[n][2]), "+" c((x)[n][3]), \
                          "+" c((x)[n + 1][0]), "+" c((x)[n + 1][1]), "+" c((x)[n + 1][2]), "+" c((x)[n + 1][3])

/* x = or += a b: 64 rows, N columns, 32 channels. */
static __device__ __forceinline__ void multiply_bytes(int (&x)[8][4], uint64_t a, uint64_t b, int adds)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
                 "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
                 "%30, %31}, %32, %33, p; }"
                 : TQKVC_EIGHT("r", 0), TQKVC_EIGHT("r", 2), TQKVC_EIGHT("r", 4), TQKVC_EIGHT("r", 6)
                 : "l"(a), "l"(b), "r"(adds));
}

static __device__ __forceinline__ void multiply_bytes(int (&x)[4][4], uint64_t a, uint64_t b, int adds)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
                 "%11, %12, %13, %14, %15}, %16, %17, p; }"
                 : TQKVC_EIGHT("r", 0), TQKVC_EIGHT("r", 2)
                 : "l"(a), "l"(b), "r"(adds));
}

/* x += a b: 64 rows, 64 columns from column 8 n of x on, 16 tokens. */
template <int N>
static __device__ __forceinline__ void multiply_halves(float (&x)[N][4], int n, const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
                 "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
                 "%30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : TQKVC_EIGHT("f", n), TQKVC_EIGHT("f", n + 2), TQKVC_EIGHT("f", n + 4), TQKVC_EIGHT("f", n + 6)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif

/* Queries from `row` on, times keys. */
template <int D>
static __device__ __forceinline__ void multiply_keys(const uint8_t *queries, const uint8_t *keys, uint32_t row,
                                                     uint32_t lane, tqkvc_scores<D> &out)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t q = shared_address(queries), k = shared_address(keys);

#if TQKVC_WARPGROUPS
    const uint32_t rows = q + row / 64 * 64 * 128;
    start_products();
#pragma unroll
    for (int s = 0; s < D / 32; s++) {
        const uint64_t b = describe(k + s / 4 * (shape::TOKENS * 128) + s % 4 * 32, D == 64);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int p = part * (D / 32) + s;
            multiply_bytes(part == 0 ? out.high : out.low,
                           describe(rows + p / 4 * (shape::ROWS * 128) + p % 4 * 32, false), b, s > 0);
        }
    }
    end_products();
#else
#pragma unroll
    for (int i = 0; i < shape::TOKENS / 2; i++)
        out.high[i / 4][i % 4] = out.low[i / 4][i % 4] = 0;
#pragma unroll
    for (int s = 0; s < D / 32; s++) {
        const uint4 high = load_rows_operand<shape::ROWS>(q, row, s, lane),
                    low = load_rows_operand<shape::ROWS>(q, row, D / 32 + s, lane);
#pragma unroll
        for (int n = 0; n < shape::TOKENS / 8; n += 2) {
            uint32_t b[4];
            load_operands(b, k + shape::key_at(8 * n + operand_column(lane), 2 * s + operand_piece(lane)));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply_k32_signed(out.high[n + i], high.x, high.y, high.z, high.w, b[2 * i], b[2 * i + 1]);
                multiply_k32_signed(out.low[n + i], low.x, low.y, low.z, low.w, b[2 * i], b[2 * i + 1]);
            }
        }
    }
#endif
}

/* Adds probabilities times values. */
template <int D>
static __device__ __forceinline__ void multiply_values(const uint8_t *values, uint32_t lane,
                                                       const tqkvc_weights<D> &weights, float (&sums)[D / 8][4])
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t v = shared_address(values);

#if TQKVC_WARPGROUPS
    start_products();
#pragma unroll
    for (int n = 0; n < shape::TOKENS / 16; n++)
#pragma unroll
        for (int d = 0; d < D; d += 64)
            multiply_halves(sums, d / 8, weights.words[n],
                            describe(v + d * shape::TOKENS * 2 + n * 32, shape::TOKENS == 32));
    end_products();
#else
#pragma unroll
    for (int n = 0; n < shape::TOKENS / 16; n++) {
        const uint32_t(&w)[4] = weights.words[n];
        const uint4 a = make_uint4(w[0], w[1], w[2], w[3]);
#pragma unroll
        for (int u = 0; u < shape::UNITS; u++) {
            uint32_t b[4];
            load_operands(b, v + shape::value_at(16 * u + operand_column(lane), 2 * n + operand_piece(lane)));
            multiply_f16(sums[2 * u], a, b[0], b[1]);
            multiply_f16(sums[2 * u + 1], a, b[2], b[3]);
        }
    }
#endif
}

#endif /* TQKVC_PREFILL_MMA_CUH */
