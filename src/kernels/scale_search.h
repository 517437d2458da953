/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The search for the scale of a row (docs/FORMAT.md, "Encoding a row"), as far as it is the same
 * for all vector units. ref has its own version, step by step.
 */
#ifndef TQKVK_SCALE_SEARCH_H
#define TQKVK_SCALE_SEARCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TQKVK_Y_MAX 4096.0f
#define TQKVK_CANDIDATES_MAX 16

typedef struct tqkvk_row_range {
    int energy, peak;
} tqkvk_row_range;

static inline int tqkvk_clamp_scale(int i)
{
    return i < 1 ? 1 : i > 255 ? 255 : i;
}

/*
 * Thresholds repeat from octave to octave, eight of energy (2 ^ (1/16), 2 ^ (3/16), ...) and
 * sixteen of peaks, and 128 of each lie below 1: count by exponent, then within the octave.
 */
static inline tqkvk_row_range tqkvk_range_of(int energy_exponent, int n_energy, int peak_exponent,
                                             int n_peak)
{
    return (tqkvk_row_range){.energy = tqkvk_clamp_scale(8 * energy_exponent + 128 + n_energy),
                             .peak = tqkvk_clamp_scale(16 * peak_exponent + 128 + n_peak)};
}

static inline bool tqkvk_is_stable(tqkvk_row_range again, int scale)
{
    return (again.energy - 3 <= scale && scale <= again.energy + 7) || scale == again.peak;
}

/* Ascending. */
static inline size_t tqkvk_list_candidates(tqkvk_row_range range, uint8_t out[TQKVK_CANDIDATES_MAX])
{
    size_t n = 0;
    const int peak_end = range.peak + 1, energy_end = range.energy + 8;
    int c = range.peak - 1;

    for (; c <= peak_end && c < range.energy - 4; c++) {
        if (c >= 1)
            out[n++] = (uint8_t)c;
    }
    for (c = range.energy - 4; c <= energy_end; c++) {
        if (c >= 1 && c <= 255)
            out[n++] = (uint8_t)c;
    }
    for (c = range.peak - 1; c <= peak_end; c++) {
        if (c > energy_end && c <= 255)
            out[n++] = (uint8_t)c;
    }
    return n;
}

/* Of the errors left the least one, the first of equals; it is taken out. */
static inline size_t tqkvk_take_least(const float *errors, bool *taken, size_t n)
{
    size_t best = n;
    for (size_t i = 0; i < n; i++) {
        if (!taken[i] && (best == n || errors[i] < errors[best]))
            best = i;
    }
    taken[best] = true;
    return best;
}

#endif /* TQKVK_SCALE_SEARCH_H */
