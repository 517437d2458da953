/* SPDX-License-Identifier: Apache-2.0 */
/* Sensitivity, spectrum and memory as curves. */
#include <math.h>
#include <stdlib.h>

#include "page.h"
#include "plan_view.h"
#include "report.h"
#include "spread.h"
#include "tool.h"

#define LAYER_TICKS_MAX 40
#define FEWER_TICKS 5
#define UNIT_TICKS_MAX 17

svg_axis report_layer_axis(uint32_t n_layers)
{
    svg_axis axis = svg_axis_empty("layer", SVG_LINEAR);
    axis.least = -0.5;
    axis.most = n_layers - 0.5;
    axis.has_own_ticks = true;
    return axis;
}

void report_layer_ticks(const svg_chart *chart, uint32_t n_layers)
{
    const uint32_t step = n_layers > LAYER_TICKS_MAX ? FEWER_TICKS : 1;
    for (uint32_t i = 0; i < n_layers; i += step) {
        char text[SVG_TICK_CHARS];
        snprintf(text, sizeof(text), "%u", i);
        svg_text(chart->out, svg_chart_x(chart, i), chart->height - chart->bottom + 16, SVG_MIDDLE,
                 NULL, text);
    }
}

const char *report_side_name(size_t side)
{
    return side == TQKV_SIDE_K ? "K" : "V";
}

const char *report_side_css(size_t side)
{
    return side == TQKV_SIDE_K ? "k" : "v";
}

void report_side_legend(FILE *out)
{
    fputs("<div class=\"legend\">", out);
    for (size_t side = 0; side < 2; side++)
        fprintf(out, "<span><i class=\"%s\"></i>%s</span>", report_side_css(side),
                report_side_name(side));
    fputs("</div>\n", out);
}

svg_axis report_kl_axis(void)
{
    svg_axis axis = svg_axis_empty("KL divergence, mean (nats)", SVG_LOG);
    axis.floor = REPORT_KL_FLOOR;
    return axis;
}

/* ---- sensitivity ---- */

void report_sensitivity(FILE *out, const report_calibration *calibration)
{
    const uint32_t n = calibration->n_layers;
    double *layers = tool_alloc(n, sizeof(*layers));
    svg_chart chart = svg_chart_empty(out, 270);
    chart.x = report_layer_axis(n);
    chart.y = report_kl_axis();
    for (uint32_t i = 0; i < n; i++) {
        layers[i] = i;
        for (size_t side = 0; side < 2; side++)
            svg_axis_cover(&chart.y, calibration->kl[side][i]);
    }
    svg_axis_round(&chart.y);
    page_figure_begin(out, "Sensitivity",
                      "What the output loses when K or V of one layer alone is coded coarsely; "
                      "layers that lose more get more bits.");
    report_side_legend(out);
    svg_chart_begin(&chart, "Sensitivity by layer");
    report_layer_ticks(&chart, n);
    for (size_t side = 0; side < 2; side++) {
        svg_chart_line(&chart, layers, calibration->kl[side], n, report_side_css(side),
                       report_side_name(side));
        for (uint32_t i = 0; i < n; i++) {
            char title[64];
            snprintf(title, sizeof(title), "layer %u, %s: %.3g", i, report_side_name(side),
                     calibration->kl[side][i]);
            svg_chart_dot(&chart, i, calibration->kl[side][i], report_side_css(side), title);
        }
    }
    svg_chart_end(&chart);
    page_figure_end(out);
    free(layers);
}

/* ---- spectrum ---- */

typedef struct spectrum {
    double x[TQKV_UNITS_MAX], y[TQKV_UNITS_MAX];
    uint32_t n_units; /* 0: a layer without weights */
} spectrum;

static double unit_middle(uint32_t unit)
{
    return (unit + 0.5) * TQKV_UNIT_CHANNELS;
}

