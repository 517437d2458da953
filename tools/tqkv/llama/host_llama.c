/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model is loaded once for each kind of cache that is asked for: a model whose device is the
 * plugin's, and one that has only the CPU. Their weights are the same mapped pages.
 */
#include "host_llama.h"

#include <ggml-backend.h>
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

#define DEVICE_NAME "TURBOQUANT0"
#define LOG_CHARS 1024

struct host {
    host_options options;
    const char *weights_path;
    struct llama_model *plugin_model, *stock_model, *vocab_model;
    const struct llama_vocab *vocab;
    ggml_backend_dev_t device;
    ggml_backend_reg_t reg;
    tqkv_plugin_configure_fn *configure;
    tqkv_plugin_set_observer_fn *set_observer;
    tqkv_plugin_kv_bytes_fn *kv_bytes;
    tqkv_plugin_kv_rows_fn *kv_rows;
    uint64_t n_created; /* plugin contexts so far */
};

struct host_ctx {
    host *h;
    struct llama_context *llama;
    struct llama_batch batch;
    int32_t n_past;
    uint64_t number; /* of the plugin's contexts; 0: stock */
};

/* The last complaint of llama.cpp, for our own message. */
static char last_complaint[LOG_CHARS];

static void log_line(enum ggml_log_level level, const char *text, void *user)
{
    const bool *is_verbose = user;
    if (*is_verbose)
        fputs(text, stderr);
    if (level == GGML_LOG_LEVEL_ERROR) {
        snprintf(last_complaint, sizeof(last_complaint), "%s", text);
        last_complaint[strcspn(last_complaint, "\n")] = '\0';
    }
}

static const char *complaint(void)
{
    return *last_complaint ? last_complaint : "llama.cpp gave no reason (--verbose shows its log)";
}

/* ISO C has no conversion from an object pointer to a function pointer. */
static void copy_address(void *function, size_t n, void *address)
{
    memcpy(function, &address, n);
}

static int load_plugin(host *h)
{
    const char *path = h->options.plugin_path;
    h->reg = ggml_backend_load(path);
    if (!h->reg)
        return tool_error("plugin %s cannot be loaded: %s", path, complaint());
    for (size_t i = 0; i < ggml_backend_reg_dev_count(h->reg); i++) {
        ggml_backend_dev_t device = ggml_backend_reg_dev_get(h->reg, i);
        if (strcmp(ggml_backend_dev_name(device), DEVICE_NAME) == 0)
            h->device = device;
    }
    copy_address(&h->configure, sizeof(h->configure),
                 ggml_backend_reg_get_proc_address(h->reg, TQKV_PLUGIN_CONFIGURE));
    copy_address(&h->set_observer, sizeof(h->set_observer),
                 ggml_backend_reg_get_proc_address(h->reg, TQKV_PLUGIN_SET_OBSERVER));
    copy_address(&h->kv_bytes, sizeof(h->kv_bytes),
                 ggml_backend_reg_get_proc_address(h->reg, TQKV_PLUGIN_KV_BYTES));
    copy_address(&h->kv_rows, sizeof(h->kv_rows),
                 ggml_backend_reg_get_proc_address(h->reg, TQKV_PLUGIN_KV_ROWS));
    if (!h->device || !h->configure || !h->set_observer || !h->kv_bytes || !h->kv_rows)
        return tool_error("plugin %s is another version than this program", path);
    return TOOL_OK;
}

static struct llama_model *load_model(host *h, ggml_backend_dev_t device, bool is_vocab_only)
{
    ggml_backend_dev_t devices[2] = {device, NULL};
    struct llama_model_params params = llama_model_default_params();
    params.devices = devices;
    params.vocab_only = is_vocab_only;
    *last_complaint = '\0';
    struct llama_model *model = llama_model_load_from_file(h->weights_path, params);
    if (!model)
        tool_error("model %s cannot be loaded: %s", h->weights_path, complaint());
    return model;
}

int host_open(const host_options *options, host **out)
{
    host *h = tool_alloc(1, sizeof(*h));
    *out = NULL;
    h->options = *options;
    h->weights_path = options->model_path;
    unsetenv("GGML_BACKEND_PATH"); /* the plugin is loaded here, from where the options say */
    llama_log_set(log_line, &h->options.is_verbose);
    llama_backend_init();
    int rc = options->plugin_path ? load_plugin(h) : TOOL_OK;
    if (rc == TOOL_OK) {
        h->vocab_model = load_model(h, NULL, true);
        rc = h->vocab_model ? TOOL_OK : TOOL_FAILED;
    }
    if (rc != TOOL_OK) {
        host_close(h);
        return rc;
    }
    h->vocab = llama_model_get_vocab(h->vocab_model);
    *out = h;
    return TOOL_OK;
}

void host_close(host *h)
{
    if (!h)
        return;
    llama_model_free(h->plugin_model);
    llama_model_free(h->stock_model);
    llama_model_free(h->vocab_model);
    llama_backend_free();
    static bool silent = false;
    llama_log_set(log_line, &silent);
    free(h);
}

