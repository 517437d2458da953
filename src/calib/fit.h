/* SPDX-License-Identifier: Apache-2.0 */
/* From the statistics of one KV head and side to its mean, transform and unit weights. */
#ifndef TQKVI_FIT_H
#define TQKVI_FIT_H

#include "calib/observe.h"
#include "format/plan_data.h"

/* Channels that one Hadamard transform mixes: small bands follow the spectrum, large ones tame heavy tails. */
uint32_t tqkvi_fit_band(uint32_t dim);

/*
 * Fills head->mean, head->transform and head->weight, and distortion: [dim / 16] weighted squared
 * error of a unit per unit of coding error (a unit coded at b bits costs distortion * 16 * D(b)).
 * Errors: TQKV_ERR_INVALID_ARG (no tokens, or values without spread that is finite), TQKV_ERR_NO_MEMORY.
 */
TQKV_NODISCARD tqkv_status tqkvi_fit_head(const tqkvi_moments *m, const tqkv_allocator *mem, uint32_t dim, float gamma,
                                          tqkvi_head_plan *head, double *distortion);

#endif /* TQKVI_FIT_H */
