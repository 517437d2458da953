/* SPDX-License-Identifier: Apache-2.0 */
/* What caches cost: tables and charts of one file of `tqkv eval`, setting by setting. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "page.h"
#include "report.h"
#include "tool.h"

#define TEXT_ROW_HEIGHT 30.0
#define TEXT_NAME_BYTES 28

/* The caches at one context and micro-batch. */
typedef struct setting {
    FILE *out;
    const report_row *rows;
    size_t n_rows;
} setting;

/* The colour of a cache in every chart of its setting. */
static const char *row_css(size_t row, char out[32])
{
    snprintf(out, 32, "s%zu%s", row % PAGE_SERIES, row < PAGE_SERIES ? "" : " dashed");
    return out;
}

/* Labels of our caches are drawn strong. */
static const char *label_css(const report_row *row)
{
    return strncmp(row->cache, "ours", 4) == 0 ? "strong" : NULL;
}

static void print_number(FILE *out, const char *format, double value)
{
    char text[64] = "\xe2\x80\x93"; /* an en dash: not known */
    if (isfinite(value))
        snprintf(text, sizeof(text), format, value);
    fprintf(out, "<td>%s</td>", text);
}

static void print_table(const setting *s)
{
    FILE *out = s->out;
    page_figure_begin(out, "Caches",
                      "What each cache takes, and how far predictions move from those of the "
                      "uncompressed one (KL divergence in nats).");
    fputs("<table>\n<tr><th>cache</th><th>bits per value</th><th>ratio</th><th>KL mean</th>"
          "<th>+-</th><th>KL median</th><th>KL 99.9 %</th><th>same top token</th></tr>\n",
          out);
    for (size_t i = 0; i < s->n_rows; i++) {
        const report_row *row = &s->rows[i];
        fputs("<tr><td>", out);
        page_text(out, row->cache);
        fputs("</td>", out);
        print_number(out, "%.2f", row->bits);
        print_number(out, "%.2fx", row->ratio);
        print_number(out, "%.5f", row->kl_mean);
        print_number(out, "%.5f", row->kl_error);
        print_number(out, "%.5f", row->kl_median);
        print_number(out, "%.4f", row->kl_p999);
        print_number(out, "%.2f %%", 100 * row->top1);
        fputs("</tr>\n", out);
    }
    fputs("</table>\n", out);
    page_figure_end(out);
}

static void print_legend(const setting *s)
{
    char css[32];
    fputs("<div class=\"legend\">", s->out);
    for (size_t i = 0; i < s->n_rows; i++) {
        fprintf(s->out, "<span><i class=\"%s\"></i>", row_css(i, css));
        page_text(s->out, s->rows[i].cache);
        fputs("</span>", s->out);
    }
    fputs("</div>\n", s->out);
}

static void draw_cost(const setting *s)
{
    char css[32];
    svg_chart chart = svg_chart_empty(s->out, 340);
    chart.right = 100;
    chart.x = svg_axis_empty("bits per value, everything counted", SVG_LINEAR);
    chart.y = report_kl_axis();
    svg_axis_cover(&chart.x, 0);
    for (size_t i = 0; i < s->n_rows; i++) {
        svg_axis_cover(&chart.x, s->rows[i].bits);
        svg_axis_cover(&chart.y, s->rows[i].kl_mean);
    }
    svg_axis_round(&chart.x);
    svg_axis_round(&chart.y);
    page_figure_begin(s->out, "Cost against size",
                      "Lower and further left is better; of two caches with equal bits the lower "
                      "one loses less.");
    svg_chart_begin(&chart, "KL divergence against bits per value");
    for (size_t i = 0; i < s->n_rows; i++) {
        const report_row *row = &s->rows[i];
        char *title = tool_format("%s: %.2f bits, KL %.5f", row->cache, row->bits, row->kl_mean);
        svg_chart_dot(&chart, row->bits, row->kl_mean, row_css(i, css), title);
        free(title);
        svg_chart_label(&chart, row->bits, row->kl_mean, label_css(row), row->cache);
    }
    svg_chart_end(&chart);
    page_figure_end(s->out);
}

/* The beginning of a name, cut between two characters of UTF-8. Given. */
static char *short_name(const char *name)
{
    size_t n = strlen(name);
    if (n <= TEXT_NAME_BYTES)
        return tool_copy(name);
    n = TEXT_NAME_BYTES;
    while (n && ((unsigned char)name[n] & 0xc0) == 0x80)
        n--;
    return tool_format("%.*s\xe2\x80\xa6", (int)n, name);
}

