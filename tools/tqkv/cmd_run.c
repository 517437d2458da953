/* SPDX-License-Identifier: Apache-2.0 */
/* `tqkv run`: checks plugin and plan, sets the environment and becomes the program. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plan_view.h"
#include "plugin_file.h"
#include "tool.h"

static void print_help(void)
{
    printf(
        "Usage: tqkv run [--plan PLAN.tqkv] [--plugin FILE] -- PROGRAM ARGS...\n\n"
        "Runs a program of llama.cpp with the compressed KV cache. Before that it checks that the\n"
        "plugin is there and that the plan has the layers and heads of the model after -m.\n\n"
        "      --plan FILE     plan to use (default: beside the model, .tqkv instead of .gguf)\n"
        "      --plugin FILE   libggml-turboquant.so (default: beside tqkv, or TQKV_PLUGIN)\n"
        "      --dry-run       check, print the environment, do not run\n\n"
        "The same by hand:\n"
        "  export GGML_BACKEND_PATH=FILE LLAMA_ARG_DEVICE=TURBOQUANT0 TQKV_PLAN=PLAN.tqkv\n");
}

/* The model among the program's arguments, as llama.cpp would find it; NULL: not named. */
static const char *model_argument(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if ((strcmp(argv[i], "-m") == 0 || strcmp(argv[i], "--model") == 0) && i + 1 < argc)
            return argv[i + 1];
        if (strncmp(argv[i], "--model=", 8) == 0)
            return argv[i] + 8;
    }
    return getenv("LLAMA_ARG_MODEL");
}

/* Checks plan against model. plan_path: NULL takes the default. resolved: absolute path, given. */
static int check_plan(const char *plan_path, const char *model_path, char **resolved)
{
    gguf_head *model = tool_alloc(1, sizeof(*model));
    char *beside = NULL;
    tqkv_plan *plan = NULL;
    int rc = TOOL_OK;
    *resolved = NULL;
    if (model_path)
        rc = gguf_head_read(model_path, model);
    if (rc == TOOL_OK && !plan_path) {
        beside = model_path ? plan_view_default_path(model_path) : NULL;
        plan_path = beside;
    }
    if (rc == TOOL_OK && !plan_path)
        rc = tool_usage("no --plan, and no -m MODEL.gguf after '--' to find one beside");
    if (rc == TOOL_OK)
        rc = plan_view_load(plan_path, &plan);
    if (rc == TOOL_OK && model_path)
        rc = plan_view_check_model(plan, plan_path, model, model_path);
    else if (rc == TOOL_OK)
        tool_note("no -m MODEL.gguf: the plan is not checked against the model");
    if (rc == TOOL_OK)
        *resolved = realpath(plan_path, NULL);
    tqkv_plan_destroy(plan);
    free(beside);
    free(model);
    return rc;
}

static int become(const char *plugin, const char *plan, bool is_dry, char **program)
{
    if (is_dry) {
        printf("GGML_BACKEND_PATH=%s\nLLAMA_ARG_DEVICE=TURBOQUANT0\nTQKV_PLAN=%s\n", plugin, plan);
        return TOOL_OK;
    }
    if (setenv("GGML_BACKEND_PATH", plugin, 1) != 0 ||
        setenv("LLAMA_ARG_DEVICE", "TURBOQUANT0", 1) != 0 || setenv("TQKV_PLAN", plan, 1) != 0)
        return tool_error("environment: %s", strerror(errno));
    fflush(stdout);
    execvp(program[0], program);
    return tool_error("cannot run %s: %s%s", program[0], strerror(errno),
                      errno == ENOENT ? "; give its path or put its folder into PATH" : "");
}

int cmd_run(int argc, char **argv)
{
    enum { OPT_HELP = 'h', OPT_PLAN = 256, OPT_PLUGIN, OPT_DRY };
    static const struct option options[] = {{"help", no_argument, NULL, OPT_HELP},
                                            {"plan", required_argument, NULL, OPT_PLAN},
                                            {"plugin", required_argument, NULL, OPT_PLUGIN},
                                            {"dry-run", no_argument, NULL, OPT_DRY},
                                            {0}};
    const char *plan_path = NULL, *plugin_given = NULL;
    bool is_dry = false;
    int option;
    while ((option = getopt_long(argc, argv, "+:h", options, NULL)) != -1) {
        switch (option) {
        case OPT_HELP:
            print_help();
            return TOOL_OK;
        case OPT_PLAN:
            plan_path = optarg;
            break;
        case OPT_PLUGIN:
            plugin_given = optarg;
            break;
        case OPT_DRY:
            is_dry = true;
            break;
        default:
            return tool_bad_option(argv, option);
        }
    }
    if (optind >= argc)
        return tool_usage("which program? It comes after '--'");
    char *plan = NULL;
    int rc = check_plan(plan_path, model_argument(argc - optind, argv + optind), &plan);
    char *plugin = rc == TOOL_OK ? plugin_file_find(plugin_given, 1) : NULL;
    if (rc == TOOL_OK)
        rc = plugin && plan ? become(plugin, plan, is_dry, argv + optind) : TOOL_FAILED;
    free(plugin);
    free(plan);
    return rc;
}
