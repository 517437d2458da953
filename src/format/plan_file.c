/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plans on disk. A file is written beside its final name and renamed once it is safe, so a reader
 * sees the old file or the new one, never a part.
 */
#define _POSIX_C_SOURCE 200809L

#include "format/plan_file.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#include <windows.h>
#else
#include <fcntl.h>
#include <unistd.h>
#endif

#include "base/log.h"

#define TMP_NAME_CHARS 32 /* ".tmp-" and two numbers */
#define TMP_TRIES 100

static tqkv_status refuse(const tqkv_logger *log, const char *verb, const char *path, int error)
{
    tqkvi_log(log, TQKV_LOG_ERROR, "plan: cannot %s %s: %s", verb, path, strerror(error));
    return TQKV_ERR_IO;
}

static tqkv_status read_file(FILE *file, const tqkv_allocator *mem, const char *path,
                             const tqkv_logger *log, uint8_t **out, size_t *n_bytes)
{
    uint8_t start[TQKVI_PLAN_FINGERPRINT_AT];
    errno = 0;
    const size_t n_start = fread(start, 1, sizeof(start), file);
    if (ferror(file))
        return refuse(log, "read", path, errno);
    if (fseek(file, 0, SEEK_END) != 0)
        return refuse(log, "read", path, errno);
    const long end = ftell(file);
    if (end < 0 || fseek(file, 0, SEEK_SET) != 0)
        return refuse(log, "read", path, errno);

    /* Before memory is taken for whatever file this is. */
    TQKV_TRY(tqkvi_plan_check_start(start, n_start, (uint64_t)end, log));
    uint8_t *bytes = tqkvi_alloc(mem, (size_t)end);
    if (!bytes)
        return TQKV_ERR_NO_MEMORY;
    *n_bytes = fread(bytes, 1, (size_t)end, file);
    if (ferror(file)) {
        tqkvi_free(mem, bytes);
        return refuse(log, "read", path, errno);
    }
    *out = bytes;
    return TQKV_OK;
}

tqkv_status tqkvi_plan_load_file(const tqkv_allocator *mem, const char *path,
                                 const tqkv_logger *log, tqkv_plan **out)
{
    tqkv_allocator own;
    tqkvi_allocator_init(&own, mem);
    *out = NULL;
    FILE *file = fopen(path, "rb");
    if (!file)
        return refuse(log, "open", path, errno);

    uint8_t *bytes = NULL;
    size_t n_bytes = 0;
    tqkv_status status = read_file(file, &own, path, log, &bytes, &n_bytes);
    (void)fclose(file); /* was only read */
    if (status == TQKV_OK)
        status = tqkvi_plan_parse(&own, bytes, n_bytes, log, out);
    tqkvi_free(&own, bytes);
    if (status == TQKV_ERR_CORRUPT || status == TQKV_ERR_VERSION)
        tqkvi_log(log, TQKV_LOG_ERROR, "plan: cannot use %s", path);
    return status;
}

#if defined(_WIN32)
static unsigned process_id(void)
{
    return (unsigned)_getpid();
}

static int sync_file(FILE *file)
{
    return _commit(_fileno(file));
}

static int replace_file(const char *from, const char *to)
{
    if (MoveFileExA(from, to, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH))
        return 0;
    errno = EACCES;
    return -1;
}

static int sync_folder(char *path)
{
    (void)path;
    return 0;
}
#else
static unsigned process_id(void)
{
    return (unsigned)getpid();
}

static int sync_file(FILE *file)
{
    return fsync(fileno(file));
}

static int replace_file(const char *from, const char *to)
{
    return rename(from, to);
}

/* Makes the rename itself last. path: of a file, cut in place to its folder. */
static int sync_folder(char *path)
{
    char *slash = strrchr(path, '/');
    if (slash)
        slash[slash == path ? 1 : 0] = '\0';
    const int fd = open(slash ? path : ".", O_RDONLY);
    if (fd < 0)
        return errno == EACCES ? 0 : -1; /* a folder may be writable and not readable */
    const int failed = fsync(fd) != 0 && errno != EINVAL; /* some file systems cannot */
    const int error = errno;
    (void)close(fd);
    errno = error;
    return failed ? -1 : 0;
}
#endif

/* A new file beside path; its name goes to tmp. */
static FILE *open_tmp(const char *path, char *tmp, size_t tmp_chars)
{
    for (unsigned i = 0; i < TMP_TRIES; i++) {
        (void)snprintf(tmp, tmp_chars, "%s.tmp-%u-%u", path, process_id(), i);
        FILE *file = fopen(tmp, "wbx");
        if (file || errno != EEXIST)
            return file;
    }
    return NULL;
}

static tqkv_status write_file(const uint8_t *bytes, size_t n_bytes, const char *path, char *tmp,
                              size_t tmp_chars, const tqkv_logger *log)
{
    FILE *file = open_tmp(path, tmp, tmp_chars);
    if (!file)
        return refuse(log, "create", tmp, errno);
    const bool written =
        fwrite(bytes, 1, n_bytes, file) == n_bytes && fflush(file) == 0 && sync_file(file) == 0;
    int error = errno;
    const bool closed = fclose(file) == 0;
    if (written && !closed)
        error = errno;
    if (!written || !closed) {
        (void)remove(tmp);
        return refuse(log, "write", path, error);
    }
    if (replace_file(tmp, path) != 0) {
        error = errno;
        (void)remove(tmp);
        return refuse(log, "replace", path, error);
    }
    memcpy(tmp, path, strlen(path) + 1); /* tmp is longer */
    if (sync_folder(tmp) != 0)
        return refuse(log, "sync the folder of", path, errno);
    return TQKV_OK;
}

tqkv_status tqkvi_plan_save_file(const tqkv_plan *plan, const char *path, const tqkv_logger *log)
{
    uint8_t *bytes;
    size_t n_bytes, tmp_chars;
    TQKV_TRY(tqkvi_size_add(strlen(path), TMP_NAME_CHARS, &tmp_chars));
    TQKV_TRY(tqkvi_plan_serialise(plan, &bytes, &n_bytes));

    tqkv_status status = TQKV_ERR_NO_MEMORY;
    char *tmp = tqkvi_alloc(&plan->mem, tmp_chars);
    if (tmp)
        status = write_file(bytes, n_bytes, path, tmp, tmp_chars, log);
    tqkvi_free(&plan->mem, tmp);
    tqkvi_free(&plan->mem, bytes);
    return status;
}
