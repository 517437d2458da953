/* SPDX-License-Identifier: Apache-2.0 */
/* How much a plan may lose on text that calibration has not read, and what follows if it loses more. */
#ifndef TQKV_GATE_LIMIT_H
#define TQKV_GATE_LIMIT_H

/* The most mean KL, above what the host itself makes, for a plan of so many bits per value, > 0. */
double gate_limit(double bits);

/*
 * Bits per value to try after a plan of `bits` was measured. asked: what the user asked for, of
 * which at most 40 % more are given. excess: measured KL / limit, > 1. 0: nothing is left to try.
 */
double gate_next_bits(double asked, double bits, double excess);

#endif /* TQKV_GATE_LIMIT_H */
