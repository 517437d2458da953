/* SPDX-License-Identifier: Apache-2.0 */
#include "cpu_delegate.h"

#include <stdlib.h>

#include "ggml_host.h"

enum { NODES = 64 };

typedef void set_threads_fn(ggml_backend *backend, int n_threads);

struct tqkvp_cpu {
    ggml_backend *backend;
    set_threads_fn *set_threads; /* or NULL */
    struct ggml_context *ctx;
    struct ggml_cgraph *graph;
    int n_nodes;
};

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
    union {
        void *word;
        set_threads_fn *function;
    } found = {.word = host->reg_get_proc_address(host->dev_backend_reg(host->cpu),
                                                  "ggml_backend_set_n_threads")};
    cpu->set_threads = found.function;
    return cpu;
}

void tqkvp_cpu_destroy(tqkvp_cpu *cpu)
{
    const tqkvp_host *host = tqkvp_host_get();

    if (!cpu)
        return;
    if (cpu->ctx)
        host->free(cpu->ctx);
    if (cpu->backend)
        host->backend_free(cpu->backend);
    free(cpu);
}

int32_t tqkvp_cpu_flush(tqkvp_cpu *cpu, int n_threads)
{
    const tqkvp_host *host = tqkvp_host_get();

    if (!cpu || cpu->n_nodes == 0)
        return GGML_OK;
    if (cpu->set_threads)
        cpu->set_threads(cpu->backend, n_threads);
    const int32_t status = host->graph_compute(cpu->backend, cpu->graph);
    host->graph_clear(cpu->graph);
    cpu->n_nodes = 0;
    return status;
}

int32_t tqkvp_cpu_add(tqkvp_cpu *cpu, ggml_tensor *node, int n_threads)
{
    if (cpu->n_nodes == NODES) {
        const int32_t status = tqkvp_cpu_flush(cpu, n_threads);
        if (status != GGML_OK)
            return status;
    }
    tqkvp_host_get()->graph_add_node(cpu->graph, node);
    cpu->n_nodes++;
    return GGML_OK;
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
    const bool ok = tqkvp_cpu_flush(cpu, 1) == GGML_OK && tqkvp_cpu_add(cpu, copy, 1) == GGML_OK &&
                    tqkvp_cpu_flush(cpu, 1) == GGML_OK;
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
