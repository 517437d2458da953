/* SPDX-License-Identifier: Apache-2.0 */
/* Sine and cosine with the same bits on every machine: they decide stored bytes. */
#ifndef TQKVI_SINE_H
#define TQKVI_SINE_H

#define TQKVI_ANGLE_MAX 8589934592.0 /* 2^33: position 2^31 times 4 radians */

/*
 * |angle| <= TQKVI_ANGLE_MAX, |error| < 1e-13 for the angle as given. Any other angle (too large,
 * NaN) gives sin 0 and cos 1.
 */
void tqkvi_sincos(double angle, double *sin_out, double *cos_out);

#endif /* TQKVI_SINE_H */
