/* SPDX-License-Identifier: Apache-2.0 */
/* `tqkv eval`: what a compressed cache costs in quality, and what it gains. */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "eval_report.h"
#include "eval_types.h"
#include "interrupt.h"
#include "json_file.h"
#include "output_file.h"
#include "plan_view.h"
#include "plugin_file.h"
#include "tool.h"

enum { N_CTX_MAX = 1 << 20, N_UBATCH_MAX = 8192 };

typedef struct eval_options {
    const char *model, *plugin, *json;
    tool_list plans, texts, caches, contexts, ubatches;
    tool_list depths, speed_threads;
    uint32_t n_threads, n_pieces, limit_16, n_rounds;
    bool is_speed_only, is_verbose, has_stock_base, has_prefill, has_quick_fill;
} eval_options;

static void print_help(void)
{
    printf(
        "Usage: tqkv eval MODEL.gguf --text FILE... [--plan PLAN.tqkv...] [options]\n\n"
        "Feeds the same tokens to the model with an f16 cache and with every cache under test and\n"
        "compares what the model predicts: KL divergence from f16, most likely token, perplexity.\n"
        "The second half of each piece is scored, as llama-perplexity does. The f16 reference is\n"
        "this project's own, which computes attention in the same way as the compressed caches.\n\n"
        "      --text FILE     text that the model was not calibrated on; may be repeated\n"
        "      --plan FILE     compressed cache to test; may be repeated (default: beside the "
        "model)\n"
        "      --cache LIST    caches to test: ours (every --plan), ours-q8 (8 bits, no plan), "
        "and\n"
        "                      llama.cpp's f16, q8_0, q5_0, q4_0, ... (default: "
        "f16,q8_0,q4_0,ours)\n"
        "  -c, --ctx LIST      tokens of a piece, such as 2048,8192 (default: 2048)\n"
        "  -ub, --ubatch LIST  tokens fed at a time: 512 as a prompt, 16 or 1 as answers are\n"
        "                      written (default: 512)\n"
        "      --pieces N      pieces of each text (default: 1)\n"
        "      --limit-16 N    pieces of at most N tokens where fewer than 64 are fed at a time\n"
        "      --depth LIST    also measure tokens/s, after so many tokens: 0,512,8192\n"
        "      --prefill       of a prompt of 512 tokens too, not only of decoding\n"
        "      --speed-threads LIST  with these numbers of threads (default: as -t)\n"
        "      --rounds N      in which every cache decodes 8 tokens (default: 24, or as many as take "
        "10 s)\n"
        "      --speed-only    measure nothing else\n"
        "      --quick-fill    fill llama.cpp's caches by copying their first 1024 tokens; what "
        "is\n"
        "                      timed is the same\n"
        "  -t, --threads N     threads (default: all processors)\n"
        "      --json FILE     write the results as JSON; - is stdout\n"
        "      --plugin FILE   libggml-turboquant.so (default: beside tqkv, or TQKV_PLUGIN)\n"
        "      --stock-base    compare with llama.cpp's own f16 cache instead; differences in the\n"
        "                      order of summation then count as loss\n"
        "      --verbose       show llama.cpp's log\n\n"
        "Quality is that of codes from the first token on; tokens/s are as users have them, with short\n"
        "contexts uncompressed (TQKV_SHORT).\n"
        "Bits per value and ratio come from the bytes that caches hold at the end of a piece.\n"
        "Standard errors (+-) take tokens as independent. The JSON also has kl_ci95, half of a 95 "
        "%%\n"
        "confidence interval of the mean, which takes blocks of 64 tokens as independent.\n");
}

static int parse_option(eval_options *o, int option, char **argv)
{
    switch (option) {
    case 'x':
        tool_list_push(&o->texts, optarg);
        return TOOL_OK;
    case 'p':
        tool_list_push(&o->plans, optarg);
        return TOOL_OK;
    case 'k':
        return tool_list_add(&o->caches, "--cache", optarg);
    case 'c':
        return tool_list_add(&o->contexts, "-c", optarg);
    case 'u':
        return tool_list_add(&o->ubatches, "-ub", optarg);
    case 'n':
        return tool_parse_count("--pieces", optarg, 1, 100000, &o->n_pieces);
    case 'l':
        return tool_parse_count("--limit-16", optarg, 64, N_CTX_MAX, &o->limit_16);
    case 'd':
        return tool_list_add(&o->depths, "--depth", optarg);
    case 'w':
        return tool_list_add(&o->speed_threads, "--speed-threads", optarg);
    case 'r':
        return tool_parse_count("--rounds", optarg, 1, EVAL_ROUNDS_MAX, &o->n_rounds);
    case 'f':
        o->has_prefill = true;
        return TOOL_OK;
    case 's':
        o->is_speed_only = true;
        return TOOL_OK;
    case 'q':
        o->has_quick_fill = true;
        return TOOL_OK;
    case 't':
        return tool_parse_count("-t", optarg, 1, TOOL_THREADS_MAX, &o->n_threads);
    case 'j':
        o->json = optarg;
        return TOOL_OK;
    case 'g':
        o->plugin = optarg;
        return TOOL_OK;
    case 'b':
        o->has_stock_base = true;
        return TOOL_OK;
    case 'v':
        o->is_verbose = true;
        return TOOL_OK;
    default:
        return tool_bad_option(argv, option);
    }
}

