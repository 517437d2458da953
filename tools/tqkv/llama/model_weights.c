/* SPDX-License-Identifier: Apache-2.0 */
#include "model_weights.h"

#include <errno.h>
#include <ggml.h>
#include <gguf.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

struct model_weights {
    struct gguf_context *gguf;
    FILE *file;
};

int model_weights_open(const char *path, model_weights **out)
{
    model_weights *weights = tool_alloc(1, sizeof(*weights));
    *out = NULL;
    weights->file = fopen(path, "rb");
    if (weights->file)
        weights->gguf = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true});
    if (!weights->gguf) {
        const int rc = tool_error("model %s: %s", path,
                                  weights->file ? "its tensors cannot be read" : strerror(errno));
        model_weights_close(weights);
        return rc;
    }
    *out = weights;
    return TOOL_OK;
}

void model_weights_close(model_weights *weights)
{
    if (!weights)
        return;
    if (weights->gguf)
        gguf_free(weights->gguf);
    if (weights->file)
        fclose(weights->file);
    free(weights);
}

float *model_weights_attention_output(model_weights *weights, uint32_t layer, size_t n_in,
                                      size_t *n_out)
{
    char *name = tool_format("blk.%u.attn_output.weight", layer);
    const int64_t id = gguf_find_tensor(weights->gguf, name);
    free(name);
    *n_out = 0;
    if (id < 0)
        return NULL;
    const enum ggml_type type = gguf_get_tensor_type(weights->gguf, id);
    const struct ggml_type_traits *traits = ggml_get_type_traits(type);
    const size_t n_bytes = gguf_get_tensor_size(weights->gguf, id);
    const size_t row_bytes = ggml_row_size(type, (int64_t)n_in);
    if ((type != GGML_TYPE_F32 && !traits->to_float) || !row_bytes ||
        n_in % (size_t)traits->blck_size || n_bytes % row_bytes)
        return NULL;
    const size_t n_rows = n_bytes / row_bytes;
    const uint64_t offset =
        gguf_get_data_offset(weights->gguf) + gguf_get_tensor_offset(weights->gguf, id);
    uint8_t *bytes = tool_alloc(n_bytes, 1);
    float *values = NULL;
    if (fseeko(weights->file, (off_t)offset, SEEK_SET) == 0 &&
        fread(bytes, 1, n_bytes, weights->file) == n_bytes) {
        values = tool_alloc(n_rows * n_in, sizeof(*values));
        for (size_t i = 0; i < n_rows; i++) {
            if (type == GGML_TYPE_F32)
                memcpy(values + i * n_in, bytes + i * row_bytes, row_bytes);
            else
                traits->to_float(bytes + i * row_bytes, values + i * n_in, (int64_t)n_in);
        }
        *n_out = n_rows;
    }
    free(bytes);
    return values;
}
