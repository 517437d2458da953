/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of a block of prefill before and after its tiles: queries of a frame on the way in, the inverse of V on the
 * way out. Four warps do their 64 rows together, on tensor cores: each brings 16 rows and multiplies a fourth of the
 * matrix with all 64, so that shared memory is read least. Both f16 parts of rows and matrix count; on devices with
 * little shared memory rows have no low parts.
 */
#ifndef TQKVC_PREFILL_QUERIES_CUH
#define TQKVC_PREFILL_QUERIES_CUH

#include "cuda/frames.cuh"
#include "cuda/prefill_tile.cuh"

/* What a warp of prefill works on. */
template <int D> struct tqkvc_prefill_task {
    const tqkvc_frames &f;
    tqkvc_prefill_memory<D> &shared;
    uint8_t *low;           /* low parts of rows, or NULL */
    const uint4 *matrices[2]; /* in shared memory where there is room */
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
        return 16 * warp + i;
    }
};

/* Where channel d of a row of f16 is. */
template <int D> static __device__ __forceinline__ uint32_t half_at(uint32_t row, uint32_t d)
{
    return piece_at<tqkvc_prefill_shape<D>::ROWS>(row, d / 8) + d % 8 * 2;
}

/* A value as two f16, the high one returned. */
static __device__ __forceinline__ __half split_half(float x, __half &low)
{
    const __half high = __float2half_rn(x);
    low = __float2half_rn(x - __half2float(high));
    return high;
}

constexpr int TQKVC_LOADED_ROWS = 8; /* at once: their latency is what a frame waits for */

/* Rows from i on, of the rows of a warp, as a lane has them. */
template <int D>
static __device__ __forceinline__ void
load_query_rows(const tqkvc_prefill_task<D> &t, uint32_t i, const tqkvc_turn<D> &turn,
                float (&q)[TQKVC_LOADED_ROWS][2 * tqkvc_turn<D>::N])
{
    size_t at[TQKVC_LOADED_ROWS];

#pragma unroll
    for (int k = 0; k < TQKVC_LOADED_ROWS; k++)
        at[k] = (size_t)t.shared.places[t.row(i + k)] * D;
    load_rows(t.f.q, at, turn.at, t.f.type, q);
}

/* The size of each row of a warp. A turn leaves rows below their size. */
template <int D> static __device__ void measure_rows(const tqkvc_prefill_task<D> &t)
{
    constexpr int N = 2 * tqkvc_turn<D>::N;
    tqkvc_turn<D> turn;

    turn.load(t.f, t.g, t.lane);
#pragma unroll 1
    for (uint32_t i = 0; i < 16; i += TQKVC_LOADED_ROWS) {
        float q[TQKVC_LOADED_ROWS][N];
        load_query_rows(t, i, turn, q);
#pragma unroll
        for (int k = 0; k < TQKVC_LOADED_ROWS; k++) {
            float size = 1e-30f;
#pragma unroll
            for (int n = 0; n < N; n++)
                size = fmaxf(size, fabsf(q[k][n]));
            size = 1.5f * max_lanes(size);
            if (t.lane == 0)
                t.shared.sizes[t.row(i + k)] = size;
        }
    }
    __syncwarp();
}

/* Turns the rows of a warp by -base and puts them where queries are to be, divided by their sizes. */
template <int D>
static __device__ void turn_rows(const tqkvc_prefill_task<D> &t, uint32_t base)
{
    constexpr int N = tqkvc_turn<D>::N;
    tqkvc_turn<D> turn;

    turn.load(t.f, t.g, t.lane);
    turn.find_angles(base);
#pragma unroll 1
    for (uint32_t i = 0; i < 16; i += TQKVC_LOADED_ROWS) {
        float q[TQKVC_LOADED_ROWS][2 * N];
        load_query_rows(t, i, turn, q);
#pragma unroll
        for (int k = 0; k < TQKVC_LOADED_ROWS; k++) {
            const uint32_t row = t.row(i + k);
            const float inverse = __fdividef(1.0f, t.shared.sizes[row]);
            float dot = 0;
#pragma unroll
            for (int n = 0; n < 2 * N; n++) {
                const float a = q[k][n / 2 * 2], b = q[k][n / 2 * 2 + 1];
                const float x = n % 2 == 0 ? a * turn.cosine[n / 2] + b * turn.sine[n / 2]
                                           : b * turn.cosine[n / 2] - a * turn.sine[n / 2];
                const uint32_t at = half_at<D>(row, turn.at[n]);
                __half low;
                dot = fmaf(x, turn.mean[n], dot);
                *reinterpret_cast<__half *>(t.shared.queries + at) = split_half(x * inverse, low);
                if (t.low)
                    *reinterpret_cast<__half *>(t.low + at) = low;
            }
            dot = sum_lanes(dot);
            if (t.lane == 0)
                t.shared.means[row] = dot * t.scale_log2;
        }
    }
    __syncwarp();
}

