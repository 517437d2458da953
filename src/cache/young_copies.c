/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/young_copies.h"

#include <string.h>

size_t tqkvi_young_copies_bytes(uint32_t n_copies, uint32_t n_blocks)
{
    const size_t ring = 2 * ((size_t)n_copies + 1) * sizeof(uint32_t);

    return ring + ((size_t)n_blocks + n_copies) * sizeof(uint32_t) +
           ((size_t)n_copies + 1) / 2 * 2 * sizeof(uint16_t);
}

void tqkvi_young_copies_init(tqkvi_young_copies *copies, void *memory, uint32_t n_copies,
                             uint32_t n_blocks)
{
    copies->n_copies = n_copies;
    copies->newer = memory;
    copies->older = copies->newer + n_copies + 1;
    copies->block_of = copies->older + n_copies + 1;
    copies->copy_of = copies->block_of + n_copies;
    copies->valid = (uint16_t *)(copies->copy_of + n_blocks);
    for (uint32_t i = 0; i <= n_copies; i++) {
        copies->newer[i] = i == 0 ? n_copies : i - 1;
        copies->older[i] = i == n_copies ? 0 : i + 1;
    }
    memset(copies->valid, 0, n_copies * sizeof(*copies->valid));
    for (uint32_t i = 0; i < n_copies; i++)
        copies->block_of[i] = TQKVI_COPY_NONE;
    for (uint32_t i = 0; i < n_blocks; i++)
        copies->copy_of[i] = TQKVI_COPY_NONE;
}

void tqkvi_young_copies_use(tqkvi_young_copies *copies, uint32_t copy)
{
    const uint32_t head = copies->n_copies;
    const uint32_t newer = copies->newer[copy], older = copies->older[copy];

    copies->older[newer] = older;
    copies->newer[older] = newer;
    copies->newer[copy] = head;
    copies->older[copy] = copies->older[head];
    copies->newer[copies->older[head]] = copy;
    copies->older[head] = copy;
}

uint32_t tqkvi_young_copies_take(tqkvi_young_copies *copies, uint32_t block)
{
    uint32_t copy = copies->copy_of[block];

    if (copy == TQKVI_COPY_NONE) {
        copy = copies->newer[copies->n_copies]; /* the oldest */
        if (copies->block_of[copy] != TQKVI_COPY_NONE)
            copies->copy_of[copies->block_of[copy]] = TQKVI_COPY_NONE;
        copies->copy_of[block] = copy;
        copies->block_of[copy] = block;
        copies->valid[copy] = 0;
    }
    tqkvi_young_copies_use(copies, copy);
    return copy;
}
