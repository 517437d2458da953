/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where new tokens go and who has to leave for them.
 *
 * Think of the tokens of a stream as one queue, oldest first: those of the last young tier, ...,
 * those of tier 0, then the new ones. After each new token a tier that holds tier_tokens + 16 sends
 * its oldest 16 on. For any number of new tokens it follows how many leave each tier in all
 * (tqkvi_outflow), and every token can go to the tier where it ends in one step.
 */
#ifndef TQKVI_PLACING_H
#define TQKVI_PLACING_H

#include "cache/cell_store.h"

/* What leaves each young tier of a stream, and how many tokens each held before. */
typedef struct tqkvi_outflow {
    uint64_t leave[TQKV_TIERS_MAX];
    uint64_t held[TQKV_TIERS_MAX];
} tqkvi_outflow;

/* Lets n new tokens in at tier 0: moves those that have to leave. */
void tqkvi_make_way(tqkv_store *store, uint32_t stream, size_t n, tqkvi_outflow *flow,
                    const tqkv_parallel *parallel);

/* Makes one free slot in a tier, if it has none. */
void tqkvi_make_slot(tqkv_store *store, uint32_t stream, uint32_t tier);

/* The place of the i-th of the new tokens that tqkvi_make_way let in. */
tqkvi_spot tqkvi_place_new(tqkv_store *store, const tqkvi_outflow *flow, size_t i, uint32_t cell,
                           int32_t base);

/* Whether a token at this position can still become a sink. */
bool tqkvi_takes_sink(const tqkv_store *store, uint32_t stream, int64_t position);

#endif /* TQKVI_PLACING_H */
