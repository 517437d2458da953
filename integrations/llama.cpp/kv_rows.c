/* SPDX-License-Identifier: Apache-2.0 */
#include "kv_rows.h"

#include <stdlib.h>
#include <string.h>

#include "cpu_delegate.h"
#include "float_bits.h"
#include "kv_cells.h"

static tqkvp_cpu *converter(tqkvp_buffer *buffer)
{
    if (!buffer->cpu)
        buffer->cpu = tqkvp_cpu_create();
    return buffer->cpu;
}

/* One row of values to the declared type and back. */
static bool encode_row(tqkvp_tensor *tensor, const float *row, uint8_t *to)
{
    const size_t n = (size_t)tensor->row_values;

    switch (tensor->type) {
    case TQKVP_TYPE_F32:
        memcpy(to, row, n * sizeof(*row));
        return true;
    case TQKVP_TYPE_F16:
    case TQKVP_TYPE_BF16:
        for (size_t i = 0; i < n; i++) {
            const uint16_t half = tensor->type == TQKVP_TYPE_F16 ? tqkvp_f32_to_f16(row[i])
                                                                 : tqkvp_f32_to_bf16(row[i]);
            memcpy(to + 2 * i, &half, sizeof(half));
        }
        return true;
    default: {
        tqkvp_cpu *cpu = converter(tensor->layer->buffer);
        return cpu && tqkvp_cpu_from_f32(cpu, tensor->ggml_type, row, to, tensor->row_values);
    }
    }
}

static bool decode_row(tqkvp_tensor *tensor, const uint8_t *from, float *row)
{
    const size_t n = (size_t)tensor->row_values;

    switch (tensor->type) {
    case TQKVP_TYPE_F32:
        memcpy(row, from, n * sizeof(*row));
        return true;
    case TQKVP_TYPE_F16:
    case TQKVP_TYPE_BF16:
        for (size_t i = 0; i < n; i++) {
            uint16_t half;
            memcpy(&half, from + 2 * i, sizeof(half));
            row[i] =
                tensor->type == TQKVP_TYPE_F16 ? tqkvp_f16_to_f32(half) : tqkvp_bf16_to_f32(half);
        }
        return true;
    default: {
        tqkvp_cpu *cpu = converter(tensor->layer->buffer);
        return cpu && tqkvp_cpu_to_f32(cpu, tensor->ggml_type, from, row, tensor->row_values);
    }
    }
}

bool tqkvp_row_values(tqkvp_tensor *tensor, int64_t row, float *values)
{
    return decode_row(tensor, tensor->plain + (size_t)row * tensor->row_bytes, values);
}

static float *new_row(const tqkvp_tensor *tensor)
{
    return calloc((size_t)tensor->row_values, sizeof(float));
}

static void warn_record(tqkvp_tensor *tensor, const char *text)
{
    tqkvp_buffer *buffer = tensor->layer->buffer;

    if (!buffer->warned_record)
        tqkvp_say("%s", text);
    buffer->warned_record = true;
}

static bool is_zero(const void *bytes, size_t n)
{
    const uint8_t *p = bytes;

    for (size_t i = 0; i < n; i++)
        if (p[i])
            return false;
    return true;
}

/* --- reading --- */

bool tqkvp_rows_decode(tqkvp_tensor *tensor, int64_t first, int64_t n, uint8_t *to)
{
    const size_t row_values_bytes = (size_t)tensor->row_values * sizeof(float);
    float *row = new_row(tensor);
    bool ok = row != NULL;

    for (int64_t i = 0; i < n && ok; i++) {
        uint8_t *place = to + (size_t)i * tensor->row_bytes;
        ok = tqkvp_cell_read(tensor, first + i, row) == TQKV_OK;
        /* zero is zero in every type, and unwritten memory stays untouched */
        if (ok && is_zero(row, row_values_bytes)) {
            if (!is_zero(place, tensor->row_bytes))
                memset(place, 0, tensor->row_bytes);
        } else {
            ok = ok && encode_row(tensor, row, place);
        }
    }
    free(row);
    return ok;
}

/* Room for a record of the store where rows of this tensor are given out as records, else 0. */
static size_t record_room(const tqkvp_tensor *tensor)
{
    const tqkvp_layer *layer = tensor->layer;

    if (layer->buffer->config.portable_state || tensor->type != TQKVP_TYPE_F16)
        return 0;
    const size_t bytes = tqkvp_cell_record_bytes(tensor);
    return bytes > 0 && bytes <= tensor->row_bytes ? bytes : 0;
}

