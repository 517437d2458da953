/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Codes to levels. A unit is 16 codes, one byte each in a register: the bytes of a plane are
 * repeated, and each copy is shifted down to its own code.
 *
 * Units are the outer loop, so that every inner loop knows its width.
 */
#include <string.h>

#include "kernels/arm/levels_neon.h"
#include "kernels/tables.h"

/* Plane of w bits. Nothing past its 2 * w bytes is read. */
TQKVK_INLINE uint8x16_t load_plane(const uint8_t *plane, int w, int keep)
{
    static const int8_t down_1[16] = {0, 0, -1, -1, -2, -2, -3, -3, -4, -4, -5, -5, -6, -6, -7, -7};
    static const int8_t down_2[16] = {0, 0, 0, 0, -2, -2, -2, -2, -4, -4, -4, -4, -6, -6, -6, -6};
    uint8x16_t v;

    if (w == 4) {
        const uint8x8_t eight = vld1_u8(plane);
        v = vcombine_u8(eight, vshr_n_u8(eight, 4));
    } else if (w == 2) {
        uint32_t four;
        memcpy(&four, plane, sizeof(four));
        v = vshlq_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), vld1q_s8(down_2));
    } else {
        uint16_t two;
        memcpy(&two, plane, sizeof(two));
        v = vshlq_u8(vreinterpretq_u8_u16(vdupq_n_u16(two)), vld1q_s8(down_1));
    }
    return tqkvk_field(v, 0, keep);
}

TQKVK_INLINE uint8x16_t load_codes(int bits, const uint8_t *unit)
{
    const int low = (int)tqkvi_plane_low((uint32_t)bits), rest = bits - low;
    const uint8x16_t codes = load_plane(unit, low, tqkvk_keep(bits));
    return rest == 0 ? codes : tqkvk_join(bits, codes, load_plane(unit + 2 * low, rest, rest));
}

TQKVK_INLINE void unpack_unit(int bits, const uint8_t *codes, size_t row_bytes, size_t n_rows,
                              float *out, size_t dim)
{
    const float step = tqkvk_widths[bits].step;
    const tqkvk_levels_of of = tqkvk_levels_load(bits);

    for (size_t r = 0; r < n_rows; r++) {
        const uint8x16_t code = load_codes(bits, codes + r * row_bytes);
        tqkvk_store_unit(tqkvk_to_levels(bits, code, &of), step, out + r * dim);
    }
}

static void zero_unit(size_t n_rows, float *out, size_t dim)
{
    for (size_t r = 0; r < n_rows; r++)
        memset(out + r * dim, 0, TQKV_UNIT_CHANNELS * sizeof(*out));
}

void tqkvk_unpack_rows_f32_neon(const tqkvi_layout *layout, const uint8_t *codes, size_t n_rows,
                                float *out)
{
    const size_t dim = (size_t)layout->n_units * TQKV_UNIT_CHANNELS;
    const size_t row_bytes = layout->row_bytes;

    for (uint32_t u = 0; u < layout->n_units; u++, out += TQKV_UNIT_CHANNELS) {
        const uint32_t bits = layout->bits[u];
        switch (bits) {
        case 1:
            unpack_unit(1, codes, row_bytes, n_rows, out, dim);
            break;
        case 2:
            unpack_unit(2, codes, row_bytes, n_rows, out, dim);
            break;
        case 3:
            unpack_unit(3, codes, row_bytes, n_rows, out, dim);
            break;
        case 4:
            unpack_unit(4, codes, row_bytes, n_rows, out, dim);
            break;
        case 5:
            unpack_unit(5, codes, row_bytes, n_rows, out, dim);
            break;
        case 6:
            unpack_unit(6, codes, row_bytes, n_rows, out, dim);
            break;
        case 8:
            unpack_unit(8, codes, row_bytes, n_rows, out, dim);
            break;
        default:
            zero_unit(n_rows, out, dim);
            break;
        }
        codes += 2 * bits;
    }
}
