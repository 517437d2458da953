/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The entry of the plugin, its registry entry and its one device. The device says it is an
 * integrated GPU: llama.cpp takes those when there is no other, gives them the layers of the cache,
 * and keeps the weights on the CPU because we refuse them.
 */
#include <turboquant/ggml_plugin.h>

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kv_buffer.h"
#include "kv_graph.h"
#include "kv_report.h"
#include "kv_rows.h"
#include "plan_source.h"

static ggml_registry registry;
static ggml_device device;

/* --- device --- */

static const char *device_name(ggml_device *dev)
{
    (void)dev;
    return "TURBOQUANT0";
}

static const char *device_description(ggml_device *dev)
{
    (void)dev;
    return "compressed KV cache, turboquant " TQKV_VERSION_STRING;
}

/* The cache lives in main memory. */
static void device_memory(ggml_device *dev, size_t *free_bytes, size_t *total_bytes)
{
    FILE *info = fopen("/proc/meminfo", "re");
    char line[256];
    unsigned long long kib;

    (void)dev;
    *free_bytes = *total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    if (!info)
        return;
    while (fgets(line, sizeof(line), info)) {
        if (sscanf(line, "MemTotal: %llu", &kib) == 1)
            *total_bytes = (size_t)kib * 1024;
        else if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            *free_bytes = (size_t)kib * 1024;
    }
    fclose(info);
}

static int32_t device_type(ggml_device *dev)
{
    (void)dev;
    return GGML_DEVICE_IGPU;
}

static void device_props(ggml_device *dev, ggml_device_props *props)
{
    memset(props, 0, sizeof(*props));
    props->name = device_name(dev);
    props->description = device_description(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->type = GGML_DEVICE_IGPU;
    props->caps.mmap_support = true; /* otherwise the host stops mapping the weights */
}

static ggml_backend *device_init_backend(ggml_device *dev, const char *params)
{
    (void)params;
    return tqkvp_backend_create(dev);
}

static ggml_buffer_type *device_buffer_type(ggml_device *dev)
{
    (void)dev;
    return tqkvp_buffer_type();
}

static bool device_supports_op(ggml_device *dev, const ggml_tensor *node)
{
    (void)dev;
    return tqkvp_supports_op(node);
}

static bool device_supports_buffer_type(ggml_device *dev, ggml_buffer_type *type)
{
    (void)dev;
    return tqkvp_supports_buffer_type(type);
}

/* --- registry --- */

static int configure(const char *mode, const char *plan_path)
{
    tqkvp_config config;
    tqkvp_choice choice;

    if (plan_path) {
        /* read it before anything changes */
        memset(&config, 0, sizeof(config));
        if (strlen(plan_path) >= sizeof(config.plan))
            return -1;
        strcpy(config.plan, plan_path);
        if (!tqkvp_choice_make(&config, false, &choice))
            return -1;
        tqkvp_choice_release(&choice);
    }
    return tqkvp_config_override(mode, plan_path);
}

static const char *registry_name(ggml_registry *reg)
{
    (void)reg;
    return "TURBOQUANT";
}

static size_t registry_device_count(ggml_registry *reg)
{
    (void)reg;
    return 1;
}

static ggml_device *registry_device(ggml_registry *reg, size_t index)
{
    (void)reg;
    return index == 0 ? &device : NULL;
}

static void *registry_proc_address(ggml_registry *reg, const char *name)
{
    static const struct {
        const char *name;
        ggml_function *function;
    } functions[] = {
        {"ggml_backend_set_n_threads", (ggml_function *)tqkvp_backend_set_threads},
        {"ggml_backend_set_abort_callback", (ggml_function *)tqkvp_backend_set_abort},
        {TQKV_PLUGIN_CONFIGURE, (ggml_function *)configure},
        {TQKV_PLUGIN_SET_OBSERVER, (ggml_function *)tqkvp_set_observer},
        {TQKV_PLUGIN_KV_BYTES, (ggml_function *)tqkvp_kv_bytes},
        {TQKV_PLUGIN_KV_ROWS, (ggml_function *)tqkvp_kv_rows},
    };

    (void)reg;
    for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++)
        if (strcmp(name, functions[i].name) == 0)
            return tqkvp_word(functions[i].function);
    return NULL;
}

/* --- entry --- */

static void fill_tables(const tqkvp_host *host)
{
    registry = (ggml_registry){
        .api_version = host->api_version,
        .functions =
            {
                [GGML_REG_GET_NAME] = (ggml_function *)registry_name,
                [GGML_REG_DEVICE_COUNT] = (ggml_function *)registry_device_count,
                [GGML_REG_GET_DEVICE] = (ggml_function *)registry_device,
                [GGML_REG_PROC_ADDRESS] = (ggml_function *)registry_proc_address,
            },
    };
    device = (ggml_device){
        .functions =
            {
                [GGML_DEVICE_GET_NAME] = (ggml_function *)device_name,
                [GGML_DEVICE_DESCRIPTION] = (ggml_function *)device_description,
                [GGML_DEVICE_MEMORY] = (ggml_function *)device_memory,
                [GGML_DEVICE_TYPE] = (ggml_function *)device_type,
                [GGML_DEVICE_PROPS] = (ggml_function *)device_props,
                [GGML_DEVICE_INIT_BACKEND] = (ggml_function *)device_init_backend,
                [GGML_DEVICE_BUFFER_TYPE] = (ggml_function *)device_buffer_type,
                [GGML_DEVICE_SUPPORTS_OP] = (ggml_function *)device_supports_op,
                [GGML_DEVICE_SUPPORTS_BUFT] = (ggml_function *)device_supports_buffer_type,
            },
        .reg = &registry,
    };
    tqkvp_buffer_type_init(&device);
}

/*
 * Called by ggml after loading the plugin, possibly more than once. NULL: not usable, and the line
 * that says why is out.
 */
TQKV_API ggml_registry *ggml_backend_init(void);
TQKV_API ggml_registry *ggml_backend_init(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static bool ready;
    tqkvp_config config;
    tqkvp_choice choice;
    ggml_registry *result = NULL;

    pthread_mutex_lock(&lock);
    const tqkvp_host *host =
        ready ? tqkvp_host_get() : tqkvp_host_find(__builtin_return_address(0));
    if (ready) {
        result = &registry;
    } else if (host && tqkvp_config_read(&config) && tqkvp_choice_make(&config, false, &choice)) {
        /* a plan that cannot be read stops the program here rather than after loading the model */
        tqkvp_choice_release(&choice);
        fill_tables(host);
        ready = true;
        result = &registry;
    }
    pthread_mutex_unlock(&lock);
    return result;
}
