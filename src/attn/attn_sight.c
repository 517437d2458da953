/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sight decides before anything is unpacked: a block that no query of the task sees costs one look
 * at its part of the mask.
 */
#include "attn/attn_sight.h"

#include <math.h>
#include <string.h>

#define HALF_MINUS_INF 0xfc00u
#define ALL_TOKENS 0xffffu

uint32_t tqkvi_span_blocks(const tqkvi_span *span, const tqkv_attend_args *args)
{
    uint32_t n_tokens = span->n_tokens;

    if (!span->cells && n_tokens > args->n_cells)
        n_tokens = args->n_cells;
    return n_tokens / TQKVI_BLOCK_TOKENS + (n_tokens % TQKVI_BLOCK_TOKENS != 0);
}

/* Cells of 16 tokens; a bitset word holds the bits of four blocks. */
static uint32_t block_bits(const uint64_t *set, uint32_t block)
{
    return (uint32_t)(set[block / 4] >> (16 * (block % 4))) & ALL_TOKENS;
}

static bool has_bit(const uint64_t *set, uint32_t cell)
{
    return set[cell / 64] >> (cell % 64) & 1;
}

static uint32_t low_bits(uint32_t n)
{
    return n >= TQKVI_BLOCK_TOKENS ? ALL_TOKENS : (1u << n) - 1;
}

static uint32_t present_in_row(const tqkvi_span *span, uint32_t block, uint32_t n_cells)
{
    const uint32_t first = block * TQKVI_BLOCK_TOKENS;
    const uint32_t end = span->n_tokens < n_cells ? span->n_tokens : n_cells;
    uint32_t seen = low_bits(end - first);

    for (int i = 0; i < 2; i++)
        if (span->hidden[i])
            seen &= ~block_bits(span->hidden[i], block);
    if (span->only)
        seen &= block_bits(span->only, block);
    return seen;
}

static uint32_t present_by_cell(const tqkvi_span *span, uint32_t block, uint32_t n_cells)
{
    const uint32_t first = block * TQKVI_BLOCK_TOKENS;
    const uint32_t left = span->n_tokens - first;
    const uint32_t n = left < TQKVI_BLOCK_TOKENS ? left : TQKVI_BLOCK_TOKENS;
    uint32_t seen = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint32_t cell = span->cells[first + i] - span->first_cell;
        if (cell >= n_cells)
            continue;
        if (span->hidden[0] && has_bit(span->hidden[0], cell))
            continue;
        if (span->hidden[1] && has_bit(span->hidden[1], cell))
            continue;
        seen |= 1u << i;
    }
    return seen;
}

/* Whether all 16 are `half`: 0, as most are, or -inf, as of cells that nobody has written yet. */
static bool is_all(const uint16_t *mask, uint16_t half)
{
    const uint64_t four = half * (uint64_t)0x0001000100010001;
    uint64_t words[TQKVI_BLOCK_TOKENS / 4];

    memcpy(words, mask, sizeof(words));
    return words[0] == four && words[1] == four && words[2] == four && words[3] == four;
}

static uint32_t unmasked_in_row(const uint16_t *mask, uint32_t present)
{
    uint32_t seen = 0;

    if (is_all(mask, 0))
        return present;
    if (is_all(mask, HALF_MINUS_INF))
        return 0;
    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++)
        seen |= (uint32_t)(mask[i] != HALF_MINUS_INF) << i;
    return seen & present;
}

static uint32_t unmasked_by_cell(const uint16_t *mask, const tqkvi_span *span, uint32_t block,
                                 uint32_t present)
{
    const uint32_t first = block * TQKVI_BLOCK_TOKENS;
    uint32_t seen = 0;

    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++) {
        if (!(present >> i & 1))
            continue;
        const uint32_t cell = span->cells ? span->cells[first + i] - span->first_cell : first + i;
        seen |= (uint32_t)(mask[cell] != HALF_MINUS_INF) << i;
    }
    return seen;
}

/* All 16 cells of the block follow each other and lie inside the mask's row. */
static bool is_whole_row(const tqkvi_span *span, uint32_t block, uint32_t n_cells)
{
    return !span->cells && (block + 1) * TQKVI_BLOCK_TOKENS <= n_cells;
}

static uint32_t causal_limit(const tqkvi_span *span, uint32_t block, uint32_t q)
{
    const uint32_t first = block * TQKVI_BLOCK_TOKENS;

    if (span->layout)
        return ALL_TOKENS;
    return q < first ? 0 : low_bits(q - first + 1);
}

static uint32_t window_limit(const tqkvi_sight *sight, const tqkvi_span *span, uint32_t block,
                             uint32_t q)
{
    if (sight->window == 0)
        return ALL_TOKENS;
    const int64_t first_seen = (int64_t)sight->first_position + q - sight->window + 1;
    const int64_t n_hidden = first_seen - span->block_positions[block];

    return n_hidden <= 0 ? ALL_TOKENS : ALL_TOKENS & ~low_bits((uint32_t)n_hidden);
}

