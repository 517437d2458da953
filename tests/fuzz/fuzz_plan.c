/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a plan file: as they are, and with length and fingerprint made right, without which
 * a fuzzer would never get past them. What is accepted must be written as the same bytes.
 */
#include <stdlib.h>
#include <string.h>

#include "format/plan_file.h"

#define BYTES_PER_BYTE_MAX 200 /* memory that a byte of the file may cost */
#define BYTES_MIN 65536

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t allowed_bytes;

static void *bounded_alloc(void *user, size_t bytes, size_t align)
{
    (void)user;
    if (bytes > allowed_bytes)
        abort(); /* a small file asks for a lot of memory */
    return aligned_alloc(align, (bytes + align - 1) / align * align);
}

static void bounded_free(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

static void read_and_write(const uint8_t *data, size_t size)
{
    const tqkv_allocator mem = {.user = NULL, .alloc = bounded_alloc, .free = bounded_free};
    tqkv_plan *plan;
    allowed_bytes = BYTES_PER_BYTE_MAX * size + BYTES_MIN;
    if (tqkvi_plan_parse(&mem, data, size, NULL, &plan) != TQKV_OK) {
        if (plan)
            abort();
        return;
    }
    uint8_t *again;
    size_t n_again;
    if (tqkvi_plan_serialise(plan, &again, &n_again) != TQKV_OK || n_again != size ||
        memcmp(again, data, size) != 0)
        abort();
    if (tqkvi_plan_seal(plan, NULL) != TQKV_OK ||
        memcmp(plan->fingerprint, data + TQKVI_PLAN_FINGERPRINT_AT, sizeof(plan->fingerprint)) != 0)
        abort(); /* sealing asks for what reading asks for */
    tqkvi_free(&mem, again);
    tqkv_plan_destroy(plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    read_and_write(data, size);
    if (size < TQKVI_PLAN_HEADER_BYTES)
        return 0;
    uint8_t *copy = malloc(size);
    if (!copy)
        return 0;
    memcpy(copy, data, size);
    memcpy(copy, TQKVI_PLAN_MAGIC, TQKVI_PLAN_MAGIC_BYTES);
    tqkvi_store_u32(copy + TQKVI_PLAN_VERSION_AT, TQKVI_PLAN_VERSION);
    tqkvi_store_u64(copy + TQKVI_PLAN_LENGTH_AT, size);
    tqkvi_plan_fingerprint(copy, size, copy + TQKVI_PLAN_FINGERPRINT_AT);
    read_and_write(copy, size);
    free(copy);
    return 0;
}
