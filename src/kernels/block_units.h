/* SPDX-License-Identifier: Apache-2.0 */
/* What attention over the codes of blocks goes over, unit by unit, with every instruction set. */
#ifndef TQKVK_BLOCK_UNITS_H
#define TQKVK_BLOCK_UNITS_H

#include "kernels/kernels.h"

/* Scores of a tile, at one unit. */
typedef struct tqkvk_score {
    const uint8_t *const *codes;
    size_t at; /* of the unit in the codes of every block */
    size_t n_blocks;
    const tqkvk_query_unit *q; /* of the first query */
    size_t n_q, n_units;
    float *s;
    size_t s_stride;
} tqkvk_score;

/* Weighted sums of a unit without codes: it only takes the factors. o: at the unit's channels. */
static inline void tqkvk_weigh_no_unit(size_t n_q, size_t dim, const float *f, float *o)
{
    for (size_t a = 0; a < n_q; a++)
        for (size_t d = 0; d < TQKV_UNIT_CHANNELS; d++)
            o[a * dim + d] *= f[a];
}

#endif /* TQKVK_BLOCK_UNITS_H */
