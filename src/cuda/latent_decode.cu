/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode of a latent layer: all query heads of a sequence share one latent per token, which is key and value. A block
 * of threads has 16, 32 or 64 query rows (query token * heads + head) and a part of the tokens; parts are merged by a
 * second launch. Latents stay in coded space (cuda.h), so nothing is multiplied with their 512 x 512 matrix here; the
 * rotated keys have frames, and a matrix of 64 x 64 per frame for each row.
 */
#include "cuda/latent_tile.cuh"

namespace
{

constexpr uint32_t WARPS = TQKVC_LATENT_WARPS, THREADS = 32 * WARPS;
constexpr uint32_t TOKENS = TQKVC_LATENT_TOKENS, BLOCKS = TOKENS / 16;
constexpr uint32_t V = TQKVC_LATENT_DIM, K = TQKVC_LATENT_K_DIM, ALL = 0xffffffffu;
constexpr float Q_MAX = 16384.0f; /* of a row in f16 */

/* A power of two that brings the largest of a row below Q_MAX; 1 where that needs nothing, so that f16 stays as it is. */
__device__ __forceinline__ float row_factor(float largest)
{
    if (!(largest > Q_MAX) && !(largest < 0.25f && largest > 1e-30f))
        return 1.0f;
    return __uint_as_float((__float_as_uint(largest) & 0x7f800000u)) * (1.0f / 8192.0f);
}

__device__ __forceinline__ float max_of_warp(float size) /* not negative */
{
    return __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(size)));
}

__device__ __forceinline__ float sum_of_warp(float x)
{
#pragma unroll
    for (int n = 16; n > 0; n /= 2)
        x += __shfl_xor_sync(ALL, x, n);
    return x;
}

/* A tile, as the first warp knows it: loads that nothing has waited for. */
struct latent_spot {
    uint32_t tier, n, cell; /* n: blocks; cell: of this lane's block in its page, in blocks */
    int32_t page;
};

