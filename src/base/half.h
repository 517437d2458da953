/* SPDX-License-Identifier: Apache-2.0 */
/* IEEE binary16 <-> binary32, one value at a time, in integer arithmetic. */
#ifndef TQKVI_HALF_H
#define TQKVI_HALF_H

#include <stdint.h>

/* Exact. A NaN keeps its payload. */
float tqkvi_half_to_float(uint16_t half);

/* Nearest, ties to even; beyond 65520 infinity. A NaN stays a (quiet) NaN. */
uint16_t tqkvi_float_to_half(float value);

#endif /* TQKVI_HALF_H */
