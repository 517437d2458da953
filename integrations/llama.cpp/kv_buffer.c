/* SPDX-License-Identifier: Apache-2.0 */
#include "kv_buffer.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cpu_delegate.h"
#include "kv_layer.h"
#include "kv_rows.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

static ggml_buffer_type buffer_type;
static pthread_mutex_t buffers_lock = PTHREAD_MUTEX_INITIALIZER;
static tqkvp_buffer *buffers;
static atomic_uint_fast64_t last_context;

ggml_buffer_type *tqkvp_buffer_type(void)
{
    return &buffer_type;
}

bool tqkvp_is_ours(const ggml_tensor *t)
{
    const ggml_tensor *root = tqkvp_root(t);

    return root->buffer && tqkvp_buffer_type_of(root->buffer) == &buffer_type;
}

uint64_t tqkvp_context_begin(void)
{
    return atomic_fetch_add(&last_context, 1) + 1;
}

uint64_t tqkvp_context_last(void)
{
    return atomic_load(&last_context);
}

void tqkvp_buffers_each(uint64_t context, void (*fn)(void *user, tqkvp_buffer *buffer), void *user)
{
    enum { BUFFERS_MAX = 64 };
    tqkvp_buffer *found[BUFFERS_MAX];
    size_t n = 0;

    pthread_mutex_lock(&buffers_lock);
    for (tqkvp_buffer *b = buffers; b && n < BUFFERS_MAX; b = b->next)
        if (b->context == context && b->n_layers > 0)
            found[n++] = b;
    pthread_mutex_unlock(&buffers_lock);
    while (n-- > 0)
        fn(user, found[n]);
}

/* --- a buffer --- */

static void buffer_destroy(tqkvp_buffer *buffer)
{
    if (!buffer)
        return;
    pthread_mutex_lock(&buffers_lock);
    for (tqkvp_buffer **at = &buffers; *at; at = &(*at)->next) {
        if (*at == buffer) {
            *at = buffer->next;
            break;
        }
    }
    pthread_mutex_unlock(&buffers_lock);
    for (size_t i = 0; i < buffer->n_layers; i++)
        tqkvp_layer_destroy(buffer->layers[i]);
    free(buffer->layers);
    tqkvp_cpu_destroy(buffer->cpu);
    tqkvp_choice_release(&buffer->choice);
    if (buffer->base)
        munmap(buffer->base, buffer->size);
    free(buffer);
}

static void buffer_free(struct ggml_buffer *handle)
{
    buffer_destroy(tqkvp_buffer_context(handle));
}

static void *buffer_base(struct ggml_buffer *handle)
{
    const tqkvp_buffer *buffer = tqkvp_buffer_context(handle);

    return buffer->base;
}

/* The first cache tensor decides which plans are possible; the others narrow them down. */
static bool choose_plan(tqkvp_buffer *buffer, uint32_t layer, tqkv_side side, const ggml_tensor *t)
{
    if (buffer->n_layers == 0 && !tqkvp_choice_make(&buffer->config, false, &buffer->choice))
        return false;
    return tqkvp_choice_filter(&buffer->choice, layer, side, t->ne[0]);
}

static int32_t buffer_init_tensor(struct ggml_buffer *handle, ggml_tensor *t)
{
    tqkvp_buffer *buffer = tqkvp_buffer_context(handle);
    uint32_t index;
    tqkv_side side;

    if (t->view_src || tqkvp_op_of(t) != TQKVP_OP_NONE ||
        !tqkvp_cache_name(t->name, &index, &side) || t->ne[3] != 1)
        return GGML_OK;
    if (!choose_plan(buffer, index, side, t))
        return GGML_FAILED;
    tqkvp_layer *layer = tqkvp_layer_get(buffer, index);
    if (!layer || !tqkvp_layer_add_side(layer, side, t)) {
        tqkvp_say("not active: no memory or address space for %s", t->name);
        return GGML_ALLOC_FAILED;
    }
    return GGML_OK;
}

static void buffer_set(struct ggml_buffer *handle, ggml_tensor *t, const void *from, size_t offset,
                       size_t n)
{
    tqkvp_tensor *tensor = tqkvp_tensor_of(t);

    (void)handle;
    if (tensor)
        tqkvp_rows_set(tensor, (t->view_src ? t->view_offs : 0) + offset, from, n);
    else
        memcpy((char *)t->data + offset, from, n);
}

static void buffer_get(struct ggml_buffer *handle, const ggml_tensor *t, void *to, size_t offset,
                       size_t n)
{
    tqkvp_tensor *tensor = tqkvp_tensor_of(t);

    (void)handle;
    if (tensor)
        tqkvp_rows_get(tensor, (t->view_src ? t->view_offs : 0) + offset, to, n);
    else
        memcpy(to, (const char *)t->data + offset, n);
}

