/* SPDX-License-Identifier: Apache-2.0 */
/* Stored bytes against the CPU codec. Failures end the test. */
#ifndef STORE_CASE_H
#define STORE_CASE_H

#include "cuda_case.h"

/* Where the tokens of a call are. */
typedef enum cell_order {
    SCATTERED, /* every other slot from 1 on, some tokens left out; positions anywhere */
    IN_ORDER,  /* as a prompt is: slots and positions one after another, over a border of frames */
    BACKWARDS, /* slots from the last down; positions below 0 too, down to the least */
    N_ORDERS
} cell_order;

/*
 * One launch of n_tokens random tokens for a tier and all after it, into the same cells, of which each tier but the
 * first leaves some out; tiers before have no slots.
 */
void check_store(test_random *random, const layer *l, uint32_t tier, uint32_t n_tokens,
                 tqkv_cuda_type type, cell_order order);

#endif /* STORE_CASE_H */
