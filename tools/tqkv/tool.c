/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* sched_getaffinity */
#include "tool.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *program_name = "tqkv", *command_name = "";

void tool_set_program(const char *program)
{
    program_name = program;
}

void tool_set_command(const char *command)
{
    command_name = command;
}

static void print_message(const char *kind, const char *format, va_list args)
{
    fprintf(stderr, "%s%s%s: %s", program_name, *command_name ? " " : "", command_name, kind);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

int tool_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_message("error: ", format, args);
    va_end(args);
    return TOOL_FAILED;
}

int tool_usage(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_message("", format, args);
    va_end(args);
    fprintf(stderr, "Try '%s%s%s --help'.\n", program_name, *command_name ? " " : "", command_name);
    return TOOL_USAGE;
}

void tool_note(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_message("", format, args);
    va_end(args);
}

static void log_write(void *user, tqkv_log_level level, const char *text)
{
    (void)user;
    if (level == TQKV_LOG_INFO)
        return;
    tool_note("%s%s", level == TQKV_LOG_ERROR ? "error: " : "warning: ", text);
}

const tqkv_logger *tool_logger(void)
{
    static const tqkv_logger logger = {.write = log_write};
    return &logger;
}

bool tool_is_terminal(FILE *stream)
{
    const char *term = getenv("TERM");
    return isatty(fileno(stream)) && !(term && strcmp(term, "dumb") == 0);
}

bool tool_has_color(FILE *stream)
{
    const char *refused = getenv("NO_COLOR");
    return tool_is_terminal(stream) && !(refused && *refused);
}

static void *check_memory(void *memory)
{
    if (!memory) {
        tool_error("out of memory");
        exit(TOOL_FAILED);
    }
    return memory;
}

void *tool_alloc(size_t n, size_t size)
{
    return check_memory(calloc(n ? n : 1, size ? size : 1));
}

void *tool_grow(void *old, size_t n, size_t size)
{
    if (size && n > SIZE_MAX / size)
        return check_memory(NULL);
    const size_t bytes = n * size;
    return check_memory(realloc(old, bytes > 0 ? bytes : 1));
}

char *tool_copy(const char *text)
{
    return check_memory(strdup(text));
}

char *tool_format(const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    const int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *text = tool_alloc((size_t)(n < 0 ? 0 : n) + 1, 1);
    vsnprintf(text, (size_t)(n < 0 ? 0 : n) + 1, format, again);
    va_end(again);
    return text;
}

int tool_parse_count(const char *what, const char *text, uint32_t least, uint32_t most,
                     uint32_t *out)
{
    char *end;
    errno = 0;
    const unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || value < least || value > most)
        return tool_usage("%s: '%s' is not a whole number from %u to %u", what, text, least, most);
    *out = (uint32_t)value;
    return TOOL_OK;
}

int tool_parse_real(const char *what, const char *text, double least, double most, double *out)
{
    char *end;
    const double value = strtod(text, &end);
    if (end == text || *end || !isfinite(value) || value < least || value > most)
        return tool_usage("%s: '%s' is not a number from %g to %g", what, text, least, most);
    *out = value;
    return TOOL_OK;
}

void tool_list_push(tool_list *list, const char *item)
{
    list->items = tool_grow(list->items, list->n + 1, sizeof(*list->items));
    list->items[list->n++] = tool_copy(item);
}

int tool_list_add(tool_list *list, const char *what, const char *text)
{
    char *copy = tool_copy(text);
    int rc = TOOL_OK;
    char *part = copy;
    while (part && rc == TOOL_OK) {
        char *comma = strchr(part, ',');
        if (comma)
            *comma++ = '\0';
        if (*part)
            tool_list_push(list, part);
        else
            rc = tool_usage("%s: empty part in '%s'", what, text);
        part = comma;
    }
    free(copy);
    return rc;
}

void tool_list_free(tool_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        free(list->items[i]);
    free(list->items);
    *list = (tool_list){0};
}

int tool_bad_option(char **argv, int option)
{
    const char *given = argv[optind - 1] ? argv[optind - 1] : "";
    if (option == ':')
        return tool_usage("option '%s' needs a value", given);
    return tool_usage("unknown option '%s'", given);
}

uint32_t tool_n_processors(void)
{
    cpu_set_t allowed;
    const int n = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
    return n < 1 ? 1 : n > TOOL_THREADS_MAX ? TOOL_THREADS_MAX : (uint32_t)n;
}

double tool_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

const char *tool_size_text(double bytes, char buffer[TOOL_SIZE_CHARS])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    size_t i = 0;
    while (fabs(bytes) >= 1024 && i + 1 < sizeof(units) / sizeof(units[0])) {
        bytes /= 1024;
        i++;
    }
    snprintf(buffer, TOOL_SIZE_CHARS, i ? "%.4g %s" : "%.0f %s", bytes, units[i]);
    return buffer;
}

char *tool_program_dir(void)
{
    char path[4096];
    const ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (n <= 0)
        return tool_copy(".");
    path[n] = '\0';
    char *slash = strrchr(path, '/');
    if (slash)
        *slash = '\0';
    return tool_copy(path);
}

char *tool_replace_ending(const char *path, const char *ending, const char *replacement)
{
    size_t n = strlen(path);
    const size_t n_ending = strlen(ending);
    if (n > n_ending && strcmp(path + n - n_ending, ending) == 0)
        n -= n_ending;
    return tool_format("%.*s%s", (int)n, path, replacement);
}
