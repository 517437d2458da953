/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes to levels. A unit is 16 codes, one byte each in a 128-bit register: planes are spread by
 * shifts and masks, levels come from byte look-ups, and two vectors of f32 leave.
 *
 * Units are the outer loop, so that every inner loop knows its width.
 */
#include <immintrin.h>
#include <string.h>

#include "kernels/levels.h"
#include "kernels/tables.h"

typedef __m128i levels_fn(const uint8_t *unit, const __m128i *table);

/* Byte 2k of the result is 0xff where bit k of byte 0 is set, byte 2k + 1 where that of byte 1. */
static inline __m128i plane1_mask(const uint8_t *plane)
{
    uint16_t word;
    memcpy(&word, plane, sizeof(word));
    const __m128i bit = _mm_set1_epi64x((long long)0x8080404020201010u);
    const __m128i select = _mm_unpacklo_epi64(_mm_srli_epi64(bit, 4), bit);
    return _mm_cmpeq_epi8(_mm_and_si128(_mm_set1_epi16((short)word), select), select);
}

static inline __m128i plane2(const uint8_t *plane)
{
    int word;
    memcpy(&word, plane, sizeof(word));
    const __m128i shifted = _mm_srlv_epi32(_mm_set1_epi32(word), _mm_setr_epi32(0, 2, 4, 6));
    return _mm_and_si128(shifted, _mm_set1_epi8(3));
}

static inline __m128i plane4(const uint8_t *plane)
{
    const __m128i word = _mm_loadl_epi64((const __m128i *)(const void *)plane);
    return _mm_and_si128(_mm_unpacklo_epi64(word, _mm_srli_epi16(word, 4)), _mm_set1_epi8(15));
}

/* level - i of the codes; table holds the levels of the width, sixteen a register. */
static inline __m128i levels_1(const uint8_t *unit, const __m128i *table)
{
    const __m128i high = _mm_set1_epi8(TQKVK_LEVEL_MAX);
    const __m128i mask = plane1_mask(unit);
    (void)table;
    return _mm_sub_epi8(_mm_xor_si128(high, _mm_xor_si128(mask, _mm_set1_epi8(-1))),
                        _mm_xor_si128(mask, _mm_set1_epi8(-1)));
}

static inline __m128i levels_2(const uint8_t *unit, const __m128i *table)
{
    return _mm_shuffle_epi8(table[0], plane2(unit));
}

static inline __m128i levels_3(const uint8_t *unit, const __m128i *table)
{
    const __m128i top = _mm_and_si128(plane1_mask(unit + 4), _mm_set1_epi8(4));
    return _mm_shuffle_epi8(table[0], _mm_or_si128(plane2(unit), top));
}

static inline __m128i levels_4(const uint8_t *unit, const __m128i *table)
{
    return _mm_shuffle_epi8(table[0], plane4(unit));
}

static inline __m128i levels_5(const uint8_t *unit, const __m128i *table)
{
    const __m128i low = plane4(unit);
    return _mm_blendv_epi8(_mm_shuffle_epi8(table[0], low), _mm_shuffle_epi8(table[1], low),
                           plane1_mask(unit + 8));
}

static inline __m128i levels_6(const uint8_t *unit, const __m128i *table)
{
    const __m128i low = plane4(unit);
    const __m128i high = plane2(unit + 8);
    const __m128i bit4 = _mm_slli_epi16(high, 7); /* to the sign of each byte */
    const __m128i bit5 = _mm_slli_epi16(high, 6);
    const __m128i below =
        _mm_blendv_epi8(_mm_shuffle_epi8(table[0], low), _mm_shuffle_epi8(table[1], low), bit4);
    const __m128i above =
        _mm_blendv_epi8(_mm_shuffle_epi8(table[2], low), _mm_shuffle_epi8(table[3], low), bit4);
    return _mm_blendv_epi8(below, above, bit5);
}

/* Code 0 is read as -127. */
static inline __m128i levels_8(const uint8_t *unit, const __m128i *table)
{
    const __m128i code = _mm_or_si128(plane4(unit), _mm_slli_epi16(plane4(unit + 8), 4));
    (void)table;
    return _mm_xor_si128(_mm_max_epu8(code, _mm_set1_epi8(1)), _mm_set1_epi8(-128));
}

static inline void unpack_unit(levels_fn *levels, uint32_t bits, const uint8_t *codes,
                               size_t row_bytes, size_t n_rows, float *out, size_t dim)
{
    const __m256 step = _mm256_set1_ps(tqkvk_widths[bits].step);
    __m128i table[4];
    for (size_t i = 0; i < 4; i++)
        table[i] =
            _mm_loadu_si128((const __m128i *)(const void *)(tqkvk_widths[bits].levels + 16 * i));

    for (size_t r = 0; r < n_rows; r++) {
        const __m128i level = levels(codes + r * row_bytes, table);
        const __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(level));
        const __m256 hi =
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(level, level)));
        _mm256_store_ps(out + r * dim, _mm256_mul_ps(lo, step));
        _mm256_store_ps(out + r * dim + 8, _mm256_mul_ps(hi, step));
    }
}

static inline void zero_unit(size_t n_rows, float *out, size_t dim)
{
    for (size_t r = 0; r < n_rows; r++) {
        _mm256_store_ps(out + r * dim, _mm256_setzero_ps());
        _mm256_store_ps(out + r * dim + 8, _mm256_setzero_ps());
    }
}

void tqkvk_unpack_rows_f32_avx2(const tqkvi_layout *layout, const uint8_t *codes, size_t n_rows,
                                float *out)
{
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;
    const size_t row_bytes = layout->row_bytes;

    for (uint32_t u = 0; u < layout->n_units; u++, out += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        switch (bits) {
        case 1:
            unpack_unit(levels_1, 1, codes, row_bytes, n_rows, out, dim);
            break;
        case 2:
            unpack_unit(levels_2, 2, codes, row_bytes, n_rows, out, dim);
            break;
        case 3:
            unpack_unit(levels_3, 3, codes, row_bytes, n_rows, out, dim);
            break;
        case 4:
            unpack_unit(levels_4, 4, codes, row_bytes, n_rows, out, dim);
            break;
        case 5:
            unpack_unit(levels_5, 5, codes, row_bytes, n_rows, out, dim);
            break;
        case 6:
            unpack_unit(levels_6, 6, codes, row_bytes, n_rows, out, dim);
            break;
        case 8:
            unpack_unit(levels_8, 8, codes, row_bytes, n_rows, out, dim);
            break;
        default:
            zero_unit(n_rows, out, dim);
            break;
        }
        codes += 2 * bits;
    }
}
