/* SPDX-License-Identifier: Apache-2.0 */
#include "host_probe.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tool.h"

#define OUTPUT_BYTES_MAX (1 << 20)
#define PROBE_SECONDS 30

static char *find_program(const char *name)
{
    struct stat info;
    if (strchr(name, '/'))
        return access(name, X_OK) == 0 ? realpath(name, NULL) : NULL;
    char *folders = tool_copy(getenv("PATH") ? getenv("PATH") : "");
    char *found = NULL, *rest = NULL;
    for (char *dir = strtok_r(folders, ":", &rest); dir && !found;
         dir = strtok_r(NULL, ":", &rest)) {
        char *path = tool_format("%s/%s", dir, name);
        if (access(path, X_OK) == 0 && stat(path, &info) == 0 && S_ISREG(info.st_mode))
            found = realpath(path, NULL);
        free(path);
    }
    free(folders);
    return found;
}

/* Becomes the command, both outputs in the pipe. Environment: name, value, ..., NULL. */
static void child(char *const command[], const char *const *environment, int fd)
{
    for (size_t i = 0; environment && environment[i]; i += 2)
        setenv(environment[i], environment[i + 1], 1);
    alarm(PROBE_SECONDS);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    close(fd);
    execv(command[0], command);
    _exit(127);
}

/* Output of a command, NULL where it could not be run or failed. */
static char *run_output(char *const command[], const char *const *environment)
{
    int fds[2], wait_status = 0;
    if (pipe(fds) != 0)
        return NULL;
    const pid_t pid = fork();
    if (pid == 0) {
        close(fds[0]);
        child(command, environment, fds[1]);
    }
    close(fds[1]);
    char *text = tool_alloc(OUTPUT_BYTES_MAX + 1, 1);
    size_t n = 0;
    while (pid > 0 && n < OUTPUT_BYTES_MAX) {
        const ssize_t got = read(fds[0], text + n, OUTPUT_BYTES_MAX - n);
        if (got <= 0 && !(got < 0 && errno == EINTR))
            break;
        n += got > 0 ? (size_t)got : 0;
    }
    text[n] = '\0';
    close(fds[0]);
    if (pid <= 0 || waitpid(pid, &wait_status, 0) != pid || wait_status != 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* The path after "name... => " in the loader's list. Given. */
static char *listed_library(const char *list, const char *name)
{
    const char *line = strstr(list, name);
    const char *arrow = line ? strstr(line, "=> ") : NULL;
    const char *end = line ? strchr(line, '\n') : NULL;
    if (!arrow || !end || arrow > end)
        return NULL;
    arrow += 3;
    char *path = tool_format("%.*s", (int)strcspn(arrow, " \n"), arrow);
    char *resolved = realpath(path, NULL);
    free(path);
    return resolved;
}

/* Lines of the output that come from the plugin. */
static char *lines_with(const char *text, const char *word)
{
    char *kept = tool_copy("");
    while (*text) {
        const size_t n = strcspn(text, "\n");
        char *line = tool_format("%.*s", (int)n, text);
        if (strstr(line, word)) {
            char *longer = tool_format("%s%s\n", kept, line);
            free(kept);
            kept = longer;
        }
        free(line);
        text += n + (text[n] == '\n');
    }
    return kept;
}

int host_probe_run(const char *name, const char *plugin, host_probe *out)
{
    *out = (host_probe){.program = find_program(name)};
    if (!out->program)
        return tool_error("program %s: not found or not executable", name);

    /* The dynamic loader lists libraries and does not start the program. */
    const char *const trace[] = {"LD_TRACE_LOADED_OBJECTS", "1", NULL};
    char *const bare[] = {out->program, NULL};
    char *list = run_output(bare, trace);
    if (list) {
        out->base_library = listed_library(list, "libggml-base.");
        out->llama_library = listed_library(list, "libllama.");
        free(list);
    }
    if (!out->base_library)
        return TOOL_OK; /* static, or no program of llama.cpp: not run */
    const char *const environment[] = {
        "GGML_BACKEND_PATH", plugin, "LLAMA_ARG_DEVICE", "TURBOQUANT0", "TQKV_VERBOSE", "1", NULL};
    char *const listing[] = {out->program, (char[]){"--list-devices"}, NULL};
    char *text = run_output(listing, environment);
    out->has_ran = text != NULL;
    out->has_device = text && strstr(text, "TURBOQUANT0");
    out->plugin_lines = lines_with(text ? text : "", "turboquant");
    free(text);
    return TOOL_OK;
}

void host_probe_free(host_probe *probe)
{
    free(probe->program);
    free(probe->base_library);
    free(probe->llama_library);
    free(probe->plugin_lines);
}
