# SPDX-License-Identifier: Apache-2.0
"""
A model over a text while K and V are what a store would give back.

All tokens go through the model at once. Within each layer queries are taken a chunk at a time: they see the tokens of
their own chunk as they are, and older ones at the tier that the store would hold them in when the chunk begins. A
token that ages is coded again from what it decoded to, as in the store.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from turboquant import Side
from turboquant_transformers.host_layers import cache_argument

from .lab_model import once
from .lab_quant import LibraryCoder
from .lab_stats import frame_bases, turn

NAME = "turboquant_lab"
BLOCK_TOKENS = 16     # leave a tier together
SCORED_AT_ONCE = 64
PIECE = 512           # tokens of an exact run at a time
CI_BLOCK = 64         # tokens
KL_LEAST = 1e-5       # below it nothing can be told apart

_store = None


@dataclass
class Options:
    chunk: int = 512                # tokens that are attended before they are coded, as -ub of llama.cpp
    coder: Callable = LibraryCoder  # made for the heads of a side
    exact: frozenset = frozenset()  # sides of layers that stay as they are, such as "5K"


def tiers_at(n, plan, tier_tokens):
    """[n] tier of each token when n are stored one after another, whatever the batches."""
    tiers = np.zeros(n, int)
    entered, first = max(n - plan.n_sinks, 0), min(plan.n_sinks, n)
    for tier in range(plan.n_tiers - 1):
        left = max((entered - tier_tokens[tier]) // BLOCK_TOKENS * BLOCK_TOKENS, 0)
        tiers[first:first + left] = tier + 1
        entered = left
    return tiers


class LayerRows:
    """What one layer's store holds of a text, given all its rows at once."""

    def __init__(self, plan, index, options, keys, values):
        """keys, values: [n_kv_heads][n][dim]."""
        self.plan, self.index, self.layer = plan, index, plan.layers[index]
        n = keys.shape[1]
        self.bases = frame_bases(n, plan.frames[index])
        self.steps = torch.arange(n) - self.bases
        self.held = -np.ones(n, int)  # tier
        self.decoded = [keys.clone(), values.clone()]
        self.rows = []                # [side][head] y, then yhat
        self.coders, self.exact = [], [f"{index}{side.name}" in options.exact for side in Side]
        for side, given in zip(Side, (keys, values)):
            heads = plan.heads[index][side]
            self.coders.append(options.coder([(head.weight, head.widths) for head in heads]))
            self.rows.append([self._forward(side, g, given[g]) for g in range(len(heads))])

    def _centre(self, head, which=slice(None)):
        if head.offsets is None:
            return head.mean
        return head.mean + turn(head.offsets, self.layer, self.steps[which])

    def _forward(self, side, g, x):
        head = self.plan.heads[self.index][side][g]
        if side == Side.K:
            x = turn(x, self.layer, -self.bases)
        return (x - self._centre(head)) @ head.transform

    def store(self, n):
        """Codes what has changed its tier when n tokens are stored."""
        tiers = tiers_at(n, self.plan, self.plan.tier_tokens[self.index])
        for tier in range(self.plan.n_tiers):
            which = np.flatnonzero((tiers == tier) & (self.held[:n] != tier))
            if len(which):
                self._code(tier, torch.from_numpy(which))
        self.held[:n] = tiers

    def _code(self, tier, which):
        for side in (side for side in Side if not self.exact[side]):
            for g, head in enumerate(self.plan.heads[self.index][side]):
                yhat = self.coders[side](g, tier, self.rows[side][g][which])
                self.rows[side][g][which] = yhat
                x = self._centre(head, which) + yhat @ head.inverse
                self.decoded[side][g, which] = turn(x, self.layer, self.bases[which]) if side == Side.K else x


class Store:
    """The attention of a model under a plan."""

    def __init__(self, plan, options):
        self.plan, self.options = plan, options

    def attend(self, index, query, key, value, scaling):
        """query: [n_heads][n][k_dim], key, value: [n_kv_heads][n][dim]. Returns [n][n_heads][v_dim]."""
        rows = LayerRows(self.plan, index, self.options, key.cpu(), value.cpu())
        n, chunk, window = query.shape[1], self.options.chunk, self.plan.layers[index].window
        group = query.shape[0] // key.shape[0]
        device = query.device
        out = torch.empty(n, query.shape[0], value.shape[2], device=device)
        for first in range(0, n, chunk):
            end = min(first + chunk, n)
            begin = max(first - window + 1, 0) if window else 0
            seen, at = torch.arange(begin, end, device=device), torch.arange(first, end, device=device)[:, None]
            hidden = seen > at
            if window:
                hidden |= seen <= at - window
            for g in range(key.shape[0]):
                k, v = (torch.cat([old[g, begin:first].to(device), new[g, first:end]])
                        for old, new in zip(rows.decoded, (key, value)))
                for h in range(g * group, (g + 1) * group):
                    scores = (query[h, first:end] @ k.T).mul_(scaling).masked_fill_(hidden, -torch.inf)
                    out[first:end, h] = scores.softmax(-1) @ v
            if end < n:
                rows.store(end)
        return out


