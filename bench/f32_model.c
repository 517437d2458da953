/* SPDX-License-Identifier: Apache-2.0 */
/*
 * f32_model FROM.gguf TO.gguf: the same model with its weights in f32.
 *
 * llama.cpp rounds activations to 8 bits where weights are quantised, so that any change to the
 * cache, even another order of summation, moves its logits. With f32 weights nothing is rounded and
 * what is left is the loss of the cache. bench/quality.py measures such a copy as MODEL-f32.
 */
#include <llama.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_ALL_F32;
    params.allow_requantize = true;
    if (argc != 3) {
        fprintf(stderr, "Usage: f32_model FROM.gguf TO.gguf\n");
        return 2;
    }
    return llama_model_quantize(argv[1], argv[2], &params) ? 1 : 0;
}