/* TOOL_OK with o->model NULL: help was asked for and given. */
static int parse(eval_options *o, int argc, char **argv)
{
    static const struct option options[] = {
        {"help", no_argument, NULL, 'h'},           {"text", required_argument, NULL, 'x'},
        {"plan", required_argument, NULL, 'p'},     {"cache", required_argument, NULL, 'k'},
        {"ctx", required_argument, NULL, 'c'},      {"ub", required_argument, NULL, 'u'},
        {"ubatch", required_argument, NULL, 'u'},   {"pieces", required_argument, NULL, 'n'},
        {"limit-16", required_argument, NULL, 'l'}, {"depth", required_argument, NULL, 'd'},
        {"speed-only", no_argument, NULL, 's'},     {"quick-fill", no_argument, NULL, 'q'},
        {"prefill", no_argument, NULL, 'f'},        {"speed-threads", required_argument, NULL, 'w'},
        {"rounds", required_argument, NULL, 'r'},
        {"threads", required_argument, NULL, 't'},  {"json", required_argument, NULL, 'j'},
        {"plugin", required_argument, NULL, 'g'},   {"stock-base", no_argument, NULL, 'b'},
        {"verbose", no_argument, NULL, 'v'},        {0}};
    int option;
    /* long_only, so that -ub is understood as in llama.cpp */
    while ((option = getopt_long_only(argc, argv, ":hc:t:", options, NULL)) != -1) {
        if (option == 'h') {
            print_help();
            return TOOL_OK;
        }
        const int rc = parse_option(o, option, argv);
        if (rc != TOOL_OK)
            return rc;
    }
    if (optind == argc)
        return tool_usage("which model?");
    if (!o->texts.n)
        return tool_usage("--text FILE is missing: a text to measure on");
    for (int i = optind + 1; i < argc; i++)
        tool_list_push(&o->texts, argv[i]); /* --text a b c */
    o->model = argv[optind];
    if (o->is_speed_only && !o->depths.n)
        return tool_usage("--speed-only needs --depth");
    return TOOL_OK;
}

static void set_defaults(eval_options *o)
{
    static const char *const caches[] = {"f16", "q8_0", "q4_0", "ours"};
    if (!o->contexts.n)
        tool_list_push(&o->contexts, "2048");
    if (!o->ubatches.n)
        tool_list_push(&o->ubatches, "512");
    for (size_t i = 0; i < 4 && !o->caches.n; i++) {
        for (size_t j = 0; j < 4; j++)
            tool_list_push(&o->caches, caches[j]);
    }
    if (!o->n_pieces)
        o->n_pieces = 1;
    if (!o->n_threads)
        o->n_threads = tool_n_processors();
}

static int parse_numbers(const char *what, const tool_list *list, uint32_t least, uint32_t most,
                         uint32_t *numbers, size_t *n)
{
    if (list->n > EVAL_DEPTHS_MAX)
        return tool_usage("%s: more than %d numbers", what, EVAL_DEPTHS_MAX);
    for (*n = 0; *n < list->n; ++*n) {
        const int rc = tool_parse_count(what, list->items[*n], least, most, &numbers[*n]);
        if (rc != TOOL_OK)
            return rc;
    }
    return TOOL_OK;
}

static int make_speed_setting(const eval_options *o, eval_speed_setting *s)
{
    *s = (eval_speed_setting){.n_rounds = o->n_rounds,
                              .has_prefill = o->has_prefill,
                              .has_quick_fill = o->has_quick_fill};
    int rc = parse_numbers("--depth", &o->depths, 0, N_CTX_MAX, s->depths, &s->n_depths);
    if (rc == TOOL_OK)
        rc = parse_numbers("--speed-threads", &o->speed_threads, 1, TOOL_THREADS_MAX, s->n_threads,
                           &s->n_thread_counts);
    for (size_t i = 1; i < s->n_depths && rc == TOOL_OK; i++)
        if (s->depths[i] <= s->depths[i - 1])
            rc = tool_usage("--depth: %u after %u; depths ascend", s->depths[i], s->depths[i - 1]);
    if (!s->n_thread_counts)
        s->n_threads[s->n_thread_counts++] = o->n_threads;
    return rc;
}

