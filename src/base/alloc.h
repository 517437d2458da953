/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory through the caller's allocator, and sizes that never wrap.
 *
 * Every block starts on TQKV_ALIGN and is followed by TQKV_ALIGN readable bytes, so that kernels
 * may load whole vectors at the end of an array.
 */
#ifndef TQKVI_ALLOC_H
#define TQKVI_ALLOC_H

#include "turboquant/types.h"

/* mem: copied into out; NULL gives malloc and free. */
void tqkvi_allocator_init(tqkv_allocator *out, const tqkv_allocator *mem);

/* NULL on failure, or when the slack would wrap; bytes == 0 gives a valid block. */
void *tqkvi_alloc(const tqkv_allocator *mem, size_t bytes);
void *tqkvi_alloc_zero(const tqkv_allocator *mem, size_t bytes);
/* Accepts NULL. */
void tqkvi_free(const tqkv_allocator *mem, void *ptr);

/* TQKV_ERR_NO_MEMORY when the result does not fit in size_t (out is 0 then). */
TQKV_NODISCARD tqkv_status tqkvi_size_mul(size_t a, size_t b, size_t *out);
TQKV_NODISCARD tqkv_status tqkvi_size_add(size_t a, size_t b, size_t *out);

/* a / b, rounded up. */
static inline uint32_t tqkvi_div_up(uint32_t a, uint32_t b)
{
    return a / b + (a % b != 0);
}

/* Rounded up to a multiple of TQKV_ALIGN; bytes far from SIZE_MAX. */
static inline size_t tqkvi_align_up(size_t bytes)
{
    return (bytes + TQKV_ALIGN - 1) / TQKV_ALIGN * TQKV_ALIGN;
}

/* Forwards a failure. Only while nothing is owned. */
#define TQKV_TRY(expr)                        \
    do {                                      \
        const tqkv_status tqkv_try_ = (expr); \
        if (tqkv_try_ != TQKV_OK)             \
            return tqkv_try_;                 \
    } while (0)

#endif /* TQKVI_ALLOC_H */
