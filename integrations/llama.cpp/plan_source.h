/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which plan a KV cache is stored with. A backend sees no model file, only shapes. So the plan is
 * the one that was named, or one that lies beside a GGUF file which this process has mapped or
 * names on its command line and whose shapes fit the cache.
 */
#ifndef TQKV_PLAN_SOURCE_H
#define TQKV_PLAN_SOURCE_H

#include <sys/stat.h>
#include <turboquant/plan.h>

#include "plugin_config.h"

/* A plan shared by everything that uses it. */
typedef struct tqkvp_plan {
    tqkv_plan *plan;
    tqkv_plan_info info;
    char *path;
    struct stat st; /* of the file when it was read */
    int n_users;
} tqkvp_plan;

enum { TQKVP_PLANS_MAX = 16 };

/* The plans that may still belong to a cache. */
typedef struct tqkvp_choice {
    size_t n;
    tqkvp_plan *plans[TQKVP_PLANS_MAX];
    bool must_fit;   /* no plan left is an error, not a reason to do without */
    size_t n_models; /* GGUF files seen */
} tqkvp_choice;

/*
 * Collects and reads the plans that `config` allows. False after a message where one of them exists
 * and cannot be read (quiet: without the message). tqkvp_choice_release gives the plans back.
 */
bool tqkvp_choice_make(const tqkvp_config *config, bool quiet, tqkvp_choice *choice);
void tqkvp_choice_release(tqkvp_choice *choice);

/* The first plan that fits a cache tensor with `row_values` values per token, or NULL. */
tqkvp_plan *tqkvp_choice_first(const tqkvp_choice *choice, uint32_t layer, tqkv_side side,
                               int64_t row_values);

/*
 * Drops the plans whose layer has another row size than a cache tensor with `row_values` values per
 * token. False after a message where none is left and one had to fit.
 */
bool tqkvp_choice_filter(tqkvp_choice *choice, uint32_t layer, tqkv_side side, int64_t row_values);

#endif /* TQKV_PLAN_SOURCE_H */
