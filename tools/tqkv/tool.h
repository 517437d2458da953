/* SPDX-License-Identifier: Apache-2.0 */
/* What all commands share: exit codes, messages, colours and the parsing of option values. */
#ifndef TQKV_TOOL_H
#define TQKV_TOOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "turboquant/types.h"

enum { TOOL_OK = 0, TOOL_FAILED = 1, TOOL_USAGE = 2, TOOL_INTERRUPTED = 130 };

#if defined(__GNUC__)
#define TOOL_PRINTF(format_index, first_index) \
    __attribute__((format(printf, format_index, first_index)))
#else
#define TOOL_PRINTF(format_index, first_index)
#endif

/* argv[0] is the command's name. Each returns an exit code. */
int cmd_eval(int argc, char **argv);
int cmd_calibrate(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_report(int argc, char **argv);
int cmd_run(int argc, char **argv);
int cmd_doctor(int argc, char **argv);

/* Names of the running program, if it is not tqkv, and command in messages: "tqkv eval: ...". Kept. */
void tool_set_program(const char *program);
void tool_set_command(const char *command);

/* Print a message on stderr and return TOOL_FAILED or TOOL_USAGE. */
int tool_error(const char *format, ...) TOOL_PRINTF(1, 2);
int tool_usage(const char *format, ...) TOOL_PRINTF(1, 2);
/* A message that changes nothing. */
void tool_note(const char *format, ...) TOOL_PRINTF(1, 2);

/* Texts of the library, as messages of the command. */
const tqkv_logger *tool_logger(void);

/* Whether a stream is a terminal that wants colours (NO_COLOR and TERM=dumb refuse them). */
bool tool_has_color(FILE *stream);
bool tool_is_terminal(FILE *stream);

/* Memory or the end of the program: none of the commands can go on without. */
void *tool_alloc(size_t n, size_t size);
void *tool_grow(void *old, size_t n, size_t size);
char *tool_copy(const char *text);
char *tool_format(const char *format, ...) TOOL_PRINTF(1, 2);

/*
 * Numbers of options. what: the option, for the message. Each returns TOOL_OK or TOOL_USAGE and
 * has then said why.
 */
int tool_parse_count(const char *what, const char *text, uint32_t least, uint32_t most,
                     uint32_t *out);
int tool_parse_real(const char *what, const char *text, double least, double most, double *out);

/* "a,b,c" cut at the commas; empty parts are an error. Parts are given. */
typedef struct tool_list {
    char **items;
    size_t n;
} tool_list;
int tool_list_add(tool_list *list, const char *what, const char *text);
void tool_list_push(tool_list *list, const char *item);
void tool_list_free(tool_list *list);

/* getopt's complaint about argv[optind - 1], as one of ours. */
int tool_bad_option(char **argv, int option);

double tool_seconds(void); /* monotonic */

enum { TOOL_THREADS_MAX = 512 };
/* Processors that this process may use (taskset, cpuset), at most TOOL_THREADS_MAX. */
uint32_t tool_n_processors(void);

/* "1.5 MiB"; the buffer is given and large enough for any size. */
#define TOOL_SIZE_CHARS 32
const char *tool_size_text(double bytes, char buffer[TOOL_SIZE_CHARS]);

/* The folder of the running program, or "." where the system does not tell. Given. */
char *tool_program_dir(void);
/* path without `ending`, where it has that, with `replacement` put on. Given. */
char *tool_replace_ending(const char *path, const char *ending, const char *replacement);

#endif /* TQKV_TOOL_H */
