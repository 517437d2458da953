/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Store: rows of K and V to codes in their blocks, the bytes of the CPU codec.
 *
 * A block takes ROWS tokens of one KV head and side: x to z in shared memory, all of z times the matrix
 * to y (transform.cuh), then octets of lanes search scales and write codes (encode_row.cuh) for some or all
 * of the tiers, which differ in no more than widths. With one row or eight, octets are dealt out to the
 * tiers of the block, and those of a row share its candidates; with many rows a block has its tiers one after another.
 * Neither the sums of the transform, whose order is part of the format, nor the search are memory's work:
 * arithmetic bounds the kernel where there are many tokens, and a chain of latencies where there are few.
 *
 *     copies of the matrix and tables  ─────────────────────┐          ┌─ candidates ── codes of a tier
 *     x ── turn, mean ── z ─────────────────────────────────┴─ y ──────┼─ candidates ── codes of a tier
 */
#include "cuda/cluster.cuh"
#include "cuda/store_rows.cuh"

namespace
{

template <int D, int ROWS> struct store_memory {
    using shape = tqkvc_store_shape<D, ROWS>;

    tqkvc_encode_tables tables;
    float weights[D / 16];
    union {
        float stages[shape::STAGES][shape::STEP * D]; /* of the matrix, until y is there */
        tqkvc_octet octets[shape::OCTETS];
    };
    union {
        float z[D * shape::Z_STRIDE];
        float y[ROWS * shape::Y_STRIDE];
        tqkvc_shared_row<D / 16> shared_rows[D > 256 ? ROWS : 1];
    };
    tqkvc_place places[shape::TIERS * ROWS]; /* of the tiers that are under way at once */
    uint64_t found[shape::OCTETS];
    typename tqkvc_row_loader<D, ROWS>::flags flags;
};

/* What a block works on: tiers[0 .. n_tiers - 1] of a head and side. */
template <int D, int ROWS> struct store_head {
    const tqkvc_store &p;
    const uint32_t g, side;

    __device__ __forceinline__ store_head(const tqkvc_store &p)
        : p(p), g(p.is_one_side ? 0 : blockIdx.y / 2), side(p.is_one_side ? p.side : blockIdx.y % 2)
    {
    }

    __device__ __forceinline__ uint32_t n_tiers() const
    {
        return tqkvc_store_shape<D, ROWS>::TIERS_MAX == 1
                   ? 1
                   : min(p.n_together, p.n_tiers - blockIdx.z * p.n_together);
    }

    __device__ __forceinline__ uint32_t tier(uint32_t i) const
    {
        return p.tiers[blockIdx.z * p.n_together + i];
    }

    __device__ __forceinline__ const float *matrix() const
    {
        return reinterpret_cast<const float *>(p.image + p.shape.parts.transform[side]) + (size_t)g * D * D;
    }

    __device__ __forceinline__ const float *weights() const
    {
        return reinterpret_cast<const float *>(p.image + p.shape.parts.weight[side]) +
               g * (D / TQKV_UNIT_CHANNELS);
    }

    /* Of one of its tiers. */
    __device__ __forceinline__ const tqkvc_layout &layout(uint32_t i) const
    {
        return reinterpret_cast<const tqkvc_layout *>(
            p.image + p.shape.parts.layouts)[tier(i) * p.shape.n_kv_heads + g];
    }

    /* Slot of a token in one of its tiers; -1: none. */
    __device__ __forceinline__ int64_t slot(uint32_t i, uint32_t token) const
    {
        return i < n_tiers() && token < p.args.n_tokens ? p.args.slots[tier(i)][token] : -1;
    }

    __device__ __forceinline__ tqkvc_place place(uint32_t i, int64_t slot) const
    {
        const uint32_t known = min(i, n_tiers() - 1);
        return find_place(p, tier(known), slot, layout(known), side);
    }
};

/* What an octet works on: a row of a tier of the block, alone or with others. */
template <int D, int ROWS> struct octet_share {
    using shape = tqkvc_store_shape<D, ROWS>;
    uint32_t tier, row, place, part, n; /* place: in memory.places; n: octets of the row */

    /* Known to the compiler where it can be. */
    __device__ __forceinline__ uint32_t n_parts() const
    {
        return shape::OF_ROW == 1 ? 1 : shape::TIERS_MAX == 1 ? shape::OF_ROW : n;
    }
};

/* y of a row in this lane. */
template <int D, int ROWS>
__device__ __forceinline__ void load_y(const store_memory<D, ROWS> &memory, const float *matrix,
                                       bool is_hadamard, uint32_t row, float (&y)[D / 16][2])
{
    using shape = tqkvc_store_shape<D, ROWS>;

    if (is_hadamard) {
        butterflies<D>(matrix, memory.z + row, shape::Z_STRIDE, y);
        return;
    }
#pragma unroll
    for (int u = 0; u < D / 16; u++) {
        const float2 pair = *reinterpret_cast<const float2 *>(
            &memory.y[row * shape::Y_STRIDE + 16 * u + 2 * octet_lane()]);
        y[u][0] = pair.x;
        y[u][1] = pair.y;
    }
}

/* One row by this octet, or by several octets of the block, each with some of the candidates. */
template <int D, int ROWS>
__device__ __forceinline__ void
encode_row(store_memory<D, ROWS> &memory, const tqkvc_row_layout<D / 16> &layout, const uint64_t (&widths)[2],
           uint32_t side, const octet_share<D, ROWS> &mine, bool zero_mean, const float (&y)[D / 16][2])
{
    const uint32_t octet = threadIdx.x / 8, n_parts = mine.n_parts();
    bool is_finite = true;
    uint64_t found = 0, best = TQKVC_NO_PLACE; /* of all octets of the row */

#pragma unroll
    for (int u = 0; u < D / 16; u++)
        is_finite = is_finite && isfinite(y[u][0]) && isfinite(y[u][1]);
    const bool is_good =
        all_of_octet(is_finite) && tqkvc_row_loader<D, ROWS>::is_good(memory.flags, mine.row);
    tqkvc_row_encoder<D / 16> encoder(memory.tables, memory.octets[octet], layout, y);
    if (layout.n_coded != 0)
        found = encoder.find_scale((int)mine.part, (int)n_parts);
    if (n_parts > 1) {
        if (octet_lane() == 0)
            memory.found[octet] = found;
        __syncthreads();
        for (uint32_t i = 0; i < n_parts; i++)
            best = min(best, memory.found[octet - mine.part + i]);
    }
    encoder.choose_form();
    const tqkvc_place place = memory.places[mine.place];
    const bool zero = !is_good || (encoder.scale == 1 && zero_mean && encoder.zero);
    if constexpr (D > 256) { /* all rows are under way at once, and nobody reads y any more */
        if (found == best && (best != TQKVC_NO_PLACE || mine.part == 0))
            share_row(memory.shared_rows[mine.row], encoder, zero);
        __syncthreads();
        put_units(place, side, memory.shared_rows[mine.row], memory.tables, widths[0], widths[1], mine.part, n_parts);
    } else {
        put_row(place, side, encoder, zero, place.section != nullptr && found <= best);
    }
}

/* The row and tier of an octet, y of which is there. */
template <int D, int ROWS>
__device__ __forceinline__ void encode_share(store_memory<D, ROWS> &memory, const store_head<D, ROWS> &head,
                                             const tqkvc_row_layout<D / 16> &layout,
                                             const uint64_t (&widths)[2], const octet_share<D, ROWS> &mine,
                                             bool is_hadamard, bool zero_mean)
{
    float y[D / 16][2];

    /* Octets that wait for each other go on together. */
    if (mine.n_parts() == 1 && !__any_sync(TQKVC_FULL, memory.places[mine.place].section != nullptr))
        return;
    load_y(memory, head.matrix(), is_hadamard, mine.row, y);
    encode_row(memory, layout, widths, head.side, mine, zero_mean, y);
}

/* Few rows: all rows and tiers at once. n_together is a power of two, so that a warp has one tier. */
template <int D, int ROWS>
__device__ __forceinline__ octet_share<D, ROWS> share_octets(const tqkvc_store &p)
{
    using shape = tqkvc_store_shape<D, ROWS>;
    const uint32_t octet = threadIdx.x / 8, n_parts = shape::OF_ROW / p.n_together,
                   tier = octet / (n_parts * ROWS), row = octet / n_parts % ROWS;

    if (shape::TIERS_MAX == 1)
        return {0, row, row, octet % n_parts, n_parts};
    return {tier, row, tier * ROWS + row, octet % n_parts, n_parts};
}

/* Many rows: one tier after another. */
template <int D, int ROWS>
__device__ __forceinline__ void encode_tiers(store_memory<D, ROWS> &memory, const store_head<D, ROWS> &head,
                                             uint32_t first, bool is_hadamard, bool zero_mean)
{
    using shape = tqkvc_store_shape<D, ROWS>;

#pragma unroll 1
    for (uint32_t tier = 0; tier < head.n_tiers(); tier++) {
        const int64_t slot = threadIdx.x < ROWS ? head.slot(tier, first + threadIdx.x) : -1;
        if (!__syncthreads_or(slot >= 0)) /* and nobody reads places any more */
            continue;
        if (threadIdx.x < ROWS)
            memory.places[threadIdx.x] = head.place(tier, slot);
        __syncthreads();
        const uint64_t widths = head.layout(tier).widths[head.side];
        const tqkvc_row_layout<D / 16> layout(widths, 0, memory.weights);
#pragma unroll 1
        for (uint32_t row = threadIdx.x / 8; row < ROWS; row += shape::OCTETS)
            encode_share(memory, head, layout, {widths, 0}, {tier, row, row, 0, 1}, is_hadamard, zero_mean);
    }
}

/* Whether any row of the block has a place in one of its tiers. */
template <int D, int ROWS> __device__ __forceinline__ bool has_places(const store_head<D, ROWS> &head, uint32_t first)
{
    bool any = false;

    for (uint32_t i = 0; threadIdx.x < ROWS && i < head.n_tiers(); i++)
        any = any || head.slot(i, first + threadIdx.x) >= 0;
    return __syncthreads_or(any);
}

template <int D, int ROWS>
__global__ void __launch_bounds__(tqkvc_store_shape<D, ROWS>::THREADS,
                                  tqkvc_store_shape<D, ROWS>::BLOCKS)
    store_kernel(const __grid_constant__ tqkvc_store p)
{
    let_next_start(); /* everything before this launch is complete, as it has no attribute: decode.cu relies on that */
    using shape = tqkvc_store_shape<D, ROWS>;
    extern __shared__ __align__(128) uint8_t bytes[];
    store_memory<D, ROWS> &memory = *reinterpret_cast<store_memory<D, ROWS> *>(bytes);
    const store_head<D, ROWS> head(p);
    const uint32_t first = blockIdx.x * ROWS;
    /* The last threads find places: with one row, they have no pairs. */
    const uint32_t place = shape::THREADS - 1 - threadIdx.x, tier_of_place = place / ROWS;
    const bool finds = !shape::IS_MANY && place < shape::TIERS * ROWS;
    const int64_t slot = finds ? head.slot(tier_of_place, first + place % ROWS) : -1;
    /* Most tokens of a prompt have no place in a young tier. Few rows do not wait to know. */
    if ((shape::IS_MANY || (D == TQKVC_LATENT_DIM && ROWS > 1)) && !has_places(head, first))
        return;
    tqkvc_row_loader<D, ROWS> loader(p, first, head.g, head.side);
    tqkvc_transform<D, ROWS> transform = {memory.stages, head.matrix()};
    const octet_share<D, ROWS> mine = share_octets<D, ROWS>(p);
    const tqkvc_layout &layout_of =
        head.layout(shape::TIERS == 1 ? 0 : min(mine.tier, head.n_tiers() - 1));
    /* Traits are in the image: where no head has this one, nothing waits for them. All tiers of a head have the same. */
    const bool is_hadamard = (p.shape.traits_any & TQKVC_HADAMARD) != 0 &&
                             (layout_of.traits[head.side] & TQKVC_HADAMARD) != 0;

    if (!is_hadamard)
        transform.start();
    copy_block(&memory.tables, p.image + offsetof(tqkvc_tables, encode), sizeof(memory.tables));
    copy_block(memory.weights, head.weights(), sizeof(memory.weights));
    copy_commit();
    const uint64_t widths = layout_of.widths[head.side], /* on their way until they are used */
        more_widths = D > 256 ? layout_of.more_widths : 0;
    const bool zero_mean = (layout_of.traits[head.side] & TQKVC_ZERO_MEAN) != 0;
    if (finds)
        memory.places[place] = head.place(tier_of_place, slot);
    loader.load(memory.z, memory.flags);
    if (!is_hadamard) {
        transform.multiply(memory.z, memory.y);
    } else {
        copy_wait<0>();
        __syncthreads();
    }

    if (octet_lane() == 0)
        memory.octets[threadIdx.x / 8].factors[0] = {};
    if constexpr (shape::IS_MANY) {
        encode_tiers(memory, head, first, is_hadamard, zero_mean);
    } else {
        const tqkvc_row_layout<D / 16> layout(widths, more_widths, memory.weights);
        encode_share(memory, head, layout, {widths, more_widths}, mine, is_hadamard, zero_mean);
    }
}

/*
 * Tiers that a block has: as few as leave each block a place on the device at once. n_blocks: of a tier.
 * More would lengthen the chain of a block, fewer repeat the transform in blocks that wait for each other's places.
 */
template <int D, int ROWS> uint32_t choose_together(uint32_t n_tiers, size_t n_blocks, uint32_t n_sm)
{
    using shape = tqkvc_store_shape<D, ROWS>;
    const size_t places = (size_t)n_sm * (shape::IS_MANY ? shape::BLOCKS : 1);
    uint32_t n = 1;

    while (n < n_tiers && n < shape::TIERS_MAX && n_blocks * ((n_tiers + n - 1) / n) > places)
        n *= 2;
    return n;
}

template <int D, int ROWS> tqkv_status launch(tqkvc_store p, uint32_t n_sm, cudaStream_t stream)
{
    using memory = store_memory<D, ROWS>;
    const auto kernel = store_kernel<D, ROWS>;
    dim3 grid((p.args.n_tokens + ROWS - 1) / ROWS, p.is_one_side ? 1 : 2 * p.shape.n_kv_heads);

    p.n_together = choose_together<D, ROWS>(p.n_tiers, (size_t)grid.x * grid.y, n_sm);
    grid.z = (p.n_tiers + p.n_together - 1) / p.n_together;

    static_assert(tqkvc_store_shape<D, ROWS>::IS_MANY ||
                      tqkvc_store_shape<D, ROWS>::OF_ROW >= tqkvc_store_shape<D, ROWS>::TIERS_MAX,
                  "an octet for each row and tier");
    static_assert(sizeof(memory) <= 99 * 1024, "of a block, on any device");
    static_assert(offsetof(memory, stages) % 16 == 0 && offsetof(memory, z) % 16 == 0 &&
                      offsetof(tqkvc_tables, encode) % 16 == 0 &&
                      sizeof(tqkvc_encode_tables) % 16 == 0,
                  "copies of 16 bytes");
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)sizeof(memory)) != cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    kernel<<<grid, tqkvc_store_shape<D, ROWS>::THREADS, sizeof(memory), stream>>>(p);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}

