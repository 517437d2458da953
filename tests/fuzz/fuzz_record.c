/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a record, for a coded and for a plain plan: as they are, and with everything made
 * right that guards the rest. What is accepted must be written as the same bytes.
 */
#include <stdlib.h>
#include <string.h>

#include "format/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const tqkv_plan *plan_of(tqkv_builtin kind)
{
    static tqkv_plan *plans[2];
    if (!plans[kind]) {
        const tqkv_plan_layer shape = {.n_heads = 2, .n_kv_heads = 1, .k_dim = 16, .v_dim = 32};
        if (tqkv_plan_builtin(kind, &shape, &plans[kind]) != TQKV_OK)
            abort();
    }
    return plans[kind];
}

static void unpack_and_pack(const tqkv_plan *plan, tqkv_side side, const uint8_t *data, size_t size)
{
    tqkvi_record record;
    if (tqkvi_record_unpack(plan, 0, side, data, size, &record) != TQKV_OK)
        return;
    const size_t n_bytes = tqkvi_record_bytes(plan, 0, side, record.tier);
    const size_t rows = tqkvi_record_head(plan, &record, 0);
    uint8_t *again = malloc(n_bytes);
    if (n_bytes != size || !again)
        abort();
    tqkvi_record_begin(plan, &record, again);
    memcpy(again + rows, data + rows, size - rows - TQKVI_RECORD_CHECK_BYTES);
    tqkvi_record_end(plan, &record, again);
    if (memcmp(again, data, size) != 0)
        abort();
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (int i = 0; i < 4; i++) {
        const tqkv_side side = i % 2 ? TQKV_SIDE_V : TQKV_SIDE_K;
        const tqkv_plan *plan = plan_of(i / 2 ? TQKV_BUILTIN_F16 : TQKV_BUILTIN_Q8);
        const tqkvi_record right = {.layer = 0, .side = side};
        const size_t n_bytes = tqkvi_record_bytes(plan, 0, side, 0);
        unpack_and_pack(plan, side, data, size);

        /* Tier, sink, base and rows stay as they came. */
        uint8_t *copy = calloc(n_bytes, 1);
        if (!copy)
            return 0;
        tqkvi_record_begin(plan, &right, copy);
        for (size_t k = 0; k < size && k < n_bytes; k++) {
            if (k == 6 || k == 7 || (k >= 12 && k < 16) || k >= TQKVI_RECORD_HEADER_BYTES)
                copy[k] = data[k];
        }
        tqkvi_record_end(plan, &right, copy);
        unpack_and_pack(plan, side, copy, n_bytes);
        free(copy);
    }
    return 0;
}
