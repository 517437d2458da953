/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds the host's functions and measures its interface. The version number of ggml's plugin
 * interface protects nothing: tables grew in the middle and operations were renumbered under one
 * number. So every layout that we rely on is read off a live object of the CPU backend, which is
 * always there, and the plugin refuses to load where one does not look as expected.
 */
#include "ggml_host.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "plugin_config.h"

static tqkvp_host host;
static bool host_found;

const tqkvp_host *tqkvp_host_get(void)
{
    return &host;
}

/* --- functions by name --- */

/* A handle that sees the symbols of the object that holds `caller` and of what it needs. */
static void *open_caller(const void *caller)
{
    Dl_info info;

    if (!dladdr((void *)(uintptr_t)caller, &info) || !info.dli_fname)
        return NULL;
    void *handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return handle ? handle : dlopen(NULL, RTLD_LAZY); /* linked into the program */
}

static bool find_functions(void *handle)
{
    const struct {
        const char *name;
        void *slot;
        bool optional;
    } wanted[] = {
        {"ggml_op_name", &host.op_name, false},
        {"ggml_type_name", &host.type_name, false},
        {"ggml_nbytes", &host.nbytes, false},
        {"ggml_row_size", &host.row_size, false},
        {"ggml_init", &host.init, false},
        {"ggml_free", &host.free, false},
        {"ggml_new_tensor_4d", &host.new_tensor_4d, false},
        {"ggml_view_2d", &host.view_2d, false},
        {"ggml_cpy", &host.cpy, false},
        {"ggml_custom_4d", &host.custom_4d, false},
        {"ggml_tensor_overhead", &host.tensor_overhead, false},
        {"ggml_graph_overhead_custom", &host.graph_overhead_custom, false},
        {"ggml_new_graph_custom", &host.new_graph_custom, false},
        {"ggml_build_forward_expand", &host.build_forward_expand, false},
        {"ggml_graph_node", &host.graph_node, false},
        {"ggml_graph_n_nodes", &host.graph_n_nodes, false},
        {"ggml_graph_add_node", &host.graph_add_node, false},
        {"ggml_graph_clear", &host.graph_clear, false},
        {"ggml_backend_dev_by_type", &host.dev_by_type, false},
        {"ggml_backend_dev_count", &host.dev_count, false},
        {"ggml_backend_dev_get", &host.dev_get, false},
        {"ggml_backend_dev_backend_reg", &host.dev_backend_reg, false},
        {"ggml_backend_dev_init", &host.dev_init, false},
        {"ggml_backend_free", &host.backend_free, false},
        {"ggml_backend_graph_compute", &host.graph_compute, false},
        {"ggml_backend_reg_get_proc_address", &host.reg_get_proc_address, false},
        {"ggml_backend_dev_buffer_type", &host.dev_buffer_type, false},
        {"ggml_backend_buft_alloc_buffer", &host.buft_alloc_buffer, false},
        {"ggml_backend_buft_is_host", &host.buft_is_host, false},
        {"ggml_backend_buffer_free", &host.buffer_free, false},
        {"ggml_backend_buffer_init", &host.buffer_init, false},
        {"ggml_threadpool_params_init", &host.threadpool_params_init, true},
    };

    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        void *symbol = handle ? dlsym(handle, wanted[i].name) : NULL;
        if (!symbol)
            symbol = dlsym(RTLD_DEFAULT, wanted[i].name);
        if (!symbol && !wanted[i].optional) {
            tqkvp_say("not active: the host does not export %s (a program that contains ggml "
                      "statically cannot load plugins)",
                      wanted[i].name);
            return false;
        }
        memcpy(wanted[i].slot, &symbol, sizeof(symbol));
    }
    return true;
}

/* --- layouts --- */

static bool refuse(const char *what)
{
    tqkvp_say("not active: %s of this ggml is not what turboquant %s knows; a newer turboquant may",
              what, TQKV_VERSION_STRING);
    return false;
}

/* First index below n_max at which words hold `value`, or n_max. */
static size_t index_of(void *const *words, const void *value, size_t n_max)
{
    size_t i = 0;

    while (i < n_max && words[i] != value)
        i++;
    return i;
}

