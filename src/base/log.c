/* SPDX-License-Identifier: Apache-2.0 */
/* One formatted line to the caller's logger. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

void tqkvi_log(const tqkv_logger *log, tqkv_log_level level, const char *fmt, ...)
{
    if (!log || !log->write)
        return;
    char text[TQKVI_LOG_CHARS];
    va_list args;
    va_start(args, fmt);
    const int n = vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    if (n < 0)
        return;
    for (char *c = text; *c; c++) {
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = ' ';
    }
    log->write(log->user, level, text);
}
