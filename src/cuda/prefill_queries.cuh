/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of a block of prefill before and after its tiles: queries of a frame on the way in, the inverse of V on the
 * way out. Each warp does its own rows, on tensor cores.
 *
 * Queries become f16, as levels are; the matrix takes both of its f16 parts, the turned row the higher one. All rows
 * of a warp share one factor, which bounds what the product can be, so that f16 neither overflows nor wastes digits.
 * Sums take both parts of everything, as in decode.
 */
#ifndef TQKVC_PREFILL_QUERIES_CUH
#define TQKVC_PREFILL_QUERIES_CUH

#include "cuda/frames.cuh"
#include "cuda/prefill_tile.cuh"

constexpr float TQKVC_QUERY_GAIN = 64.0f; /* a product is below D, which times this f16 still holds */

/* What a warp of prefill works on. */
template <int D> struct tqkvc_prefill_task {
    const tqkvc_frames &f;
    tqkvc_prefill_memory<D> &shared;
    tqkvc_rows tables;
    uint32_t g, warp, lane;
    float scale_log2;

    __device__ __forceinline__ const float *floats(const uint32_t (&parts)[2], int side) const
    {
        return reinterpret_cast<const float *>(f.image + parts[side]) + g * D;
    }

    __device__ __forceinline__ const uint4 *matrix(int side) const
    {
        return reinterpret_cast<const uint4 *>(f.image + f.shape.parts.matrix[side]) +
               (size_t)g * D * D / 4;
    }

    __device__ __forceinline__ uint32_t row(uint32_t i) const
    {
        return i / 16 * 64 + 16 * warp + i % 16;
    }
};

/* Two halves of a row in `base`, which has rows of queries, from channel d on, an even one. */
template <int D>
static __device__ __forceinline__ void put_halves(uint8_t *base, uint32_t row, uint32_t d, uint32_t x)
{
    *reinterpret_cast<uint32_t *>(base + piece_at<tqkvc_prefill_shape<D>::ROWS>(row, d / 8) +
                                  d % 8 * 2) = x;
}

/* Four rows from i on, of the rows of a warp, as a lane has them. */
template <int D>
static __device__ __forceinline__ void
load_query_rows(const tqkvc_prefill_task<D> &t, uint32_t i, const tqkvc_turn<D> &turn,
                float (&q)[4][2 * tqkvc_turn<D>::N])
{
    size_t at[4];

#pragma unroll
    for (int k = 0; k < 4; k++)
        at[k] = (size_t)t.shared.places[t.row(i + k)] * D;
    load_rows(t.f.q, at, turn.at, t.f.type, q);
}

/* The size of each row of a warp; returns the largest. A turn leaves rows below their size. */
template <int D> static __device__ float measure_rows(const tqkvc_prefill_task<D> &t)
{
    constexpr int N = 2 * tqkvc_turn<D>::N;
    tqkvc_turn<D> turn;
    float all = 1e-30f;

    turn.load(t.f, t.g, t.lane);
#pragma unroll 1
    for (uint32_t i = 0; i < 16 * tqkvc_prefill_shape<D>::M; i += 4) {
        float q[4][N];
        load_query_rows(t, i, turn, q);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float size = 1e-30f;
#pragma unroll
            for (int n = 0; n < N; n++)
                size = fmaxf(size, fabsf(q[k][n]));
            size = 1.5f * max_lanes(size);
            all = fmaxf(all, size);
            if (t.lane == 0)
                t.shared.sizes[t.row(i + k)] = size;
        }
    }
    __syncwarp();
    return all;
}

/* Turns the rows of a warp by -base and puts them where keys and values are, divided by their sizes. */
template <int D>
static __device__ void turn_rows(const tqkvc_prefill_task<D> &t, uint32_t base)
{
    constexpr int N = tqkvc_turn<D>::N;
    constexpr int ROWS = tqkvc_prefill_shape<D>::ROWS;
    tqkvc_turn<D> turn;

    turn.load(t.f, t.g, t.lane);
    turn.find_angles(base);
#pragma unroll 1
    for (uint32_t i = 0; i < 16 * tqkvc_prefill_shape<D>::M; i += 4) {
        float q[4][2 * N];
        load_query_rows(t, i, turn, q);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t row = t.row(i + k);
            const float inverse = __fdividef(1.0f, t.shared.sizes[row]);
            float dot = 0;
#pragma unroll
            for (int n = 0; n < 2 * N; n++) {
                const float a = q[k][n / 2 * 2], b = q[k][n / 2 * 2 + 1];
                const float x = n % 2 == 0 ? a * turn.cosine[n / 2] + b * turn.sine[n / 2]
                                           : b * turn.cosine[n / 2] - a * turn.sine[n / 2];
                const uint32_t d = turn.at[n];
                dot = fmaf(x, turn.mean[n], dot);
                *reinterpret_cast<__half *>(t.shared.keys + piece_at<ROWS>(row, d / 8) + d % 8 * 2) =
                    __float2half_rn(x * inverse);
            }
            dot = sum_lanes(dot);
            if (t.lane == 0)
                t.shared.means[row] = dot * t.scale_log2;
        }
    }
    __syncwarp();
}

