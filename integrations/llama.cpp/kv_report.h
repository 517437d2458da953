/* SPDX-License-Identifier: Apache-2.0 */
/* What the caches of a context take, in one line for people and in numbers for programs. */
#ifndef TQKV_KV_REPORT_H
#define TQKV_KV_REPORT_H

#include <turboquant/ggml_plugin.h>

#include "kv_buffer.h"

/* Says once for the context of a buffer what its caches are stored as. Cheap when said. */
void tqkvp_announce(tqkvp_buffer *buffer);
/* A context is about to compute: says so if no layer of its cache is ours. */
void tqkvp_announce_absence(uint64_t context);

size_t tqkvp_kv_bytes(tqkv_plugin_bytes *total, tqkv_plugin_bytes *layers, size_t n_layers_max);

#endif /* TQKV_KV_REPORT_H */
