/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two ends of store: rows of x to z in shared memory (steps 1 and 2 of "Encoding a row"), and codes
 * to the cells of a pool.
 */
#ifndef TQKVC_STORE_ROWS_CUH
#define TQKVC_STORE_ROWS_CUH

#include "cuda/columns.cuh"
#include "cuda/launch.h"
#include "cuda/transform.cuh"

/* Where the codes of a row go. */
struct tqkvc_place {
    uint8_t *section; /* in the block; NULL: the token is left out */
    uint32_t slot;
};

static __device__ __forceinline__ tqkvc_place find_place(const tqkvc_store &p, uint32_t token,
                                                         const tqkvc_layout &layout, uint32_t side)
{
    const int64_t slot = token < p.args.n_tokens ? p.args.slots[token] : -1;
    if (slot < 0)
        return {nullptr, 0};
    const uint32_t cell = (uint32_t)(slot % p.args.page_tokens);
    return {static_cast<uint8_t *>(p.args.pool) +
                slot / p.args.page_tokens * (int64_t)p.page_bytes +
                (size_t)(cell / TQKVC_BLOCK_TOKENS) * p.shape.block_bytes[p.args.tier] +
                layout.offset + (side == TQKV_SIDE_V ? layout.bytes[0] : 0),
            cell % TQKVC_BLOCK_TOKENS};
}

/* First position of the frame, no less than INT32_MIN. */
static __device__ __forceinline__ int32_t frame_base(int32_t position, uint32_t frame_tokens)
{
    if (position >= 0)
        return position - (int32_t)((uint32_t)position % frame_tokens);
    const uint32_t after = ~(uint32_t)position; /* tokens from here to position -1 */
    const int64_t base = -(int64_t)(after - after % frame_tokens) - (int64_t)frame_tokens;
    return (int32_t)max(base, (int64_t)INT32_MIN);
}

/*
 * A thread has one pair of channels (find_pair) of ROWS rows at a time: x of the next ones is on its way while
 * z of these is made.
 */