/* Tensors, graphs and the compute flag, on a tensor of our own. */
static bool check_tensors(void)
{
    enum { GRAPH_NODES = 8 };
    bool ok = false;

    ggml_init_params params = {.mem_size = 8 * host.tensor_overhead() +
                                           host.graph_overhead_custom(GRAPH_NODES, false),
                               .no_alloc = true};
    struct ggml_context *ctx = host.init(params);
    if (!ctx)
        return refuse("the memory context");

    ggml_tensor *a = host.new_tensor_4d(ctx, 0, 5, 7, 11, 13);
    ggml_tensor *view = host.view_2d(ctx, a, 3, 2, a->nb[1], 8);
    ggml_tensor *copy = host.cpy(ctx, view, host.new_tensor_4d(ctx, 0, 3, 2, 1, 1));
    struct ggml_cgraph *graph = host.new_graph_custom(ctx, GRAPH_NODES, false);

    if (a->ne[0] != 5 || a->ne[3] != 13 || a->nb[0] != 4 || a->nb[3] != 4 * 5 * 7 * 11 || a->data ||
        a->buffer || a->extra || host.nbytes(a) != sizeof(float) * 5 * 7 * 11 * 13)
        goto done;
    if (view->view_src != a || view->view_offs != 8 || view->src[0] != a ||
        tqkvp_op_of(view) != TQKVP_OP_VIEW || tqkvp_op_of(a) != TQKVP_OP_NONE ||
        tqkvp_op_of(copy) != TQKVP_OP_CPY || copy->src[0] != view ||
        tqkvp_type_of(a) != TQKVP_TYPE_F32)
        goto done;
    /* "(view)" and the like is appended to the name of the source */
    if (a->name[0] || !memchr(view->name, '\0', GGML_NAME_BYTES) || !strstr(view->name, "view"))
        goto done;
    host.build_forward_expand(graph, copy);
    const int n = host.graph_n_nodes(graph);
    if (n < 1 || n > GRAPH_NODES || host.graph_node(graph, n - 1) != copy)
        goto done;
    host.sets_compute_flag = (copy->flags & GGML_FLAG_COMPUTE) != 0;
    ok = true;
done:
    host.free(ctx);
    return ok || refuse("struct ggml_tensor");
}

static void custom_probe(ggml_tensor *node, int ith, int nth, void *user)
{
    (void)node;
    (void)ith;
    (void)nth;
    (void)user;
}

/* What we write into nodes to make them custom ones, on a custom node. */
static bool check_custom(void)
{
    const ggml_init_params params = {.mem_size = 2 * host.tensor_overhead(), .no_alloc = true};
    struct ggml_context *ctx = host.init(params);
    ggml_custom_params seen;

    if (!ctx)
        return refuse("the memory context");
    const ggml_tensor *node =
        host.custom_4d(ctx, 0, 4, 1, 1, 1, NULL, 0, custom_probe, 3, &host);
    memcpy(&seen, node->op_params, sizeof(seen));
    host.custom_op = node->op;
    const bool ok = strcmp(host.op_name(node->op), "CUSTOM") == 0 &&
                    seen.compute == custom_probe && seen.n_tasks == 3 && seen.user == &host;
    host.free(ctx);
    return ok || refuse("a custom operation");
}

/* The host fills in a structure of ours, and nothing beyond it. */
static bool threadpools_fit(void)
{
    enum { UNTOUCHED = 0xa5, N_THREADS = 7 };
    struct {
        ggml_threadpool_params params;
        uint8_t beyond[1024];
    } seen;
    bool fits = true;

    if (!host.threadpool_params_init)
        return false;
    memset(&seen, UNTOUCHED, sizeof(seen));
    host.threadpool_params_init(&seen.params, N_THREADS);
    const uint8_t *bytes = (const uint8_t *)&seen;
    for (size_t i = 0; i < GGML_THREADS_MAX; i++)
        fits = fits && bytes[i] == 0;
    for (size_t i = 0; i < sizeof(seen.beyond); i++)
        fits = fits && seen.beyond[i] == UNTOUCHED;
    return fits && seen.params.n_threads == N_THREADS && seen.params.priority == 0 &&
           seen.params.poll <= 100 && bytes[offsetof(ggml_threadpool_params, strict_cpu)] == 0 &&
           bytes[offsetof(ggml_threadpool_params, paused)] == 0;
}

