# SPDX-License-Identifier: Apache-2.0
"""
What a plan is fitted to: mean, covariance and attention metric of every head, as docs/DESIGN.md defines them and
src/calib/observe.c computes them.

Frames differ in length between variants, so K, V and a sample of Q are recorded once per model and text.
"""
from dataclasses import dataclass

import numpy as np
import torch

from turboquant import Side
from turboquant_transformers.observer import observe_piece

from .lab_model import kept, locked, once

PIECE_TOKENS = 2048
QUERY_STRIDE = 8
QUERY_STEP = 2     # of the recorded queries, for the metric
COLD_AGE = 64      # tokens; younger keys are read at many bits
N_SINKS = 4
PAIRS_MAX = 4096   # (query, frame) pairs of a head and piece that add to the metric


@dataclass
class Recording:
    """One layer over all pieces."""
    q: torch.Tensor    # [piece][query][n_heads][k_dim], every QUERY_STRIDE-th token from COLD_AGE on
    k: torch.Tensor    # [piece][n][n_kv_heads][k_dim]
    v: torch.Tensor    # [piece][n][n_kv_heads][v_dim]
    scale: float


@dataclass
class Moments:
    """Of one side of one KV head, in frames of one length."""
    mean: torch.Tensor            # [dim] f64
    cov: torch.Tensor             # [dim][dim] f64
    metric: torch.Tensor          # [dim][dim] f64
    metric_plain: torch.Tensor    # the same as if W_o were orthogonal
    offsets: torch.Tensor = None  # [dim] f64: b of the offset mean, mean + R(j) b for the j-th token of a frame
    offset_mean: torch.Tensor = None
    offset_cov: torch.Tensor = None


def record(model, text_name="mixed", n_tokens=16384):
    """[Recording] of the layers."""
    return once(lambda: _record(model, text_name, n_tokens), "rows", model.name, text_name, n_tokens)


