# SPDX-License-Identifier: Apache-2.0
"""Shows what attention sees while a model runs on a piece of text."""
import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import plain_attention
from .host_layers import cache_argument

OBSERVER_NAME = "turboquant_observer"

_listener = None  # of the observation that is running


@contextlib.contextmanager
def observed(model, listener):
    """
    While it lasts, each layer's attention calls listener(module, query, scaling, softcap) and then goes on.

    query: [1][n_heads][n][dim], RoPE applied.
    """
    global _listener
    before = model.config._attn_implementation
    model.set_attn_implementation(OBSERVER_NAME)
    _listener = listener
    try:
        yield
    finally:
        _listener = None
        model.set_attn_implementation(before)


@torch.no_grad()
def observe_piece(model, tokens, on_layer):
    """
    Runs a model over tokens [n] from an empty cache.

    on_layer(module, query, keys, values, scaling, softcap) for each layer; keys and values as the model caches them,
    [1][n_kv_heads][n][dim].
    """
    cache = DynamicCache()  # without a config it keeps everything, whatever the window

    def listener(module, query, scaling, softcap):
        layer = cache.layers[module.layer_idx]
        on_layer(module, query, layer.keys, layer.values, scaling, softcap)

    with observed(model, listener):
        model.base_model(input_ids=tokens[None], use_cache=True, **{cache_argument(model): cache})


def _attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _listener(module, query, scaling, softcap or 0.0)
    if softcap:
        return plain_attention(query, key, value, attention_mask, scaling, softcap), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(OBSERVER_NAME, _attend)
AttentionMaskInterface.register(OBSERVER_NAME, sdpa_mask)