static bool check_buffer(void)
{
    enum { SEEN = 14 };
    struct ggml_buffer *buffer = host.buft_alloc_buffer(host.cpu_buffer_type, 256);

    if (!buffer)
        return refuse("the CPU buffer");
    host.n_buffer_functions = index_of((void *const *)(void *)buffer, host.cpu_buffer_type, SEEN);
    host.buffer_free(buffer);
    return host.n_buffer_functions == 9 || host.n_buffer_functions == 11 ||
           refuse("the table of a buffer");
}

static bool check_backend(void)
{
    enum { SEEN = 18 };
    ggml_backend *backend = host.dev_init(host.cpu, NULL);

    if (!backend)
        return refuse("the CPU backend");
    const size_t at = index_of(backend->words, host.cpu, SEEN);
    host.n_backend_functions = at - 1;
    host.backend_free(backend);
    return at == 15 || at == 17 || refuse("the table of a backend");
}

/*
 * Alignment is mandatory and third in the old table; in the new one the third entry is optional and
 * unused by the CPU, and alignment is fourth.
 */
static bool check_buffer_type(void *handle)
{
    void *const *words = host.cpu_buffer_type->words;
    const bool has_n = dlsym(handle ? handle : RTLD_DEFAULT, "ggml_backend_buft_alloc_buffer_n");

    if (words[2] && !has_n && host.api_version == 2)
        host.n_buft_functions = 6;
    else if (!words[2] && words[3] && has_n && host.api_version == 3)
        host.n_buft_functions = 8;
    else
        return refuse("the table of a buffer type");
    return true;
}

