/* SPDX-License-Identifier: Apache-2.0 */
/* What `tqkv calibrate` says of a plan. */
#ifndef TQKV_GATE_REPORT_H
#define TQKV_GATE_REPORT_H

#include <jansson.h>
#include <stdio.h>

#include "gate.h"

/* A line on `out`, and a warning on stderr where the plan stayed above its limit. */
void gate_report_print(const gate_plan *p, FILE *out);
/* Given. */
json_t *gate_report_json(const gate_plan *p);

#endif /* TQKV_GATE_REPORT_H */
