/* SPDX-License-Identifier: Apache-2.0 */
/* `tqkv inspect`: what a plan stores, as a map of bits and a table of bytes. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "json_file.h"
#include "plan_view.h"
#include "tool.h"

/* Heads of one side that a line of the map shows one by one; more are shown as means of groups. */
#define MAP_CELLS 16

static const uint32_t contexts[] = {2048, 8192, 32768};
#define N_CONTEXTS (sizeof(contexts) / sizeof(contexts[0]))

static void print_help(void)
{
    printf(
        "Usage: tqkv inspect [--json] PLAN.tqkv\n\n"
        "Shows what a plan was made for and how it spends its bits: mean bits per value of every\n"
        "layer, side and head for the oldest tokens, bytes per token by age, and the whole cache\n"
        "at several context lengths. Scales, tables and padding are counted everywhere.\n\n"
        "      --tier N   show the bits of age tier N, 0 is the youngest (default: the oldest)\n"
        "      --json     print JSON\n");
}

/* A cell of the map. Colours go from blue (few bits) over green and yellow to red (many). */
static void print_cell(double bits, bool has_color)
{
    static const uint8_t colors[] = {17, 19, 25, 30, 35, 70, 142, 172, 160};
    if (!has_color) {
        printf(" %4.1f", bits);
        return;
    }
    size_t i = (size_t)(bits < 0 ? 0 : bits + 0.5);
    if (i >= sizeof(colors))
        i = sizeof(colors) - 1;
    printf("\033[48;5;%um\033[97m%5.1f\033[0m", colors[i], bits);
}

static void print_side(const tqkv_plan *plan, uint32_t layer, uint32_t n_heads, tqkv_side side,
                       uint32_t tier, bool has_color)
{
    const uint32_t n_cells = n_heads < MAP_CELLS ? n_heads : MAP_CELLS;
    for (uint32_t i = 0; i < n_cells; i++) {
        const uint32_t first = i * n_heads / n_cells, end = (i + 1) * n_heads / n_cells;
        double sum = 0;
        for (uint32_t g = first; g < end; g++)
            sum += plan_view_head_bits(plan, layer, g, side, tier);
        print_cell(sum / (end - first), has_color);
    }
}

static void print_map(const tqkv_plan *plan, const tqkv_plan_info *info, uint32_t tier)
{
    const bool has_color = tool_has_color(stdout);
    uint32_t n_cells_max = 1;
    for (uint32_t i = 0; i < info->n_layers; i++) {
        tqkv_plan_layer layer;
        if (tqkv_plan_get_layer(plan, i, &layer) == TQKV_OK && layer.n_kv_heads > n_cells_max)
            n_cells_max = layer.n_kv_heads;
    }
    const bool has_groups = n_cells_max > MAP_CELLS;
    n_cells_max = has_groups ? MAP_CELLS : n_cells_max;

    printf(
        "\nBits per value in tier %u, one column per %s; bytes per token by tier, youngest first\n",
        tier, has_groups ? "group of KV heads" : "KV head");
    printf("layer  %-*s  %-*s  bytes\n", (int)n_cells_max * 5, "K", (int)n_cells_max * 5, "V");
    for (uint32_t i = 0; i < info->n_layers; i++) {
        tqkv_plan_layer layer;
        if (tqkv_plan_get_layer(plan, i, &layer) != TQKV_OK)
            continue;
        printf("%5u  ", i);
        print_side(plan, i, layer.n_kv_heads, TQKV_SIDE_K, tier, has_color);
        printf("  ");
        print_side(plan, i, layer.n_kv_heads, TQKV_SIDE_V, tier, has_color);
        printf(" ");
        for (uint32_t j = 0; j < info->n_tiers; j++)
            printf(" %5u", layer.token_bytes[j]);
        if (layer.window)
            printf("  window %u", layer.window);
        putchar('\n');
    }
}

static void print_head(const char *path, const tqkv_plan *plan, const tqkv_plan_info *info)
{
    char fingerprint[PLAN_VIEW_FINGERPRINT_CHARS], size[TOOL_SIZE_CHARS];
    struct stat file = {0};
    tqkv_plan_layer layer;
    stat(path, &file);
    plan_view_fingerprint(info, fingerprint);
    printf("plan         %s (%s)\n", path, tool_size_text((double)file.st_size, size));
    printf("model        %s, architecture %s, %u layers\n", info->model, info->arch,
           info->n_layers);
    printf("profile      %s: %.2f bits per value at %u tokens, everything counted (%.1fx smaller "
           "than f16)\n",
           info->profile, info->bits_total, info->context,
           info->bits_total > 0 ? 16 / info->bits_total : 0.0);
    printf("fingerprint  %s\n", fingerprint);
    plan_view_long_layer(plan, &layer);
    printf("tiers        first %u tokens and newest %u: tier 0", info->n_sinks,
           layer.tier_tokens[0]);
    for (uint32_t j = 1; j + 1 < info->n_tiers; j++)
        printf("; next %u: tier %u", layer.tier_tokens[j], j);
    if (info->n_tiers > 1)
        printf("; older: tier %u", info->n_tiers - 1);
    printf("\nframes       %u tokens share a rotation of K\n", info->frame_tokens);
}

