/* SPDX-License-Identifier: Apache-2.0 */
/* Exported cells; see record.h. */
#include "format/record.h"

#include <string.h>

#include "base/sha256.h"

#define FINGERPRINT_BYTES 8
#define SIDE_AT 5
#define TIER_AT 6
#define SINK_AT 7
#define N_HEADS_AT 8
#define LAYER_AT 10
#define BASE_AT 12
#define FINGERPRINT_AT 16
#define LENGTH_AT 24

static const tqkvi_head_plan *heads_of(const tqkv_plan *plan, uint32_t layer, tqkv_side side)
{
    return plan->layers[layer].heads[side];
}

size_t tqkvi_record_head(const tqkv_plan *plan, const tqkvi_record *record, uint32_t head)
{
    const tqkvi_head_plan *heads = heads_of(plan, record->layer, record->side);
    size_t at = TQKVI_RECORD_HEADER_BYTES;
    for (uint32_t g = 0; g < head; g++)
        at += 1 + heads[g].layout[record->tier].row_bytes;
    return at;
}

size_t tqkvi_record_bytes(const tqkv_plan *plan, uint32_t layer, tqkv_side side, uint32_t tier)
{
    const tqkvi_record record = {.layer = layer, .side = side, .tier = tier};
    return tqkvi_record_head(plan, &record, plan->layers[layer].shape.n_kv_heads) +
           TQKVI_RECORD_CHECK_BYTES;
}

size_t tqkvi_record_bytes_max(const tqkv_plan *plan, uint32_t layer, tqkv_side side)
{
    size_t largest = 0;
    for (uint32_t tier = 0; tier < plan->n_tiers; tier++) {
        const size_t n_bytes = tqkvi_record_bytes(plan, layer, side, tier);
        largest = n_bytes > largest ? n_bytes : largest;
    }
    return largest;
}

void tqkvi_record_begin(const tqkv_plan *plan, const tqkvi_record *record, uint8_t *bytes)
{
    const size_t n_bytes = tqkvi_record_bytes(plan, record->layer, record->side, record->tier);
    memset(bytes, 0, TQKVI_RECORD_HEADER_BYTES);
    memcpy(bytes, TQKVI_RECORD_MAGIC, TQKVI_RECORD_MAGIC_BYTES);
    bytes[4] = TQKVI_RECORD_VERSION;
    bytes[SIDE_AT] = (uint8_t)record->side;
    bytes[TIER_AT] = (uint8_t)record->tier;
    bytes[SINK_AT] = record->sink;
    tqkvi_store_u16(bytes + N_HEADS_AT, (uint16_t)plan->layers[record->layer].shape.n_kv_heads);
    tqkvi_store_u16(bytes + LAYER_AT, (uint16_t)record->layer);
    tqkvi_store_u32(bytes + BASE_AT, (uint32_t)record->base);
    memcpy(bytes + FINGERPRINT_AT, plan->fingerprint, FINGERPRINT_BYTES);
    tqkvi_store_u32(bytes + LENGTH_AT, (uint32_t)n_bytes);
}

static void check_of(const uint8_t *bytes, size_t n_bytes, uint8_t out[TQKVI_RECORD_CHECK_BYTES])
{
    uint8_t digest[TQKVI_SHA256_BYTES];
    tqkvi_sha256 sha;
    tqkvi_sha256_init(&sha);
    tqkvi_sha256_update(&sha, bytes, n_bytes);
    tqkvi_sha256_digest(&sha, digest);
    memcpy(out, digest, TQKVI_RECORD_CHECK_BYTES);
}

void tqkvi_record_end(const tqkv_plan *plan, const tqkvi_record *record, uint8_t *bytes)
{
    const size_t at = tqkvi_record_bytes(plan, record->layer, record->side, record->tier) -
                      TQKVI_RECORD_CHECK_BYTES;
    check_of(bytes, at, bytes + at);
}

/* A row of f16 that we wrote has no NaN and no infinity. */
static bool plain_rows_are_finite(const tqkv_plan *plan, const tqkvi_record *record,
                                  const uint8_t *bytes)
{
    const tqkvi_head_plan *heads = heads_of(plan, record->layer, record->side);
    for (uint32_t g = 0; g < plan->layers[record->layer].shape.n_kv_heads; g++) {
        if (!tqkvi_head_is_plain(&heads[g]))
            continue;
        const uint8_t *row = bytes + tqkvi_record_head(plan, record, g) + 1;
        for (uint32_t i = 0; i < heads[g].layout[record->tier].row_bytes; i += 2) {
            if ((tqkvi_load_u16(row + i) & 0x7c00) == 0x7c00)
                return false;
        }
    }
    return true;
}

tqkv_status tqkvi_record_unpack(const tqkv_plan *plan, uint32_t layer, tqkv_side side,
                                const uint8_t *bytes, size_t n_bytes, tqkvi_record *record)
{
    *record = (tqkvi_record){.layer = 0};
    if (n_bytes < TQKVI_RECORD_HEADER_BYTES + TQKVI_RECORD_CHECK_BYTES ||
        memcmp(bytes, TQKVI_RECORD_MAGIC, TQKVI_RECORD_MAGIC_BYTES) != 0)
        return TQKV_ERR_CORRUPT;
    if (bytes[4] != TQKVI_RECORD_VERSION)
        return TQKV_ERR_VERSION;
    uint8_t check[TQKVI_RECORD_CHECK_BYTES];
    check_of(bytes, n_bytes - TQKVI_RECORD_CHECK_BYTES, check);
    if (tqkvi_load_u32(bytes + LENGTH_AT) != n_bytes ||
        memcmp(check, bytes + n_bytes - TQKVI_RECORD_CHECK_BYTES, sizeof(check)) != 0)
        return TQKV_ERR_CORRUPT;

    /* What was written is what is here; now whether it is ours. */
    if (memcmp(bytes + FINGERPRINT_AT, plan->fingerprint, FINGERPRINT_BYTES) != 0 ||
        tqkvi_load_u16(bytes + LAYER_AT) != layer || bytes[SIDE_AT] != (uint8_t)side)
        return TQKV_ERR_MISMATCH;
    const tqkvi_record found = {.layer = layer,
                                .side = side,
                                .tier = bytes[TIER_AT],
                                .base = (int32_t)tqkvi_load_u32(bytes + BASE_AT),
                                .sink = bytes[SINK_AT] == 1};
    if (found.tier >= plan->n_tiers || bytes[SINK_AT] > (found.tier == 0) ||
        tqkvi_load_u16(bytes + N_HEADS_AT) != plan->layers[layer].shape.n_kv_heads ||
        n_bytes != tqkvi_record_bytes(plan, layer, side, found.tier) ||
        (side == TQKV_SIDE_V && found.base != 0) || !plain_rows_are_finite(plan, &found, bytes))
        return TQKV_ERR_CORRUPT;
    *record = found;
    return TQKV_OK;
}
