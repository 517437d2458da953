/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of ggml's binary interface that the plugin touches, declared by ourselves: the private
 * headers of ggml are not installed anywhere, and they change without a new version number. What
 * follows is compared with the running host before it is trusted (ggml_host.c).
 *
 * Tables of functions are arrays of words here. Three of them differ between hosts:
 *
 *     table                API 2, old   API 2   API 3
 *     buffer type                   6       6       8
 *     buffer                        9      11      11
 *     backend                      14      16      16
 *     device, registry          15, 4   15, 4   15, 4
 */
#ifndef TQKV_GGML_ABI_H
#define TQKV_GGML_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    GGML_DIMS = 4,
    GGML_SOURCES = 10,
    GGML_OP_PARAM_WORDS = 16,
    GGML_NAME_BYTES = 64,

    GGML_FLAG_COMPUTE = 16, /* of a tensor; only newer hosts set it */

    GGML_OK = 0,
    GGML_FAILED = -1,
    GGML_ALLOC_FAILED = -2,

    GGML_DEVICE_CPU = 0,
    GGML_DEVICE_IGPU = 2
};

/* Any function; cast back to its own type before a call. */
typedef void ggml_function(void);

struct ggml_context;
struct ggml_cgraph;
struct ggml_buffer; /* words: functions, buffer type, context, size, usage */

typedef struct ggml_tensor {
    int32_t type;
    struct ggml_buffer *buffer;
    int64_t ne[GGML_DIMS]; /* elements */
    size_t nb[GGML_DIMS];  /* stride in bytes */
    int32_t op;
    int32_t op_params[GGML_OP_PARAM_WORDS];
    int32_t flags;
    struct ggml_tensor *src[GGML_SOURCES];
    struct ggml_tensor *view_src; /* the tensor that owns the memory, never itself a view */
    size_t view_offs;
    void *data;
    char name[GGML_NAME_BYTES];
    void *extra; /* belongs to the buffer that holds the tensor */
    char padding[8];
} ggml_tensor;

typedef struct ggml_init_params {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
} ggml_init_params;

/* Parameters of a custom operation. Every thread of the graph calls it. */
typedef void ggml_custom_fn(ggml_tensor *node, int ith, int nth, void *user);
typedef struct ggml_custom_params {
    ggml_custom_fn *compute;
    int n_tasks;
    void *user;
} ggml_custom_params;

enum { GGML_THREADS_MAX = 512 };

typedef struct ggml_threadpool_params {
    bool cpumask[GGML_THREADS_MAX]; /* none set: anywhere */
    int n_threads;
    int32_t priority;
    uint32_t poll; /* 0: threads sleep at once, 50: they spin for a while */
    bool strict_cpu;
    bool paused;
} ggml_threadpool_params;

/* Device properties; mmap_support lies in what was padding in older hosts. */
typedef struct ggml_device_props {
    const char *name;
    const char *description;
    size_t memory_free;
    size_t memory_total;
    int32_t type;
    const char *device_id;
    struct {
        bool async;
        bool host_buffer;
        bool buffer_from_host_ptr;
        bool events;
        bool mmap_support;
    } caps;
} ggml_device_props;

/* Index of a function in its table; the same in every version where no table is given. */
enum {
    GGML_REG_GET_NAME = 0,
    GGML_REG_DEVICE_COUNT,
    GGML_REG_GET_DEVICE,
    GGML_REG_PROC_ADDRESS,
    GGML_REG_WORDS
};

enum {
    GGML_DEVICE_GET_NAME = 0,
    GGML_DEVICE_DESCRIPTION,
    GGML_DEVICE_MEMORY,
    GGML_DEVICE_TYPE,
    GGML_DEVICE_PROPS,
    GGML_DEVICE_INIT_BACKEND,
    GGML_DEVICE_BUFFER_TYPE,
    GGML_DEVICE_HOST_BUFFER_TYPE,
    GGML_DEVICE_FROM_HOST_PTR,
    GGML_DEVICE_SUPPORTS_OP,
    GGML_DEVICE_SUPPORTS_BUFT,
    GGML_DEVICE_OFFLOAD_OP,
    GGML_DEVICE_EVENT_NEW,
    GGML_DEVICE_EVENT_FREE,
    GGML_DEVICE_EVENT_SYNC,
    GGML_DEVICE_WORDS
};

enum { GGML_BACKEND_WORDS_MAX = 16, GGML_BUFFER_WORDS_MAX = 11, GGML_BUFT_WORDS_MAX = 8 };

typedef struct ggml_registry {
    int32_t api_version;
    ggml_function *functions[GGML_REG_WORDS];
    void *context;
} ggml_registry;

typedef struct ggml_device {
    ggml_function *functions[GGML_DEVICE_WORDS];
    ggml_registry *reg;
    void *context;
} ggml_device;

/* Functions of the host's table, then the device and a context. */
typedef struct ggml_buffer_type {
    void *words[GGML_BUFT_WORDS_MAX + 2];
} ggml_buffer_type;

/* A GUID, functions of the host's table, then the device and a context. */
typedef struct ggml_backend {
    void *words[1 + GGML_BACKEND_WORDS_MAX + 2];
} ggml_backend;

/* Tables that travel by value: their size is part of the calling convention. */
typedef struct ggml_buffer_table_9 {
    ggml_function *functions[9];
} ggml_buffer_table_9;
typedef struct ggml_buffer_table_11 {
    ggml_function *functions[11];
} ggml_buffer_table_11;

#endif /* TQKV_GGML_ABI_H */
