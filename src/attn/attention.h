/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Softmax attention over spans of rows: coded blocks of any tier, plain blocks, raw f32 rows.
 *
 * A coded row is x = R(base) (mean + inverse y), so for K
 *
 *     q.x = q'.y + q_base.mean,   q_base = R(-base) q,   q' = inverse^T q_base
 *
 * and q' is made once for all rows of one base. V is summed in y; the inverse and the mean are
 * applied once, to the sum. A row with scale byte 0 is the zero vector: its score is the mask
 * alone, and its V adds nothing.
 *
 * In a latent layer V is a key as well: q_latent.v is added to the score in the same way, with the
 * inverse and the mean of V, and nothing to turn.
 *
 * The work is cut by shape alone (KV head, block of query rows, part of the spans), never by the
 * number of workers, so the output does not depend on it.
 */
#ifndef TQKVI_ATTENTION_H
#define TQKVI_ATTENTION_H

#include "format/plan_data.h"
#include "kernels/kernels.h"
#include "turboquant/store.h"

/* What one KV head and side needs besides its layouts. inverse NULL: rows are plain. */
typedef struct tqkvi_attn_head {
    const float *inverse; /* [dim][dim]: x[i] = mean[i] + sum_j inverse[j * dim + i] * y[j] */
    const float *mean;    /* [dim] */
    /* For few rows, rounded (attn_codes.h). K: the inverse transposed; V: the inverse. Or value NULL. */
    tqkvk_half_matrix few;
} tqkvi_attn_head;

/* Turns n_rows rows of k_dim floats, contiguous, by -base, in place. Threads: any. */
typedef void tqkvi_turn_rows_fn(const void *user, int32_t base, float *rows, size_t n_rows);

/*
 * Tokens that lie one after another: blocks of one tier, or raw rows. Borrowed.
 * Token i is in slot i % 16 of block i / 16 and belongs to cell cells[i] - first_cell of the
 * stream, or to cell i without `cells`. It takes part when its cell is < n_cells of the call.
 */
typedef struct tqkvi_span {
    uint32_t n_tokens;
    uint32_t tier;
    const tqkvi_block_layout *layout; /* NULL: raw rows */
    const uint8_t *blocks;            /* block_bytes apart, or */
    const uint8_t *const *block_at;   /* [blocks] where each block lies */
    const int32_t *block_bases;       /* [blocks], or */
    const int32_t *slot_bases;        /* [n_tokens] where tokens of a block differ */
    const int32_t *block_positions;   /* [blocks] of their first tokens; read with a window only */
    const float *rows[2];             /* raw: [n_tokens][n_kv_heads][dim] by side */
    const uint32_t *cells;            /* [n_tokens] or NULL */
    uint32_t first_cell;
    const uint64_t
        *hidden[2];       /* bitsets over the cells of the stream: not here; each may be NULL */
    const uint64_t *only; /* bitset: nothing but these; may be NULL; for spans without cells */
} tqkvi_span;

/* Tasks of someone else that run in the same parallel region, after all of attention's are taken. */
typedef struct tqkvi_beside {
    size_t n_tasks;
    tqkv_task_fn *fn;
    void *user;
} tqkvi_beside;

typedef struct tqkvi_attention {
    const tqkvk_table *kernels;
    const tqkvi_layer_plan *layer; /* shapes, and layouts by head and tier */
    const tqkvi_attn_head *heads[2];
    tqkvi_turn_rows_fn *turn; /* NULL: K has no RoPE */
    const void *turn_user;
    uint32_t frame_blocks; /* that share a base, where tokens lie in order; 0: no matter */
    const tqkvi_span *spans;
    size_t n_spans;
    const tqkv_attend_args *args;
    uint32_t window; /* query i sees positions above first_position + i - window only; 0: all */
    int32_t first_position;
    tqkvi_beside beside; /* run once by a call that has queries */
} tqkvi_attention;

/* Scratch of tqkvi_attend for up to n_q queries; SIZE_MAX if it does not fit in size_t. */
size_t tqkvi_attention_scratch_bytes(const tqkv_plan_layer *shape, uint32_t n_q, size_t n_workers);

/* args: checked by the caller, scratch as above. */
void tqkvi_attend(const tqkvi_attention *attention, const tqkv_parallel *parallel);

#endif /* TQKVI_ATTENTION_H */
