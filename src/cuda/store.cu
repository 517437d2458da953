/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Store: rows of K and V to codes in their blocks, the bytes of the CPU codec.
 *
 * Half a warp takes ROWS tokens of one KV head and side: 4 (of 256 channels 2) where there are many, so that they share
 * the reads of the transform, otherwise 1. Lane d has channel d of every unit. The order of sums is
 * part of the format, so the transform is D x D fused multiply-adds in f32, and the search of the
 * scale takes about as long. This bounds the kernel, not memory.
 */
#include "cuda/columns.cuh"
#include "cuda/encode_row.cuh"
#include "cuda/launch.h"

namespace
{

constexpr uint32_t THREADS = 128, HALVES = THREADS / 16;

/* Token that row r of a half warp has; n_tokens where there is none. */
struct place {
    uint32_t token;
    int32_t base;
    uint8_t *section; /* in the block; NULL: leave the token out */
    uint32_t slot;
};

__device__ place find_place(const tqkvc_store &p, uint32_t token, const tqkvc_layout &layout,
                            uint32_t side)
{
    place at = {token, 0, nullptr, 0};
    if (token >= p.args.n_tokens)
        return at;
    const int64_t slot = p.args.slots[token];
    if (slot < 0)
        return at;
    const int32_t position = p.args.positions[token];
    const uint32_t cell = (uint32_t)(slot % p.args.page_tokens);
    if (side == TQKV_SIDE_K && p.shape.n_rot != 0) {
        const int64_t frame = p.shape.frame_tokens;
        const int64_t down = ((int64_t)position - (position < 0 ? frame - 1 : 0)) / frame * frame;
        at.base = (int32_t)max(down, (int64_t)INT32_MIN);
    }
    at.section = static_cast<uint8_t *>(p.args.pool) +
                 slot / p.args.page_tokens * (int64_t)p.page_bytes +
                 (size_t)(cell / TQKVC_BLOCK_TOKENS) * p.shape.block_bytes[p.args.tier] +
                 layout.offset + (side == TQKV_SIDE_V ? layout.bytes[0] : 0);
    at.slot = cell % TQKVC_BLOCK_TOKENS;
    return at;
}

/* Whether any lane of this half says so. */
__device__ bool any_of_half(bool v)
{
    return (__ballot_sync(TQKVC_FULL, v) >> (threadIdx.x & 16u) & 0xffffu) != 0;
}

/* x of one row to z = R(-base) x - mean at z[ROWS * channel]. False: the row is stored as zero. */
template <int D, int ROWS>
__device__ bool load_row(const tqkvc_store &p, const place &at, uint32_t g, uint32_t side, float *z)
{
    const uint32_t d = threadIdx.x % 16;
    const void *from = side == TQKV_SIDE_K ? p.args.k : p.args.v;
    const size_t stride = side == TQKV_SIDE_K ? p.args.k_token_stride : p.args.v_token_stride;
    const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.mean[side]) + g * D;
    const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
    bool bad = false, any = false;

    for (uint32_t i = d; i < D; i += 16) {
        const float x =
            at.section ? load_value(from, at.token * stride + g * D + i, p.args.type) : 0.0f;
        bad = bad || !isfinite(x);
        any = any || x != 0.0f;
        z[ROWS * i] = x;
    }
    __syncwarp();
    if (at.base != 0) {
        for (uint32_t i = d; i < p.shape.n_rot / 2; i += 16) {
            const tqkvc_pair pair = find_pair(p.shape, i);
            const float a = z[ROWS * pair.a], b = z[ROWS * pair.b];
            float sine, cosine;
            turn_exact(inv_freq[i], at.base, sine, cosine);
            z[ROWS * pair.a] = add(mul(a, cosine), mul(b, sine)); /* by -base: minus times minus */
            z[ROWS * pair.b] = add(mul(b, cosine), -mul(a, sine));
        }
    }
    __syncwarp();
    for (uint32_t i = d; i < D; i += 16)
        z[ROWS * i] = add(z[ROWS * i], -mean[i]);
    __syncwarp();
    const bool has_values = any_of_half(any), has_bad = any_of_half(bad); /* all lanes ask both */
    return has_values && !has_bad;
}

/* y[row][unit] of lane d: sum over i of transform[i][16 unit + d] z[i][row], in ascending i. */
template <int D, int ROWS>
__device__ void transform_rows(const float *__restrict__ transform, const float *z,
                               float (&y)[ROWS][D / 16])
{
    const float *column = transform + threadIdx.x % 16;

#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int u = 0; u < D / 16; u++)
            y[r][u] = 0.0f;
#pragma unroll 4
    for (uint32_t i = 0; i < D; i++) {
        float row[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            row[r] = z[ROWS * i + r];
#pragma unroll
        for (int u = 0; u < D / 16; u++) {
            const float m = __ldg(column + i * D + 16 * u);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                y[r][u] = __fmaf_rn(m, row[r], y[r][u]);
        }
    }
}

/* The same where the transform is a Walsh-Hadamard matrix times the factors in its first column. */
template <int D, int ROWS>
__device__ void butterflies(const float *__restrict__ transform, const float *z,
                            float (&y)[ROWS][D / 16])
{
    const uint32_t d = threadIdx.x % 16;

#pragma unroll
    for (int u = 0; u < D / 16; u++) {
        const float factor = __ldg(transform + (16 * u + d) * D);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float v = mul(factor, z[ROWS * (16 * u + d) + r]);
            for (uint32_t n = 1; n < 16; n *= 2) {
                const float other = __shfl_xor_sync(TQKVC_FULL, v, n);
                v = add(other, d & n ? -v : v);
            }
            y[r][u] = v;
        }
    }
#pragma unroll
    for (int n = 1; n < D / 16; n *= 2)
#pragma unroll
        for (int u = 0; u < D / 16; u++) {
            if (u & n)
                continue;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float a = y[r][u], b = y[r][u + n];
                y[r][u] = add(a, b);
                y[r][u + n] = add(a, -b);
            }
        }
}

