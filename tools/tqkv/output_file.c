/* SPDX-License-Identifier: Apache-2.0 */
#include "output_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "interrupt.h"
#include "tool.h"

static bool is_stdout(const char *path)
{
    return strcmp(path, "-") == 0;
}

static char *part_path(const char *path)
{
    return tool_format("%s.%ld.tmp", path, (long)getpid());
}

int output_file_check(const char *path)
{
    struct stat info;
    if (is_stdout(path))
        return TOOL_OK;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return tool_error("output %s exists and is not a file", path);
    char *probe = part_path(path);
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

int output_file_write(const char *path, const void *bytes, size_t n_bytes)
{
    int rc = TOOL_OK;
    if (is_stdout(path))
        return fwrite(bytes, 1, n_bytes, stdout) == n_bytes ? TOOL_OK
                                                            : tool_error("stdout: cannot write");
    char *part = part_path(path);
    interrupt_hold();
    FILE *file = fopen(part, "w");
    bool is_written = file && fwrite(bytes, 1, n_bytes, file) == n_bytes;
    if (file)
        is_written = fclose(file) == 0 && is_written;
    if (!is_written || rename(part, path) != 0) {
        rc = tool_error("output %s: %s", path, strerror(errno));
        unlink(part);
    }
    interrupt_release();
    free(part);
    return rc;
}
