/* SPDX-License-Identifier: Apache-2.0 */
#include "svg.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "page.h"
#include "tool.h"

#define CHAR_WIDTH 6.3 /* of the labels' font, a little more than the mean */
#define LINE_HEIGHT 13.0
#define LOG_FLOOR 1e-12 /* of a log axis where the caller wants no other */
#define LABEL_GAP 9.0
#define TICKS_WANTED 6
#define DOUBLINGS_MAX 12       /* ticks of an axis in powers of two */
#define DECADES_WITH_STEPS 2.5 /* a log axis up to this long has ticks at 1, 2 and 5 */

void svg_begin(FILE *out, double width, double height, const char *label)
{
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" role=\"img\" "
            "aria-label=\"",
            width, height);
    page_text(out, label);
    fputs("\">\n", out);
}

void svg_end(FILE *out)
{
    fputs("</svg>\n", out);
}

static void print_title(FILE *out, const char *title)
{
    fputs("<title>", out);
    page_text(out, title);
    fputs("</title>", out);
}

void svg_text(FILE *out, double x, double y, svg_anchor anchor, const char *css, const char *text)
{
    static const char *const anchors[] = {"start", "middle", "end"};
    fprintf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"", x, y, anchors[anchor]);
    if (css)
        fprintf(out, " class=\"%s\"", css);
    fputc('>', out);
    page_text(out, text);
    fputs("</text>\n", out);
}

void svg_rect_draw(FILE *out, const svg_rect *rect)
{
    fprintf(out, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\"", rect->x, rect->y,
            rect->width, rect->height);
    if (rect->radius > 0)
        fprintf(out, " rx=\"%g\"", rect->radius);
    if (rect->css)
        fprintf(out, " class=\"%s\"", rect->css);
    if (rect->fill)
        fprintf(out, " fill=\"%s\"", rect->fill);
    fputc('>', out);
    if (rect->title)
        print_title(out, rect->title);
    fputs("</rect>\n", out);
}

/* ---- axes ---- */

svg_axis svg_axis_empty(const char *label, svg_scale scale)
{
    return (svg_axis){.label = label,
                      .scale = scale,
                      .least = INFINITY,
                      .most = -INFINITY,
                      .floor = scale == SVG_LINEAR ? -INFINITY : LOG_FLOOR};
}

void svg_axis_cover(svg_axis *axis, double value)
{
    if (!isfinite(value) || value < axis->floor)
        return;
    axis->least = fmin(axis->least, value);
    axis->most = fmax(axis->most, value);
}

/* The largest of 1, 2, 5 times a power of ten that is not above value. */
static double step_below(double value)
{
    const double power = pow(10, floor(log10(value) + 1e-9)), lead = value / power + 1e-9;
    return power * (lead >= 5 ? 5 : lead >= 2 ? 2 : 1);
}

/* The next one up: 1, 2, 5, 10, ... */
static double step_after(double step)
{
    return step_below(2.5 * step);
}

static void round_linear(svg_axis *axis)
{
    if (axis->most - axis->least <= 1e-6 * fabs(axis->most)) /* one value, up to rounding */
        axis->most = axis->least + fmax(1, fabs(axis->least));
    axis->step = step_below((axis->most - axis->least) / TICKS_WANTED);
    if ((axis->most - axis->least) / axis->step > 1.5 * TICKS_WANTED)
        axis->step = step_after(axis->step);
    axis->least = axis->step * floor(axis->least / axis->step + 1e-9);
    axis->most = axis->step * ceil(axis->most / axis->step - 1e-9);
}

static void round_log(svg_axis *axis)
{
    axis->least = step_below(axis->least);
    const double below = step_below(axis->most);
    axis->most = below < axis->most * (1 - 1e-9) ? step_after(below) : below;
    if (axis->least == axis->most)
        axis->most = step_after(axis->most);
    const double decades = log10(axis->most / axis->least);
    /* A factor; 0: at 1, 2 and 5. */
    axis->step = decades <= DECADES_WITH_STEPS ? 0 : pow(10, ceil(decades / (2 * TICKS_WANTED)));
}

