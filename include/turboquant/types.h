/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Types that every other public header needs: statuses, the allocator, the
 * logger and the caller's threads. Valid C99 and C++11.
 */
#ifndef TURBOQUANT_TYPES_H
#define TURBOQUANT_TYPES_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TQKV_API
#elif defined(__GNUC__)
#define TQKV_API __attribute__((visibility("default")))
#else
#define TQKV_API
#endif

#if defined(__GNUC__)
#define TQKV_NODISCARD __attribute__((warn_unused_result))
#else
#define TQKV_NODISCARD
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes. Buffers that kernels touch start on this and are readable this far past their end. */
#define TQKV_ALIGN 64

/* Result of every call that can fail. Values are never reused. */
typedef enum tqkv_status {
    TQKV_OK = 0,
    TQKV_ERR_INVALID_ARG = 1, /* a NULL, a size or a range that the contract forbids */
    TQKV_ERR_NO_MEMORY = 2,   /* the allocator returned NULL */
    TQKV_ERR_FULL = 3,        /* no room for another token */
    TQKV_ERR_CORRUPT = 4,     /* stored bytes fail a check: truncated, flipped, foreign */
    TQKV_ERR_VERSION = 5,     /* stored bytes of a format version that this build does not read */
    TQKV_ERR_UNSUPPORTED = 6, /* a shape or a mode that this build cannot do */
    TQKV_ERR_IO = 7,          /* the operating system refused; the text names the file */
    TQKV_ERR_MISMATCH = 8,    /* valid, but made for another model or another calibration */
    TQKV_ERR_CANCELLED = 9,   /* a callback asked to stop */
    TQKV_STATUS_FORCE_32 = 0x7fffffff
} tqkv_status;

/* One sentence for a status, without a full stop. Never NULL. Threads: any. */
TQKV_API const char *tqkv_status_text(tqkv_status status);

/* "major.minor.patch" of the linked library. */
TQKV_API const char *tqkv_version(void);

/*
 * Where an object takes its memory from. Copied at creation; NULL in a config means malloc.
 * alloc: bytes > 0, align a power of two <= TQKV_ALIGN; NULL on failure. The library asks for
 * its own slack, the allocator adds none. free: accepts what alloc gave, never NULL.
 */
typedef struct tqkv_allocator {
    void *user;
    void *(*alloc)(void *user, size_t bytes, size_t align);
    void (*free)(void *user, void *ptr);
} tqkv_allocator;

typedef enum tqkv_log_level { TQKV_LOG_ERROR = 0, TQKV_LOG_WARN = 1, TQKV_LOG_INFO = 2 } tqkv_log_level;

/*
 * Where texts go. text: one line without newline, borrowed. The library never prints by itself:
 * a NULL logger drops the texts. Threads: called on the calling thread only.
 */
typedef struct tqkv_logger {
    void *user;
    void (*write)(void *user, tqkv_log_level level, const char *text);
} tqkv_logger;

/* Task i of a parallel call. worker < n_workers names the scratch that the task may use. */
typedef void tqkv_task_fn(void *task, size_t i, size_t worker);

/*
 * The caller's threads; the library starts none. run() calls fn(task, i, worker) once for each
 * i < n_tasks, in any order, and returns when all have ended; two tasks that run at the same time
 * have different workers. A NULL parallel means: one after another on the calling thread.
 * Results do not depend on n_workers.
 */
typedef struct tqkv_parallel {
    void *user;
    size_t n_workers; /* >= 1 */
    void (*run)(void *user, size_t n_tasks, tqkv_task_fn *fn, void *task);
} tqkv_parallel;

/* K or V. */
typedef enum tqkv_side { TQKV_SIDE_K = 0, TQKV_SIDE_V = 1 } tqkv_side;

#ifdef __cplusplus
}
#endif
#endif /* TURBOQUANT_TYPES_H */