/* record: record_room() bytes, or NULL. */
static void get_row(tqkvp_tensor *tensor, int64_t row, uint8_t *record, uint8_t *to)
{
    size_t n = 0;

    memset(to, 0, tensor->row_bytes);
    if (!record) {
        if (!tqkvp_rows_decode(tensor, row, 1, to))
            warn_record(tensor, "a state was saved with rows missing: the cache type cannot be "
                                "converted; leave -ctk and -ctv at f16");
    } else if (tqkvp_cell_export(tensor, row, record, &n) == TQKV_OK && n <= tensor->row_bytes) {
        memcpy(to, record, n);
    }
}

void tqkvp_rows_get(tqkvp_tensor *tensor, size_t offset, void *to, size_t n)
{
    tqkvp_layer *layer = tensor->layer;
    uint8_t *out = to, *row_bytes = NULL, *record = NULL;

    if (layer->is_short)
        (void)tqkvp_layer_open(layer);
    tqkvp_rows_settle(tensor);
    if (layer->plain) {
        memcpy(to, tensor->plain + offset, n);
        return;
    }
    memset(to, 0, n);
    if (!layer->store)
        return; /* nothing was ever stored */

    const size_t room = record_room(tensor);
    row_bytes = malloc(tensor->row_bytes);
    record = room ? malloc(room) : NULL;
    if (!row_bytes || (room && !record)) {
        warn_record(tensor, "a state was saved with rows missing: no memory");
        goto done;
    }
    while (n > 0) {
        const size_t in_row = offset % tensor->row_bytes;
        const size_t part = n < tensor->row_bytes - in_row ? n : tensor->row_bytes - in_row;
        get_row(tensor, (int64_t)(offset / tensor->row_bytes), record, row_bytes);
        memcpy(out, row_bytes + in_row, part);
        out += part;
        offset += part;
        n -= part;
    }
done:
    free(row_bytes);
    free(record);
}

/* --- writing --- */

static void mark_written(tqkvp_layer *layer)
{
    layer->written = true;
    layer->copied_from = NULL;
}

static void write_values(tqkvp_tensor *tensor, int64_t cell, const uint8_t *from)
{
    const size_t values_bytes = (size_t)tensor->row_values * sizeof(float);
    float *row = new_row(tensor);

    if (!row) {
        warn_record(tensor, "a state was restored with rows missing: no memory");
        return;
    }
    if (is_zero(from, tensor->row_bytes)) {
        /* a cell that holds nothing stays without memory */
        if (tqkvp_cell_read(tensor, cell, row) == TQKV_OK && is_zero(row, values_bytes))
            goto done;
        memset(row, 0, values_bytes);
    } else if (!decode_row(tensor, from, row)) {
        warn_record(tensor, "a state was restored with rows missing: the cache type cannot be "
                            "converted; leave -ctk and -ctv at f16");
        goto done;
    }
    if (tqkvp_cell_write(tensor, cell, row) != TQKV_OK)
        warn_record(tensor, "a state was restored with rows missing: the store refused a row");
done:
    free(row);
}

static void set_row(tqkvp_tensor *tensor, int64_t cell, const uint8_t *from)
{
    uint16_t first;

    memcpy(&first, from, sizeof(first));
    if (tensor->type != TQKVP_TYPE_F16 || !tqkvp_f16_is_nan(first)) {
        write_values(tensor, cell, from);
        return;
    }
    const tqkv_status status = tqkvp_cell_import(tensor, cell, from, tensor->row_bytes);
    if (status == TQKV_OK)
        return;
    if (status == TQKV_ERR_MISMATCH)
        warn_record(tensor,
                    "a state was saved with another plan or mode: its cells are left empty. "
                    "Restore it with the plan it was saved with, or save with "
                    "TQKV_STATE=portable");
    else
        warn_record(tensor, "a state holds damaged records: those cells are left empty");
    /* whatever the cell held belongs to another token */
    uint8_t *empty = calloc(1, tensor->row_bytes);
    if (empty)
        write_values(tensor, cell, empty);
    free(empty);
}

