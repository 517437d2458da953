/* SPDX-License-Identifier: Apache-2.0 */
/* Weights of a GGUF file as f32. */
#ifndef TQKV_MODEL_WEIGHTS_H
#define TQKV_MODEL_WEIGHTS_H

#include <stddef.h>
#include <stdint.h>

typedef struct model_weights model_weights;

/* Returns an exit code; says why it failed. */
int model_weights_open(const char *path, model_weights **out);
void model_weights_close(model_weights *weights);

/*
 * The projection after attention of a layer, [n_out][n_in] f32, given. NULL: the file has none of
 * that name with n_in inputs, or its type has no conversion.
 */
float *model_weights_attention_output(model_weights *weights, uint32_t layer, size_t n_in,
                                      size_t *n_out);

/*
 * The same of a latent layer: head h makes its values of the weighted sum of latents by attn_v_b, then
 * comes the projection. [n_out][n_heads * rank] f32, given, or NULL.
 */
float *model_weights_latent_output(model_weights *weights, uint32_t layer, size_t n_heads,
                                   size_t rank, size_t *n_out);

#endif /* TQKV_MODEL_WEIGHTS_H */
