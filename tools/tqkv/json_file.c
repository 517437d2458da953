/* SPDX-License-Identifier: Apache-2.0 */
#include "json_file.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "interrupt.h"
#include "tool.h"

#define JSON_STYLE (JSON_INDENT(2) | JSON_REAL_PRECISION(15))

json_t *json_real_short(double value, int digits)
{
    char text[48];
    if (!isfinite(value))
        return json_null();
    snprintf(text, sizeof(text), "%.*g", digits, value);
    return json_real(strtod(text, NULL));
}

int json_file_check_writable(const char *path)
{
    struct stat info;
    if (strcmp(path, "-") == 0)
        return TOOL_OK;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return tool_error("output %s exists and is not a file", path);
    char *probe = tool_format("%s.%ld.tmp", path, (long)getpid());
    const int fd = open(probe, O_WRONLY | O_CREAT | O_EXCL, 0666);
    const int error = errno;
    if (fd >= 0) {
        close(fd);
        unlink(probe);
    }
    free(probe);
    if (fd < 0)
        return tool_error("output %s: %s", path, strerror(error));
    return TOOL_OK;
}

int json_file_write(const char *path, json_t *value)
{
    int rc = TOOL_OK;
    if (strcmp(path, "-") == 0) {
        if (json_dumpf(value, stdout, JSON_STYLE) != 0 || fputc('\n', stdout) == EOF)
            rc = tool_error("stdout: cannot write");
        json_decref(value);
        return rc;
    }
    char *part = tool_format("%s.%ld.tmp", path, (long)getpid());
    interrupt_hold();
    FILE *file = fopen(part, "w");
    bool is_written = file && json_dumpf(value, file, JSON_STYLE) == 0 && fputc('\n', file) != EOF;
    if (file)
        is_written = fclose(file) == 0 && is_written;
    if (!is_written || rename(part, path) != 0) {
        rc = tool_error("output %s: %s", path, strerror(errno));
        unlink(part);
    }
    interrupt_release();
    free(part);
    json_decref(value);
    return rc;
}
