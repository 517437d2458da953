/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Store: rows of K and V to codes in their blocks, the bytes of the CPU codec.
 *
 * A block takes ROWS tokens of one tier, KV head and side: x to z in shared memory, all of z times the matrix
 * to y (transform.cuh), then octets of lanes search scales and write codes (encode_row.cuh). With one row
 * or eight, several octets share the candidates of a row. Neither the sums of the transform, whose order
 * is part of the format, nor the search are memory's work: arithmetic bounds the kernel where there are
 * many tokens, and a chain of latencies where there are few.
 *
 *     copies of the matrix and tables  ─────────────────────┐
 *     x ── turn, mean ── z ─────────────────────────────────┴─ y ── candidates ── codes
 */
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
    tqkvc_place places[ROWS];
    uint64_t found[shape::OCTETS];
    typename tqkvc_row_loader<D, ROWS>::flags flags;
};

/* What a block works on. */
template <int D> struct store_head {
    uint32_t tier, g, side;
    const tqkvc_layout &layout;
    const float *matrix, *weights;

    __device__ __forceinline__ store_head(const tqkvc_store &p)
        : tier(p.tiers[blockIdx.z]), g(p.is_one_side ? 0 : blockIdx.y / 2),
          side(p.is_one_side ? p.side : blockIdx.y % 2),
          layout(reinterpret_cast<const tqkvc_layout *>(
              p.image + p.shape.parts.layouts)[tier * p.shape.n_kv_heads + g]),
          matrix(reinterpret_cast<const float *>(p.image + p.shape.parts.transform[side]) +
                 (size_t)g * D * D),
          weights(reinterpret_cast<const float *>(p.image + p.shape.parts.weight[side]) +
                  g * (D / TQKV_UNIT_CHANNELS))
    {
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
           uint32_t side, uint32_t row, bool zero_mean, const float (&y)[D / 16][2])
{
    constexpr int OF_ROW = tqkvc_store_shape<D, ROWS>::OF_ROW;
    const uint32_t octet = threadIdx.x / 8;
    const tqkvc_place place = memory.places[row];
    const bool writes = place.section != nullptr;
    bool is_finite = true;
    uint64_t found = 0, best = TQKVC_NO_PLACE; /* of all octets of the row */

#pragma unroll
    for (int u = 0; u < D / 16; u++)
        is_finite = is_finite && isfinite(y[u][0]) && isfinite(y[u][1]);
    const bool is_good =
        all_of_octet(is_finite) && tqkvc_row_loader<D, ROWS>::is_good(memory.flags, row);
    tqkvc_row_encoder<D / 16> encoder(memory.tables, memory.octets[octet], layout, y);
    if (layout.n_coded != 0)
        found = encoder.find_scale((int)(octet % OF_ROW), OF_ROW);
    if constexpr (OF_ROW > 1) {
        if (octet_lane() == 0)
            memory.found[octet] = found;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OF_ROW; i++)
            best = min(best, memory.found[octet / OF_ROW * OF_ROW + i]);
    }
    encoder.choose_form();
    const bool zero = !is_good || (encoder.scale == 1 && zero_mean && encoder.zero);
    if constexpr (D > 256) { /* all rows are under way at once, and nobody reads y any more */
        if (found == best && (best != TQKVC_NO_PLACE || octet % OF_ROW == 0))
            share_row(memory.shared_rows[row], encoder, zero);
        __syncthreads();
        put_units(place, side, memory.shared_rows[row], memory.tables, widths[0], widths[1], octet % OF_ROW, OF_ROW);
    } else {
        put_row(place, side, encoder, zero, writes && found <= best);
    }
}

template <int D, int ROWS>
__global__ void __launch_bounds__(tqkvc_store_shape<D, ROWS>::THREADS,
                                  tqkvc_store_shape<D, ROWS>::BLOCKS)
    store_kernel(const __grid_constant__ tqkvc_store p)
{
    using shape = tqkvc_store_shape<D, ROWS>;
    extern __shared__ __align__(128) uint8_t bytes[];
    store_memory<D, ROWS> &memory = *reinterpret_cast<store_memory<D, ROWS> *>(bytes);
    const store_head<D> head(p);
    const uint32_t first = blockIdx.x * ROWS, octet = threadIdx.x / 8;
    /* The last threads find places: with one row, they have no pairs. */
    const uint32_t row_of_place = shape::THREADS - 1 - threadIdx.x;
    const int64_t slot = row_of_place < ROWS && first + row_of_place < p.args.n_tokens
                             ? p.args.slots[head.tier][first + row_of_place]
                             : -1;
    /* Most tokens of a prompt have no place in a young tier. Few rows do not wait to know. */
    if ((shape::IS_MANY || (D == TQKVC_LATENT_DIM && ROWS > 1)) && !__syncthreads_or(slot >= 0))
        return;
    tqkvc_row_loader<D, ROWS> loader(p, first, head.g, head.side);
    tqkvc_transform<D, ROWS> transform = {memory.stages, head.matrix};
    /* Traits are in the image: where no head has this one, nothing waits for them. */
    const bool is_hadamard =
        (p.shape.traits_any & TQKVC_HADAMARD) != 0 &&
        (head.layout.traits[head.side] & TQKVC_HADAMARD) != 0;

    if (!is_hadamard)
        transform.start();
    copy_block(&memory.tables, p.image + offsetof(tqkvc_tables, encode), sizeof(memory.tables));
    copy_block(memory.weights, head.weights, sizeof(memory.weights));
    copy_commit();
    const uint64_t widths = head.layout.widths[head.side], /* on their way until they are used */
        more_widths = D > 256 ? head.layout.more_widths : 0;
    const bool zero_mean = (head.layout.traits[head.side] & TQKVC_ZERO_MEAN) != 0;
    if (row_of_place < ROWS)
        memory.places[row_of_place] = find_place(p, head.tier, slot, head.layout, head.side);
    loader.load(memory.z, memory.flags);
    if (!is_hadamard) {
        transform.multiply(memory.z, memory.y);
    } else {
        copy_wait<0>();
        __syncthreads();
    }

    const tqkvc_row_layout<D / 16> layout(widths, more_widths, memory.weights);
    if (octet_lane() == 0)
        memory.octets[octet].factors[0] = {};
#pragma unroll 1
    for (uint32_t row = octet / shape::OF_ROW; row < ROWS; row += shape::OCTETS / shape::OF_ROW) {
        float y[D / 16][2];
        load_y(memory, head.matrix, is_hadamard, row, y);
        encode_row(memory, layout, {widths, more_widths}, head.side, row, zero_mean, y);
    }
}

template <int D, int ROWS> tqkv_status launch(const tqkvc_store &p, cudaStream_t stream)
{
    using memory = store_memory<D, ROWS>;
    const auto kernel = store_kernel<D, ROWS>;
    const dim3 grid((p.args.n_tokens + ROWS - 1) / ROWS, p.is_one_side ? 1 : 2 * p.shape.n_kv_heads,
                    p.n_tiers);

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
        return launch<D, 1>(p, stream);
    if constexpr (D < TQKVC_LATENT_DIM)
        if (n_rows > 40 * (size_t)n_sm)
            return launch<D, MANY>(p, stream);
    return launch<D, 8>(p, stream);
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
