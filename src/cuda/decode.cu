/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Decode: attention of a few query rows over the pages of a sequence.
 *
 *     block   KV head x up to R query rows x part of the tokens ("split") of one sequence
 *     warp    a run of tiles of 64 tokens of it, with a ring of tiles of its own; no barrier inside
 *     merge   the warps of a block in shared memory; the splits by the last block that arrives
 *     finish  sums of V times the inverse of the transform on tensor cores, mean, output
 *
 * Every byte of K and V is read once for up to R rows, by bulk copies of a section (K and V of a head
 * in a block, 2080 bytes at 4 bits and 128 channels); queries of frames add 2 % at frames of 256.
 */
#include "cuda/columns.cuh"
#include "cuda/decode_tile.cuh"
#include "cuda/ring.cuh"

namespace {

constexpr uint32_t STAGES_MAX = 8;
constexpr uint32_t ALL = 0xffffffffu;

template <int D, int R> struct block_memory {
    uint32_t tables[TQKVC_WIDTHS][16];
    float steps[16];
    float stats[TQKVC_WARPS][3][R]; /* top, sum, nonzero */
    float factors[TQKVC_SPLITS_MAX][R];
    float total[3][R];
    uint32_t is_last, pad[3];
    uint64_t barriers[TQKVC_WARPS][STAGES_MAX];
    tqkvc_warp_memory<D, R> warps[TQKVC_WARPS];
};

/* Floats of a part: sums as in tqkvc_warp_memory, then top, sum, nonzero of each row. */
template <int D, int R> constexpr uint32_t PART_FLOATS = D * R + 3 * R;

/* What the blocks of one sequence, KV head and row tile share. */
struct task {
    uint32_t seq, g, row_tile, split, length, first_tile, end_tile, n_parts;
};

__device__ task find_task(const tqkvc_decode &p, uint32_t rows_per_tile)
{
    const uint32_t n_row_tiles = (p.frames.n_rows + rows_per_tile - 1) / rows_per_tile;
    task t = {.seq = blockIdx.z, .g = blockIdx.y / n_row_tiles, .row_tile = blockIdx.y % n_row_tiles, .split = blockIdx.x};
    t.length = max(p.frames.seq_lens[t.seq], 0);
    const uint32_t n_tiles = (t.length + TQKV_CUDA_TILE_TOKENS - 1) / TQKV_CUDA_TILE_TOKENS;
    const uint32_t each = (n_tiles + p.n_splits - 1) / p.n_splits;
    const uint32_t whole = (each + TQKVC_WARPS - 1) / TQKVC_WARPS * TQKVC_WARPS; /* warps alike */
    t.n_parts = n_tiles == 0 ? 1 : (n_tiles + whole - 1) / whole;
    t.first_tile = min(t.split * whole, n_tiles);
    t.end_tile = min(t.first_tile + whole, n_tiles);
    return t;
}

/* A warp and where it is. */
template <int D, int R> struct worker {
    const tqkvc_decode &p;
    const task &t;
    block_memory<D, R> &shared;
    tqkvc_warp_memory<D, R> &memory;
    uint8_t *ring;
    uint64_t *barriers;
    uint32_t lane;
    uint32_t phases = 0; /* bit per stage */
    tqkvc_row_state<R> rows;
};

template <int D, int R> __device__ void start_rows(worker<D, R> &w)
{
    const uint32_t group = w.p.frames.shape.n_heads / w.p.frames.shape.n_kv_heads;

    for (int h = 0; h < R / 4; h++) {
        const uint32_t row = w.t.row_tile * R + w.lane % 4 * (R / 4) + h;
        const int limit = (int)w.t.length - (int)w.p.frames.q_len + (int)(row / group) + 1;
        w.rows.limit[h] = row < w.p.frames.n_rows ? max(limit, 0) : 0;
        w.rows.top[h] = TQKVC_LOWEST;
        w.rows.sum[h] = w.rows.nonzero[h] = 0;
    }
    for (uint32_t i = w.lane; i < D * R; i += 32)
        (&w.memory.sums[0][0][0])[i] = 0;
}

/* Writes the bytes of value `whole` of channel j of row r to the column operands. */
template <int D, int R>
__device__ void put_query(tqkvc_warp_memory<D, R> &memory, uint32_t r, uint32_t j, int high, int low)
{
    const uint32_t byte = (j & 1) * 2 + (j % 16 >> 3), word = j % 8 / 2;
    uint8_t *to_high, *to_low;

    if constexpr (R == 4) {
        to_high = reinterpret_cast<uint8_t *>(&memory.q[0][j / 16][8 * r + word]);
        to_low = reinterpret_cast<uint8_t *>(&memory.q[0][j / 16][8 * r + 4 + word]);
    } else {
        to_high = reinterpret_cast<uint8_t *>(&memory.q[0][j / 16][4 * r + word]);
        to_low = reinterpret_cast<uint8_t *>(&memory.q[1][j / 16][4 * r + word]);
    }
    to_high[byte] = (uint8_t)high;
    to_low[byte] = (uint8_t)low;
}

/* Makes the queries of a frame for the widths of a tier: times the steps, as whole numbers. */
template <int D, int R> __device__ void load_queries(worker<D, R> &w, uint32_t frame, uint64_t widths)
{
    constexpr int N = D / 32; /* channels of a lane */
    const tqkvc_frames &f = w.p.frames;
    const size_t place = ((size_t)(w.t.seq * f.shape.n_kv_heads + w.t.g) * f.n_frames + frame) * f.n_rows;
    const uint32_t bits = unit_width(widths, w.lane * N / 16);
    const float step = w.shared.steps[bits];

    __syncwarp();
    for (uint32_t r = 0; r < R; r++) {
        const uint32_t row = w.t.row_tile * R + r;
        float v[N], largest = 0;
        for (int i = 0; i < N; i++) {
            v[i] = row < f.n_rows ? __ldcg(f.coded + (place + row) * D + w.lane * N + i) * step : 0.0f;
            largest = fmaxf(largest, fabsf(v[i]));
        }
        largest = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(largest)));
        const float factor = largest > 0 ? TQKVC_Q_MAX / largest : 0.0f;
        int high_sum = 0, low_sum = 0;
        for (int i = 0; i < N; i++) {
            const int whole = __float2int_rn(v[i] * factor), high = (whole + 128) >> 8, low = whole - high * 256;
            put_query<D, R>(w.memory, r, w.lane * N + i, high, low);
            high_sum += tqkvc_is_shifted(bits) ? high : 0;
            low_sum += tqkvc_is_shifted(bits) ? low : 0;
        }
        high_sum = __reduce_add_sync(ALL, high_sum);
        low_sum = __reduce_add_sync(ALL, low_sum);
        const float mean = row < f.n_rows ? __ldcg(f.q_mean + place + row) : 0.0f;
        for (int h = 0; h < R / 4; h++) {
            if (w.lane % 4 * (R / 4) + h == r) {
                w.rows.q_factor[h] = largest / TQKVC_Q_MAX * w.p.scale_log2;
                w.rows.q_mean[h] = mean * w.p.scale_log2;
                w.rows.q_start[h][0] = high_sum;
                w.rows.q_start[h][1] = low_sum;
            }
        }
    }
    __syncwarp();
}

