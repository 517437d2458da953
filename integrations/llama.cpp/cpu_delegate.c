/* SPDX-License-Identifier: Apache-2.0 */
#include "cpu_delegate.h"

#include <stdlib.h>
#include <string.h>

#include "ggml_host.h"

enum { NODES = 2 };

typedef void set_threads_fn(ggml_backend *backend, int n_threads);
typedef void set_abort_fn(ggml_backend *backend, bool (*callback)(void *data), void *data);
typedef struct ggml_threadpool *pool_new_fn(ggml_threadpool_params *params);
typedef void pool_free_fn(struct ggml_threadpool *pool);
typedef void set_pool_fn(ggml_backend *backend, struct ggml_threadpool *pool);

struct tqkvp_cpu {
    ggml_backend *backend;
    set_threads_fn *set_threads; /* or NULL, as the others */
    set_abort_fn *set_abort;
    pool_new_fn *pool_new;
    pool_free_fn *pool_free;
    set_pool_fn *set_pool;
    struct ggml_threadpool *pool; /* or NULL */
    int n_pool;                   /* its threads */
    struct ggml_context *ctx;
    struct ggml_cgraph *graph; /* for a single node */
};

/* A function that the host's CPU backend has by name. */
static void find(void *slot, const char *name)
{
    const tqkvp_host *host = tqkvp_host_get();
    void *word = host->reg_get_proc_address(host->dev_backend_reg(host->cpu), name);

    memcpy(slot, &word, sizeof(word));
}

tqkvp_cpu *tqkvp_cpu_create(void)
{
    const tqkvp_host *host = tqkvp_host_get();
    tqkvp_cpu *cpu = calloc(1, sizeof(*cpu));

    if (!cpu)
        return NULL;
    const ggml_init_params params = {.mem_size = host->graph_overhead_custom(NODES, false) + 1024,
                                     .no_alloc = true};
    cpu->backend = host->dev_init(host->cpu, NULL);
    cpu->ctx = host->init(params);
    if (!cpu->backend || !cpu->ctx) {
        tqkvp_cpu_destroy(cpu);
        return NULL;
    }
    cpu->graph = host->new_graph_custom(cpu->ctx, NODES, false);
    find(&cpu->set_threads, "ggml_backend_set_n_threads");
    find(&cpu->set_abort, "ggml_backend_set_abort_callback");
    if (host->has_threadpools) {
        find(&cpu->pool_new, "ggml_threadpool_new");
        find(&cpu->pool_free, "ggml_threadpool_free");
        find(&cpu->set_pool, "ggml_backend_cpu_set_threadpool");
    }
    tqkvp_cpu_set_threads(cpu, 1, false);
    return cpu;
}

static void free_pool(tqkvp_cpu *cpu)
{
    if (!cpu->pool)
        return;
    cpu->set_pool(cpu->backend, NULL);
    cpu->pool_free(cpu->pool);
    cpu->pool = NULL;
    cpu->n_pool = 0;
}

void tqkvp_cpu_destroy(tqkvp_cpu *cpu)
{
    const tqkvp_host *host = tqkvp_host_get();

    if (!cpu)
        return;
    if (cpu->ctx)
        host->free(cpu->ctx);
    free_pool(cpu);
    if (cpu->backend)
        host->backend_free(cpu->backend);
    free(cpu);
}

void tqkvp_cpu_set_threads(tqkvp_cpu *cpu, int n_threads, bool are_alone)
{
    if (cpu->set_threads)
        cpu->set_threads(cpu->backend, n_threads);
    if (n_threads < 2 || n_threads <= cpu->n_pool)
        return;
    free_pool(cpu); /* too small */
    if (n_threads > GGML_THREADS_MAX || !cpu->pool_new || !cpu->pool_free || !cpu->set_pool)
        return;
    ggml_threadpool_params params;
    tqkvp_host_get()->threadpool_params_init(&params, n_threads);
    if (!are_alone)
        params.poll = 0;
    cpu->pool = cpu->pool_new(&params);
    if (!cpu->pool)
        return;
    cpu->n_pool = n_threads;
    cpu->set_pool(cpu->backend, cpu->pool);
}

void tqkvp_cpu_set_abort(tqkvp_cpu *cpu, bool (*callback)(void *data), void *data)
{
    if (cpu->set_abort)
        cpu->set_abort(cpu->backend, callback, data);
}

int32_t tqkvp_cpu_graph(tqkvp_cpu *cpu, struct ggml_cgraph *graph)
{
    return tqkvp_host_get()->graph_compute(cpu->backend, graph);
}

int32_t tqkvp_cpu_node(tqkvp_cpu *cpu, ggml_tensor *node)
{
    const tqkvp_host *host = tqkvp_host_get();

    host->graph_clear(cpu->graph);
    host->graph_add_node(cpu->graph, node);
    return host->graph_compute(cpu->backend, cpu->graph);
}

static bool convert(tqkvp_cpu *cpu, int32_t from_type, void *from, int32_t to_type, void *to,
                    int64_t n)
{
    const tqkvp_host *host = tqkvp_host_get();
    const ggml_init_params params = {.mem_size = 4 * host->tensor_overhead(), .no_alloc = true};
    struct ggml_context *ctx = host->init(params);

    if (!ctx)
        return false;
    ggml_tensor *a = host->new_tensor_4d(ctx, from_type, n, 1, 1, 1);
    ggml_tensor *b = host->new_tensor_4d(ctx, to_type, n, 1, 1, 1);
    a->data = from;
    b->data = to;
    ggml_tensor *copy = host->cpy(ctx, a, b);
    copy->data = to;
    if (host->sets_compute_flag)
        copy->flags |= GGML_FLAG_COMPUTE;
    const bool ok = tqkvp_cpu_node(cpu, copy) == GGML_OK;
    host->free(ctx);
    return ok;
}

enum { TYPE_F32 = 0 /* checked in ggml_host.c */ };

bool tqkvp_cpu_to_f32(tqkvp_cpu *cpu, int32_t type, const void *from, float *to, int64_t n)
{
    return convert(cpu, type, (void *)(uintptr_t)from, TYPE_F32, to, n);
}

bool tqkvp_cpu_from_f32(tqkvp_cpu *cpu, int32_t type, const float *from, void *to, int64_t n)
{
    return convert(cpu, TYPE_F32, (void *)(uintptr_t)from, type, to, n);
}