void host_use_weights(host *h, const char *path)
{
    llama_model_free(h->plugin_model);
    llama_model_free(h->stock_model);
    h->plugin_model = h->stock_model = NULL;
    h->weights_path = path ? path : h->options.model_path;
}

uint32_t host_n_vocab(const host *h)
{
    return (uint32_t)llama_vocab_n_tokens(h->vocab);
}

uint32_t host_n_threads(const host *h)
{
    return h->options.n_threads;
}

int host_api_version(const host *h)
{
    int version = 0;
    if (h->reg)
        memcpy(&version, h->reg, sizeof(version)); /* the first member of every ggml_backend_reg */
    return version;
}

int host_tokenize(host *h, const char *text, size_t n_bytes, int32_t **tokens, size_t *n_tokens)
{
    *tokens = NULL;
    *n_tokens = 0;
    if (n_bytes > INT32_MAX / 2)
        return tool_error("text of %zu bytes is too long", n_bytes);
    const int32_t n = -llama_tokenize(h->vocab, text, (int32_t)n_bytes, NULL, 0, false, false);
    if (n <= 0)
        return TOOL_OK;
    *tokens = tool_alloc((size_t)n, sizeof(**tokens));
    const int32_t got = llama_tokenize(h->vocab, text, (int32_t)n_bytes, *tokens, n, false, false);
    *n_tokens = got > 0 ? (size_t)got : 0;
    return TOOL_OK;
}

int32_t host_first_token(const host *h)
{
    return llama_vocab_get_add_bos(h->vocab) ? llama_vocab_bos(h->vocab) : -1;
}

static bool find_type(const char *name, enum ggml_type *out)
{
    static const enum ggml_type types[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                           GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                           GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        if (strcmp(ggml_type_name(types[i]), name) == 0) {
            *out = types[i];
            return true;
        }
    }
    return false;
}

bool host_stock_type(const char *name, double *bits)
{
    enum ggml_type type;
    *bits = 0;
    if (!find_type(name, &type))
        return false;
    *bits = 8.0 * (double)ggml_type_size(type) / (double)ggml_blck_size(type);
    return true;
}

/* The model for a kind of cache, loaded when first asked for; NULL after a message. */
static struct llama_model *model_for(host *h, const host_cache *cache)
{
    if (cache->stock_type) {
        if (!h->stock_model)
            h->stock_model = load_model(h, NULL, false);
        return h->stock_model;
    }
    if (!h->device) {
        tool_error("this cache needs the plugin");
        return NULL;
    }
    if (!h->plugin_model)
        h->plugin_model = load_model(h, h->device, false);
    return h->plugin_model;
}

static int configure_plugin(host *h, const host_cache *cache)
{
    const bool is_plan = strcmp(cache->mode, "plan") == 0;
    if (h->configure(is_plan ? "auto" : cache->mode, is_plan ? cache->plan_path : NULL) != 0)
        return tool_error("the plugin refused mode '%s'%s%s", cache->mode,
                          is_plan ? " with plan " : "", is_plan ? cache->plan_path : "");
    return TOOL_OK;
}

/* On failure too the caller destroys ctx. */
static int create_llama(host_ctx *ctx, const host_ctx_config *config)
{
    host *h = ctx->h;
    const char *stock = config->cache.stock_type;
    struct llama_model *model = model_for(h, &config->cache);
    if (!model)
        return TOOL_FAILED;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = config->n_ctx;
    params.n_batch = params.n_ubatch = config->n_ubatch;
    params.n_seq_max = config->can_repeat ? 2 : 1;
    params.kv_unified = config->can_repeat;
    params.n_threads = params.n_threads_batch = (int32_t)h->options.n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.swa_full = config->keeps_all;
    params.no_perf = true;
    if (stock && !find_type(stock, &params.type_k))
        return tool_error("llama.cpp has no cache of type '%s'", stock);
    if (stock)
        params.type_v = params.type_k;
    *last_complaint = '\0';
    ctx->llama = llama_init_from_model(model, params);
    if (!ctx->llama)
        return tool_error("no context of %u tokens with cache %s: %s", config->n_ctx,
                          stock ? stock : config->cache.mode, complaint());
    if (!llama_get_memory(ctx->llama))
        return tool_error("model %s has no KV cache", h->options.model_path);
    return TOOL_OK;
}

/* The plugin has this setting from the environment, when a cache is allocated. */
static int create_with_settings(host_ctx *ctx, const host_ctx_config *config)
{
    const char name[] = "TQKV_SHORT";
    const bool is_mine = !config->may_be_short && !getenv(name);
    if (is_mine)
        setenv(name, "0", 1);
    const int rc = create_llama(ctx, config);
    if (is_mine)
        unsetenv(name);
    return rc;
}

int host_ctx_create(host *h, const host_ctx_config *config, host_ctx **out)
{
    *out = NULL;
    if (!config->cache.stock_type) {
        const int rc = configure_plugin(h, &config->cache);
        if (rc != TOOL_OK)
            return rc;
    }
    host_ctx *ctx = tool_alloc(1, sizeof(*ctx));
    ctx->h = h;
    ctx->batch = llama_batch_init((int32_t)config->n_ubatch, 0, 1);
    ctx->number = config->cache.stock_type ? 0 : ++h->n_created;
    const int rc = create_with_settings(ctx, config);
    if (rc != TOOL_OK) {
        host_ctx_destroy(ctx);
        return rc;
    }
    *out = ctx;
    return TOOL_OK;
}

