/* SPDX-License-Identifier: Apache-2.0 */
#include "plugin_config.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void write_line(const char *format, va_list args)
{
    char line[8192];

    const int n = vsnprintf(line, sizeof(line), format, args);
    if (n >= 0)
        fprintf(stderr, "turboquant: %s\n", line);
}

void tqkvp_say(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    write_line(format, args);
    va_end(args);
}

static bool verbose(void)
{
    const char *value = getenv("TQKV_VERBOSE");

    return value && *value && strcmp(value, "0") != 0;
}

void tqkvp_detail(const char *format, ...)
{
    va_list args;

    if (!verbose())
        return;
    va_start(args, format);
    write_line(format, args);
    va_end(args);
}

static void log_line(void *user, tqkv_log_level level, const char *text)
{
    (void)user;
    if (level <= TQKV_LOG_WARN)
        tqkvp_say("%s", text);
    else
        tqkvp_detail("%s", text);
}

const tqkv_logger *tqkvp_logger(void)
{
    static const tqkv_logger logger = {.user = NULL, .write = log_line};

    return &logger;
}

/* --- settings --- */

enum { SHORT_DEFAULT = 128, SHORT_MAX = 65536 };

static struct {
    bool has_mode, has_plan;
    tqkvp_mode mode;
    char plan[TQKVP_PATH_BYTES];
} override;

static bool parse_mode(const char *text, tqkvp_mode *mode)
{
    static const struct {
        const char *text;
        tqkvp_mode mode;
    } modes[] = {{"auto", TQKVP_MODE_AUTO}, {"f16", TQKVP_MODE_F16}, {"q8", TQKVP_MODE_Q8}};

    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
        if (strcmp(text, modes[i].text) == 0) {
            *mode = modes[i].mode;
            return true;
        }
    }
    return false;
}

static const char *variable(const char *name)
{
    const char *value = getenv(name);

    return value && *value ? value : NULL;
}

/* NULL: as many tokens as f16 decodes no slower than codes (docs/SPEED.md). */
static bool parse_short(const char *text, uint32_t *n)
{
    char *end;

    *n = SHORT_DEFAULT;
    if (!text)
        return true;
    const long value = strtol(text, &end, 10);
    *n = (uint32_t)value;
    return *end == '\0' && value >= 0 && value <= SHORT_MAX;
}

static bool copy_path(char *to, const char *path)
{
    if (strlen(path) >= TQKVP_PATH_BYTES) {
        tqkvp_say("not active: the path of the plan is longer than %d bytes", TQKVP_PATH_BYTES - 1);
        return false;
    }
    strcpy(to, path);
    return true;
}

bool tqkvp_config_read(tqkvp_config *config)
{
    const char *mode = variable("TQKV_MODE");
    const char *plan = variable("TQKV_PLAN");
    const char *state = variable("TQKV_STATE");
    const char *graph = variable("TQKV_GRAPH");
    const char *short_tokens = variable("TQKV_SHORT");

    memset(config, 0, sizeof(*config));
    if (override.has_mode) {
        config->mode = override.mode;
    } else if (mode && !parse_mode(mode, &config->mode)) {
        tqkvp_say("not active: TQKV_MODE=%s has no meaning; use auto, f16 or q8", mode);
        return false;
    }
    if (override.has_plan)
        plan = override.plan;
    if (plan && !copy_path(config->plan, plan))
        return false;
    if (state && strcmp(state, "portable") == 0) {
        config->portable_state = true;
    } else if (state && strcmp(state, "exact") != 0) {
        tqkvp_say("not active: TQKV_STATE=%s has no meaning; use exact or portable", state);
        return false;
    }
    if (graph && strcmp(graph, "split") == 0) {
        config->splits_graph = true;
    } else if (graph && strcmp(graph, "whole") != 0) {
        tqkvp_say("not active: TQKV_GRAPH=%s has no meaning; use whole or split", graph);
        return false;
    }
    if (!parse_short(short_tokens, &config->short_tokens)) {
        tqkvp_say("not active: TQKV_SHORT=%s has no meaning; use a number of tokens up to %d",
                  short_tokens, SHORT_MAX);
        return false;
    }
    return true;
}

int tqkvp_config_override(const char *mode, const char *plan_path)
{
    tqkvp_mode parsed = TQKVP_MODE_AUTO;

    if (mode && !parse_mode(mode, &parsed)) {
        tqkvp_say("mode \"%s\" has no meaning; use auto, f16 or q8", mode);
        return -1;
    }
    if (plan_path && !copy_path(override.plan, plan_path))
        return -1;
    override.has_mode = mode != NULL;
    override.mode = parsed;
    override.has_plan = plan_path != NULL;
    return 0;
}
