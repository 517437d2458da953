/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Weighted sums of blocks, but for the sums themselves. Unit by unit: the sums of its 16 channels
 * stay in a small array, [queries][16] integers, while the blocks of the tile go by; each block is
 * unpacked once for all queries. Then the sums join the output, converted once.
 */
#ifndef TQKVK_WEIGH_BLOCKS_NEON_H
#define TQKVK_WEIGH_BLOCKS_NEON_H

#include "kernels/arm/block_codes_neon.h"
#include "kernels/block_units.h"

#define TQKVK_WEIGH_QUERIES 16 /* at most so many go over the blocks together */

typedef struct tqkvk_weigh {
    const uint8_t *const *codes;
    size_t at; /* of the unit in the codes of every block */
    size_t n_blocks;
    const uint16_t *w; /* of the first block, w_stride from query to query */
    size_t w_stride, n_q, dim;
    const float *f, *g;
    float *o; /* of the first query, at the unit's channels */
} tqkvk_weigh;

/*
 * Adds a block to the sums of all queries. w: its 16 weights of the first query, in any form of
 * that size. sums: [n_q][4]. A constant wherever it is passed.
 */
typedef void tqkvk_weigh_block_fn(const tqkvk_unit *unit, const uint16_t *w, size_t w_stride,
                                  size_t n_q, int32x4_t *sums);

TQKVK_INLINE void tqkvk_weigh_store(float *o, float f, float g, int32x4_t sum)
{
    vst1q_f32(o, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(o), f), vcvtq_f32_s32(sum), g));
}

TQKVK_INLINE void tqkvk_weigh_unit(int bits, tqkvk_weigh_block_fn *block, const tqkvk_weigh *c)
{
    const tqkvk_levels_of of = tqkvk_levels_load(bits);
    const float step = tqkvk_widths[bits].step;
    int32x4_t sums[4 * TQKVK_WEIGH_QUERIES];

    for (size_t i = 0; i < 4 * c->n_q; i++)
        sums[i] = vdupq_n_s32(0);
    for (size_t p = 0; p < c->n_blocks; p++) {
        const tqkvk_unit unit = tqkvk_levels_unit(TQKV_SIDE_V, bits, c->codes[p] + c->at, &of);
        block(&unit, c->w + p * TQKVI_BLOCK_TOKENS, c->w_stride, c->n_q, sums);
    }
    float *o = c->o;
    for (size_t a = 0; a < c->n_q; a++, o += c->dim) {
        const float f = c->f[a], g = c->g[a] * step;
        tqkvk_weigh_store(o, f, g, sums[4 * a]);
        tqkvk_weigh_store(o + 4, f, g, sums[4 * a + 1]);
        tqkvk_weigh_store(o + 8, f, g, sums[4 * a + 2]);
        tqkvk_weigh_store(o + 12, f, g, sums[4 * a + 3]);
    }
}

/* c: of unit 0 and of up to TQKVK_WEIGH_QUERIES queries. */
TQKVK_INLINE void tqkvk_weigh_units(tqkvk_weigh_block_fn *block, const tqkvi_layout *layout,
                                    tqkvk_weigh c)
{
    for (uint32_t u = 0; u < layout->n_units; u++, c.o += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        TQKVK_BY_WIDTH(bits, tqkvk_weigh_no_unit(c.n_q, c.dim, c.f, c.o), tqkvk_weigh_unit, block,
                       &c);
        c.at += (size_t)2 * bits * TQKVI_BLOCK_TOKENS;
    }
}

#endif /* TQKVK_WEIGH_BLOCKS_NEON_H */
