/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model in an unmodified llama.cpp, with its own caches or with ours. Only host_llama.c and
 * model_weights.c know llama.cpp; everything else sees this.
 */
#ifndef TQKV_HOST_LLAMA_H
#define TQKV_HOST_LLAMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "turboquant/ggml_plugin.h"

typedef struct host host;
typedef struct host_ctx host_ctx;

typedef struct host_options {
    const char *model_path;  /* kept */
    const char *plugin_path; /* kept; NULL: stock caches only */
    uint32_t n_threads;
    bool is_verbose;
} host_options;

/* Starts llama.cpp, loads plugin and vocabulary. Returns an exit code after a message. */
int host_open(const host_options *options, host **out);
void host_close(host *h);

/*
 * Weights of contexts created from now on: another file of the same model (kept), or NULL for the
 * model's own. No context exists.
 */
void host_use_weights(host *h, const char *path);

uint32_t host_n_vocab(const host *h);
uint32_t host_n_threads(const host *h);
int host_api_version(const host *h); /* of the plugin's backend, 0: no plugin */

/* Tokens of a text without a leading BOS; given. */
int host_tokenize(host *h, const char *text, size_t n_bytes, int32_t **tokens, size_t *n_tokens);
/* The token that opens a text, or -1 where the model wants none. */
int32_t host_first_token(const host *h);

typedef struct host_cache {
    const char *stock_type; /* "f16", "q8_0", ...: llama.cpp's own cache. NULL: the plugin's */
    const char *mode;       /* of the plugin: "f16", "q8", "plan" */
    const char *plan_path;  /* for mode "plan" */
} host_cache;

/* Whether llama.cpp has a cache of that type. bits: per value, everything counted. */
bool host_stock_type(const char *name, double *bits);

typedef struct host_ctx_config {
    host_cache cache;
    uint32_t n_ctx;    /* tokens */
    uint32_t n_ubatch; /* tokens fed at a time */
    bool can_repeat;   /* for host_ctx_repeat */
    bool may_be_short; /* the plugin may leave a few tokens as they are, as it does for users; otherwise
                        * all are in codes, unless TQKV_SHORT says something else */
    bool keeps_all;    /* sliding windows too keep every token, so that cell n holds token n */
} host_ctx_config;

/* A context for one sequence. Returns an exit code; says why it failed. */
int host_ctx_create(host *h, const host_ctx_config *config, host_ctx **out);
void host_ctx_destroy(host_ctx *ctx);
/* Threads of what is fed from now on; at first, those of the options. */
void host_ctx_set_threads(host_ctx *ctx, uint32_t n_threads);
/* Forgets all tokens. */
void host_ctx_clear(host_ctx *ctx);

/* Tokens held. */
uint32_t host_ctx_n_tokens(const host_ctx *ctx);

/* Forgets the tokens from n on. */
void host_ctx_trim(host_ctx *ctx, uint32_t n);

/*
 * Appends n <= n_ubatch tokens. Logits are computed for tokens first, first + step, ... of them
 * (first >= n: for none that is looked at).
 */
int host_ctx_feed(host_ctx *ctx, const int32_t *tokens, uint32_t n, uint32_t first, uint32_t step);
/*
 * Appends copies of the tokens held until there are n_target, without computing them: keys are
 * turned to their new positions. n_target: a multiple of n. For speed, where only the size matters.
 * False: this cache cannot; it is as it was.
 */
bool host_ctx_repeat(host_ctx *ctx, uint32_t n_target);

/* [outputs of the last feed][n_vocab], until the next feed. */
const float *host_ctx_logits(host_ctx *ctx);

/*
 * Memory of the cache of the plugin's context that was created last; zeros for any other.
 * layers: [n_layers_max] out or NULL. Returns the number of layers.
 */
size_t host_ctx_bytes(host_ctx *ctx, tqkv_plugin_bytes *total, tqkv_plugin_bytes *layers,
                      size_t n_layers_max);

/*
 * Rows of tokens [first, first + n) in a context made with keeps_all, mode f16, which must be the
 * plugin's last: [n][n_kv_heads * dim] f32. Returns an exit code; says why it failed.
 */
int host_ctx_get_rows(host_ctx *ctx, uint32_t layer, tqkv_side side, uint32_t first, uint32_t n, float *rows);
int host_ctx_set_rows(host_ctx *ctx, uint32_t layer, tqkv_side side, uint32_t first, uint32_t n, float *rows);

/* Observer of all plugin contexts; NULL ends it. */
void host_observe(host *h, tqkv_plugin_observer_fn *observe, void *user);

#endif /* TQKV_HOST_LLAMA_H */