/* The largest that a row of the matrix and the step of its unit make. */
template <int D>
static __device__ __forceinline__ float bound_queries(const tqkvc_prefill_task<D> &t, uint64_t widths)
{
    const float *row_scale = t.floats(t.f.shape.parts.row_scale, 0);
    float largest = 1e-30f;

#pragma unroll
    for (uint32_t d = t.lane; d < D; d += 32)
        largest = fmaxf(largest, __ldg(row_scale + d) * t.tables.step((int)unit_width(widths, d / 16)));
    return max_lanes(largest);
}

/* Row operands of 16 x 16 of a product of the matrix with 16 rows; PARTS of the matrix, and LOW rows at `low`. */
template <int D, bool LOW>
static __device__ __forceinline__ void
multiply_rows(const uint4 *matrix, uint32_t m, uint32_t high, uint32_t low,
              const tqkvc_prefill_task<D> &t, float (&c)[2 * tqkvc_prefill_shape<D>::M][4])
{
    using shape = tqkvc_prefill_shape<D>;
    float small[2 * shape::M][4] = {};

#pragma unroll
    for (int i = 0; i < 8 * shape::M; i++)
        c[i / 4][i % 4] = 0.0f;
#pragma unroll 4
    for (uint32_t k = 0; k < D / 16; k++) {
        const uint4 *operand = matrix + (size_t)(m * (D / 16) + k) * 64 + t.lane;
        const uint4 a = __ldg(operand), a_low = __ldg(operand + 32);
#pragma unroll
        for (int i = 0; i < shape::M; i++) {
            uint32_t b[4];
            load_columns_operand<shape::ROWS>(b, high, t.row(16 * i), k, t.lane);
            multiply_f16(c[2 * i], a, b[0], b[1]);
            multiply_f16(c[2 * i + 1], a, b[2], b[3]);
            multiply_f16(small[2 * i], a_low, b[0], b[1]);
            multiply_f16(small[2 * i + 1], a_low, b[2], b[3]);
            if (LOW) {
                load_columns_operand<shape::ROWS>(b, low, t.row(16 * i), k, t.lane);
                multiply_f16(small[2 * i], a, b[0], b[1]);
                multiply_f16(small[2 * i + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8 * shape::M; i++)
        c[i / 4][i % 4] += small[i / 4][i % 4];
}

/*
 * Queries of a frame for a tier. size: of the largest row of the warp. Returns what products with levels are to be
 * multiplied by. Nobody reads keys and values meanwhile; other warps may before a barrier.
 */
template <int D>
static __device__ float make_prefill_queries(const tqkvc_prefill_task<D> &t, uint32_t base,
                                             uint64_t widths, float size)
{
    using shape = tqkvc_prefill_shape<D>;
    const float bound = bound_queries(t, widths);
    const float *row_scale = t.floats(t.f.shape.parts.row_scale, 0);
    const uint32_t rows = shared_address(t.shared.keys), g = t.lane / 4, c4 = t.lane % 4;
    float factors[2 * shape::M][2]; /* of a lane's columns */

    turn_rows(t, base);
#pragma unroll
    for (int i = 0; i < 4 * shape::M; i++)
        factors[i / 2][i % 2] =
            __fdividef(t.shared.sizes[t.row(i / 2 * 8 + 2 * c4 + i % 2)], size) * TQKVC_QUERY_GAIN;
#pragma unroll 1
    for (uint32_t m = 0; m < shape::UNITS; m++) {
        const float step = __fdividef(t.tables.step((int)unit_width(widths, m)), bound);
        const float scale[2] = {__ldg(row_scale + m * 16 + g) * step,
                                __ldg(row_scale + m * 16 + g + 8) * step};
        float c[2 * shape::M][4];
        multiply_rows<D, false>(t.matrix(0), m, rows, 0, t, c);
#pragma unroll
        for (int i = 0; i < 2 * shape::M; i++) {
            const float(&f)[2] = factors[i];
            const uint32_t x = transposed(pack_halves(c[i][0] * scale[0] * f[0], c[i][1] * scale[0] * f[1])),
                           y = transposed(pack_halves(c[i][2] * scale[1] * f[0], c[i][3] * scale[1] * f[1]));
            uint8_t *to = t.shared.queries +
                          piece_at<shape::ROWS>(t.row(8 * i + g), 2 * m + c4 / 2) + c4 % 2 * 8;
            *reinterpret_cast<uint2 *>(to) = make_uint2(permute(x, y, 0x5410u), permute(x, y, 0x7632u));
        }
    }
    __syncwarp();
    return size * bound * t.scale_log2 / TQKVC_QUERY_GAIN;
}

/* Where rows of a block go: the output, or a part of it as f32. */
struct tqkvc_prefill_output {
    void *out;
    float *lse; /* or NULL */
    tqkv_cuda_type type;
    uint32_t first_place; /* place of its first row */
    uint32_t n_rows;      /* of the block that there are */
};

/* Sums to rows of both parts: the higher ones where queries were, the lower ones where keys and values were. */
template <int D>
static __device__ void put_sums(const tqkvc_prefill_task<D> &t, const tqkvc_prefill_output &to,
                                tqkvc_prefill_rows<D> &rows, float gain)
{
    using shape = tqkvc_prefill_shape<D>;

#pragma unroll
    for (int m = 0; m < shape::M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = rows.sum[m][h], zero = rows.zero[m][h];
            for (int i = 1; i < 4; i *= 2) {
                sum += __shfl_xor_sync(0xffffffffu, sum, i);
                zero += __shfl_xor_sync(0xffffffffu, zero, i);
            }
            const uint32_t row = t.row(16 * m + 8 * h + t.lane / 4);
            const float inverse = sum > 0 ? __fdividef(1.0f, sum) : 0.0f;
            if (t.lane % 4 == 0) {
                t.shared.shares[row] = (sum - zero) * inverse;
                if (to.lse && row < to.n_rows)
                    to.lse[t.shared.places[row] - to.first_place] =
                        sum > 0 ? (rows.top[m][h] + t.shared.means[row] + log2f(sum)) * 0.69314718f
                                : -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float factor = inverse * t.shared.v_steps[t.warp][n / 2] * gain;
                const float a = rows.sums[m][n][2 * h] * factor, b = rows.sums[m][n][2 * h + 1] * factor;
                const __half2 high = __floats2half2_rn(a, b);
                const float2 back = __half22float2(high);
                const uint32_t d = 8 * n + 2 * (t.lane % 4);
                put_halves<D>(t.shared.queries, row, d, *reinterpret_cast<const uint32_t *>(&high));
                put_halves<D>(t.shared.keys, row, d, pack_halves(a - back.x, b - back.y));
            }
        }
    }
    __syncwarp();
}

/* out = inverse of sums + mean nonzero, divided by sum. After a barrier behind the last tile. */
template <int D>
static __device__ void finish_rows(const tqkvc_prefill_task<D> &t, const tqkvc_prefill_output &to,
                                   tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    constexpr float GAIN = 16.0f; /* as in decode: sums are below 1024 */
    const float *row_scale = t.floats(t.f.shape.parts.row_scale, 1),
                *mean = t.floats(t.f.shape.parts.mean, 1);
    const uint32_t high = shared_address(t.shared.queries), low = shared_address(t.shared.keys);

    put_sums(t, to, rows, GAIN);
#pragma unroll 1
    for (uint32_t m = 0; m < shape::UNITS; m++) {
        const uint32_t d = m * 16 + t.lane / 4;
        const float scale[2] = {__ldg(row_scale + d) / GAIN, __ldg(row_scale + d + 8) / GAIN},
                    means[2] = {__ldg(mean + d), __ldg(mean + d + 8)};
        float c[2 * shape::M][4];
        multiply_rows<D, true>(t.matrix(1), m, high, low, t, c);
#pragma unroll
        for (int i = 0; i < 8 * shape::M; i++) {
            const uint32_t row = t.row(i / 4 * 8 + t.lane % 4 * 2 + i % 2);
            if (row < to.n_rows)
                store_value(to.out,
                            (size_t)(t.shared.places[row] - to.first_place) * D + d + i % 4 / 2 * 8,
                            to.type,
                            c[i / 4][i % 4] * scale[i % 4 / 2] +
                                means[i % 4 / 2] * t.shared.shares[row]);
        }
    }
}

#endif /* TQKVC_PREFILL_QUERIES_CUH */
