/* SPDX-License-Identifier: Apache-2.0 */
/* What rounding queries to bytes (attn/attn_codes.h) may do to scores, for the bounds of tests. */
#ifndef TEST_ROUNDING_H
#define TEST_ROUNDING_H

#include "codec/layer_codec.h"

/*
 * The largest |q'| of each unit of a query of KV head g under a base, and the most that a q' of the
 * unit moves by rounding the matrix to f16: [k_dim / 16] out each. q: [k_dim].
 * turns: whether K has bases.
 */
void test_largest_query(const tqkv_codec *codec, uint32_t g, bool turns, int32_t base,
                        const float *q, double *top, double *moved);

/* The most that the product of such a query with a row of K moves. codes: a row. scale: its byte. */
double test_rounding_slack(const tqkv_codec *codec, uint32_t g, uint32_t tier, uint8_t scale,
                           const uint8_t *codes, const double *top, const double *moved);

#endif /* TEST_ROUNDING_H */
