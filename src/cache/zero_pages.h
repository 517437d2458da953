/* SPDX-License-Identifier: Apache-2.0 */
/* A large array that reads as zero and takes memory only where it was written. */
#ifndef TQKVI_ZERO_PAGES_H
#define TQKVI_ZERO_PAGES_H

#include <stdbool.h>

#include "turboquant/types.h"

typedef struct tqkvi_zero_pages {
    tqkv_allocator mem;
    bool is_mapped; /* by the operating system; otherwise from mem, zeroed */
    uint8_t *data;  /* readable TQKV_ALIGN bytes past the end */
    size_t n_bytes;
} tqkvi_zero_pages;

/* Parts that are given back apart should start and end on multiples of this. */
size_t tqkvi_zero_pages_unit(void);

/* mem: NULL maps anonymous pages. n_bytes > 0. */
TQKV_NODISCARD tqkv_status tqkvi_zero_pages_init(tqkvi_zero_pages *pages, const tqkv_allocator *mem,
                                                 size_t n_bytes);
/* Accepts what init left behind after a failure, and zeros. */
void tqkvi_zero_pages_deinit(tqkvi_zero_pages *pages);

/* Makes bytes [first, first + n_bytes) zero and gives their whole pages back. */
void tqkvi_zero_pages_forget(tqkvi_zero_pages *pages, size_t first, size_t n_bytes);

#endif /* TQKVI_ZERO_PAGES_H */
