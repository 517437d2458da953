/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One side of one cell as self-describing bytes, for engines that save and restore their cache.
 *
 *      0  54 7e 51 4b   magic; as f16 its first two bytes are a NaN, which no row starts with
 *      4  u8            format version
 *      5  u8            side (0 K, 1 V)
 *      6  u8            tier
 *      7  u8            1 for a sink, which keeps the first tier; otherwise 0
 *      8  u16           number of KV heads
 *     10  u16           layer
 *     12  i32           base: position that the rotation of K is undone to
 *     16  u8[8]         first bytes of the plan's fingerprint
 *     24  u32           bytes of the whole record
 *     28  for each head: scale byte, row
 *      …  u8[4]         first bytes of the SHA-256 of all before
 *
 * Writing: tqkvi_record_begin, fill what tqkvi_record_head gives, tqkvi_record_end.
 */
#ifndef TQKVI_RECORD_H
#define TQKVI_RECORD_H

#include "format/plan_data.h"

#define TQKVI_RECORD_MAGIC "\x54\x7e\x51\x4b"
#define TQKVI_RECORD_MAGIC_BYTES 4
#define TQKVI_RECORD_VERSION 0u
#define TQKVI_RECORD_HEADER_BYTES 28
#define TQKVI_RECORD_CHECK_BYTES 4

/* Where a record comes from. */
typedef struct tqkvi_record {
    uint32_t layer; /* of the plan */
    tqkv_side side;
    uint32_t tier;
    int32_t base; /* 0 for V */
    bool sink;    /* tier 0 only */
} tqkvi_record;

/* Bytes of one record. plan: sealed or read. */
size_t tqkvi_record_bytes(const tqkv_plan *plan, uint32_t layer, tqkv_side side, uint32_t tier);
/* The largest of any tier. */
size_t tqkvi_record_bytes_max(const tqkv_plan *plan, uint32_t layer, tqkv_side side);

/* Writes the header. bytes: [tqkvi_record_bytes] out, any alignment. */
void tqkvi_record_begin(const tqkv_plan *plan, const tqkvi_record *record, uint8_t *bytes);
/* Offset in the record of the scale byte of a head; its row follows. */
size_t tqkvi_record_head(const tqkv_plan *plan, const tqkvi_record *record, uint32_t head);
/* Writes the check at the end. */
void tqkvi_record_end(const tqkv_plan *plan, const tqkvi_record *record, uint8_t *bytes);

/*
 * Checks every field of a record for one side of one layer of a plan; bytes borrowed.
 * record: what it holds, zeros on failure.
 * Errors: TQKV_ERR_CORRUPT, TQKV_ERR_VERSION, TQKV_ERR_MISMATCH (another plan, layer or side).
 */
TQKV_NODISCARD tqkv_status tqkvi_record_unpack(const tqkv_plan *plan, uint32_t layer,
                                               tqkv_side side, const uint8_t *bytes, size_t n_bytes,
                                               tqkvi_record *record);

#endif /* TQKVI_RECORD_H */
