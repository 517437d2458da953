/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes in shared memory to operands of an integer tensor core product, one unit (16 channels) of a
 * block (16 tokens) at a time. docs/FORMAT.md section 3 has the bytes.
 *
 * A byte permutation is a table of eight levels: four codes as nibbles select four bytes. Bit 3 of a
 * nibble makes the byte's sign bit fill it, so that beside a table of negative levels a code of
 * another table reads -1, and beside one of positive levels 0. Widths 4, 5 and 6 have 1, 2 and 4
 * tables of either sign. Negative ones are merged by AND, positive ones by OR, and the product adds
 * what is left of both signs:
 *
 *     negative code   level - 1  +  0                 both add up to level - 1, and the product is
 *     positive code          -1  +  level             corrected by the sum of its other operand
 *
 * With lane = 4 g + t:
 *
 *     K   operand rows are tokens: register i has token 2g + i, its channels 2t, 2t + 8, 2t + 1, 2t + 9;
 *         the other sign is another 16 columns, that meet the same query
 *     V   operand rows are channels: a register has two tokens of channels g and g + 8 in turn, which
 *         meet probabilities with zeros in turn; the other sign is another 8 rows
 */
#ifndef TQKVC_LOOKUP_CUH
#define TQKVC_LOOKUP_CUH

#include "cuda/image.h"
#include "cuda/mma.cuh"

/* Four codes of one register: the low four bits as nibbles, bits 4 and 5 in bit 3 of the nibbles.
 * Only the lower 16 bits of each count. */
struct tqkvc_codes {
    uint32_t low, bit4, bit5;
};

/* Levels of the two registers of a lane; `positive` only in widths 4, 5 and 6. */
struct tqkvc_levels {
    uint32_t negative[2], positive[2];
};

static constexpr __host__ __device__ bool tqkvc_is_shifted(int bits)
{
    return bits >= 4 && bits <= 6;
}

template <int BITS> struct tqkvc_table {
    static constexpr int n_words = BITS <= 3 ? 2 : 1 << (BITS - 2); /* widths 0 and 8 read none */
    __align__(8) uint32_t words[BITS == 8 ? 2 : n_words];

    /* shared: [16] words of this width, 16-aligned. */
    __device__ __forceinline__ void load(const uint32_t *shared)
    {
        if constexpr (BITS != 0 && BITS != 8)
#pragma unroll
            for (int i = 0; i < n_words; i += 2)
                *reinterpret_cast<uint2 *>(words + i) =
                    *reinterpret_cast<const uint2 *>(shared + i);
    }

    __device__ __forceinline__ uint32_t part(int i, uint32_t selectors) const
    {
        return permute(words[2 * i], words[2 * i + 1], selectors);
    }

    __device__ __forceinline__ void find(const tqkvc_codes &c, uint32_t &negative,
                                         uint32_t &positive) const
    {
        const uint32_t other = c.low ^ 0x88888888u;
        if constexpr (BITS <= 3) {
            negative = part(0, c.low);
            positive = 0;
        } else if constexpr (BITS == 4) {
            negative = part(0, c.low);
            positive = part(1, other);
        } else if constexpr (BITS == 5) {
            const uint32_t above = c.bit4 ^ 0x88888888u;
            negative = part(0, c.low | c.bit4) & part(1, other | c.bit4);
            positive = part(2, c.low | above) | part(3, other | above);
        } else if constexpr (BITS == 6) {
            const uint32_t bit4 = c.bit4 | c.bit5, above = (c.bit4 ^ 0x88888888u) | c.bit5;
            const uint32_t sign = c.bit5 ^ 0x88888888u;
            const uint32_t p_bit4 = c.bit4 | sign, p_above = (c.bit4 ^ 0x88888888u) | sign;
            negative = part(0, c.low | bit4) & part(1, other | bit4) & part(2, c.low | above) &
                       part(3, other | above);
            positive = part(4, c.low | p_bit4) | part(5, other | p_bit4) |
                       part(6, c.low | p_above) | part(7, other | p_above);
        }
    }

    /* Eight codes: those of the lower halves to registers 0 and 1, of the upper ones to 2 and 3. */
    __device__ __forceinline__ void find2(const tqkvc_codes &c, uint32_t (&out)[4]) const
    {
        const tqkvc_codes upper = {c.low >> 16, c.bit4 >> 16, c.bit5 >> 16};
        find(c, out[0], out[1]);
        find(upper, out[2], out[3]);
    }
};

static __device__ __forceinline__ uint32_t rotate_right(uint32_t x, uint32_t n)
{
    return __funnelshift_r(x, x, n);
}

static __device__ __forceinline__ uint32_t load_u32(const uint8_t *p)
{
    return *reinterpret_cast<const uint32_t *>(p);
}

static __device__ __forceinline__ uint32_t load_u16(const uint8_t *p)
{
    return *reinterpret_cast<const uint16_t *>(p);
}

