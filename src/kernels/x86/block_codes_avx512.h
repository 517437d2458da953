/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Levels of a unit of a block in registers, as in block_codes_avx2.h with a quad in one register:
 * lane i is dword i. Everything here is inlined and knows its width.
 */
#ifndef TQKVK_BLOCK_CODES_AVX512_H
#define TQKVK_BLOCK_CODES_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "format/block_rows.h"
#include "kernels/by_width.h"
#include "kernels/kernels.h"
#include "kernels/levels.h"

typedef struct tqkvk_unit {
    __m512i q0, q1, q2, q3;
} tqkvk_unit;

/* The levels of a width, sixteen a register, in all four quarters. */
typedef struct tqkvk_levels_of {
    __m512i t0, t1, t2, t3;
} tqkvk_levels_of;

/* `under` and the w bits from bit `from` of each byte of v, moved to bit `to`. */
TQKVK_INLINE __m512i tqkvk_field(__m512i under, __m512i v, int from, int to, int w)
{
    const __m512i mask = _mm512_set1_epi8((char)(((1 << w) - 1) << to));
    if (from > to)
        v = _mm512_srli_epi16(v, from - to);
    else if (from < to)
        v = _mm512_slli_epi16(v, to - from);
    return _mm512_ternarylogic_epi32(under, v, mask, 0xf8); /* under | (v & mask) */
}

/* K: quad g of a plane of w bits; a plane of 1 bit is spread as in block_codes_avx2.h. */
TQKVK_INLINE __m512i tqkvk_k_plane(__m512i under, const uint8_t *plane, int w, int g, int to)
{
    if (w == 1) {
        const __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)plane);
        const __m512i word = _mm512_cvtepu16_epi32(words);
        const __m512i spread = _mm512_or_si512(word, _mm512_slli_epi32(word, 15));
        return tqkvk_field(under, spread, 2 * g, to, 1);
    }
    if (w == 2)
        return tqkvk_field(under, _mm512_loadu_si512(plane), 2 * g, to, 2);
    return tqkvk_field(under, _mm512_loadu_si512(plane + 64 * (g % 2)), 4 * (g / 2), to, 4);
}

/* V: the bytes of a quad in every part of the register, each part at other bits of them. */
TQKVK_INLINE __m512i tqkvk_v_plane(__m512i under, const uint8_t *plane, int w, int g, int to)
{
    __m512i v;
    plane += 8 * w * g;
    if (w == 4) {
        const __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)plane);
        v = _mm512_srlv_epi64(_mm512_broadcast_i64x4(half),
                              _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    } else if (w == 2) {
        const __m128i quarter = _mm_loadu_si128((const __m128i *)(const void *)plane);
        v = _mm512_srlv_epi64(_mm512_broadcast_i32x4(quarter),
                              _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
    } else {
        long long eight;
        memcpy(&eight, plane, sizeof(eight));
        v = _mm512_srlv_epi64(_mm512_set1_epi64(eight), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    }
    return tqkvk_field(under, v, 0, to, w);
}

TQKVK_INLINE __m512i tqkvk_plane(tqkv_side side, __m512i under, const uint8_t *plane, int w, int g,
                                 int to)
{
    return side == TQKV_SIDE_K ? tqkvk_k_plane(under, plane, w, g, to)
                               : tqkvk_v_plane(under, plane, w, g, to);
}

/* Codes of quad g of a unit. */
TQKVK_INLINE __m512i tqkvk_codes(tqkv_side side, int bits, const uint8_t *unit, int g)
{
    const int low = (int)tqkvi_plane_low((uint32_t)bits);
    const __m512i codes = tqkvk_plane(side, _mm512_setzero_si512(), unit, low, g, 0);
    if (bits == low)
        return codes;
    return tqkvk_plane(side, codes, unit + 2 * TQKVI_BLOCK_TOKENS * low, bits - low, g, low);
}

TQKVK_INLINE __m512i tqkvk_sixteen(const int8_t *levels, int offset)
{
    const __m128i table = _mm_loadu_si128((const __m128i *)(const void *)levels);
    return _mm512_broadcast_i32x4(_mm_add_epi8(table, _mm_set1_epi8((char)offset)));
}

/* offset: added to every level, modulo 256. */
TQKVK_INLINE tqkvk_levels_of tqkvk_levels_load(int bits, int offset)
{
    const int8_t *levels = tqkvk_widths[bits].levels;
    return (tqkvk_levels_of){tqkvk_sixteen(levels, offset), tqkvk_sixteen(levels + 16, offset),
                             tqkvk_sixteen(levels + 32, offset),
                             tqkvk_sixteen(levels + 48, offset)};
}

/* Levels plus the offset of `of`: look-ups by bits 0..3, chosen by bits 4 and 5 of the code. */
TQKVK_INLINE __m512i tqkvk_to_levels(int bits, __m512i code, const tqkvk_levels_of *of, int offset)
{
    if (bits == 8) {
        const __m512i above = _mm512_max_epu8(code, _mm512_set1_epi8(1));
        return _mm512_add_epi8(above, _mm512_set1_epi8((char)(offset - 128)));
    }
    __m512i level = _mm512_shuffle_epi8(of->t0, code);
    if (bits <= 4)
        return level;
    const __mmask64 bit4 = _mm512_test_epi8_mask(code, _mm512_set1_epi8(16));
    level = _mm512_mask_shuffle_epi8(level, bit4, of->t1, code);
    if (bits == 5)
        return level;
    const __mmask64 bit5 = _mm512_test_epi8_mask(code, _mm512_set1_epi8(32));
    level = _mm512_mask_shuffle_epi8(level, bit5, of->t2, code);
    return _mm512_mask_shuffle_epi8(level, bit4 & bit5, of->t3, code);
}

TQKVK_INLINE __m512i tqkvk_levels_quad(tqkv_side side, int bits, const uint8_t *unit, int g,
                                       const tqkvk_levels_of *of, int offset)
{
    return tqkvk_to_levels(bits, tqkvk_codes(side, bits, unit, g), of, offset);
}

TQKVK_INLINE tqkvk_unit tqkvk_levels_unit(tqkv_side side, int bits, const uint8_t *unit,
                                          const tqkvk_levels_of *of, int offset)
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
                                               const tqkvk_levels_of *of, int offset)
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

#endif /* TQKVK_BLOCK_CODES_AVX512_H */
