/* SPDX-License-Identifier: Apache-2.0 */
/* Bits to bands: the cheapest error first, until the budget is spent. */
#ifndef TQKVI_ALLOCATE_H
#define TQKVI_ALLOCATE_H

#include <stddef.h>
#include <stdint.h>

/* A group of channels that share one width. */
typedef struct tqkvi_band {
    double loss;  /* cost of the band is loss * D(bits) */
    double price; /* bytes for one more bit of every channel, over all tokens that pay it */
    uint8_t bits; /* chosen width */
} tqkvi_band;

/*
 * Widens bands, always the one with the largest fall of loss per byte, while the next step fits the budget
 * (bytes). Bands start at their `bits`. Ties go to the band of smaller index. Returns the bytes
 * spent above the start.
 */
double tqkvi_allocate(tqkvi_band *bands, size_t n_bands, uint8_t bits_max, double budget);

#endif /* TQKVI_ALLOCATE_H */