template <int D, int ROWS> struct tqkvc_row_loader {
    using shape = tqkvc_store_shape<D, ROWS>;
    static constexpr int N = ROWS == 1 ? 1 : ROWS == 8 ? 2 : 4; /* rows at a time */
    static constexpr int PARTS = ROWS / N, WARPS = D / 64;      /* a warp has 32 pairs */
    static constexpr uint32_t NOT_ZERO = 1, NOT_FINITE = 16;    /* << row */

    /* flags: of N rows, by each of the warps that have them. */
    struct flags {
        uint8_t of[PARTS][WARPS];
    };

    const tqkvc_store &p;
    uint32_t first, g, side; /* first: token of row 0 */
    uint32_t index, part;    /* of the pair; which rows */
    tqkvc_pair pair;
    bool turns;
    float x[N][2];
    int32_t base; /* lane i: of row i % N */

    __device__ __forceinline__ tqkvc_row_loader(const tqkvc_store &p, uint32_t first, uint32_t g,
                                                uint32_t side)
        : p(p), first(first), g(g), side(side), index(threadIdx.x % (D / 2)),
          part(threadIdx.x / (D / 2)), pair(find_pair(p.shape, index)),
          turns(side == TQKV_SIDE_K && pair.turns), base(0)
    {
        if (part < PARTS)
            fetch();
    }

    /* Rows past the last token are that of the last token, and are not stored. */
    __device__ __forceinline__ uint32_t token(uint32_t row) const
    {
        return min(first + part * N + row, p.args.n_tokens - 1);
    }

    __device__ __forceinline__ void fetch()
    {
        const size_t stride = side == TQKV_SIDE_K ? p.args.k_token_stride : p.args.v_token_stride;
        const uint32_t at[2] = {pair.a, pair.b};
        size_t row[N];
#pragma unroll
        for (int r = 0; r < N; r++)
            row[r] = token(r) * stride + g * D;
        if (side == TQKV_SIDE_K && p.shape.n_rot != 0)
            base = frame_base(p.args.positions[token(threadIdx.x % N)], p.shape.frame_tokens);
        load_rows<N, 2>(side == TQKV_SIDE_K ? p.args.k : p.args.v, row, at, p.args.type, x);
    }

    /* z[i][row] of all rows, rows next to each other. */
    __device__ __forceinline__ void load(float *z, flags &out)
    {
        const float *mean =
            reinterpret_cast<const float *>(p.image + p.shape.parts.mean[side]) + g * D;
        const float mean_a = __ldg(mean + pair.a), mean_b = __ldg(mean + pair.b);
        const float inv_freq =
            turns ? __ldg(reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq) + index)
                  : 0.0f;
        int32_t turned = 0; /* the base of sine and cosine */
        float sine = 0.0f, cosine = 1.0f;

#pragma unroll 1
        while (part < PARTS) {
            float a[N], b[N];
            uint32_t seen = 0;
#pragma unroll
            for (int r = 0; r < N; r++) {
                const int32_t by = __shfl_sync(TQKVC_FULL, base, r);
                a[r] = x[r][0];
                b[r] = x[r][1];
                seen |= a[r] != 0.0f || b[r] != 0.0f ? NOT_ZERO << r : 0u;
                seen |= !isfinite(a[r]) || !isfinite(b[r]) ? NOT_FINITE << r : 0u;
                if (turns && by != 0) {
                    if (by != turned)
                        turn_exact(inv_freq, by, sine, cosine);
                    turned = by;
                    a[r] = add(mul(x[r][0], cosine), mul(x[r][1], sine)); /* by -base */
                    b[r] = add(mul(x[r][1], cosine), -mul(x[r][0], sine));
                }
                a[r] = add(a[r], -mean_a);
                b[r] = add(b[r], -mean_b);
            }
            put(z + pair.a * shape::Z_STRIDE + part * N, a);
            put(z + pair.b * shape::Z_STRIDE + part * N, b);
            seen = __reduce_or_sync(TQKVC_FULL, seen);
            if (threadIdx.x % 32 == 0)
                out.of[part][index / 32] = (uint8_t)seen;
            part += shape::THREADS / (D / 2);
            if (part < PARTS)
                fetch();
        }
    }

    static __device__ __forceinline__ void put(float *to, const float (&v)[N])
    {
        if constexpr (N == 4)
            *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
        else if constexpr (N == 2)
            *reinterpret_cast<float2 *>(to) = make_float2(v[0], v[1]);
        else
            *to = v[0];
    }

    /* Whether a row has values, all of them finite. */
    static __device__ __forceinline__ bool is_good(const flags &of_rows, uint32_t row)
    {
        uint32_t seen = 0;
        for (int w = 0; w < WARPS; w++)
            seen |= of_rows.of[row / N][w];
        return (seen >> row % N & (NOT_ZERO | NOT_FINITE)) == NOT_ZERO;
    }
};

/* Codes of an octet's row into its block, where it writes. zero: the zero row. */
template <int N>
static __device__ __forceinline__ void put_row(const tqkvc_place &place, uint32_t side,
                                               const tqkvc_row_encoder<N> &row, bool zero,
                                               bool writes)
{
    uint8_t *unit = place.section + TQKVC_BLOCK_TOKENS;

    if (writes && octet_lane() == 0)
        place.section[place.slot] = zero ? 0 : (uint8_t)row.scale;
#pragma unroll
    for (int u = 0; u < N; u++) {
        const uint32_t bits = row.layout.bits(u), low = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
        if (bits == 0)
            continue;
        uint32_t codes[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            codes[i] = zero ? 0 : row.code_of(u, i);
        put_plane(unit, side, place.slot, low, codes, writes);
#pragma unroll
        for (int i = 0; i < 2; i++)
            codes[i] >>= low;
        if (bits > low)
            put_plane(unit + 32 * low, side, place.slot, bits - low, codes, writes);
        unit += 32 * bits;
    }
}

#endif /* TQKVC_STORE_ROWS_CUH */
