/* SPDX-License-Identifier: Apache-2.0 */
/* The middle of repeated measurements, and how far they lie apart. */
#ifndef TQKV_SPREAD_H
#define TQKV_SPREAD_H

#include <stddef.h>

/* Median, lower and upper quartile; between two values in proportion, as NumPy's quantile. */
typedef struct spread {
    double median, low, high;
} spread;

/* n >= 1; values is sorted. */
spread spread_of(double *values, size_t n);

#endif /* TQKV_SPREAD_H */
