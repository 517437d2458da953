/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies of the matrices of a layer in half the bytes. A decoding step reads every matrix of a model
 * once, for one row or a few, and long after its last use: what it takes is reading them. So they
 * lie one after another, in the order of reading, which a processor foresees.
 */
#ifndef TQKVI_HALF_MATRIX_H
#define TQKVI_HALF_MATRIX_H

#include <stdbool.h>

#include "kernels/kernels.h"

/* Bytes of one, a multiple of TQKV_ALIGN. */
size_t tqkvi_half_matrix_bytes(uint32_t dim);

/*
 * Makes one in memory (TQKV_ALIGN-aligned, of that many bytes) from m[i * row + j * column]. With
 * `rounded`, each value becomes the nearest that an f16 value times the power of two of its output
 * channel can be: off by 2^-11 of it at most, or by 2^-39 of the largest of its channel.
 * Without, a matrix that would change gives value NULL, as does one that is too large for f16 values.
 */
void tqkvi_half_matrix_init(tqkvk_half_matrix *half, void *memory, const float *m, size_t row,
                            size_t column, uint32_t dim, bool rounded);

#endif /* TQKVI_HALF_MATRIX_H */