def _record(model, text_name, n_tokens):
    text = model.calibration(text_name)
    n_pieces = max(min(n_tokens, len(text.tokens)) // PIECE_TOKENS, 1)
    rows = [([], [], []) for _ in model.layers]
    scales = {}

    def on_layer(module, query, keys, values, scaling, _softcap):
        q, k, v = rows[module.layer_idx]
        q.append(query[0, :, COLD_AGE::QUERY_STRIDE].transpose(0, 1).cpu().clone())
        k.append(keys[0].transpose(0, 1).cpu().clone())
        v.append(values[0].transpose(0, 1).cpu().clone())
        scales[module.layer_idx] = scaling

    n_free = len(text.tokens) - n_pieces * PIECE_TOKENS
    for i in range(n_pieces):
        piece = text.piece(i * PIECE_TOKENS + n_free * i // max(n_pieces - 1, 1), PIECE_TOKENS)
        observe_piece(model.net, piece.to(model.net.device), on_layer)
    return [Recording(*(torch.stack(part) for part in sides), scales[index]) for index, sides in enumerate(rows)]


def turn(rows, layer, bases):
    """rows: [..., dim], turned by bases [...] tokens, as RoPE turns them. Shapes broadcast."""
    if not len(layer.inv_freq):
        return rows
    inv_freq = torch.from_numpy(layer.inv_freq.astype(np.float64))
    angles = torch.as_tensor(bases, dtype=torch.float64)[..., None] * inv_freq
    c, s = angles.cos().to(rows.dtype), angles.sin().to(rows.dtype)
    first, second = torch.from_numpy(layer.pairs[:, 0].copy()), torch.from_numpy(layer.pairs[:, 1].copy())
    a, b = rows[..., first], rows[..., second]
    turned = a * c - b * s
    out = rows.expand(*turned.shape[:-1], -1).clone()
    out[..., first] = turned
    out[..., second] = b * c + a * s
    return out


def frame_bases(n, frame):
    """[n] first position of each token's frame; frame 0: absolute positions."""
    t = torch.arange(n)
    return t // frame * frame if frame else torch.zeros_like(t)


def moments(model, frame, others=(), text_name="mixed", n_tokens=16384):
    """[layer][side][head] Moments. Those of other frame lengths cost less if they are made along with it."""
    keys = {f: ("moments", model.name, text_name, n_tokens, f) for f in (frame, *others)}
    with locked("moments", model.name, text_name, n_tokens):
        missing = [f for f, key in keys.items() if not kept(*key).exists()]
        if missing:
            recordings = record(model, text_name, n_tokens)
            found = [_layer_moments(*each, missing) for each in zip(model.layers, recordings, model.output_projections)]
            for i, f in enumerate(missing):
                once(lambda i=i: [layer[i] for layer in found], *keys[f])
    return torch.load(kept(*keys[frame]), weights_only=False)


def _layer_moments(layer, rows, projection, frames):
    """[frame][side][head]"""
    n = rows.k.shape[1]
    bases = [frame_bases(n, frame) for frame in frames]
    cold = torch.arange(n) >= N_SINKS
    made = [[[], []] for _ in frames]
    for g in range(layer.n_kv_heads):
        metrics, metric_v, metric_v_plain = _metrics(layer, rows, projection, g, bases)
        values = _of_rows(rows.v[:, cold, g].flatten(0, 1), metric_v, metric_v_plain, None)
        for sides, metric, own in zip(made, metrics, bases):
            keys = torch.cat([turn(k[:, g], layer, -own)[cold] for k in rows.k])
            steps = (torch.arange(n) - own)[cold].repeat(len(rows.k))
            sides[Side.K].append(_of_rows(keys, metric, metric, (layer, steps)))
            sides[Side.V].append(values)
    return made


def _of_rows(x, metric, metric_plain, turning):
    x = x.double()
    made = Moments(x.mean(0), torch.cov(x.T, correction=0), metric, metric_plain)
    if turning:
        made.offset_mean, made.offsets = _offset_mean(x, *turning)
        rest = x - turn(made.offsets, *turning)
        made.offset_cov = torch.cov(rest.T, correction=0)
    return made


def _offset_mean(x, layer, steps):
    """mean and b that explain most of x as mean + R(step) b: what RoPE makes of a constant before it."""
    b = turn(x, layer, -steps).mean(0)
    mean = torch.zeros_like(b)
    for _ in range(3):  # b and mean explain overlapping parts
        mean = (x - turn(b, layer, steps)).mean(0)
        b = turn(x - mean, layer, -steps).mean(0)
    return mean, b


def _metrics(layer, rows, projection, g, bases):
    """Attention metric of K for each of bases, of V, and of V as if W_o were orthogonal, for one KV head."""
    group = layer.n_heads // layer.n_kv_heads
    metrics = [torch.zeros(layer.k_dim, layer.k_dim).double() for _ in bases]
    metric_v, metric_v_plain = torch.zeros(2, layer.v_dim, layer.v_dim).double()
    for h in range(g * group, (g + 1) * group):
        gram = projection[:, h].T @ projection[:, h]
        for piece in range(len(rows.k)):
            weight, p2 = _pair_weights(layer, rows, piece, g, h, gram)
            metric_v += p2 * gram.double()
            metric_v_plain += p2 * torch.eye(layer.v_dim)
            for metric, own in zip(metrics, bases):
                metric += _sum_outer(layer, rows.q[piece, ::QUERY_STEP, h], weight, own)
    return metrics, metric_v, metric_v_plain


def _pair_weights(layer, rows, piece, g, h, gram):
    """[query][n]: p^2 |W_o (v_t - o)|^2 of pairs that read coded keys; and the sum of p^2."""
    k, v = rows.k[piece, :, g], rows.v[piece, :, g]
    n = len(k)
    at = torch.arange(COLD_AGE, n, QUERY_STRIDE * QUERY_STEP)[:, None]
    t = torch.arange(n)
    scores = rows.q[piece, ::QUERY_STEP, h] @ k.T * rows.scale
    hidden = (t > at) | ((t <= at - layer.window) if layer.window else torch.zeros_like(t > at))
    p = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    out = p @ v
    v_gram, out_gram = v @ gram, out @ gram
    distance = (v * v_gram).sum(-1) - 2 * out_gram @ v.T + (out * out_gram).sum(-1, keepdim=True)
    p2 = (p * p).masked_fill_((t < N_SINKS) | (t >= at - COLD_AGE), 0)
    return p2 * distance.clamp_min_(0), p2.sum(dtype=torch.float64)


def _sum_outer(layer, queries, weight, bases):
    """Sum of weight q q', q turned back into the frame of each key; of many frames those that matter most."""
    starts, frame_of = bases.unique(return_inverse=True)
    by_frame = torch.zeros(len(queries), len(starts)).index_add_(1, frame_of, weight)
    by_frame, chosen = by_frame.topk(min(PAIRS_MAX // len(queries), len(starts)))
    local = turn(queries[:, None], layer, -starts[chosen])
    return torch.einsum("if,ifa,ifb->ab", by_frame, local, local).double()
