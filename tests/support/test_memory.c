/* SPDX-License-Identifier: Apache-2.0 */
#include "test_memory.h"

#include <stdlib.h>
#include <string.h>

static void *count_alloc(void *user, size_t bytes, size_t align)
{
    test_memory *memory = user;
    memory->n_calls++;
    if (bytes == 0 || align == 0 || align > TQKV_ALIGN || (align & (align - 1)) != 0)
        abort(); /* the contract of tqkv_allocator */
    memory->largest = bytes > memory->largest ? bytes : memory->largest;
    if (memory->fail_call != 0 && memory->n_calls >= memory->fail_call)
        return NULL;
    if (memory->bytes_max != 0 && bytes > memory->bytes_max)
        return NULL;
    void *ptr = aligned_alloc(TQKV_ALIGN, (bytes + TQKV_ALIGN - 1) / TQKV_ALIGN * TQKV_ALIGN);
    if (ptr) {
        memset(ptr, 0xa5, bytes);
        memory->n_live++;
    }
    return ptr;
}

static void count_free(void *user, void *ptr)
{
    test_memory *memory = user;
    if (!ptr || memory->n_live == 0)
        abort();
    memory->n_live--;
    free(ptr);
}

tqkv_allocator test_memory_allocator(test_memory *memory)
{
    return (tqkv_allocator){.user = memory, .alloc = count_alloc, .free = count_free};
}
