/* SPDX-License-Identifier: Apache-2.0 */
/* The few facts of a GGUF file's header that say which plan fits, without llama.cpp. */
#ifndef TQKV_GGUF_HEAD_H
#define TQKV_GGUF_HEAD_H

#include <stdbool.h>
#include <stdint.h>

#define GGUF_LAYERS_MAX 1024

typedef struct gguf_head {
    char arch[64];
    char name[128]; /* general.name; the file's name where there is none */
    uint64_t file_bytes;
    uint32_t n_layers; /* without layers that only predict ahead */
    uint32_t n_embd;
    uint32_t n_ctx_train;
    uint32_t window; /* attention.sliding_window, 0: none */
    uint32_t k_dim, v_dim;
    uint32_t k_dim_swa, v_dim_swa; /* of sliding layers, where the file tells them apart; else 0 */
    uint32_t n_heads[GGUF_LAYERS_MAX];
    uint32_t n_kv_heads[GGUF_LAYERS_MAX]; /* 0: a layer without attention */
    bool is_latent; /* multi-head latent attention: what is cached has other shapes */
} gguf_head;

/* Fails with a message that names the file and the field. Returns an exit code. */
int gguf_head_read(const char *path, gguf_head *out);

#endif /* TQKV_GGUF_HEAD_H */
