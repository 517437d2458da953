/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes in shared memory to levels that lie there too: one unit (of 16 channels) of a block (16 tokens) by one warp.
 * Levels of K are bytes, those of V f16, which hold them exactly: a byte x below a byte of 0x64 is 1024 + x, so a level
 * is the difference of such a number and 1152, or of two, where lookup.cuh makes it of two bytes.
 *
 *     K   lane = 16 a + 8 h + b: channels 4h, 4h + 8, 4h + 1, 4h + 9, .. 4h + 11 of token 8 a + b: 8 bytes
 *     V   lane = 8 t + i: tokens 4t .. 4t + 3 of channels i and i + 8: 8 bytes each
 *
 * So K keeps channels i and i + 8 of a unit side by side, as do queries; V lies with tokens side by side.
 */
#ifndef TQKVC_LEVELS_CUH
#define TQKVC_LEVELS_CUH

#include <cuda_fp16.h>

#include "cuda/lookup.cuh"

constexpr uint32_t TQKVC_BIASED = 0x80808080u; /* levels as bytes without sign */

/* 1024 + byte of the two bytes that `pair` selects, with bytes of 0x64 as byte 4 of the permutation. */
static __device__ __forceinline__ __half2 level_halves(uint32_t bytes, uint32_t pair)
{
    const uint32_t x = permute(bytes, 0x64646464u, pair);
    return *reinterpret_cast<const __half2 *>(&x);
}

/* Two levels: words of first and second bytes as lookup.cuh has them for V; of other widths, level + 128. */
template <bool HAS_SECOND>
static __device__ __forceinline__ uint32_t level_pair(uint32_t first, uint32_t second, uint32_t pair)
{
    const __half2 bias = __half2half2(__ushort_as_half(0x6480)); /* 1152 */
    const __half2 x = HAS_SECOND ? __hsub2(level_halves(second, pair), level_halves(first, pair))
                                 : __hsub2(level_halves(first, pair), bias);
    return *reinterpret_cast<const uint32_t *>(&x);
}

/* The table of a width. */
template <int BITS> static __device__ __forceinline__ auto load_level_table(tqkvc_rows tables)
{
    tqkvc_table<BITS, TQKV_SIDE_V> table;

    table.load(tables.row(BITS));
    return table;
}

/* Codes of channels 4h + i in the low nibbles of bytes i, of channels 4h + i + 8 in the high ones. */
static __device__ __forceinline__ uint32_t k_row_plane(int w, const uint8_t *plane, uint32_t token,
                                                       uint32_t h)
{
    if (w == 4)
        return load_u32(plane + 64 * h + 4 * token);
    if (w == 2)
        return load_u32(plane + 4 * token) >> 2 * h & 0x33333333u;
    const uint32_t x = load_u16(plane + 2 * token) >> 2 * h;
    return permute(x, x >> 1, 0x5410u) & 0x11111111u;
}

/* Four levels as bytes, of what lookup.cuh makes for V: no byte of second - first + 128 borrows from the next. */
template <int BITS>
static __device__ __forceinline__ uint32_t level_bytes(uint32_t first, uint32_t second)
{
    return tqkvc_has_second(BITS) && BITS == 4
               ? ((second | TQKVC_BIASED) - first) ^ TQKVC_BIASED
           : tqkvc_has_second(BITS) ? second + (first & 0x01010101u) /* first is 0 or 255 */
                                    : first;
}

/* Levels of a lane's eight channels of K of a unit, in the order above. */
template <int BITS>
static __device__ __forceinline__ uint2 k_row_levels(const uint8_t *unit, uint32_t token, uint32_t h,
                                                     const tqkvc_table<BITS, TQKV_SIDE_V> &table)
{
    constexpr int LOW = tqkvc_low_bits(BITS);
    tqkvc_levels levels = {};

    if constexpr (BITS == 0)
        return make_uint2(0, 0);
    const uint32_t low = k_row_plane(LOW, unit, token, h);
    const uint32_t high = BITS > LOW ? k_row_plane(BITS - LOW, unit + 32 * LOW, token, h) : 0;
    if constexpr (BITS == 8) {
        const uint32_t lower = (low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u),
                       upper = (low >> 4 & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u);
        return make_uint2(permute(lower, upper, 0x5140u) ^ TQKVC_BIASED,
                          permute(lower, upper, 0x7362u) ^ TQKVC_BIASED);
    }
    tqkvc_codes c = {};
    c.low = BITS == 3 ? low | high << 2 : low;
    if constexpr (BITS == 5 || BITS == 6)
        put_high<BITS>(high, c);
    table.find(c, levels);
    return make_uint2(level_bytes<BITS>(levels.first[0], levels.second[0]),
                      level_bytes<BITS>(levels.first[1], levels.second[1]));
}

/* Levels of V of a unit: tokens 4t .. 4t + 3 of channel i in x and y, of channel i + 8 in z and w. */
template <int BITS>
static __device__ __forceinline__ uint4 v_row_levels(const uint8_t *unit, uint32_t lane,
                                                     const tqkvc_table<BITS, TQKV_SIDE_V> &table)
{
    constexpr int LOW = tqkvc_low_bits(BITS);
    constexpr bool TWO = tqkvc_has_second(BITS);
    const uint32_t i = lane % 8, t = lane / 8;
    tqkvc_levels levels = {};

    if constexpr (BITS == 0)
        return make_uint4(0, 0, 0, 0);
    v_levels<BITS>({unit + v_place(LOW, i, t), unit + 32 * LOW + v_place(BITS - LOW, i, t)}, i,
                   table, levels);
    if constexpr (BITS == 8) {
        const uint32_t lower = levels.first[0] ^ TQKVC_BIASED, upper = levels.first[1] ^ TQKVC_BIASED;
        return make_uint4(level_pair<false>(lower, 0, 0x4140u), level_pair<false>(lower, 0, 0x4342u),
                          level_pair<false>(upper, 0, 0x4140u), level_pair<false>(upper, 0, 0x4342u));
    }
    if constexpr (!TWO) {
        levels.first[0] ^= TQKVC_BIASED;
        levels.first[1] ^= TQKVC_BIASED;
    }
    return make_uint4(level_pair<TWO>(levels.first[0], levels.second[0], 0x4240u),
                      level_pair<TWO>(levels.first[1], levels.second[1], 0x4240u),
                      level_pair<TWO>(levels.first[0], levels.second[0], 0x4341u),
                      level_pair<TWO>(levels.first[1], levels.second[1], 0x4341u));
}

#endif /* TQKVC_LEVELS_CUH */
