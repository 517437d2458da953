/* SPDX-License-Identifier: Apache-2.0 */
/* Checks that several public functions make of what they are given. */
#ifndef TQKVI_CHECKS_H
#define TQKVI_CHECKS_H

#include <stdbool.h>

#include "format/plan_data.h"

/* mem: NULL for malloc. */
static inline bool tqkvi_is_allocator(const tqkv_allocator *mem)
{
    return !mem || (mem->alloc && mem->free);
}

/* rope: NULL for the plan's. */
static inline bool tqkvi_is_rope(const tqkv_rope *rope, uint32_t k_dim)
{
    return !rope ||
           (!tqkvi_rope_fault(rope) && (rope->style == TQKV_ROPE_NONE || rope->n_rot <= k_dim));
}

/* A layer of a plan that has a cache. */
static inline bool tqkvi_is_cached_layer(const tqkv_plan *plan, uint32_t layer)
{
    return plan && layer < plan->n_layers && plan->layers[layer].shape.n_kv_heads > 0;
}

#endif /* TQKVI_CHECKS_H */