/* Pages of eight tiles from `first` on, one block a lane. */
template <int D, int R> __device__ int32_t load_pages(const worker<D, R> &w, uint32_t first)
{
    const uint32_t block = first * TQKVC_TILE_BLOCKS + w.lane;
    if (block * TQKVC_BLOCK_TOKENS >= w.t.length)
        return 0;
    return __ldg(w.p.pages.block_table + (size_t)w.t.seq * w.p.pages.table_stride +
                 block * TQKVC_BLOCK_TOKENS / w.p.pages.page_tokens);
}

/* Tiles [first, end) of one tier. */
template <int D, int R> struct segment {
    worker<D, R> &w;
    uint32_t tier, end, n_stages, tile_bytes, slot_bytes;
    const tqkvc_layout *layout;
    uint32_t next; /* tile to copy */
    uint32_t window; /* first tile of `pages` */
    int32_t pages;

    __device__ void copy_next(uint32_t stage)
    {
        const uint32_t page_blocks = w.p.pages.page_tokens / TQKVC_BLOCK_TOKENS;
        if (next >= window + 8) {
            window = next;
            pages = load_pages(w, window);
        }
        const uint32_t first_block = next * TQKVC_TILE_BLOCKS;
        const uint32_t left = (w.t.length - first_block * TQKVC_BLOCK_TOKENS + TQKVC_BLOCK_TOKENS - 1) / TQKVC_BLOCK_TOKENS;
        const uint32_t n = min(left, (uint32_t)TQKVC_TILE_BLOCKS);
        const uint32_t i = min(w.lane, (uint32_t)TQKVC_TILE_BLOCKS - 1);
        const int32_t page = __shfl_sync(ALL, pages, (next - window) * TQKVC_TILE_BLOCKS + i);
        const uint8_t *source = static_cast<const uint8_t *>(w.p.pages.pool[tier]) +
                                (size_t)page * w.p.page_bytes[tier] +
                                (size_t)((first_block + i) % page_blocks) * w.p.frames.shape.block_bytes[tier] + layout->offset;
        ring_copy(&w.barriers[stage], w.ring + stage * tile_bytes + i * slot_bytes, source, slot_bytes, n, w.lane);
        next++;
    }
};