/* Collects the parts of a row that the host sets piece by piece. */
static void set_part(tqkvp_tensor *tensor, int64_t row, size_t from, const uint8_t *bytes, size_t n)
{
    if (tensor->partial_row != row || from != tensor->partial_to)
        tqkvp_rows_settle(tensor);
    if (!tensor->partial && !(tensor->partial = malloc(tensor->row_bytes)))
        return;
    if (tensor->partial_row != row) {
        tensor->partial_row = row;
        tensor->partial_from = from;
    }
    memcpy(tensor->partial + from, bytes, n);
    tensor->partial_to = from + n;
    if (tensor->partial_from == 0 && tensor->partial_to == tensor->row_bytes) {
        tensor->partial_row = -1;
        set_row(tensor, row, tensor->partial);
    }
}

void tqkvp_rows_settle(tqkvp_tensor *tensor)
{
    const int64_t row = tensor->partial_row;

    if (row < 0)
        return;
    tensor->partial_row = -1;
    if (tensor->layer->plain || !tensor->layer->store)
        return;
    /* the bytes that were not set are what the cell holds, as values */
    uint8_t *whole = calloc(1, tensor->row_bytes);
    if (whole && tqkvp_rows_decode(tensor, row, 1, whole)) {
        memcpy(whole + tensor->partial_from, tensor->partial + tensor->partial_from,
               tensor->partial_to - tensor->partial_from);
        set_row(tensor, row, whole);
    }
    free(whole);
}

void tqkvp_rows_set(tqkvp_tensor *tensor, size_t offset, const void *from, size_t n)
{
    tqkvp_layer *layer = tensor->layer;
    const uint8_t *bytes = from;

    if (tqkvp_layer_open(layer) != GGML_OK)
        return;
    mark_written(layer);
    if (layer->plain) {
        memcpy(tensor->plain + offset, from, n);
        return;
    }
    while (n > 0) {
        const int64_t row = (int64_t)(offset / tensor->row_bytes);
        const size_t in_row = offset % tensor->row_bytes;
        const size_t part = n < tensor->row_bytes - in_row ? n : tensor->row_bytes - in_row;
        if (part == tensor->row_bytes)
            set_row(tensor, row, bytes);
        else
            set_part(tensor, row, in_row, bytes, part);
        bytes += part;
        offset += part;
        n -= part;
    }
}

void tqkvp_rows_fill(tqkvp_tensor *tensor, size_t offset, uint8_t value, size_t n)
{
    const tqkvp_layer *layer = tensor->layer;
    uint8_t chunk[1024];

    if (value == 0 && !layer->plain && !layer->store)
        return; /* zero already */
    memset(chunk, value, sizeof(chunk));
    while (n > 0) {
        const size_t part = n < sizeof(chunk) ? n : sizeof(chunk);
        tqkvp_rows_set(tensor, offset, chunk, part);
        offset += part;
        n -= part;
    }
}

/* --- for programs --- */

typedef struct layer_search {
    uint32_t index;
    tqkvp_layer *found;
} layer_search;

static void find_layer(void *user, tqkvp_buffer *buffer)
{
    layer_search *search = user;

    for (size_t i = 0; i < buffer->n_layers; i++)
        if (buffer->layers[i]->index == search->index)
            search->found = buffer->layers[i];
}

int tqkvp_kv_rows(uint32_t layer, uint32_t side, uint64_t first, size_t n, float *rows, int is_write)
{
    layer_search search = {.index = layer};

    tqkvp_buffers_each(tqkvp_context_last(), find_layer, &search);
    if (!search.found || !search.found->store || side > TQKV_SIDE_V ||
        (search.found->is_short && tqkvp_layer_open(search.found) != GGML_OK))
        return -1;
    const tqkvp_tensor *tensor = search.found->sides[side];
    if (!tensor)
        tensor = search.found->sides[TQKV_SIDE_K]; /* of a latent layer, with both sides in it */
    tqkvp_part parts[2];
    size_t part = tqkvp_row_parts(tensor, parts) - 1;
    if (parts[part].side != (tqkv_side)side)
        part = 0;
    if (first > (uint64_t)tensor->n_rows || n > (uint64_t)tensor->n_rows - first)
        return -1;
    if (is_write)
        mark_written(search.found);
    for (size_t i = 0; i < n; i++) {
        float *row = rows + i * (size_t)parts[part].n;
        const int64_t cell = (int64_t)(first + i);
        const tqkv_status status =
            is_write ? tqkv_store_write(search.found->store, cell, (tqkv_side)side, NULL, row)
                     : tqkv_store_read(search.found->store, cell, (tqkv_side)side, row);
        if (status != TQKV_OK)
            return -1;
    }
    return 0;
}
