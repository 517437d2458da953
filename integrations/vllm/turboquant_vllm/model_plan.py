# SPDX-License-Identifier: Apache-2.0
"""Which plan serves which layer, and whether they fit together.

TQKV_PLAN names a .tqkv file, or is `f16` or `q8`: plans that are built in and need no calibration.
"""
import functools
import hashlib
import math
import os

import torch
from turboquant import Builtin, Plan, PlanLayer, RopeStyle

BUILTINS = {"f16": Builtin.F16, "q8": Builtin.Q8}
COPIES_WIDER = 1.4  # than the blocks, of tiers that get copies


class Refusal(ValueError):
    """What the plugin cannot serve, as a sentence for whoever starts the server."""


def plan_name():
    return os.environ.get("TQKV_PLAN")


@functools.cache
def load_plan(name):
    """The plan of a file; None for a built-in one, which is made layer by layer."""
    return None if name in BUILTINS else Plan.load(name)


def fingerprint(name):
    """Bytes that differ whenever stored bytes may mean something else."""
    plan = load_plan(name)
    return plan.fingerprint if plan else hashlib.sha256(f"built-in {name} 0".encode()).digest()


class LayerPlan:
    """The plan of one attention layer: plan, index of its layer, shape (turboquant.PlanLayer)."""

    def __init__(self, name, index, n_heads, n_kv_heads, head_size, head_size_v, window):
        loaded = load_plan(name)
        self.plan = loaded or Plan.builtin(
            BUILTINS[name], PlanLayer(n_heads, n_kv_heads, head_size, head_size_v, window or 0))
        self.index = index if loaded else 0
        if self.index >= self.plan.n_layers:
            raise Refusal(f"layer {index}: the plan has {self.plan.n_layers} layers; it is of another model")
        self.shape = self.plan.layer(self.index)
        has = (n_heads, n_kv_heads, head_size, head_size_v, window or 0)
        wants = (self.shape.n_heads, self.shape.n_kv_heads, self.shape.k_dim, self.shape.v_dim, self.shape.window)
        if has != wants:
            raise Refusal(f"layer {index}: (heads, KV heads, K channels, V channels, window) are {has} in the model "
                          f"and {wants} in the plan; it is of another model")

    @property
    def n_tiers(self):
        return self.plan.n_tiers

    @property
    def token_bytes(self):
        """Bytes of one token in a block of the engine."""
        return self.shape.token_bytes[self.n_tiers - 1]

    def inv_freq(self):
        return torch.tensor(self.shape.rope.inv_freq)


def channel_order(plan, ropes):
    """Channel of the model for each channel of K in the plan, or None where they are the same.

    ropes: the model's RoPE modules. A plan made from a GGUF file may pair channels 2i and 2i + 1 where
    the model pairs i and i + n/2; the frequencies must be the same.
    """
    style, n_rot = plan.shape.rope.style, 2 * len(plan.shape.rope.inv_freq)
    if style == RopeStyle.NONE:
        return None
    for rope in ropes:
        if rope.rotary_dim == n_rot and has_frequencies(rope, plan.inv_freq()):
            break
    else:
        raise Refusal(f"layer {plan.index}: no RoPE of the model has the plan's {n_rot} channels and frequencies")
    if rope.is_neox_style == (style == RopeStyle.HALVES):
        return None
    channels = torch.arange(n_rot)
    pairs = channels.view(2, -1).t() if style == RopeStyle.PAIRS else channels.view(-1, 2).t()
    return torch.cat([pairs.flatten(), torch.arange(n_rot, plan.shape.k_dim)])


def has_frequencies(rope, inv_freq):
    """Whether a token at position 1 is turned by these angles; a factor on all of them does not matter."""
    table = rope.cos_sin_cache[1]  # [cosines, sines]
    turned = torch.cat([inv_freq.cos(), inv_freq.sin()])
    length = table.float().norm() / turned.norm()
    return torch.allclose(table.float() / length, turned, atol=4 * torch.finfo(table.dtype).eps)


def copies_for(plan, n_tokens, max_num_seqs):
    """Sequences for which each younger tier holds copies, as the engine has n_tokens of room.

    The plan counts its tiers at a context, so older tiers get copies for as many sequences as fit at
    that context. The youngest tier, which is small, gets them for eight times as many. A tier that is
    hardly wider than the blocks gets none: its tokens lie in the blocks as well.
    """
    at_context = max(1, math.ceil(n_tokens / plan.plan.context))
    return [min(max_num_seqs, at_context * (8 if tier == 0 else 1)) if is_worth_copies(plan, tier) else 0
            for tier in range(plan.n_tiers - 1)]


def is_worth_copies(plan, tier):
    return tier == 0 or plan.shape.token_bytes[tier] >= COPIES_WIDER * plan.token_bytes
