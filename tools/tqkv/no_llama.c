/* SPDX-License-Identifier: Apache-2.0 */
/* The commands that run a model, in a build without llama.cpp. */
#include "tool.h"

#ifndef TQKV_WITH_LLAMA

#include <stdio.h>
#include <string.h>

static int refuse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            printf("tqkv %s runs a model and needs a build with llama.cpp, which this is not.\n"
                   "Configure with -DTQKV_LLAMA=<build folder of llama.cpp>; 'make llama build' "
                   "does both.\n",
                   argv[0]);
            return TOOL_OK;
        }
    }
    return tool_error("this build has no llama.cpp in it; 'make llama build' makes one that has");
}

int cmd_eval(int argc, char **argv)
{
    return refuse(argc, argv);
}

int cmd_calibrate(int argc, char **argv)
{
    return refuse(argc, argv);
}

#else
typedef int no_llama_is_empty; /* ISO C forbids an empty file */
#endif
