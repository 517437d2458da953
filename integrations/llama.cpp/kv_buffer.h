/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The buffer type. The host allocates three kinds of tensors with it: KV caches, which become
 * layers; other state of a model (recurrent state, indexers), which stays as it is; and results of
 * operations, in one buffer a context, which are plain memory to everyone.
 */
#ifndef TQKV_KV_BUFFER_H
#define TQKV_KV_BUFFER_H

#include "ggml_host.h"
#include "plan_source.h"

struct tqkvp_layer;
struct tqkvp_cpu;

typedef struct tqkvp_buffer {
    struct tqkvp_buffer *next; /* all live buffers, newest first */
    uint8_t *base;
    size_t size;
    uint64_t context; /* number of the context that it was allocated for, see tqkvp_context_begin */
    tqkvp_config config; /* as it was then */
    tqkvp_choice choice;
    struct tqkvp_layer **layers;
    size_t n_layers;
    struct tqkvp_cpu *cpu; /* for conversions, made when needed */
    bool announced;
    bool warned_rope, warned_record, warned_plain;
} tqkvp_buffer;

/* Fills the buffer type for the host found. */
void tqkvp_buffer_type_init(ggml_device *device);
ggml_buffer_type *tqkvp_buffer_type(void);

/* Whether the memory of t is, or will be, in a buffer of ours. */
bool tqkvp_is_ours(const ggml_tensor *t);

/* A context of the host is being made: buffers allocated from now on belong to it. */
uint64_t tqkvp_context_begin(void);
uint64_t tqkvp_context_last(void);

/* Calls fn for each live buffer with layers of a context, oldest first. */
void tqkvp_buffers_each(uint64_t context, void (*fn)(void *user, tqkvp_buffer *buffer), void *user);

#endif /* TQKV_KV_BUFFER_H */
