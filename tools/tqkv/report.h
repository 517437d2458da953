/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of the page that `tqkv report` writes. */
#ifndef TQKV_REPORT_H
#define TQKV_REPORT_H

#include <stdio.h>

#include "report_input.h"
#include "svg.h"
#include "turboquant/plan.h"

/* What the plan is for, in numbers and words. */
void report_head(FILE *out, const tqkv_plan *plan);
/* Where its bits go in the oldest tier: by unit, and by layer. */
void report_bit_map(FILE *out, const tqkv_plan *plan);
void report_layer_bits(FILE *out, const tqkv_plan *plan);

void report_sensitivity(FILE *out, const report_calibration *calibration);
void report_spectrum(FILE *out, const tqkv_plan *plan);
/* Returns an exit code. */
int report_memory(FILE *out, const tqkv_plan *plan);

void report_quality(FILE *out, const report_eval *eval);

/* An axis of layers, one unit wide each, centred on their numbers. */
svg_axis report_layer_axis(uint32_t n_layers);
void report_layer_ticks(const svg_chart *chart, uint32_t n_layers);
/* Logarithmic; what is too small to matter stands at its end. */
#define REPORT_KL_FLOOR 1e-5
svg_axis report_kl_axis(void);

/* "K" or "V", and the class of its colour. */
const char *report_side_name(size_t side);
const char *report_side_css(size_t side);
void report_side_legend(FILE *out);

#endif /* TQKV_REPORT_H */
