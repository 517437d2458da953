/* SPDX-License-Identifier: Apache-2.0 */
/* Files that are written beside their place and renamed, so that none is left half. */
#ifndef TQKV_OUTPUT_FILE_H
#define TQKV_OUTPUT_FILE_H

#include <stddef.h>

/* Checks before the work that path can be written: makes and removes a file beside it. */
int output_file_check(const char *path);
/* Writes n_bytes; the path "-" is stdout. Returns an exit code. */
int output_file_write(const char *path, const void *bytes, size_t n_bytes);

#endif /* TQKV_OUTPUT_FILE_H */
