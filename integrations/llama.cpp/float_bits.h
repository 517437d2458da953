/* SPDX-License-Identifier: Apache-2.0 */
/* f16 and bf16 as bits, to and from f32; rounding to nearest, ties to even. */
#ifndef TQKV_FLOAT_BITS_H
#define TQKV_FLOAT_BITS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t tqkvp_bits_of(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline float tqkvp_float_of(uint32_t bits)
{
    float x;

    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline bool tqkvp_f16_is_nan(uint16_t h)
{
    return (h & 0x7c00u) == 0x7c00u && (h & 0x3ffu) != 0;
}

static inline float tqkvp_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu;
    const uint32_t fraction = h & 0x3ffu;

    if (exponent == 0) { /* zero and subnormals: fraction * 2^-24 */
        const float x = (float)fraction * 0x1p-24f;
        return sign ? -x : x;
    }
    if (exponent == 31)
        return tqkvp_float_of(sign | 0x7f800000u | (fraction << 13));
    return tqkvp_float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

static inline uint16_t tqkvp_f32_to_f16(float x)
{
    const uint32_t bits = tqkvp_bits_of(x);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;

    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) /* rounds past 65504 */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: adding 1/2 leaves the fraction in the low bits */
        const float shifted = tqkvp_float_of(magnitude) + 0.5f;
        return (uint16_t)(sign | (tqkvp_bits_of(shifted) - 0x3f000000u));
    }
    const uint32_t even = (magnitude >> 13) & 1u;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + even) >> 13));
}

static inline float tqkvp_bf16_to_f32(uint16_t h)
{
    return tqkvp_float_of((uint32_t)h << 16);
}

static inline uint16_t tqkvp_f32_to_bf16(float x)
{
    const uint32_t bits = tqkvp_bits_of(x);

    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#endif /* TQKV_FLOAT_BITS_H */
