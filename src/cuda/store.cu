/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Store: rows of K and V to codes in their blocks, the bytes of the CPU codec.
 *
 * A block takes ROWS tokens of one KV head and side: x to z in shared memory, all of z times the matrix
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
    union {
        float stages[shape::STAGES][shape::STEP * D]; /* of the matrix, until y is there */
        tqkvc_octet octets[shape::OCTETS];
    };
    union {
        float z[D * shape::Z_STRIDE];
        float y[ROWS * shape::Y_STRIDE];
    };
    tqkvc_place places[ROWS];
    uint64_t found[shape::OCTETS];
    typename tqkvc_row_loader<D, ROWS>::flags flags;
};

/* What a block works on. */
struct store_head {
    uint32_t g, side;
    const tqkvc_layout &layout;
    const float *matrix, *weights;
    const uint32_t &traits;

    __device__ __forceinline__ store_head(const tqkvc_store &p)
        : g(blockIdx.y / 2), side(blockIdx.y % 2),
          layout(reinterpret_cast<const tqkvc_layout *>(
              p.image + p.shape.parts.layouts)[p.args.tier * p.shape.n_kv_heads + g]),
          matrix(reinterpret_cast<const float *>(p.image + p.shape.parts.transform[side]) +
                 (size_t)g * p.shape.dim * p.shape.dim),
          weights(reinterpret_cast<const float *>(p.image + p.shape.parts.weight[side]) +
                  g * (p.shape.dim / TQKV_UNIT_CHANNELS)),
          traits(reinterpret_cast<const uint32_t *>(p.image + p.shape.parts.traits[side])[g])
    {
    }
};

/* One row by this octet: the candidates from start on in steps. */
template <int D, int ROWS>
__device__ __forceinline__ void
encode_row(store_memory<D, ROWS> &memory, const store_head &head,
           const tqkvc_row_layout<D / 16> &layout, uint32_t row, uint32_t octets_of_row,
           const float (&y)[D / 16][2])
{
    const uint32_t octet = threadIdx.x / 8;
    const tqkvc_place place = memory.places[row];
    bool bad = false, writes = place.section != nullptr;

#pragma unroll
    for (int u = 0; u < D / 16; u++)
        bad = bad || !isfinite(y[u][0]) || !isfinite(y[u][1]);
    const bool is_good = octet_ballot(bad) == 0 &&
                         tqkvc_row_loader<D, ROWS>::is_good(memory.flags, row);
    tqkvc_row_encoder<D / 16> encoder(memory.tables, memory.octets[octet], layout, y);
    uint64_t found = 0;
    if (layout.n_coded != 0)
        found = encoder.find_scale((int)(octet % octets_of_row), (int)octets_of_row);
    if (octets_of_row > 1) {
        if (octet_lane() == 0)
            memory.found[octet] = found;
        __syncthreads();
        for (uint32_t i = 0; i < octets_of_row; i++)
            writes = writes && found <= memory.found[octet / octets_of_row * octets_of_row + i];
    }
    encoder.choose_form();
    const bool zero = !is_good || (encoder.scale == 1 && (head.traits & TQKVC_ZERO_MEAN) != 0 &&
                                   encoder.zero);
    put_row(place, head.side, encoder, zero, writes);
}

template <int D, int ROWS>
__global__ void __launch_bounds__(tqkvc_store_shape<D, ROWS>::THREADS,
                                  tqkvc_store_shape<D, ROWS>::BLOCKS)
    store_kernel(const __grid_constant__ tqkvc_store p)
{
    using shape = tqkvc_store_shape<D, ROWS>;
    constexpr uint32_t OCTETS = shape::OCTETS, OF_ROW = OCTETS > ROWS ? OCTETS / ROWS : 1;
    extern __shared__ __align__(128) uint8_t bytes[];
    store_memory<D, ROWS> &memory = *reinterpret_cast<store_memory<D, ROWS> *>(bytes);
    const store_head head(p);
    const uint32_t first = blockIdx.x * ROWS, octet = threadIdx.x / 8;
    tqkvc_row_loader<D, ROWS> loader(p, first, head.g, head.side);
    tqkvc_transform<D, ROWS> transform = {memory.stages, head.matrix};
    /* Traits are in the image: where no head has this one, nothing waits for them. */
    const bool is_hadamard =
        (p.shape.traits_any & TQKVC_HADAMARD) != 0 && (head.traits & TQKVC_HADAMARD) != 0;

    if (!is_hadamard)
        transform.start();
    copy_block(&memory.tables, p.image + offsetof(tqkvc_tables, encode), sizeof(memory.tables));
    copy_commit();
    if (threadIdx.x + ROWS >= shape::THREADS) { /* the last threads have no pairs if ROWS is 1 */
        const uint32_t row = shape::THREADS - 1 - threadIdx.x;
        memory.places[row] = find_place(p, first + row, head.layout, head.side);
    }
    loader.load(memory.z, memory.flags);
    if (!is_hadamard) {
        transform.multiply(memory.z, memory.y);
    } else {
        copy_wait<0>();
        __syncthreads();
    }

    const tqkvc_row_layout<D / 16> layout(head.layout.widths[head.side], head.weights);
    if (octet_lane() == 0)
        memory.octets[octet].factors[0] = {};
#pragma unroll 1
    for (uint32_t row = octet / OF_ROW; row < ROWS; row += OCTETS / OF_ROW) {
        float y[D / 16][2];
        if (is_hadamard) {
            butterflies<D>(head.matrix, memory.z + row, shape::Z_STRIDE, y);
        } else {
#pragma unroll
            for (int u = 0; u < D / 16; u++) {
                const float2 pair = *reinterpret_cast<const float2 *>(
                    &memory.y[row * shape::Y_STRIDE + 16 * u + 2 * octet_lane()]);
                y[u][0] = pair.x;
                y[u][1] = pair.y;
            }
        }
        encode_row(memory, head, layout, row, OF_ROW, y);
    }
}

template <int D, int ROWS> tqkv_status launch(const tqkvc_store &p, cudaStream_t stream)
{
    using memory = store_memory<D, ROWS>;
    const auto kernel = store_kernel<D, ROWS>;
    const dim3 grid((p.args.n_tokens + ROWS - 1) / ROWS, 2 * p.shape.n_kv_heads);

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

/* One row a block while every block has a multiprocessor of its own, or half of one. */
template <int D> tqkv_status launch_rows(const tqkvc_store &p, cudaStream_t stream)
{
    constexpr int MANY = D == 64 ? 128 : 64;
    int device = 0, n_sm = 0;

    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return TQKV_ERR_UNSUPPORTED;
    }
    const size_t n_rows = (size_t)p.args.n_tokens * p.shape.n_kv_heads * 2;
    if (n_rows <= 2 * (size_t)n_sm)
        return launch<D, 1>(p, stream);
    if (n_rows <= 16 * (size_t)n_sm)
        return launch<D, 8>(p, stream);
    return launch<D, MANY>(p, stream);
}

} // namespace

extern "C" tqkv_status tqkvc_launch_store(const tqkvc_store *store, void *stream)
{
    const cudaStream_t s = static_cast<cudaStream_t>(stream);

    switch (store->shape.dim) {
    case 64:
        return launch_rows<64>(*store, s);
    case 128:
        return launch_rows<128>(*store, s);
    default:
        return launch_rows<256>(*store, s);
    }
}