template <int D, int R> __device__ void run_segment(worker<D, R> &w, uint32_t first, uint32_t end, uint32_t tier)
{
    const tqkvc_shape &shape = w.p.frames.shape;
    const tqkvc_layout *layout =
        reinterpret_cast<const tqkvc_layout *>(w.p.frames.image + shape.parts.layouts) + tier * shape.n_kv_heads + w.t.g;
    const uint32_t slot_bytes = layout->bytes[0] + layout->bytes[1], tile_bytes = slot_bytes * TQKVC_TILE_BLOCKS;
    const uint32_t frame_tiles = w.p.frames.frame_tokens / TQKV_CUDA_TILE_TOKENS;
    segment<D, R> s = {w, tier, end, min(w.p.ring_bytes / tile_bytes, STAGES_MAX), tile_bytes, slot_bytes, layout, first, first, load_pages(w, first)};
    tqkvc_tile tile = {nullptr, slot_bytes, layout->bytes[0], 0, {layout->widths[0], layout->widths[1]}};
    uint32_t stage = 0, frame = ~0u;

    for (uint32_t i = 0; i < s.n_stages && s.next < end; i++)
        s.copy_next(i);
    wait_for_previous();
    for (uint32_t i = first; i < end; i++) {
        if (i / frame_tiles != frame) {
            frame = i / frame_tiles;
            load_queries<D, R>(w, frame, tile.widths[0]);
        }
        tile.blocks = w.ring + stage * tile_bytes;
        tile.first_token = i * TQKV_CUDA_TILE_TOKENS;
        ring_wait(&w.barriers[stage], w.phases >> stage & 1u);
        w.phases ^= 1u << stage;

        tqkvc_product<R> products[TQKVC_TILE_BLOCKS];
        tqkvc_probabilities<R> weights;
        score_tile<D, R>(tile, w.memory, w.shared.tables, w.rows, w.lane, products);
        weigh_tile<R>(tile, products, w.lane, w.rows, weights);
        add_values<D, R>(tile, weights, w.shared.tables, w.shared.steps, w.lane, w.memory);

        __syncwarp();
        if (s.next < end)
            s.copy_next(stage);
        stage = stage + 1 == s.n_stages ? 0 : stage + 1;
    }
}

