/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inverse of a transform. Decoded values depend on it, so it is plain IEEE arithmetic in a
 * fixed order.
 */
#include <float.h>
#include <string.h>

#include "codec/layer_codec.h"

static double absolute(double v)
{
    return v < 0.0 ? -v : v;
}

static uint32_t pivot_row(const double *work, uint32_t dim, uint32_t col)
{
    uint32_t best = col;
    for (uint32_t r = col + 1; r < dim; r++) {
        if (absolute(work[(size_t)r * 2 * dim + col]) >
            absolute(work[(size_t)best * 2 * dim + col]))
            best = r;
    }
    return best;
}

/* Subtracts multiples of row col from every other row. Columns before col are done and stay. */
static void eliminate(double *work, uint32_t dim, uint32_t col)
{
    const size_t width = 2 * (size_t)dim;
    const double *from = work + col * width;
    for (uint32_t r = 0; r < dim; r++) {
        double *to = work + r * width;
        const double factor = to[col];
        if (r == col || factor == 0.0)
            continue;
        for (size_t i = col; i < width; i++)
            to[i] -= factor * from[i];
    }
}

bool tqkvi_invert(const float *m, uint32_t dim, float *inverse, double *work)
{
    const size_t width = 2 * (size_t)dim; /* a row of work: m's, then the identity's */

    for (uint32_t r = 0; r < dim; r++) {
        for (uint32_t i = 0; i < dim; i++) {
            work[r * width + i] = (double)m[(size_t)r * dim + i];
            work[r * width + dim + i] = i == r ? 1.0 : 0.0;
        }
    }
    for (uint32_t col = 0; col < dim; col++) {
        const uint32_t best = pivot_row(work, dim, col);
        double *row = work + col * width;
        const double pivot = work[best * width + col];
        if (!(absolute(pivot) >= DBL_MIN))
            return false;
        for (size_t i = col; i < width; i++) {
            const double v = work[best * width + i];
            work[best * width + i] = row[i];
            row[i] = v / pivot;
        }
        eliminate(work, dim, col);
    }
    for (uint32_t r = 0; r < dim; r++) {
        for (uint32_t i = 0; i < dim; i++) {
            const double v = work[r * width + dim + i];
            if (!(absolute(v) <= (double)FLT_MAX))
                return false;
            inverse[(size_t)r * dim + i] = (float)v;
        }
    }
    return true;
}
