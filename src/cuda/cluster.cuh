/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How blocks and kernels stand to each other. The blocks of a cluster run at the same time and write to
 * each other's shared memory; a kernel may start before the one ahead of it in the stream has ended.
 * Devices before sm_90 have neither: there every block is a cluster, and kernels follow each other.
 */
#ifndef TQKVC_CLUSTER_CUH
#define TQKVC_CLUSTER_CUH

#include "cuda/ring.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TQKVC_CLUSTERS 1
#else
#define TQKVC_CLUSTERS 0
#endif

/* Between them all threads of all blocks of the cluster have come to the first. */
static __device__ __forceinline__ void cluster_arrive()
{
#if TQKVC_CLUSTERS
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void cluster_wait()
{
#if TQKVC_CLUSTERS
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* One thread, before cluster_arrive: makes a barrier whose first phase ends when n_bytes have come. */
static __device__ __forceinline__ void expect_bytes(uint64_t *barrier, uint32_t n_bytes)
{
#if TQKVC_CLUSTERS
    const uint32_t address = shared_address(barrier);
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(n_bytes)
                 : "memory");
#endif
}

/* One thread: copies n_bytes to where target is in the blocks of the mask, and counts them at their barriers. */
static __device__ __forceinline__ void fetch(uint64_t *barrier, void *target, const void *source,
                                             uint32_t n_bytes, uint16_t mask)
{
#if TQKVC_CLUSTERS
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(target)),
                 "l"(source), "r"(n_bytes), "r"(shared_address(barrier)), "h"(mask)
                 : "memory");
#endif
}

/* Writes v to where `to` is in another block, and counts it at that block's barrier. */
static __device__ __forceinline__ void push(float4 *to, uint64_t *barrier, uint32_t rank,
                                            const float4 &v)
{
#if TQKVC_CLUSTERS
    uint32_t there, counter;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(counter)
        : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], "
                 "{%1, %2, %3, %4}, [%5];" ::"r"(there),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(counter)
                 : "memory");
#endif
}

static __device__ __forceinline__ void let_next_start()
{
#if TQKVC_CLUSTERS
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

static __device__ __forceinline__ void wait_for_previous()
{
#if TQKVC_CLUSTERS
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Launches clusters of n_cluster blocks along x; with is_early they may start before the kernel ahead has ended. */
template <typename ARGS>
static cudaError_t launch_clusters(void (*kernel)(ARGS), dim3 grid, uint32_t n_cluster,
                                   uint32_t n_threads, size_t shared_bytes, bool is_early,
                                   cudaStream_t stream, const ARGS &args)
{
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};

    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = n_cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(n_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = !is_early ? 0 : n_cluster > 1 ? 2 : 1; /* devices without the one have no clusters */
    return cudaLaunchKernelEx(&config, kernel, args);
}

#endif /* TQKVC_CLUSTER_CUH */
