/* SPDX-License-Identifier: Apache-2.0 */
/* The `tqkv-bench` program: one layer's worth of work, ours and llama.cpp's in turn. */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "bench_layers.h"
#include "json_file.h"
#include "output_file.h"

enum { DEPTH_MAX = 1 << 20, PREFILL_TOKENS = 512 };

static void print_help(void)
{
    printf(
        "Usage: tqkv-bench attention|prefill|encode [options]\n\n"
        "Times one layer with random weights, by default of the shape of Llama 3 8B: our cache, "
        "and\n"
        "llama.cpp's caches under its flash attention where this build has llama.cpp.\n\n"
        "  attention  one token asks. Layers with their own K and V take turns, as many as make\n"
        "             64 MiB of 8x codes but at most 32, so that all of it comes from memory\n"
        "  prefill    512 tokens ask, each seeing those before it\n"
        "  encode     rows to codes, on one core\n\n"
        "  -n, --tokens LIST    tokens in the cache before those that ask, such as 512,8192\n"
        "                       (default: 512,2048,8192,32768; prefill can also do 0)\n"
        "  -t, --threads LIST   numbers of threads, such as 1,2 (default: all processors)\n"
        "      --heads Q/KV     query heads and KV heads (default: 32/8)\n"
        "      --dim N          channels of a head, a multiple of 16 (default: 128)\n"
        "      --profile LIST   sizes of ours (default: 5x,8x)\n"
        "      --plan FILE      time this plan instead; heads and channels are those of its layer\n"
        "      --layer N        of the plan (default: 0)\n"
        "      --cache LIST     llama.cpp's caches, or none (default: f16,q8_0,q4_0)\n"
        "      --rounds N       rounds in which all take turns (default: 9)\n"
        "      --json FILE      write the results as JSON; - is stdout\n\n"
        "Ratios are of medians; quartiles are those of the rounds. Bits count everything held. The "
        "error\n"
        "is that of the output relative to llama.cpp's f16, on random rows.\n");
}

static int parse_counts(const char *what, const char *text, uint32_t least, uint32_t most,
                        uint32_t *counts, size_t n_max, size_t *n)
{
    tool_list list = {0};
    int rc = tool_list_add(&list, what, text);
    if (rc == TOOL_OK && list.n > n_max)
        rc = tool_usage("%s: more than %zu numbers", what, n_max);
    for (size_t i = 0; i < list.n && rc == TOOL_OK; i++)
        rc = tool_parse_count(what, list.items[i], least, most, &counts[i]);
    *n = list.n;
    tool_list_free(&list);
    return rc;
}

static int parse_heads(const char *text, tqkv_plan_layer *shape)
{
    char *end;
    const unsigned long n_heads = strtoul(text, &end, 10);
    const unsigned long n_kv_heads = *end == '/' ? strtoul(end + 1, &end, 10) : 0;
    if (*end || n_heads < 1 || n_heads > 1024 || n_kv_heads < 1 || n_heads % n_kv_heads)
        return tool_usage("--heads: '%s' is not like 32/8", text);
    shape->n_heads = (uint32_t)n_heads;
    shape->n_kv_heads = (uint32_t)n_kv_heads;
    return TOOL_OK;
}

static int parse_option(bench_options *o, int option, char **argv)
{
    switch (option) {
    case 'n':
        return parse_counts("--tokens", optarg, 0, DEPTH_MAX, o->depths, 16, &o->n_depths);
    case 't':
        return parse_counts("--threads", optarg, 1, TOOL_THREADS_MAX, o->n_threads, 8,
                            &o->n_thread_counts);
    case 'h':
        return parse_heads(optarg, &o->shape);
    case 'd': {
        const int rc = tool_parse_count("--dim", optarg, 16, 1024, &o->shape.k_dim);
        o->shape.v_dim = o->shape.k_dim;
        return rc == TOOL_OK && o->shape.k_dim % 16
                   ? tool_usage("--dim: %s is no multiple of 16", optarg)
                   : rc;
    }
    case 'p':
        return tool_list_add(&o->profiles, "--profile", optarg);
    case 'f':
        o->plan = optarg;
        return TOOL_OK;
    case 'l':
        return tool_parse_count("--layer", optarg, 0, 1 << 16, &o->plan_layer);
    case 'c':
        return tool_list_add(&o->caches, "--cache", optarg);
    case 'r':
        return tool_parse_count("--rounds", optarg, 1, IN_TURN_ROUNDS_MAX, &o->n_rounds);
    case 'j':
        o->json = optarg;
        return TOOL_OK;
    default:
        return tool_bad_option(argv, option);
    }
}

