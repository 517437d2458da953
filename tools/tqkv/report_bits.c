/* SPDX-License-Identifier: Apache-2.0 */
/* What a plan is, and where its bits go. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "page.h"
#include "plan_view.h"
#include "report.h"
#include "tool.h"

/* Units of one side that are drawn one by one; a wider model shows the mean of each head. */
#define MAP_UNITS_MAX 64

#define MAP_LEFT 58.0
#define MAP_TOP 42.0
#define SIDE_GAP 34.0
#define HEAD_GAP 4.0
#define CELL_WIDTH_MAX 36.0
#define TALL_LAYERS 40 /* more layers than this are drawn in lower rows */
#define HEAD_LABEL_WIDTH 44.0

#define BITS_PLAIN 16
#define COLOR_CHARS 8

/* ---- head ---- */

static void print_fact(FILE *out, const char *value, const char *what)
{
    fputs("<div><b>", out);
    page_text(out, value);
    fprintf(out, "</b><span>%s</span></div>\n", what);
}

static double tier_bits(const tqkv_plan *plan, const tqkv_plan_info *info, uint32_t tier)
{
    double bits = 0, values = 0;
    for (uint32_t i = 0; i < info->n_layers; i++) {
        tqkv_plan_layer layer;
        if (tqkv_plan_get_layer(plan, i, &layer) != TQKV_OK)
            continue;
        bits += 8.0 * layer.token_bytes[tier];
        values += (double)layer.n_kv_heads * (layer.k_dim + layer.v_dim);
    }
    return values > 0 ? bits / values : 0;
}

/* "The first 4 tokens and the newest 32 take 8.1 bits per value, the next 224 6.1, ..." */
static void print_tiers(FILE *out, const tqkv_plan *plan, const tqkv_plan_info *info)
{
    tqkv_plan_layer layer;
    plan_view_long_layer(plan, &layer);
    fputs("<p>", out);
    if (info->n_tiers > 1)
        fprintf(out, "The first %u tokens and the newest %u take %.1f bits per value, ",
                info->n_sinks, layer.tier_tokens[0], tier_bits(plan, info, 0));
    for (uint32_t i = 1; i + 1 < info->n_tiers; i++)
        fprintf(out, "the next %u %.1f, ", layer.tier_tokens[i], tier_bits(plan, info, i));
    fprintf(out, "%s %.1f%s.</p>\n", info->n_tiers > 1 ? "all older ones" : "All tokens take",
            tier_bits(plan, info, info->n_tiers - 1), info->n_tiers > 1 ? "" : " bits per value");
}

void report_head(FILE *out, const tqkv_plan *plan)
{
    char text[64], fingerprint[PLAN_VIEW_FINGERPRINT_CHARS];
    tqkv_plan_info info;
    tqkv_plan_get_info(plan, &info);
    plan_view_fingerprint(&info, fingerprint);
    fputs("<header>\n<h1>", out);
    page_text(out, *info.model ? info.model : "A model without a name");
    fputs("</h1>\n<p class=\"soft\">KV cache plan, profile ", out);
    page_text(out, info.profile);
    if (*info.arch) {
        fputs(", architecture ", out);
        page_text(out, info.arch);
    }
    fprintf(out, ", %u layers, fingerprint <code>%.12s</code></p>\n<div class=\"facts\">\n",
            info.n_layers, fingerprint);
    snprintf(text, sizeof(text), "%.2f", info.bits_total);
    print_fact(out, text, "bits per value, everything counted");
    snprintf(text, sizeof(text), "%.2fx", info.bits_total > 0 ? 16 / info.bits_total : 0.0);
    print_fact(out, text, "smaller than f16");
    snprintf(text, sizeof(text), "%u", info.context);
    print_fact(out, text, "tokens of context, where both are counted");
    fputs("</div>\n", out);
    print_tiers(out, plan, &info);
    fputs("</header>\n", out);
}

/* ---- bit map ---- */

typedef struct bit_map {
    FILE *out;
    const tqkv_plan *plan;
    uint32_t n_layers, tier;
    bool has_units;
    uint32_t columns[2]; /* of the widest layer, by side */
    uint32_t n_heads;    /* of the widest layer */
    double cell_width, cell_height;
} bit_map;

static uint32_t side_units(const tqkv_plan_layer *layer, size_t side)
{
    return (side == TQKV_SIDE_K ? layer->k_dim : layer->v_dim) / TQKV_UNIT_CHANNELS;
}

static uint32_t head_columns(const bit_map *map, const tqkv_plan_layer *layer, size_t side)
{
    return map->has_units ? side_units(layer, side) : 1;
}

