/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One worker's state: a block of query rows of one KV head, the tile of tokens being gathered for
 * it, and the sums of the online softmax.
 *
 *     rows    (query token, head of the group) pairs of one KV head, at most work->n_rows
 *     tile    up to 4 blocks of 16 tokens that share a span and a base
 *     codes   few rows read coded blocks by integers (attn_codes.h), many rows by f32 tiles; in a
 *             latent layer V is unpacked for its scores, so all rows take the tiles
 *     sums    m, l as usual; acc[SPACE_Y] of coded V, acc[SPACE_X] of plain and raw V, nonzero:
 *             the part of l that belongs to rows that are not the zero vector
 */
#ifndef TQKVI_ATTN_TILE_H
#define TQKVI_ATTN_TILE_H

#include "attn/attn_sight.h"

#define TQKVI_TILE_BLOCKS 4
#define TQKVI_TILE_TOKENS (TQKVI_TILE_BLOCKS * TQKVI_BLOCK_TOKENS)
#define TQKVI_ATTN_ROWS_MAX 192
#define TQKVI_CODE_ROWS_MAX 16 /* more rows than these unpack blocks to f32 */

enum { SPACE_Y = 0, SPACE_X = 1 };

typedef struct tqkvi_attn_tile {
    const tqkvi_span *span;
    uint32_t end; /* of the blocks of the span that are walked */
    uint32_t n_blocks;
    int32_t base;
    uint32_t block[TQKVI_TILE_BLOCKS];
    uint32_t visible[TQKVI_TILE_BLOCKS];
} tqkvi_attn_tile;

typedef struct tqkvi_attn_work {
    _Alignas(TQKV_ALIGN) float f[TQKVI_ATTN_ROWS_MAX];
    float m[TQKVI_ATTN_ROWS_MAX];
    float l[TQKVI_ATTN_ROWS_MAX];
    float nonzero[TQKVI_ATTN_ROWS_MAX];
    float pending[2][TQKVI_ATTN_ROWS_MAX]; /* factor that acc still lacks */
    float q_mean[TQKVI_ATTN_ROWS_MAX];     /* q_base.mean of the base in `coded` */
    float latent_mean[TQKVI_ATTN_ROWS_MAX]; /* q_latent.mean of V */
    float scale[2][TQKVI_TILE_TOKENS];     /* of the tile's rows, by side; 0: the zero vector */
    bool bias_used[TQKVI_ATTN_ROWS_MAX];
    bool used[2]; /* acc was written */
    bool has_base;
    int32_t base;
    tqkvi_attn_tile tile;

    const tqkvi_attention *attention;
    tqkvi_sight sight;
    uint32_t g;
    uint32_t first_row,
        n_rows; /* rows of this KV head; row = query token * group + head of the group */
    float w_factor[TQKVI_CODE_ROWS_MAX]; /* of attn_codes.c */
    uint32_t rounded_parts; /* of `coded` that q8 has */
    /* Arrays behind this struct. */
    float *q;             /* [rows][k_dim] times the softmax scale */
    float *turned;        /* [rows][k_dim] turned to the base */
    float *coded;         /* [rows][k_dim] q' of the base */
    float *k;             /* [TQKVI_TILE_TOKENS][k_dim] */
    float *v;             /* [TQKVI_TILE_TOKENS][v_dim] */
    float *s;             /* [rows][TQKVI_TILE_TOKENS] */
    float *bias;          /* [query tokens][TQKVI_TILE_TOKENS] */
    float *acc[2];        /* [rows][v_dim] */
    float *q_latent;      /* [rows][v_dim] times the softmax scale; these three in latent layers */
    float *coded_latent;  /* [rows][v_dim] its q', the same for every base */
    float *s_latent;      /* [rows][TQKVI_TILE_TOKENS] */
    tqkvk_query_unit *q8; /* [2][code rows][k_dim / 16] */
    uint16_t *w;          /* [code rows][TQKVI_TILE_TOKENS] */
} tqkvi_attn_work;

/* Section of KV head g in a coded block of a span. */
static inline const uint8_t *tqkvi_span_section(const tqkvi_span *span, uint32_t block,
                                                tqkv_side side, uint32_t g)
{
    const uint8_t *start = span->block_at
                               ? span->block_at[block]
                               : span->blocks + (size_t)block * span->layout->block_bytes;
    return start + span->layout->section[side][g];
}

/* Section of the tile's block p. */
static inline const uint8_t *tqkvi_attn_section(const tqkvi_attn_work *work, tqkv_side side,
                                                uint32_t p)
{
    return tqkvi_span_section(work->tile.span, work->tile.block[p], side, work->g);
}

/* Layout of the rows of the tile. */
static inline const tqkvi_layout *tqkvi_attn_layout(const tqkvi_attn_work *work, tqkv_side side)
{
    return &work->attention->layer->heads[side][work->g].layout[work->tile.span->tier];
}

/* Query rows that one task takes: fewer for large heads, so that its arrays stay in the cache. */
uint32_t tqkvi_attn_rows(const tqkv_plan_layer *shape);

/* Bytes of one worker, a multiple of TQKV_ALIGN. */
size_t tqkvi_attn_work_bytes(const tqkv_plan_layer *shape);

/* Lays the arrays out in memory of that size and empties the sums; rows as in tqkvi_attn_work. */
tqkvi_attn_work *tqkvi_attn_work_init(void *memory, const tqkvi_attention *attention, uint32_t g,
                                      uint32_t first_row, uint32_t n_rows);
/* Reads the query rows. */
void tqkvi_attn_load_q(tqkvi_attn_work *work);

/* Starts to load the first tile of blocks [first, end) of a span, if that lies in one piece. */
void tqkvi_attn_ask_first(const tqkvi_attn_work *work, const tqkvi_span *span, uint32_t first, uint32_t end);

/* Takes blocks [first, end) of a span into the sums. */
void tqkvi_attn_walk(tqkvi_attn_work *work, const tqkvi_span *span, uint32_t first, uint32_t end);

/* Applies what is pending to both acc. */
void tqkvi_attn_settle(tqkvi_attn_work *work);

/* Adds the sinks and writes the rows of the output. */
void tqkvi_attn_finish(tqkvi_attn_work *work);

#endif /* TQKVI_ATTN_TILE_H */
