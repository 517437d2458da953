/* SPDX-License-Identifier: Apache-2.0 */
#include "f32_weights.h"

#include <errno.h>
#include <ggml.h>
#include <gguf.h>
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "interrupt.h"
#include "tool.h"

bool f32_weights_help(const char *model_path)
{
    const double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    struct ggml_context *tensors = NULL;
    struct gguf_context *gguf = gguf_init_from_file(
        model_path, (struct gguf_init_params){.no_alloc = true, .ctx = &tensors});
    double bytes = 0;
    bool is_quantized = false;
    for (struct ggml_tensor *t = tensors ? ggml_get_first_tensor(tensors) : NULL; t;
         t = ggml_get_next_tensor(tensors, t)) {
        bytes += 4.0 * (double)ggml_nelements(t);
        is_quantized = is_quantized || ggml_is_quantized(t->type);
    }
    ggml_free(tensors);
    gguf_free(gguf);
    return is_quantized && bytes <= memory / 2;
}

/* A file without a name in the folder of `beside`; a descriptor, or -1. */
static int open_nameless(const char *beside)
{
    char *path = tool_format("%s.f32.XXXXXX", beside);
    interrupt_hold();
    const int file = mkstemp(path);
    const int error = errno;
    if (file >= 0)
        unlink(path);
    interrupt_release();
    free(path);
    errno = error;
    return file;
}

int f32_weights_open(const char *model_path, const char *beside, uint32_t n_threads,
                     f32_weights *out)
{
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_ALL_F32;
    params.allow_requantize = true;
    params.nthread = (int32_t)n_threads;
    out->file = open_nameless(beside);
    if (out->file < 0)
        return tool_error("weights in f32 beside %s: %s", beside, strerror(errno));
    snprintf(out->path, sizeof(out->path), "/proc/self/fd/%d", out->file);
    if (llama_model_quantize(model_path, out->path, &params) == 0)
        return TOOL_OK;
    f32_weights_close(out);
    return tool_error("weights of %s cannot be written in f32 beside %s (space?); --weights file does "
                      "without",
                      model_path, beside);
}

void f32_weights_close(f32_weights *weights)
{
    if (weights->file >= 0)
        close(weights->file);
    weights->file = -1;
}
