/* SPDX-License-Identifier: Apache-2.0 */
/* Which tokens of a block a range of queries can see, and what the mask adds to their scores. */
#ifndef TQKVI_ATTN_SIGHT_H
#define TQKVI_ATTN_SIGHT_H

#include "attn/attention.h"

/* Queries first_q .. last_q of a call. */
typedef struct tqkvi_sight {
    const tqkvk_table *kernels;
    const tqkv_attend_args *args;
    uint32_t first_q, last_q;
    uint32_t window; /* as in tqkvi_attention */
    int32_t first_position;
} tqkvi_sight;

/* Number of blocks of a span that can hold cells of the call. */
uint32_t tqkvi_span_blocks(const tqkvi_span *span, const tqkv_attend_args *args);

/* Bit i: token i of the block is seen by at least one of the queries. */
uint32_t tqkvi_sight_block(const tqkvi_sight *sight, const tqkvi_span *span, uint32_t block);

/*
 * bias: [16] out, what is added to the scores of query q; -inf where bit i of visible is 0.
 * Returns false when all of it is zero.
 */
bool tqkvi_sight_bias(const tqkvi_sight *sight, const tqkvi_span *span, uint32_t block,
                      uint32_t visible, uint32_t q, float *bias);

/* The base of all tokens of blocks [first, end) that take part; NULL: none do, or they differ. */
const int32_t *tqkvi_span_one_base(const tqkvi_span *span, uint32_t first, uint32_t end,
                                   const tqkv_attend_args *args);

/* Lowest base above `after` of tokens of blocks [first, end) that take part; false without one. */
bool tqkvi_span_next_base(const tqkvi_span *span, uint32_t first, uint32_t end,
                          const tqkv_attend_args *args, int64_t after, int32_t *base);

/* Bit i: token i of the block has this base. */
uint32_t tqkvi_span_same_base(const tqkvi_span *span, uint32_t block, int32_t base);

#endif /* TQKVI_ATTN_SIGHT_H */
