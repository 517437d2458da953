/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What libggml-turboquant.so offers to programs that hold a llama.cpp context, besides being a
 * backend. The functions are looked up through ggml:
 *
 *     ggml_backend_reg_t reg = ggml_backend_load("/path/libggml-turboquant.so");
 *     tqkv_plugin_configure_fn *configure = (tqkv_plugin_configure_fn *)
 *         ggml_backend_reg_get_proc_address(reg, TQKV_PLUGIN_CONFIGURE);
 *
 * Valid C99 and C++11. Structs only grow at the end.
 */
#ifndef TURBOQUANT_GGML_PLUGIN_H
#define TURBOQUANT_GGML_PLUGIN_H

#include <turboquant/plan.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TQKV_PLUGIN_CONFIGURE "tqkv_plugin_configure"
#define TQKV_PLUGIN_SET_OBSERVER "tqkv_plugin_set_observer"
#define TQKV_PLUGIN_KV_BYTES "tqkv_plugin_kv_bytes"
#define TQKV_PLUGIN_KV_ROWS "tqkv_plugin_kv_rows"

/*
 * Mode and plan of KV caches that are allocated from now on; live ones keep theirs.
 * mode: "auto", "f16", "q8", or NULL for TQKV_MODE.
 * plan_path: a .tqkv file for mode "auto", copied; NULL for TQKV_PLAN or the file beside the model.
 * Returns 0, or -1 after a message where the mode is unknown or the plan cannot be read; then
 * nothing has changed. Threads: not while a context is being created.
 */
typedef int tqkv_plugin_configure_fn(const char *mode, const char *plan_path);

/*
 * One layer is about to attend over a batch that it has just received. Called on the thread that
 * computes the graph. Pointers are borrowed for the call.
 */
typedef struct tqkv_plugin_event {
    size_t struct_bytes;
    uint32_t layer; /* number of the layer in the model */
    uint32_t n_tokens;
    uint32_t n_heads, n_kv_heads;
    uint32_t k_dim, v_dim;
    uint32_t n_cells; /* cells that attention looks at */
    uint32_t window;  /* 0: not known */
    const float *q;   /* [n_tokens][n_heads][k_dim] with the strides below, RoPE applied */
    size_t q_token_stride, q_head_stride; /* floats */
    const float *k;           /* [n_tokens][n_kv_heads][k_dim], RoPE applied */
    const float *v;           /* [n_tokens][n_kv_heads][v_dim] */
    const int32_t *positions; /* [n_tokens], or NULL where the graph hides them */
    tqkv_rope rope;           /* as the graph applies it */
    float scale;
    float softcap; /* 0: none */
    const float *q_latent; /* [n_tokens][n_heads][v_dim], strides of q; NULL: the layer is not latent (plan.h) */
} tqkv_plugin_event;

typedef void tqkv_plugin_observer_fn(void *user, const tqkv_plugin_event *event);

/* observe: NULL ends it. Threads: not while a graph is computed. */
typedef void tqkv_plugin_set_observer_fn(tqkv_plugin_observer_fn *observe, void *user);

typedef struct tqkv_plugin_bytes {
    uint32_t layer;    /* number of the layer in the model; of a total: layers counted */
    uint32_t plain;    /* 1: stored as llama.cpp would; of a total: layers that are */
    uint64_t held;     /* bytes of memory that hold tokens now, everything counted; of a context that
                        * is still short in f16 (TQKV_SHORT) */
    uint64_t reserved; /* the same if every cell were written */
    uint64_t f16_held; /* what the tokens held now would take in f16 */
    uint64_t f16_reserved;
} tqkv_plugin_bytes;

/*
 * Memory of the KV caches of the context that was created last.
 * layers: [n_layers_max] out, in the order of allocation, or NULL. Returns the number of layers.
 * Threads: not while a graph is computed or a context created.
 */
typedef size_t tqkv_plugin_kv_bytes_fn(tqkv_plugin_bytes *total, tqkv_plugin_bytes *layers,
                                       size_t n_layers_max);

/*
 * Reads or replaces what a layer of the context created last holds in cells [first, first + n).
 * layer: number of the layer in the model. side: 0 is K, 1 is V. rows: [n][n_kv_heads][dim] f32.
 * Returns 0, or -1 where there is no such layer, it holds nothing yet, or it is stored plain.
 * Threads: not while a graph is computed.
 */
typedef int tqkv_plugin_kv_rows_fn(uint32_t layer, uint32_t side, uint64_t first, size_t n,
                                   float *rows, int is_write);

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_GGML_PLUGIN_H */
