/* SPDX-License-Identifier: Apache-2.0 */
/* Results as JSON: written, and read back with messages that name the file and the key. */
#ifndef TQKV_JSON_FILE_H
#define TQKV_JSON_FILE_H

#include <jansson.h>
#include <stdint.h>

/* A number with `digits` significant digits; NaN and Inf become null. */
json_t *json_real_short(double value, int digits);

/* Writes with output_file. Takes the value. Returns an exit code. */
int json_file_write(const char *path, json_t *value);

/*
 * A file being read. The first thing that is wrong is told and sets rc; what is asked for after
 * that is 0, "" or NULL without a message, so that a caller looks at rc once, at the end.
 */
typedef struct json_reader {
    const char *path; /* kept */
    json_t *root;
    int rc;
} json_reader;

void json_reader_open(json_reader *reader, const char *path);
void json_reader_close(json_reader *reader);

/* The value of a key, which must be there. Borrowed from the reader. */
json_t *json_read_array(json_reader *reader, const json_t *object, const char *key);
const char *json_read_text(json_reader *reader, const json_t *object, const char *key);
uint32_t json_read_count(json_reader *reader, const json_t *object, const char *key);
/* null is NAN. */
double json_read_real(json_reader *reader, const json_t *object, const char *key);
/* The same of element i of an array; key: of the array. */
double json_read_item(json_reader *reader, const json_t *array, size_t i, const char *key);

#endif /* TQKV_JSON_FILE_H */
