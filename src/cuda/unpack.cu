/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Unpack: 32 tokens of one KV head and side from codes to rows, for attention kernels that read plain
 * K and V. Values in coded space become columns, the inverse is applied on tensor cores, K is turned
 * back. The matrix of K is stored for queries, so here its operands are transposed.
 */
#include "cuda/coded_row.cuh"
#include "cuda/columns.cuh"
#include "cuda/launch.h"

namespace
{

constexpr uint32_t TOKENS = 32, WARPS = 4;

/* The token as a column, divided by what is returned; 0 for the zero row, and past the last token. */
template <int D>
__device__ float load_column(const tqkvc_unpack &p, uint32_t token, uint32_t g, uint32_t side, const float *row_scale,
                             uint32_t column, uint32_t lane, tqkvc_columns<D, TOKENS> &columns)
{
    const tqkvc_tables &tables = *reinterpret_cast<const tqkvc_tables *>(p.image);
    const uint32_t slot = token % TQKVC_BLOCK_TOKENS;
    float v[D / 32] = {}, largest = 0, scale = 0;

    if (token < p.args.first + p.args.n_tokens) {
        const tqkvc_sections at =
            find_sections(p.args.pages, p.shape, p.image, p.page_bytes, p.args.sequence, token, g);
        const uint8_t *section = side == TQKV_SIDE_V ? at.v : at.k;
        scale = tables.encode.scale_values[section[slot]];
        if (scale != 0)
            for_each_coded<D / 16>(tables, section + TQKVC_BLOCK_TOKENS, at.layout->widths[side], 0, side, slot, lane,
                                   [&](uint32_t d, float x) { v[d / 32] = scale * x; });
    }
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        if (side == TQKV_SIDE_K) /* its matrix has rows where the transposed one has columns */
            v[i] *= row_scale[32 * i + lane];
        largest = fmaxf(largest, fabsf(v[i]));
    }
    largest =
        fmaxf(__uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest))), 1e-30f);
    for (int i = 0; i < D / 32; i++)
        columns.set(column, 32 * i + lane, v[i] / largest);
    return scale == 0 ? 0.0f : largest;
}

/* Mean, turn, output of one token. x: [D], product of the matrix and the column. */
template <int D>
__device__ void write_row(const tqkvc_unpack &p, uint32_t g, uint32_t side, uint32_t token,
                          const float *x, float factor, uint32_t lane)
{
    const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.mean[side]) + g * D;
    const float *row_scale =
        reinterpret_cast<const float *>(p.image + p.shape.parts.row_scale[side]) + g * D;
    const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
    const size_t at = ((size_t)(token - p.args.first) * p.shape.n_kv_heads + g) * D;
    const int32_t base = (int32_t)(token / p.shape.frame_tokens * p.shape.frame_tokens);
    const bool zero = factor == 0;

    for (uint32_t i = lane; i < D / 2; i += 32) {
        const tqkvc_pair pair = find_pair(p.shape, i);
        const bool is_k = side == TQKV_SIDE_K;
        const float a =
            zero ? 0.0f : x[pair.a] * factor * (is_k ? 1.0f : row_scale[pair.a]) + mean[pair.a];
        const float b =
            zero ? 0.0f : x[pair.b] * factor * (is_k ? 1.0f : row_scale[pair.b]) + mean[pair.b];
        float sine = 0, cosine = 1;
        if (is_k && pair.turns)
            turn_fast(turns_per_position(inv_freq[i]), base, sine, cosine);
        void *out = is_k ? p.args.k : p.args.v;
        store_value(out, at + pair.a, p.args.type, a * cosine - b * sine);
        store_value(out, at + pair.b, p.args.type, b * cosine + a * sine);
    }
}

template <int D>
__global__ void __launch_bounds__(32 * WARPS) unpack_kernel(const __grid_constant__ tqkvc_unpack p)
{
    __shared__ union {
        tqkvc_columns<D, TOKENS> columns;
        float rows[TOKENS][D];
    } memory;
    __shared__ float factor[TOKENS];
    const uint32_t g = blockIdx.y / 2, side = blockIdx.y % 2, warp = threadIdx.x / 32,
                   lane = threadIdx.x % 32;
    const uint32_t first = p.args.first + blockIdx.x * TOKENS;
    const uint4 *matrix = reinterpret_cast<const uint4 *>(p.image + p.shape.parts.matrix[side]) +
                          (size_t)g * D * D / 4;
    const float *row_scale =
        reinterpret_cast<const float *>(p.image + p.shape.parts.row_scale[side]) + g * D;
    float c[D / 16 / WARPS][TOKENS / 8][4];

    for (uint32_t i = warp; i < TOKENS; i += WARPS) {
        const float f = load_column<D>(p, first + i, g, side, row_scale, i, lane, memory.columns);
        if (lane == 0)
            factor[i] = f;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < D / 16 / WARPS; i++) {
        if (side == TQKV_SIDE_K)
            multiply_columns<true, true, 4>(matrix, i * WARPS + warp, memory.columns, lane, c[i]);
        else
            multiply_columns<false, true, 8>(matrix, i * WARPS + warp, memory.columns, lane, c[i]);
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < D / 16 / WARPS; i++)
#pragma unroll
        for (uint32_t k = 0; k < TOKENS / 8 * 4; k++)
            memory.rows[k / 4 * 8 + lane % 4 * 2 + k % 2]
                       [(i * WARPS + warp) * 16 + lane / 4 + k % 4 / 2 * 8] = c[i][k / 4][k % 4];
    __syncthreads();
    for (uint32_t i = warp; i < TOKENS; i += WARPS)
        if (first + i < p.args.first + p.args.n_tokens)
            write_row<D>(p, g, side, first + i, memory.rows[i], factor[i], lane);
}

} // namespace

extern "C" tqkv_status tqkvc_launch_unpack(const tqkvc_unpack *unpack, void *stream)
{
    const dim3 grid((unpack->args.n_tokens + TOKENS - 1) / TOKENS, 2 * unpack->shape.n_kv_heads);
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    switch (unpack->shape.dim) {
    case 64:
        unpack_kernel<64><<<grid, 32 * WARPS, 0, s>>>(*unpack);
        break;
    case 128:
        unpack_kernel<128><<<grid, 32 * WARPS, 0, s>>>(*unpack);
        break;
    default:
        unpack_kernel<256><<<grid, 32 * WARPS, 0, s>>>(*unpack);
        break;
    }
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