/* Largest number of columns of a layer, by side. */
static void count_columns(bit_map *map)
{
    tqkv_plan_layer layer;
    map->columns[0] = map->columns[1] = map->n_heads = 0;
    for (uint32_t i = 0; tqkv_plan_get_layer(map->plan, i, &layer) == TQKV_OK; i++) {
        for (size_t side = 0; side < 2; side++) {
            const uint32_t n = layer.n_kv_heads * head_columns(map, &layer, side);
            map->columns[side] = n > map->columns[side] ? n : map->columns[side];
        }
        map->n_heads = layer.n_kv_heads > map->n_heads ? layer.n_kv_heads : map->n_heads;
    }
}

static double side_width(const bit_map *map, size_t side)
{
    return map->columns[side] * map->cell_width + map->n_heads * HEAD_GAP;
}

static double side_left(const bit_map *map, size_t side)
{
    return side == 0 ? MAP_LEFT : MAP_LEFT + side_width(map, 0) + SIDE_GAP;
}

static bit_map make_map(FILE *out, const tqkv_plan *plan)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(plan, &info);
    bit_map map = {.out = out,
                   .plan = plan,
                   .n_layers = info.n_layers,
                   .tier = info.n_tiers - 1,
                   .has_units = true,
                   .cell_height = info.n_layers > TALL_LAYERS ? 10 : 15};
    count_columns(&map);
    if (map.columns[0] > MAP_UNITS_MAX || map.columns[1] > MAP_UNITS_MAX) {
        map.has_units = false;
        count_columns(&map);
    }
    const double room = SVG_WIDTH - MAP_LEFT - SIDE_GAP - 2 * HEAD_GAP * map.n_heads;
    const uint32_t n = map.columns[0] + map.columns[1];
    map.cell_width = n ? fmin(room / n, CELL_WIDTH_MAX) : CELL_WIDTH_MAX;
    return map;
}

/* A mean is coloured between its neighbours; NULL: no bits at all. */
static const char *width_color(double bits, char out[COLOR_CHARS])
{
    static const struct {
        double bits;
        uint8_t rgb[3];
    } stops[] = {{1, {0x4a, 0x2f, 0x80}}, {2, {0x3d, 0x55, 0x90}}, {3, {0x2c, 0x76, 0x90}},
                 {4, {0x21, 0x94, 0x8c}}, {5, {0x2b, 0xb0, 0x7f}}, {6, {0x66, 0xcc, 0x60}},
                 {8, {0xf6, 0xdf, 0x2a}}, {16, {0xe8, 0x6a, 0x33}}};
    const size_t n = sizeof(stops) / sizeof(stops[0]);
    size_t i = 0;
    if (bits <= 0)
        return NULL;
    while (i + 2 < n && bits > stops[i + 1].bits)
        i++;
    double share = (bits - stops[i].bits) / (stops[i + 1].bits - stops[i].bits);
    share = fmin(fmax(share, 0), 1);
    uint8_t rgb[3];
    for (size_t j = 0; j < 3; j++)
        rgb[j] = (uint8_t)lround(stops[i].rgb[j] * (1 - share) + stops[i + 1].rgb[j] * share);
    snprintf(out, COLOR_CHARS, "#%02x%02x%02x", rgb[0], rgb[1], rgb[2]);
    return out;
}

static void draw_cell(const bit_map *map, double x, uint32_t layer, double bits, const char *title)
{
    char color[COLOR_CHARS];
    const char *fill = width_color(bits, color);
    svg_rect_draw(map->out, &(svg_rect){.x = x,
                                        .y = MAP_TOP + layer * map->cell_height,
                                        .width = map->cell_width - 1,
                                        .height = map->cell_height - 1,
                                        .css = fill ? "cell" : "cell none",
                                        .fill = fill,
                                        .title = title});
}

static void draw_units(const bit_map *map, uint32_t layer, uint32_t head, tqkv_side side,
                       uint32_t n_units, double x)
{
    uint8_t bits[TQKV_UNITS_MAX];
    char title[96];
    if (tqkv_plan_get_bits(map->plan, layer, head, side, map->tier, bits) != TQKV_OK)
        return;
    for (uint32_t i = 0; i < n_units; i++) {
        snprintf(title, sizeof(title), "layer %u, %s head %u, channels %u-%u: %u bits%s", layer,
                 report_side_name(side), head, i * TQKV_UNIT_CHANNELS,
                 (i + 1) * TQKV_UNIT_CHANNELS - 1, bits[i], bits[i] == BITS_PLAIN ? " (f16)" : "");
        draw_cell(map, x + i * map->cell_width, layer, bits[i], title);
    }
}

static void draw_head_mean(const bit_map *map, uint32_t layer, uint32_t head, tqkv_side side,
                           double x)
{
    char title[96];
    const double bits = plan_view_head_bits(map->plan, layer, head, side, map->tier);
    snprintf(title, sizeof(title), "layer %u, %s head %u: %.2f bits", layer, report_side_name(side),
             head, bits);
    draw_cell(map, x, layer, bits, title);
}

