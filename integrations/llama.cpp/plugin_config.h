/* SPDX-License-Identifier: Apache-2.0 */
/* Messages, and the settings: from the environment, or from a program that set them. */
#ifndef TQKV_PLUGIN_CONFIG_H
#define TQKV_PLUGIN_CONFIG_H

#include <stdbool.h>
#include <turboquant/types.h>

#if defined(__GNUC__)
#define TQKVP_PRINTF __attribute__((format(printf, 1, 2)))
#else
#define TQKVP_PRINTF
#endif

/* One line on stderr. */
void tqkvp_say(const char *format, ...) TQKVP_PRINTF;
/* The same, only with TQKV_VERBOSE. */
void tqkvp_detail(const char *format, ...) TQKVP_PRINTF;
/* A logger for the library: errors and warnings always, the rest with TQKV_VERBOSE. */
const tqkv_logger *tqkvp_logger(void);

typedef enum tqkvp_mode { TQKVP_MODE_AUTO, TQKVP_MODE_F16, TQKVP_MODE_Q8 } tqkvp_mode;

enum { TQKVP_PATH_BYTES = 4096 };

typedef struct tqkvp_config {
    tqkvp_mode mode;
    bool portable_state;         /* states hold decoded values instead of records */
    bool splits_graph;           /* the host computes all but the nodes on caches */
    uint32_t short_tokens;       /* contexts of so many stay in plain storage */
    char plan[TQKVP_PATH_BYTES]; /* empty: look beside the model */
} tqkvp_config;

/* The settings now. False after a message where a variable has no meaning. */
bool tqkvp_config_read(tqkvp_config *config);

/* Overrides TQKV_MODE and TQKV_PLAN; NULL gives them back. -1 after a message. */
int tqkvp_config_override(const char *mode, const char *plan_path);

#endif /* TQKV_PLUGIN_CONFIG_H */
