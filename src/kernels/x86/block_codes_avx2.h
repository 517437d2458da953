/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes and levels of a unit of a block (format/block_rows.h) in registers.
 *
 *     quad    16 lanes of 4 bytes, lane i in dword i of `lo` or i - 8 of `hi`
 *     unit    four quads. K: quad g has channels 4g..4g+3, lanes are tokens
 *                         V: quad g has tokens 4g..4g+3, lanes are channels
 *
 * A width is a constant wherever these functions are used. They must be inlined, also at -O2, so
 * that every shift and every look-up knows it.
 */
#ifndef TQKVK_BLOCK_CODES_AVX2_H
#define TQKVK_BLOCK_CODES_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "format/block_rows.h"
#include "kernels/by_width.h"
#include "kernels/levels.h"

typedef struct tqkvk_quad {
    __m256i lo, hi;
} tqkvk_quad;

typedef struct tqkvk_unit {
    tqkvk_quad q0, q1, q2, q3;
} tqkvk_unit;

/* The levels of a width, sixteen a register, in both halves. */
typedef struct tqkvk_levels_of {
    __m256i t0, t1, t2, t3;
} tqkvk_levels_of;

TQKVK_INLINE __m256i tqkvk_load(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

TQKVK_INLINE __m128i tqkvk_load_half(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

/* The w bits from bit `from` of each byte, moved to bit `to`. */
TQKVK_INLINE __m256i tqkvk_field(__m256i v, int from, int to, int w)
{
    const __m256i mask = _mm256_set1_epi8((char)(((1 << w) - 1) << to));
    if (from > to)
        v = _mm256_srli_epi16(v, from - to);
    else if (from < to)
        v = _mm256_slli_epi16(v, to - from);
    return _mm256_and_si256(v, mask);
}

/*
 * K, plane of 1 bit. A token has a word of two bytes: channel c is in byte c % 2, bit c / 2. The
 * word goes into both halves of the token's lane, one bit lower in the upper half; then bit 2g of
 * its four bytes are channels 4g..4g+3. (The bit that spills over is never looked at.)
 */
TQKVK_INLINE __m256i tqkvk_k_spread(const uint8_t *plane)
{
    const __m256i word = _mm256_cvtepu16_epi32(tqkvk_load_half(plane));
    return _mm256_or_si256(word, _mm256_slli_epi32(word, 15));
}

/* Quad g of a plane of w bits of K, its codes from bit `to` up. */
TQKVK_INLINE tqkvk_quad tqkvk_k_plane(const uint8_t *plane, int w, int g, int to)
{
    tqkvk_quad q;
    int from = 2 * g;
    if (w == 1) {
        q = (tqkvk_quad){tqkvk_k_spread(plane), tqkvk_k_spread(plane + 16)};
    } else if (w == 2) {
        q = (tqkvk_quad){tqkvk_load(plane), tqkvk_load(plane + 32)};
    } else {
        plane += 64 * (g % 2);
        q = (tqkvk_quad){tqkvk_load(plane), tqkvk_load(plane + 32)};
        from = 4 * (g / 2);
    }
    return (tqkvk_quad){tqkvk_field(q.lo, from, to, w), tqkvk_field(q.hi, from, to, w)};
}

/* The same of V: the bytes of a quad have all 16 channels of 4 tokens, channel c + 2w above c. */
TQKVK_INLINE tqkvk_quad tqkvk_v_plane(const uint8_t *plane, int w, int g, int to)
{
    __m256i lo, hi;
    plane += 8 * w * g;
    if (w == 4) {
        const __m256i v = tqkvk_load(plane);
        return (tqkvk_quad){tqkvk_field(v, 0, to, 4), tqkvk_field(v, 4, to, 4)};
    }
    if (w == 2) {
        const __m256i v = _mm256_broadcastsi128_si256(tqkvk_load_half(plane));
        lo = _mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 0, 2, 2));
        hi = _mm256_srlv_epi64(v, _mm256_setr_epi64x(4, 4, 6, 6));
    } else {
        long long eight;
        memcpy(&eight, plane, sizeof(eight));
        const __m256i v = _mm256_set1_epi64x(eight);
        lo = _mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 1, 2, 3));
        hi = _mm256_srlv_epi64(v, _mm256_setr_epi64x(4, 5, 6, 7));
    }
    lo = tqkvk_field(lo, 0, 0, w);
    hi = tqkvk_field(hi, 0, 0, w);
    return (tqkvk_quad){_mm256_slli_epi16(lo, to), _mm256_slli_epi16(hi, to)};
}

