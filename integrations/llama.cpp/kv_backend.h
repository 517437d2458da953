/* SPDX-License-Identifier: Apache-2.0 */
/* What one backend keeps between operations; private to kv_graph.c and kv_ops.c. */
#ifndef TQKV_KV_BACKEND_H
#define TQKV_KV_BACKEND_H

#include <turboquant/ggml_plugin.h>
#include <turboquant/store.h>

#include "cpu_delegate.h"
#include "kv_layer.h"
#include "node_team.h"

/* A node of the host's graph that we compute: it stands there as a custom one meanwhile. */
typedef struct tqkvp_slot {
    struct tqkvp_backend *backend;
    ggml_tensor *node;
    ggml_tensor original; /* the node as the host made it */
} tqkvp_slot;

typedef struct tqkvp_backend {
    ggml_backend handle; /* first: the host's pointer is ours */
    uint64_t context;
    bool checked; /* that the context has a cache of ours */
    tqkvp_cpu *cpu;   /* computes the host's graphs */
    tqkvp_cpu *aside; /* single nodes in the middle of one; made when needed */
    tqkvp_team team;
    tqkvp_slot *slots; /* of the graph that runs */
    size_t n_slots, slots_max;
    int32_t status; /* of what we computed in it */

    /*
     * The batch that was stored last and is not encoded yet. It never outlives a call of
     * graph_compute, so nobody outside has to know about it.
     */
    tqkv_batch *batch;
    tqkvp_layer *open;
    int64_t *cells; /* of the batch */
    int64_t n_cells, cells_max;
    bool has_positions;

    /*
     * A pass is one run over the layers of a model; it begins when a layer is stored that this pass
     * has stored already. Positions are read from the graph once per pass, at its first layer:
     * later the host may have reused their memory.
     */
    uint64_t pass;
    const ggml_tensor *positions_of;
    int32_t *positions;
    int64_t n_positions, positions_max;

    void *scratch;
    size_t scratch_bytes;
    float slopes[1024];
    uint16_t *mask; /* an f32 mask as f16 */
    size_t mask_max;
} tqkvp_backend;

/* Result of an operation: done, not ours to do (the layer must become plain), or a ggml failure. */
typedef enum tqkvp_done { TQKVP_FAILED = -1, TQKVP_DONE = 0, TQKVP_NOT_OURS = 1 } tqkvp_done;

tqkvp_done tqkvp_do_set_rows(tqkvp_backend *backend, const ggml_tensor *node);
tqkvp_done tqkvp_do_attention(tqkvp_backend *backend, const ggml_tensor *node);
tqkvp_done tqkvp_do_shift(tqkvp_backend *backend, const ggml_tensor *node);
tqkvp_done tqkvp_do_copy(tqkvp_backend *backend, const ggml_tensor *node);

/*
 * Positions of the rows of a SET_ROWS node on K, or NULL where the graph hides them. Once for each
 * such node of a graph, in their order.
 */
const int32_t *tqkvp_row_positions(tqkvp_backend *backend, const ggml_tensor *node);

/* A program watches Q, K and V. */
bool tqkvp_is_observed(void);

/* Encodes the open batch. */
tqkvp_done tqkvp_commit(tqkvp_backend *backend);

#endif /* TQKV_KV_BACKEND_H */
