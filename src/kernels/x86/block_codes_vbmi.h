/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Levels of a unit of a block in registers, as in block_codes_avx2.h with a quad in one register:
 * lane i is dword i. Everything here is inlined and knows its width.
 */
#ifndef TQKVK_BLOCK_CODES_VBMI_H
#define TQKVK_BLOCK_CODES_VBMI_H

#include <immintrin.h>
#include <string.h>

#include "format/block_rows.h"
#include "kernels/by_width.h"
#include "kernels/kernels.h"
#include "kernels/levels.h"

typedef struct tqkvk_unit {
    __m512i q0, q1, q2, q3;
} tqkvk_unit;

/* Each byte of v with its bit `from` moved to bit `to`; what else is in the byte may be anything. */
TQKVK_INLINE __m512i tqkvk_move(__m512i v, int from, int to)
{
    if (from > to)
        return _mm512_srli_epi16(v, from - to);
    return from < to ? _mm512_slli_epi16(v, to - from) : v;
}

/* K: quad g of a plane of w bits at bit `to`; a plane of 1 bit is spread as in block_codes_avx2.h. */
TQKVK_INLINE __m512i tqkvk_k_plane(const uint8_t *plane, int w, int g, int to)
{
    if (w == 1) {
        const __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)plane);
        const __m512i word = _mm512_cvtepu16_epi32(words);
        return tqkvk_move(_mm512_or_si512(word, _mm512_slli_epi32(word, 15)), 2 * g, to);
    }
    if (w == 2)
        return tqkvk_move(_mm512_loadu_si512(plane), 2 * g, to);
    return tqkvk_move(_mm512_loadu_si512(plane + 64 * (g % 2)), 4 * (g / 2), to);
}

/*
 * V: the bytes of a quad in every part of the register, each part turned so that other bits of them
 * are at bit `to`.
 */
TQKVK_INLINE __m512i tqkvk_v_plane(const uint8_t *plane, int w, int g, int to)
{
    plane += 8 * w * g;
    if (w == 4) {
        const __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)plane);
        return _mm512_rorv_epi64(
            _mm512_broadcast_i64x4(half),
            _mm512_setr_epi64(-to, -to, -to, -to, 4 - to, 4 - to, 4 - to, 4 - to));
    }
    if (w == 2) {
        const __m128i quarter = _mm_loadu_si128((const __m128i *)(const void *)plane);
        return _mm512_rorv_epi64(
            _mm512_broadcast_i32x4(quarter),
            _mm512_setr_epi64(-to, -to, 2 - to, 2 - to, 4 - to, 4 - to, 6 - to, 6 - to));
    }
    long long eight;
    memcpy(&eight, plane, sizeof(eight));
    return _mm512_rorv_epi64(
        _mm512_set1_epi64(eight),
        _mm512_setr_epi64(-to, 1 - to, 2 - to, 3 - to, 4 - to, 5 - to, 6 - to, 7 - to));
}

TQKVK_INLINE __m512i tqkvk_plane(tqkv_side side, const uint8_t *plane, int w, int g, int to)
{
    return side == TQKV_SIDE_K ? tqkvk_k_plane(plane, w, g, to) : tqkvk_v_plane(plane, w, g, to);
}

/* Codes of quad g of a unit; bits above a code may be anything. */
TQKVK_INLINE __m512i tqkvk_codes(tqkv_side side, int bits, const uint8_t *unit, int g)
{
    const int low = (int)tqkvi_plane_low((uint32_t)bits);
    const __m512i codes = tqkvk_plane(side, unit, low, g, 0);
    if (bits == low)
        return codes;
    const __m512i high = tqkvk_plane(side, unit + 2 * TQKVI_BLOCK_TOKENS * low, bits - low, g, low);
    const __m512i mask = _mm512_set1_epi8((char)((1 << low) - 1));
    return _mm512_ternarylogic_epi32(mask, codes, high, 0xca); /* mask ? codes : high */
}

/* Of a code with anything above it: the table repeats up to the 64 entries that a look-up sees. */
TQKVK_INLINE __m512i tqkvk_levels_load(int bits, int offset)
{
    return _mm512_add_epi8(_mm512_loadu_si512(tqkvk_widths[bits].levels),
                           _mm512_set1_epi8((char)offset));
}

/* Levels plus the offset of `of`. */
TQKVK_INLINE __m512i tqkvk_levels_quad(tqkv_side side, int bits, const uint8_t *unit, int g,
                                       __m512i of, int offset)
{
    const __m512i code = tqkvk_codes(side, bits, unit, g);
    if (bits < 8)
        return _mm512_permutexvar_epi8(code, of);
    const __m512i above = _mm512_max_epu8(code, _mm512_set1_epi8(1));
    return _mm512_add_epi8(above, _mm512_set1_epi8((char)(offset - 128)));
}

TQKVK_INLINE tqkvk_unit tqkvk_levels_unit(tqkv_side side, int bits, const uint8_t *unit,
                                          __m512i of, int offset)
{
    return (tqkvk_unit){tqkvk_levels_quad(side, bits, unit, 0, of, offset),
                        tqkvk_levels_quad(side, bits, unit, 1, of, offset),
                        tqkvk_levels_quad(side, bits, unit, 2, of, offset),
                        tqkvk_levels_quad(side, bits, unit, 3, of, offset)};
}

#define TQKVK_TILE_BLOCKS (TQKVK_TILE_TOKENS / TQKVI_BLOCK_TOKENS)

/* A unit of each block of a tile: half of the registers. */
typedef struct tqkvk_tile_unit {
    tqkvk_unit b0, b1, b2, b3;
} tqkvk_tile_unit;

/* A tile of fewer blocks is filled up with its first one. */
static inline void tqkvk_fill_tile(const uint8_t *const *codes, size_t n_blocks,
                                   const uint8_t *out[TQKVK_TILE_BLOCKS])
{
    for (size_t p = 0; p < TQKVK_TILE_BLOCKS; p++)
        out[p] = codes[p < n_blocks ? p : 0];
}

/* at: of the unit in the codes of every block. */
TQKVK_INLINE tqkvk_tile_unit tqkvk_levels_tile(tqkv_side side, int bits,
                                               const uint8_t *const *codes, size_t at,
                                               __m512i of, int offset)
{
    return (tqkvk_tile_unit){tqkvk_levels_unit(side, bits, codes[0] + at, of, offset),
                             tqkvk_levels_unit(side, bits, codes[1] + at, of, offset),
                             tqkvk_levels_unit(side, bits, codes[2] + at, of, offset),
                             tqkvk_levels_unit(side, bits, codes[3] + at, of, offset)};
}

/* Four bytes in every lane. */
TQKVK_INLINE __m512i tqkvk_four_bytes(const void *p)
{
    int word;
    memcpy(&word, p, sizeof(word));
    return _mm512_set1_epi32(word);
}

#endif /* TQKVK_BLOCK_CODES_VBMI_H */