/* Rows of dots, one per text; the y axis counts texts from the top. */
static void draw_text_row(const svg_chart *chart, const setting *s, size_t text)
{
    const double y = -(double)text;
    const report_part *first = &s->rows[0].texts[text];
    char css[32], *name = short_name(first->text);
    svg_text(chart->out, chart->left - 10, svg_chart_y(chart, y) + 4, SVG_END, NULL, name);
    free(name);
    fprintf(chart->out, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", chart->left,
            svg_chart_y(chart, y), SVG_WIDTH - chart->right);
    for (size_t i = 0; i < s->n_rows; i++) {
        const report_part *part = &s->rows[i].texts[text];
        char *title = tool_format("%s, %s: KL %.5f, %u tokens", part->text, s->rows[i].cache,
                                  part->kl_mean, part->n_tokens);
        svg_chart_dot(chart, part->kl_mean, y, row_css(i, css), title);
        free(title);
    }
}

static void draw_texts(const setting *s)
{
    const size_t n_texts = s->rows[0].n_texts;
    svg_chart chart = svg_chart_empty(s->out, 80 + TEXT_ROW_HEIGHT * (double)n_texts);
    chart.left = 200;
    chart.x = report_kl_axis();
    chart.y = svg_axis_empty("", SVG_LINEAR);
    chart.y.least = 0.5 - (double)n_texts;
    chart.y.most = 0.5;
    chart.y.has_own_ticks = true;
    for (size_t i = 0; i < s->n_rows; i++) {
        for (size_t j = 0; j < n_texts; j++)
            svg_axis_cover(&chart.x, s->rows[i].texts[j].kl_mean);
    }
    svg_axis_round(&chart.x);
    page_figure_begin(s->out, "By text",
                      "Whether a cache that does well on one text does well on all.");
    print_legend(s);
    svg_chart_begin(&chart, "KL divergence by text");
    for (size_t i = 0; i < n_texts; i++)
        draw_text_row(&chart, s, i);
    svg_chart_end(&chart);
    page_figure_end(s->out);
}

static void draw_position_line(svg_chart *chart, const report_row *row, const char *css)
{
    const size_t n = row->n_positions;
    double *x = tool_alloc(n, sizeof(*x)), *y = tool_alloc(n, sizeof(*y));
    for (size_t i = 0; i < n; i++) {
        x[i] = ((double)row->positions[i].first + row->positions[i].last) / 2;
        y[i] = row->positions[i].kl_mean;
    }
    svg_chart_line(chart, x, y, n, css, row->cache);
    if (n)
        svg_chart_label(chart, x[n - 1], y[n - 1], label_css(row), row->cache);
    free(x);
    free(y);
}

static void draw_positions(const setting *s)
{
    char css[32];
    svg_chart chart = svg_chart_empty(s->out, 320);
    chart.right = 110;
    chart.x = svg_axis_empty("position in the piece (tokens)", SVG_LINEAR);
    chart.y = report_kl_axis();
    for (size_t i = 0; i < s->n_rows; i++) {
        for (size_t j = 0; j < s->rows[i].n_positions; j++) {
            svg_axis_cover(&chart.x, s->rows[i].positions[j].first);
            svg_axis_cover(&chart.x, s->rows[i].positions[j].last);
            svg_axis_cover(&chart.y, s->rows[i].positions[j].kl_mean);
        }
    }
    svg_axis_round(&chart.x);
    svg_axis_round(&chart.y);
    page_figure_begin(s->out, "By position",
                      "Whether the loss grows as the context gets longer and more of it is old.");
    print_legend(s);
    svg_chart_begin(&chart, "KL divergence by position");
    for (size_t i = 0; i < s->n_rows; i++)
        draw_position_line(&chart, &s->rows[i], row_css(i, css));
    svg_chart_end(&chart);
    page_figure_end(s->out);
}

/* As many rows as share the context and micro-batch of the first. */
static size_t count_rows(const report_row *rows, size_t n)
{
    size_t i = 1;
    while (i < n && rows[i].n_ctx == rows[0].n_ctx && rows[i].n_ubatch == rows[0].n_ubatch)
        i++;
    return i;
}

void report_quality(FILE *out, const report_eval *eval)
{
    fputs("<h2>Quality: ", out);
    page_text(out, eval->model);
    fputs("</h2>\n<p class=\"soft\">Compared with ", out);
    page_text(out, eval->base);
    fputs("; scored: ", out);
    page_text(out, eval->scored);
    fprintf(out, ". Charts show KL divergences below %.5f at their edge.</p>\n", REPORT_KL_FLOOR);
    for (size_t first = 0, n = 0; first < eval->n_rows; first += n) {
        const report_row *rows = &eval->rows[first];
        n = count_rows(rows, eval->n_rows - first);
        const setting s = {out, rows, n};
        fprintf(out, "<h3>%u tokens of context, fed %u at a time; %u tokens scored</h3>\n",
                rows->n_ctx, rows->n_ubatch, rows->n_scored);
        print_table(&s);
        draw_cost(&s);
        draw_texts(&s);
        draw_positions(&s);
    }
}
