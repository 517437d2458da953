/* SPDX-License-Identifier: Apache-2.0 */
/* Values of single tokens in coded space, from codes where they lie: for kernels that give rows back. */
#ifndef TQKVC_CODED_ROW_CUH
#define TQKVC_CODED_ROW_CUH

#include "cuda/image.h"

/* Code of channel d of a plane of w bits of the token in a slot. */
static __device__ __forceinline__ uint32_t plane_code(const uint8_t *plane, uint32_t side, uint32_t slot, uint32_t w,
                                                      uint32_t d)
{
    const uint32_t n = 2 * w, i = d % n;
    const uint32_t at = side == TQKV_SIDE_V ? slot / 4 * 4 * n + 4 * i + slot % 4
                                            : i / 4 * 64 + min(n, 4u) * slot + i % 4;
    return (uint32_t)plane[at] >> (d / n * w) & ((1u << w) - 1);
}

/* Level times step of channel d of a unit. */
static __device__ __forceinline__ float unit_value(const uint8_t *unit, const tqkvc_width &width, uint32_t bits,
                                                   uint32_t side, uint32_t slot, uint32_t d)
{
    if (bits == 0)
        return 0.0f;
    const uint32_t low = bits >= 4 ? 4 : bits >= 2 ? 2 : 1, half = 1u << (bits - 1);
    uint32_t code = plane_code(unit, side, slot, low, d);
    if (bits > low)
        code |= plane_code(unit + 32 * low, side, slot, bits - low, d) << low;
    if (bits == 8)
        return (float)max((int)code - 128, -127) * width.step;
    const int level =
        code >= half ? (int)width.magnitude[code - half] : -(int)width.magnitude[half - 1 - code];
    return (float)level * width.step;
}

/*
 * body(channel, level times step) of all channels of a row of UNITS units, an even number, by a warp: lane i has channel
 * i of every pair of units, in turn. units: behind the scales of the section.
 */
template <int UNITS, typename BODY>
static __device__ __forceinline__ void for_each_coded(const tqkvc_tables &tables, const uint8_t *units, uint64_t widths,
                                                      uint64_t more_widths, uint32_t side, uint32_t slot, uint32_t lane,
                                                      BODY &&body)
{
#pragma unroll
    for (int u = 0; u < UNITS; u += 2) {
        const uint32_t both =
            (uint32_t)((u < TQKVC_UNITS_MAX ? widths : more_widths) >> 4 * (u % TQKVC_UNITS_MAX)) & 255u;
        const uint32_t first = both & 15u, bits = lane < 16 ? first : both >> 4;
        body(16 * u + lane, unit_value(units + (lane < 16 ? 0 : 32 * first), tables.widths[bits], bits, side, slot,
                                       lane % 16));
        units += 32 * (first + (both >> 4));
    }
}

/* The sections of a KV head in the block of a token: K, and V behind it. */
struct tqkvc_sections {
    const uint8_t *k, *v;
    const tqkvc_layout *layout;
};

static __device__ __forceinline__ tqkvc_sections find_sections(const tqkv_cuda_pages &pages, const tqkvc_shape &shape,
                                                               const uint8_t *image,
                                                               const uint32_t (&page_bytes)[TQKV_TIERS_MAX],
                                                               uint32_t seq, uint32_t token, uint32_t g)
{
    const uint32_t tier = pages.tiers ? pages.tiers[(size_t)seq * pages.tiers_stride + token / TQKV_CUDA_TILE_TOKENS]
                                      : shape.n_tiers - 1;
    const tqkvc_layout *layout =
        reinterpret_cast<const tqkvc_layout *>(image + shape.parts.layouts) + tier * shape.n_kv_heads + g;
    const int32_t page = pages.block_table[(size_t)seq * pages.table_stride + token / pages.page_tokens];
    const uint8_t *k = static_cast<const uint8_t *>(pages.pool[tier]) + (size_t)page * page_bytes[tier] +
                       (size_t)(token % pages.page_tokens / TQKVC_BLOCK_TOKENS) * shape.block_bytes[tier] +
                       layout->offset;
    return {k, k + layout->bytes[TQKV_SIDE_K], layout};
}

#endif /* TQKVC_CODED_ROW_CUH */
