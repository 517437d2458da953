/* SPDX-License-Identifier: Apache-2.0 */
/* What an engine does to cells and whole streams: read, write, export, import, shift, copy. */
#ifndef TQKVI_RESTORE_H
#define TQKVI_RESTORE_H

#include "cache/cell_store.h"

/* See tqkv_store_read and the others; arguments are checked. */
void tqkvi_store_read(const tqkv_store *store, uint32_t cell, tqkv_side side, float *row);

/*
 * K enters as a new token and takes over the V that the cell had; V goes where the token is, or
 * enters as a new token. So K is written before V (rule 8).
 */
void tqkvi_store_write(tqkv_store *store, uint32_t cell, tqkv_side side, int32_t position,
                       const float *row);

size_t tqkvi_store_export(const tqkv_store *store, uint32_t cell, tqkv_side side, uint8_t *record);
TQKV_NODISCARD tqkv_status tqkvi_store_import(tqkv_store *store, uint32_t cell, tqkv_side side,
                                              const uint8_t *record, size_t n_bytes);

/*
 * Errors: TQKV_ERR_UNSUPPORTED (no RoPE is known), TQKV_ERR_INVALID_ARG (a base would not fit);
 * nothing has changed then.
 */
TQKV_NODISCARD tqkv_status tqkvi_store_shift(tqkv_store *store, uint32_t first,
                                             const int32_t *deltas, uint32_t n);

/* Errors: TQKV_ERR_MISMATCH. */
TQKV_NODISCARD tqkv_status tqkvi_store_copy_stream(tqkv_store *dst, uint32_t dst_stream,
                                                   const tqkv_store *src, uint32_t src_stream);

#endif /* TQKVI_RESTORE_H */