static void draw_layer(const bit_map *map, uint32_t i)
{
    const uint32_t step = map->n_layers > TALL_LAYERS ? 2 : 1;
    tqkv_plan_layer layer;
    char text[48];
    if (tqkv_plan_get_layer(map->plan, i, &layer) != TQKV_OK)
        return;
    snprintf(text, sizeof(text), "%u%s%s", i, layer.window ? " w" : "",
             layer.n_kv_heads ? "" : " none");
    if (i % step == 0)
        svg_text(map->out, MAP_LEFT - 8, MAP_TOP + i * map->cell_height + map->cell_height - 4,
                 SVG_END, NULL, text);
    for (size_t side = 0; side < 2; side++) {
        const uint32_t n_units = side_units(&layer, side);
        const double head_width = head_columns(map, &layer, side) * map->cell_width + HEAD_GAP;
        for (uint32_t g = 0; g < layer.n_kv_heads; g++) {
            const double x = side_left(map, side) + g * head_width;
            if (map->has_units)
                draw_units(map, i, g, (tqkv_side)side, n_units, x);
            else
                draw_head_mean(map, i, g, (tqkv_side)side, x);
        }
    }
}

static void draw_map_head(const bit_map *map)
{
    for (size_t side = 0; side < 2; side++) {
        const double left = side_left(map, side);
        const double head_width = map->n_heads ? side_width(map, side) / map->n_heads : 0;
        svg_text(map->out, left, 14, SVG_START, "strong", report_side_name(side));
        for (uint32_t g = 0; g < map->n_heads; g++) {
            char text[32];
            snprintf(text, sizeof(text), head_width > HEAD_LABEL_WIDTH ? "head %u" : "%u", g);
            svg_text(map->out, left + g * head_width, MAP_TOP - 8, SVG_START, NULL, text);
        }
    }
    svg_text(map->out, MAP_LEFT - 8, MAP_TOP - 8, SVG_END, NULL, "layer");
}

static void print_width_legend(FILE *out)
{
    static const uint8_t widths[] = {0, 1, 2, 3, 4, 5, 6, 8, BITS_PLAIN};
    char color[COLOR_CHARS];
    fputs("<div class=\"legend\"><span>bits per channel:</span>", out);
    for (size_t i = 0; i < sizeof(widths); i++) {
        const char *fill = width_color(widths[i], color);
        fprintf(out, "<span><i style=\"--c: %s\"></i>%u%s</span>", fill ? fill : "var(--none)",
                widths[i], widths[i] == BITS_PLAIN ? " (f16)" : "");
    }
    fputs("</div>\n", out);
}

void report_bit_map(FILE *out, const tqkv_plan *plan)
{
    const bit_map map = make_map(out, plan);
    page_figure_begin(out, "Bit map",
                      map.has_units
                          ? "Bits of every 16 transformed channels of each KV head for the oldest "
                            "tokens, strongest channels first; w marks a sliding window."
                          : "Mean bits of each KV head for the oldest tokens; w marks a sliding "
                            "window.");
    print_width_legend(out);
    svg_begin(out, SVG_WIDTH, MAP_TOP + map.n_layers * map.cell_height + 6,
              "Bits by layer, head and channel");
    draw_map_head(&map);
    for (uint32_t i = 0; i < map.n_layers; i++)
        draw_layer(&map, i);
    svg_end(out);
    page_figure_end(out);
}

/* ---- bits by layer ---- */

void report_layer_bits(FILE *out, const tqkv_plan *plan)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(plan, &info);
    svg_chart chart = svg_chart_empty(out, 250);
    chart.x = report_layer_axis(info.n_layers);
    chart.y = svg_axis_empty("bits per value", SVG_LINEAR);
    svg_axis_cover(&chart.y, 0);
    for (uint32_t i = 0; i < info.n_layers; i++) {
        for (size_t side = 0; side < 2; side++)
            svg_axis_cover(&chart.y,
                           plan_view_side_bits(plan, i, (tqkv_side)side, info.n_tiers - 1));
    }
    svg_axis_round(&chart.y);
    page_figure_begin(out, "Bits by layer",
                      "Which layers get the bits of the oldest tokens, scales counted.");
    report_side_legend(out);
    svg_chart_begin(&chart, "Bits per value by layer");
    report_layer_ticks(&chart, info.n_layers);
    for (uint32_t i = 0; i < info.n_layers; i++) {
        for (size_t side = 0; side < 2; side++) {
            char title[64];
            const double bits = plan_view_side_bits(plan, i, (tqkv_side)side, info.n_tiers - 1),
                         first = i + (side ? 0.02 : -0.38);
            snprintf(title, sizeof(title), "layer %u, %s: %.2f bits", i, report_side_name(side),
                     bits);
            svg_chart_bar(&chart, first, first + 0.36, bits, report_side_css(side), title);
        }
    }
    svg_chart_end(&chart);
    page_figure_end(out);
}
