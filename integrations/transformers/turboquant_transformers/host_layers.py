# SPDX-License-Identifier: Apache-2.0
"""
What a model's layers give to a cache: shapes, windows, and how keys turn with the position.

Model classes say the latter in code only, so one short forward pass asks them. All its tokens are
the same, at positions far apart. Then attention averages equal values and the hidden states of a
layer are equal at every position; keys differ by RoPE alone, whatever the layer's depth. Each way
of turning that we know is tried against what was seen.
"""
import inspect
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from turboquant.abi import UNIT_CHANNELS

PROBE_POSITIONS = (0, 1, 5, 23, 101, 499)


@dataclass(frozen=True)
class HostLayer:
    """One layer as the model's cache sees it. K of pair i turns by position * inv_freq[i]."""
    n_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    window: int           # tokens that a sliding-window layer sees, 0: all
    pairs: np.ndarray     # [n_rot / 2][2] channels of K
    inv_freq: np.ndarray  # [n_rot / 2] f32
    is_latent: bool       # what the host caches as keys are latents (our V), as values rotated keys (our K)


_described = weakref.WeakKeyDictionary()


def describe(model):
    """[HostLayer] of a model, which runs over six tokens the first time."""
    if model not in _described:
        _described[model] = _describe(model)
    return _described[model]


def cache_argument(model):
    """What forward calls its cache: renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def text_config(model):
    return model.config.get_text_config(decoder=True)


def longest_text(model):
    """Tokens that the model was made for."""
    return text_config(model).max_position_embeddings


def _describe(model):
    config = text_config(model)
    windows = [_window(index, layer) for index, layer in enumerate(DynamicCache(config=config).layers)]
    keys, values = _probe(model, config)
    frequencies = _frequencies(model)
    layers = []
    for index, (k, v, window) in enumerate(zip(keys, values, windows)):
        is_latent = bool(len(_turning(index, v, frequencies)[1]))
        if is_latent:
            k, v = v, k
        if k.shape[2] % UNIT_CHANNELS or v.shape[2] % UNIT_CHANNELS:
            raise ValueError(f"layer {index}: heads of {k.shape[2]} (K) and {v.shape[2]} (V) channels; "
                             f"turboquant takes multiples of {UNIT_CHANNELS}")
        pairs, inv_freq = _turning(index, k, frequencies)
        layers.append(HostLayer(config.num_attention_heads, k.shape[1], k.shape[2], v.shape[2], window, pairs,
                                inv_freq, is_latent))
    return layers


def _window(index, layer):
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(f"layer {index} keeps a cache of its own kind ({type(layer).__name__}), "
                         "which turboquant does not compress")
    return getattr(layer, "sliding_window", 0)


def _probe(model, config):
    """Keys and values of each layer, [n_positions][n_kv_heads][dim] f32."""
    cache = DynamicCache()  # without a config it keeps everything, whatever the window
    n = len(PROBE_POSITIONS)
    device = model.get_input_embeddings().weight.device
    tokens = torch.full((1, n), config.vocab_size // 2, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model.base_model(input_ids=tokens, position_ids=torch.tensor([PROBE_POSITIONS], device=device),
                         use_cache=True, **{cache_argument(model): cache})
    model.train(was_training)
    return ([layer.keys[0].transpose(0, 1).float().cpu().numpy() for layer in cache.layers],
            [layer.values[0].transpose(0, 1).float().cpu().numpy() for layer in cache.layers])


def _frequencies(model):
    """Every table of RoPE frequencies in the model, [n_rot / 2] f32 each."""
    found = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                table = buffer.float().cpu().numpy()
                found[table.tobytes()] = table
    return list(found.values())


def _turning(index, rows, frequencies):
    """pairs and inv_freq of rows [n_positions][n_heads][dim] that differ by their position alone."""
    none = np.zeros((0, 2), int), np.zeros(0, np.float32)
    if not frequencies:
        return none  # positions enter elsewhere, and keys are stored as they come
    guesses = [none] + [(_pairs(style, first, len(table)), table) for table in frequencies
                        for first in {0, rows.shape[2] - 2 * len(table)} if first >= 0 for style in ("halves", "pairs")]
    # The best one, not the first that is good enough: a bias of K can be so long, in channels that hardly turn, that
    # all others are short beside it.
    misses = [_missed_by(rows, *guess) for guess in guesses]
    best = min(range(len(guesses)), key=lambda i: np.square(misses[i]).mean())
    # Wrong guesses miss by as much as the keys are long; weights in 16 bits by a few of their last bits.
    if np.abs(misses[best]).max() > 0.03 * np.abs(rows).max():
        raise ValueError(f"layer {index} turns its keys with the position in a way that turboquant does not know")
    return guesses[best]


def _pairs(style, first, n):
    i = np.arange(n)
    return first + (np.stack([i, i + n], 1) if style == "halves" else np.stack([2 * i, 2 * i + 1], 1))


def _missed_by(rows, pairs, inv_freq):
    angles = np.array(PROBE_POSITIONS, np.float64)[:, None, None] * inv_freq
    a, b = rows[:1, :, pairs[:, 0]], rows[:1, :, pairs[:, 1]]
    expected = np.repeat(rows[:1], len(rows), axis=0)
    expected[:, :, pairs[:, 0]] = a * np.cos(angles) - b * np.sin(angles)
    expected[:, :, pairs[:, 1]] = b * np.cos(angles) + a * np.sin(angles)
    return rows - expected
