/* SPDX-License-Identifier: Apache-2.0 */
#include "plan_source.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- plans, read once --- */

/* The last plans read, in use or not; a file that has changed is another plan. */
static pthread_mutex_t plans_lock = PTHREAD_MUTEX_INITIALIZER;
static tqkvp_plan *plans[2 * TQKVP_PLANS_MAX];
enum { PLANS = sizeof(plans) / sizeof(plans[0]) };

static void plan_free(tqkvp_plan *plan)
{
    if (!plan)
        return;
    tqkv_plan_destroy(plan->plan);
    free(plan->path);
    free(plan);
}

static tqkvp_plan *plan_load(const char *path, bool quiet)
{
    tqkvp_plan *plan = calloc(1, sizeof(*plan));

    if (plan)
        plan->path = strdup(path);
    if (!plan || !plan->path) {
        plan_free(plan);
        tqkvp_say("not active: no memory to read %s", path);
        return NULL;
    }
    /* the library's own text names the field; ours names the file and the remedy */
    const tqkv_status status = tqkv_plan_load(path, quiet ? NULL : tqkvp_logger(), &plan->plan);
    if (status != TQKV_OK) {
        if (!quiet)
            tqkvp_say("not active: plan %s: %s. Make it again with `tqkv calibrate`, or set "
                      "TQKV_MODE=q8 to run without a plan",
                      path, tqkv_status_text(status));
        plan->plan = NULL;
        plan_free(plan);
        return NULL;
    }
    tqkv_plan_get_info(plan->plan, &plan->info);
    return plan;
}

static bool is_file(const tqkvp_plan *plan, const char *path, const struct stat *st)
{
    return strcmp(plan->path, path) == 0 && plan->st.st_dev == st->st_dev &&
           plan->st.st_ino == st->st_ino && plan->st.st_size == st->st_size &&
           plan->st.st_mtim.tv_sec == st->st_mtim.tv_sec &&
           plan->st.st_mtim.tv_nsec == st->st_mtim.tv_nsec;
}

static tqkvp_plan *plan_acquire(const char *path, bool quiet)
{
    struct stat st = {0};
    tqkvp_plan *found = NULL;
    size_t place = PLANS;

    const bool exists = stat(path, &st) == 0;
    pthread_mutex_lock(&plans_lock);
    for (size_t i = 0; i < PLANS && !found; i++) {
        if (plans[i] && exists && is_file(plans[i], path, &st))
            found = plans[i];
        else if (!plans[i] || (plans[i]->n_users == 0 && place == PLANS))
            place = i;
    }
    if (!found && place < PLANS && (found = plan_load(path, quiet)) != NULL) {
        found->st = st;
        plan_free(plans[place]);
        plans[place] = found;
    }
    if (found)
        found->n_users++;
    pthread_mutex_unlock(&plans_lock);
    return found;
}

static void plan_release(tqkvp_plan *plan)
{
    pthread_mutex_lock(&plans_lock);
    plan->n_users--;
    pthread_mutex_unlock(&plans_lock);
}

/* --- model files of this process --- */

/* A file, and the name that the user gave it where that is another one: a link, perhaps. */
typedef struct model_file {
    char *real, *named;
} model_file;

typedef struct model_list {
    size_t n;
    model_file files[TQKVP_PLANS_MAX];
} model_list;

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);

    return n >= m && strcmp(text + n - m, end) == 0;
}

/* Adds a file once, under each name. */
static void add_model(model_list *models, const char *path)
{
    if (!ends_with(path, ".gguf"))
        return;
    char *real = realpath(path, NULL);
    if (!real)
        return;
    size_t i = 0;
    while (i < models->n && strcmp(models->files[i].real, real) != 0)
        i++;
    if (i == TQKVP_PLANS_MAX) {
        free(real);
        return;
    }
    model_file *file = &models->files[i];
    if (i == models->n) {
        models->n++;
        file->real = real;
    } else {
        free(real);
    }
    if (!file->named && strcmp(path, file->real) != 0)
        file->named = strdup(path);
}

static void add_mapped(model_list *models)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char *line = NULL;
    size_t size = 0;

    if (!maps)
        return;
    while (getline(&line, &size, maps) > 0) {
        line[strcspn(line, "\n")] = '\0';
        char *path = strchr(line, '/');
        if (path)
            add_model(models, path);
    }
    free(line);
    fclose(maps);
}

static void add_named(model_list *models)
{
    FILE *command = fopen("/proc/self/cmdline", "re");
    char *word = NULL;
    size_t size = 0;

    const char *variable = getenv("LLAMA_ARG_MODEL");
    if (variable && access(variable, R_OK) == 0)
        add_model(models, variable);
    if (!command)
        return;
    while (getdelim(&word, &size, '\0', command) > 0) {
        const char *equals = strchr(word, '=');
        if (access(word, R_OK) == 0)
            add_model(models, word);
        else if (equals && access(equals + 1, R_OK) == 0)
            add_model(models, equals + 1);
    }
    free(word);
    fclose(command);
}

