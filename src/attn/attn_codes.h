/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tile of coded blocks without unpacking them: queries and weights are rounded, products with
 * levels are integers (kernels.h).
 *
 * One byte of q', and one of a weight, is enough where codes are coarser than it is. Where a layout
 * has more than 5 bits in the mean (of V more than 4), as in the youngest tiers, a second byte
 * follows and leaves 1/126 of the error.
 *
 *     scores   a channel of q' moves by at most g / 2, with g = the largest of its unit / 63. For
 *              normal values that is an error of about 1 % of q' (8e-5 in variance), beside codes
 *              that move K by 19 % at 3 bits, 10 % at 4, 5 % at 5. Before that, the matrix that
 *              makes q' is rounded to f16: each of its products moves by 1/2048 at most.
 *     output   a weight moves by at most 1/254 of the tile's largest, or 1/32766. In a tile with one
 *              large weight the 63 others then move the output by up to 1.8 % of a row of V, beside
 *              codes that move the one row by as much as K above; with equal weights it is an eighth
 *              of that share. Which tokens share a tile shows, though: tiles whose tokens lie in
 *              slots, which saving and restoring mixes, keep two bytes. The sum of p, for the
 *              denominator and the mean, is not rounded. The inverse of V is, to f16.
 */
#ifndef TQKVI_ATTN_CODES_H
#define TQKVI_ATTN_CODES_H

#include "attn/attn_tile.h"

/* Scores of the tile's K to work->s, without the scales of its rows. The base is set. */
void tqkvi_codes_score(tqkvi_attn_work *work);

/*
 * Rounds the probabilities of row r; the scales of V are loaded. Returns the sum of those whose row
 * of V is not zero.
 */
float tqkvi_codes_round_weights(tqkvi_attn_work *work, uint32_t r);

/* The tile's V, by the rounded weights of every row, to the sums of coded V. */
void tqkvi_codes_weigh(tqkvi_attn_work *work);

#endif /* TQKVI_ATTN_CODES_H */
