/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One layer of a KV cache: two tensors of the host, one store of ours.
 *
 * The host addresses a cache tensor as [n_streams][n_cells][values] of its declared type. It never
 * touches the memory; that layout only names rows. Each tensor still owns address space for it, not
 * backed by memory, so that a layer can become *plain*: decoded into the declared layout, and from
 * then on computed by the host's own CPU code. That is the way out for everything we do not do.
 * A layer with few tokens uses the same space for a while (kv_short.h).
 *
 * A layer learns its shape and its RoPE from the graph, before anything is computed; its store is
 * made when it is first needed.
 */
#ifndef TQKV_KV_LAYER_H
#define TQKV_KV_LAYER_H

#include <turboquant/store.h>

#include "ggml_host.h"
#include "kv_buffer.h"
#include "rope_chain.h"

/* K or V of a layer, as the host declared it. */
typedef struct tqkvp_tensor {
    struct tqkvp_layer *layer;
    tqkv_side side;
    int32_t ggml_type;
    tqkvp_type type;
    int64_t row_values; /* of one token, all heads */
    size_t row_bytes;   /* in the declared type */
    int64_t n_rows;     /* cells of all streams */
    uint8_t *plain;     /* the declared layout; readable and writable while it is backed */
    size_t plain_bytes;
    /* a row of which the host has set only bytes [from, to) so far */
    int64_t partial_row; /* -1: none */
    size_t partial_from, partial_to;
    uint8_t *partial;
} tqkvp_tensor;

typedef enum tqkvp_rope_state {
    TQKVP_ROPE_UNSEEN, /* no graph so far */
    TQKVP_ROPE_HIDDEN, /* no ROPE node behind the rows */
    TQKVP_ROPE_SEEN
} tqkvp_rope_state;

typedef struct tqkvp_layer {
    tqkvp_buffer *buffer;
    uint32_t index;         /* of the model */
    tqkvp_tensor *sides[2]; /* V is NULL where K serves as both (see kv_cells.h) */
    uint32_t n_cells, n_streams;

    bool shape_known;
    tqkv_plan_layer shape; /* n_heads, n_kv_heads, k_dim, v_dim, is_latent */
    bool turned_first;     /* in the rows of a latent layer, the channels that turn come first */
    tqkvp_rope_state rope_state;
    tqkvp_rope rope;

    tqkv_plan *own_plan; /* built in */
    tqkv_store *store;
    bool must_be_plain;
    bool plain;
    bool is_short, outgrown; /* see kv_short.h */
    int32_t *positions;      /* of the cells that it may use while it is short */
    bool failed; /* nothing may be computed: the message is out */
    bool written;
    char why[96]; /* reason to be plain */

    uint64_t last_pass; /* see kv_graph.c */
    /* the last copy of a whole stream, which took K and V together */
    const struct tqkvp_layer *copied_from;
    uint32_t copied_src, copied_dst;
    tqkv_side copied_by;
} tqkvp_layer;

/* The cache tensor that owns the memory of t, or NULL where it is none of ours. */
tqkvp_tensor *tqkvp_tensor_of(const ggml_tensor *t);

/* "cache_k_l12" or "cache_v_l12"; false for any other name. */
bool tqkvp_cache_name(const char *name, uint32_t *layer, tqkv_side *side);

/* A new layer of a buffer, or the one with this index. */
tqkvp_layer *tqkvp_layer_get(tqkvp_buffer *buffer, uint32_t index);
/* Gives it one side. False where there is no memory or address space. */
bool tqkvp_layer_add_side(tqkvp_layer *layer, tqkv_side side, ggml_tensor *t);
void tqkvp_layer_destroy(tqkvp_layer *layer);

/* Puts memory behind the declared layout, which reads as zero at first, and takes it away. */
bool tqkvp_tensor_back(tqkvp_tensor *tensor);
void tqkvp_tensor_unback(tqkvp_tensor *tensor);

/* What nodes of a graph tell. */
void tqkvp_layer_learn_attention(tqkvp_layer *layer, const ggml_tensor *node);
void tqkvp_layer_learn_rows(tqkvp_layer *layer, const ggml_tensor *node);
/* The layer will be plain; nothing happens yet. */
void tqkvp_layer_wish_plain(tqkvp_layer *layer, const char *why);

/*
 * Makes the layer ready to use: with all it holds in a store, or plain. Returns a status of ggml;
 * after a failure the message is out.
 */
int32_t tqkvp_layer_open(tqkvp_layer *layer);
/* Decodes the layer into the declared layout and gives up the store. */
int32_t tqkvp_layer_make_plain(tqkvp_layer *layer, const char *why);
/* Forgets all cells. */
void tqkvp_layer_clear(tqkvp_layer *layer);

/* The plan and the number of the layer in it; NULL before the store exists or when built in. */
const tqkvp_plan *tqkvp_layer_plan(const tqkvp_layer *layer);
/* RoPE that the store undoes. */
tqkv_rope tqkvp_layer_rope(const tqkvp_layer *layer);

#endif /* TQKV_KV_LAYER_H */
