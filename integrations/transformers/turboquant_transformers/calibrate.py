# SPDX-License-Identifier: Apache-2.0
"""
calibrate(): makes a `.tqkv` for a model, as `tqkv calibrate` does for GGUF files.

    observe       the model runs on text; statistics of what attention sees
    sensitivity   old tokens of each layer's K and V are made coarse alone; KL at the logits
    check         KL of the plan on text that was held back; more bits where it is too much
"""
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from turboquant import Calibration, Plan, RopeStyle, Side

from . import held_out, sensitivity
from .cache_layer import resident_tokens
from .host_layers import describe, longest_text
from .kv_cache import torch_workers
from .observer import observe_piece
from .pieces import hold_back, read_text
from .plan_fit import plan_shape
from .progress import ProgressLines
from .row_map import RowMap

PIECE_TOKENS = 2048
PROFILE_BITS = {"near-lossless": 4.5}

# Converters to GGUF put channels of these into pairs. Their plans do the same, and serve llama.cpp as well.
PAIRED_IN_GGUF = ("llama", "mistral", "mixtral", "granite")


@dataclass(frozen=True)
class CalibrationResult:
    plan: Plan
    kl: float | None   # mean, on text that was held back; None: the text was too short for that
    limit: float       # of kl


def calibrate(model, tokenizer, texts, path, profile="5x", *, n_tokens=16384, n_probes=16, probe_bits=1.5,
              context=8192, max_kl=None, progress=None):
    """
    Writes how the KV cache of a model is best stored to `path` (.tqkv). Done once per model.

    tokenizer: callable as those of transformers. texts: strings like those that the model will read; 20000 tokens do.
    profile: "5x" (16 / 5 bits per value, everything counted), "8x", "near-lossless", or bits as a number.
    n_tokens: tokens to observe. n_probes: pieces that measure how much each layer matters, at probe_bits.
    context: tokens at which the size is counted. max_kl: a plan that loses more on text that is held back gets up
    to 40 % more bits; 0: any; None: by size, .03 for 5x and .12 for 8x.
    progress: progress(phase, done, total); None: lines on stderr.
    Returns a CalibrationResult. Errors: ValueError with a sentence that names the layer or argument.
    """
    bits = _profile_bits(profile)
    progress = progress or ProgressLines()
    text, held_back = hold_back(read_text(tokenizer, texts))
    layers = describe(model)
    style = RopeStyle.PAIRS if model.config.model_type in PAIRED_IN_GGUF else RopeStyle.HALVES
    maps = [RowMap.of(layer, style) for layer in layers]
    calib = Calibration(os.path.basename(model.config.name_or_path) or type(model).__name__,
                        model.config.model_type, len(layers), torch_workers())
    _observe(model, calib, layers, maps, style, text, n_tokens, progress)
    calib.prepare()
    sensitivity.measure(model, calib, layers, maps, text, n_probes, probe_bits, progress)
    limit = held_out.kl_limit(bits) if max_kl is None else max_kl
    result = _solve(model, calib, str(profile), bits, context, held_back, limit, progress)
    result.plan.save(path)
    return result


def _profile_bits(profile):
    text = str(profile)
    try:
        bits = PROFILE_BITS[text] if text in PROFILE_BITS else \
            16 / float(text[:-1]) if text.endswith("x") else float(text)
    except (ValueError, ZeroDivisionError):
        bits = 0
    if not 0.5 <= bits <= 16:
        raise ValueError(f"profile {profile!r}: 5x, 8x, near-lossless or bits per value such as 3.2 are understood")
    return bits


def _observe(model, calib, layers, maps, style, text, n_tokens, progress):
    wanted = min(n_tokens, len(text.tokens))
    n_pieces = -(-wanted // min(PIECE_TOKENS, longest_text(model)))
    positions = np.arange(wanted // n_pieces, dtype=np.int32)
    met = set()

    def on_layer(module, query, keys, values, scaling, softcap):
        index = module.layer_idx
        layer, rows_of = layers[index], maps[index]
        if index not in met:
            met.add(index)
            calib.set_layer(index, plan_shape(layer, style), _output_projection(module, layer),
                            resident_tokens(layer.window) if layer.window else 0)
        q = rows_of.to_plan(Side.K, query[0, :, :, -layer.k_dim:])  # with latents the turned channels, which come last
        if layer.is_latent:
            q = np.concatenate([q, rows_of.to_plan(Side.V, _latent_query(module, query[0], layer))], -1)
        k, v = (rows_of.to_plan(side, states[0]) for side, states in zip(Side, rows_of.sides(keys, values)))
        calib.observe(index, q, k, v, positions, scaling, softcap)

    device = model.get_input_embeddings().weight.device
    for i, tokens in enumerate(_evenly(text, n_pieces, len(positions))):
        observe_piece(model, tokens.to(device), on_layer)
        progress("observe", i + 1, n_pieces)


def _evenly(text, n_pieces, n):
    """Pieces that do not overlap, evenly over the whole text."""
    n_free = len(text.tokens) - n_pieces * n
    return [text.piece(i * n + n_free * i // max(n_pieces - 1, 1), n) for i in range(n_pieces)]


def _latent_query(module, query, layer):
    """[n_heads][n][v_dim]: what the channels of a query that do not turn say to the latent, of which keys are made."""
    plain = query[..., :-layer.k_dim].float()
    to_heads = module.kv_b_proj.weight.detach().float().unflatten(0, (layer.n_heads, -1))
    return torch.einsum("htn,hnl->htl", plain, to_heads[:, :plain.shape[2]])


def _output_projection(module, layer):
    """[n_out][n_heads * v_dim] f32: what becomes of our V after attention. None where it is not known."""
    linear = getattr(module, "o_proj", getattr(module, "dense", None))
    if not isinstance(linear, torch.nn.Linear):
        return None
    weight = linear.weight.detach().float()
    if layer.is_latent:  # values of head h are a projection of the latent
        weight = weight.unflatten(1, (layer.n_heads, -1))
        to_heads = module.kv_b_proj.weight.detach().float().unflatten(0, (layer.n_heads, -1))
        weight = torch.einsum("ohv,hvl->ohl", weight, to_heads[:, -weight.shape[2]:]).flatten(1)
    return weight.cpu().contiguous().numpy()


def _solve(model, calib, name, asked, context, held_back, limit, progress):
    """The plan for `asked` bits, or for more where it loses too much on the text that was held back."""
    if held_back is None or not limit:
        return CalibrationResult(calib.solve(name, asked, context), None, limit)
    n = min(len(held_back.tokens), longest_text(model))
    tokens = held_back.piece(0, n).to(model.get_input_embeddings().weight.device)
    bits, n_checks, result = asked, 0, None
    while bits is not None:
        plan = calib.solve(name, bits, context)
        if result and plan.bits_total <= result.plan.bits_total:
            break  # widths end at 8 bits
        result = CalibrationResult(plan, held_out.plan_kl(model, plan, tokens), limit)
        n_checks += 1
        progress("check", n_checks, n_checks)
        bits = held_out.next_bits(asked, bits, result.kl / limit) if result.kl > limit else None
    if result.kl > limit:
        warnings.warn(f"with {result.plan.bits_total:.2f} bits per value too the KL on held-back text is "
                      f"{result.kl:.4f}, above {limit:.4f}: ask for more bits, or say with max_kl what is good enough")
    return result
