# SPDX-License-Identifier: Apache-2.0
"""Which plan serves a layer of a model."""
import os
from dataclasses import dataclass

import numpy as np

from turboquant import Builtin, Plan, PlanLayer, Rope, RopeStyle

from .row_map import RowMap

FREQUENCY_TOLERANCE = 1e-4  # relative; hosts compute the same frequencies to a few bits of f32


@dataclass(frozen=True)
class LayerPlan:
    """Layer `index` of a plan, for one layer of a model."""
    plan: Plan
    index: int
    rows: RowMap


def plans_for(layers, plan):
    """[LayerPlan] for HostLayers. plan: path of a `.tqkv`, a Plan, or "f16" or "q8" for storage without calibration."""
    if plan in ("f16", "q8"):
        return [LayerPlan(Plan.builtin(Builtin[plan.upper()], plan_shape(layer, RopeStyle.HALVES)), 0,
                          RowMap.of(layer, RopeStyle.HALVES)) for layer in layers]
    name = plan.model if isinstance(plan, Plan) else os.fspath(plan)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    if plan.n_layers != len(layers):
        raise ValueError(f"{name} is for another model: it has {plan.n_layers} layers, this model {len(layers)}")
    of_plan = [plan.layer(index) for index in range(plan.n_layers)]
    for index, (mine, layer) in enumerate(zip(of_plan, layers)):
        _check(name, index, mine, layer)
    return [LayerPlan(plan, index, RowMap.of(layer, mine.rope.style))
            for index, (mine, layer) in enumerate(zip(of_plan, layers))]


def plan_shape(layer, style):
    """The PlanLayer that describes a HostLayer."""
    rope = Rope(style if len(layer.inv_freq) else RopeStyle.NONE, layer.inv_freq)
    return PlanLayer(layer.n_heads, layer.n_kv_heads, layer.k_dim, layer.v_dim, layer.window, rope,
                     is_latent=layer.is_latent)


def _check(name, index, of_plan, layer):
    for what in ("n_heads", "n_kv_heads", "k_dim", "v_dim", "is_latent", "window"):
        mine, theirs = getattr(of_plan, what), getattr(layer, what)
        if mine != theirs:
            raise ValueError(f"{name} is for another model: layer {index} has {what} {mine} in the plan and "
                             f"{theirs} in this model")
    mine, theirs = of_plan.rope.inv_freq, layer.inv_freq
    if len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=FREQUENCY_TOLERANCE, atol=1e-9):
        raise ValueError(f"{name} is for another model: layer {index} has another RoPE "
                         f"({_rope_text(mine)} in the plan, {_rope_text(theirs)} in this model)")


def _rope_text(inv_freq):
    return f"{2 * len(inv_freq)} channels, slowest {inv_freq[-1]:.3g}" if len(inv_freq) else "none"
