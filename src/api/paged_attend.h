/* SPDX-License-Identifier: Apache-2.0 */
/* Attention over a layer whose blocks belong to an engine: where cache and attn meet. */
#ifndef TQKVI_PAGED_ATTEND_H
#define TQKVI_PAGED_ATTEND_H

#include "cache/paged_layer.h"

size_t tqkvi_paged_scratch_bytes(const tqkv_paged *paged, uint32_t n_q, uint32_t seq_len,
                                 size_t n_workers);
/* See tqkv_paged_attend; everything checked, args->n_q > 0. */
void tqkvi_paged_attend(tqkv_paged *paged, const tqkv_paged_batch *batch,
                        const tqkv_attend_args *args, const tqkv_parallel *parallel);

#endif /* TQKVI_PAGED_ATTEND_H */
