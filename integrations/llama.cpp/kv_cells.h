/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One row of a cache tensor as the store holds it. A tensor of K or of V is one side of the store;
 * in a latent layer the host has one tensor, and a row of it is the latent (V) and the channels
 * that turn (K), one after the other.
 */
#ifndef TQKV_KV_CELLS_H
#define TQKV_KV_CELLS_H

#include "kv_layer.h"

/* Values [first, first + n) of a row are those of a side. */
typedef struct tqkvp_part {
    tqkv_side side;
    int64_t first, n;
} tqkvp_part;

/* K before V, as the store wants them written. Returns how many there are. */
size_t tqkvp_row_parts(const tqkvp_tensor *tensor, tqkvp_part parts[2]);

/*
 * The cell that row i of a SET_ROWS node goes to; false where it is none of the tensor, or the
 * indices have a type that no host uses.
 */
bool tqkvp_cell_at(const ggml_tensor *node, const tqkvp_tensor *tensor, int64_t i, int64_t *cell);

/* row: [row_values] f32. The layer has a store. */
tqkv_status tqkvp_cell_read(const tqkvp_tensor *tensor, int64_t cell, float *row);
tqkv_status tqkvp_cell_write(const tqkvp_tensor *tensor, int64_t cell, const float *row);

/* The records of the parts, one behind the other; an upper bound of their bytes. */
size_t tqkvp_cell_record_bytes(const tqkvp_tensor *tensor);
tqkv_status tqkvp_cell_export(const tqkvp_tensor *tensor, int64_t cell, uint8_t *records,
                              size_t *n_bytes);
/* n_bytes: at least what the records take. After an error the cell may hold one part of it. */
tqkv_status tqkvp_cell_import(const tqkvp_tensor *tensor, int64_t cell, const uint8_t *records,
                              size_t n_bytes);

#endif /* TQKV_KV_CELLS_H */
