/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loops run over whole blocks of constant length, so that compilers vectorise them without being
 * allowed to reorder sums.
 */
#include "logit_math.h"

#include <math.h>
#include <string.h>

#define BLOCK 64
#define LANES 8
#define LEAST_EXPONENT -87.0f /* e^x of smaller x is not normal in f32; taken as this, 2e-38 */

/* e^x for x in [LEAST_EXPONENT, 0]. */
static inline float exp_negative(float x)
{
    const float shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    const float shifted = x * 1.44269504f + shifter;
    const float n = shifted - shifter;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    /* Polynomial of the Cephes library's expf on [-ln2/2, ln2/2]. */
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t power;
    memcpy(&power, &shifted, sizeof(power));
    power = (int32_t)((uint32_t)power << 23) +
            0x3f800000; /* only the low bits of n survive the shift */
    float scale;
    memcpy(&scale, &power, sizeof(scale));
    return y * scale;
}

static float largest_of(const float *x, size_t n)
{
    float lanes[LANES];
    size_t i = 0;
    for (size_t j = 0; j < LANES; j++)
        lanes[j] = -INFINITY;
    for (; i + LANES <= n; i += LANES) {
        for (size_t j = 0; j < LANES; j++)
            lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    }
    float largest = -INFINITY;
    for (; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (size_t j = 0; j < LANES; j++)
        largest = lanes[j] > largest ? lanes[j] : largest;
    return largest;
}

static double block_sum(const float x[BLOCK])
{
    double sums[4] = {0};
    for (size_t i = 0; i < BLOCK; i += 4) {
        for (size_t j = 0; j < 4; j++)
            sums[j] += (double)x[i + j];
    }
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

static void block_exp(float out[BLOCK], const float x[BLOCK], float largest)
{
    for (size_t i = 0; i < BLOCK; i++) {
        const float below = x[i] - largest;
        out[i] = exp_negative(below > LEAST_EXPONENT ? below : LEAST_EXPONENT);
    }
}

/* The block at x, or a copy of the last, shorter one, filled up with logits that weigh nothing. */
static const float *whole_block(const float *x, size_t n_left, float largest, float copy[BLOCK])
{
    if (n_left >= BLOCK)
        return x;
    for (size_t i = 0; i < BLOCK; i++)
        copy[i] = i < n_left ? x[i] : largest + 2 * LEAST_EXPONENT;
    return copy;
}

static double log_sum_of(const float *x, size_t n, float largest)
{
    float copy[BLOCK], e[BLOCK];
    double sum = 0;
    for (size_t i = 0; i < n; i += BLOCK) {
        block_exp(e, whole_block(x + i, n - i, largest, copy), largest);
        sum += block_sum(e);
    }
    return (double)largest + log(sum);
}

void logit_base_init(logit_base *out, const float *base, size_t n)
{
    out->largest = largest_of(base, n);
    out->log_sum = log_sum_of(base, n, out->largest);
    out->best = 0;
    while (out->best + 1 < n && base[out->best] != out->largest)
        out->best++;
}

void logit_compare(logit_diff *out, const logit_base *stats, const float *base, const float *test,
                   size_t n)
{
    float base_copy[BLOCK], test_copy[BLOCK], e[BLOCK], e_test[BLOCK], weighted[BLOCK];
    const float largest_test = largest_of(test, n);
    double sum_test = 0, sum_base = 0, sum_weighted = 0;
    for (size_t i = 0; i < n; i += BLOCK) {
        const float *b = whole_block(base + i, n - i, stats->largest, base_copy);
        const float *t = whole_block(test + i, n - i, largest_test, test_copy);
        block_exp(e, b, stats->largest);
        block_exp(e_test, t, largest_test);
        for (size_t j = 0; j < BLOCK; j++)
            weighted[j] = b[j] - stats->largest > LEAST_EXPONENT ? e[j] * (b[j] - t[j]) : 0.0f;
        sum_base += block_sum(e);
        sum_test += block_sum(e_test);
        sum_weighted += block_sum(weighted);
    }
    out->log_sum_test = (double)largest_test + log(sum_test);
    out->kl = sum_weighted / sum_base - (stats->log_sum - out->log_sum_test);
    out->has_same_best = !(test[stats->best] < largest_test);
}