TQKVK_INLINE tqkvk_quad tqkvk_plane(tqkv_side side, const uint8_t *plane, int w, int g, int to)
{
    return side == TQKV_SIDE_K ? tqkvk_k_plane(plane, w, g, to) : tqkvk_v_plane(plane, w, g, to);
}

/* Codes of quad g of a unit. */
TQKVK_INLINE tqkvk_quad tqkvk_codes(tqkv_side side, int bits, const uint8_t *unit, int g)
{
    const int low = (int)tqkvi_plane_low((uint32_t)bits);
    tqkvk_quad q = tqkvk_plane(side, unit, low, g, 0);
    if (bits > low) {
        const tqkvk_quad top =
            tqkvk_plane(side, unit + 2 * TQKVI_BLOCK_TOKENS * low, bits - low, g, low);
        q = (tqkvk_quad){_mm256_or_si256(q.lo, top.lo), _mm256_or_si256(q.hi, top.hi)};
    }
    return q;
}

/* offset: added to every level, modulo 256. */
TQKVK_INLINE tqkvk_levels_of tqkvk_levels_load(int bits, int offset)
{
    const uint8_t *levels = (const uint8_t *)tqkvk_widths[bits].levels;
    const __m256i add = _mm256_set1_epi8((char)offset);
    const __m256i t0 = _mm256_broadcastsi128_si256(tqkvk_load_half(levels));
    const __m256i t1 = _mm256_broadcastsi128_si256(tqkvk_load_half(levels + 16));
    const __m256i t2 = _mm256_broadcastsi128_si256(tqkvk_load_half(levels + 32));
    const __m256i t3 = _mm256_broadcastsi128_si256(tqkvk_load_half(levels + 48));
    return (tqkvk_levels_of){_mm256_add_epi8(t0, add), _mm256_add_epi8(t1, add),
                             _mm256_add_epi8(t2, add), _mm256_add_epi8(t3, add)};
}

/*
 * Levels plus the offset of `of`. A look-up goes by bits 0..3 of a code (bit 7 is 0); bits 4 and 5
 * choose between look-ups, each moved to the top of its byte. 8 bits: level = code - 128, -127
 * for code 0.
 */
TQKVK_INLINE __m256i tqkvk_to_levels(int bits, __m256i code, const tqkvk_levels_of *of, int offset)
{
    if (bits == 8) {
        const __m256i above = _mm256_max_epu8(code, _mm256_set1_epi8(1));
        return _mm256_add_epi8(above, _mm256_set1_epi8((char)(offset - 128)));
    }
    const __m256i first = _mm256_shuffle_epi8(of->t0, code);
    if (bits <= 4)
        return first;
    const __m256i bit4 = _mm256_slli_epi16(code, 3);
    const __m256i below = _mm256_blendv_epi8(first, _mm256_shuffle_epi8(of->t1, code), bit4);
    if (bits == 5)
        return below;
    const __m256i above = _mm256_blendv_epi8(_mm256_shuffle_epi8(of->t2, code),
                                             _mm256_shuffle_epi8(of->t3, code), bit4);
    return _mm256_blendv_epi8(below, above, _mm256_slli_epi16(code, 2));
}

TQKVK_INLINE tqkvk_quad tqkvk_levels_quad(tqkv_side side, int bits, const uint8_t *unit, int g,
                                          const tqkvk_levels_of *of, int offset)
{
    const tqkvk_quad q = tqkvk_codes(side, bits, unit, g);
    return (tqkvk_quad){tqkvk_to_levels(bits, q.lo, of, offset),
                        tqkvk_to_levels(bits, q.hi, of, offset)};
}

TQKVK_INLINE tqkvk_unit tqkvk_levels_unit(tqkv_side side, int bits, const uint8_t *unit,
                                          const tqkvk_levels_of *of, int offset)
{
    return (tqkvk_unit){tqkvk_levels_quad(side, bits, unit, 0, of, offset),
                        tqkvk_levels_quad(side, bits, unit, 1, of, offset),
                        tqkvk_levels_quad(side, bits, unit, 2, of, offset),
                        tqkvk_levels_quad(side, bits, unit, 3, of, offset)};
}

#endif /* TQKVK_BLOCK_CODES_AVX2_H */