/* Four nibbles to four bytes. */
static __device__ __forceinline__ uint32_t spread_nibbles(uint32_t x)
{
    const uint32_t pairs = (x | x << 8) & 0x00ff00ffu;
    return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

/* Two tokens of a plane of 2 bits of K: codes in the nibbles of token 2g, then of token 2g + 1. */
static __device__ __forceinline__ uint32_t k_plane2(const uint8_t *plane, uint32_t g, uint32_t t)
{
    const uint2 w = *reinterpret_cast<const uint2 *>(plane + 8 * g);
    return permute(w.x, w.y, t & 1 ? 0x7632u : 0x5410u) >> (2 * (t >> 1)) & 0x33333333u;
}

static __device__ __forceinline__ uint32_t k_plane1(const uint8_t *plane, uint32_t g, uint32_t t,
                                                    uint32_t to_bit)
{
    return rotate_right(load_u32(plane + 4 * g), t - to_bit) & 0x11111111u << to_bit;
}

/* unit: in shared memory, 8-aligned. */
template <int BITS>
static __device__ __forceinline__ void k_levels(const uint8_t *unit, uint32_t g, uint32_t t,
                                                const tqkvc_table<BITS> &table, tqkvc_levels &out)
{
    tqkvc_codes c[2] = {};
    if constexpr (BITS <= 3) {
        uint32_t codes = BITS == 1 ? k_plane1(unit, g, t, 0) : k_plane2(unit, g, t);
        if constexpr (BITS == 3)
            codes |= k_plane1(unit + 64, g, t, 2);
        c[0].low = codes;
        c[1].low = codes >> 16;
    } else {
        const uint8_t *word = unit + 64 * (t >> 1) + 8 * g + 2 * (t & 1);
        c[0].low = load_u16(word);
        c[1].low = load_u16(word + 4);
        if constexpr (BITS == 5) {
            c[0].bit4 = k_plane1(unit + 128, g, t, 3);
            c[1].bit4 = c[0].bit4 >> 16;
        } else if constexpr (BITS == 6) {
            const uint32_t codes = k_plane2(unit + 128, g, t);
            c[0].bit4 = codes << 3 & 0x88888888u;
            c[1].bit4 = c[0].bit4 >> 16;
            c[0].bit5 = codes << 2 & 0x88888888u;
            c[1].bit5 = c[0].bit5 >> 16;
        } else if constexpr (BITS == 8) {
            for (int i = 0; i < 2; i++)
                out.negative[i] =
                    (spread_nibbles(c[i].low) | spread_nibbles(load_u16(word + 128 + 4 * i)) << 4) ^
                    0x80808080u;
        }
    }
    if constexpr (BITS != 8)
        for (int i = 0; i < 2; i++)
            table.find(c[i], out.negative[i], out.positive[i]);
}

static __device__ __forceinline__ uint32_t v_plane2(const uint8_t *plane, uint32_t g, uint32_t t)
{
    return load_u32(plane + 16 * t + 4 * (g & 3)) >> (2 * (g >> 2)) & 0x33333333u;
}

static __device__ __forceinline__ uint32_t v_plane1(const uint8_t *plane, uint32_t g, uint32_t t,
                                                    uint32_t to_bit)
{
    return rotate_right(load_u32(plane + 8 * t + 4 * (g & 1)), (g >> 1) - to_bit) & 0x11111111u
                                                                                        << to_bit;
}

/*
 * unit: in shared memory, 4-aligned. out: the four registers of an operand of 32 columns; a byte of
 * each channel of the lane in turn, tokens 4t, 4t + 1 in registers 0 and 1, the other two in 2 and 3.
 * Registers 1 and 3 have the other sign of tables of two signs, otherwise 0. Width 8 has registers 0
 * and 1 of an operand of 16 columns, channels g and g + 8, tokens 4t .. 4t + 3.
 */
template <int BITS>
static __device__ __forceinline__ void v_levels(const uint8_t *unit, uint32_t g, uint32_t t,
                                                const tqkvc_table<BITS> &table, uint32_t (&out)[4])
{
    if constexpr (BITS == 8) {
        const uint32_t low = load_u32(unit + 32 * t + 4 * g),
                       high = load_u32(unit + 128 + 32 * t + 4 * g);
        out[0] = ((low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u)) ^ 0x80808080u;
        out[1] = ((low >> 4 & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u)) ^ 0x80808080u;
        out[2] = out[3] = 0;
        return;
    }
    tqkvc_codes c = {};
    if constexpr (BITS == 1)
        c.low = v_plane1(unit, g, t, 0);
    else if constexpr (BITS <= 3)
        c.low = v_plane2(unit, g, t);
    else
        c.low = load_u32(unit + 32 * t + 4 * g);
    if constexpr (BITS == 3)
        c.low |= v_plane1(unit + 64, g, t, 2);
    if constexpr (BITS == 5)
        c.bit4 = v_plane1(unit + 128, g, t, 3);
    if constexpr (BITS == 6) {
        const uint32_t codes = v_plane2(unit + 128, g, t);
        c.bit4 = codes << 3 & 0x88888888u;
        c.bit5 = codes << 2 & 0x88888888u;
    }
    table.find2(c, out);
}

/* A width as a type. */
template <int BITS> struct tqkvc_bits {
    static constexpr int value = BITS;
};

/* body(tqkvc_bits) for a width known at run time, the same in all lanes. */
template <typename BODY>
static __device__ __forceinline__ void with_width(uint32_t bits, BODY &&body)
{
    switch (bits) {
    case 1:
        return body(tqkvc_bits<1>());
    case 2:
        return body(tqkvc_bits<2>());
    case 3:
        return body(tqkvc_bits<3>());
    case 4:
        return body(tqkvc_bits<4>());
    case 5:
        return body(tqkvc_bits<5>());
    case 6:
        return body(tqkvc_bits<6>());
    case 8:
        return body(tqkvc_bits<8>());
    default:
        return body(tqkvc_bits<0>());
    }
}

#endif /* TQKVC_LOOKUP_CUH */
