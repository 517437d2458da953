/* SPDX-License-Identifier: Apache-2.0 */
#include "json_file.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "output_file.h"
#include "tool.h"

#define JSON_STYLE (JSON_INDENT(2) | JSON_REAL_PRECISION(15))
#define REAL_MAX 1e15 /* no result is larger, and sums of these stay finite */

json_t *json_real_short(double value, int digits)
{
    char text[48];
    if (!isfinite(value))
        return json_null();
    snprintf(text, sizeof(text), "%.*g", digits, value);
    return json_real(strtod(text, NULL));
}

int json_file_write(const char *path, json_t *value)
{
    char *json = json_dumps(value, JSON_STYLE);
    json_decref(value);
    if (!json)
        return tool_error("output %s: a text in it is not UTF-8", path);
    char *text = tool_format("%s\n", json);
    free(json);
    const int rc = output_file_write(path, text, strlen(text));
    free(text);
    return rc;
}

void json_reader_open(json_reader *reader, const char *path)
{
    json_error_t error;
    *reader = (json_reader){.path = path};
    FILE *file = fopen(path, "rb");
    if (!file) {
        reader->rc = tool_error("%s: %s", path, strerror(errno));
        return;
    }
    reader->root = json_loadf(file, JSON_REJECT_DUPLICATES, &error);
    fclose(file);
    if (!reader->root)
        reader->rc = tool_error("%s, line %d: %s", path, error.line, error.text);
    else if (!json_is_object(reader->root))
        reader->rc = tool_error("%s: not a JSON object", path);
}

void json_reader_close(json_reader *reader)
{
    json_decref(reader->root);
    *reader = (json_reader){0};
}

static void complain(json_reader *reader, const char *key, const char *wanted)
{
    if (reader->rc == TOOL_OK)
        reader->rc = tool_error("%s: key '%s' is missing or is not %s", reader->path, key, wanted);
}

json_t *json_read_array(json_reader *reader, const json_t *object, const char *key)
{
    json_t *value = json_object_get(object, key);
    if (json_is_array(value))
        return value;
    complain(reader, key, "an array");
    return NULL;
}

const char *json_read_text(json_reader *reader, const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (json_is_string(value))
        return json_string_value(value);
    complain(reader, key, "a text");
    return "";
}

uint32_t json_read_count(json_reader *reader, const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    const json_int_t count = json_integer_value(value);
    if (json_is_integer(value) && count >= 0 && count <= INT32_MAX)
        return (uint32_t)count;
    complain(reader, key, "a count");
    return 0;
}

static double read_real(json_reader *reader, const json_t *value, const char *key)
{
    if (json_is_null(value))
        return NAN;
    const double real = json_number_value(value);
    if (json_is_number(value) && fabs(real) <= REAL_MAX)
        return real;
    complain(reader, key, "a number");
    return 0;
}

double json_read_real(json_reader *reader, const json_t *object, const char *key)
{
    return read_real(reader, json_object_get(object, key), key);
}

double json_read_item(json_reader *reader, const json_t *array, size_t i, const char *key)
{
    return read_real(reader, json_array_get(array, i), key);
}