void host_ctx_destroy(host_ctx *ctx)
{
    if (!ctx)
        return;
    llama_batch_free(ctx->batch);
    llama_free(ctx->llama);
    free(ctx);
}

void host_ctx_clear(host_ctx *ctx)
{
    llama_memory_clear(llama_get_memory(ctx->llama), true);
    ctx->n_past = 0;
}

void host_ctx_set_threads(host_ctx *ctx, uint32_t n_threads)
{
    llama_set_n_threads(ctx->llama, (int32_t)n_threads, (int32_t)n_threads);
}

uint32_t host_ctx_n_tokens(const host_ctx *ctx)
{
    return (uint32_t)ctx->n_past;
}

void host_ctx_trim(host_ctx *ctx, uint32_t n)
{
    llama_memory_seq_rm(llama_get_memory(ctx->llama), 0, (int32_t)n, -1);
    ctx->n_past = (int32_t)n;
}

int host_ctx_feed(host_ctx *ctx, const int32_t *tokens, uint32_t n, uint32_t first, uint32_t step)
{
    struct llama_batch *batch = &ctx->batch;
    batch->n_tokens = (int32_t)n;
    for (uint32_t t = 0; t < n; t++) {
        batch->token[t] = tokens[t];
        batch->pos[t] = ctx->n_past + (int32_t)t;
        batch->n_seq_id[t] = 1;
        batch->seq_id[t][0] = 0;
        batch->logits[t] = t >= first && (t - first) % step == 0;
    }
    if (first >= n)
        batch->logits[n - 1] =
            1; /* graphs without any output are not a case that llama.cpp has tested */
    *last_complaint = '\0';
    const int32_t failed = llama_decode(ctx->llama, *batch);
    if (failed)
        return tool_error("llama_decode returned %d at token %d: %s", failed, ctx->n_past,
                          complaint());
    ctx->n_past += (int32_t)n;
    return TOOL_OK;
}

bool host_ctx_repeat(host_ctx *ctx, uint32_t n_target)
{
    llama_memory_t memory = llama_get_memory(ctx->llama);
    const int32_t n = ctx->n_past;
    if (!llama_memory_can_shift(memory) || llama_n_seq_max(ctx->llama) < 2 || !n ||
        n_target % (uint32_t)n)
        return false;
    const size_t n_bytes = llama_state_seq_get_size(ctx->llama, 0);
    uint8_t *state = tool_alloc(n_bytes, 1);
    bool is_good = llama_state_seq_get_data(ctx->llama, state, n_bytes, 0) == n_bytes;
    while (is_good && (uint32_t)ctx->n_past < n_target) {
        is_good = llama_state_seq_set_data(ctx->llama, state, n_bytes, 1) != 0;
        if (!is_good)
            break;
        llama_memory_seq_add(memory, 1, 0, -1, ctx->n_past);
        llama_memory_seq_cp(memory, 1, 0, -1, -1);
        llama_memory_seq_rm(memory, 1, -1, -1);
        ctx->n_past += n;
    }
    if (!is_good) {
        llama_memory_seq_rm(memory, 1, -1, -1);
        llama_memory_seq_rm(memory, 0, n, -1);
        ctx->n_past = n;
    }
    free(state);
    return is_good;
}

const float *host_ctx_logits(host_ctx *ctx)
{
    return llama_get_logits(ctx->llama);
}

size_t host_ctx_bytes(host_ctx *ctx, tqkv_plugin_bytes *total, tqkv_plugin_bytes *layers,
                      size_t n_layers_max)
{
    *total = (tqkv_plugin_bytes){0};
    if (!ctx->number || ctx->number != ctx->h->n_created)
        return 0;
    return ctx->h->kv_bytes(total, layers, n_layers_max);
}

static int access_rows(host_ctx *ctx, uint32_t layer, tqkv_side side, uint32_t first, uint32_t n,
                       float *rows, bool is_write)
{
    if (ctx->number == ctx->h->n_created &&
        ctx->h->kv_rows(layer, (uint32_t)side, first, n, rows, is_write) == 0)
        return TOOL_OK;
    return tool_error("layer %u: the plugin gives no access to its rows", layer);
}

int host_ctx_get_rows(host_ctx *ctx, uint32_t layer, tqkv_side side, uint32_t first, uint32_t n,
                      float *rows)
{
    return access_rows(ctx, layer, side, first, n, rows, false);
}

int host_ctx_set_rows(host_ctx *ctx, uint32_t layer, tqkv_side side, uint32_t first, uint32_t n,
                      float *rows)
{
    return access_rows(ctx, layer, side, first, n, rows, true);
}

void host_observe(host *h, tqkv_plugin_observer_fn *observe, void *user)
{
    if (h->set_observer)
        h->set_observer(observe, user);
}
