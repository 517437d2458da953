/* SPDX-License-Identifier: Apache-2.0 */
/* A backend of one context, and the operations that it computes. */
#ifndef TQKV_KV_GRAPH_H
#define TQKV_KV_GRAPH_H

#include <turboquant/ggml_plugin.h>

#include "ggml_host.h"

/* NULL where there is no memory. */
ggml_backend *tqkvp_backend_create(ggml_device *device);
void tqkvp_backend_set_threads(ggml_backend *backend, int n_threads);
void tqkvp_backend_set_abort(ggml_backend *backend, bool (*callback)(void *data), void *data);

/* Whether a node of a graph is ours to compute. Learns from it what it tells about a layer. */
bool tqkvp_supports_op(const ggml_tensor *node);

/* Whether we can read and write memory of a type. */
bool tqkvp_supports_buffer_type(ggml_buffer_type *type);

void tqkvp_set_observer(tqkv_plugin_observer_fn *observe, void *user);

#endif /* TQKV_KV_GRAPH_H */
