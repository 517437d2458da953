/* SPDX-License-Identifier: Apache-2.0 */
/* Results as JSON. */
#ifndef TQKV_JSON_FILE_H
#define TQKV_JSON_FILE_H

#include <jansson.h>

/* A number with `digits` significant digits; NaN and Inf become null. */
json_t *json_real_short(double value, int digits);

/* Checks before the work that path can be written: makes and removes a file beside it. */
int json_file_check_writable(const char *path);
/* Writes beside path and renames; "-" is stdout. Takes the value. Returns an exit code. */
int json_file_write(const char *path, json_t *value);

#endif /* TQKV_JSON_FILE_H */
