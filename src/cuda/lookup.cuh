/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes in shared memory to operands of an integer tensor core product, one or two units (of 16
 * channels) of a block (16 tokens) at a time. docs/FORMAT.md section 3 has the bytes.
 *
 * A byte permutation is a table of eight levels: four codes as nibbles select four bytes. Bit 3 of a
 * nibble makes the byte's sign bit fill it, so that beside a table of negative levels a code of
 * another table reads -1, and beside one of positive levels 0. Widths 1 to 3 have one table. From 4
 * on a level is made of two bytes, which the product brings together: K adds the second to the first
 * and is corrected for one too few by the sum of the query, V subtracts the first from the second.
 *
 *     width 4      two tables                     K                V
 *                  negative code   first, second  level - 1, 0     -level, 0
 *                  positive code                  -1, level        0, level
 *
 *     5 and 6      2 or 4 tables of magnitudes m, which a negative code reads with its bits inverted
 *                  negative code   first, second  0, -m - 1        -1, -m - 1
 *                  positive code                  -1, m            0, m
 *
 * With lane = 4 g + t:
 *
 *     K   operand rows are tokens: register i has token 2g + i, its channels 2t, 2t + 8, 2t + 1, 2t + 9;
 *         second bytes are another 16 columns, that meet the same query. Of a pair of units a lane has
 *         eight channels of one, in the order of two such lanes: unit t / 2, lanes 2 (t % 2) and the next
 *     V   operand rows are channels: a register has two tokens of channels g and g + 8 in turn, which
 *         meet probabilities with zeros in turn; second bytes are another 8 rows
 */
#ifndef TQKVC_LOOKUP_CUH
#define TQKVC_LOOKUP_CUH

#include "cuda/image.h"
#include "cuda/mma.cuh"

static constexpr __host__ __device__ bool tqkvc_has_second(int bits)
{
    return bits >= 4 && bits <= 6;
}

/*
 * Words and steps of the widths in shared memory, by address: a load at the address of a variable would
 * make that anew each time.
 */
struct tqkvc_rows {
    uint32_t address;

    __device__ __forceinline__ uint32_t row(int bits) const
    {
        return address + bits * 4 * (TQKVC_WORDS + 1);
    }

    __device__ __forceinline__ float step(int bits) const
    {
        float x;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(row(bits) + 4 * TQKVC_WORDS));
        return x;
    }
};

/* Eight codes as nibbles: the lowest four bits; in widths 5 and 6 whether each is positive, in bit 0;
 * in width 6 bit 4 in bit 3, other bits are not 0. */
struct tqkvc_codes {
    uint32_t low, positive, bit4;
};

/* Levels of eight codes: those of the lower halves and of the upper ones. */
struct tqkvc_levels {
    uint32_t first[2], second[2]; /* second only if tqkvc_has_second */
};