/* First tile from `first` on that has another tier, and the tier before it. */
template <int D, int R> __device__ uint32_t find_segment(const worker<D, R> &w, uint32_t first, uint32_t end, uint32_t *tier)
{
    const uint8_t *tiers = w.p.pages.tiers;
    if (!tiers) {
        *tier = w.p.frames.shape.n_tiers - 1;
        return end;
    }
    tiers += (size_t)w.t.seq * w.p.pages.tiers_stride;
    *tier = tiers[first];
    for (uint32_t i = first; i < end; i += 32) {
        const uint32_t other = __ballot_sync(ALL, i + w.lane < end && tiers[i + w.lane] != *tier);
        if (other)
            return i + __ffs(other) - 1;
    }
    return end;
}

template <int D, int R> __device__ void run_tiles(worker<D, R> &w)
{
    const uint32_t n = w.t.end_tile - w.t.first_tile, each = (n + TQKVC_WARPS - 1) / TQKVC_WARPS;
    uint32_t i = w.t.first_tile + threadIdx.x / 32 * each;
    const uint32_t end = min(i + each, w.t.end_tile);

    start_rows(w);
    while (i < end) {
        uint32_t tier;
        const uint32_t next = find_segment(w, i, end, &tier);
        run_segment(w, i, next, tier);
        i = next;
    }
    float(*stats)[R] = w.shared.stats[threadIdx.x / 32];
    for (int h = 0; h < R / 4; h++) {
        for (int d = 4; d < 32; d *= 2) {
            w.rows.sum[h] += __shfl_xor_sync(ALL, w.rows.sum[h], d);
            w.rows.nonzero[h] += __shfl_xor_sync(ALL, w.rows.nonzero[h], d);
        }
        if (w.lane < 4) {
            const uint32_t r = w.lane * (R / 4) + h;
            stats[0][r] = w.rows.top[h];
            stats[1][r] = w.rows.sum[h];
            stats[2][r] = w.rows.nonzero[h];
        }
    }
}

/* Row of element i of the sums. */
template <int R> __device__ uint32_t element_row(uint32_t i)
{
    return i / (R / 2) % 4 * (R / 4) + i % (R / 4);
}

/* Channel of element i of the sums. */
template <int R> __device__ uint32_t element_channel(uint32_t i)
{
    return i / (16 * R) * 16 + i / (R / 2) % 32 / 4 + i % (R / 2) / (R / 4) * 8;
}

/*
 * Factors that bring n parts to one top, and the totals. get(part, what, row): top, sum, nonzero.
 * Threads below R.
 */
template <int R, typename GET>
__device__ void find_factors(uint32_t n, GET &&get, float (*factors)[R], float (*total)[R])
{
    const uint32_t r = threadIdx.x;
    float top = TQKVC_LOWEST, sum = 0, nonzero = 0;

    if (r >= R)
        return;
    for (uint32_t i = 0; i < n; i++)
        top = fmaxf(top, get(i, 0, r));
    for (uint32_t i = 0; i < n; i++) {
        const float factor = exp2_fast(get(i, 0, r) - top);
        factors[i][r] = factor;
        sum += get(i, 1, r) * factor;
        nonzero += get(i, 2, r) * factor;
    }
    total[0][r] = top;
    total[1][r] = sum;
    total[2][r] = nonzero;
}

/* Sums of all warps to those of the first warp. */
template <int D, int R> __device__ void merge_warps(block_memory<D, R> &shared)
{
    find_factors<R>(TQKVC_WARPS, [&](uint32_t i, int what, uint32_t r) { return shared.stats[i][what][r]; },
                    shared.factors, shared.total);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < D * R; i += 32 * TQKVC_WARPS) {
        float v = 0;
        for (int w = 0; w < TQKVC_WARPS; w++)
            v += (&shared.warps[w].sums[0][0][0])[i] * shared.factors[w][element_row<R>(i)];
        (&shared.warps[0].sums[0][0][0])[i] = v;
    }
    __syncthreads();
}

