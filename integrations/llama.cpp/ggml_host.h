/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ggml that loaded us: its functions, found by name in the running process, and what its binary
 * interface looks like. Nothing of it is linked, so one plugin serves every host.
 */
#ifndef TQKV_GGML_HOST_H
#define TQKV_GGML_HOST_H

#include "ggml_abi.h"

/* Operations that mean something to us. Their numbers differ between hosts, their names do not. */
typedef enum tqkvp_op {
    TQKVP_OP_OTHER = 1,
    TQKVP_OP_NONE,
    TQKVP_OP_VIEW, /* view, reshape, permute, transpose */
    TQKVP_OP_SET_ROWS,
    TQKVP_OP_FLASH_ATTN,
    TQKVP_OP_ROPE,
    TQKVP_OP_CPY,
    TQKVP_OP_MUL_MAT,
    TQKVP_OP_CONCAT
} tqkvp_op;

typedef enum tqkvp_type {
    TQKVP_TYPE_OTHER = 1, /* quantised, mostly */
    TQKVP_TYPE_F32,
    TQKVP_TYPE_F16,
    TQKVP_TYPE_BF16,
    TQKVP_TYPE_I32,
    TQKVP_TYPE_I64
} tqkvp_type;

typedef struct tqkvp_host {
    int api_version;
    size_t n_buft_functions, n_buffer_functions, n_backend_functions;
    bool sets_compute_flag; /* nodes without GGML_FLAG_COMPUTE are not to be computed */
    int32_t custom_op;      /* number of the custom operation */
    bool has_threadpools;   /* whose parameters are as we declare them */
    bool checks_alloc_size; /* aborts when a tensor is allocated smaller than its layout */
    ggml_device *cpu;
    ggml_buffer_type *cpu_buffer_type;

    /* Functions of ggml, by their own names. */
    const char *(*op_name)(int32_t op);
    const char *(*type_name)(int32_t type);
    size_t (*nbytes)(const ggml_tensor *tensor);
    size_t (*row_size)(int32_t type, int64_t ne);
    struct ggml_context *(*init)(ggml_init_params params);
    void (*free)(struct ggml_context *ctx);
    ggml_tensor *(*new_tensor_4d)(struct ggml_context *ctx, int32_t type, int64_t ne0, int64_t ne1,
                                  int64_t ne2, int64_t ne3);
    ggml_tensor *(*view_2d)(struct ggml_context *ctx, ggml_tensor *a, int64_t ne0, int64_t ne1,
                            size_t nb1, size_t offset);
    ggml_tensor *(*cpy)(struct ggml_context *ctx, ggml_tensor *a, ggml_tensor *b);
    ggml_tensor *(*custom_4d)(struct ggml_context *ctx, int32_t type, int64_t ne0, int64_t ne1,
                              int64_t ne2, int64_t ne3, ggml_tensor **args, int n_args,
                              ggml_custom_fn *compute, int n_tasks, void *user);
    size_t (*tensor_overhead)(void);
    size_t (*graph_overhead_custom)(size_t size, bool grads);
    struct ggml_cgraph *(*new_graph_custom)(struct ggml_context *ctx, size_t size, bool grads);
    void (*build_forward_expand)(struct ggml_cgraph *graph, ggml_tensor *tensor);
    ggml_tensor *(*graph_node)(struct ggml_cgraph *graph, int i);
    int (*graph_n_nodes)(struct ggml_cgraph *graph);
    void (*graph_add_node)(struct ggml_cgraph *graph, ggml_tensor *tensor);
    void (*graph_clear)(struct ggml_cgraph *graph);

    ggml_device *(*dev_by_type)(int32_t type);
    size_t (*dev_count)(void);
    ggml_device *(*dev_get)(size_t index);
    ggml_registry *(*dev_backend_reg)(ggml_device *device);
    ggml_backend *(*dev_init)(ggml_device *device, const char *params);
    void (*backend_free)(ggml_backend *backend);
    int32_t (*graph_compute)(ggml_backend *backend, struct ggml_cgraph *graph);
    void *(*reg_get_proc_address)(ggml_registry *reg, const char *name);
    ggml_buffer_type *(*dev_buffer_type)(ggml_device *device);
    struct ggml_buffer *(*buft_alloc_buffer)(ggml_buffer_type *type, size_t size);
    bool (*buft_is_host)(ggml_buffer_type *type);
    void (*buffer_free)(struct ggml_buffer *buffer);
    ggml_function *buffer_init;
    void (*threadpool_params_init)(void *params, int n_threads); /* or NULL */
} tqkvp_host;

/*
 * Finds and checks the host that called from `caller` (a return address).
 * Returns NULL after one line that says what does not fit. Later calls return the same host.
 */
const tqkvp_host *tqkvp_host_find(const void *caller);
/* The host found before; never NULL once the plugin is registered. */
const tqkvp_host *tqkvp_host_get(void);

tqkvp_op tqkvp_op_of(const ggml_tensor *tensor);
tqkvp_type tqkvp_type_of(const ggml_tensor *tensor);

/* The host makes a buffer. table: functions in the order of the newest version. */
struct ggml_buffer *tqkvp_host_new_buffer(ggml_buffer_type *type, const ggml_buffer_table_11 *table,
                                          void *context, size_t size);
ggml_buffer_type *tqkvp_buffer_type_of(const struct ggml_buffer *buffer);
void *tqkvp_buffer_context(const struct ggml_buffer *buffer);

/* The tensor that owns the memory of `tensor`. */
static inline ggml_tensor *tqkvp_root(const ggml_tensor *tensor)
{
    return tensor->view_src ? tensor->view_src : (ggml_tensor *)(uintptr_t)tensor;
}

/* Function pointers and words, without a cast that C forbids. */
static inline void *tqkvp_word(ggml_function *function)
{
    union {
        ggml_function *function;
        void *word;
    } u = {.function = function};
    return u.word;
}

#endif /* TQKV_GGML_HOST_H */
