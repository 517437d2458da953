/* SPDX-License-Identifier: Apache-2.0 */
/* One formatted line to the caller's logger. */
#ifndef TQKVI_LOG_H
#define TQKVI_LOG_H

#include "turboquant/types.h"

#define TQKVI_LOG_CHARS 512 /* longer texts are cut */

#if defined(__GNUC__)
#define TQKVI_PRINTF(fmt_arg, first_arg) __attribute__((format(printf, fmt_arg, first_arg)))
#else
#define TQKVI_PRINTF(fmt_arg, first_arg)
#endif

/* log may be NULL (nothing happens). Control characters, newlines included, become spaces. */
void tqkvi_log(const tqkv_logger *log, tqkv_log_level level, const char *fmt, ...)
    TQKVI_PRINTF(3, 4);

#endif /* TQKVI_LOG_H */