/* Products of -c and -ub. */
static int make_settings(const eval_options *o, eval_setting *settings, size_t *n)
{
    *n = 0;
    for (size_t i = 0; i < o->contexts.n && !o->is_speed_only; i++) {
        for (size_t j = 0; j < o->ubatches.n; j++) {
            eval_setting s;
            int rc = tool_parse_count("-c", o->contexts.items[i], 64, N_CTX_MAX, &s.n_ctx);
            if (rc == TOOL_OK)
                rc = tool_parse_count("-ub", o->ubatches.items[j], 1, N_UBATCH_MAX, &s.n_ubatch);
            if (rc == TOOL_OK && *n == EVAL_SETTINGS_MAX)
                rc = tool_usage("more than %d combinations of -c and -ub", EVAL_SETTINGS_MAX);
            if (rc != TOOL_OK)
                return rc;
            if (o->limit_16 && s.n_ubatch < 64 && s.n_ctx > o->limit_16)
                s.n_ctx = o->limit_16;
            if (s.n_ubatch > s.n_ctx)
                s.n_ubatch = s.n_ctx;
            settings[(*n)++] = s;
        }
    }
    return TOOL_OK;
}

static eval_cache *next_cache(eval_job *job)
{
    return job->n_caches < EVAL_CACHES_MAX ? &job->caches[job->n_caches++] : NULL;
}

static int add_plan(eval_job *job, const char *path, const gguf_head *model, const char *model_path)
{
    tqkv_plan *plan;
    tqkv_plan_info info;
    int rc = plan_view_load(path, &plan);
    if (rc == TOOL_OK)
        rc = plan_view_check_model(plan, path, model, model_path);
    eval_cache *cache = rc == TOOL_OK ? next_cache(job) : NULL;
    if (cache) {
        tqkv_plan_get_info(plan, &info);
        snprintf(cache->label, sizeof(cache->label), "ours %s", info.profile);
        cache->cache = (host_cache){.mode = "plan", .plan_path = path};
    } else if (rc == TOOL_OK) {
        rc = tool_usage("more than %d caches", EVAL_CACHES_MAX);
    }
    tqkv_plan_destroy(plan);
    return rc;
}

static int add_caches(eval_job *job, eval_options *o, const gguf_head *model)
{
    for (size_t i = 0; i < o->caches.n; i++) {
        const char *name = o->caches.items[i];
        double bits;
        if (strcmp(name, "ours") == 0) {
            if (!o->plans.n) {
                char *beside = plan_view_default_path(o->model);
                tool_list_push(&o->plans, beside);
                free(beside);
            }
            for (size_t j = 0; j < o->plans.n; j++) {
                const int rc = add_plan(job, o->plans.items[j], model, o->model);
                if (rc != TOOL_OK)
                    return rc;
            }
            continue;
        }
        const bool is_q8 = strcmp(name, "ours-q8") == 0, is_f16 = strcmp(name, "ours-f16") == 0;
        if (!is_q8 && !is_f16 && !host_stock_type(name, &bits))
            return tool_usage("--cache: llama.cpp has no cache type '%s'", name);
        eval_cache *cache = next_cache(job);
        if (!cache)
            return tool_usage("more than %d caches", EVAL_CACHES_MAX);
        snprintf(cache->label, sizeof(cache->label), "%s", name);
        if (is_q8 || is_f16) {
            cache->cache = (host_cache){.mode = is_q8 ? "q8" : "f16"};
        } else {
            cache->cache = (host_cache){.stock_type = name};
            cache->stock_bits = bits;
        }
    }
    return TOOL_OK;
}

static int read_texts(eval_job *job, const eval_options *o, uint32_t n_needed)
{
    job->texts = tool_alloc(o->texts.n, sizeof(*job->texts));
    for (size_t i = 0; i < o->texts.n; i++) {
        text_tokens *text = &job->texts[job->n_texts++];
        const int rc = text_tokens_read(job->h, o->texts.items[i], text);
        if (rc != TOOL_OK)
            return rc;
        if (text->n < n_needed)
            return tool_error("text %s has %zu tokens, %u are needed; take a longer text or a "
                              "smaller -c, --pieces "
                              "or --depth",
                              text->path, text->n, n_needed);
    }
    return TOOL_OK;
}

