/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compressed K and V of one layer in pages on a CUDA device, for engines that own their pages:
 * store new tokens, attend while decoding, attend with chunks of prompts, unpack. Only in libturboquant-cuda, which
 * holds all of libturboquant too. Needs no CUDA header: a stream is its handle as a pointer.
 *
 * Rules of every launch (store, decode, prefill, unpack, gather, merge, page tables):
 *  1. It is asynchronous on the stream it is given. It allocates nothing, waits for nothing and
 *     reads no device memory on the host, so it can be captured into a graph.
 *  2. Pointers named "device" are device memory; args themselves are read before the call returns.
 *  3. Errors: TQKV_ERR_INVALID_ARG (a NULL, a size), TQKV_ERR_UNSUPPORTED (this device, or a launch
 *     that the driver refused; nothing was started).
 *  4. Threads: any, one call at a time per stream and workspace.
 *
 * Pages. A page holds page_tokens consecutive positions of one sequence, all of one tier, as blocks
 * of 16 tokens of docs/FORMAT.md section 3, one after another. Each tier has a pool of its own, as
 * pages of different tiers differ in size. The base of K is the first position of its frame.
 *
 * Latent layers (plan.h; DeepSeek's multi-head latent attention): one KV head, K the rotated key of 64 channels, V the
 * latent of 512. Decode and gather leave latents in coded space: of a latent x they see w with
 * x[i] = sum_j inverse[j][i] w[j], and tqkv_cuda_layer_inverse is that matrix. An engine that has absorbed its
 * projections into queries and outputs folds it into them once, at no cost later.
 */
#ifndef TURBOQUANT_CUDA_H
#define TURBOQUANT_CUDA_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TQKV_CUDA_Q_MAX 8        /* query tokens of a sequence in one decode */
#define TQKV_CUDA_TILE_TOKENS 64 /* tokens [64 i, 64 i + 64) of a sequence share one tier */

/* One layer of a plan, made ready for a device. Host memory only; never changes: share it. */
typedef struct tqkv_cuda_layer tqkv_cuda_layer;

/* Type of q, k, v and outputs. */
typedef enum tqkv_cuda_type { TQKV_CUDA_F32 = 0, TQKV_CUDA_F16 = 1, TQKV_CUDA_BF16 = 2 } tqkv_cuda_type;

/*
 * plan: borrowed. rope: NULL takes the plan's. mem: NULL for malloc.
 * Errors: TQKV_ERR_INVALID_ARG, TQKV_ERR_NO_MEMORY, TQKV_ERR_UNSUPPORTED (heads other than 64, 128
 * or 256 channels, K and V of different sizes, latent layers of other sizes than 64 and 512, heads of plain f16,
 * frames of a number of tokens that TQKV_CUDA_TILE_TOKENS does not divide).
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_layer_create(const tqkv_plan *plan, uint32_t layer,
                                                           const tqkv_rope *rope, const tqkv_allocator *mem,
                                                           tqkv_cuda_layer **out);
/* Accepts NULL. */
TQKV_API void tqkv_cuda_layer_destroy(tqkv_cuda_layer *layer);

/*
 * What every launch needs in device memory: the caller copies these bytes to a 256-aligned device
 * address and passes that as `image`. Lives as long as the layer.
 */
TQKV_API const void *tqkv_cuda_layer_image(const tqkv_cuda_layer *layer, size_t *n_bytes);

/* inverse, [512][512] f32 in host memory, of a latent layer; lives as long as the layer. NULL for other layers. */
TQKV_API const float *tqkv_cuda_layer_inverse(const tqkv_cuda_layer *layer);

/* Bytes of a page of a tier; 0 for a bad argument. page_tokens: a multiple of 16. */
TQKV_API size_t tqkv_cuda_page_bytes(const tqkv_cuda_layer *layer, uint32_t tier, uint32_t page_tokens);

/*
 * Pages of n_seqs sequences.
 * pool: [tiers] device, 16-aligned: page p of a tier is at p * page_bytes.
 * page_tokens: 16, 32 or a multiple of 64.
 * block_table: device [n_seqs][table_stride]: page that holds tokens [i * page_tokens, ...).
 * tiers: device [n_seqs][tiers_stride]: tier of tokens [64 i, ...), or NULL: all in the last tier.
 */
typedef struct tqkv_cuda_pages {
    void *pool[TQKV_TIERS_MAX];
    const int32_t *block_table;
    const uint8_t *tiers;
    uint32_t page_tokens, table_stride, tiers_stride;
} tqkv_cuda_pages;

/*
 * Encodes K and V of n_tokens tokens into their cells of every tier at once; the bytes are those of
 * tqkv_codec_encode.
 * k, v: device [n_tokens][n_kv_heads][dim] of `type`; strides of a token in elements. K has RoPE. Latents are plain.
 * positions: device [n_tokens]. slots: by tier, device [n_tokens] int64: page * page_tokens + cell in the
 * page; -1 leaves the token out of the tier, k, v and position may be read all the same. Two tokens of a call
 * have different slots of a tier. NULL: no token goes into this tier.
 * pool: by tier, device, where there are slots.
 */
typedef struct tqkv_cuda_store_args {
    const void *k, *v;
    size_t k_token_stride, v_token_stride;
    const int32_t *positions;
    const int64_t *slots[TQKV_TIERS_MAX];
    void *pool[TQKV_TIERS_MAX];
    uint32_t n_tokens, page_tokens;
    tqkv_cuda_type type;
} tqkv_cuda_store_args;

TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_store(const tqkv_cuda_layer *layer, const void *image,
                                                    const tqkv_cuda_store_args *args, void *stream);

/*
 * Attention of the last q_len tokens of each sequence over its pages; query i of a sequence sees
 * tokens 0 .. seq_len - q_len + i. A query that sees nothing gets zeros and lse -inf.
 * q, out: device [n_seqs][q_len][n_heads][dim] of `type`, contiguous, 16-aligned. Of a latent layer q has 512 + 64
 * channels, what meets the latent first: q'[j] = sum_i inverse[j][i] q[i]; out has 512, in coded space.
 * lse: device [n_seqs][q_len][n_heads] f32, natural log of the sum of exp; or NULL.
 * seq_lens: device [n_seqs], 0 .. max_tokens. max_tokens bounds the work that is launched.
 * scale: of q.k. |error| of out is about 3e-4 of |out| beside float64 on the decoded rows. (Code 0 of
 * width 8, which is never written, counts as -128 here.)
 * workspace: device, 256-aligned, at least tqkv_cuda_decode_bytes of these sizes on this device. It is
 * zero before the first call; each call leaves it fit for the next, of any sizes and any layer.
 * after_store: 0, or 1 as a promise: what came last on this stream was tqkv_cuda_store of one token or more into some
 * tier, and nothing between (no kernel, copy, memset or wait for an event); and q, seq_lens, block_table, tiers, the image
 * and the workspace were ready for that store too. Then work on queries may run beside that store; what is in pools
 * is read when it has ended. A device that cannot do this works as with 0. Not of latent layers, where it changes nothing.
 */
typedef struct tqkv_cuda_decode_args {
    tqkv_cuda_pages pages;
    const void *q;
    void *out;
    float *lse;
    const int32_t *seq_lens;
    void *workspace;
    uint32_t n_seqs, q_len, max_tokens;
    float scale;
    tqkv_cuda_type type;
    uint32_t after_store;
} tqkv_cuda_decode_args;

/* 0 for sizes that decode would refuse. Needs a current device. */
TQKV_API size_t tqkv_cuda_decode_bytes(const tqkv_cuda_layer *layer, uint32_t n_seqs, uint32_t q_len,
                                       uint32_t max_tokens);
TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_decode(const tqkv_cuda_layer *layer, const void *image,
                                                     const tqkv_cuda_decode_args *args, void *stream);

/*
 * Attention of chunks of new tokens of several sequences, of any lengths, over the pages of each; not for latent layers.
 * Every query of a
 * sequence sees all of its context; what new tokens see of each other is the engine's to do, and `merge` joins both.
 * With is_causal the chunk itself is stored too: its queries are the last tokens of the context, and query i of n
 * sees tokens 0 .. context - n + i. A query that sees nothing gets zeros and lse -inf.
 * q, out: device [tokens][n_heads][dim] of `type`, contiguous, 16-aligned; lse: device [tokens][n_heads] f32, natural,
 * or NULL. Only rows of the sequences are read and written.
 * q_starts: device [n_seqs + 1], ascending: the rows of sequence i are q_starts[i] .. q_starts[i + 1] - 1.
 * context_lens: device [n_seqs], 0 .. max_context. n_tokens, max_q: of rows in all and of a sequence, no less than
 * there are; max_context as well. They bound the work that is launched, and cut what exceeds them.
 * |error| of out is about 6e-4 of |out| beside float64 on the decoded rows, and the rounding of `type`.
 * workspace: device, 256-aligned, of workspace_bytes, any contents; NULL and 0 are fine. With tqkv_cuda_prefill_bytes
 * of these sizes few rows behind a long context are fast, with less they are slower.
 */
typedef struct tqkv_cuda_prefill_args {
    tqkv_cuda_pages pages;
    const void *q;
    void *out;
    float *lse;
    const int32_t *q_starts, *context_lens;
    void *workspace;
    size_t workspace_bytes;
    uint32_t n_seqs, n_tokens, max_q, max_context;
    uint32_t is_causal;
    float scale;
    tqkv_cuda_type type;
} tqkv_cuda_prefill_args;

/* May be 0. Needs a current device. */
TQKV_API size_t tqkv_cuda_prefill_bytes(const tqkv_cuda_layer *layer, uint32_t n_seqs, uint32_t n_tokens,
                                        uint32_t max_q, uint32_t max_context);
TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_prefill(const tqkv_cuda_layer *layer, const void *image,
                                                      const tqkv_cuda_prefill_args *args, void *stream);

/*
 * Decodes tokens [first, first + n_tokens) of one sequence, for attention kernels that read plain
 * K and V; not for latent layers.
 * k, v: device [n_tokens][n_kv_heads][dim] of `type`, contiguous, 16-aligned; K with RoPE again.
 * first: a multiple of 64. sequence: row of the block table.
 */
typedef struct tqkv_cuda_unpack_args {
    tqkv_cuda_pages pages;
    void *k, *v;
    uint32_t sequence, first, n_tokens;
    tqkv_cuda_type type;
} tqkv_cuda_unpack_args;

TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_unpack(const tqkv_cuda_layer *layer, const void *image,
                                                     const tqkv_cuda_unpack_args *args, void *stream);

/*
 * Decodes stored tokens of several sequences of a latent layer, which an engine makes keys and values of all heads from.
 * out: device, row i at out + i * out_stride elements of `type`: the latent in coded space (512), K with RoPE (64).
 * starts: device [n_seqs + 1], ascending from 0: rows of sequence i are starts[i] .. starts[i + 1] - 1; firsts: device
 * [n_seqs], position of the first of them. n_tokens: no less than starts[n_seqs]; more rows are left alone.
 * Sequences are rows of the tables of pages.
 */
typedef struct tqkv_cuda_gather_args {
    tqkv_cuda_pages pages;
    void *out;
    size_t out_stride;
    const int32_t *starts, *firsts;
    uint32_t n_seqs, n_tokens;
    tqkv_cuda_type type;
} tqkv_cuda_gather_args;

TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_gather(const tqkv_cuda_layer *layer, const void *image,
                                                     const tqkv_cuda_gather_args *args, void *stream);

/*
 * Merges attention over two disjoint sets of tokens: out_a and lse_a become those of the union.
 * out_a, out_b: device [n_rows][dim] of `type`; lse_a, lse_b: device [n_rows] f32 (-inf: saw nothing).
 */
TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_merge(void *out_a, float *lse_a, const void *out_b,
                                                    const float *lse_b, size_t n_rows, uint32_t dim,
                                                    tqkv_cuda_type type, void *stream);

/*
 * For engines whose blocks hold every token at the widths of the last tier, beside copies of pages of
 * TQKV_CUDA_TILE_TOKENS tokens at those of the younger tiers: which pages have copies, what store and decode of a step
 * are told, once a step for all layers.
 *
 * A page whose distance from the page of a sequence's first new token is at most the reach of a tier is read from its copy there, the
 * youngest that is valid; the first n_sink_pages of a sequence always from the youngest tier; otherwise from the block. A copy
 * is valid for the page that both copy_of and page_of name. It is taken, or given up, when the first token of its page is
 * written, and gets every token after that; the least recently used copy is taken, copies of sinks after all others
 * that the last step did not read.
 *
 * State, device, for one call at a time; n_young younger tiers:
 *   copy_of [n_young][n_pages + 1], at first n_copies; page_of [n_young][n_copies + 1], at first -1; used [n_young]
 *   [n_copies + 1], at first 0, but a number larger than any of a step for what is no copy (a tier with fewer); is_sink
 *   [n_copies + 1], at first 0; clock [2], at first 0. n_copies: of the tier that has most.
 * A step, device: query_start [n_seqs + 1], tokens of sequence i are those from query_start[i] on; seq_lens [n_seqs], new tokens
 *   included; block_table [n_seqs][table_stride], the pages of each, n_width are read; slots [n_tokens]: page * 64 + cell, or -1.
 * Tables, device: positions [max_tokens] and tier_slots [n_young + 1][slots_stride] as store takes them, the blocks last, -1 from
 *   n_tokens to max_tokens; places and tiers [n_seqs][places_stride] as block_table and tiers of pages; lengths
 *   [max_seqs], 0 from n_seqs on; youngest [n_copies + 1]: page of each copy of the youngest tier, -1 where it is not valid.
 */
typedef struct tqkv_cuda_page_tables_args {
    int64_t *copy_of, *page_of, *used;
    uint8_t *is_sink;
    int64_t *clock;
    const int32_t *query_start, *seq_lens, *block_table;
    const int64_t *slots;
    int32_t *positions;
    int64_t *tier_slots;
    int32_t *places;
    uint8_t *tiers;
    int32_t *lengths;
    int64_t *youngest;
    int32_t reach[TQKV_TIERS_MAX]; /* in pages; -1: the tier holds nothing */
    uint32_t n_young, n_copies, n_pages, n_sink_pages;
    uint32_t n_seqs, n_tokens, n_width, max_seqs, max_tokens;
    uint32_t table_stride, slots_stride, places_stride;
} tqkv_cuda_page_tables_args;

TQKV_API TQKV_NODISCARD tqkv_status tqkv_cuda_page_tables(const tqkv_cuda_page_tables_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_CUDA_H */
