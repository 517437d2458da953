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

#include "format/bytes.h"
#include "format/row_layout.h"

#define TQKVK_Y_MAX 4096.0f
#define TQKVK_SIZE_MIN 0x1p-7f /* what a row is measured by at least: the smallest scale */
#define TQKVK_CANDIDATES_MAX 16
#define TQKVK_ONLY_8 (1u << 8) /* as tqkvk_row_range.widths */

/* What is known of a row before any candidate is tried. */
typedef struct tqkvk_row_range {
    int energy, peak;
    int exponent;    /* whole sizes are sizes times 2 ^ exponent */
    int n_coded;     /* channels */
    uint32_t widths; /* bit b: some unit has width b, b > 0 */
} tqkvk_row_range;

static inline int tqkvk_clamp_scale(int i)
{
    return i < 1 ? 1 : i > 255 ? 255 : i;
}

static inline int tqkvk_exponent_of(float v)
{
    return (int)(tqkvi_bits_of_float(v) >> 23) - 127;
}

/* largest: TQKVK_SIZE_MIN .. TQKVK_Y_MAX; it becomes 2^12 .. 2^13. */
static inline int tqkvk_size_exponent(float largest)
{
    return 12 - tqkvk_exponent_of(largest);
}

/*
 * Candidates, in no order and some twice, so that their number does not depend on the row. Rows of
 * 8 bits only: peak - 2 and the five that follow; others: energy - 4 and the twelve that follow,
 * then peak - 1 and the two that follow.
 */
#define TQKVK_CANDIDATES_8 6
#define TQKVK_CANDIDATES_ENERGY 13

#define TQKVK_NO_OCTAVES (-255) /* tqkvk_level_octaves[0] */

/* Levels of a row at a scale, as far as they say whether it would be found there again. */
typedef struct tqkvk_row_again {
    int energy; /* index of the mean square of step times level, less that of 1 */
    int peak;   /* of the largest level, less that of 127 */
} tqkvk_row_again;

static inline bool tqkvk_is_stable(const tqkvk_row_range *range, tqkvk_row_again again, int scale)
{
    const int peak = tqkvk_clamp_scale(scale + again.peak);
    if (range->widths == TQKVK_ONLY_8)
        return peak - 1 <= scale && scale <= peak + 2;
    const int energy = tqkvk_clamp_scale(scale + again.energy);
    return (energy - 3 <= scale && scale <= energy + 7) || scale == peak;
}

/*
 * Order of the candidates: those that the row may have been decoded from, then by error, then by
 * scale.
 */
typedef struct tqkvk_contest {
    uint64_t key[TQKVK_CANDIDATES_MAX];
    size_t n;
} tqkvk_contest;

/* error: at least 0. */
static inline void tqkvk_contest_put(tqkvk_contest *contest, size_t i, bool near_row, float error,
                                     uint8_t scale)
{
    contest->key[i] = (uint64_t)!near_row << 48 | (uint64_t)tqkvi_bits_of_float(error) << 16 |
                      (uint64_t)scale << 8 | i;
}

/* The best one that was not taken yet. */
static inline size_t tqkvk_contest_take(tqkvk_contest *contest)
{
    uint64_t least = UINT64_MAX;
    for (size_t i = 0; i < contest->n; i++)
        least = contest->key[i] < least ? contest->key[i] : least;
    const size_t i = (size_t)(least & 0xff);
    contest->key[i] = UINT64_MAX;
    return i;
}

/*
 * The error of a coded row in f32. weight: [n_units], y and magnitude (indices of levels): of each
 * channel.
 */
float tqkvk_exact_error(const tqkvi_layout *layout, const float *weight, const float *y, int scale,
                        const uint8_t *magnitude);

/*
 * Whether a coded row may exist at the scale that its peak asks for, whole octaves below. A row of
 * zeros does.
 */
static inline bool tqkvk_may_go_lower(tqkvk_row_again again, int scale)
{
    const int peak = tqkvk_clamp_scale(scale + again.peak);
    return scale > peak && ((scale - peak) % 16 == 0 || again.peak == TQKVK_NO_OCTAVES);
}

/*
 * Then, where every level exists there, scale and magnitudes become those of that form, which the
 * format keeps. Returns the scale.
 */
int tqkvk_use_lower_scale(const tqkvi_layout *layout, tqkvk_row_again again, int scale,
                          uint8_t *magnitude);

#endif /* TQKVK_SCALE_SEARCH_H */
