/* SPDX-License-Identifier: Apache-2.0 */
#include "spread.h"

#include <stdlib.h>

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(const double *sorted, size_t n, double share)
{
    const double at = share * (double)(n - 1);
    const size_t i = (size_t)at, next = i + 1 < n ? i + 1 : i;
    return sorted[i] + (at - (double)i) * (sorted[next] - sorted[i]);
}

spread spread_of(double *values, size_t n)
{
    qsort(values, n, sizeof(*values), compare_doubles);
    return (spread){.median = quantile(values, n, 0.5),
                    .low = quantile(values, n, 0.25),
                    .high = quantile(values, n, 0.75)};
}
