/* SPDX-License-Identifier: Apache-2.0 */
#include "text_pieces.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TEXT_BYTES_MAX (256u << 20)

enum { RUN_TOKENS = 4 };

/* The whole file; NULL after a message. */
static char *read_file(const char *path, size_t *n_bytes)
{
    FILE *file = fopen(path, "rb");
    char *text = NULL;
    size_t n = 0, room = 0, got = 0;
    if (!file) {
        tool_error("text %s: %s", path, strerror(errno));
        return NULL;
    }
    do {
        if (room - n < 65536) {
            room = room ? 2 * room : 1u << 20;
            text = tool_grow(text, room, 1);
        }
        errno = 0;
        got = fread(text + n, 1, room - n, file);
        n += got;
    } while (got && n <= TEXT_BYTES_MAX);
    const bool has_failed = ferror(file) || n > TEXT_BYTES_MAX;
    if (has_failed)
        tool_error("text %s: %s", path,
                   n > TEXT_BYTES_MAX ? "longer than 256 MiB" : strerror(errno));
    fclose(file);
    if (has_failed) {
        free(text);
        return NULL;
    }
    *n_bytes = n;
    return text;
}

int text_tokens_read(host *h, const char *path, text_tokens *out)
{
    size_t n_bytes = 0;
    *out = (text_tokens){.path = path};
    char *text = read_file(path, &n_bytes);
    if (!text)
        return TOOL_FAILED;
    const int rc = host_tokenize(h, text, n_bytes, &out->tokens, &out->n);
    free(text);
    return rc;
}

void text_tokens_free(text_tokens *text)
{
    free(text->tokens);
    *text = (text_tokens){0};
}

static int compare_runs(const void *a, const void *b)
{
    return memcmp(a, b, RUN_TOKENS * sizeof(int32_t));
}

double text_repeated(const text_tokens *text)
{
    if (text->n < RUN_TOKENS + 1)
        return 0;
    const size_t n = text->n - RUN_TOKENS + 1;
    int32_t *runs = tool_alloc(n * RUN_TOKENS, sizeof(*runs));
    size_t n_repeated = 0;
    for (size_t i = 0; i < n; i++)
        memcpy(runs + i * RUN_TOKENS, text->tokens + i, RUN_TOKENS * sizeof(*runs));
    qsort(runs, n, RUN_TOKENS * sizeof(*runs), compare_runs);
    for (size_t i = 1; i < n; i++)
        n_repeated += compare_runs(runs + (i - 1) * RUN_TOKENS, runs + i * RUN_TOKENS) == 0;
    free(runs);
    return (double)n_repeated / (double)n;
}

void text_piece(const host *h, const text_tokens *text, size_t first, uint32_t n, int32_t *piece)
{
    memcpy(piece, text->tokens + first, n * sizeof(*piece));
    const int32_t opening = host_first_token(h);
    if (opening >= 0)
        piece[0] = opening;
}