template <int BITS, tqkv_side SIDE> struct tqkvc_table {
    static constexpr int n_words = BITS <= 3 ? 2 : BITS == 6 ? 8 : 4;
    __align__(8) uint32_t words[n_words];

    /* row: address of the words in shared memory, 16-aligned. Widths 0 and 8 have none. */
    __device__ __forceinline__ void load(uint32_t row)
    {
        if constexpr (BITS == 4 && SIDE == TQKV_SIDE_V)
            row += 4 * TQKVC_V_WORDS;
        if constexpr (BITS != 0 && BITS != 8)
#pragma unroll
            for (int i = 0; i < n_words; i += 2)
                asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                             : "=r"(words[i]), "=r"(words[i + 1])
                             : "r"(row + 4 * i));
    }

    __device__ __forceinline__ uint32_t part(int i, uint32_t selectors) const
    {
        return permute(words[2 * i], words[2 * i + 1], selectors);
    }

    __device__ __forceinline__ void find(const tqkvc_codes &c, tqkvc_levels &out) const
    {
        constexpr uint32_t TOPS = 0x88888888u;

        if constexpr (BITS == 4) {
            const uint32_t other = c.low ^ TOPS;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                out.first[i] = part(0, c.low >> 16 * i);
                out.second[i] = part(1, other >> 16 * i);
            }
        } else if constexpr (BITS == 5 || BITS == 6) {
            const uint32_t kept = c.positive * 15u, low = ~(c.low ^ kept);
            const uint32_t bit4 = BITS == 6 ? ~(c.bit4 ^ kept) & TOPS : 0u;
            const uint32_t selectors[4] = {low | bit4, (low ^ TOPS) | bit4, low | (bit4 ^ TOPS),
                                           (low ^ TOPS) | (bit4 ^ TOPS)};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t size = 0;
#pragma unroll
                for (int k = 0; k < n_words / 2; k++)
                    size |= part(k, selectors[k] >> 16 * i);
                out.first[i] =
                    permute(SIDE == TQKV_SIDE_K ? 0xff00u : 0x00ffu, 0, c.positive >> 16 * i);
                out.second[i] = size ^ (SIDE == TQKV_SIDE_K ? ~out.first[i] : out.first[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                out.first[i] = part(0, c.low >> 16 * i);
        }
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

static __device__ __forceinline__ uint2 load_u64(const uint8_t *p)
{
    return *reinterpret_cast<const uint2 *>(p);
}

/* The four lowest nibbles to four bytes. */
static __device__ __forceinline__ uint32_t spread_nibbles(uint32_t x)
{
    const uint32_t pairs = permute(x, 0, 0x4140u);
    return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

/* Planes of a width: of the lowest bits, and of what is left. */
static constexpr __host__ __device__ int tqkvc_low_bits(int bits)
{
    return bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
}

/* Where a lane reads a plane of w bits of 16 tokens. */
static __device__ __forceinline__ uint32_t k_place(int w, uint32_t g, uint32_t t)
{
    return w == 4 ? 64 * (t / 2) + 8 * g : w == 2 ? 8 * g : 4 * g;
}

static __device__ __forceinline__ uint32_t v_place(int w, uint32_t g, uint32_t t)
{
    return w == 4 ? 32 * t + 4 * g : w == 2 ? 16 * t + 4 * (g % 4) : 8 * t + 4 * (g % 2);
}

/* Both planes of a lane in N units that start at `unit`; `second` is only read where there is one. */
struct tqkvc_planes {
    const uint8_t *first, *second;

    template <int BITS, int N, tqkv_side SIDE>
    __device__ __forceinline__ void start(const uint8_t *unit, uint32_t lane)
    {
        constexpr int LOW = tqkvc_low_bits(BITS), HIGH = BITS - LOW;
        uint32_t g = lane / 4, t = lane % 4;

        if constexpr (N == 2 && SIDE == TQKV_SIDE_K) {
            unit += t / 2 * 32 * BITS;
            t = t % 2 * 2;
        }
        if constexpr (N == 2 && SIDE == TQKV_SIDE_V) {
            unit += g / 4 * 32 * BITS;
            g %= 4;
        }
        first = unit + (SIDE == TQKV_SIDE_K ? k_place(LOW, g, t) : v_place(LOW, g, t));
        second =
            unit + 32 * LOW + (SIDE == TQKV_SIDE_K ? k_place(HIGH, g, t) : v_place(HIGH, g, t));
    }

    __device__ __forceinline__ tqkvc_planes at(uint32_t offset) const
    {
        return {first + offset, second + offset};
    }
};

/* Codes of widths 5 and 6, from the codes of their second plane. */
template <int BITS> static __device__ __forceinline__ void put_high(uint32_t codes, tqkvc_codes &c)
{
    c.positive = BITS == 5 ? codes : codes >> 1 & 0x11111111u;
    c.bit4 = codes << 3;
}

/* Of a plane of K: codes of token 2g in the lower half, of token 2g + 1 in the upper one. */
static __device__ __forceinline__ uint32_t k_plane4(const uint8_t *plane, uint32_t t)
{
    const uint2 w = load_u64(plane);
    return permute(w.x, w.y, t & 1 ? 0x7632u : 0x5410u);
}

static __device__ __forceinline__ uint32_t k_plane2(const uint8_t *plane, uint32_t t)
{
    const uint2 w = load_u64(plane);
    return permute(w.x, w.y, t & 1 ? 0x7632u : 0x5410u) >> (2 * (t >> 1)) & 0x33333333u;
}

static __device__ __forceinline__ uint32_t k_plane1(const uint8_t *plane, uint32_t t,
                                                    uint32_t to_bit)
{
    return rotate_right(load_u32(plane), t - to_bit) & 0x11111111u << to_bit;
}

/* Levels of a unit: of token 2g in first[0] and second[0]. */
template <int BITS>
static __device__ __forceinline__ void k_levels(const tqkvc_planes &planes, uint32_t t,
                                                const tqkvc_table<BITS, TQKV_SIDE_K> &table,
                                                tqkvc_levels &out)
{
    tqkvc_codes c = {};

    c.low = BITS == 1   ? k_plane1(planes.first, t, 0)
            : BITS <= 3 ? k_plane2(planes.first, t)
                        : k_plane4(planes.first, t);
    if constexpr (BITS == 3)
        c.low |= k_plane1(planes.second, t, 2);
    if constexpr (BITS == 5 || BITS == 6)
        put_high<BITS>(BITS == 5 ? k_plane1(planes.second, t, 0) : k_plane2(planes.second, t), c);
    if constexpr (BITS == 8) {
        const uint32_t high = k_plane4(planes.second, t);
        for (int i = 0; i < 2; i++)
            out.first[i] = (spread_nibbles(c.low >> 16 * i) | spread_nibbles(high >> 16 * i) << 4) ^
                           0x80808080u;
    } else {
        table.find(c, out);
    }
}

/* Of a pair of units, widths 1 to 4: levels of token 2g + i to out[i]. */
template <int BITS>
static __device__ __forceinline__ void k_pair_levels(const tqkvc_planes &planes, uint32_t t,
                                                     const tqkvc_table<BITS, TQKV_SIDE_K> &table,
                                                     tqkvc_levels (&out)[2])
{
    const uint32_t half = t % 2;
    tqkvc_codes c[2] = {};

    if constexpr (BITS >= 2) {
        const uint2 w = load_u64(planes.first);
        c[0].low = BITS == 4 ? w.x : w.x >> 2 * half & 0x33333333u;
        c[1].low = BITS == 4 ? w.y : w.y >> 2 * half & 0x33333333u;
    }
    if constexpr (BITS == 1 || BITS == 3) {
        constexpr uint32_t TO_BIT = BITS - 1;
        const uint32_t x =
            rotate_right(load_u32(BITS == 1 ? planes.first : planes.second), 2 * half - TO_BIT);
        c[0].low |= permute(x, x >> 1, 0x5410u) & 0x11111111u << TO_BIT;
        c[1].low |= permute(x, x >> 1, 0x7632u) & 0x11111111u << TO_BIT;
    }
    table.find(c[0], out[0]);
    table.find(c[1], out[1]);
}

static __device__ __forceinline__ uint32_t v_plane2(const uint8_t *plane, uint32_t g)
{
    return load_u32(plane) >> (2 * (g >> 2)) & 0x33333333u;
}

static __device__ __forceinline__ uint32_t v_plane1(const uint8_t *plane, uint32_t g,
                                                    uint32_t to_bit)
{
    return rotate_right(load_u32(plane), (g >> 1) - to_bit) & 0x11111111u << to_bit;
}

/*
 * A byte of each channel of the lane in turn: tokens 4t, 4t + 1 in first[0] and second[0], the other
 * two in first[1] and second[1]. Width 8 has tokens 4t .. 4t + 3 of channel g in first[0], of channel
 * g + 8 in first[1].
 */
template <int BITS>
static __device__ __forceinline__ void v_levels(const tqkvc_planes &planes, uint32_t g,
                                                const tqkvc_table<BITS, TQKV_SIDE_V> &table,
                                                tqkvc_levels &out)
{
    if constexpr (BITS == 8) {
        const uint32_t low = load_u32(planes.first), high = load_u32(planes.second);
        out.first[0] = ((low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u)) ^ 0x80808080u;
        out.first[1] = ((low >> 4 & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u)) ^ 0x80808080u;
        return;
    }
    tqkvc_codes c = {};
    c.low = BITS == 1   ? v_plane1(planes.first, g, 0)
            : BITS <= 3 ? v_plane2(planes.first, g)
                        : load_u32(planes.first);
    if constexpr (BITS == 3)
        c.low |= v_plane1(planes.second, g, 2);
    if constexpr (BITS == 5 || BITS == 6)
        put_high<BITS>(BITS == 5 ? v_plane1(planes.second, g, 0) : v_plane2(planes.second, g), c);
    table.find(c, out);
}

/*
 * Of a pair of units, widths 1 to 3: what v_levels has of a unit, for channels i and i + 8 of unit g / 4,
 * i = g % 4, in out[0] and for i + 4 and i + 12 in out[1].
 */
template <int BITS>
static __device__ __forceinline__ void v_pair_levels(const tqkvc_planes &planes, uint32_t g,
                                                     const tqkvc_table<BITS, TQKV_SIDE_V> &table,
                                                     tqkvc_levels (&out)[2])
{
    tqkvc_codes c[2] = {};

    if constexpr (BITS >= 2) {
        const uint32_t x = load_u32(planes.first);
        c[0].low = x & 0x33333333u;
        c[1].low = x >> 2 & 0x33333333u;
    }
    if constexpr (BITS == 1 || BITS == 3) {
        constexpr uint32_t TO_BIT = BITS - 1;
        const uint32_t x =
            rotate_right(load_u32(BITS == 1 ? planes.first : planes.second), g % 4 / 2 - TO_BIT);
        c[0].low |= x & 0x11111111u << TO_BIT;
        c[1].low |= rotate_right(x, 2) & 0x11111111u << TO_BIT;
    }
    table.find(c[0], out[0]);
    table.find(c[1], out[1]);
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
