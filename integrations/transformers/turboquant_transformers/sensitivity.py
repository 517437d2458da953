# SPDX-License-Identifier: Apache-2.0
"""
How much each layer matters. A probe is a piece of text that lies in an uncompressed cache. The old
tokens of one group, the K or the V of one layer, are made coarse in place, and the KL at the logits
of the tokens that follow is what the group costs. Then the rows are put back for the next group.
"""
import numpy as np
import torch
from transformers import DynamicCache

from turboquant import Side

from .host_layers import cache_argument, longest_text

OLD_TOKENS = 1024
SCORED_TOKENS = 32
NEAR_TOKENS = 64   # before the scored ones: left exact where attention reaches further
FLOOR_GROUPS = 4
FLOOR_BITS = 8.0   # hardly a change: the KL that it makes is the rounding of the model's own dtype
KL_LEAST = 1e-9


def kl_of(base, test):
    """[n] f64: KL(softmax(base) || softmax(test)) of logits [n][vocabulary]."""
    base, test = base.double().log_softmax(-1), test.double().log_softmax(-1)
    return (base.exp() * (base - test)).sum(-1)


class Probe:
    """One piece of text whose old tokens lie in a cache. layers: [HostLayer]. maps: [RowMap]."""

    def __init__(self, model, calib, layers, maps, tokens):
        self.model, self.calib, self.layers, self.maps = model, calib, layers, maps
        n_scored = min(SCORED_TOKENS, len(tokens) // 8)
        self.n_old, self.scored = len(tokens) - n_scored, tokens[-n_scored:]
        self.cache = DynamicCache()  # without a config it keeps everything, whatever the window
        self.argument = {cache_argument(model): self.cache}
        model.base_model(input_ids=tokens[None, :self.n_old], use_cache=True, **self.argument)
        self.base = self._score()

    def _score(self):
        """Logits [n_scored][vocabulary] of what follows; the cache is as before."""
        logits = self.model(input_ids=self.scored[None], use_cache=True, **self.argument).logits[0]
        self.cache.crop(-len(self.scored))
        return logits

    def measure(self, index, side, bits):
        """Mean KL and mean distortion with the old tokens of one group at `bits`."""
        rows_of, cached = self.maps[index], self.cache.layers[index]
        near = 0 if self.layers[index].window else NEAR_TOKENS
        n = self.n_old - near if self.n_old > 2 * near else self.n_old
        exact = cached.keys, cached.values
        both = list(rows_of.sides(*exact))
        rows = rows_of.to_plan(side, both[side][0, :, :n])
        distortion = self.calib.perturb(index, side, bits, np.arange(n, dtype=np.int32), rows)
        both[side] = both[side].clone()
        both[side][0, :, :n] = rows_of.from_plan(side, rows)
        cached.keys, cached.values = rows_of.sides(*both)
        kl = kl_of(self.base, self._score()).mean().item()
        cached.keys, cached.values = exact
        return kl, distortion


@torch.no_grad()
def measure(model, calib, layers, maps, text, n_probes, bits, progress):
    """Tells calib what each group costs."""
    n_layers = len(layers)
    n_tokens = min(len(text.tokens), OLD_TOKENS + SCORED_TOKENS, longest_text(model))
    groups = [(index, side) for index in range(n_layers) for side in Side]
    floors = [(n_layers * i // (FLOOR_GROUPS + 1), Side.K if i % 2 else Side.V) for i in range(1, FLOOR_GROUPS + 1)]
    kl, distortion, floor = np.zeros(len(groups)), np.zeros(len(groups)), 0.0
    device = model.get_input_embeddings().weight.device
    for i, tokens in enumerate(text.spread(n_probes, n_tokens)):
        probe = Probe(model, calib, layers, maps, tokens.to(device))
        floor += np.mean([probe.measure(*group, FLOOR_BITS)[0] for group in floors]) / n_probes
        for j, group in enumerate(groups):
            group_kl, group_distortion = probe.measure(*group, bits)
            kl[j] += group_kl / n_probes
            distortion[j] += group_distortion / n_probes
            progress("sensitivity", i * len(groups) + j + 1, n_probes * len(groups))
    for (index, side), above, moved in zip(groups, kl - floor, distortion):
        if moved > 0:  # otherwise all zero
            # Below a twentieth of the floor nothing can be told apart.
            calib.set_sensitivity(index, side, max(above, floor / 20, KL_LEAST), moved)