/* Leaves the part of this block; true in the block that was last, with the sums of all in place. */
template <int D, int R> __device__ bool merge_splits(const tqkvc_decode &p, const task &t, block_memory<D, R> &shared)
{
    float *sums = &shared.warps[0].sums[0][0][0];
    const size_t place = (size_t)t.seq * gridDim.y + blockIdx.y;
    float *parts = p.parts + place * p.n_splits * PART_FLOATS<D, R>;
    float *mine = parts + (size_t)t.split * PART_FLOATS<D, R>;

    for (uint32_t i = threadIdx.x; i < D * R; i += 32 * TQKVC_WARPS)
        __stcg(mine + i, sums[i]);
    if (threadIdx.x < 3 * R)
        __stcg(mine + D * R + threadIdx.x, (&shared.total[0][0])[threadIdx.x]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        shared.is_last = atomicAdd(p.arrivals + place, 1u) == t.n_parts - 1;
    __syncthreads();
    if (!shared.is_last)
        return false;
    __threadfence();
    if (threadIdx.x == 0)
        p.arrivals[place] = 0;
    find_factors<R>(t.n_parts, [&](uint32_t i, int what, uint32_t r) {
        return __ldcg(parts + (size_t)i * PART_FLOATS<D, R> + D * R + what * R + r);
    }, shared.factors, shared.total);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < D * R; i += 32 * TQKVC_WARPS) {
        float v = 0;
#pragma unroll 8
        for (uint32_t s = 0; s < t.n_parts; s++)
            v += __ldcg(parts + (size_t)s * PART_FLOATS<D, R> + i) * shared.factors[s][element_row<R>(i)];
        sums[i] = v;
    }
    __syncthreads();
    return true;
}

/* out = (inverse of sums + mean nonzero) / sum. columns: where the rings were. */
template <int D, int R>
__device__ void finish(const tqkvc_decode &p, const task &t, block_memory<D, R> &shared, tqkvc_columns<D, 8> &columns)
{
    constexpr float GAIN = 16.0f; /* sums are below 1024; lifts small ones out of f16's subnormals */
    const tqkvc_shape &shape = p.frames.shape;
    const uint32_t lane = threadIdx.x % 32, group = shape.n_heads / shape.n_kv_heads;
    const uint4 *matrix = reinterpret_cast<const uint4 *>(p.frames.image + shape.parts.matrix[1]) + (size_t)t.g * D * D / 4;
    const float *row_scale = reinterpret_cast<const float *>(p.frames.image + shape.parts.row_scale[1]) + t.g * D;
    const float *mean = reinterpret_cast<const float *>(p.frames.image + shape.parts.mean[1]) + t.g * D;

    for (uint32_t i = threadIdx.x; i < 8 * D; i += 32 * TQKVC_WARPS) {
        const bool exists = i < D * R;
        const uint32_t r = exists ? element_row<R>(i) : R + (i - D * R) / D;
        const float sum = exists ? shared.total[1][r] : 0.0f;
        const float v = sum > 0 ? (&shared.warps[0].sums[0][0][0])[i] / sum : 0.0f;
        columns.set(r, exists ? element_channel<R>(i) : i % D, v * GAIN);
    }
    __syncthreads();
    for (uint32_t m = threadIdx.x / 32; m < D / 16; m += TQKVC_WARPS) {
        float c[1][4];
        multiply_columns<D, 8>(matrix, m, columns, lane, c);
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t r = lane % 4 * 2 + i % 2, row = t.row_tile * R + r, d = m * 16 + lane / 4 + i / 2 * 8;
            if (r >= R || row >= p.frames.n_rows)
                continue;
            const size_t at = (size_t)(t.seq * p.frames.q_len + row / group) * shape.n_heads + t.g * group + row % group;
            const float sum = shared.total[1][r];
            const float share = sum > 0 ? shared.total[2][r] / sum : 0.0f;
            store_value(p.out, at * D + d, p.frames.type, c[0][i] * (row_scale[d] / GAIN) + mean[d] * share);
            if (p.lse && d == 0)
                p.lse[at] = sum > 0 ? (shared.total[0][r] + log2f(sum)) * 0.69314718f : -INFINITY;
        }
    }
}

