/* SPDX-License-Identifier: Apache-2.0 */
/* The `tqkv` program: picks the command. */
#include <stdio.h>
#include <string.h>

#include "tool.h"

typedef struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *what;
} command;

static const command commands[] = {
    {"calibrate", cmd_calibrate, "make a plan (.tqkv) for a model: once per model, a few minutes"},
    {"eval", cmd_eval, "measure what a compressed cache costs in quality and gains in memory"},
    {"inspect", cmd_inspect, "show what a plan stores: bits by layer and head, bytes per token"},
    {"report", cmd_report, "draw a plan and what was measured with it as a page of HTML"},
    {"run", cmd_run, "run a llama.cpp program with the compressed cache"},
    {"doctor", cmd_doctor, "find out why the compressed cache is not on, and what it would save"},
};
#define N_COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void print_help(void)
{
    printf("tqkv compresses the KV cache of language models.\n\nUsage: tqkv COMMAND "
           "...\n\nCommands:\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        printf("  %-10s %s\n", commands[i].name, commands[i].what);
    printf("\n  tqkv COMMAND --help   options of a command\n"
           "  tqkv --version        version of the program and the library in it\n\n"
           "First steps:\n"
           "  tqkv calibrate model.gguf                     writes model.tqkv\n"
           "  tqkv run -- llama-server -m model.gguf        uses it\n\n"
           "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n");
}

static int dispatch(int argc, char **argv)
{
    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            tool_set_command(commands[i].name);
            return commands[i].run(argc - 1, argv + 1);
        }
    }
    return tool_usage("unknown command '%s'", argv[1]);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return tool_usage("which command?");
    int rc = TOOL_OK;
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0)
        print_help();
    else if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0)
        printf("tqkv %s\n", tqkv_version());
    else
        rc = dispatch(argc, argv);
    if (fflush(stdout) != 0 && rc == TOOL_OK)
        rc = tool_error("stdout: cannot write (disk full?)");
    return rc;
}