template <int M> struct latent_block {
    using memory_type = tqkvc_latent_memory<M>;
    static constexpr uint32_t ROWS = 16 * M;

    const tqkvc_latent_decode &p;
    memory_type &memory;
    uint8_t *staged;
    uint32_t seq, first_row; /* of the sequence */
    int32_t length;

    /* By the first warp: lane b has block b. */
    __device__ __forceinline__ latent_spot find(uint32_t tile) const
    {
        const tqkv_cuda_pages &pages = p.pages;
        const uint32_t token = tile * TOKENS + 16 * (threadIdx.x % 32);
        latent_spot spot = {p.shape.n_tiers - 1, 0, 0, 0};

        if (tile * TOKENS >= (uint32_t)length)
            return spot;
        spot.n = min(BLOCKS, ((uint32_t)length - tile * TOKENS + 15) / 16);
        if (pages.tiers)
            spot.tier = pages.tiers[(size_t)seq * pages.tiers_stride + tile * TOKENS / TQKV_CUDA_TILE_TOKENS];
        if (threadIdx.x % 32 < spot.n) {
            spot.page = pages.block_table[(size_t)seq * pages.table_stride + token / pages.page_tokens];
            spot.cell = token % pages.page_tokens / 16;
        }
        return spot;
    }

    /* By the first warp: starts the copy of a tile. */
    __device__ __forceinline__ void fetch(const latent_spot &spot, uint32_t stage) const
    {
        const uint32_t lane = threadIdx.x % 32, n_bytes = p.shape.block_bytes[spot.tier];

        const uint8_t *block = static_cast<const uint8_t *>(p.pages.pool[spot.tier]) +
                               (size_t)spot.page * p.page_bytes[spot.tier] + (size_t)spot.cell * n_bytes;

        ring_copy(&memory.barriers[stage], staged + stage * p.staged_bytes + lane * n_bytes, block, n_bytes, spot.n, lane);
        if (lane == 0)
            memory.tiers[stage] = spot.tier;
    }

    __device__ __forceinline__ void load_tables() const
    {
        const tqkvc_tables &tables = *reinterpret_cast<const tqkvc_tables *>(p.image);
        const uint32_t *units = reinterpret_cast<const uint32_t *>(p.image + p.shape.parts.latent_units);
        const uint32_t n_words = p.shape.n_tiers * (uint32_t)sizeof(tqkvc_latent_units) / 4;

        for (uint32_t i = threadIdx.x; i < TQKVC_WIDTHS * (TQKVC_WORDS + 1); i += THREADS)
            memory.tables[i / 16][i % 16] = reinterpret_cast<const uint32_t *>(&tables.widths[i / 16])[i % 16];
        for (uint32_t i = threadIdx.x; i < 256; i += THREADS)
            memory.scale_values[i] = tables.encode.scale_values[i];
        for (uint32_t i = threadIdx.x; i < n_words; i += THREADS)
            reinterpret_cast<uint32_t *>(memory.units)[i] = units[i];
    }

    __device__ __forceinline__ size_t row_at(uint32_t r) const
    {
        return (size_t)seq * p.n_rows + first_row + r;
    }

    /* The part of queries for latents. */
    __device__ __forceinline__ void load_latent_queries() const
    {
        const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.coded_mean);
        const uint32_t lane = threadIdx.x % 32;
        uint32_t at[V / 32];

#pragma unroll
        for (uint32_t i = 0; i < V / 32; i++)
            at[i] = 32 * i;
#pragma unroll 1
        for (uint32_t r = threadIdx.x / 32; r < ROWS; r += WARPS) {
            const size_t row[1] = {row_at(min(r, p.n_rows - first_row - 1)) * (V + K) + lane};
            float loaded[1][V / 32], x[V / 32], largest = 0, bias = 0;
            load_rows(p.q, row, at, p.type, loaded);
#pragma unroll
            for (uint32_t i = 0; i < V / 32; i++) {
                x[i] = first_row + r < p.n_rows ? loaded[0][i] : 0.0f;
                largest = fmaxf(largest, fabsf(x[i]));
                bias += x[i] * mean[32 * i + lane];
            }
            const float factor = row_factor(max_of_warp(largest)), inverse = 1.0f / factor;
            bias = sum_of_warp(bias);
#pragma unroll
            for (uint32_t i = 0; i < V / 32; i++)
                memory.q[r][32 * i + lane] = __float2half_rn(x[i] * inverse);
            if (lane == 0) {
                memory.factor[TQKV_SIDE_V][r] = factor * p.scale_log2;
                memory.bias[TQKV_SIDE_V][r] = bias * p.scale_log2;
            }
        }
    }

    /* The rotated part, for keys of a frame: turned back by its base, times the matrix. */
    __device__ __forceinline__ void load_key_queries(int32_t base) const
    {
        const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.mean[TQKV_SIDE_K]);
        const float *inv_freq = reinterpret_cast<const float *>(p.image + p.shape.parts.inv_freq);
        const float2 *matrix = reinterpret_cast<const float2 *>(p.image + p.shape.parts.query_matrix);
        constexpr int OF_WARP = ROWS / WARPS;
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const tqkvc_pair pair = find_pair(p.shape, lane);
        float sine = 0.0f, cosine = 1.0f, sums[OF_WARP][2] = {};

        const uint32_t of_pair[2] = {pair.a, pair.b};
        size_t row[OF_WARP];
        float q[OF_WARP][2];
#pragma unroll
        for (int i = 0; i < OF_WARP; i++)
            row[i] = row_at(min(WARPS * i + warp, p.n_rows - first_row - 1)) * (V + K) + V;
        load_rows(p.q, row, of_pair, p.type, q);
        if (pair.turns)
            turn_fast(turns_per_position(inv_freq[lane]), base, sine, cosine);
#pragma unroll
        for (int i = 0; i < OF_WARP; i++) {
            const uint32_t r = WARPS * i + warp;
            const bool is_there = first_row + r < p.n_rows;
            const float a = is_there ? q[i][0] : 0.0f, b = is_there ? q[i][1] : 0.0f;
            const float x = a * cosine + b * sine, y = b * cosine - a * sine;
            memory.turned[r][pair.a] = x;
            memory.turned[r][pair.b] = y;
            const float bias = sum_of_warp(x * mean[pair.a] + y * mean[pair.b]);
            if (lane == 0)
                memory.bias[TQKV_SIDE_K][r] = bias * p.scale_log2;
        }
        __syncwarp();
#pragma unroll 16
        for (uint32_t k = 0; k < K; k++) {
            const float2 m = __ldg(&matrix[k * (K / 2) + lane]);
#pragma unroll
            for (int i = 0; i < OF_WARP; i++) {
                const float x = memory.turned[WARPS * i + warp][k];
                sums[i][0] += x * m.x;
                sums[i][1] += x * m.y;
            }
        }
