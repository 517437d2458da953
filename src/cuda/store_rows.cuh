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

static __device__ __forceinline__ tqkvc_place find_place(const tqkvc_store &p, uint32_t tier,
                                                         int64_t slot, const tqkvc_layout &layout,
                                                         uint32_t side)
{
    if (slot < 0)
        return {nullptr, 0};
    const uint32_t n = p.args.page_tokens;
    const int64_t page = slot >> 32 == 0 ? (int64_t)((uint32_t)slot / n) : slot / n; /* faster */
    const uint32_t cell = (uint32_t)(slot - page * n);
    return {static_cast<uint8_t *>(p.args.pool[tier]) + page * p.page_bytes[tier] +
                (size_t)(cell / TQKVC_BLOCK_TOKENS) * p.shape.block_bytes[tier] +
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
    static constexpr int N = shape::IS_MANY ? 4 : 1;        /* rows at a time */
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
    int32_t position; /* lane i: of row i % N */
    float mean[2], inv_freq;

    __device__ __forceinline__ tqkvc_row_loader(const tqkvc_store &p, uint32_t first, uint32_t g,
                                                uint32_t side)
        : p(p), first(first), g(g), side(side), index(threadIdx.x % (D / 2)),
          part(threadIdx.x / (D / 2)), pair(find_pair(p.shape, index)),
          turns(side == TQKV_SIDE_K && pair.turns), position(0)
    {
        const float *of_head =
            reinterpret_cast<const float *>(p.image + p.shape.parts.mean[side]) + g * D;

        if (part >= PARTS)
            return;
        fetch();
        mean[0] = __ldg(of_head + pair.a);
        mean[1] = __ldg(of_head + pair.b);
        if (turns)
            inv_freq =
                __ldg(reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq) + index);
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
            position = p.args.positions[token(threadIdx.x % N)];
        load_rows<N, 2>(side == TQKV_SIDE_K ? p.args.k : p.args.v, row, at, p.args.type, x);
    }

    /* z[i][row] of all rows, rows next to each other. */
    __device__ __forceinline__ void load(float *z, flags &out)
    {
        int32_t turned = 0; /* the base of sine and cosine */
        float sine = 0.0f, cosine = 1.0f;

#pragma unroll 1
        for (uint32_t here = part; here < PARTS; here = part) {
            const int32_t base = frame_base(position, p.shape.frame_tokens);
            float a[N], b[N];
            uint32_t seen = 0;
#pragma unroll
            for (int r = 0; r < N; r++) {
                a[r] = x[r][0];
                b[r] = x[r][1];
            }
            part += shape::THREADS / (D / 2);
            if (part < PARTS)
                fetch();
#pragma unroll
            for (int r = 0; r < N; r++) {
                const int32_t by = __shfl_sync(TQKVC_FULL, base, r);
                const float a_there = a[r], b_there = b[r];
                seen |= a[r] != 0.0f || b[r] != 0.0f ? NOT_ZERO << r : 0u;
                seen |= !isfinite(a[r]) || !isfinite(b[r]) ? NOT_FINITE << r : 0u;
                if (turns && by != 0) {
                    if (by != turned)
                        turn_exact(inv_freq, by, sine, cosine);
                    turned = by;
                    a[r] = add(mul(a_there, cosine), mul(b_there, sine)); /* by -base */
                    b[r] = add(mul(b_there, cosine), -mul(a_there, sine));
                }
                a[r] = add(a[r], -mean[0]);
                b[r] = add(b[r], -mean[1]);
            }
            put(z + pair.a * shape::Z_STRIDE + here * N, a);
            put(z + pair.b * shape::Z_STRIDE + here * N, b);
            seen = __reduce_or_sync(TQKVC_FULL, seen);
            if (threadIdx.x % 32 == 0)
                out.of[here][index / 32] = (uint8_t)seen;
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

/* Widths of the planes of a unit: the lower bits of a code, and the rest. */
static __device__ __forceinline__ uint32_t low_bits(uint32_t bits)
{
    return bits >= 4 ? 4 : min(bits, 2u);
}

/*
 * Codes of a octet's row into its block, where it writes. zero: the zero row. First all bytes, so that no
 * exchange waits for another, then the stores.
 */
template <int N>
static __device__ __forceinline__ void put_row(const tqkvc_place &place, uint32_t side,
                                               const tqkvc_row_encoder<N> &row, bool zero,
                                               bool writes)
{
    uint32_t low[N], high[N], any_high = 0;

#pragma unroll
    for (int u = 0; u < N; u++) {
        const uint32_t bits = row.layout.bits[u], w = low_bits(bits);
        const uint32_t a = zero ? 0 : row.code_of(u, 0), b = zero ? 0 : row.code_of(u, 1);
        low[u] = join_plane(w, a, b);
        high[u] = a >> w | b >> w << 16;
        any_high |= bits - w;
    }
    if (any_high != 0) {
#pragma unroll
        for (int u = 0; u < N; u++)
            high[u] = join_plane(row.layout.bits[u] - low_bits(row.layout.bits[u]),
                                 high[u] & 0xffffu, high[u] >> 16);
    }
    if (!writes)
        return;
    if (octet_lane() == 0)
        place.section[place.slot] = zero ? 0 : (uint8_t)row.scale;
    uint8_t *unit = place.section + TQKVC_BLOCK_TOKENS;
#pragma unroll
    for (int u = 0; u < N; u++) {
        const uint32_t bits = row.layout.bits[u], w = low_bits(bits);
        put_plane(unit, side, place.slot, w, low[u]);
        put_plane(unit + 32 * w, side, place.slot, bits - w, high[u]);
        unit += 32 * bits;
    }
}

/* A row of many units on its way to the octets that share it: signed levels by unit and lane. */
template <int N> struct tqkvc_shared_row {
    uint32_t levels[N][8];
    uint32_t scale; /* 0: the zero row */
};

template <int N>
static __device__ __forceinline__ void share_row(tqkvc_shared_row<N> &to, const tqkvc_row_encoder<N> &row, bool zero)
{
#pragma unroll
    for (int u = 0; u < N; u++)
        to.levels[u][octet_lane()] = row.signed_levels(u);
    if (octet_lane() == 0)
        to.scale = zero ? 0 : (uint32_t)row.scale;
}

/* Codes of units start, start + step, ... of a shared row into its block. widths, more: four bits a unit. */
template <int N>
static __device__ __forceinline__ void put_units(const tqkvc_place &place, uint32_t side, const tqkvc_shared_row<N> &row,
                                                 const tqkvc_encode_tables &tables, uint64_t widths, uint64_t more,
                                                 uint32_t start, uint32_t step)
{
    const bool writes = place.section != nullptr;

#pragma unroll 1
    for (uint32_t u = start; u < N; u += step) {
        const uint32_t bits = (uint32_t)((u < TQKVC_UNITS_MAX ? widths : more) >> 4 * (u % TQKVC_UNITS_MAX)) & 15u;
        const uint32_t w = low_bits(bits), both = row.levels[u][octet_lane()];
        const auto code = [&](uint32_t level) {
            return row.scale == 0 ? 0u
                                  : tqkvc_row_encoder<N>::find_code(tables, bits, level & 0x7fffu, (level & 0x8000u) != 0);
        };
        const uint32_t a = code(both & 0xffffu), b = code(both >> 16);
        const uint32_t low = join_plane(w, a, b), high = join_plane(bits - w, a >> w, b >> w);
        uint32_t offset = 0;
        for (uint32_t i = 0; i < u; i++)
            offset += (uint32_t)((i < TQKVC_UNITS_MAX ? widths : more) >> 4 * (i % TQKVC_UNITS_MAX)) & 15u;
        if (!writes)
            continue;
        uint8_t *unit = place.section + TQKVC_BLOCK_TOKENS + 32 * offset;
        put_plane(unit, side, place.slot, w, low);
        put_plane(unit + 32 * w, side, place.slot, bits - w, high);
    }
    if (writes && start == 0 && octet_lane() == 0)
        place.section[place.slot] = (uint8_t)row.scale;
}

#endif /* TQKVC_STORE_ROWS_CUH */