static void round_log2(svg_axis *axis)
{
    axis->least = exp2(floor(log2(axis->least)));
    axis->most = exp2(ceil(log2(axis->most)));
    if (axis->least == axis->most)
        axis->most *= 2;
    axis->step = exp2(ceil(log2(axis->most / axis->least) / DOUBLINGS_MAX));
}

void svg_axis_round(svg_axis *axis)
{
    if (axis->least > axis->most) /* nothing to show */
        axis->least = axis->most = axis->scale == SVG_LINEAR ? 1 : axis->floor;
    if (axis->scale == SVG_LINEAR)
        round_linear(axis);
    else if (axis->scale == SVG_LOG)
        round_log(axis);
    else
        round_log2(axis);
}

/* 0 at the beginning of the axis, 1 at its end. */
static double share_of(const svg_axis *axis, double value)
{
    double share;
    if (axis->scale == SVG_LINEAR)
        share = (value - axis->least) / (axis->most - axis->least);
    else
        share = value > 0 ? log(value / axis->least) / log(axis->most / axis->least) : 0;
    return share < 0 ? 0 : share > 1 ? 1 : share;
}

static double first_tick(const svg_axis *axis)
{
    const bool has_whole_decades = axis->scale == SVG_LOG && axis->step > 0;
    return has_whole_decades ? pow(10, ceil(log10(axis->least) - 1e-9)) : axis->least;
}

static double next_tick(const svg_axis *axis, double tick)
{
    if (axis->scale == SVG_LINEAR)
        return tick + axis->step;
    return axis->step > 0 ? tick * axis->step : step_after(tick);
}

static const char *tick_text(const svg_axis *axis, double value, char buffer[SVG_TICK_CHARS])
{
    if (axis->tick_text)
        return axis->tick_text(value, buffer);
    /* A sum of steps may miss 0 by a rounding error. */
    const bool is_zero = fabs(value) < 1e-9 * (axis->most - axis->least);
    snprintf(buffer, SVG_TICK_CHARS, "%.6g", is_zero ? 0.0 : value);
    return buffer;
}

/* ---- charts ---- */

svg_chart svg_chart_empty(FILE *out, double height)
{
    return (svg_chart){
        .out = out, .height = height, .left = 76, .right = 24, .top = 12, .bottom = 46};
}

double svg_chart_x(const svg_chart *chart, double value)
{
    return chart->left + share_of(&chart->x, value) * (SVG_WIDTH - chart->left - chart->right);
}

static double floor_of(const svg_chart *chart)
{
    return chart->height - chart->bottom;
}

double svg_chart_y(const svg_chart *chart, double value)
{
    return floor_of(chart) - share_of(&chart->y, value) * (floor_of(chart) - chart->top);
}

static void draw_ticks(const svg_chart *chart, const svg_axis *axis, bool is_x)
{
    char text[SVG_TICK_CHARS];
    const double end = axis->most + 1e-9 * fabs(axis->most);
    for (double tick = first_tick(axis); tick <= end; tick = next_tick(axis, tick)) {
        const double x = svg_chart_x(chart, tick), y = svg_chart_y(chart, tick);
        if (is_x) {
            fprintf(chart->out, "<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", x, chart->top,
                    floor_of(chart));
            svg_text(chart->out, x, floor_of(chart) + 16, SVG_MIDDLE, NULL,
                     tick_text(axis, tick, text));
        } else {
            fprintf(chart->out, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", chart->left, y,
                    SVG_WIDTH - chart->right);
            svg_text(chart->out, chart->left - 7, y + 4, SVG_END, NULL,
                     tick_text(axis, tick, text));
        }
    }
}