static void buffer_memset(struct ggml_buffer *handle, ggml_tensor *t, uint8_t value, size_t offset,
                          size_t n)
{
    tqkvp_tensor *tensor = tqkvp_tensor_of(t);

    (void)handle;
    if (tensor)
        tqkvp_rows_fill(tensor, (t->view_src ? t->view_offs : 0) + offset, value, n);
    else
        memset((char *)t->data + offset, value, n);
}

/* A view of one whole stream; its number, or -1. */
static int64_t stream_of(const tqkvp_tensor *tensor, const ggml_tensor *t)
{
    const size_t offset = t->view_src ? t->view_offs : 0;
    const size_t stream_bytes = tensor->row_bytes * tensor->layer->n_cells;

    if (t->ne[0] != tensor->row_values || t->ne[1] != tensor->layer->n_cells || t->ne[2] != 1 ||
        t->ne[3] != 1 || offset % stream_bytes != 0)
        return -1;
    return (int64_t)(offset / stream_bytes);
}

/*
 * Copies a sequence to another one. The host copies K, then V; the store copies both at once, so
 * the second call has nothing left to do. False lets the host copy the rows one by one.
 */
static bool copy_stream(tqkvp_tensor *from, int64_t from_stream, tqkvp_tensor *to,
                        int64_t to_stream)
{
    tqkvp_layer *src = from->layer, *dst = to->layer;
    const uint32_t s = (uint32_t)from_stream, d = (uint32_t)to_stream;

    if (from->side != to->side || from_stream < 0 || to_stream < 0 ||
        ((src->written || dst->is_short) &&
         (tqkvp_layer_open(src) != GGML_OK || tqkvp_layer_open(dst) != GGML_OK)))
        return false;
    tqkvp_rows_settle(from);
    tqkvp_rows_settle(to);
    if (src->plain != dst->plain)
        return false;
    if (!src->written && !dst->written)
        return true; /* both empty */
    if (src->plain) {
        const size_t bytes = from->row_bytes * src->n_cells;
        if (from->row_bytes != to->row_bytes || src->n_cells != dst->n_cells)
            return false;
        memmove(to->plain + d * bytes, from->plain + s * bytes, bytes);
        dst->written = true;
        return true;
    }
    if (!src->store || !dst->store)
        return false;
    if (dst->copied_from == src && dst->copied_src == s && dst->copied_dst == d &&
        dst->copied_by != from->side) {
        dst->copied_from = NULL;
        return true;
    }
    if (tqkv_store_copy_stream(dst->store, d, src->store, s) != TQKV_OK)
        return false;
    dst->written = true;
    dst->copied_from = src;
    dst->copied_src = s;
    dst->copied_dst = d;
    dst->copied_by = from->side;
    return true;
}

static bool buffer_copy(struct ggml_buffer *handle, const ggml_tensor *from, ggml_tensor *to)
{
    tqkvp_tensor *from_tensor = tqkvp_tensor_of(from), *to_tensor = tqkvp_tensor_of(to);

    (void)handle;
    if (from_tensor && to_tensor)
        return copy_stream(from_tensor, stream_of(from_tensor, from), to_tensor,
                           stream_of(to_tensor, to));
    if (from_tensor || to_tensor || !tqkvp_is_ours(from) || !tqkvp_is_ours(to))
        return false;
    memcpy(to->data, from->data, tqkvp_host_get()->nbytes(from));
    return true;
}

static void buffer_clear(struct ggml_buffer *handle, uint8_t value)
{
    tqkvp_buffer *buffer = tqkvp_buffer_context(handle);

    for (size_t i = 0; i < buffer->n_layers; i++)
        tqkvp_layer_clear(buffer->layers[i]);
    if (value == 0)
        madvise(buffer->base, buffer->size, MADV_DONTNEED); /* reads as zero */
    else if (buffer->n_layers == 0)
        memset(buffer->base, value, buffer->size);
}

static struct ggml_buffer *make_handle(tqkvp_buffer *buffer)
{
    const ggml_buffer_table_11 table = {{
        [0] = (ggml_function *)buffer_free,
        [1] = (ggml_function *)buffer_base,
        [2] = (ggml_function *)buffer_init_tensor,
        [3] = (ggml_function *)buffer_memset,
        [4] = (ggml_function *)buffer_set,
        [5] = (ggml_function *)buffer_get,
        [8] = (ggml_function *)buffer_copy,
        [9] = (ggml_function *)buffer_clear,
    }};

