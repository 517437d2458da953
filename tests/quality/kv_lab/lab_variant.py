# SPDX-License-Identifier: Apache-2.0
"""A variant from the options of lab.py: its plan, its score, and that of its base on the same tokens."""
import copy
import functools

import numpy as np
import torch

from turboquant import RopeStyle, Side
from turboquant_transformers.calibrate import PAIRED_IN_GGUF

from . import lab_plan, lab_quant, lab_run
from .lab_model import LabModel, once
from .lab_stats import moments, turn

N_TOKENS = 16384  # that statistics are taken from
SPREAD_STEP = 256
PROFILES = {2.0: "8x", 3.2: "5x"}
FRAMES = (1024, 1, 64, 256, 0)  # whose moments are made together
SHIPPED = {"frame": 1024, "frame_full": None, "offsets": False, "transform": "both", "gamma": .5, "band": 0, "step": 0,
           "no_w_o": False, "widths": lab_plan.WIDTHS, "scale": "search", "calibration": "mixed",
           "calibration_tokens": N_TOKENS, "sensitivity": "layer", "probes": 16, "k_share": None,
           "tiers": lab_plan.TIERS, "fixed_tiers": False, "exact": "", "spread": 0, "plan": None, "probe_text": "mixed"}
SCALES = {"search": {}, "rms": {"below": 0, "above": 0, "is_stable": False},
          "fine": {"per_octave": 32, "below": 8, "above": 16}, "coarse": {"per_octave": 8, "below": 2, "above": 4},
          "free": {"is_stable": False}}


@functools.cache
def load(name, device):
    return LabModel(name, device)


def frames_of(model, args):
    return [args.frame if layer.window or args.frame_full is None else args.frame_full for layer in model.layers]


def make_plan(model, args):
    frames = frames_of(model, args)
    make = lab_plan.Make(transform=args.transform, gamma=args.gamma, band=args.band, step=args.step,
                         has_w_o=not args.no_w_o, has_offsets=args.offsets)
    together = FRAMES if args.calibration == "mixed" else ()
    by_frame = {frame: moments(model, frame, together, args.calibration, args.calibration_tokens)
                for frame in sorted(set(frames))}
    if args.spread:
        spread_metrics(model, by_frame, args.spread)
    heads = lab_plan.fit([by_frame[frame][index] for index, frame in enumerate(frames)], make)
    if args.sensitivity == "none":
        weights = [[[1.0] * layer.n_kv_heads] * len(Side) for layer in model.layers]
    else:
        probing = lab_plan.Probing(frame=args.base["frame"], gamma=args.base["gamma"], text=args.probe_text,
                                   n_tokens=N_TOKENS, n_probes=args.probes)
        weights = lab_plan.sensitivities(model, probing, args.sensitivity == "head")
    budget = lab_plan.Budget(args.bits, args.context, args.tiers, args.widths, args.k_share, args.fixed_tiers)
    return lab_plan.Solver(model.layers, frames, heads, weights, budget).solve()


def spread_metrics(model, by_frame, reach):
    """Metrics of K as if queries came from all distances up to reach: averaged over turns by whole frames."""
    for frame, layers in by_frame.items():
        for layer, sides in zip(model.layers, layers):
            if layer.window or not frame:
                continue
            for m in sides[Side.K]:
                turns = range(0, reach, max(frame, SPREAD_STEP))
                m.metric = sum(turn(turn(m.metric, layer, by).T, layer, by)
                               for by in map(torch.tensor, turns)) / len(turns)


def coder_of(args):
    if args.scale == "search":
        return lab_quant.LibraryCoder
    return functools.partial(lab_quant.ScaleCoder, **SCALES[args.scale])


def scores(model, plan, args):
    """Score of each text."""
    options = lab_run.Options(args.chunk, coder_of(args), frozenset(args.exact.split(",")))
    for text in args.texts.split(","):
        if args.scored:
            yield lab_run.score_end(model, text, args.n, args.scored, plan, options)
        else:
            yield lab_run.score_text(model, text, args.n, plan, options)


def base_scores(model, args):
    """The same of the variant that ratios are to."""
    own = copy.copy(args)
    vars(own).update(args.base)
    differs = [f"{name}={value}".replace("/", "+") for name, value in args.base.items() if value != SHIPPED[name]]
    return once(lambda: list(scores(model, make_plan(model, own), own)), "base", model.name, args.bits, args.context,
                args.n, args.scored, args.chunk, args.texts.replace(",", "+"), *differs)


def run(args):
    """The row of a variant."""
    model = load(args.model, args.device)
    plan = lab_plan.read_plan(args.plan, model.layers) if args.plan else make_plan(model, args)
    if args.save:
        kind = model.net.config.model_type
        style = RopeStyle.PAIRS if kind in PAIRED_IN_GGUF else RopeStyle.HALVES
        lab_plan.write_plan(plan, args.save, style, kind.removesuffix("_text"))
    is_base = all(getattr(args, name) == value for name, value in args.base.items())
    by_text = None if is_base else list(scores(model, plan, args))
    base_by_text = base_scores(model, args)  # last: rows that are made side by side wait for it
    by_text = by_text or base_by_text
    score, base = lab_run.joined(by_text), lab_run.joined(base_by_text)
    ratio, ratio_ci95 = lab_run.paired_ratio(score.kl, base.kl)
    typical, typical_ci95 = lab_run.typical_ratio(score.kl, base.kl)
    row = {"profile": PROFILES.get(args.bits, f"{args.bits:g} bits"), "model": f"{args.model}-f32",
            "context": args.n, "plan_context": args.context, "texts": args.texts,
            "scored": args.scored or args.n // 2, "bits": round(plan.bits_total, 4), **score.numbers(),
            "ratio": ratio, "ratio_ci95": ratio_ci95, "typical": typical, "typical_ci95": typical_ci95}
    if args.by_text:
        row["kl_by_text"] = {text: float(own.kl.mean()) for text, own in zip(args.texts.split(","), by_text)}
    return row
