/* SPDX-License-Identifier: Apache-2.0 */
/*
 * IEEE binary16 <-> binary32.
 *
 *     f16  s eeeee mmmmmmmmmm                bias 15
 *     f32  s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm  bias 127
 *
 * Integer arithmetic only: the result cannot depend on the rounding mode or on flush-to-zero.
 */
#include "base/half.h"

#include <string.h>

float tqkvi_half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;
    uint32_t bits;

    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else if (mantissa == 0) {
        bits = sign;
    } else {
        exponent = 113; /* subnormal: shift until the hidden bit appears */
        while (!(mantissa & 0x400u)) {
            mantissa <<= 1;
            exponent--;
        }
        bits = sign | exponent << 23 | (mantissa & 0x3ffu) << 13;
    }
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* mantissa >> shift, nearest even; 0 < shift < 32. */
static uint32_t shift_nearest_even(uint32_t mantissa, uint32_t shift)
{
    const uint32_t kept = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1);
    const uint32_t tie = 1u << (shift - 1);
    return kept + (rest > tie || (rest == tie && (kept & 1u)));
}

uint16_t tqkvi_float_to_half(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t exponent = (bits >> 23) & 0xffu;
    const uint32_t mantissa = bits & 0x7fffffu;
    uint32_t half;

    if (exponent == 0xff) {
        half = mantissa ? 0x7e00u | mantissa >> 13 : 0x7c00u;
    } else if (exponent >= 143) {
        half = 0x7c00u;
    } else if (exponent >= 113) {
        /* A carry out of the mantissa moves into the exponent, and from there to infinity. */
        half = (exponent - 112) << 10;
        half += shift_nearest_even(mantissa, 13);
    } else if (exponent >= 102) {
        half = shift_nearest_even(mantissa | 0x800000u, 126 - exponent);
    } else {
        half = 0;
    }
    return (uint16_t)(sign | half);
}
