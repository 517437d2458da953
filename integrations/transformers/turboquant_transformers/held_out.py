# SPDX-License-Identifier: Apache-2.0
"""
Checks plans on text that calibration has not read. A plan that loses more than its limit there is
solved again with more bits. Limits and steps are those of `tqkv calibrate`.
"""
import math

import torch
from transformers import DynamicCache

from .host_layers import cache_argument
from .kv_cache import TurboQuantCache
from .sensitivity import kl_of

CHUNK_TOKENS = 512
LIMITS = ((2.0, 0.12), (3.2, 0.03), (4.5, 0.015))  # bits per value, mean KL; log-linear between and beyond
LIMIT_LEAST = 0.002
BITS_STEP, BITS_MOST, BITS_MAX = 1.05, 1.4, 16.0
HALVINGS_PER_BIT = 6  # a bit per value halves the KL six times at most: steps that cannot do are not measured


def kl_limit(bits):
    """The most mean KL for a plan of so many bits per value."""
    (low, low_kl), (high, high_kl) = LIMITS[:2] if bits <= LIMITS[1][0] else LIMITS[1:]
    slope = math.log(high_kl / low_kl) / (high - low)
    return max(low_kl * math.exp(slope * (bits - low)), LIMIT_LEAST)


def next_bits(asked, bits, excess):
    """Bits to try after a plan of `bits` that loses `excess` times its limit; None: nothing is left to try."""
    most = min(asked * BITS_MOST, BITS_MAX)
    if bits >= most:
        return None
    needed = bits + math.log2(excess) / HALVINGS_PER_BIT
    bits *= BITS_STEP
    while bits < min(needed, most):
        bits *= BITS_STEP
    return min(bits, most)


@torch.no_grad()
def plan_kl(model, plan, tokens):
    """
    Mean KL at the logits over the second half of tokens [n], but for the last, which predicts nothing known.

    Both caches are fed the same chunks, so that they differ by what is stored alone.
    """
    name, kls = cache_argument(model), []
    base, test = DynamicCache(config=model.config), TurboQuantCache(model, plan, len(tokens))
    for first in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[None, first:first + CHUNK_TOKENS]
        logits = [model(input_ids=chunk, use_cache=True, **{name: cache}).logits[0] for cache in (base, test)]
        kls.append(kl_of(*logits))
    return torch.cat(kls)[len(tokens) // 2:-1].mean().item()
