# SPDX-License-Identifier: Apache-2.0
"""TurboQuantCache: what a user gives to generate()."""
import numpy as np
import torch
from transformers import Cache

from turboquant import Batch, Workers

from .cache_layer import ATTENTION_NAME, TurboQuantLayer
from .host_layers import describe, longest_text, text_config
from .plan_fit import plans_for


def torch_workers():
    """As many threads as torch uses; None: one after another."""
    n = torch.get_num_threads()
    return Workers(n) if n > 1 else None


class Shared:
    """What the layers of one cache have in common."""

    def __init__(self, config, max_tokens):
        self.config, self.max_tokens = config, max_tokens
        self.batch = Batch()
        self.workers = torch_workers()
        self.position_ids = self.attention_mask = None  # of the forward pass that is running

    def attends_over_codes(self):
        return self.config._attn_implementation == ATTENTION_NAME

    def tokens(self, n_streams, n, length):
        """Positions [n_streams][n] i32 of the next n tokens, and which of them are no padding, bool."""
        positions = np.arange(length, length + n, dtype=np.int32)
        if self.position_ids is not None and self.position_ids.ndim == 2:
            positions = self.position_ids.cpu().numpy().astype(np.int32)
        is_token = np.ones((1, n), bool)
        if self.attention_mask is not None and self.attention_mask.ndim == 2:
            is_token = self.attention_mask[:, length:length + n].cpu().numpy().astype(bool)
        return (np.broadcast_to(array, (n_streams, n)) for array in (positions, is_token))


class TurboQuantCache(Cache):
    """
    A compressed cache for one model.

    model: a decoder of transformers. It gets a hook that tells its caches positions and padding.
    plan: path of a `.tqkv` of that model, a turboquant.Plan, or "f16" or "q8" for storage without calibration.
    max_tokens: of one sequence; memory is used only as tokens come. Default: the model's own limit.
    Errors: ValueError with a sentence where the plan is not of this model or a layer cannot be compressed.
    """

    def __init__(self, model, plan, max_tokens=None):
        plans = plans_for(describe(model), plan)
        self.shared = Shared(text_config(model), max_tokens or longest_text(model))
        super().__init__(layers=[TurboQuantLayer(index, plan, self.shared) for index, plan in enumerate(plans)])
        _install_hook(model.base_model)

    @property
    def n_bytes(self):
        """Memory that the tokens of all layers take now, everything counted."""
        return sum(layer.store.n_bytes for layer in self.layers if layer.store)

    @property
    def bits_per_value(self):
        """The same for each number that an uncompressed cache would hold: no more than a window of tokens."""
        n_values = sum(layer.batch_size * min(layer.length, layer.shape.window or layer.length)
                       * layer.shape.n_kv_heads * (layer.shape.k_dim + layer.shape.v_dim) for layer in self.layers)
        return 8 * self.n_bytes / n_values if n_values else 0.0


def _install_hook(module):
    if not hasattr(module, "turboquant_hook"):
        module.turboquant_hook = module.register_forward_pre_hook(_tell_tokens, with_kwargs=True)


def _tell_tokens(_module, _args, kwargs):
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if isinstance(cache, TurboQuantCache):
        cache.shared.position_ids = kwargs.get("position_ids")
        cache.shared.attention_mask = kwargs.get("attention_mask")
