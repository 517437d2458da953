/* SPDX-License-Identifier: Apache-2.0 */
/* The tables and the JSON of `tqkv eval`. */
#ifndef TQKV_EVAL_REPORT_H
#define TQKV_EVAL_REPORT_H

#include <jansson.h>

#include "eval_types.h"

void eval_print_scores(FILE *out, const eval_job *job, const eval_setting *setting,
                       const eval_score *scores);
/* n speeds, those of one depth and number of threads one after another. */
void eval_print_speeds(FILE *out, const eval_speed *speeds, size_t n);
json_t *eval_scores_json(const eval_job *job, const eval_setting *setting,
                         const eval_score *scores);
json_t *eval_speeds_json(const eval_speed *speeds, size_t n);

#endif /* TQKV_EVAL_REPORT_H */
