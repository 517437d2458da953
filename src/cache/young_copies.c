/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/young_copies.h"

#include <string.h>

size_t tqkvi_young_copies_bytes(uint32_t n_copies, uint32_t n_kept, uint32_t n_blocks)
{
    const size_t rings = 2 * ((size_t)n_copies + 1) + n_kept;
    const size_t bytes = (rings + n_blocks + n_copies) * sizeof(uint32_t) +
                         n_copies * sizeof(uint16_t) + n_blocks * sizeof(uint8_t);

    return (bytes + 7) / 8 * 8;
}

void tqkvi_young_copies_init(tqkvi_young_copies *copies, void *memory, uint32_t n_copies,
                             uint32_t n_kept, uint32_t n_blocks)
{
    copies->n_copies = n_copies;
    copies->n_kept = n_kept;
    copies->next_kept = 0;
    copies->newer = memory;
    copies->older = copies->newer + n_copies + 1;
    copies->block_of = copies->older + n_copies + 1;
    copies->copy_of = copies->block_of + n_copies;
    copies->kept = copies->copy_of + n_blocks;
    copies->valid = (uint16_t *)(copies->kept + n_kept);
    copies->is_kept = (uint8_t *)(copies->valid + n_copies);
    for (uint32_t i = 0; i <= n_copies; i++) {
        copies->newer[i] = i == 0 ? n_copies : i - 1;
        copies->older[i] = i == n_copies ? 0 : i + 1;
    }
    memset(copies->valid, 0, n_copies * sizeof(*copies->valid));
    for (uint32_t i = 0; i < n_copies; i++)
        copies->block_of[i] = TQKVI_COPY_NONE;
    for (uint32_t i = 0; i < n_blocks; i++)
        copies->copy_of[i] = TQKVI_COPY_NONE;
    for (uint32_t i = 0; i < n_kept; i++)
        copies->kept[i] = TQKVI_COPY_NONE;
    memset(copies->is_kept, 0, n_blocks * sizeof(*copies->is_kept));
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

/* The least recently used copy that is not kept, or an empty one. */
static uint32_t find_oldest(tqkvi_young_copies *copies)
{
    for (;;) {
        const uint32_t copy = copies->newer[copies->n_copies], block = copies->block_of[copy];
        if (block == TQKVI_COPY_NONE || !copies->is_kept[block])
            return copy;
        tqkvi_young_copies_use(copies, copy);
    }
}

void tqkvi_young_copies_keep(tqkvi_young_copies *copies, uint32_t block)
{
    if (copies->n_kept == 0 || copies->is_kept[block])
        return;
    const uint32_t former = copies->kept[copies->next_kept];
    if (former != TQKVI_COPY_NONE)
        copies->is_kept[former] = false;
    copies->is_kept[block] = true;
    copies->kept[copies->next_kept] = block;
    copies->next_kept = (copies->next_kept + 1) % copies->n_kept;
}

uint32_t tqkvi_young_copies_take(tqkvi_young_copies *copies, uint32_t block)
{
    uint32_t copy = copies->copy_of[block];

    if (copy == TQKVI_COPY_NONE) {
        copy = find_oldest(copies);
        if (copies->block_of[copy] != TQKVI_COPY_NONE)
            copies->copy_of[copies->block_of[copy]] = TQKVI_COPY_NONE;
        copies->copy_of[block] = copy;
        copies->block_of[copy] = block;
        copies->valid[copy] = 0;
    }
    tqkvi_young_copies_use(copies, copy);
    return copy;
}
