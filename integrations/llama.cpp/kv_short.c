/* SPDX-License-Identifier: Apache-2.0 */
#include "kv_short.h"

#include <limits.h>
#include <stdlib.h>

#include "kv_backend.h"
#include "kv_cells.h"
#include "kv_rows.h"

enum { NO_TOKEN = INT32_MIN, PIECE = 256 };

/* Cells that the layer may use while it is short. */
static int64_t short_cells(const tqkvp_layer *layer)
{
    const int64_t n_rows = (int64_t)layer->n_cells * layer->n_streams;
    const tqkvp_config *config = &layer->buffer->config;
    const int64_t limit = config->mode == TQKVP_MODE_F16 ? 0 : config->short_tokens;

    return limit < n_rows ? limit : n_rows;
}

/* --- what a graph does to a layer --- */

/* The host filled it before the graph, so it can be read before the graph runs. */
static bool is_input(const ggml_tensor *t)
{
    return t && t->data && tqkvp_op_of(tqkvp_root(t)) == TQKVP_OP_NONE;
}

static bool rows_fit(const ggml_tensor *node, const tqkvp_tensor *tensor)
{
    const int64_t n = node->src[0]->ne[1], n_cells = short_cells(tensor->layer);
    int64_t cell;

    if (!is_input(node->src[1]) || node->src[0]->ne[2] != 1 || node->src[0]->ne[3] != 1)
        return false;
    for (int64_t i = 0; i < n; i++)
        if (!tqkvp_cell_at(node, tensor, i, &cell) || cell >= n_cells)
            return false;
    if (tensor->side != TQKV_SIDE_K)
        return true;
    const ggml_tensor *rope = tqkvp_rope_behind(node->src[0], !tensor->layer->sides[TQKV_SIDE_V]);
    return rope && is_input(rope->src[1]) && tqkvp_rope_positions(rope, n);
}

static bool node_fits(const ggml_tensor *node, const tqkvp_layer *layer)
{
    const tqkvp_tensor *result = tqkvp_tensor_of(node);

    if (layer->must_be_plain || layer->failed || short_cells(layer) == 0 || tqkvp_is_observed())
        return false;
    if (tqkvp_op_of(node) == TQKVP_OP_SET_ROWS)
        return result && rows_fit(node, result);
    if (tqkvp_op_of(node) != TQKVP_OP_FLASH_ATTN)
        return false;
    const tqkvp_tensor *k = tqkvp_tensor_of(node->src[1]), *v = tqkvp_tensor_of(node->src[2]);
    return k && v && k->layer == layer && v->layer == layer;
}

void tqkvp_short_look(tqkvp_layer *layer, const ggml_tensor *node)
{
    layer->outgrown = layer->outgrown || !node_fits(node, layer);
}

/* --- beginning --- */

bool tqkvp_short_goes_on(tqkvp_layer *layer)
{
    const size_t n = (size_t)short_cells(layer);

    if (layer->is_short || layer->outgrown || layer->written)
        return layer->is_short;
    layer->outgrown = true; /* unless all goes well */
    free(layer->positions);
    layer->positions = malloc(n * sizeof(*layer->positions));
    if (!layer->positions)
        return false;
    for (int side = 0; side < 2; side++)
        if (layer->sides[side] && !tqkvp_tensor_back(layer->sides[side]))
            return false;
    layer->outgrown = false;
    layer->is_short = true;
    tqkvp_short_clear(layer);
    return true;
}

void tqkvp_short_note(tqkvp_layer *layer, const ggml_tensor *node, const int32_t *positions)
{
    for (int64_t i = 0; i < node->src[0]->ne[1]; i++) {
        int64_t cell;
        if (tqkvp_cell_at(node, layer->sides[TQKV_SIDE_K], i, &cell))
            layer->positions[cell] = positions[i];
    }
    layer->written = true;
}

