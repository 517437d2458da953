/* SPDX-License-Identifier: Apache-2.0 */
/* `tqkv doctor`: finds out, step by step, why the compressed cache would not be on. */
#include <dlfcn.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host_probe.h"
#include "plan_view.h"
#include "plugin_file.h"
#include "tool.h"

static void print_help(void)
{
    printf(
        "Usage: tqkv doctor [MODEL.gguf] [--plan PLAN.tqkv] [--program llama-server] [--plugin "
        "FILE]\n\n"
        "Checks the plugin, a program of llama.cpp and the plan of a model, and says what each\n"
        "lacks. With a model it also shows bytes per token by layer and the context that the free\n"
        "memory has room for, in f16 and with the plan.\n\n"
        "      --program NAME  program to check, a path or found in PATH\n"
        "      --plan FILE     plan (default: beside the model, .tqkv instead of .gguf)\n"
        "      --plugin FILE   libggml-turboquant.so (default: beside tqkv, or TQKV_PLUGIN)\n\n"
        "Exit status 1 if something stands in the way.\n");
}

enum mark { MARK_OK, MARK_NOTE, MARK_BAD };

static void report(enum mark mark, const char *format, ...) TOOL_PRINTF(2, 3);

static int n_bad;

static void report(enum mark mark, const char *format, ...)
{
    static const char *const plain[] = {"ok  ", "note", "BAD "};
    static const char *const colored[] = {"\033[32mok  \033[0m", "\033[33mnote\033[0m",
                                          "\033[31mBAD \033[0m"};
    va_list args;
    printf("%s  ", tool_has_color(stdout) ? colored[mark] : plain[mark]);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    n_bad += mark == MARK_BAD;
}

static void check_plugin(const char *plugin)
{
    if (!plugin) {
        report(MARK_BAD,
               "plugin: libggml-turboquant.so not found; --plugin or TQKV_PLUGIN names it");
        return;
    }
    /* It imports nothing of ggml, so it opens in any process. */
    void *handle = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        report(MARK_BAD, "plugin: %s", dlerror());
    else if (!dlsym(handle, "ggml_backend_init"))
        report(MARK_BAD, "plugin: %s has no ggml_backend_init; it is something else", plugin);
    else
        report(MARK_OK, "plugin: %s can be loaded", plugin);
    if (handle)
        dlclose(handle);
}

static void check_environment(const char *plugin)
{
    const char *path = getenv("GGML_BACKEND_PATH"), *device = getenv("LLAMA_ARG_DEVICE");
    if (!path && !device) {
        report(MARK_NOTE,
               "environment: nothing set here; 'tqkv run' sets it, or by hand: export "
               "GGML_BACKEND_PATH=%s LLAMA_ARG_DEVICE=TURBOQUANT0",
               plugin ? plugin : "...");
        return;
    }
    if (!path)
        report(MARK_BAD, "environment: LLAMA_ARG_DEVICE is set, GGML_BACKEND_PATH is not");
    else if (access(path, R_OK) != 0)
        report(MARK_BAD, "environment: GGML_BACKEND_PATH=%s: %s", path, strerror(errno));
    else if (!device || !strstr(device, "TURBOQUANT0"))
        report(
            MARK_BAD,
            "environment: LLAMA_ARG_DEVICE=%s; without TURBOQUANT0 most builds ignore the plugin "
            "and keep an f16 cache",
            device ? device : "");
    else
        report(MARK_OK, "environment: GGML_BACKEND_PATH=%s LLAMA_ARG_DEVICE=%s", path, device);
}

static void check_program(const char *name, const char *plugin)
{
    host_probe probe;
    if (!plugin) {
        report(MARK_NOTE, "program: not checked without a plugin");
        return;
    }
    if (host_probe_run(name, plugin, &probe) != TOOL_OK) {
        n_bad++;
        return;
    }
    if (!probe.base_library) {
        report(MARK_BAD,
               "program: %s loads no libggml-base.so; a static build of llama.cpp (or none at all) "
               "cannot take plugins",
               probe.program);
    } else {
        report(MARK_OK, "program: %s", probe.program);
        report(MARK_OK, "program: ggml is %s", probe.base_library);
        if (probe.llama_library)
            report(MARK_OK, "program: llama is %s", probe.llama_library);
        if (!probe.has_ran)
            report(MARK_BAD, "program: '%s --list-devices' failed; is it a program of llama.cpp?",
                   name);
        else if (!probe.has_device)
            report(MARK_BAD, "program: does not list TURBOQUANT0; the plugin was refused");
        else
            report(MARK_OK, "program: takes the plugin (device TURBOQUANT0)");
        for (char *rest = NULL, *line = strtok_r(probe.plugin_lines, "\n", &rest); line;
             line = strtok_r(NULL, "\n", &rest))
            printf("      | %s\n", line);
    }
    host_probe_free(&probe);
}

/* MemAvailable in bytes, 0 where the system does not tell. */
static double free_memory(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            break;
    }
    if (file)
        fclose(file);
    return 1024.0 * (double)kib;
}

