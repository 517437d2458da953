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

/* A tensor of a layer as rows of n_in values, [n_rows][n_in] f32, given. NULL: there is none such. */
static float *read_rows(model_weights *weights, const char *tensor, uint32_t layer, size_t n_in,
                        size_t *n_rows_out)
{
    char *name = tool_format("blk.%u.%s.weight", layer, tensor);
    const int64_t id = gguf_find_tensor(weights->gguf, name);
    free(name);
    *n_rows_out = 0;
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
        *n_rows_out = n_rows;
    }
    free(bytes);
    return values;
}

float *model_weights_attention_output(model_weights *weights, uint32_t layer, size_t n_in,
                                      size_t *n_out)
{
    return read_rows(weights, "attn_output", layer, n_in, n_out);
}

float *model_weights_latent_output(model_weights *weights, uint32_t layer, size_t n_heads,
                                   size_t rank, size_t *n_out)
{
    size_t n_values; /* of all heads */
    float *product = NULL, *w_o = NULL, *to_values;

    *n_out = 0;
    to_values = read_rows(weights, "attn_v_b", layer, rank, &n_values);
    if (to_values && n_values % n_heads == 0)
        w_o = read_rows(weights, "attn_output", layer, n_values, n_out);
    if (w_o)
        product = tool_alloc(*n_out * n_heads * rank, sizeof(*product));
    for (size_t r = 0; w_o && r < *n_out; r++) {
        for (size_t j = 0; j < n_values; j++) {
            const float f = w_o[r * n_values + j];
            float *to = product + (r * n_heads + j / (n_values / n_heads)) * rank;
            for (size_t i = 0; i < rank; i++)
                to[i] += f * to_values[j * rank + i];
        }
    }
    free(w_o);
    free(to_values);
    return product;
}
