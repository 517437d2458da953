# SPDX-License-Identifier: Apache-2.0
"""
One layer of a TurboQuantCache: a store with one stream per sequence of the batch.

New tokens are attended as they are and encoded afterwards. With the attention function of
attention.py the codes are attended where they lie; any other one gets old tokens decoded.

Token t lies in cell t of its stream, padding included. A layer with a sliding window has few cells
and uses them in turn:

    cells  | 0 | 1 | … | n_cells - 1 |     n_cells = window + PIECE_TOKENS, rounded up
    token    t mod n_cells                 a piece of new tokens overwrites none that it sees

Layers with latents (DeepSeek) cache one latent per token, from which keys and values of all heads
are made, and one rotated key. The rotated key is our K, since it turns, and the latent our V.
"""
import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from turboquant import Side, Store

ATTENTION_NAME = "turboquant"
PIECE_TOKENS = 512  # of a sliding window, attended and stored together
CELLS_STEP = 256


def resident_tokens(window):
    """Cells of a layer with a sliding window."""
    return -(-(window + PIECE_TOKENS) // CELLS_STEP) * CELLS_STEP


class TurboQuantLayer(CacheLayerMixin):
    """plan: LayerPlan. shared: Shared of the cache."""

    is_croppable = True

    def __init__(self, index, plan, shared):
        super().__init__()
        self.index, self.plan, self.rows, self.shared = index, plan, plan.rows, shared
        self.shape = plan.plan.layer(plan.index)
        self.is_sliding = self.shape.window > 0
        self.n_cells = resident_tokens(self.shape.window) if self.is_sliding else shared.max_tokens
        self.reset()

    # ---- what transformers calls --------------------------------------------------------------

    def lazy_initialization(self, key_states, value_states):
        self.store = self._new_store(key_states.shape[0])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """key_states: [batch][n_kv_heads][n][k_dim], value_states: [batch][n_kv_heads][n][v_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        n = key_states.shape[2]
        if self.shared.attends_over_codes():
            self._refuse_latents()
            key_states.turboquant_layer = self  # attention.py finds it there and calls attend
            self._grow(n)
            return key_states, value_states
        old = [self._decoded(side).to(key_states.device, key_states.dtype) for side in Side]
        old_keys, old_values = self.rows.sides(*old)
        for piece in self._pieces(n):
            self._stage(key_states, value_states, piece)
            self.shared.batch.commit()
        self._grow(n)
        return torch.cat([old_keys, key_states], 2), torch.cat([old_values, value_states], 2)

    def get_mask_sizes(self, query_length):
        return self.length + query_length - self._first_seen(self.length), self._first_seen(self.length)

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return self.shared.max_tokens

    def reset(self):
        self.store, self.is_initialized = None, False
        self.length = 0      # tokens that count
        self.n_written = 0   # the most that ever did: what they overwrote is gone

    def crop(self, tokens_to_remove):
        """Forgets the last -tokens_to_remove tokens. Their cells stay hidden until they are written again."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        length = max(self.length + tokens_to_remove, 0)
        if self._first_seen(length) < self.n_written - self._n_kept():
            raise ValueError(f"layer {self.index} cannot go back by {-tokens_to_remove} tokens: it sees "
                             f"{self.shape.window} and keeps {self._n_kept()}")
        self.length = length

    def reorder_cache(self, beam_idx):
        self._take_streams(beam_idx.tolist())

    def batch_select_indices(self, indices):
        self._take_streams(torch.arange(self.batch_size)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats):
        self._take_streams([stream for stream in range(self.batch_size) for _ in range(repeats)])

    @property
    def batch_size(self):
        return self.store.n_streams if self.store else 0

    # ---- attention over the codes ---------------------------------------------------------------

    def attend(self, query, key_states, value_states, mask, scale, softcap):
        """
        Attention of the tokens that update() was given last, which are stored afterwards.

        query: [batch][n_heads][n][k_dim]. mask: [batch][1][n][tokens seen] f16, 0 or -inf, or None: causal.
        Returns [batch][n][n_heads][v_dim] of query's dtype.
        """
        q = self.rows.to_plan(Side.K, query)
        out = np.empty((*q.shape[:3], self.shape.v_dim), np.float32)
        workers = self.shared.workers if q.shape[1] > 1 else None  # one token is too little work to share
        first_new = self.length - q.shape[1]
        for piece in self._pieces(q.shape[1]):
            end = first_new + piece.stop
            masks = self._cell_masks(mask, first_new, piece, len(q))
            self._stage(key_states, value_states, piece, first_new)
            for stream in range(len(q)):
                self.store.attend(self.shared.batch, q[stream, piece], out[stream, piece], min(end, self.n_cells),
                                  stream=stream, mask=masks[stream], causal=masks[stream] is None, scale=scale,
                                  softcap=softcap, workers=workers)
            self.shared.batch.commit(workers)
        return torch.from_numpy(out).to(query.device, query.dtype)

    def _cell_masks(self, mask, first_new, piece, n_streams):
        """
        For each stream [piece][n_cells] f16 in the order of cells, or None where causal says the same.

        Causal counts the tokens of the whole batch, so it cannot serve several streams.
        """
        first, end, window = self._first_seen(first_new), first_new + piece.stop, self.shape.window or self.length
        if mask is None and n_streams == 1 and end <= window:
            return [None]
        queries = np.arange(first_new + piece.start, end)[:, None]
        # Of a window only what this piece sees: older tokens share cells with new ones.
        tokens = np.arange(max(first, self._first_seen(first_new + piece.start)), end)
        if mask is None:
            seen = (tokens <= queries) & (tokens > queries - window)
            columns = np.where(seen, np.float16(0), np.float16(-np.inf))[None]
        else:
            columns = mask[:, 0, piece, tokens[0] - first:end - first].cpu().numpy()
        if self.is_sliding:
            by_cell = np.full((*columns.shape[:2], min(end, self.n_cells)), -np.inf, np.float16)
            by_cell[:, :, tokens % self.n_cells] = columns
            columns = by_cell
        return np.broadcast_to(np.ascontiguousarray(columns), (n_streams, *columns.shape[1:]))

    # ---- rows and streams -------------------------------------------------------------------------

    def _new_store(self, n_streams):
        return Store(self.plan.plan, self.plan.index, self.n_cells, n_streams)

    def _refuse_latents(self):
        if self.rows.is_latent:
            raise ValueError(f"layer {self.index} caches latents, and its keys are made from them afterwards: use "
                             f"another attn_implementation than '{ATTENTION_NAME}'")

    def _check(self, key_states, value_states):
        k, v = self.rows.sides(key_states, value_states)
        batch, n_kv_heads, n, k_dim = k.shape
        wanted = (self.batch_size, self.shape.n_kv_heads, self.shape.k_dim, self.shape.v_dim)
        if (batch, n_kv_heads, k_dim, v.shape[3]) != wanted:
            raise ValueError(f"layer {self.index} got K {list(k.shape)} and V {list(v.shape)}; the cache holds a "
                             f"batch of {wanted[0]} with {wanted[1]} heads of {wanted[2]} and {wanted[3]} channels")
        if not self.is_sliding and self.length + n > self.n_cells:
            raise ValueError(f"the cache is full: {self.length} + {n} tokens, and it was made for "
                             f"max_tokens={self.shared.max_tokens}")

    def _first_seen(self, t):
        """The first token that token t sees."""
        return max(t - self.shape.window + 1, 0) if self.is_sliding else 0

    def _n_kept(self):
        """How many of the newest tokens are there to be read."""
        n_tiers = self.plan.plan.n_tiers
        has_codes = self.shape.token_bytes[n_tiers - 1] > 2 * self.shape.n_kv_heads  # more than scales
        return self.n_cells if has_codes or not self.is_sliding else min(self.n_cells, sum(self.shape.tier_tokens[:n_tiers - 1]))

    def _grow(self, n):
        self.length += n
        self.n_written = max(self.n_written, self.length)

    def _pieces(self, n):
        """Slices of n new tokens that are stored together."""
        step = PIECE_TOKENS if self.is_sliding else n
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def _stage(self, key_states, value_states, piece, first_new=None):
        """Opens the batch with a piece of the new tokens, padding left out."""
        n_streams, _, n, _ = key_states.shape
        first_new = self.length if first_new is None else first_new
        positions, is_token = (array[:, piece] for array in self.shared.tokens(n_streams, n, first_new))
        tokens = np.arange(first_new + piece.start, first_new + piece.stop)
        cells = np.arange(n_streams)[:, None] * self.n_cells + tokens % self.n_cells
        self.shared.batch.begin(self.store, cells[is_token], positions[is_token])
        for side, states in zip(Side, self.rows.sides(key_states, value_states)):
            self.shared.batch.put(side, self.rows.to_plan(side, states[:, :, piece])[is_token])

    def _decoded(self, side):
        """What the next token sees of every stream: [batch][n_kv_heads][n][dim] f32, channels as the model has them."""
        tokens = np.arange(self._first_seen(self.length), self.length)
        cells = np.arange(self.batch_size)[:, None] * self.n_cells + tokens % self.n_cells
        rows = self.store.read(cells.ravel().tolist(), side)
        return self.rows.from_plan(side, rows.reshape(*cells.shape, *rows.shape[1:]))

    def _take_streams(self, sources):
        """Stream i becomes a copy of stream sources[i]."""
        if self.store is None or sources == list(range(self.batch_size)):
            return
        old, self.store = self.store, self._new_store(len(sources))
        for stream, source in enumerate(sources):
            self.store.copy_stream(stream, old, source)
