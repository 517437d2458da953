/* SPDX-License-Identifier: Apache-2.0 */
/* Little-endian numbers in byte arrays, at any alignment and on any machine. */
#ifndef TQKVI_BYTES_H
#define TQKVI_BYTES_H

#include <stdint.h>
#include <string.h>

static inline uint16_t tqkvi_load_u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t tqkvi_load_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t tqkvi_load_u64(const uint8_t *p)
{
    return (uint64_t)tqkvi_load_u32(p) | (uint64_t)tqkvi_load_u32(p + 4) << 32;
}

static inline void tqkvi_store_u16(uint8_t *p, uint16_t value)
{
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
}

static inline void tqkvi_store_u32(uint8_t *p, uint32_t value)
{
    tqkvi_store_u16(p, (uint16_t)value);
    tqkvi_store_u16(p + 2, (uint16_t)(value >> 16));
}

static inline void tqkvi_store_u64(uint8_t *p, uint64_t value)
{
    tqkvi_store_u32(p, (uint32_t)value);
    tqkvi_store_u32(p + 4, (uint32_t)(value >> 32));
}

static inline float tqkvi_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* 2^e, -126 <= e <= 127. */
static inline float tqkvi_power_of_two(int e)
{
    return tqkvi_float_of_bits((uint32_t)(e + 127) << 23);
}

static inline uint32_t tqkvi_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

#endif /* TQKVI_BYTES_H */
