/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of a cache tensor as the host sees them: saving and restoring states.
 *
 * exact     The row starts with a record of the store, the rest is zero. The record begins with the
 *           bits of an f16 NaN, so no host can take it for values without noticing. For caches that
 *           are declared f16 and where the record fits.
 * portable  Decoded values in the declared type.
 *
 * Restoring takes both, whatever the setting is.
 */
#ifndef TQKV_KV_ROWS_H
#define TQKV_KV_ROWS_H

#include "kv_layer.h"

/* Bytes [offset, offset + n) of the tensor, in the declared layout. */
void tqkvp_rows_get(tqkvp_tensor *tensor, size_t offset, void *to, size_t n);
void tqkvp_rows_set(tqkvp_tensor *tensor, size_t offset, const void *from, size_t n);
void tqkvp_rows_fill(tqkvp_tensor *tensor, size_t offset, uint8_t value, size_t n);

/* Values of rows from `first` on, always decoded, in the declared type. False: no conversion. */
bool tqkvp_rows_decode(tqkvp_tensor *tensor, int64_t first, int64_t n, uint8_t *to);

/* One row of plain storage as values; false: no conversion. */
bool tqkvp_row_values(tqkvp_tensor *tensor, int64_t row, float *values);

/* Takes what the host has set of an unfinished row. */
void tqkvp_rows_settle(tqkvp_tensor *tensor);

/* tqkv_plugin_kv_rows_fn */
int tqkvp_kv_rows(uint32_t layer, uint32_t side, uint64_t first, size_t n, float *rows, int is_write);

#endif /* TQKV_KV_ROWS_H */