/* Whether the object that allocates can abort through assert(): it would import the handler. */
static bool imports_assert(void)
{
    Dl_info info;
    struct stat st;
    bool found = true; /* the careful answer where the file cannot be read */

    if (!dladdr(tqkvp_word((ggml_function *)host.buft_alloc_buffer), &info) || !info.dli_fname)
        return true;
    const int fd = open(info.dli_fname, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return true;
    if (fstat(fd, &st) == 0 && st.st_size > 0) {
        void *bytes = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (bytes != MAP_FAILED) {
            found = memmem(bytes, (size_t)st.st_size, "__assert_", 9) != NULL;
            munmap(bytes, (size_t)st.st_size);
        }
    }
    close(fd);
    return found;
}

const tqkvp_host *tqkvp_host_find(const void *caller)
{
    if (host_found)
        return &host;

    void *handle = open_caller(caller);
    if (!find_functions(handle))
        return NULL;
    host.cpu = host.dev_by_type(GGML_DEVICE_CPU);
    if (!host.cpu) {
        tqkvp_say("not active: the host has no CPU backend");
        return NULL;
    }
    host.api_version = host.dev_backend_reg(host.cpu)->api_version;
    if (host.api_version != 2 && host.api_version != 3) {
        tqkvp_say("not active: this ggml has plugin interface %d; turboquant %s knows 2 and 3",
                  host.api_version, TQKV_VERSION_STRING);
        return NULL;
    }
    host.cpu_buffer_type = host.dev_buffer_type(host.cpu);
    if (!check_tensors() || !check_custom() || !check_buffer() || !check_backend() || !check_buffer_type(handle))
        return NULL;
    host.checks_alloc_size = imports_assert();
    host.has_threadpools = threadpools_fit();
    host_found = true;
    tqkvp_detail("host: plugin interface %d, tables %zu %zu %zu, compute flag %d, asserts %d, thread pools %d",
                 host.api_version, host.n_buft_functions, host.n_buffer_functions,
                 host.n_backend_functions, host.sets_compute_flag, host.checks_alloc_size,
                 host.has_threadpools);
    return &host;
}

/* --- numbers to names, each looked up once --- */

enum { NUMBERS = 512 };

tqkvp_op tqkvp_op_of(const ggml_tensor *tensor)
{
    static _Atomic uint8_t known[NUMBERS];
    static const struct {
        const char *name;
        tqkvp_op op;
    } names[] = {
        {"NONE", TQKVP_OP_NONE},      {"VIEW", TQKVP_OP_VIEW},
        {"RESHAPE", TQKVP_OP_VIEW},   {"PERMUTE", TQKVP_OP_VIEW},
        {"TRANSPOSE", TQKVP_OP_VIEW}, {"SET_ROWS", TQKVP_OP_SET_ROWS},
        {"ROPE", TQKVP_OP_ROPE},      {"FLASH_ATTN_EXT", TQKVP_OP_FLASH_ATTN},
        {"CPY", TQKVP_OP_CPY},        {"MUL_MAT", TQKVP_OP_MUL_MAT},
        {"CONCAT", TQKVP_OP_CONCAT},
    };

    if (tensor->op < 0 || tensor->op >= NUMBERS)
        return TQKVP_OP_OTHER;
    uint8_t op = atomic_load_explicit(&known[tensor->op], memory_order_relaxed);
    if (!op) {
        const char *name = host.op_name(tensor->op);
        op = TQKVP_OP_OTHER;
        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
            if (strcmp(name, names[i].name) == 0)
                op = (uint8_t)names[i].op;
        atomic_store_explicit(&known[tensor->op], op, memory_order_relaxed);
    }
    return (tqkvp_op)op;
}

tqkvp_type tqkvp_type_of(const ggml_tensor *tensor)
{
    static _Atomic uint8_t known[NUMBERS];
    static const struct {
        const char *name;
        tqkvp_type type;
    } names[] = {
        {"f32", TQKVP_TYPE_F32}, {"f16", TQKVP_TYPE_F16}, {"bf16", TQKVP_TYPE_BF16},
        {"i32", TQKVP_TYPE_I32}, {"i64", TQKVP_TYPE_I64},
    };

    if (tensor->type < 0 || tensor->type >= NUMBERS)
        return TQKVP_TYPE_OTHER;
    uint8_t type = atomic_load_explicit(&known[tensor->type], memory_order_relaxed);
    if (!type) {
        const char *name = host.type_name(tensor->type);
        type = TQKVP_TYPE_OTHER;
        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
            if (strcmp(name, names[i].name) == 0)
                type = (uint8_t)names[i].type;
        atomic_store_explicit(&known[tensor->type], type, memory_order_relaxed);
    }
    return (tqkvp_type)type;
}

/* --- buffers --- */

struct ggml_buffer *tqkvp_host_new_buffer(ggml_buffer_type *type, const ggml_buffer_table_11 *table,
                                          void *context, size_t size)
{
    if (host.n_buffer_functions == 11) {
        typedef struct ggml_buffer *make_fn(ggml_buffer_type *, ggml_buffer_table_11, void *,
                                            size_t);
        return ((make_fn *)host.buffer_init)(type, *table, context, size);
    }
    /* the two-dimensional accesses, entries 6 and 7, are missing */
    typedef struct ggml_buffer *make_fn(ggml_buffer_type *, ggml_buffer_table_9, void *, size_t);
    ggml_buffer_table_9 old;
    for (size_t i = 0; i < 9; i++)
        old.functions[i] = table->functions[i < 6 ? i : i + 2];
    return ((make_fn *)host.buffer_init)(type, old, context, size);
}

ggml_buffer_type *tqkvp_buffer_type_of(const struct ggml_buffer *buffer)
{
    void *type;

    memcpy(&type, (const char *)buffer + host.n_buffer_functions * sizeof(void *), sizeof(type));
    return type;
}

void *tqkvp_buffer_context(const struct ggml_buffer *buffer)
{
    void *context;

    memcpy(&context, (const char *)buffer + (host.n_buffer_functions + 1) * sizeof(void *),
           sizeof(context));
    return context;
}