static int measure_speed(eval_job *job, FILE *out, const eval_speed_setting *setting, json_t *rows)
{
    const size_t n = setting->n_depths * setting->n_thread_counts * job->n_caches;
    eval_speed *speeds = tool_alloc(n, sizeof(*speeds));
    const int rc = eval_speed_run(job, setting, speeds);
    if (rc == TOOL_OK) {
        eval_print_speeds(out, speeds, n);
        json_t *list = eval_speeds_json(speeds, n);
        json_array_extend(rows, list);
        json_decref(list);
    }
    free(speeds);
    return rc;
}

static int measure(eval_job *job, const eval_options *o, const eval_setting *settings,
                   size_t n_settings, const eval_speed_setting *speed_setting, json_t *results,
                   json_t *speeds_json)
{
    FILE *out = o->json && strcmp(o->json, "-") == 0 ? stderr : stdout;
    for (size_t i = 0; i < n_settings; i++) {
        eval_score scores[EVAL_CACHES_MAX] = {0};
        const int rc = eval_score_run(job, &settings[i], scores);
        if (rc == TOOL_OK) {
            eval_print_scores(out, job, &settings[i], scores);
            json_t *list = eval_scores_json(job, &settings[i], scores);
            json_array_extend(results, list);
            json_decref(list);
        }
        for (size_t j = 0; j < job->n_caches; j++)
            eval_score_deinit(&scores[j]);
        if (rc != TOOL_OK)
            return rc;
    }
    return speed_setting->n_depths ? measure_speed(job, out, speed_setting, speeds_json) : TOOL_OK;
}

/* Everything that can be wrong is found before the first token is fed. */
static int evaluate(eval_options *o)
{
    eval_setting settings[EVAL_SETTINGS_MAX];
    size_t n_settings;
    eval_job job = {.n_pieces = o->n_pieces, .has_stock_base = o->has_stock_base};
    eval_speed_setting speed;
    gguf_head *model = tool_alloc(1, sizeof(*model));
    char *plugin = NULL;
    json_t *results = json_array(), *speeds = json_array();

    int rc = make_settings(o, settings, &n_settings);
    if (rc == TOOL_OK)
        rc = make_speed_setting(o, &speed);
    if (rc == TOOL_OK && o->json)
        rc = output_file_check(o->json);
    if (rc == TOOL_OK)
        rc = gguf_head_read(o->model, model);
    if (rc == TOOL_OK)
        rc = add_caches(&job, o, model);
    bool needs_plugin = !o->has_stock_base;
    for (size_t i = 0; i < job.n_caches; i++)
        needs_plugin = needs_plugin || !job.caches[i].cache.stock_type;
    if (rc == TOOL_OK && needs_plugin) {
        plugin = plugin_file_find(o->plugin, 1);
        rc = plugin ? TOOL_OK : TOOL_FAILED;
    }
    if (rc == TOOL_OK)
        rc = host_open(&(host_options){.model_path = o->model,
                                       .plugin_path = plugin,
                                       .n_threads = o->n_threads,
                                       .is_verbose = o->is_verbose},
                       &job.h);
    uint32_t n_needed = rc == TOOL_OK ? eval_speed_tokens(&speed) : 0;
    for (size_t i = 0; i < n_settings; i++)
        n_needed =
            settings[i].n_ctx * o->n_pieces > n_needed ? settings[i].n_ctx * o->n_pieces : n_needed;
    if (rc == TOOL_OK)
        rc = read_texts(&job, o, n_needed);
    if (rc == TOOL_OK) {
        job.w = workers_create(o->n_threads);
        job.n_steps = (int)n_settings + (speed.n_depths ? 1 : 0);
        rc = measure(&job, o, settings, n_settings, &speed, results, speeds);
    }
    if (rc == TOOL_OK && o->json)
        rc = json_file_write(
            o->json, json_pack("{s:s, s:s, s:s, s:O, s:O}", "model", o->model, "base",
                               o->has_stock_base ? "llama.cpp f16" : "plugin f16", "scored",
                               "second half of each piece", "results", results, "speed", speeds));
    json_decref(results);
    json_decref(speeds);
    for (size_t i = 0; i < job.n_texts; i++)
        text_tokens_free(&job.texts[i]);
    free(job.texts);
    workers_destroy(job.w);
    host_close(job.h);
    free(plugin);
    free(model);
    return rc;
}

int cmd_eval(int argc, char **argv)
{
    eval_options o = {0};
    int rc = parse(&o, argc, argv);
    if (rc == TOOL_OK && o.model) {
        set_defaults(&o);
        interrupt_install();
        rc = evaluate(&o);
    }
    tool_list_free(&o.plans);
    tool_list_free(&o.texts);
    tool_list_free(&o.caches);
    tool_list_free(&o.contexts);
    tool_list_free(&o.depths);
    tool_list_free(&o.speed_threads);
    tool_list_free(&o.ubatches);
    return rc;
}
