/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of one KV head to codes and back, for engines that keep their own pages. An engine that
 * wants pages, ageing and attention as well uses store.h.
 *
 * Encoding is deterministic: the same bytes on every CPU and for every thread count, and
 * encode(decode(encode(x))) == encode(x). A row with NaN or Inf is stored as zero.
 */
#ifndef TURBOQUANT_CODEC_H
#define TURBOQUANT_CODEC_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tqkv_codec tqkv_codec;

/*
 * Prepares every head of one layer. plan: kept. rope: NULL takes the plan's, otherwise copied and
 * used instead of it. Threads: the object never changes, share it.
 * Errors: TQKV_ERR_INVALID_ARG, TQKV_ERR_NO_MEMORY.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_codec_create(const tqkv_plan *plan, uint32_t layer, const tqkv_rope *rope,
                                                      const tqkv_allocator *mem, tqkv_codec **out);
TQKV_API void tqkv_codec_destroy(tqkv_codec *codec);

/* Bytes of the codes of one row (one token, one head); 0 for a bad argument. */
TQKV_API size_t tqkv_codec_row_bytes(const tqkv_codec *codec, uint32_t head, tqkv_side side, uint32_t tier);

/*
 * Encodes rows of one head.
 * x: [n_rows][dim] f32, stride in floats, borrowed; K has RoPE applied.
 * base: position that K's rotation is undone to (any value; the same must be given to decode).
 * scales: [n_rows] out. codes: [n_rows][row_bytes] out.
 * n_bad: rows stored as zero because of NaN or Inf; may be NULL.
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_codec_encode(const tqkv_codec *codec, uint32_t head, tqkv_side side,
                                                      uint32_t tier, int32_t base, const float *x, size_t stride,
                                                      size_t n_rows, uint8_t *scales, uint8_t *codes,
                                                      size_t *n_bad);

/* The inverse; x: [n_rows][dim] f32 out, stride in floats. Any bytes decode to finite values. */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_codec_decode(const tqkv_codec *codec, uint32_t head, tqkv_side side,
                                                      uint32_t tier, int32_t base, const uint8_t *scales,
                                                      const uint8_t *codes, size_t n_rows, float *x, size_t stride);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_CODEC_H */
