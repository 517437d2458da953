/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Greedy allocation. D(b) of the fixed codes is convex over the widths that exist, so for equal
 * prices the greedy order is optimal but for the last step.
 */
#include "calib/allocate.h"

#include <stdbool.h>

#include "kernels/kernels.h"

/* The next width after b; 7 does not exist. */
static uint8_t wider(uint8_t bits)
{
    return bits == 6 ? 8 : (uint8_t)(bits + 1);
}

double tqkvi_allocate(tqkvi_band *bands, size_t n_bands, uint8_t bits_max, double budget)
{
    double spent = 0.0;

    for (;;) {
        size_t best = n_bands;
        double best_gain = 0.0;

        for (size_t i = 0; i < n_bands; i++) {
            const tqkvi_band *band = &bands[i];
            const uint8_t next = wider(band->bits);
            double gain, bytes;

            if (next > bits_max)
                continue;
            bytes = band->price * (double)(next - band->bits);
            gain = band->loss * (tqkvk_distortion(band->bits) - tqkvk_distortion(next)) / bytes;
            if (gain > best_gain && spent + bytes <= budget) {
                best = i;
                best_gain = gain;
            }
        }
        if (best == n_bands)
            return spent;
        spent += bands[best].price * (double)(wider(bands[best].bits) - bands[best].bits);
        bands[best].bits = wider(bands[best].bits);
    }
}
