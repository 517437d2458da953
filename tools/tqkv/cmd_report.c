/* SPDX-License-Identifier: Apache-2.0 */
/* `tqkv report`: a plan, and what was measured with it, as one page to look at. */
#include <getopt.h>
#include <stdlib.h>

#include "output_file.h"
#include "page.h"
#include "plan_view.h"
#include "report.h"
#include "tool.h"

typedef struct report_options {
    const char *plan, *calibration, *output;
    tool_list evals;
} report_options;

/* Everything that is drawn. */
typedef struct report_data {
    tqkv_plan *plan;
    report_calibration calibration;
    report_eval *evals; /* [n_evals] */
    size_t n_evals;
} report_data;

static void print_help(void)
{
    printf(
        "Usage: tqkv report PLAN.tqkv [--eval RESULT.json]... [--calibration CALIB.json] [-o "
        "FILE]\n"
        "\n"
        "Writes one page of HTML that shows where a plan spends its bits, what it saves, and what\n"
        "that costs. The page needs no other file and no network.\n\n"
        "      --eval FILE         output of 'tqkv eval --json'; may be repeated\n"
        "      --calibration FILE  output of 'tqkv calibrate --json': sensitivity of the layers\n"
        "  -o, --output FILE       page (default: the plan's name with .html; - is stdout)\n");
}

static int read_inputs(const report_options *o, report_data *data)
{
    tqkv_plan_info info;
    int rc = plan_view_load(o->plan, &data->plan);
    tqkv_plan_get_info(data->plan, &info);
    if (rc == TOOL_OK && o->calibration)
        rc = report_calibration_read(&data->calibration, o->calibration, info.n_layers);
    data->evals = tool_alloc(o->evals.n, sizeof(*data->evals));
    while (data->n_evals < o->evals.n && rc == TOOL_OK) {
        rc = report_eval_read(&data->evals[data->n_evals], o->evals.items[data->n_evals]);
        data->n_evals++;
    }
    return rc;
}

static void free_inputs(report_data *data)
{
    for (size_t i = 0; i < data->n_evals; i++)
        report_eval_deinit(&data->evals[i]);
    free(data->evals);
    report_calibration_deinit(&data->calibration);
    tqkv_plan_destroy(data->plan);
}

static int draw_page(FILE *out, const report_data *data)
{
    tqkv_plan_info info;
    tqkv_plan_get_info(data->plan, &info);
    char *title = tool_format("%s, %s: KV cache plan", info.model, info.profile);
    page_begin(out, title);
    free(title);
    report_head(out, data->plan);
    fputs("<h2>Where the bits go</h2>\n", out);
    report_bit_map(out, data->plan);
    report_layer_bits(out, data->plan);
    if (data->calibration.n_layers)
        report_sensitivity(out, &data->calibration);
    report_spectrum(out, data->plan);
    fputs("<h2>What it saves</h2>\n", out);
    const int rc = report_memory(out, data->plan);
    for (size_t i = 0; i < data->n_evals; i++)
        report_quality(out, &data->evals[i]);
    fprintf(out, "<footer>Written by tqkv %s.</footer>\n", tqkv_version());
    page_end(out);
    return rc;
}

/* The page is made in memory, so that nothing is written unless all of it can be. */
static int write_page(const report_data *data, const char *path)
{
    char *text = NULL;
    size_t n_bytes = 0;
    FILE *out = open_memstream(&text, &n_bytes);
    int rc = out ? draw_page(out, data) : TOOL_OK;
    if (!out || fclose(out) != 0)
        rc = tool_error("out of memory");
    if (rc == TOOL_OK)
        rc = output_file_write(path, text, n_bytes);
    free(text);
    return rc;
}

static int report(const report_options *o)
{
    report_data data = {0};
    char *output =
        o->output ? tool_copy(o->output) : tool_replace_ending(o->plan, ".tqkv", ".html");
    int rc = output_file_check(output);
    if (rc == TOOL_OK)
        rc = read_inputs(o, &data);
    if (rc == TOOL_OK)
        rc = write_page(&data, output);
    free_inputs(&data);
    free(output);
    return rc;
}

/* TOOL_OK with o->plan NULL: help was asked for and given. */
static int parse(report_options *o, int argc, char **argv)
{
    enum { OPT_HELP = 'h', OPT_OUTPUT = 'o', OPT_EVAL = 256, OPT_CALIBRATION };
    static const struct option options[] = {
        {"help", no_argument, NULL, OPT_HELP},
        {"output", required_argument, NULL, OPT_OUTPUT},
        {"eval", required_argument, NULL, OPT_EVAL},
        {"calibration", required_argument, NULL, OPT_CALIBRATION},
        {0}};
    int option;
    while ((option = getopt_long(argc, argv, ":ho:", options, NULL)) != -1) {
        switch (option) {
        case OPT_HELP:
            print_help();
            return TOOL_OK;
        case OPT_OUTPUT:
            o->output = optarg;
            break;
        case OPT_EVAL:
            tool_list_push(&o->evals, optarg);
            break;
        case OPT_CALIBRATION:
            o->calibration = optarg;
            break;
        default:
            return tool_bad_option(argv, option);
        }
    }
    if (optind + 1 != argc)
        return tool_usage(optind == argc ? "which plan?" : "one plan at a time");
    o->plan = argv[optind];
    return TOOL_OK;
}

int cmd_report(int argc, char **argv)
{
    report_options o = {0};
    int rc = parse(&o, argc, argv);
    if (rc == TOOL_OK && o.plan)
        rc = report(&o);
    tool_list_free(&o.evals);
    return rc;
}
