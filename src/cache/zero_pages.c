/* SPDX-License-Identifier: Apache-2.0 */
/* Anonymous mappings where the system has them, otherwise memory of the caller, zeroed. */
#include "cache/zero_pages.h"

#include <string.h>

#if defined(_WIN32)
#define HAS_MMAP 0
#else
#define HAS_MMAP 1
#include <sys/mman.h>
#include <unistd.h>
#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif
#endif

#include "base/alloc.h"

size_t tqkvi_zero_pages_unit(void)
{
#if HAS_MMAP
    const long bytes = sysconf(_SC_PAGESIZE);

    return bytes > TQKV_ALIGN ? (size_t)bytes : 4096;
#else
    return 4096;
#endif
}

#if HAS_MMAP
static void *map(void *at, size_t n_bytes)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
    void *data = mmap(at, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);

    return data == MAP_FAILED ? NULL : data;
}
#endif

tqkv_status tqkvi_zero_pages_init(tqkvi_zero_pages *pages, const tqkv_allocator *mem,
                                  size_t n_bytes)
{
    size_t held_bytes;

    *pages = (tqkvi_zero_pages){.n_bytes = n_bytes};
    tqkvi_allocator_init(&pages->mem, mem);
    TQKV_TRY(tqkvi_size_add(n_bytes, TQKV_ALIGN, &held_bytes));
#if HAS_MMAP
    if (!mem) {
        pages->is_mapped = true;
        pages->data = map(NULL, held_bytes);
        return pages->data ? TQKV_OK : TQKV_ERR_NO_MEMORY;
    }
#endif
    pages->data = tqkvi_alloc_zero(&pages->mem, n_bytes);
    return pages->data ? TQKV_OK : TQKV_ERR_NO_MEMORY;
}

void tqkvi_zero_pages_deinit(tqkvi_zero_pages *pages)
{
    if (!pages->data)
        return;
#if HAS_MMAP
    if (pages->is_mapped) {
        (void)munmap(pages->data, pages->n_bytes + TQKV_ALIGN);
        pages->data = NULL;
        return;
    }
#endif
    tqkvi_free(&pages->mem, pages->data);
    pages->data = NULL;
}

void tqkvi_zero_pages_forget(tqkvi_zero_pages *pages, size_t first, size_t n_bytes)
{
#if HAS_MMAP
    if (pages->is_mapped) {
        const size_t unit = tqkvi_zero_pages_unit();
        const size_t from = (first + unit - 1) / unit * unit;
        const size_t to = (first + n_bytes) / unit * unit;
        if (from < to && map(pages->data + from, to - from)) {
            memset(pages->data + first, 0, from - first);
            memset(pages->data + to, 0, first + n_bytes - to);
            return;
        }
    }
#endif
    memset(pages->data + first, 0, n_bytes);
}