void svg_chart_begin(const svg_chart *chart, const char *label)
{
    const double middle = (chart->top + floor_of(chart)) / 2;
    svg_begin(chart->out, SVG_WIDTH, chart->height, label);
    if (!chart->x.has_own_ticks)
        draw_ticks(chart, &chart->x, true);
    if (!chart->y.has_own_ticks)
        draw_ticks(chart, &chart->y, false);
    svg_text(chart->out, (chart->left + SVG_WIDTH - chart->right) / 2, chart->height - 10,
             SVG_MIDDLE, NULL, chart->x.label);
    fprintf(chart->out, "<g transform=\"translate(14 %.1f) rotate(-90)\">", middle);
    svg_text(chart->out, 0, 0, SVG_MIDDLE, NULL, chart->y.label);
    fputs("</g>\n", chart->out);
}

void svg_chart_line(const svg_chart *chart, const double *x, const double *y, size_t n,
                    const char *css, const char *title)
{
    bool is_down = false;
    fprintf(chart->out, "<path class=\"path %s\" d=\"", css);
    for (size_t i = 0; i < n; i++) {
        const bool is_placed = isfinite(x[i]) && isfinite(y[i]);
        if (is_placed)
            fprintf(chart->out, "%c%.1f %.1f", is_down ? 'L' : 'M', svg_chart_x(chart, x[i]),
                    svg_chart_y(chart, y[i]));
        is_down = is_placed;
    }
    fputs("\">", chart->out);
    print_title(chart->out, title);
    fputs("</path>\n", chart->out);
}

void svg_chart_dot(const svg_chart *chart, double x, double y, const char *css, const char *title)
{
    if (!isfinite(x) || !isfinite(y))
        return;
    fprintf(chart->out, "<circle class=\"dot %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"5\">", css,
            svg_chart_x(chart, x), svg_chart_y(chart, y));
    print_title(chart->out, title);
    fputs("</circle>\n", chart->out);
}

void svg_chart_bar(const svg_chart *chart, double x_first, double x_last, double y, const char *css,
                   const char *title)
{
    if (!isfinite(y))
        return;
    char class_text[64];
    snprintf(class_text, sizeof(class_text), "bar %s", css);
    const double x = svg_chart_x(chart, x_first), top = svg_chart_y(chart, y);
    svg_rect_draw(chart->out, &(svg_rect){.x = x,
                                          .y = top,
                                          .width = svg_chart_x(chart, x_last) - x,
                                          .height = floor_of(chart) - top,
                                          .radius = 1.5,
                                          .css = class_text,
                                          .title = title});
}

void svg_chart_label(svg_chart *chart, double x, double y, const char *css, const char *text)
{
    if (!isfinite(x) || !isfinite(y) || chart->n_labels == SVG_LABELS_MAX)
        return;
    svg_label label = {.x = svg_chart_x(chart, x) + LABEL_GAP,
                       .y = svg_chart_y(chart, y),
                       .width = CHAR_WIDTH * (double)strlen(text),
                       .css = css,
                       .text = tool_copy(text)};
    if (label.x + label.width > SVG_WIDTH)
        label.x -= 2 * LABEL_GAP + label.width; /* to the left of the point */
    chart->labels[chart->n_labels++] = label;
}

static int compare_heights(const void *a, const void *b)
{
    const svg_label *x = a, *y = b;
    return (x->y > y->y) - (x->y < y->y);
}

/* Moves a label below those that come before it, which are placed and sorted from the top. */
static void place_label(const svg_label *labels, size_t i, svg_label *label)
{
    for (size_t j = 0; j < i; j++) {
        const svg_label *other = &labels[j];
        if (fabs(label->y - other->y) < LINE_HEIGHT && label->x < other->x + other->width &&
            other->x < label->x + label->width)
            label->y = other->y + LINE_HEIGHT;
    }
}

void svg_chart_end(svg_chart *chart)
{
    qsort(chart->labels, chart->n_labels, sizeof(*chart->labels), compare_heights);
    for (size_t i = 0; i < chart->n_labels; i++) {
        svg_label *label = &chart->labels[i];
        place_label(chart->labels, i, label);
        svg_text(chart->out, label->x, label->y + 4, SVG_START, label->css, label->text);
        free(label->text);
    }
    chart->n_labels = 0;
    svg_end(chart->out);
}