/* Codes of a row into its block. zero: the zero row. */
template <int D>
__device__ void put_row(const place &at, uint32_t side, uint64_t widths, const float (&y)[D / 16],
                        const uint32_t (&magnitude)[D / 16], int scale, bool zero)
{
    uint8_t *unit = at.section + TQKVC_BLOCK_TOKENS;

    if (at.section && threadIdx.x % 16 == 0)
        at.section[at.slot] = zero ? 0 : (uint8_t)scale;
#pragma unroll
    for (int u = 0; u < D / 16; u++) {
        const uint32_t bits = (uint32_t)(widths >> (4 * u)) & 15u;
        if (bits == 0)
            continue;
        const uint32_t half = 1u << (bits - 1), low = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
        const uint32_t below = bits == 8 ? half - magnitude[u] : half - 1 - magnitude[u];
        const uint32_t code = zero ? 0 : signbit(y[u]) ? below : half + magnitude[u];
        put_plane(unit, side, at.slot, low, code, at.section != nullptr);
        if (bits > low)
            put_plane(unit + 32 * low, side, at.slot, bits - low, code >> low,
                      at.section != nullptr);
        unit += 32 * bits;
    }
}

template <int D, int ROWS>
__global__ void __launch_bounds__(THREADS) store_kernel(const __grid_constant__ tqkvc_store p)
{
    __shared__ tqkvc_encode_tables tables;
    __shared__ __align__(16) float z[HALVES][D * ROWS];
    const uint32_t g = blockIdx.y / 2, side = blockIdx.y % 2, half = threadIdx.x / 16;
    const tqkvc_layout &layout = reinterpret_cast<const tqkvc_layout *>(
        p.image + p.shape.parts.layouts)[p.args.tier * p.shape.n_kv_heads + g];
    const float *transform =
        reinterpret_cast<const float *>(p.image + p.shape.parts.transform[side]) +
        (size_t)g * D * D;
    const float *weights =
        reinterpret_cast<const float *>(p.image + p.shape.parts.weight[side]) + g * (D / 16);
    const uint32_t traits =
        reinterpret_cast<const uint32_t *>(p.image + p.shape.parts.traits[side])[g];
    const bool zero_mean = (traits & TQKVC_ZERO_MEAN) != 0;
    const bool has_codes = layout.bytes[side] > TQKVC_BLOCK_TOKENS;
    place at[ROWS];
    bool good[ROWS];
    float y[ROWS][D / 16];

    load_encode_tables(p.image, tables);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        at[r] = find_place(p, (blockIdx.x * HALVES + half) * ROWS + r, layout, side);
        good[r] = load_row<D, ROWS>(p, at[r], g, side, z[half] + r);
    }
    __syncthreads();
    if (traits & TQKVC_HADAMARD)
        butterflies<D, ROWS>(transform, z[half], y);
    else
        transform_rows<D, ROWS>(transform, z[half], y);
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) {
        tqkvc_row_encoder<D / 16> row = {tables, layout.widths[side], weights, {}};
        float signs[D / 16];
        uint32_t magnitude[D / 16];
        bool bad = false, zero = true;
#pragma unroll
        for (int u = 0; u < D / 16; u++) {
            signs[u] = y[0][u];
            for (int i = 1; i < ROWS; i++) /* not an index: y stays in registers */
                signs[u] = r == i ? y[i][u] : signs[u];
            bad = bad || !isfinite(signs[u]);
            row.size[u] = fminf(fabsf(signs[u]), TQKVC_Y_MAX);
        }
        bool is_good = good[0];
        place where = at[0];
        for (int i = 1; i < ROWS; i++) {
            is_good = r == i ? good[i] : is_good;
            where = r == i ? at[i] : where;
        }
        const bool has_bad = any_of_half(bad);
        is_good = is_good && !has_bad;
        int scale = 1;
        if (has_codes)
            scale = row.encode(magnitude, &zero);
        put_row<D>(where, side, layout.widths[side], signs, magnitude, scale,
                   !is_good || (scale == 1 && zero_mean && zero));
    }
}

template <int D> void launch(const tqkvc_store &p, cudaStream_t stream)
{
    constexpr uint32_t MANY = D == 256 ? 2 : 4; /* 48 KB of shared memory, and registers */
    const uint32_t rows = p.args.n_tokens >= 512 ? MANY : 1, per_block = HALVES * rows;
    const dim3 grid((p.args.n_tokens + per_block - 1) / per_block, 2 * p.shape.n_kv_heads);
    if (rows == MANY)
        store_kernel<D, MANY><<<grid, THREADS, 0, stream>>>(p);
    else
        store_kernel<D, 1><<<grid, THREADS, 0, stream>>>(p);
}

} // namespace

extern "C" tqkv_status tqkvc_launch_store(const tqkvc_store *store, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    switch (store->shape.dim) {
    case 64:
        launch<64>(*store, s);
        break;
    case 128:
        launch<128>(*store, s);
        break;
    default:
        launch<256>(*store, s);
        break;
    }
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
