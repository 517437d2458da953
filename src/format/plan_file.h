/* SPDX-License-Identifier: Apache-2.0 */
/* Constants of the plan file that its writer and its reader share; docs/FORMAT.md has the rest. */
#ifndef TQKVI_PLAN_FILE_H
#define TQKVI_PLAN_FILE_H

#include "format/plan_data.h"

/* A byte above 0x7f, a CR LF pair and a Ctrl-Z: what a transfer as text damages first. */
#define TQKVI_PLAN_MAGIC "\x89TQKV\r\n\x1a"
#define TQKVI_PLAN_MAGIC_BYTES 8
#define TQKVI_PLAN_VERSION 0u
#define TQKVI_PLAN_VERSION_AT 8
#define TQKVI_PLAN_LENGTH_AT 16
#define TQKVI_PLAN_FINGERPRINT_AT 24
#define TQKVI_PLAN_HEADER_BYTES 96

/* SHA-256 over n_bytes >= TQKVI_PLAN_HEADER_BYTES of a file, its fingerprint field left out. */
void tqkvi_plan_fingerprint(const uint8_t *bytes, size_t n_bytes,
                            uint8_t out[TQKV_FINGERPRINT_BYTES]);

/* The orders of the catalogues: by style, n_rot, bits of inv_freq; by n_units, widths. */
int tqkvi_rope_compare(const tqkv_rope *a, const tqkv_rope *b);
int tqkvi_layout_compare(const tqkvi_layout *a, const tqkvi_layout *b);

/*
 * Checks the start of a file: magic, version and length. n_bytes: how many of the first bytes there
 * are; n_file: how long the file is.
 */
TQKV_NODISCARD tqkv_status tqkvi_plan_check_start(const uint8_t *bytes, size_t n_bytes,
                                                  uint64_t n_file, const tqkv_logger *log);

#endif /* TQKVI_PLAN_FILE_H */
