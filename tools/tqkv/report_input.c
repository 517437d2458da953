/* SPDX-License-Identifier: Apache-2.0 */
#include "report_input.h"

#include <stdlib.h>
#include <string.h>

#include "tool.h"

static report_part *read_parts(json_reader *reader, const json_t *row, const char *key, size_t *n)
{
    const json_t *list = json_read_array(reader, row, key);
    const bool is_text = strcmp(key, "texts") == 0;
    *n = json_array_size(list);
    report_part *parts = tool_alloc(*n, sizeof(*parts));
    for (size_t i = 0; i < *n; i++) {
        const json_t *part = json_array_get(list, i);
        if (is_text) {
            parts[i].text = json_read_text(reader, part, "text");
        } else {
            parts[i].first = json_read_count(reader, part, "first");
            parts[i].last = json_read_count(reader, part, "last");
        }
        parts[i].kl_mean = json_read_real(reader, part, "kl_mean");
        parts[i].n_tokens = json_read_count(reader, part, "tokens");
    }
    return parts;
}

static void read_row(json_reader *reader, const json_t *row, report_row *out)
{
    out->cache = json_read_text(reader, row, "cache");
    out->n_ctx = json_read_count(reader, row, "n_ctx");
    out->n_ubatch = json_read_count(reader, row, "n_ubatch");
    out->n_scored = json_read_count(reader, row, "n_scored");
    out->bits = json_read_real(reader, row, "bits");
    out->ratio = json_read_real(reader, row, "ratio");
    out->kl_mean = json_read_real(reader, row, "kl_mean");
    out->kl_error = json_read_real(reader, row, "kl_error");
    out->kl_median = json_read_real(reader, row, "kl_median");
    out->kl_p999 = json_read_real(reader, row, "kl_p999");
    out->top1 = json_read_real(reader, row, "top1");
    out->texts = read_parts(reader, row, "texts", &out->n_texts);
    out->positions = read_parts(reader, row, "positions", &out->n_positions);
}

static bool has_same_texts(const report_row *a, const report_row *b)
{
    bool is_same = a->n_texts == b->n_texts;
    for (size_t i = 0; i < a->n_texts && is_same; i++)
        is_same = strcmp(a->texts[i].text, b->texts[i].text) == 0;
    return is_same;
}

int report_eval_read(report_eval *out, const char *path)
{
    json_reader *reader = &out->reader;
    *out = (report_eval){0};
    json_reader_open(reader, path);
    const char *model = json_read_text(reader, reader->root, "model"), *slash = strrchr(model, '/');
    out->model = slash ? slash + 1 : model;
    out->base = json_read_text(reader, reader->root, "base");
    out->scored = json_read_text(reader, reader->root, "scored");
    const json_t *results = json_read_array(reader, reader->root, "results");
    out->n_rows = json_array_size(results);
    out->rows = tool_alloc(out->n_rows, sizeof(*out->rows));
    for (size_t i = 0; i < out->n_rows; i++)
        read_row(reader, json_array_get(results, i), &out->rows[i]);
    for (size_t i = 1; i < out->n_rows && reader->rc == TOOL_OK; i++) {
        if (!has_same_texts(&out->rows[0], &out->rows[i]))
            reader->rc = tool_error("%s: key 'texts' is not the same in all results", path);
    }
    return reader->rc;
}

void report_eval_deinit(report_eval *eval)
{
    for (size_t i = 0; i < eval->n_rows; i++) {
        free(eval->rows[i].texts);
        free(eval->rows[i].positions);
    }
    free(eval->rows);
    json_reader_close(&eval->reader);
    *eval = (report_eval){0};
}

int report_calibration_read(report_calibration *out, const char *path, uint32_t n_layers)
{
    static const char *const keys[2] = {"k_kl", "v_kl"};
    json_reader reader;
    *out = (report_calibration){.n_layers = n_layers};
    json_reader_open(&reader, path);
    for (size_t side = 0; side < 2; side++) {
        const json_t *list = json_read_array(&reader, reader.root, keys[side]);
        out->kl[side] = tool_alloc(n_layers, sizeof(double));
        if (reader.rc == TOOL_OK && json_array_size(list) != n_layers)
            reader.rc = tool_error("%s: key '%s' has %zu layers, the plan has %u", path, keys[side],
                                   json_array_size(list), n_layers);
        for (uint32_t i = 0; i < n_layers; i++)
            out->kl[side][i] = json_read_item(&reader, list, i, keys[side]);
    }
    const int rc = reader.rc;
    json_reader_close(&reader);
    return rc;
}

void report_calibration_deinit(report_calibration *calibration)
{
    free(calibration->kl[0]);
    free(calibration->kl[1]);
    *calibration = (report_calibration){0};
}