/* Rows 16 m .. 16 m + 15 of the matrix times the 64 rows of four warps: c[i] is the product with rows 8 i .. 8 i + 7. */
template <int D>
static __device__ __forceinline__ void multiply_rows(const tqkvc_prefill_task<D> &t, const uint4 *matrix, uint32_t m,
                                                     float (&c)[8][4])
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t high = shared_address(t.shared.queries), low = shared_address(t.low), first = t.warp / 4 * 64;

#pragma unroll
    for (int i = 0; i < 32; i++)
        c[i / 4][i % 4] = 0.0f;
#pragma unroll 4
    for (uint32_t k = 0; k < D / 16; k++) {
        const uint4 *operand = matrix + (size_t)(m * (D / 16) + k) * 32 + t.lane;
        const uint4 a = operand[0], a_low = operand[D * D / 8];
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t b[4];
            load_columns_operand<shape::ROWS>(b, high, first + 8 * n, k, t.lane);
            multiply_f16(c[n], a_low, b[0], b[1]);
            multiply_f16(c[n + 1], a_low, b[2], b[3]);
            multiply_f16(c[n], a, b[0], b[1]);
            multiply_f16(c[n + 1], a, b[2], b[3]);
        }
        if (!t.low)
            continue;
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t b[4];
            load_columns_operand<shape::ROWS>(b, low, first + 8 * n, k, t.lane);
            multiply_f16(c[n], a, b[0], b[1]);
            multiply_f16(c[n + 1], a, b[2], b[3]);
        }
    }
}

/* Products of a warp, of units 4 i + warp % 4, with 64 rows. */
template <int D> struct tqkvc_query_products {
    static constexpr int N = D / 64;
    float c[N][8][4];
};

/* The largest of each row, of all four warps, after a barrier among them: of rows 8 n + 2 (lane % 4) and the next. */
template <int D>
static __device__ __forceinline__ void find_largest(const tqkvc_prefill_task<D> &t,
                                                    const tqkvc_query_products<D> &products, float (&out)[8][2])
{
    const uint32_t group = t.warp / 4 * 4, row = 2 * (t.lane % 4);

#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = 1e-30f;
#pragma unroll
            for (int u = 0; u < tqkvc_query_products<D>::N; u++)
                largest = fmaxf(largest, fmaxf(fabsf(products.c[u][n][i]), fabsf(products.c[u][n][i + 2])));
            for (int k = 4; k < 32; k *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, k));
            if (t.lane < 4)
                t.shared.largest[t.warp][8 * n + row + i] = largest;
        }
    }
    sync_warps(2 + t.warp / 4, 4);
#pragma unroll
    for (int n = 0; n < 8; n++) {
        out[n][0] = out[n][1] = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float2 x = *reinterpret_cast<const float2 *>(&t.shared.largest[group + w][8 * n + row]);
            out[n][0] = fmaxf(out[n][0], x.x);
            out[n][1] = fmaxf(out[n][1], x.y);
        }
    }
}

/* Unit m of a row as whole numbers: channels g and g + 8, by lane 4 g + .. */
template <int D>
static __device__ __forceinline__ void put_query(const tqkvc_prefill_task<D> &t, uint32_t row, uint32_t m, int x, int y)
{
    using shape = tqkvc_prefill_shape<D>;
    const uint32_t at = t.lane / 4 * 2;
    const int high_x = (x + 128) >> 8, high_y = (y + 128) >> 8;

    *reinterpret_cast<uint16_t *>(t.shared.queries + piece_at<shape::ROWS>(row, m) + at) =
        (uint16_t)((high_x & 255) | high_y << 8);
    *reinterpret_cast<uint16_t *>(t.shared.queries + piece_at<shape::ROWS>(row, shape::UNITS + m) + at) =
        (uint16_t)((x & 255) | y << 8); /* what the high byte leaves, modulo 256 */
}

/*
 * Queries of a frame for a tier, as whole numbers, of the rows of four warps. factors: what products with levels are
 * to be multiplied by, with the scale. Nobody reads these queries meanwhile, nor before a barrier behind it.
 */