/*
 * One row a block while every block of a tier has a multiprocessor of its own; eight up to a few blocks each;
 * then tiles, which want so many rows to be faster.
 */
template <int D> tqkv_status launch_rows(const tqkvc_store &p, cudaStream_t stream)
{
    constexpr int MANY = D == 64 ? 128 : 64;
    int device = 0, n_sm = 0;

    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    const size_t n_rows = (size_t)p.args.n_tokens * (p.is_one_side ? 1 : p.shape.n_kv_heads * 2);
    if (n_rows <= (size_t)n_sm)
        return launch<D, 1>(p, (uint32_t)n_sm, stream);
    if constexpr (D < TQKVC_LATENT_DIM)
        if (n_rows > 40 * (size_t)n_sm)
            return launch<D, MANY>(p, (uint32_t)n_sm, stream);
    return launch<D, 8>(p, (uint32_t)n_sm, stream);
}

/* Sides of a latent layer are of different sizes, so each is a launch. */
tqkv_status launch_sides(tqkvc_store p, cudaStream_t stream)
{
    p.is_one_side = true;
    p.side = TQKV_SIDE_V;
    const tqkv_status status = launch_rows<TQKVC_LATENT_DIM>(p, stream);
    p.side = TQKV_SIDE_K;
    return status == TQKV_OK ? launch_rows<TQKVC_LATENT_K_DIM>(p, stream) : status;
}

} // namespace

extern "C" tqkv_status tqkvc_launch_store(const tqkvc_store *store, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    if (store->shape.is_latent)
        return launch_sides(*store, s);
    switch (store->shape.dim) {
    case 64:
        return launch_rows<64>(*store, s);
    case 128:
        return launch_rows<128>(*store, s);
    default:
        return launch_rows<256>(*store, s);
    }
}