static void print_layers(const tqkv_plan *plan, uint32_t n_layers, uint32_t n_tiers)
{
    printf("\nBytes per token: f16, then the plan by age, youngest first\n%5s  %8s\n", "layer",
           "f16");
    for (uint32_t i = 0; i < n_layers; i++) {
        tqkv_plan_layer layer;
        if (tqkv_plan_get_layer(plan, i, &layer) != TQKV_OK)
            continue;
        printf("%5u  %8u ", i, 2 * layer.n_kv_heads * (layer.k_dim + layer.v_dim));
        for (uint32_t j = 0; j < n_tiers; j++)
            printf(" %6u", layer.token_bytes[j]);
        if (layer.window)
            printf("  holds the last %u tokens only", plan_view_resident(layer.window, UINT32_MAX));
        putchar('\n');
    }
}

/* Most tokens that take no more than `memory`. */
static uint32_t longest_context(const tqkv_plan *plan, double memory, bool is_f16)
{
    uint32_t least = 0, most = 1u << 24;
    while (least < most) {
        const uint32_t tokens = least + (most - least + 1) / 2;
        double held, f16;
        if (plan_view_bytes(plan, tokens, &held, &f16) == TOOL_OK &&
            (is_f16 ? f16 : held) <= memory)
            least = tokens;
        else
            most = tokens - 1;
    }
    return least;
}

static void print_room(const tqkv_plan *plan, const gguf_head *model)
{
    char size[TOOL_SIZE_CHARS], weights[TOOL_SIZE_CHARS];
    const double free_bytes = free_memory(), room = free_bytes - (double)model->file_bytes;
    if (room <= 0) {
        report(MARK_NOTE, "memory: %s free, the model alone takes %s",
               tool_size_text(free_bytes, size),
               tool_size_text((double)model->file_bytes, weights));
        return;
    }
    const uint32_t f16 = longest_context(plan, room, true),
                   ours = longest_context(plan, room, false);
    printf("\nRoom for a cache: %s (%s free, %s of them for the model)\n",
           tool_size_text(room, size), tool_size_text(free_bytes, (char[TOOL_SIZE_CHARS]){0}),
           tool_size_text((double)model->file_bytes, weights));
    printf("  f16       %9u tokens\n  the plan  %9u tokens (%.1f times as many)\n", f16, ours,
           f16 ? (double)ours / f16 : 0.0);
    if (model->n_ctx_train && ours > model->n_ctx_train)
        printf("  The model was trained for %u.\n", model->n_ctx_train);
}

static void check_model(const char *path, const char *plan_given)
{
    gguf_head *model = tool_alloc(1, sizeof(*model));
    char *plan_path = plan_given ? tool_copy(plan_given) : plan_view_default_path(path);
    tqkv_plan *plan = NULL;
    tqkv_plan_info info;
    fflush(stdout);
    if (gguf_head_read(path, model) != TOOL_OK) {
        n_bad++;
        goto done;
    }
    report(MARK_OK, "model: %s, %s, %u layers, %u KV heads of %u + %u channels", model->name,
           model->arch, model->n_layers, model->n_kv_heads[0], model->k_dim, model->v_dim);
    if (access(plan_path, R_OK) != 0) {
        report(MARK_BAD,
               "plan: %s is not there; 'tqkv calibrate %s' makes it. Until then the plugin stores "
               "8 bits",
               plan_path, path);
        goto done;
    }
    fflush(stdout);
    if (plan_view_load(plan_path, &plan) != TOOL_OK ||
        plan_view_check_model(plan, plan_path, model, path) != TOOL_OK) {
        n_bad++;
        goto done;
    }
    tqkv_plan_get_info(plan, &info);
    report(MARK_OK, "plan: %s, profile %s, %.2f bits per value at %u tokens", plan_path,
           info.profile, info.bits_total, info.context);
    print_layers(plan, info.n_layers, info.n_tiers);
    print_room(plan, model);
done:
    tqkv_plan_destroy(plan);
    free(plan_path);
    free(model);
}

int cmd_doctor(int argc, char **argv)
{
    enum { OPT_HELP = 'h', OPT_PLAN = 256, OPT_PLUGIN, OPT_PROGRAM };
    static const struct option options[] = {{"help", no_argument, NULL, OPT_HELP},
                                            {"plan", required_argument, NULL, OPT_PLAN},
                                            {"plugin", required_argument, NULL, OPT_PLUGIN},
                                            {"program", required_argument, NULL, OPT_PROGRAM},
                                            {0}};
    const char *plan = NULL, *plugin_given = NULL, *program = NULL;
    int option;
    while ((option = getopt_long(argc, argv, ":h", options, NULL)) != -1) {
        switch (option) {
        case OPT_HELP:
            print_help();
            return TOOL_OK;
        case OPT_PLAN:
            plan = optarg;
            break;
        case OPT_PLUGIN:
            plugin_given = optarg;
            break;
        case OPT_PROGRAM:
            program = optarg;
            break;
        default:
            return tool_bad_option(argv, option);
        }
    }
    if (argc - optind > 1)
        return tool_usage("one model at a time");
    if (plan && optind == argc)
        return tool_usage("--plan needs the model that it is for");

    char *plugin = plugin_file_find(plugin_given, 0);
    report(MARK_OK, "tqkv %s", tqkv_version());
    check_plugin(plugin);
    check_environment(plugin);
    if (program)
        check_program(program, plugin);
    if (optind < argc)
        check_model(argv[optind], plan);
    free(plugin);
    if (n_bad)
        printf("\n%d in the way.\n", n_bad);
    else
        printf("\nNothing stands in the way.\n");
    return n_bad ? TOOL_FAILED : TOOL_OK;
}