#pragma unroll
        for (int i = 0; i < OF_WARP; i++) {
            const uint32_t r = WARPS * i + warp;
            const float factor = row_factor(max_of_warp(fmaxf(fabsf(sums[i][0]), fabsf(sums[i][1]))));
#pragma unroll
            for (uint32_t j = 0; j < 2; j++) {
                const uint32_t d = 2 * lane + j;
                memory.q[r][V + d / 16 * 16 + latent_k_place(d % 16)] = __float2half_rn(sums[i][j] * (1.0f / factor));
            }
            if (lane == 0)
                memory.factor[TQKV_SIDE_K][r] = factor * p.scale_log2;
        }
        __syncthreads();
    }

    /* Tokens before which a row sees. */
    __device__ __forceinline__ int32_t limit_of(uint32_t r) const
    {
        return length - (int32_t)(p.q_len - 1) + (int32_t)((first_row + r) / p.shape.n_heads);
    }

    /* Tiles [tile, end). Returns the step of this warp's sums. */
    __device__ __forceinline__ float read(uint32_t tile, uint32_t end, tqkvc_latent_row &mine, float (&sums)[M][8][4])
    {
        const bool fetches = threadIdx.x < 32, has_two = p.n_stages == 2;
        const int32_t limit = limit_of(threadIdx.x / (THREADS / ROWS));
        uint32_t frame_end = 0;
        float step = 1.0f;
        latent_spot next = {};

        if (fetches) {
            fetch(find(tile), 0);
            next = find(tile + 1);
        }
        __syncthreads();
        for (uint32_t i = 0; tile < end; tile++, i++) {
            const uint32_t stage = has_two ? i % 2 : 0, phase = (has_two ? i / 2 : i) % 2, first = tile * TOKENS;

            if (first >= frame_end) {
                const uint32_t frame = first / p.frame_tokens;
                frame_end = (frame + 1) * p.frame_tokens;
                load_key_queries((int32_t)(frame * p.frame_tokens));
            }
            if (has_two && fetches && tile + 1 < end) {
                fetch(next, stage ^ 1);
                next = find(tile + 2);
            }
            ring_wait(&memory.barriers[stage], phase);
            const uint32_t tier = memory.tiers[stage];
            const tqkvc_latent_steps steps =
                expand(memory, staged + stage * p.staged_bytes, p.shape.block_bytes[tier], tier,
                       min((uint32_t)length - first, TOKENS));
            score(memory, steps);
            __syncthreads();
            if (!has_two && fetches && tile + 1 < end) {
                fetch(next, 0);
                next = find(tile + 2);
            }
            weigh(memory, mine, (int32_t)first, limit);
            __syncthreads();
            add_values(memory, step == steps.v ? 1.0f : step / steps.v, sums);
            step = steps.v;
            __syncwarp();
        }
        return step;
    }

    /* To the output, or to a part. */
    __device__ __forceinline__ void write(const tqkvc_latent_row &mine, float step, const float (&sums)[M][8][4]) const
    {
        constexpr uint32_t OF_ROW = THREADS / ROWS;
        const float *mean = reinterpret_cast<const float *>(p.image + p.shape.parts.coded_mean);
        const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / OF_ROW;
        const bool is_part = p.n_splits > 1;
        float sum = mine.sum, of_mean = mine.sum_of_mean;

#pragma unroll
        for (uint32_t n = OF_ROW / 2; n > 0; n /= 2) {
            sum += __shfl_xor_sync(ALL, sum, n);
            of_mean += __shfl_xor_sync(ALL, of_mean, n);
        }
        if (threadIdx.x % OF_ROW == 0 && first_row + row < p.n_rows) {
            const float by = is_part ? 1.0f : sum > 0 ? 1.0f / sum : 0.0f;
            memory.end[0][row] = mine.unit * by;
            memory.end[1][row] = of_mean * by;
            if (is_part)
                reinterpret_cast<float2 *>(p.part_sums)[row_at(row) * p.n_splits + blockIdx.x] =
                    make_float2(mine.top, sum);
            else if (p.lse)
                p.lse[row_at(row)] = sum > 0 ? (mine.top + log2f(sum)) * TQKVC_LN_2 : -INFINITY;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            const uint32_t r = 8 * i + lane / 4;
            if (first_row + r >= p.n_rows)
                continue;
            const float factor = memory.end[0][r] * step, of_means = memory.end[1][r];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint32_t d = threadIdx.x / 32 * TQKVC_LATENT_CHANNELS + 8 * j + lane % 4 * 2;
                const float *x = &sums[i / 2][j][i % 2 * 2];
                const float a = x[0] * factor + mean[d] * of_means, b = x[1] * factor + mean[d + 1] * of_means;
                if (is_part) {
                    *reinterpret_cast<float2 *>(&p.parts[(row_at(r) * p.n_splits + blockIdx.x) * V + d]) =
                        make_float2(a, b);
                } else {
                    store_value(p.out, row_at(r) * V + d, p.type, a);
                    store_value(p.out, row_at(r) * V + d + 1, p.type, b);
                }
            }
        }
    }
};

