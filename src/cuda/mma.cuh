/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tensor core products of one warp, and the byte permutation that tables are read with.
 *
 * In lane (g = lane / 4, t = lane % 4) of a product of 16 x 8:
 *
 *     c[0], c[1]   row g,     columns 2t, 2t + 1
 *     c[2], c[3]   row g + 8, columns 2t, 2t + 1
 */
#ifndef TQKVC_MMA_CUH
#define TQKVC_MMA_CUH

#include <stdint.h>

/* Byte i of the result: byte selector[i] & 7 of (low, high), or its sign bit eight times if
 * selector[i] & 8. Selectors are the four lowest nibbles; the upper 16 bits are ignored. */
static __device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selectors)
{
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selectors));
    return out;
}

/* c += a b: a [16][16] s8, b [16][8]. a0: row g, k = 4t..4t+3; a1: row g + 8; b: column g. */
#define TQKVC_MULTIPLY_K16(name, type)                                                             \
    static __device__ __forceinline__ void name(int(&c)[4], uint32_t a0, uint32_t a1, uint32_t b)  \
    {                                                                                              \
        asm("mma.sync.aligned.m16n8k16.row.col.s32.s8." type ".s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, " \
            "{%0,%1,%2,%3};"                                                                       \
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                       \
            : "r"(a0), "r"(a1), "r"(b));                                                           \
    }

TQKVC_MULTIPLY_K16(multiply_k16, "s8")
TQKVC_MULTIPLY_K16(multiply_k16_unsigned, "u8")

/* c += a b: a [16][32] s8, b [32][8]. a0, a1: k = 4t..4t+3 of rows g, g + 8; a2, a3: k + 16. */
#define TQKVC_MULTIPLY_K32(name, type)                                                             \
    static __device__ __forceinline__ void name(int(&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, \
                                                uint32_t a3, uint32_t b0, uint32_t b1)             \
    {                                                                                              \
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8." type ".s32 {%0,%1,%2,%3}, "                \
            "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                               \
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                       \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                               \
    }

TQKVC_MULTIPLY_K32(multiply_k32_signed, "s8")
TQKVC_MULTIPLY_K32(multiply_k32, "u8")

/* c += a b: a [16][16] f16 as image.h orders it, b [16][8] f16. */
static __device__ __forceinline__ void multiply_f16(float (&c)[4], const uint4 &a, uint32_t b0,
                                                    uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/* Four operands of 8 rows of 16 bytes, whose addresses eight lanes give each. */
static __device__ __forceinline__ void load_operands(uint32_t (&out)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

/* 2^x; 2 ulp, 0 for -inf. */
static __device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif /* TQKVC_MMA_CUH */
