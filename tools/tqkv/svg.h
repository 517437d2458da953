/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drawings in a page: shapes in pixels, and charts that place values on two axes.
 *
 *      left                       right
 *     +----+-----------------------+----+
 *     |    |  y axis, grid         |    |  top
 *     |    |                       |    |
 *     |    +-----------------------+    |
 *     |      x ticks, label             |  bottom
 *     +---------------------------------+
 *
 * Classes name colours and strokes of page.c. Texts are escaped here.
 */
#ifndef TQKV_SVG_H
#define TQKV_SVG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

enum { SVG_WIDTH = 1040, SVG_LABELS_MAX = 64, SVG_TICK_CHARS = 32 };

/* label: what the drawing shows, for those who cannot see it. */
void svg_begin(FILE *out, double width, double height, const char *label);
void svg_end(FILE *out);

typedef enum svg_anchor { SVG_START, SVG_MIDDLE, SVG_END } svg_anchor;

void svg_text(FILE *out, double x, double y, svg_anchor anchor, const char *css, const char *text);

/* A rectangle with a tooltip. css: class, fill: colour; these and title may be NULL. */
typedef struct svg_rect {
    double x, y, width, height, radius;
    const char *css, *fill, *title;
} svg_rect;
void svg_rect_draw(FILE *out, const svg_rect *rect);

typedef enum svg_scale { SVG_LINEAR, SVG_LOG, SVG_LOG2 } svg_scale;

typedef struct svg_axis {
    const char *label;
    svg_scale scale;
    double least, most; /* begin with svg_axis_empty */
    double floor;       /* of a log axis: makes no room for less, which is drawn at its end */
    double step;        /* from tick to tick: a distance or a factor; set by svg_axis_round */
    /* Text of a tick; NULL: %g. Returns buffer. */
    const char *(*tick_text)(double value, char buffer[SVG_TICK_CHARS]);
    bool has_own_ticks; /* the caller draws what stands along the axis */
} svg_axis;

svg_axis svg_axis_empty(const char *label, svg_scale scale);
/* Makes room for a value; NAN is passed over. */
void svg_axis_cover(svg_axis *axis, double value);
/* Ends the axis at round values. Call after the last svg_axis_cover. */
void svg_axis_round(svg_axis *axis);

typedef struct svg_label {
    double x, y, width; /* pixels */
    const char *css;    /* kept */
    char *text;
} svg_label;

typedef struct svg_chart {
    FILE *out;
    double height;                   /* of the whole; the width is SVG_WIDTH */
    double left, right, top, bottom; /* margins */
    svg_axis x, y;
    svg_label labels[SVG_LABELS_MAX];
    size_t n_labels;
} svg_chart;

/* Margins that hold ticks and labels. */
svg_chart svg_chart_empty(FILE *out, double height);
/* Draws axes, ticks and the grid; label as in svg_begin. */
void svg_chart_begin(const svg_chart *chart, const char *label);
/* Draws the labels, each below those that it would cover, and closes the drawing. */
void svg_chart_end(svg_chart *chart);

/* Pixels; values outside of the axis are at its end. */
double svg_chart_x(const svg_chart *chart, double value);
double svg_chart_y(const svg_chart *chart, double value);

/* A line through n points, broken at NAN. title: tooltip. */
void svg_chart_line(const svg_chart *chart, const double *x, const double *y, size_t n,
                    const char *css, const char *title);
/* Nothing at NAN. */
void svg_chart_dot(const svg_chart *chart, double x, double y, const char *css, const char *title);
/* From the x axis up, between two values of x. */
void svg_chart_bar(const svg_chart *chart, double x_first, double x_last, double y, const char *css,
                   const char *title);
/* A label beside a point. Those after SVG_LABELS_MAX are left out. */
void svg_chart_label(svg_chart *chart, double x, double y, const char *css, const char *text);

#endif /* TQKV_SVG_H */
