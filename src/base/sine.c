/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sine and cosine by additions and multiplications of doubles in a fixed order.
 *
 * angle = n * pi/2 + r with |r| <= pi/4 and n below 2^33. pi/2 is split into three parts of 20
 * bits or fewer, so that n * part is exact, and a rest below 2^-60.
 */
#include "base/sine.h"

#include <assert.h>
#include <float.h>
#include <stdint.h>

#ifdef FLT_EVAL_METHOD
static_assert(FLT_EVAL_METHOD == 0,
              "intermediate results must be doubles; use -msse2 -mfpmath=sse");
#endif

/* floor of pi/2 to 19, 39 and 59 bits behind the point, and what is left. */
#define PIO2_1 0x1.921fap+0
#define PIO2_2 0x1.54442p-20
#define PIO2_3 0x1.a308cp-41
#define PIO2_4 0x1.313198a2e037p-61
#define TWO_OVER_PI 0x1.45f306dc9c883p-1

/* Taylor series; the first term left out is below 5e-17 at pi/4. */
static double sin_small(double r)
{
    const double r2 = r * r;
    double sum = -1.0 / 1307674368000.0;
    sum = sum * r2 + 1.0 / 6227020800.0;
    sum = sum * r2 - 1.0 / 39916800.0;
    sum = sum * r2 + 1.0 / 362880.0;
    sum = sum * r2 - 1.0 / 5040.0;
    sum = sum * r2 + 1.0 / 120.0;
    sum = sum * r2 - 1.0 / 6.0;
    return r + r * (r2 * sum);
}

static double cos_small(double r)
{
    const double r2 = r * r;
    double sum = 1.0 / 20922789888000.0;
    sum = sum * r2 - 1.0 / 87178291200.0;
    sum = sum * r2 + 1.0 / 479001600.0;
    sum = sum * r2 - 1.0 / 3628800.0;
    sum = sum * r2 + 1.0 / 40320.0;
    sum = sum * r2 - 1.0 / 720.0;
    sum = sum * r2 + 1.0 / 24.0;
    sum = sum * r2 - 0.5;
    return 1.0 + r2 * sum;
}

void tqkvi_sincos(double angle, double *sin_out, double *cos_out)
{
    if (!(angle >= -TQKVI_ANGLE_MAX && angle <= TQKVI_ANGLE_MAX)) {
        *sin_out = 0.0;
        *cos_out = 1.0;
        return;
    }
    const int64_t n = (int64_t)(angle * TWO_OVER_PI + (angle >= 0.0 ? 0.5 : -0.5));
    const double turns = (double)n;
    double r = angle - turns * PIO2_1;
    r = r - turns * PIO2_2;
    r = r - turns * PIO2_3;
    r = r - turns * PIO2_4;

    const double s = sin_small(r);
    const double c = cos_small(r);
    switch ((uint64_t)n & 3u) {
    case 0:
        *sin_out = s;
        *cos_out = c;
        break;
    case 1:
        *sin_out = c;
        *cos_out = -s;
        break;
    case 2:
        *sin_out = -s;
        *cos_out = -c;
        break;
    default:
        *sin_out = -c;
        *cos_out = s;
        break;
    }
}
