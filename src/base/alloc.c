/* SPDX-License-Identifier: Apache-2.0 */
/* Memory through the caller's allocator; see alloc.h. */
#include "base/alloc.h"

#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <malloc.h>
#endif

static void *default_alloc(void *user, size_t bytes, size_t align)
{
    (void)user;
    if (bytes > SIZE_MAX - align)
        return NULL;
#if defined(_WIN32)
    return _aligned_malloc(bytes, align);
#else
    return aligned_alloc(align, (bytes + align - 1) / align * align);
#endif
}

static void default_free(void *user, void *ptr)
{
    (void)user;
#if defined(_WIN32)
    _aligned_free(ptr);
#else
    free(ptr);
#endif
}

void tqkvi_allocator_init(tqkv_allocator *out, const tqkv_allocator *mem)
{
    if (mem)
        *out = *mem;
    else
        *out = (tqkv_allocator){.user = NULL, .alloc = default_alloc, .free = default_free};
}

void *tqkvi_alloc(const tqkv_allocator *mem, size_t bytes)
{
    if (bytes > SIZE_MAX - TQKV_ALIGN)
        return NULL;
    uint8_t *ptr = mem->alloc(mem->user, bytes + TQKV_ALIGN, TQKV_ALIGN);
    if (ptr)
        memset(ptr + bytes, 0, TQKV_ALIGN); /* what a kernel reads past the end is defined */
    return ptr;
}

void *tqkvi_alloc_zero(const tqkv_allocator *mem, size_t bytes)
{
    void *ptr = tqkvi_alloc(mem, bytes);
    if (ptr)
        memset(ptr, 0, bytes);
    return ptr;
}

void tqkvi_free(const tqkv_allocator *mem, void *ptr)
{
    if (ptr)
        mem->free(mem->user, ptr);
}

tqkv_status tqkvi_size_mul(size_t a, size_t b, size_t *out)
{
    if (b != 0 && a > SIZE_MAX / b) {
        *out = 0;
        return TQKV_ERR_NO_MEMORY;
    }
    *out = a * b;
    return TQKV_OK;
}

tqkv_status tqkvi_size_add(size_t a, size_t b, size_t *out)
{
    if (a > SIZE_MAX - b) {
        *out = 0;
        return TQKV_ERR_NO_MEMORY;
    }
    *out = a + b;
    return TQKV_OK;
}