    return tqkvp_host_new_buffer(&buffer_type, &table, buffer, buffer->size - TQKV_ALIGN);
}

/* --- the buffer type --- */

static const char *type_name(ggml_buffer_type *type)
{
    (void)type;
    return "TURBOQUANT";
}

static struct ggml_buffer *type_alloc(ggml_buffer_type *type, size_t size)
{
    tqkvp_buffer *buffer = calloc(1, sizeof(*buffer));

    (void)type;
    if (!buffer)
        return NULL;
    buffer->context = tqkvp_context_last();
    buffer->size = size + TQKV_ALIGN;
    if (!tqkvp_config_read(&buffer->config))
        goto failed;
    void *base = mmap(NULL, buffer->size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        tqkvp_say("not active: cannot reserve %zu bytes of address space (see "
                  "vm.overcommit_memory)",
                  buffer->size);
        goto failed;
    }
    buffer->base = base;
    pthread_mutex_lock(&buffers_lock);
    buffer->next = buffers;
    buffers = buffer;
    pthread_mutex_unlock(&buffers_lock);
    struct ggml_buffer *handle = make_handle(buffer);
    if (handle)
        return handle;
failed:
    buffer_destroy(buffer);
    return NULL;
}

static size_t type_alignment(ggml_buffer_type *type)
{
    (void)type;
    return TQKV_ALIGN;
}

/* Bytes per token of a layer when it is full, by the plan. */
static double planned_token_bytes(const tqkv_plan_layer *shape, uint32_t n_tiers, uint32_t n_cells)
{
    double bytes = 0.0;
    uint32_t left = n_cells;

    for (uint32_t i = 0; i < n_tiers; i++) {
        const uint32_t n =
            i + 1 == n_tiers || shape->tier_tokens[i] > left ? left : shape->tier_tokens[i];
        bytes += (double)n * shape->token_bytes[i];
        left -= n;
    }
    return n_cells ? bytes / n_cells : 0.0;
}

/* What a cache tensor will take once it is full. The stores count exactly; this is for the log. */
static size_t expected_bytes(const ggml_tensor *t, uint32_t index, tqkv_side side)
{
    const double n_values = (double)t->ne[0] * (double)t->ne[1] * (double)t->ne[2];
    const size_t layout = tqkvp_host_get()->nbytes(t);
    tqkvp_config config;
    tqkvp_choice choice;
    tqkv_plan_layer shape;
    double bytes;

    if (!tqkvp_config_read(&config) || config.mode == TQKVP_MODE_F16 ||
        !tqkvp_choice_make(&config, true, &choice))
        return layout;
    const tqkvp_plan *plan = tqkvp_choice_first(&choice, index, side, t->ne[0]);
    if (plan && tqkv_plan_get_layer(plan->plan, index, &shape) == TQKV_OK) {
        const double per_token =
            planned_token_bytes(&shape, plan->info.n_tiers, (uint32_t)t->ne[1]);
        bytes = n_values * per_token / ((double)shape.n_kv_heads * (shape.k_dim + shape.v_dim));
    } else {
        bytes = n_values * (1.0 + 1.0 / 64); /* built-in q8 */
    }
    tqkvp_choice_release(&choice);
    return bytes < (double)layout ? (size_t)bytes + 1 : layout;
}

static size_t type_alloc_size(ggml_buffer_type *type, const ggml_tensor *t)
{
    const tqkvp_host *host = tqkvp_host_get();
    uint32_t index;
    tqkv_side side;

    (void)type;
    if (!host->checks_alloc_size && !t->view_src && tqkvp_op_of(t) == TQKVP_OP_NONE &&
        tqkvp_cache_name(t->name, &index, &side))
        return expected_bytes(t, index, side);
    return host->nbytes(t);
}

static bool type_is_host(ggml_buffer_type *type)
{
    (void)type;
    return false;
}

void tqkvp_buffer_type_init(ggml_device *device)
{
    const size_t n = tqkvp_host_get()->n_buft_functions;
    const bool wide = n == 8; /* with alloc_buffer_n third and get_alloc_size_n seventh */
    void **words = buffer_type.words;

    memset(words, 0, sizeof(buffer_type.words));
    words[0] = tqkvp_word((ggml_function *)type_name);
    words[1] = tqkvp_word((ggml_function *)type_alloc);
    words[wide ? 3 : 2] = tqkvp_word((ggml_function *)type_alignment);
    words[wide ? 5 : 4] = tqkvp_word((ggml_function *)type_alloc_size);
    words[wide ? 7 : 5] = tqkvp_word((ggml_function *)type_is_host);
    words[n] = device;
}
