/* SPDX-License-Identifier: Apache-2.0 */
#include "plugin_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

#define PLUGIN_NAME "libggml-turboquant.so"

static char *absolute_if_readable(const char *path)
{
    if (access(path, R_OK) != 0)
        return NULL;
    return realpath(path, NULL);
}

char *plugin_file_find(const char *given, int tell)
{
    static const char *const places[] = {"", "../lib/", "../lib64/", "../lib/x86_64-linux-gnu/",
                                         "../lib/aarch64-linux-gnu/"};
    const char *named = given ? given : getenv("TQKV_PLUGIN");
    if (named && *named) {
        char *found = absolute_if_readable(named);
        if (!found && tell)
            tool_error("plugin %s (from %s): %s", named, given ? "--plugin" : "TQKV_PLUGIN",
                       strerror(errno));
        return found;
    }
    char *dir = tool_program_dir();
    char *found = NULL;
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]) && !found; i++) {
        char *path = tool_format("%s/%s" PLUGIN_NAME, dir, places[i]);
        found = absolute_if_readable(path);
        free(path);
    }
    if (!found && tell)
        tool_error(
            PLUGIN_NAME
            " is neither in %s nor in the lib folder next to it; --plugin or TQKV_PLUGIN names it",
            dir);
    free(dir);
    return found;
}