def _attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    assert not softcap
    if _store is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return _store.attend(module.layer_idx, query[0], key[0], value[0], scaling)[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.no_grad()
def hidden_states(model, tokens, plan=None, options=None):
    """[n][width] before the output layer; plan None: exact."""
    global _store
    model.net.set_attn_implementation(NAME)
    _store = Store(plan, options or Options()) if plan else None
    try:
        made = model.net.base_model(input_ids=tokens[None].to(model.net.device), use_cache=False)
        return made.last_hidden_state[0].cpu()
    finally:
        _store = None


@dataclass
class Score:
    """Of the scored tokens of one text or several: kl [n] f64, same [n] whether the top token is the same."""
    kl: np.ndarray
    same: np.ndarray

    def numbers(self):
        return {"kl_mean": float(self.kl.mean()), "kl_ci95": half_interval(self.kl), "kl_median":
                float(np.median(self.kl)), "kl_p999": float(np.quantile(self.kl, .999)),
                "top1": float(self.same.mean()), "tokens": len(self.kl)}


def joined(scores):
    return Score(np.concatenate([score.kl for score in scores]), np.concatenate([score.same for score in scores]))


def _blocks(kl):
    n = max(len(kl) // CI_BLOCK, 1)
    return np.array([part.mean() for part in np.array_split(kl, n)])


def half_interval(kl):
    """Half of a 95 % interval of the mean, from blocks of tokens."""
    blocks = _blocks(kl)
    return float(1.96 * blocks.std(ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else math.nan


def paired_ratio(kl, base):
    """mean(kl) / mean(base) and half of its 95 % interval, from blocks of the same tokens."""
    a, b = _blocks(kl), _blocks(base)
    ratio = a.mean() / b.mean()
    spread = (a - ratio * b).std(ddof=1) / math.sqrt(len(a)) / b.mean()
    return float(ratio), float(1.96 * spread)


def typical_ratio(kl, base):
    """Geometric mean of the tokens' own ratios and half of its 95 % interval: steadier, as no token weighs more."""
    logs = np.log((kl + KL_LEAST) / (base + KL_LEAST))
    ratio = math.exp(logs.mean())
    return ratio, ratio * half_interval(logs)


@torch.no_grad()
def score_text(model, text_name, n, plan, options=None, stride=1):
    """KL over the second half of n tokens of a held-out text but for the last one, every stride-th of them."""
    tokens = model.held_out(text_name, n)
    base = once(lambda: hidden_states(model, tokens)[n // 2:-1].clone(), "hidden", model.name, text_name, n)
    test = hidden_states(model, tokens, plan, options)[n // 2:-1]
    return compare(model, base[::stride], test[::stride])


@torch.no_grad()
def score_end(model, text_name, n, n_scored, plan, options=None):
    """
    KL over the last n_scored of n tokens, which read what the exact model stored before them, coded as of then.

    Quicker than score_text by as much as the text is longer than its end, and without what errors in the hidden
    states of old tokens add.
    """
    tokens = model.held_out(text_name, n)
    keys, values, base = once(lambda: _exact_start(model, tokens, n_scored),
                              "start", model.name, text_name, n, n_scored)
    cache = DynamicCache()  # without a config it keeps everything, whatever the window
    for index, (k, v) in enumerate(zip(keys, values)):
        rows = LayerRows(plan, index, options or Options(), k, v)
        rows.store(n - n_scored)
        cache.update(*(side[None].to(model.net.device) for side in rows.decoded), index)
    test = _end(model, tokens[n - n_scored:], cache)
    return compare(model, base, test)


@torch.no_grad()
def _exact_start(model, tokens, n_scored):
    """Keys and values [layer] of [n_kv_heads][n - n_scored][dim], and hidden states of the tokens after them."""
    cache, n_old = DynamicCache(), len(tokens) - n_scored
    model.net.set_attn_implementation("sdpa")
    for first in range(0, n_old, PIECE):
        part = tokens[None, first:min(first + PIECE, n_old)].to(model.net.device)
        model.net.base_model(input_ids=part, use_cache=True, **{cache_argument(model.net): cache})
    keys = [layer.keys[0].cpu().clone() for layer in cache.layers]
    values = [layer.values[0].cpu().clone() for layer in cache.layers]
    return keys, values, _end(model, tokens[n_old:], cache)


def _end(model, tokens, cache):
    model.net.set_attn_implementation("sdpa")
    made = model.net.base_model(input_ids=tokens[None].to(model.net.device), use_cache=True,
                                **{cache_argument(model.net): cache})
    return made.last_hidden_state[0].cpu().clone()


def compare(model, base, test):
    """Score of hidden states [n][width]."""
    kl, same = [], []
    for first in range(0, len(base), SCORED_AT_ONCE):
        part = slice(first, first + SCORED_AT_ONCE)
        logits = [model.net.lm_head(hidden[part].to(model.net.device)) for hidden in (base, test)]
        same.append((logits[0].argmax(-1) == logits[1].argmax(-1)).cpu().numpy())
        kl.append(fast_kl(*logits).cpu().numpy())
    return Score(np.concatenate(kl), np.concatenate(same))


def fast_kl(base, test):
    """[n] KL(softmax(base) || softmax(test)), in f32 with sums in f64: exact to some 1e-6."""
    base, test = base.log_softmax(-1), test.log_softmax(-1)
    return (base.exp() * (base - test)).sum(-1, dtype=torch.float64).clamp_min(0)
