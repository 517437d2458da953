/* SPDX-License-Identifier: Apache-2.0 */
/* Texts of statuses, and the version of the library. */
#include "turboquant/types.h"

#ifndef TQKV_VERSION_STRING /* CMake gives the version of the project */
#define TQKV_VERSION_STRING "0.0.0"
#endif

const char *tqkv_status_text(tqkv_status status)
{
    switch (status) {
    case TQKV_OK:
        return "no error";
    case TQKV_ERR_INVALID_ARG:
        return "an argument is NULL or outside of its range";
    case TQKV_ERR_NO_MEMORY:
        return "out of memory";
    case TQKV_ERR_FULL:
        return "no room for another token";
    case TQKV_ERR_CORRUPT:
        return "the stored bytes are truncated, damaged or not ours";
    case TQKV_ERR_VERSION:
        return "the stored bytes have a format version that this build does not read";
    case TQKV_ERR_UNSUPPORTED:
        return "this build cannot do this shape or mode";
    case TQKV_ERR_IO:
        return "the operating system refused a file operation";
    case TQKV_ERR_MISMATCH:
        return "the stored bytes were made for another model or another calibration";
    case TQKV_ERR_CANCELLED:
        return "a callback asked to stop";
    case TQKV_STATUS_FORCE_32:
        break;
    }
    return "unknown status";
}

const char *tqkv_version(void)
{
    return TQKV_VERSION_STRING;
}
