/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Short contexts. Until a layer holds more than a few hundred tokens (TQKV_SHORT) its cells stay in
 * plain storage: they take little memory there, lose nothing, and the host's own nodes are as fast
 * on them as they are without us. What goes beyond is encoded, all tokens at once, and so are they
 * when anything but new rows and attention comes to them: states, copies, shifts.
 *
 * The way back is tqkvp_layer_clear.
 */
#ifndef TQKV_KV_SHORT_H
#define TQKV_KV_SHORT_H

#include "kv_layer.h"

/*
 * Looks at a node of a graph that is about to run, before any layer is opened for it, and that
 * touches the layer. One that does so in a way that a short context does not know has it outgrown.
 */
void tqkvp_short_look(tqkvp_layer *layer, const ggml_tensor *node);

/*
 * Whether the layer keeps the cells of this graph in plain storage, from now on or still. The layer
 * is open, with a store. False is no failure.
 */
bool tqkvp_short_goes_on(tqkvp_layer *layer);

/* Remembers where the rows of a SET_ROWS node on K go. positions: of its rows. */
void tqkvp_short_note(tqkvp_layer *layer, const ggml_tensor *node, const int32_t *positions);

/* Encodes what the layer holds and gives the plain storage back. */
tqkv_status tqkvp_short_end(tqkvp_layer *layer);
/* Forgets what it holds. */
void tqkvp_short_clear(tqkvp_layer *layer);

/* Cells that hold a token. */
size_t tqkvp_short_tokens(const tqkvp_layer *layer);

#endif /* TQKV_KV_SHORT_H */
