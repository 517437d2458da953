/* SPDX-License-Identifier: Apache-2.0 */
/* Looks at a llama.cpp program from outside: its libraries, and whether it takes the plugin. */
#ifndef TQKV_HOST_PROBE_H
#define TQKV_HOST_PROBE_H

#include <stdbool.h>

typedef struct host_probe {
    char *program;      /* absolute path */
    char *base_library; /* libggml-base that the program would load, links resolved; NULL: none */
    char *llama_library;
    bool has_ran;       /* --list-devices worked */
    bool has_device;    /* and named TURBOQUANT0 */
    char *plugin_lines; /* what the plugin said meanwhile */
} host_probe;

/* name: a path, or a name to look up in PATH. Returns an exit code; says why it failed. */
int host_probe_run(const char *name, const char *plugin, host_probe *out);
void host_probe_free(host_probe *probe);

#endif /* TQKV_HOST_PROBE_H */