uint32_t tqkvi_sight_block(const tqkvi_sight *sight, const tqkvi_span *span, uint32_t block)
{
    const tqkv_attend_args *args = sight->args;
    const uint32_t present = span->cells ? present_by_cell(span, block, args->n_cells)
                                         : present_in_row(span, block, args->n_cells);

    if (!args->mask) {
        const uint32_t near = present & window_limit(sight, span, block, sight->first_q);
        return args->causal ? near & causal_limit(span, block, sight->last_q) : near;
    }

    const bool whole = is_whole_row(span, block, args->n_cells);
    uint32_t seen = 0;
    for (uint32_t q = sight->first_q; q <= sight->last_q && seen != present; q++) {
        const uint16_t *mask = args->mask + q * args->mask_row_stride;
        seen |= whole ? unmasked_in_row(mask + (size_t)block * TQKVI_BLOCK_TOKENS, present)
                      : unmasked_by_cell(mask, span, block, present);
    }
    return seen;
}

bool tqkvi_sight_bias(const tqkvi_sight *sight, const tqkvi_span *span, uint32_t block,
                      uint32_t visible, uint32_t q, float *bias)
{
    const tqkv_attend_args *args = sight->args;
    const uint32_t first = block * TQKVI_BLOCK_TOKENS;
    uint16_t half[TQKVI_BLOCK_TOKENS] = {0};
    bool used = false;

    if (!args->mask) {
        visible &= window_limit(sight, span, block, q);
        if (args->causal)
            visible &= causal_limit(span, block, q);
    } else if (is_whole_row(span, block, args->n_cells)) {
        memcpy(half, args->mask + q * args->mask_row_stride + first, sizeof(half));
    } else {
        const uint16_t *mask = args->mask + q * args->mask_row_stride;
        for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++)
            if (visible >> i & 1)
                half[i] = mask[span->cells ? span->cells[first + i] - span->first_cell : first + i];
    }
    if (visible == ALL_TOKENS && is_all(half, 0)) {
        memset(bias, 0, TQKVI_BLOCK_TOKENS * sizeof(*bias));
        return false;
    }
    sight->kernels->half_to_float(half, bias, TQKVI_BLOCK_TOKENS);
    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++) {
        if (!(visible >> i & 1))
            bias[i] = -INFINITY;
        used |= bias[i] != 0;
    }
    return used;
}

/* Bits in which bases of 16 tokens differ from `base`: a fixed count becomes vector code. */
static uint32_t differing_bits(const int32_t *bases, const uint32_t *cells, uint32_t first_cell,
                               uint32_t n_cells, int32_t base)
{
    uint32_t bits = 0;

    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS; i++)
        bits |= cells[i] - first_cell < n_cells ? (uint32_t)(bases[i] ^ base) : 0;
    return bits;
}

const int32_t *tqkvi_span_one_base(const tqkvi_span *span, uint32_t first, uint32_t end,
                                   const tqkv_attend_args *args)
{
    uint32_t i = first * TQKVI_BLOCK_TOKENS;
    const uint32_t last =
        end * TQKVI_BLOCK_TOKENS < span->n_tokens ? end * TQKVI_BLOCK_TOKENS : span->n_tokens;

    while (i < last && span->cells[i] - span->first_cell >= args->n_cells)
        i++;
    if (i >= last)
        return NULL;
    const int32_t *base = &span->slot_bases[i];
    for (i = i / TQKVI_BLOCK_TOKENS * TQKVI_BLOCK_TOKENS; i + TQKVI_BLOCK_TOKENS <= last;
         i += TQKVI_BLOCK_TOKENS)
        if (differing_bits(span->slot_bases + i, span->cells + i, span->first_cell, args->n_cells,
                           *base))
            return NULL;
    for (; i < last; i++)
        if (span->cells[i] - span->first_cell < args->n_cells && span->slot_bases[i] != *base)
            return NULL;
    return base;
}

bool tqkvi_span_next_base(const tqkvi_span *span, uint32_t first, uint32_t end,
                          const tqkv_attend_args *args, int64_t after, int32_t *base)
{
    const uint32_t last =
        end * TQKVI_BLOCK_TOKENS < span->n_tokens ? end * TQKVI_BLOCK_TOKENS : span->n_tokens;
    int64_t lowest = INT64_MAX;

    for (uint32_t i = first * TQKVI_BLOCK_TOKENS; i < last; i++) {
        const int64_t candidate = span->slot_bases[i];
        if (candidate > after && candidate < lowest &&
            span->cells[i] - span->first_cell < args->n_cells)
            lowest = candidate;
    }
    if (lowest == INT64_MAX)
        return false;
    *base = (int32_t)lowest;
    return true;
}

uint32_t tqkvi_span_same_base(const tqkvi_span *span, uint32_t block, int32_t base)
{
    const uint32_t first = block * TQKVI_BLOCK_TOKENS;
    uint32_t same = 0;

    for (uint32_t i = 0; i < TQKVI_BLOCK_TOKENS && first + i < span->n_tokens; i++)
        same |= (uint32_t)(span->slot_bases[first + i] == base) << i;
    return same;
}
