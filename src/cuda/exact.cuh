/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Arithmetic that decides stored bytes, as docs/FORMAT.md sections 4 and 5 say: every product and sum
 * rounded by itself, in the order of the page. Nothing here may be left to the compiler to fuse.
 */
#ifndef TQKVC_EXACT_CUH
#define TQKVC_EXACT_CUH

#include <stdint.h>

static __device__ __forceinline__ float mul(float a, float b)
{
    return __fmul_rn(a, b);
}

static __device__ __forceinline__ float add(float a, float b)
{
    return __fadd_rn(a, b);
}

static __device__ __forceinline__ double mul(double a, double b)
{
    return __dmul_rn(a, b);
}

static __device__ __forceinline__ double add(double a, double b)
{
    return __dadd_rn(a, b);
}

/* Coefficients of the series, 1/n! with alternating signs, highest power first. */
static __device__ __forceinline__ double sine_rest(double q)
{
    double sum = -1.0 / 1307674368000.0;
    sum = add(mul(sum, q), 1.0 / 6227020800.0);
    sum = add(mul(sum, q), -1.0 / 39916800.0);
    sum = add(mul(sum, q), 1.0 / 362880.0);
    sum = add(mul(sum, q), -1.0 / 5040.0);
    sum = add(mul(sum, q), 1.0 / 120.0);
    return add(mul(sum, q), -1.0 / 6.0);
}

static __device__ __forceinline__ double cosine_rest(double q)
{
    double sum = 1.0 / 20922789888000.0;
    sum = add(mul(sum, q), -1.0 / 87178291200.0);
    sum = add(mul(sum, q), 1.0 / 479001600.0);
    sum = add(mul(sum, q), -1.0 / 3628800.0);
    sum = add(mul(sum, q), 1.0 / 40320.0);
    sum = add(mul(sum, q), -1.0 / 720.0);
    sum = add(mul(sum, q), 1.0 / 24.0);
    return add(mul(sum, q), -0.5);
}

/* Sine and cosine of base * inv_freq, in f32. */
static __device__ __forceinline__ void turn_exact(float inv_freq, int32_t base, float &sine,
                                                  float &cosine)
{
    const double angle = mul((double)base, (double)inv_freq);
    sine = 0.0f;
    cosine = 1.0f;
    if (!(angle >= -8589934592.0 && angle <= 8589934592.0))
        return;
    const long long n =
        __double2ll_rz(add(mul(angle, 0x1.45f306dc9c883p-1), angle >= 0.0 ? 0.5 : -0.5));
    const double turns = (double)n;
    double r = add(angle, -mul(turns, 0x1.921fap+0));
    r = add(r, -mul(turns, 0x1.54442p-20));
    r = add(r, -mul(turns, 0x1.a308cp-41));
    r = add(r, -mul(turns, 0x1.313198a2e037p-61));
    const double q = mul(r, r);
    const double s = add(r, mul(r, mul(q, sine_rest(q))));
    const double c = add(1.0, mul(q, cosine_rest(q)));
    const bool swapped = n & 1;
    const double first = swapped ? c : s, second = swapped ? s : c;
    sine = (float)(n & 2 ? -first : first);
    cosine = (float)((n + 1) & 2 ? -second : second);
}

#endif /* TQKVC_EXACT_CUH */