static int print_totals(const tqkv_plan *plan)
{
    printf("\n%9s  %10s  %10s  %8s  %s\n", "tokens", "held", "f16", "bits", "ratio");
    for (size_t i = 0; i < N_CONTEXTS; i++) {
        double held, f16;
        char held_text[TOOL_SIZE_CHARS], f16_text[TOOL_SIZE_CHARS];
        const int rc = plan_view_bytes(plan, contexts[i], &held, &f16);
        if (rc != TOOL_OK)
            return rc;
        printf("%9u  %10s  %10s  %8.3f  %.2fx\n", contexts[i], tool_size_text(held, held_text),
               tool_size_text(f16, f16_text), 16 * held / f16, f16 / held);
    }
    return TOOL_OK;
}

static json_t *side_json(const tqkv_plan *plan, uint32_t layer, uint32_t n_heads, tqkv_side side,
                         uint32_t n_tiers)
{
    json_t *tiers = json_array();
    for (uint32_t j = 0; j < n_tiers; j++) {
        json_t *heads = json_array();
        for (uint32_t g = 0; g < n_heads; g++)
            json_array_append_new(heads,
                                  json_real_short(plan_view_head_bits(plan, layer, g, side, j), 5));
        json_array_append_new(tiers, heads);
    }
    return tiers;
}

static json_t *layer_json(const tqkv_plan *plan, uint32_t i, uint32_t n_tiers)
{
    tqkv_plan_layer layer;
    if (tqkv_plan_get_layer(plan, i, &layer) != TQKV_OK)
        return json_null();
    json_t *token_bytes = json_array(), *tier_tokens = json_array();
    for (uint32_t j = 0; j < n_tiers; j++) {
        json_array_append_new(token_bytes, json_integer(layer.token_bytes[j]));
        json_array_append_new(tier_tokens, json_integer(layer.tier_tokens[j]));
    }
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:b, s:i, s:o, s:o, s:o, s:o}", "layer", (int)i,
                     "n_heads", (int)layer.n_heads, "n_kv_heads", (int)layer.n_kv_heads, "k_dim",
                     (int)layer.k_dim, "v_dim", (int)layer.v_dim, "is_latent",
                     (int)layer.is_latent, "window", (int)layer.window, "tier_tokens", tier_tokens,
                     "token_bytes", token_bytes, "k_bits",
                     side_json(plan, i, layer.n_kv_heads, TQKV_SIDE_K, n_tiers), "v_bits",
                     side_json(plan, i, layer.n_kv_heads, TQKV_SIDE_V, n_tiers));
}

static int print_json(const tqkv_plan *plan, const tqkv_plan_info *info)
{
    char fingerprint[PLAN_VIEW_FINGERPRINT_CHARS];
    plan_view_fingerprint(info, fingerprint);
    json_t *layers = json_array(), *totals = json_array();
    for (uint32_t i = 0; i < info->n_layers; i++)
        json_array_append_new(layers, layer_json(plan, i, info->n_tiers));
    for (size_t i = 0; i < N_CONTEXTS; i++) {
        double held, f16;
        const int rc = plan_view_bytes(plan, contexts[i], &held, &f16);
        if (rc != TOOL_OK)
            return rc;
        json_array_append_new(totals, json_pack("{s:i, s:o, s:o, s:o}", "tokens", (int)contexts[i],
                                                "held_bytes", json_integer((json_int_t)held),
                                                "f16_bytes", json_integer((json_int_t)f16),
                                                "bits_total", json_real_short(16 * held / f16, 6)));
    }
    return json_file_write(
        "-", json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:o, s:o, s:o}", "model",
                       info->model, "arch", info->arch, "profile", info->profile, "fingerprint",
                       fingerprint, "n_layers", (int)info->n_layers, "n_tiers", (int)info->n_tiers,
                       "n_sinks", (int)info->n_sinks, "frame_tokens", (int)info->frame_tokens,
                       "context", (int)info->context, "bits_total",
                       json_real_short(info->bits_total, 6), "totals", totals, "layers", layers));
}

static int inspect(const char *path, int64_t tier, bool is_json)
{
    tqkv_plan *plan;
    tqkv_plan_info info;
    int rc = plan_view_load(path, &plan);
    if (rc != TOOL_OK)
        return rc;
    tqkv_plan_get_info(plan, &info);
    if (tier >= (int64_t)info.n_tiers) {
        rc = tool_error("--tier %lld: the plan has %u tiers", (long long)tier, info.n_tiers);
    } else if (is_json) {
        rc = print_json(plan, &info);
    } else {
        print_head(path, plan, &info);
        print_map(plan, &info, tier < 0 ? info.n_tiers - 1 : (uint32_t)tier);
        rc = print_totals(plan);
    }
    tqkv_plan_destroy(plan);
    return rc;
}

int cmd_inspect(int argc, char **argv)
{
    enum { OPT_HELP = 'h', OPT_JSON = 256, OPT_TIER };
    static const struct option options[] = {{"help", no_argument, NULL, OPT_HELP},
                                            {"json", no_argument, NULL, OPT_JSON},
                                            {"tier", required_argument, NULL, OPT_TIER},
                                            {0}};
    bool is_json = false;
    int64_t tier = -1;
    uint32_t number;
    int option;
    while ((option = getopt_long(argc, argv, ":h", options, NULL)) != -1) {
        switch (option) {
        case OPT_HELP:
            print_help();
            return TOOL_OK;
        case OPT_JSON:
            is_json = true;
            break;
        case OPT_TIER:
            if (tool_parse_count("--tier", optarg, 0, TQKV_TIERS_MAX - 1, &number) != TOOL_OK)
                return TOOL_USAGE;
            tier = number;
            break;
        default:
            return tool_bad_option(argv, option);
        }
    }
    if (optind + 1 != argc)
        return tool_usage(optind == argc ? "which plan?" : "one plan at a time");
    return inspect(argv[optind], tier, is_json);
}
