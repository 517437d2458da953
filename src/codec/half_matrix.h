/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies of a head's matrices in half the bytes. A decoding step reads every matrix of a model once,
 * for one row or a few, and long after its last use: what it takes is reading them.
 */
#ifndef TQKVI_HALF_MATRIX_H
#define TQKVI_HALF_MATRIX_H

#include <stdbool.h>

#include "base/alloc.h"
#include "kernels/kernels.h"

/*
 * m: [dim][dim]. With `rounded`, each value becomes the nearest that an f16 value times the power of
 * two of its column can be (off by 2^-11 of it at most, or by 2^-39 of the largest of its column).
 * Without, a matrix that would change gives value NULL, as does one that no f16 values can be.
 * Errors: TQKV_ERR_NO_MEMORY.
 */
TQKV_NODISCARD tqkv_status tqkvi_half_matrix_init(tqkvk_half_matrix *half, const float *m,
                                                  uint32_t dim, bool rounded,
                                                  const tqkv_allocator *mem);
/* The same of the transposed matrix. */
TQKV_NODISCARD tqkv_status tqkvi_half_matrix_init_transposed(tqkvk_half_matrix *half,
                                                             const float *m, uint32_t dim,
                                                             bool rounded,
                                                             const tqkv_allocator *mem);
void tqkvi_half_matrix_deinit(tqkvk_half_matrix *half, const tqkv_allocator *mem);

#endif /* TQKVI_HALF_MATRIX_H */
