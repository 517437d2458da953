/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The weights of a model in f32, for measuring what a coarse cache does.
 *
 * llama.cpp rounds activations to 8 bits where weights are quantised. Any change to the cache moves
 * that rounding, and the KL of it hides what the less sensitive layers lose. With f32 weights the
 * model is the same and nothing is rounded.
 */
#ifndef TQKV_F32_WEIGHTS_H
#define TQKV_F32_WEIGHTS_H

#include <stdbool.h>
#include <stdint.h>

enum { F32_WEIGHTS_PATH_CHARS = 32 };

typedef struct f32_weights {
    int file; /* descriptor; -1: none */
    char path[F32_WEIGHTS_PATH_CHARS];
} f32_weights;

/* Whether weights are quantised and their f32 copy takes at most half of the machine's memory. */
bool f32_weights_help(const char *model_path);

/*
 * Writes the copy into a file that has no name, so that nothing is left of it however the program
 * ends, in the folder of `beside`. Its path is good while the file is open. Returns an exit code
 * after a message.
 */
int f32_weights_open(const char *model_path, const char *beside, uint32_t n_threads,
                     f32_weights *out);
void f32_weights_close(f32_weights *weights);

#endif /* TQKV_F32_WEIGHTS_H */
