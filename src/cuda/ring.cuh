/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies from pages to shared memory that complete on a barrier: the bulk copy engine from sm_90 on,
 * 16-byte asynchronous copies before. Used by one warp; all lanes call every function.
 */
#ifndef TQKVC_RING_CUH
#define TQKVC_RING_CUH

#include <stdint.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TQKVC_BULK 1
#else
#define TQKVC_BULK 0
#endif

static __device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/* One lane; then a barrier among the threads that use it. */
static __device__ __forceinline__ void ring_barrier_init(uint64_t *barrier)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(TQKVC_BULK ? 1 : 32)
                 : "memory");
#if TQKVC_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/*
 * Copies for lanes below n_copies: n_bytes (a multiple of 16) from source to target of each lane, both
 * 16-aligned. KV is read once: it is the first to leave L2, so that queries of frames stay. A copy may
 * end before lane 0 has said how many bytes there are: the phase waits for lane 0, too.
 */
static __device__ __forceinline__ void ring_copy(uint64_t *barrier, uint8_t *target,
                                                 const uint8_t *source, uint32_t n_bytes,
                                                 uint32_t n_copies, uint32_t lane)
{
#if TQKVC_BULK
    const uint32_t address = shared_address(barrier);
    if (lane == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address),
                     "r"(n_copies * n_bytes)
                     : "memory");
    if (lane < n_copies) {
        uint64_t policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(target)),
            "l"(source), "r"(n_bytes), "r"(address), "l"(policy)
            : "memory");
    }
#else
    for (uint32_t i = 0; i < n_copies; i++) {
        const uint64_t from = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(source), i);
        const uint32_t to = __shfl_sync(0xffffffffu, shared_address(target), i);
        for (uint32_t at = 16 * lane; at < n_bytes; at += 16 * 32)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at)
                         : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
#endif
}

/* Waits until the copies of the given phase (0, 1, 0, ...) of a barrier are there. */
static __device__ __forceinline__ void ring_wait(uint64_t *barrier, uint32_t phase)
{
    uint32_t done = 0;
    while (!done) {
#if TQKVC_BULK
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 "
                     "%0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(phase)
                     : "memory");
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 "
                     "%0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(phase)
                     : "memory");
#endif
    }
}

#endif /* TQKVC_RING_CUH */
