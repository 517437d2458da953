/* SPDX-License-Identifier: Apache-2.0 */
#include "kv_cells.h"

#include <string.h>

size_t tqkvp_row_parts(const tqkvp_tensor *tensor, tqkvp_part parts[2])
{
    const tqkvp_layer *layer = tensor->layer;
    const tqkv_plan_layer *shape = &layer->shape;

    if (!shape->is_latent) {
        parts[0] = (tqkvp_part){.side = tensor->side, .n = tensor->row_values};
        return 1;
    }
    parts[0] = (tqkvp_part){.side = TQKV_SIDE_K, .n = shape->k_dim};
    parts[1] = (tqkvp_part){.side = TQKV_SIDE_V, .n = shape->v_dim};
    parts[layer->turned_first].first = parts[!layer->turned_first].n;
    return 2;
}

bool tqkvp_cell_at(const ggml_tensor *node, const tqkvp_tensor *tensor, int64_t i, int64_t *cell)
{
    const ggml_tensor *indices = node->src[1];
    const char *index = (const char *)indices->data + (size_t)i * indices->nb[0];
    int32_t narrow;

    switch (tqkvp_type_of(indices)) {
    case TQKVP_TYPE_I64:
        memcpy(cell, index, sizeof(*cell));
        break;
    case TQKVP_TYPE_I32:
        memcpy(&narrow, index, sizeof(narrow));
        *cell = narrow;
        break;
    default:
        return false;
    }
    *cell += (int64_t)((node->view_src ? node->view_offs : 0) / tensor->row_bytes);
    return *cell >= 0 && *cell < tensor->n_rows;
}

tqkv_status tqkvp_cell_read(const tqkvp_tensor *tensor, int64_t cell, float *row)
{
    tqkv_status status = TQKV_OK;
    tqkvp_part parts[2];
    const size_t n = tqkvp_row_parts(tensor, parts);

    for (size_t i = 0; i < n && status == TQKV_OK; i++)
        status =
            tqkv_store_read(tensor->layer->store, cell, parts[i].side, row + parts[i].first);
    return status;
}

tqkv_status tqkvp_cell_write(const tqkvp_tensor *tensor, int64_t cell, const float *row)
{
    tqkv_status status = TQKV_OK;
    tqkvp_part parts[2];
    const size_t n = tqkvp_row_parts(tensor, parts);

    for (size_t i = 0; i < n && status == TQKV_OK; i++)
        status = tqkv_store_write(tensor->layer->store, cell, parts[i].side, NULL,
                                  row + parts[i].first);
    return status;
}

size_t tqkvp_cell_record_bytes(const tqkvp_tensor *tensor)
{
    size_t bytes = 0;
    tqkvp_part parts[2];
    const size_t n = tqkvp_row_parts(tensor, parts);

    for (size_t i = 0; i < n; i++)
        bytes += tqkv_store_record_bytes(tensor->layer->store, parts[i].side);
    return bytes;
}

tqkv_status tqkvp_cell_export(const tqkvp_tensor *tensor, int64_t cell, uint8_t *records,
                              size_t *n_bytes)
{
    tqkv_status status = TQKV_OK;
    tqkvp_part parts[2];
    const size_t n = tqkvp_row_parts(tensor, parts);

    *n_bytes = 0;
    for (size_t i = 0; i < n && status == TQKV_OK; i++) {
        size_t used = 0;
        status = tqkv_store_export(tensor->layer->store, cell, parts[i].side, records + *n_bytes,
                                   &used);
        *n_bytes += used;
    }
    return status;
}

/* Bytes of a record, as it says itself (docs/FORMAT.md, "Records"); 0 where they are not there. */
static size_t record_length(const uint8_t *record, size_t n_bytes)
{
    enum { LENGTH_AT = 24 };
    uint32_t length = 0;

    if (n_bytes < LENGTH_AT + 4)
        return 0;
    for (int i = 3; i >= 0; i--)
        length = length << 8 | record[LENGTH_AT + i];
    return length <= n_bytes ? length : 0;
}

tqkv_status tqkvp_cell_import(const tqkvp_tensor *tensor, int64_t cell, const uint8_t *records,
                              size_t n_bytes)
{
    tqkv_status status = TQKV_OK;
    tqkvp_part parts[2];
    const size_t n = tqkvp_row_parts(tensor, parts);

    for (size_t i = 0; i < n && status == TQKV_OK; i++) {
        const size_t length = record_length(records, n_bytes);
        status = tqkv_store_import(tensor->layer->store, cell, parts[i].side, records, length);
        records += length;
        n_bytes -= length;
    }
    return status;
}
