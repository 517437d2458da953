/* SPDX-License-Identifier: Apache-2.0 */
#include "gate_limit.h"

#include <math.h>
#include <stddef.h>

/* Two to ten times what plans of SmolLM2, Qwen2.5 and Gemma 3 lose at 8192 tokens. */
static const struct {
    double bits, kl;
} limits[] = {{2.0, 0.12}, {3.2, 0.03}, {4.5, 0.015}};
enum { N_LIMITS = sizeof(limits) / sizeof(limits[0]) };
#define LIMIT_LEAST 0.002 /* less cannot be told apart on a thousand tokens */

#define BITS_STEP 1.05
#define BITS_MOST 1.4
#define BITS_MAX 16.0
/* A bit per value halves the KL six times at most: steps that cannot do are not measured. */
#define HALVINGS_PER_BIT 6.0

double gate_limit(double bits)
{
    size_t i = 0;
    while (i + 2 < N_LIMITS && bits > limits[i + 1].bits)
        i++;
    const double slope =
        log(limits[i + 1].kl / limits[i].kl) / (limits[i + 1].bits - limits[i].bits);
    const double kl = limits[i].kl * exp(slope * (bits - limits[i].bits));
    return kl > LIMIT_LEAST ? kl : LIMIT_LEAST;
}

double gate_next_bits(double asked, double bits, double excess)
{
    const double most = fmin(asked * BITS_MOST, BITS_MAX);
    const double needed = bits + log2(excess) / HALVINGS_PER_BIT;
    if (bits >= most)
        return 0;
    double next = bits * BITS_STEP;
    while (next < needed && next < most)
        next *= BITS_STEP;
    return fmin(next, most);
}
