/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block to rows of f32. A unit comes as four quads of four registers. In K register j of every
 * quad has tokens 4j..4j+3, in lanes to be gathered; in V a quad has four tokens, byte by byte.
 */
#include <string.h>

#include "kernels/arm/block_codes_neon.h"
#include "kernels/tables.h"

static inline void store_four(tqkvk_quad tokens, float step, float *out, size_t dim)
{
    tqkvk_store_unit(tokens.v0, step, out);
    tqkvk_store_unit(tokens.v1, step, out + dim);
    tqkvk_store_unit(tokens.v2, step, out + 2 * dim);
    tqkvk_store_unit(tokens.v3, step, out + 3 * dim);
}

/* The same register of four quads of K, transposed: register vt has the 16 channels of token t. */
static inline tqkvk_quad k_tokens(int8x16_t q0, int8x16_t q1, int8x16_t q2, int8x16_t q3)
{
    const int32x4_t a = vreinterpretq_s32_s8(q0), b = vreinterpretq_s32_s8(q1);
    const int32x4_t c = vreinterpretq_s32_s8(q2), d = vreinterpretq_s32_s8(q3);
    const int64x2_t even_lo = vreinterpretq_s64_s32(vtrn1q_s32(a, b));
    const int64x2_t even_hi = vreinterpretq_s64_s32(vtrn1q_s32(c, d));
    const int64x2_t odd_lo = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t odd_hi = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    return (tqkvk_quad){vreinterpretq_s8_s64(vtrn1q_s64(even_lo, even_hi)),
                        vreinterpretq_s8_s64(vtrn1q_s64(odd_lo, odd_hi)),
                        vreinterpretq_s8_s64(vtrn2q_s64(even_lo, even_hi)),
                        vreinterpretq_s8_s64(vtrn2q_s64(odd_lo, odd_hi))};
}

static inline void store_k(tqkvk_unit u, float step, float *out, size_t dim)
{
    store_four(k_tokens(u.q0.v0, u.q1.v0, u.q2.v0, u.q3.v0), step, out, dim);
    store_four(k_tokens(u.q0.v1, u.q1.v1, u.q2.v1, u.q3.v1), step, out + 4 * dim, dim);
    store_four(k_tokens(u.q0.v2, u.q1.v2, u.q2.v2, u.q3.v2), step, out + 8 * dim, dim);
    store_four(k_tokens(u.q0.v3, u.q1.v3, u.q2.v3, u.q3.v3), step, out + 12 * dim, dim);
}

static inline void store_v(tqkvk_unit u, float step, float *out, size_t dim)
{
    store_four(tqkvk_v_tokens(u.q0), step, out, dim);
    store_four(tqkvk_v_tokens(u.q1), step, out + 4 * dim, dim);
    store_four(tqkvk_v_tokens(u.q2), step, out + 8 * dim, dim);
    store_four(tqkvk_v_tokens(u.q3), step, out + 12 * dim, dim);
}

TQKVK_INLINE void unpack_unit(int bits, tqkv_side side, const uint8_t *codes, float *out,
                              size_t dim)
{
    const float step = tqkvk_widths[bits].step;
    const tqkvk_levels_of of = tqkvk_levels_load(bits);
    const tqkvk_unit unit = tqkvk_levels_unit(side, bits, codes, &of);
    if (side == TQKV_SIDE_K)
        store_k(unit, step, out, dim);
    else
        store_v(unit, step, out, dim);
}

static void zero_unit(float *out, size_t dim)
{
    for (size_t t = 0; t < TQKVI_BLOCK_TOKENS; t++)
        memset(out + t * dim, 0, TQKV_UNIT_CHANNELS * sizeof(*out));
}

TQKVK_INLINE void unpack_side(tqkv_side side, const tqkvi_layout *layout, const uint8_t *codes,
                              float *out)
{
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;

    for (uint32_t u = 0; u < layout->n_units; u++, out += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, zero_unit(out, dim), unpack_unit, side, codes, out, dim);
        codes += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

void tqkvk_unpack_block_f32_neon(const tqkvi_layout *layout, tqkv_side side, const uint8_t *codes,
                                 float *out)
{
    if (side == TQKV_SIDE_K)
        unpack_side(TQKV_SIDE_K, layout, codes, out);
    else
        unpack_side(TQKV_SIDE_V, layout, codes, out);
}