template <int D, int R>
__global__ void __launch_bounds__(32 * TQKVC_WARPS) decode_kernel(const __grid_constant__ tqkvc_decode p)
{
    extern __shared__ __align__(128) uint8_t dynamic[];
    block_memory<D, R> &shared = *reinterpret_cast<block_memory<D, R> *>(dynamic);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const tqkvc_tables *tables = reinterpret_cast<const tqkvc_tables *>(p.frames.image);
    const task t = find_task(p, R);

    if (t.split >= t.n_parts)
        return;
    for (uint32_t i = threadIdx.x; i < TQKVC_WIDTHS * 16; i += 32 * TQKVC_WARPS)
        (&shared.tables[0][0])[i] = tables->widths[i / 16].words[i % 16];
    if (threadIdx.x < 16)
        shared.steps[threadIdx.x] = threadIdx.x < TQKVC_WIDTHS ? tables->widths[threadIdx.x].step : 0.0f;
    if (lane < STAGES_MAX)
        ring_barrier_init(&shared.barriers[warp][lane]);
    __syncthreads();

    uint8_t *rings = dynamic + sizeof(block_memory<D, R>);
    worker<D, R> w = {p, t, shared, shared.warps[warp], rings + warp * p.ring_bytes, shared.barriers[warp], lane};
    run_tiles(w);
    __syncthreads();
    merge_warps(shared);
    if (t.n_parts == 1 || merge_splits(p, t, shared))
        finish(p, t, shared, *reinterpret_cast<tqkvc_columns<D, 8> *>(rings));
}

template <int D, int R> tqkv_status launch(const tqkvc_decode &p, cudaStream_t stream)
{
    const size_t bytes = tqkvc_decode_shared_bytes(D, R, p.ring_bytes);
    cudaLaunchAttribute beside = {};
    cudaLaunchConfig_t config = {};

    static_assert(sizeof(block_memory<D, R>) % 16 == 0, "rings are 16-aligned");
    if (cudaFuncSetAttribute(decode_kernel<D, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    beside.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(p.n_splits, p.frames.shape.n_kv_heads * ((p.frames.n_rows + R - 1) / R), p.frames.n_seqs);
    config.blockDim = dim3(32 * TQKVC_WARPS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &beside;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, decode_kernel<D, R>, p);
    (void)cudaGetLastError();
    return error == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}

template <int D> size_t shared_bytes(uint32_t rows_per_tile)
{
    return rows_per_tile == 4 ? sizeof(block_memory<D, 4>) : sizeof(block_memory<D, 8>);
}

} // namespace

extern "C" size_t tqkvc_decode_shared_bytes(uint32_t dim, uint32_t rows_per_tile, uint32_t ring_bytes)
{
    const size_t fixed = dim == 64    ? shared_bytes<64>(rows_per_tile)
                         : dim == 128 ? shared_bytes<128>(rows_per_tile)
                                      : shared_bytes<256>(rows_per_tile);
    return fixed + TQKVC_WARPS * (size_t)ring_bytes;
}

extern "C" tqkv_status tqkvc_launch_decode(const tqkvc_decode *decode, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool few = decode->rows_per_tile == 4;

    switch (decode->frames.shape.dim) {
    case 64:
        return few ? launch<64, 4>(*decode, s) : launch<64, 8>(*decode, s);
    case 128:
        return few ? launch<128, 4>(*decode, s) : launch<128, 8>(*decode, s);
    default:
        return few ? launch<256, 4>(*decode, s) : launch<256, 8>(*decode, s);
    }
}