/* "x.gguf" and "x-00001-of-00003.gguf" to "x.tqkv"; false where there is no such file. */
static bool plan_beside(const char *model, char *path)
{
    if (!model || !ends_with(model, ".gguf"))
        return false;
    size_t n = strlen(model) - strlen(".gguf");
    unsigned part, parts;
    int used = 0;
    const size_t tail = strlen("-00001-of-00003");

    if (n > tail && sscanf(model + n - tail, "-%5u-of-%5u%n", &part, &parts, &used) == 2 &&
        (size_t)used == tail)
        n -= tail;
    if (n + sizeof(".tqkv") > TQKVP_PATH_BYTES)
        return false;
    memcpy(path, model, n);
    strcpy(path + n, ".tqkv");
    return access(path, F_OK) == 0;
}

/* --- the choice --- */

static bool choice_add(tqkvp_choice *choice, const char *path, bool quiet)
{
    tqkvp_plan *plan = plan_acquire(path, quiet);

    if (!plan)
        return false;
    for (size_t i = 0; i < choice->n; i++) {
        if (choice->plans[i] == plan) {
            plan_release(plan);
            return true;
        }
    }
    choice->plans[choice->n++] = plan; /* at most one per model */
    return true;
}

bool tqkvp_choice_make(const tqkvp_config *config, bool quiet, tqkvp_choice *choice)
{
    model_list models = {0};
    bool ok = true;

    memset(choice, 0, sizeof(*choice));
    if (config->mode != TQKVP_MODE_AUTO)
        return true;
    if (config->plan[0]) {
        choice->must_fit = true;
        return choice_add(choice, config->plan, quiet);
    }

    add_mapped(&models);
    add_named(&models);
    choice->n_models = models.n;
    for (size_t i = 0; i < models.n; i++) {
        char path[TQKVP_PATH_BYTES];
        const model_file *file = &models.files[i];
        if (ok && (plan_beside(file->named, path) || plan_beside(file->real, path)))
            ok = choice_add(choice, path, quiet);
        free(file->named);
        free(file->real);
    }
    /* a model without a plan may be the one that the cache belongs to */
    choice->must_fit = choice->n > 0 && choice->n == choice->n_models;
    if (!ok)
        tqkvp_choice_release(choice);
    return ok;
}

void tqkvp_choice_release(tqkvp_choice *choice)
{
    for (size_t i = 0; i < choice->n; i++)
        plan_release(choice->plans[i]);
    choice->n = 0;
}

/*
 * Values of one token that the plan expects in a layer's K or V; 0 where it has no such layer. The
 * host keeps the whole of a latent layer as K.
 */
static int64_t planned_values(const tqkvp_plan *plan, uint32_t layer, tqkv_side side)
{
    tqkv_plan_layer shape;

    if (layer >= plan->info.n_layers || tqkv_plan_get_layer(plan->plan, layer, &shape) != TQKV_OK)
        return 0;
    if (shape.is_latent)
        return side == TQKV_SIDE_K ? (int64_t)shape.k_dim + shape.v_dim : 0;
    return (int64_t)shape.n_kv_heads * (side == TQKV_SIDE_K ? shape.k_dim : shape.v_dim);
}

tqkvp_plan *tqkvp_choice_first(const tqkvp_choice *choice, uint32_t layer, tqkv_side side,
                               int64_t row_values)
{
    for (size_t i = 0; i < choice->n; i++)
        if (planned_values(choice->plans[i], layer, side) == row_values)
            return choice->plans[i];
    return NULL;
}

bool tqkvp_choice_filter(tqkvp_choice *choice, uint32_t layer, tqkv_side side, int64_t row_values)
{
    size_t n_left = 0;

    for (size_t i = 0; i < choice->n; i++)
        n_left += planned_values(choice->plans[i], layer, side) == row_values;
    if (n_left == 0 && choice->n > 0) {
        const tqkvp_plan *plan = choice->plans[0];
        const int64_t planned = planned_values(plan, layer, side);
        tqkvp_say("%splan %s was made for another model (%s): layer %u has %lld values of %c per "
                  "token there and %lld here. %s",
                  choice->must_fit ? "not active: " : "", plan->path, plan->info.model, layer,
                  (long long)planned, side == TQKV_SIDE_K ? 'K' : 'V', (long long)row_values,
                  choice->must_fit
                      ? "Make a plan for this model with `tqkv calibrate`, or set TQKV_MODE=q8"
                      : "Another model of this process has no plan: taking built-in q8");
    }
    const bool failed = n_left == 0 && choice->n > 0 && choice->must_fit;
    size_t n = 0;
    for (size_t i = 0; i < choice->n; i++) {
        if (planned_values(choice->plans[i], layer, side) == row_values)
            choice->plans[n++] = choice->plans[i];
        else
            plan_release(choice->plans[i]);
    }
    choice->n = n;
    return !failed;
}
