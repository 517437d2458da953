/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes and levels of a unit of a block (format/block_rows.h) in registers.
 *
 *     quad    16 lanes of 4 bytes, lanes 4j..4j+3 in register vj
 *     unit    four quads. K: quad g has channels 4g..4g+3, lanes are tokens
 *                         V: quad g has tokens 4g..4g+3, lanes are channels
 */
#ifndef TQKVK_BLOCK_CODES_NEON_H
#define TQKVK_BLOCK_CODES_NEON_H

#include "kernels/arm/levels_neon.h"

typedef struct tqkvk_codes {
    uint8x16_t v0, v1, v2, v3;
} tqkvk_codes;

typedef struct tqkvk_quad {
    int8x16_t v0, v1, v2, v3;
} tqkvk_quad;

typedef struct tqkvk_unit {
    tqkvk_quad q0, q1, q2, q3;
} tqkvk_unit;

TQKVK_INLINE tqkvk_codes tqkvk_load(const uint8_t *p)
{
    return (tqkvk_codes){vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}

/*
 * K, plane of 1 bit. A token has a word of two bytes: channel c is in byte c % 2, bit c / 2. The
 * word goes into both halves of the token's lane, one bit lower in the upper half; then bit 2g of
 * its four bytes are channels 4g..4g+3.
 */
TQKVK_INLINE tqkvk_codes tqkvk_k_spread(const uint8_t *plane)
{
    const int8x16_t down = vreinterpretq_s8_u32(vdupq_n_u32(0xffff0000u)); /* by 0 0 1 1 */
    const uint16x8_t lo = vreinterpretq_u16_u8(vld1q_u8(plane));
    const uint16x8_t hi = vreinterpretq_u16_u8(vld1q_u8(plane + 16));
    return (tqkvk_codes){vshlq_u8(vreinterpretq_u8_u16(vzip1q_u16(lo, lo)), down),
                         vshlq_u8(vreinterpretq_u8_u16(vzip2q_u16(lo, lo)), down),
                         vshlq_u8(vreinterpretq_u8_u16(vzip1q_u16(hi, hi)), down),
                         vshlq_u8(vreinterpretq_u8_u16(vzip2q_u16(hi, hi)), down)};
}

/* Quad g of a plane of w bits of K. */
TQKVK_INLINE tqkvk_codes tqkvk_k_plane(const uint8_t *plane, int w, int keep, int g)
{
    const int from = w == 4 ? 4 * (g / 2) : 2 * g;
    const tqkvk_codes q = w == 1   ? tqkvk_k_spread(plane)
                          : w == 2 ? tqkvk_load(plane)
                                   : tqkvk_load(plane + 64 * (g % 2));
    return (tqkvk_codes){tqkvk_field(q.v0, from, keep), tqkvk_field(q.v1, from, keep),
                         tqkvk_field(q.v2, from, keep), tqkvk_field(q.v3, from, keep)};
}

/* The same of V: the bytes of a quad have all 16 channels of 4 tokens, channel c + 2w above c. */
TQKVK_INLINE tqkvk_codes tqkvk_v_plane(const uint8_t *plane, int w, int keep, int g)
{
    plane += 8 * w * g;
    if (w == 4) {
        const uint8x16_t a = vld1q_u8(plane), b = vld1q_u8(plane + 16);
        return (tqkvk_codes){tqkvk_field(a, 0, keep), tqkvk_field(b, 0, keep),
                             tqkvk_field(a, 4, keep), tqkvk_field(b, 4, keep)};
    }
    uint8x16_t v;
    if (w == 2) {
        v = vld1q_u8(plane);
    } else { /* channels 2i and 2i + 1 at bit i, so the next two are a bit higher */
        const uint8x8_t eight = vld1_u8(plane);
        v = vcombine_u8(eight, vshr_n_u8(eight, 1));
    }
    return (tqkvk_codes){tqkvk_field(v, 0, keep), tqkvk_field(v, 2, keep), tqkvk_field(v, 4, keep),
                         tqkvk_field(v, 6, keep)};
}

TQKVK_INLINE tqkvk_codes tqkvk_plane(tqkv_side side, const uint8_t *plane, int w, int keep, int g)
{
    return side == TQKV_SIDE_K ? tqkvk_k_plane(plane, w, keep, g)
                               : tqkvk_v_plane(plane, w, keep, g);
}

/* Codes of quad g of a unit. */
TQKVK_INLINE tqkvk_codes tqkvk_codes_quad(tqkv_side side, int bits, const uint8_t *unit, int g)
{
    const int low = (int)tqkvi_plane_low((uint32_t)bits), rest = bits - low;
    const tqkvk_codes q = tqkvk_plane(side, unit, low, tqkvk_keep(bits), g);
    if (rest == 0)
        return q;
    const tqkvk_codes top = tqkvk_plane(side, unit + 2 * TQKVI_BLOCK_TOKENS * low, rest, rest, g);
    return (tqkvk_codes){tqkvk_join(bits, q.v0, top.v0), tqkvk_join(bits, q.v1, top.v1),
                         tqkvk_join(bits, q.v2, top.v2), tqkvk_join(bits, q.v3, top.v3)};
}

TQKVK_INLINE tqkvk_quad tqkvk_levels_quad(tqkv_side side, int bits, const uint8_t *unit, int g,
                                          const tqkvk_levels_of *of)
{
    const tqkvk_codes q = tqkvk_codes_quad(side, bits, unit, g);
    return (tqkvk_quad){tqkvk_to_levels(bits, q.v0, of), tqkvk_to_levels(bits, q.v1, of),
                        tqkvk_to_levels(bits, q.v2, of), tqkvk_to_levels(bits, q.v3, of)};
}

TQKVK_INLINE tqkvk_unit tqkvk_levels_unit(tqkv_side side, int bits, const uint8_t *unit,
                                          const tqkvk_levels_of *of)
{
    return (tqkvk_unit){
        tqkvk_levels_quad(side, bits, unit, 0, of), tqkvk_levels_quad(side, bits, unit, 1, of),
        tqkvk_levels_quad(side, bits, unit, 2, of), tqkvk_levels_quad(side, bits, unit, 3, of)};
}

/* A quad of V with tokens apart: register vt has the 16 channels of its token t. */
TQKVK_INLINE tqkvk_quad tqkvk_v_tokens(tqkvk_quad q)
{
    const int8x16_t even_lo = vuzp1q_s8(q.v0, q.v1), even_hi = vuzp1q_s8(q.v2, q.v3);
    const int8x16_t odd_lo = vuzp2q_s8(q.v0, q.v1), odd_hi = vuzp2q_s8(q.v2, q.v3);
    return (tqkvk_quad){vuzp1q_s8(even_lo, even_hi), vuzp1q_s8(odd_lo, odd_hi),
                        vuzp2q_s8(even_lo, even_hi), vuzp2q_s8(odd_lo, odd_hi)};
}

#endif /* TQKVK_BLOCK_CODES_NEON_H */