/* Mean of a layer's heads, each relative to the mean of its units. */
static void read_spectrum(const tqkv_plan *plan, uint32_t layer, tqkv_side side, spectrum *out)
{
    tqkv_plan_layer shape;
    float weights[TQKV_UNITS_MAX];
    *out = (spectrum){0};
    if (tqkv_plan_get_layer(plan, layer, &shape) != TQKV_OK)
        return;
    const uint32_t n = (side == TQKV_SIDE_K ? shape.k_dim : shape.v_dim) / TQKV_UNIT_CHANNELS;
    for (uint32_t g = 0; g < shape.n_kv_heads; g++) {
        double sum = 0;
        if (tqkv_plan_get_weights(plan, layer, g, side, weights) != TQKV_OK)
            continue;
        for (uint32_t i = 0; i < n; i++)
            sum += (double)weights[i] / n;
        for (uint32_t i = 0; i < n && sum > 0; i++)
            out->y[i] += (double)weights[i] / sum / shape.n_kv_heads;
        out->n_units = sum > 0 ? n : out->n_units;
    }
    for (uint32_t i = 0; i < out->n_units; i++)
        out->x[i] = unit_middle(i);
}

/* Unit by unit over the layers that have it. */
static void find_median(const spectrum *layers, uint32_t n_layers, spectrum *out)
{
    double *values = tool_alloc(n_layers, sizeof(*values));
    *out = (spectrum){0};
    for (uint32_t i = 0; i < TQKV_UNITS_MAX; i++) {
        size_t n = 0;
        for (uint32_t j = 0; j < n_layers; j++) {
            if (i < layers[j].n_units)
                values[n++] = layers[j].y[i];
        }
        if (!n)
            break;
        out->x[i] = unit_middle(i);
        out->y[i] = spread_of(values, n).median;
        out->n_units = i + 1;
    }
    free(values);
}

static void draw_spectra(svg_chart *chart, const spectrum *layers, uint32_t n_layers, size_t side)
{
    char css[32], title[64];
    spectrum median;
    snprintf(css, sizeof(css), "%s thin", report_side_css(side));
    for (uint32_t i = 0; i < n_layers; i++) {
        snprintf(title, sizeof(title), "layer %u, %s", i, report_side_name(side));
        svg_chart_line(chart, layers[i].x, layers[i].y, layers[i].n_units, css, title);
    }
    find_median(layers, n_layers, &median);
    snprintf(css, sizeof(css), "%s thick", report_side_css(side));
    snprintf(title, sizeof(title), "median of %s", report_side_name(side));
    svg_chart_line(chart, median.x, median.y, median.n_units, css, title);
    if (median.n_units)
        svg_chart_label(chart, median.x[median.n_units - 1], median.y[median.n_units - 1], "strong",
                        title);
}

void report_spectrum(FILE *out, const tqkv_plan *plan)
{
    tqkv_plan_info info;
    spectrum *layers[2];
    uint32_t n_units_max = 1;
    tqkv_plan_get_info(plan, &info);
    svg_chart chart = svg_chart_empty(out, 300);
    chart.right = 110;
    chart.x = svg_axis_empty("transformed channel, strongest first", SVG_LINEAR);
    chart.y = svg_axis_empty("weight (1: mean of the head)", SVG_LOG);
    for (int side = 0; side < 2; side++) {
        layers[side] = tool_alloc(info.n_layers, sizeof(spectrum));
        for (uint32_t i = 0; i < info.n_layers; i++) {
            spectrum *s = &layers[side][i];
            read_spectrum(plan, i, (tqkv_side)side, s);
            n_units_max = s->n_units > n_units_max ? s->n_units : n_units_max;
            for (uint32_t j = 0; j < s->n_units; j++)
                svg_axis_cover(&chart.y, s->y[j]);
        }
    }
    chart.x.least = 0;
    chart.x.most = n_units_max * TQKV_UNIT_CHANNELS;
    chart.x.step = (n_units_max / UNIT_TICKS_MAX + 1) * TQKV_UNIT_CHANNELS;
    svg_axis_round(&chart.y);
    page_figure_begin(out, "Spectrum",
                      "How fast the weight of an error falls from unit to unit: the steeper, the "
                      "more bits can be saved. One line per layer, the median thick.");
    report_side_legend(out);
    svg_chart_begin(&chart, "Weight of each unit of 16 channels");
    for (size_t side = 0; side < 2; side++) {
        draw_spectra(&chart, layers[side], info.n_layers, side);
        free(layers[side]);
    }
    svg_chart_end(&chart);
    page_figure_end(out);
}

