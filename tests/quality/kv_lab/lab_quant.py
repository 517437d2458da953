# SPDX-License-Identifier: Apache-2.0
"""
Rows through the codes and back, in the transformed space: y to the yhat that would be decoded.

LibraryCoder asks the library, by way of a plan whose transforms are the identity. ScaleCoder does the same in torch
for grids and searches of the scale that the library does not have.
"""
import functools
import importlib.util
import pathlib
import sys

import numpy as np
import torch

from turboquant import Codec, Plan

ORACLE = pathlib.Path(__file__).resolve().parents[2] / "oracle"


def oracle(name):
    """A module of tests/oracle, which knows the format from docs/FORMAT.md alone."""
    full = f"oracle_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, ORACLE / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


class LibraryCoder:
    """heads: [n] of (weight [n_units] f32, [[widths] of each tier]); all of one dimension and count of tiers."""

    def __init__(self, heads):
        n_units, n_tiers = len(heads[0][0]), len(heads[0][1])
        dim = 16 * n_units
        made = [{"layouts": [[int(b) for b in widths] for widths in tiers], "mean": np.zeros(dim, np.float32),
                 "weight": np.asarray(weight, np.float32), "matrix": np.eye(dim)} for weight, tiers in heads]
        layer = {"n_heads": len(heads), "k_dim": dim, "v_dim": dim, "window": 0, "rope": (0, 0, []),
                 "tier_tokens": [16] * (n_tiers - 1) + [0], "sides": [made, made]}
        self._codec = Codec(Plan.read(oracle("plan_writer").write_plan({
            "names": ["lab", "lab", "lab"], "n_tiers": n_tiers, "n_sinks": 0, "frame_tokens": 1, "context": 64,
            "bits_total": 1.0, "layers": [layer]})), 0)

    def __call__(self, head, tier, y):
        """y: [n][dim] f32 tensor."""
        rows = np.ascontiguousarray(y.numpy(), np.float32)
        out = np.zeros_like(rows)
        scales, codes, _ = self._codec.encode(head, 0, tier, 0, rows)
        self._codec.decode(head, 0, tier, 0, scales, codes, out)
        return torch.from_numpy(out)


@functools.cache
def _tables():
    """{width: (step, value index by half levels [256], magnitudes)}"""
    decoder = oracle("decoder")
    found = {}
    for bits, magnitudes in decoder.MAGNITUDES.items():
        m = np.array(magnitudes)
        index = np.searchsorted(m[:-1] + m[1:], np.arange(255), side="right")
        found[bits] = float(decoder.STEP[bits]), torch.from_numpy(m[index].astype(np.float32) * decoder.STEP[bits])
    return found


class ScaleCoder:
    """
    The same in torch and in f32. per_octave: scales an octave (the library has 16). below, above: candidates around
    the root mean square; 0 and 0 search nothing. is_stable: only scales that would be found again, as the library
    wants them.
    """

    def __init__(self, heads, per_octave=16, below=4, above=8, is_stable=True):
        self.heads, self.per_octave, self.below, self.above = heads, per_octave, below, above
        self.is_stable = is_stable

    def __call__(self, head, tier, y):
        weight, tiers = self.heads[head]
        widths = np.repeat(np.asarray(tiers[tier], int), 16)
        coded = widths > 0
        out = torch.zeros_like(y)
        if not coded.any() or not len(y):
            return out
        relative = torch.as_tensor(np.maximum(np.asarray(weight) / max(np.max(weight), 1e-30), 2.0 ** -20),
                                   dtype=torch.float32).repeat_interleave(16)[coded]
        size, widths = y[:, coded].abs().clamp_max(4096), widths[coded]
        energy, peak = self._range(size, widths)
        best, best_error = torch.zeros_like(size), torch.full((len(y),), torch.inf)
        lists = [energy + step for step in range(-self.below, self.above + 1)]
        if self.below or self.above:
            lists += [peak + step for step in (-1, 0, 1)]
        for c in lists:
            c = c.clamp(-8 * self.per_octave + 1, 8 * self.per_octave - 1)
            value = self._code(size, widths, c)
            error = ((size - value).square() * relative).sum(1)
            if self.is_stable:
                again, peak_again = self._range(value, widths)
                found = ((again - self.below + 1 <= c) & (c <= again + self.above - 1)) | (c == peak_again)
                error = error.masked_fill(~found, torch.inf)
            better = error < best_error
            best[better], best_error[better] = value[better], error[better]
        out[:, coded] = best * torch.where(torch.signbit(y[:, coded]), -1.0, 1.0)
        return out

    def _range(self, size, widths):
        """Scales, counted from 1.0, nearest to the root mean square and to what the largest channel asks for."""
        largest = torch.tensor([127 * _tables()[b][0] for b in widths.tolist()])
        least = 2.0 ** -8
        energy = (size.square().mean(1).sqrt().clamp_min(least).log2() * self.per_octave).round()
        return energy, ((size / largest).amax(1).clamp_min(least).log2() * self.per_octave).round()

    def _code(self, size, widths, c):
        scale = torch.exp2(c / self.per_octave)[:, None]
        value = torch.empty_like(size)
        for bits in set(widths.tolist()):
            step, table = _tables()[bits]
            at = torch.from_numpy(widths == bits)
            half = (size[:, at] / scale * (2 / step)).clamp_max(254).to(torch.int64)
            value[:, at] = table[half] * scale
        return value
