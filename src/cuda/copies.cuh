/* SPDX-License-Identifier: Apache-2.0 */
/* Asynchronous copies of 16 bytes by a thread, which waits for them in groups. */
#ifndef TQKVC_COPIES_CUH
#define TQKVC_COPIES_CUH

#include <stdint.h>

/* 16 bytes to shared memory, asynchronously; a group ends at copy_commit. */
static __device__ __forceinline__ void copy_16(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}

static __device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until no more than N groups of this thread are on their way. */
template <int N> static __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif /* TQKVC_COPIES_CUH */