static int parse(bench_options *o, int argc, char **argv)
{
    static const struct option options[] = {{"tokens", required_argument, NULL, 'n'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"heads", required_argument, NULL, 'h'},
                                            {"dim", required_argument, NULL, 'd'},
                                            {"profile", required_argument, NULL, 'p'},
                                            {"plan", required_argument, NULL, 'f'},
                                            {"layer", required_argument, NULL, 'l'},
                                            {"cache", required_argument, NULL, 'c'},
                                            {"rounds", required_argument, NULL, 'r'},
                                            {"json", required_argument, NULL, 'j'},
                                            {0}};
    int option;
    while ((option = getopt_long(argc, argv, ":n:t:", options, NULL)) != -1) {
        const int rc = parse_option(o, option, argv);
        if (rc != TOOL_OK)
            return rc;
    }
    return optind < argc ? tool_usage("what is '%s'?", argv[optind]) : TOOL_OK;
}

static void set_defaults(bench_options *o)
{
    static const uint32_t depths[] = {512, 2048, 8192, 32768};
    static const char *const caches[] = {"f16", "q8_0", "q4_0"};
    if (!o->n_depths) {
        memcpy(o->depths, depths, sizeof(depths));
        o->n_depths = sizeof(depths) / sizeof(depths[0]);
    }
    if (!o->n_thread_counts)
        o->n_threads[o->n_thread_counts++] = tool_n_processors();
    if (!o->profiles.n) {
        tool_list_push(&o->profiles, "5x");
        tool_list_push(&o->profiles, "8x");
    }
    for (size_t i = 0; i < 3 && !o->caches.n && stock_layers_exist(); i++)
        for (size_t j = 0; j < 3; j++)
            tool_list_push(&o->caches, caches[j]);
    if (o->caches.n == 1 && strcmp(o->caches.items[0], "none") == 0)
        tool_list_free(&o->caches);
}

/* The shape comes from the plan where one is given. */
static int load_plan(bench_options *o, bench_plan *out)
{
    tqkv_plan_info info;
    const tqkv_status status = tqkv_plan_load(o->plan, tool_logger(), &out->plan);
    if (status)
        return tool_error("plan %s: %s", o->plan, tqkv_status_text(status));
    out->layer = o->plan_layer;
    if (tqkv_plan_get_layer(out->plan, out->layer, &o->shape))
        return tool_usage("--layer: plan %s has no layer %u", o->plan, out->layer);
    tqkv_plan_get_info(out->plan, &info);
    snprintf(out->label, sizeof(out->label), "ours %s", info.profile);
    return TOOL_OK;
}

static int make_plans(const bench_options *o, const random_layer *layer, bench_plan *plans,
                      size_t *n)
{
    if (o->profiles.n > BENCH_PLANS_MAX)
        return tool_usage("--profile: more than %d", BENCH_PLANS_MAX);
    for (size_t i = 0; i < o->profiles.n; i++) {
        const int rc = random_layer_plan(layer, o->profiles.items[i], &plans[i].plan);
        if (rc != TOOL_OK)
            return rc;
        snprintf(plans[i].label, sizeof(plans[i].label), "ours %s", o->profiles.items[i]);
        ++*n;
    }
    return TOOL_OK;
}

static int run(bench_options *o, const char *mode)
{
    bench_plan plans[BENCH_PLANS_MAX] = {0};
    size_t n_plans = 0;
    random_layer layer = {0};
    json_t *rows = json_array();
    o->out = o->json && strcmp(o->json, "-") == 0 ? stderr : stdout;
    int rc = o->json ? output_file_check(o->json) : TOOL_OK;
    if (rc == TOOL_OK && o->plan) {
        rc = load_plan(o, &plans[0]);
        n_plans = 1;
    }
    if (rc == TOOL_OK)
        random_layer_init(&layer, &o->shape);
    if (rc == TOOL_OK && !o->plan)
        rc = make_plans(o, &layer, plans, &n_plans);
    if (rc == TOOL_OK)
        rc = strcmp(mode, "encode") == 0
                 ? bench_encode(o, &layer, plans, n_plans, rows)
                 : bench_attention(o, &layer, plans, n_plans,
                                   strcmp(mode, "prefill") == 0 ? PREFILL_TOKENS : 1, rows);
    if (rc == TOOL_OK && o->json)
        rc = json_file_write(
            o->json, json_pack("{s:o, s:O}", "machine", bench_machine_json(), "rows", rows));
    json_decref(rows);
    random_layer_deinit(&layer);
    for (size_t i = 0; i < n_plans; i++)
        tqkv_plan_destroy(plans[i].plan);
    return rc;
}

static bool is_mode(const char *word)
{
    return strcmp(word, "attention") == 0 || strcmp(word, "prefill") == 0 ||
           strcmp(word, "encode") == 0;
}

int main(int argc, char **argv)
{
    bench_options o = {.n_rounds = 9,
                       .shape = {.n_heads = 32, .n_kv_heads = 8, .k_dim = 128, .v_dim = 128}};
    tool_set_program("tqkv-bench");
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_help();
            return TOOL_OK;
        }
    }
    if (argc < 2 || !is_mode(argv[1]))
        return tool_usage("attention, prefill or encode?");
    tool_set_command(argv[1]);
    int rc = parse(&o, argc - 1, argv + 1);
    if (rc == TOOL_OK) {
        set_defaults(&o);
        rc = run(&o, argv[1]);
    }
    tool_list_free(&o.profiles);
    tool_list_free(&o.caches);
    return rc;
}
