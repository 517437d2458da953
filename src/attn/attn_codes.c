/* SPDX-License-Identifier: Apache-2.0 */
/* Rounding and integer kernels; a second part of q' is a second call. */
#include "attn/attn_codes.h"

#include <string.h>

/* Mean bits of K and of V up to which one byte is enough: attn_codes.h. */
#define QUERY_BITS_ONE_PART 5
#define WEIGHT_BITS_ONE_PART 4

static bool has_more_bits(const tqkvi_layout *layout, uint32_t mean_bits)
{
    return layout->row_bytes > 2 * mean_bits * layout->n_units;
}

static bool takes_two_parts(const tqkvi_layout *layout)
{
    return has_more_bits(layout, QUERY_BITS_ONE_PART);
}

/*
 * Of the tile's V. Where the tokens of a tile share it by nothing but their places in the sequence
 * they may have coarse weights.
 */
static uint32_t largest_weight(const tqkvi_attn_work *work)
{
    const tqkvi_layout *layout = tqkvi_attn_layout(work, TQKV_SIDE_V);
    const bool by_slot = work->tile.span->cells;

    return by_slot || has_more_bits(layout, WEIGHT_BITS_ONE_PART) ? TQKVK_WEIGHT_MAX
                                                                  : TQKVK_COARSE_WEIGHT_MAX;
}

static void list_codes(const tqkvi_attn_work *work, tqkv_side side,
                       const uint8_t *codes[TQKVI_TILE_BLOCKS])
{
    for (uint32_t p = 0; p < work->tile.n_blocks; p++)
        codes[p] = tqkvi_attn_section(work, side, p) + TQKVI_BLOCK_TOKENS;
}

/* q' of every row to bytes, in one part or two, once for all tiles of a base. */
static void round_queries(tqkvi_attn_work *work, uint32_t n_parts)
{
    const size_t dim = work->attention->layer->shape.k_dim, n_units = dim / TQKV_UNIT_CHANNELS;
    tqkvk_query_unit *low = work->q8 + work->n_rows * n_units;

    if (work->rounded_parts >= n_parts)
        return;
    for (size_t r = 0; r < work->n_rows; r++)
        work->attention->kernels->round_query(work->coded + r * dim, n_units,
                                              work->q8 + r * n_units,
                                              n_parts == 2 ? low + r * n_units : NULL);
    work->rounded_parts = n_parts;
}

void tqkvi_codes_score(tqkvi_attn_work *work)
{
    const tqkvk_table *kernels = work->attention->kernels;
    const tqkvi_layout *layout = tqkvi_attn_layout(work, TQKV_SIDE_K);
    const size_t n_rows = work->n_rows;
    const uint8_t *codes[TQKVI_TILE_BLOCKS];

    list_codes(work, TQKV_SIDE_K, codes);
    round_queries(work, takes_two_parts(layout) ? 2 : 1);
    memset(work->s, 0, n_rows * TQKVI_TILE_TOKENS * sizeof(*work->s));
    kernels->score_blocks(layout, codes, work->tile.n_blocks, work->q8, n_rows, work->s,
                          TQKVI_TILE_TOKENS);
    if (takes_two_parts(layout))
        kernels->score_blocks(layout, codes, work->tile.n_blocks,
                              work->q8 + n_rows * layout->n_units, n_rows, work->s,
                              TQKVI_TILE_TOKENS);
}

float tqkvi_codes_round_weights(tqkvi_attn_work *work, uint32_t r)
{
    const size_t n = (size_t)work->tile.n_blocks * TQKVI_BLOCK_TOKENS;
    const size_t at = (size_t)r * TQKVI_TILE_TOKENS;
    float kept;

    work->w_factor[r] = work->attention->kernels->round_weights(
        work->s + at, work->scale[TQKV_SIDE_V], n, largest_weight(work), work->w + at, &kept);
    return kept;
}

void tqkvi_codes_weigh(tqkvi_attn_work *work)
{
    const tqkvk_table *kernels = work->attention->kernels;
    const tqkvi_layout *layout = tqkvi_attn_layout(work, TQKV_SIDE_V);
    const uint8_t *codes[TQKVI_TILE_BLOCKS];

    list_codes(work, TQKV_SIDE_V, codes);
    kernels->weigh_blocks(layout, codes, work->tile.n_blocks, largest_weight(work), work->w,
                          TQKVI_TILE_TOKENS, work->n_rows, work->f, work->w_factor,
                          work->acc[SPACE_Y]);
}
