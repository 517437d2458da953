/* SPDX-License-Identifier: Apache-2.0 */
/* Merges attention over two sets of tokens; one warp a row. */
#include "cuda/columns.cuh"
#include "cuda/launch.h"

namespace
{

__global__ void merge_kernel(void *out_a, float *lse_a, const void *out_b, const float *lse_b,
                             size_t n_rows, uint32_t dim, tqkv_cuda_type type)
{
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= n_rows)
        return;
    const float a = lse_a[row], b = lse_b[row], top = fmaxf(a, b);
    const float share_a = top == -INFINITY ? 0.0f : __expf(a - top),
                share_b = top == -INFINITY ? 0.0f : __expf(b - top);
    const float sum = share_a + share_b, factor = sum > 0 ? 1.0f / sum : 0.0f;
    for (uint32_t d = threadIdx.x % 32; d < dim; d += 32) {
        const size_t i = row * dim + d;
        store_value(out_a, i, type,
                    (load_value(out_a, i, type) * share_a + load_value(out_b, i, type) * share_b) *
                        factor);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        lse_a[row] = sum > 0 ? top + __logf(sum) : -INFINITY;
}

} // namespace

extern "C" tqkv_status tqkvc_launch_merge(void *out_a, float *lse_a, const void *out_b,
                                          const float *lse_b, size_t n_rows, uint32_t dim,
                                          tqkv_cuda_type type, void *stream)
{
    constexpr uint32_t ROWS = 8;
    const uint32_t n_blocks = (uint32_t)((n_rows + ROWS - 1) / ROWS);
    merge_kernel<<<n_blocks, 32 * ROWS, 0, static_cast<cudaStream_t>(stream)>>>(
        out_a, lse_a, out_b, lse_b, n_rows, dim, type);
    return cudaGetLastError() == cudaSuccess ? TQKV_OK : TQKV_ERR_UNSUPPORTED;
}
