/* SPDX-License-Identifier: Apache-2.0 */
/* Text files as tokens, cut into pieces. */
#ifndef TQKV_TEXT_PIECES_H
#define TQKV_TEXT_PIECES_H

#include "host_llama.h"
#include "tool.h"

typedef struct text_tokens {
    const char *path; /* kept */
    int32_t *tokens;
    size_t n;
} text_tokens;

/* Reads and tokenises a file. Returns an exit code; says why it failed. */
int text_tokens_read(host *h, const char *path, text_tokens *out);
void text_tokens_free(text_tokens *text);

/* Share of the runs of four tokens that have come before: near 0 in prose, near 1 in copies. */
double text_repeated(const text_tokens *text);

/*
 * Copies n tokens from `first` on to `piece`, the first one replaced by the token that opens a text
 * where the model wants one.
 */
void text_piece(const host *h, const text_tokens *text, size_t first, uint32_t n, int32_t *piece);

#endif /* TQKV_TEXT_PIECES_H */