template <int D>
static __device__ void make_prefill_queries(const tqkvc_prefill_task<D> &t, uint32_t base, uint64_t widths)
{
    constexpr float MOST = 32512.0f; /* the high byte stays within +-127 */
    constexpr int N = tqkvc_query_products<D>::N;
    const float *row_scale = t.floats(t.f.shape.parts.row_scale, 0);
    const uint32_t g = t.lane / 4, first = t.warp / 4 * 64;
    tqkvc_query_products<D> products;
    float largest[8][2];

    turn_rows(t, base);
    sync_warps(2 + t.warp / 4, 4);
#pragma unroll
    for (int u = 0; u < N; u++) {
        const uint32_t m = 4 * u + t.warp % 4;
        const float step = t.tables.step((int)unit_width(widths, m));
        const float scale[2] = {__ldg(row_scale + m * 16 + g) * step, __ldg(row_scale + m * 16 + g + 8) * step};
        multiply_rows(t, t.matrices[0], m, products.c[u]);
#pragma unroll
        for (int i = 0; i < 32; i++)
            products.c[u][i / 4][i % 4] *= scale[i % 4 / 2];
    }
    find_largest(t, products, largest);
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = first + 8 * n + 2 * (t.lane % 4) + i;
            const float factor = __fdividef(MOST, largest[n][i]);
            if (n / 2 == (int)(t.warp % 4) && g == 0)
                t.shared.factors[row] = largest[n][i] * (1.0f / MOST) * t.shared.sizes[row] * t.scale_log2;
#pragma unroll
            for (int u = 0; u < N; u++)
                put_query(t, row, 4 * u + t.warp % 4, __float2int_rn(products.c[u][n][i] * factor),
                          __float2int_rn(products.c[u][n][i + 2] * factor));
        }
    }
}

/* Where rows of a block go: the output, or a part of it as f32. */
struct tqkvc_prefill_output {
    void *out;
    float *lse; /* or NULL */
    tqkv_cuda_type type;
    uint32_t first_place; /* place of its first row */
    uint32_t n_rows;      /* of the block that there are */
};

/* Sums to rows of both parts. */
template <int D>
static __device__ void put_sums(const tqkvc_prefill_task<D> &t, const tqkvc_prefill_output &to,
                                tqkvc_prefill_rows<D> &rows, float gain)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = rows.sum[h], zero = rows.zero[h];
        for (int i = 1; i < 4; i *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, i);
            zero += __shfl_xor_sync(0xffffffffu, zero, i);
        }
        const uint32_t row = t.row(8 * h + t.lane / 4);
        const float inverse = sum > 0 ? __fdividef(1.0f, sum) : 0.0f;
        if (t.lane % 4 == 0) {
            t.shared.shares[row] = (sum - zero) * inverse;
            if (to.lse && row < to.n_rows)
                to.lse[t.shared.places[row] - to.first_place] =
                    sum > 0 ? (rows.top[h] + t.shared.means[row] + log2f(sum)) * TQKVC_LN_2 : -INFINITY;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float factor = inverse * t.shared.v_steps[t.warp][n / 2] * gain;
            const float a = rows.sums[n][2 * h] * factor, b = rows.sums[n][2 * h + 1] * factor;
            const uint32_t at = half_at<D>(row, 8 * n + 2 * (t.lane % 4)), high = pack_halves(a, b);
            const float2 back = __half22float2(*reinterpret_cast<const __half2 *>(&high));
            *reinterpret_cast<uint32_t *>(t.shared.queries + at) = high;
            if (t.low)
                *reinterpret_cast<uint32_t *>(t.low + at) = pack_halves(a - back.x, b - back.y);
        }
    }
    __syncwarp();
}

/* out = inverse of sums + mean nonzero, divided by sum. Nobody reads the queries of the four warps any more. */
template <int D>
static __device__ void finish_rows(const tqkvc_prefill_task<D> &t, const tqkvc_prefill_output &to,
                                   tqkvc_prefill_rows<D> &rows)
{
    using shape = tqkvc_prefill_shape<D>;
    constexpr float GAIN = 16.0f; /* as in decode: sums are below 1024 */
    const float *row_scale = t.floats(t.f.shape.parts.row_scale, 1),
                *mean = t.floats(t.f.shape.parts.mean, 1);

    put_sums(t, to, rows, GAIN);
    sync_warps(2 + t.warp / 4, 4);
#pragma unroll 1
    for (uint32_t m = t.warp % 4; m < shape::UNITS; m += 4) {
        const uint32_t d = m * 16 + t.lane / 4;
        const float scale[2] = {__ldg(row_scale + d) / GAIN, __ldg(row_scale + d + 8) / GAIN},
                    means[2] = {__ldg(mean + d), __ldg(mean + d + 8)};
        float c[8][4];
        multiply_rows(t, t.matrices[1], m, c);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const uint32_t row = t.warp / 4 * 64 + i / 4 * 8 + t.lane % 4 * 2 + i % 2;
            if (row < to.n_rows)
                store_value(to.out,
                            (size_t)(t.shared.places[row] - to.first_place) * D + d + i % 4 / 2 * 8, to.type,
                            c[i / 4][i % 4] * scale[i % 4 / 2] + means[i % 4 / 2] * t.shared.shares[row]);
        }
    }
}

#endif /* TQKVC_PREFILL_QUERIES_CUH */