void tqkvp_short_clear(tqkvp_layer *layer)
{
    for (int64_t i = 0; i < short_cells(layer); i++)
        layer->positions[i] = NO_TOKEN;
}

size_t tqkvp_short_tokens(const tqkvp_layer *layer)
{
    size_t n = 0;

    for (int64_t i = 0; i < short_cells(layer); i++)
        n += layer->positions[i] != NO_TOKEN;
    return n;
}

/* --- the end --- */

/* Tokens in the order in which they were written, or nearly: by position. */
typedef struct token {
    int32_t position;
    int64_t cell;
} token;

static int compare(const void *a, const void *b)
{
    const token *x = a, *y = b;

    if (x->position != y->position)
        return x->position < y->position ? -1 : 1;
    return x->cell < y->cell ? -1 : x->cell > y->cell;
}

static tqkv_status put_side(tqkv_batch *batch, tqkvp_tensor *tensor, const int64_t *cells, size_t n,
                            float *rows)
{
    const size_t stride = (size_t)tensor->row_values;
    tqkv_status status = TQKV_OK;
    tqkvp_part parts[2];

    for (size_t i = 0; i < n; i++)
        if (!tqkvp_row_values(tensor, cells[i], rows + i * stride))
            return TQKV_ERR_UNSUPPORTED;
    const size_t n_parts = tqkvp_row_parts(tensor, parts);
    for (size_t i = 0; i < n_parts && status == TQKV_OK; i++)
        status = tqkv_batch_put(batch, parts[i].side, rows + parts[i].first, stride);
    return status;
}

static tqkv_status encode_piece(tqkvp_layer *layer, tqkv_batch *batch, const token *tokens,
                                size_t n, float *rows)
{
    int64_t cells[PIECE];
    int32_t positions[PIECE];

    for (size_t i = 0; i < n; i++) {
        cells[i] = tokens[i].cell;
        positions[i] = tokens[i].position;
    }
    tqkv_status status = tqkv_batch_begin(batch, layer->store, cells, positions, n);
    for (int side = 0; side < 2 && status == TQKV_OK; side++)
        if (layer->sides[side])
            status = put_side(batch, layer->sides[side], cells, n, rows);
    return status == TQKV_OK ? tqkv_batch_commit(batch, NULL) : status;
}

static tqkv_status encode(tqkvp_layer *layer)
{
    const size_t n = tqkvp_short_tokens(layer);
    int64_t widest = 0;
    size_t at = 0;
    tqkv_batch *batch = NULL;

    for (int side = 0; side < 2; side++)
        if (layer->sides[side] && layer->sides[side]->row_values > widest)
            widest = layer->sides[side]->row_values;
    token *tokens = malloc((n + 1) * sizeof(*tokens));
    float *rows = malloc(PIECE * (size_t)widest * sizeof(*rows));
    tqkv_status status = tokens && rows ? tqkv_batch_create(NULL, &batch) : TQKV_ERR_NO_MEMORY;
    if (status != TQKV_OK)
        goto done;
    for (int64_t i = 0; i < short_cells(layer); i++)
        if (layer->positions[i] != NO_TOKEN)
            tokens[at++] = (token){.position = layer->positions[i], .cell = i};
    qsort(tokens, n, sizeof(*tokens), compare);
    for (at = 0; at < n && status == TQKV_OK; at += PIECE)
        status = encode_piece(layer, batch, tokens + at, n - at < PIECE ? n - at : PIECE, rows);
done:
    tqkv_batch_destroy(batch);
    free(tokens);
    free(rows);
    return status;
}

tqkv_status tqkvp_short_end(tqkvp_layer *layer)
{
    const tqkv_status status = encode(layer);

    free(layer->positions);
    layer->positions = NULL;
    layer->is_short = false;
    layer->outgrown = true;
    for (int side = 0; side < 2; side++)
        if (layer->sides[side])
            tqkvp_tensor_unback(layer->sides[side]);
    return status;
}
