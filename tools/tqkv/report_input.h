/* SPDX-License-Identifier: Apache-2.0 */
/* What `tqkv report` reads: results of `tqkv eval` and `tqkv calibrate`. */
#ifndef TQKV_REPORT_INPUT_H
#define TQKV_REPORT_INPUT_H

#include "json_file.h"

/* Texts borrow from the reader. Numbers that the file does not know are NAN. */

/* Some of the scored tokens: a text, or positions first..last of the pieces. */
typedef struct report_part {
    const char *text;
    uint32_t first, last, n_tokens;
    double kl_mean;
} report_part;

/* One cache at one setting. */
typedef struct report_row {
    const char *cache;
    uint32_t n_ctx, n_ubatch, n_scored;
    double bits, ratio, kl_mean, kl_error, kl_median, kl_p999, top1;
    report_part *texts, *positions;
    size_t n_texts, n_positions;
} report_row;

typedef struct report_eval {
    json_reader reader;
    const char *model; /* without its folder */
    const char *base, *scored;
    report_row *rows;
    size_t n_rows;
} report_eval;

/* All rows have the same texts. Deinit whatever comes back. Returns an exit code. */
int report_eval_read(report_eval *out, const char *path);
void report_eval_deinit(report_eval *eval);

/* KL of each layer's K and V quantised alone. */
typedef struct report_calibration {
    double *kl[2]; /* by tqkv_side, [n_layers] */
    uint32_t n_layers;
} report_calibration;

/* Refuses a file with another number of layers. */
int report_calibration_read(report_calibration *out, const char *path, uint32_t n_layers);
void report_calibration_deinit(report_calibration *calibration);

#endif /* TQKV_REPORT_INPUT_H */