/* ---- memory ---- */

enum { CONTEXT_FIRST = 1024, N_CONTEXTS = 8 }; /* 1K to 128K */

typedef struct memory_line {
    const char *name, *css;
    double bits; /* per value; 0: the plan's, counted */
    double bytes[N_CONTEXTS];
} memory_line;

static const char *context_text(double tokens, char buffer[SVG_TICK_CHARS])
{
    snprintf(buffer, SVG_TICK_CHARS, "%gK", tokens / 1024);
    return buffer;
}

static const char *bytes_text(double bytes, char buffer[SVG_TICK_CHARS])
{
    return tool_size_text(bytes, buffer);
}

static void draw_memory_line(svg_chart *chart, const memory_line *line, const double *contexts)
{
    char css[64], title[96], size[TOOL_SIZE_CHARS];
    const double last = line->bytes[N_CONTEXTS - 1];
    snprintf(css, sizeof(css), "%s%s", line->css, line->bits > 0 ? "" : " thick");
    svg_chart_line(chart, contexts, line->bytes, N_CONTEXTS, css, line->name);
    for (size_t i = 0; i < N_CONTEXTS; i++) {
        snprintf(title, sizeof(title), "%s, %.0f tokens: %s", line->name, contexts[i],
                 tool_size_text(line->bytes[i], size));
        svg_chart_dot(chart, contexts[i], line->bytes[i], line->css, title);
    }
    snprintf(title, sizeof(title), "%s %s", line->name, tool_size_text(last, size));
    svg_chart_label(chart, contexts[N_CONTEXTS - 1], last, line->bits > 0 ? NULL : "strong", title);
}

int report_memory(FILE *out, const tqkv_plan *plan)
{
    memory_line lines[] = {{.name = "f16", .css = "plain", .bits = 16},
                           {.name = "q8_0", .css = "s0", .bits = 8.5},
                           {.name = "q4_0", .css = "s1", .bits = 4.5},
                           {.name = "this plan", .css = "plan"}};
    const size_t n_lines = sizeof(lines) / sizeof(lines[0]);
    double contexts[N_CONTEXTS];
    svg_chart chart = svg_chart_empty(out, 340);
    chart.left = 84;
    chart.right = 150;
    chart.x = svg_axis_empty("tokens of context", SVG_LOG2);
    chart.y = svg_axis_empty("memory of the cache", SVG_LOG2);
    chart.x.tick_text = context_text;
    chart.y.tick_text = bytes_text;
    for (size_t i = 0; i < N_CONTEXTS; i++) {
        const uint32_t n_tokens = (uint32_t)CONTEXT_FIRST << i;
        double held, f16;
        const int rc = plan_view_bytes(plan, n_tokens, &held, &f16);
        if (rc != TOOL_OK)
            return rc;
        contexts[i] = n_tokens;
        svg_axis_cover(&chart.x, n_tokens);
        for (size_t j = 0; j < n_lines; j++) {
            lines[j].bytes[i] = lines[j].bits > 0 ? f16 * lines[j].bits / 16 : held;
            svg_axis_cover(&chart.y, lines[j].bytes[i]);
        }
    }
    svg_axis_round(&chart.x);
    svg_axis_round(&chart.y);
    page_figure_begin(out, "Memory against context",
                      "What the cache of one sequence takes, everything counted: f16, llama.cpp's "
                      "q8_0 (8.5 bits) and q4_0 (4.5 bits), and this plan.");
    svg_chart_begin(&chart, "Memory of the cache against tokens of context");
    for (size_t j = 0; j < n_lines; j++)
        draw_memory_line(&chart, &lines[j], contexts);
    svg_chart_end(&chart);
    page_figure_end(out);
    return TOOL_OK;
}
