# SPDX-License-Identifier: Apache-2.0
"""States of a model's cache as rows of a plan, and back."""
from dataclasses import dataclass

import numpy as np
import torch

from turboquant import RopeStyle, Side


@dataclass(frozen=True)
class RowMap:
    """Plans turn the first channels of K, paired in one of two styles; models turn what they like."""
    k_order: np.ndarray | None  # [k_dim] channel of the model at each place of the plan; None: the same order
    is_latent: bool             # of the HostLayer

    @classmethod
    def of(cls, layer, style):
        """For a HostLayer and the RopeStyle of its plan."""
        turned = layer.pairs.ravel() if style == RopeStyle.PAIRS else layer.pairs.T.ravel()
        others = np.setdiff1d(np.arange(layer.k_dim), turned)
        order = np.concatenate([turned, others]).astype(np.int64)
        return cls(None if (order == np.arange(layer.k_dim)).all() else order, layer.is_latent)

    def sides(self, first, second):
        """(K, V) for what a model calls keys and values, and back: with latents they are the other way round."""
        return (second, first) if self.is_latent else (first, second)

    def to_plan(self, side, states):
        """[..., heads][n][dim] of any device and dtype as [..., n][heads][dim] f32: a copy."""
        rows = states.detach().transpose(-3, -2).to("cpu", torch.float32)
        if side == Side.K and self.k_order is not None:
            rows = rows[..., self.k_order]
        return np.array(rows.numpy(), order="C")

    def from_plan(self, side, rows):
        """The inverse, f32 on the CPU."""
        if side == Side.K and self.k_order is not None:
            rows = rows[..., np.argsort(self.k_order)]
        return torch.from_numpy(rows).transpose(-3, -2)