template <int M>
__global__ void __launch_bounds__(THREADS, M == 1 ? 2 : 1)
    latent_kernel(const __grid_constant__ tqkvc_latent_decode p)
{
    extern __shared__ __align__(128) uint8_t bytes[];
    tqkvc_latent_memory<M> &memory = *reinterpret_cast<tqkvc_latent_memory<M> *>(bytes);
    const uint32_t seq = blockIdx.z;
    latent_block<M> block = {p, memory, bytes + (sizeof(memory) + 127) / 128 * 128, seq, blockIdx.y * 16 * M,
                             min(p.seq_lens[seq], (int32_t)p.max_tokens)};
    const uint32_t n_tiles = (uint32_t)(max(block.length, 0) + TOKENS - 1) / TOKENS,
                   of_part = (n_tiles + p.n_splits - 1) / p.n_splits, first = blockIdx.x * of_part;
    tqkvc_latent_row mine;
    float sums[M][8][4] = {};

    if (threadIdx.x < 2)
        ring_barrier_init(&memory.barriers[threadIdx.x]);
    block.load_tables();
    block.load_latent_queries();
    __syncthreads();
    float step = 1.0f;
    if (first < n_tiles)
        step = block.read(first, min(first + of_part, n_tiles), mine, sums);
    block.write(mine, step, sums);
}

/* One row: sums of all parts. */
__global__ void __launch_bounds__(V / 4) merge_kernel(const __grid_constant__ tqkvc_latent_decode p)
{
    const size_t row = blockIdx.x;
    const float2 *of_parts = reinterpret_cast<const float2 *>(p.part_sums) + row * p.n_splits;
    const float4 *parts = reinterpret_cast<const float4 *>(p.parts + row * p.n_splits * V);
    float top = -INFINITY, sum = 0;
    float4 x = {};

    for (uint32_t i = 0; i < p.n_splits; i++)
        top = fmaxf(top, of_parts[i].x);
    for (uint32_t i = 0; i < p.n_splits && top > -INFINITY; i++) {
        const float factor = exp2_fast(of_parts[i].x - top);
        if (factor == 0)
            continue;
        const float4 y = parts[i * (V / 4) + threadIdx.x];
        sum += of_parts[i].y * factor;
        x = make_float4(x.x + y.x * factor, x.y + y.y * factor, x.z + y.z * factor, x.w + y.w * factor);
    }
    const float by = sum > 0 ? 1.0f / sum : 0.0f;
    const size_t at = row * V + 4 * threadIdx.x;
    store_value(p.out, at, p.type, x.x * by);
    store_value(p.out, at + 1, p.type, x.y * by);
    store_value(p.out, at + 2, p.type, x.z * by);
    store_value(p.out, at + 3, p.type, x.w * by);
    if (threadIdx.x == 0 && p.lse)
        p.lse[row] = sum > 0 ? (top + log2f(sum)) * TQKVC_LN_2 : -INFINITY;
}

template <int M> tqkv_status launch(const tqkvc_latent_decode &p, cudaStream_t stream)
{
    const auto kernel = latent_kernel<M>;
    const uint32_t bytes = tqkvc_latent_shared_bytes(M, p.staged_bytes, p.n_stages);
    const dim3 grid(p.n_splits, (p.n_rows + 16 * M - 1) / (16 * M), p.n_seqs);

    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    kernel<<<grid, THREADS, bytes, stream>>>(p);
    if (p.n_splits > 1)
        merge_kernel<<<p.n_seqs * p.n_rows, V / 4, 0, stream>>>(p);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}

} // namespace

extern "C" uint32_t tqkvc_latent_shared_bytes(uint32_t row_tiles, uint32_t staged_bytes, uint32_t n_stages)
{
    const size_t bytes = row_tiles == 1   ? sizeof(tqkvc_latent_memory<1>)
                         : row_tiles == 2 ? sizeof(tqkvc_latent_memory<2>)
                                          : sizeof(tqkvc_latent_memory<4>);
    return (uint32_t)((bytes + 127) / 128 * 128) + n_stages * staged_bytes;
}

extern "C" tqkv_status tqkvc_launch_latent_decode(const tqkvc_latent_decode *decode, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    return decode->row_tiles == 1 ? launch<1>(*decode, s) : decode->row_tiles == 2 ? launch<2>(*decode, s)
                                                                                   : launch<4>(*decode, s);
}
