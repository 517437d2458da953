# SPDX-License-Identifier: Apache-2.0
"""
Plans of the laboratory: what a `.tqkv` says, and more. Fitting is that of src/calib/fit.c and solving that of
src/calib/solve.c, with a switch for each question.
"""
import heapq
from dataclasses import dataclass, field

import numpy as np
import torch

from turboquant import RopeStyle, Side
from turboquant_transformers import sensitivity
from turboquant_transformers.cache_layer import resident_tokens
from turboquant_transformers.row_map import RowMap

from .lab_model import once
from .lab_quant import LibraryCoder, oracle
from .lab_stats import N_SINKS, frame_bases, moments, turn

DISTORTION = {0: 1.0, 1: 3.63380228e-01, 2: 1.17482235e-01, 3: 3.45898620e-02, 4: 9.51448299e-03, 5: 2.53397676e-03,
              6: 6.89104106e-04, 8: 8.88420143e-05}  # as src/kernels/levels.c
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)
TIERS = ((32, 8.0), (224, 6.0), (768, 4.0))
METRIC_FLOOR, VARIANCE_FLOOR = 1e-3, 1e-9
YOUNG_SHARE, YOUNG_SHARE_LONG, YOUNG_STEP, LONG_STEP, LONG_LEAST, TIER_LEAST = .55, .4, .5, 1.0, .5, 32
NARROW_MOST = (1.0, 2.0)  # of layers that read all, and that slide
READS_ALL = 0
STORE_BYTES, SINK_TABLE, SLOT_BYTES, BLOCK, STEP_BACK = 1024, 64, 12, 16, 32
PERTURB_BITS = 1.5


@dataclass
class HeadPlan:
    """One side of one KV head. y = (x - mean) @ transform."""
    mean: torch.Tensor
    offsets: torch.Tensor | None
    transform: torch.Tensor  # [dim][dim] input channel by output channel
    weight: np.ndarray       # [n_units]
    loss: np.ndarray         # [n_units] in the attention metric, at variance 1
    step: int = 1            # units that share a width
    widths: list = field(default_factory=list)  # [tier][n_units]

    def __post_init__(self):
        self.inverse = torch.linalg.inv(self.transform.double()).float()


@dataclass
class LabPlan:
    layers: list              # [HostLayer]
    frames: list              # [layer] tokens of a frame; 0: absolute positions
    heads: list               # [layer][side][head] HeadPlan
    tier_tokens: list         # [layer][n_tiers]
    n_tiers: int = 4
    n_sinks: int = 4
    context: int = 8192
    bits_total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Make:
    """How heads are fitted."""
    transform: str = "both"     # hadamard, eigen, both
    gamma: float = 0.5
    band: int = 0               # channels that one Hadamard mixes; 0: as shipped, 16, and 64 for heads of 256
    has_w_o: bool = True        # in the metric of V
    has_offsets: bool = False
    step: int = 0               # units that share a width; 0: those of a band, or 1 where the band is a head


def shipped_band(dim):
    return 64 if dim >= 256 and dim % 64 == 0 else 16


# ---- fitting ----------------------------------------------------------------------------------------------------


def fit_head(m, make):
    """HeadPlan without widths for Moments."""
    dim = len(m.mean)
    offsets = m.offsets if make.has_offsets else None
    mean, cov = (m.mean, m.cov.numpy()) if offsets is None else (m.offset_mean, m.offset_cov.numpy())
    metric = (m.metric if make.has_w_o else m.metric_plain).numpy()
    band = dim if make.transform == "hadamard" else make.band or shipped_band(dim)
    values, vectors = np.linalg.eigh(metric if np.trace(metric) > 0 else np.eye(dim))
    values = np.maximum(values, METRIC_FLOOR * max(values.sum(), 1e-300) / dim)
    a = (vectors * values ** (make.gamma / 2)) @ vectors.T
    if make.transform == "hadamard":
        a, basis = np.eye(dim), np.eye(dim)
        variance = np.diag(cov).copy()
        cost = np.diag((vectors * values) @ vectors.T)
    else:
        variance, basis = np.linalg.eigh(a @ cov @ a)
        order = np.argsort(-variance)
        variance, basis = variance[order], basis[:, order]
        cost = ((vectors.T @ basis) ** 2 * values[:, None] ** (1 - make.gamma)).sum(0)
    variance = np.maximum(variance, VARIANCE_FLOOR * variance.max())
    rows, loss = basis.T @ a, np.zeros(dim // 16)
    mixing = oracle("plan_writer").hadamard(band) / np.sqrt(band)
    for first in range(0, dim, band):
        part = slice(first, first + band)
        mixed = rows[part] if make.transform == "eigen" else mixing @ rows[part]
        spread = np.sqrt(variance[part] if make.transform == "eigen" else np.full(band, variance[part].mean()))
        rows[part] = mixed / spread[:, None]
        if make.transform == "eigen":
            units = (variance[part] * cost[part]).reshape(-1, 16).mean(1)
        else:
            units = variance[part].mean() * cost[part].mean()
        loss[first // 16:(first + band) // 16] = units
    return HeadPlan(mean.float(), None if offsets is None else offsets.float(),
                    torch.from_numpy(rows.T.copy()).float(), (loss / loss.mean()).astype(np.float32), loss,
                    make.step or (1 if make.transform == "hadamard" else band // 16))


def fit(moments, make):
    return [[[fit_head(m, make) for m in side] for side in sides] for sides in moments]


# ---- widths -----------------------------------------------------------------------------------------------------


def allocate(losses, prices, budget, widths=WIDTHS):
    """Widths of bands, bought where they take away most loss per byte; and what they cost."""
    bits, spent, heap = [widths[0]] * len(losses), 0.0, []

    def offer(i):
        place = widths.index(bits[i])
        if place + 1 < len(widths) and losses[i] > 0:
            step = widths[place + 1]
            gain = losses[i] * (DISTORTION[bits[i]] - DISTORTION[step])
            heapq.heappush(heap, (-gain / max(prices[i] * (step - bits[i]), 1e-12), i, step))

    for i in range(len(losses)):
        offer(i)
    while heap:
        _, i, step = heapq.heappop(heap)
        cost = prices[i] * (step - bits[i])
        if spent + cost <= budget:
            spent += cost
            bits[i] = step
            offer(i)
    return bits, spent


@dataclass
class Budget:
    """What a plan may cost and how it is spent."""
    bits: float = 3.2
    context: int = 8192
    tiers: tuple = TIERS
    widths: tuple = WIDTHS
    k_share: float | None = None   # of the old tokens' bytes that K gets; None: as the losses ask for
    is_fixed: bool = False         # the last young tier is never drawn out


class Solver:
    """As src/calib/solve.c. weights: [layer][side][head] of losses."""

    def __init__(self, layers, frames, heads, weights, budget):
        self.layers, self.heads, self.budget = layers, heads, budget
        self.tiers = [tier for tier in budget.tiers if tier[1] > budget.bits + .5]
        self.n_tiers = len(self.tiers) + 1
        self.tokens = [t for t, _ in self.tiers]
        self.bits = [[b for _, b in self.tiers] for _ in NARROW_MOST]  # [kind]: of layers that read all, and windows
        self.plan = LabPlan(layers, frames, heads, [None] * len(layers), self.n_tiers, 4, budget.context)
        self.bands = []
        for index, sides in enumerate(heads):
            for side, of_side in enumerate(sides):
                for head, weight in zip(of_side, weights[index][side]):
                    head.widths = [np.zeros(len(head.loss), int) for _ in range(self.n_tiers)]
                    step = head.step
                    self.bands += [(index, side, head, slice(u, u + step), step,
                                    head.loss[u:u + step].sum() * weight)
                                   for u in range(0, len(head.loss), step)]
        self.values = sum(self._resident(i) * layer.n_kv_heads * (layer.k_dim + layer.v_dim)
                          for i, layer in enumerate(layers))

    def solve(self):
        budget = self.budget.bits / 8 * self.values
        share = self._try_young() / budget
        while share > YOUNG_SHARE and (self._narrow() or self._shorten()):
            share = self._try_young() / budget
        if not self.budget.is_fixed and self.n_tiers > 2 and any(not layer.window for layer in self.layers):
            self._draw_out(budget)
        fixed = self._try_young()
        if fixed >= budget:
            raise ValueError(f"young tiers take {fixed * 8 / self.values:.2f} of {self.budget.bits} bits")
        spent = self._solve_old(budget - fixed)
        self.plan.bits_total = (fixed + spent) * 8 / self.values
        return self.plan

    def _draw_out(self, budget):
        first, bits = self.tokens[-1], self.bits[READS_ALL][-1]
        while self._longer(2 * self.tokens[-1], bits, YOUNG_SHARE_LONG * budget):
            pass
        if self.tokens[-1] > first or bits - LONG_STEP <= self.budget.bits + LONG_LEAST:
            return
        if self._longer(2 * first, bits - LONG_STEP, YOUNG_SHARE * budget):
            while self._longer(self.tokens[-1] + first // 4 // BLOCK * BLOCK, bits - LONG_STEP, YOUNG_SHARE * budget):
                pass

    def _longer(self, n_tokens, bits, most):
        """Whether the last young tier could be that long, and that wide in layers that read all."""
        before = self.tokens[-1], self.bits[READS_ALL][-1]
        if n_tokens > self.budget.context or bits < self.tiers[-1][1] - NARROW_MOST[READS_ALL]:
            return False
        self.tokens[-1], self.bits[READS_ALL][-1] = n_tokens, bits
        if self._try_young() <= most:
            return True
        self.tokens[-1], self.bits[READS_ALL][-1] = before
        return False

    def _try_young(self):
        """Bytes of everything but the codes of old tokens."""
        for index in range(len(self.layers)):
            self._set_tiers(index)
        for tier in range(self.n_tiers - 1):
            self._solve_young(tier)
        return sum(self._fixed_bytes(i) for i in range(len(self.layers)))

    def _solve_old(self, left):
        tier, spent = self.n_tiers - 1, 0.0
        shares = [(None, 1.0)] if self.budget.k_share is None else \
            [(Side.K, self.budget.k_share), (Side.V, 1 - self.budget.k_share)]
        for side, share in shares:
            chosen = [band for band in self.bands if side is None or band[1] == side]
            losses = [band[5] if self._has_old(band[0]) else 0.0 for band in chosen]
            bits, cost = allocate(losses, [self._n_old(band[0]) * 2.0 * band[4] for band in chosen], left * share,
                                  self.budget.widths)
            spent += cost
            self._write(chosen, bits, tier)
        return spent

    def _kind(self, index):
        return 1 if self.layers[index].window else 0

    def _solve_young(self, tier):
        for kind, bits in enumerate(self.bits):
            bands = [band for band in self.bands if self._kind(band[0]) == kind]
            prices = [float(band[4]) for band in bands]
            found, _ = allocate([band[5] for band in bands], prices, sum(prices) * bits[tier] + 1e-6,
                                self.budget.widths)
            self._write(bands, found, tier)

    @staticmethod
    def _write(bands, bits, tier):
        for band, b in zip(bands, bits):
            band[2].widths[tier][band[3]] = b

    def _resident(self, index):
        window = self.layers[index].window
        return min(resident_tokens(window), self.budget.context) if window else self.budget.context

    def _reach(self, index):
        window = self.layers[index].window
        return -(-window // BLOCK) * BLOCK + STEP_BACK if window else 0

    def _n_young(self, index):
        return sum(self.plan.tier_tokens[index][:-1])

    def _has_old(self, index):
        return not self._reach(index) or self._n_young(index) < self._reach(index)

    def _n_old(self, index):
        if self._reach(index):
            return self._resident(index)
        return max(-(-(self._resident(index) - self._n_young(index)) // BLOCK) * BLOCK, 0)

    def _set_tiers(self, index):
        reach = self._reach(index)
        left, own = reach or 2 ** 32, []
        for (tokens, _), shortened in zip(self.tiers, self.tokens):
            own.append(min(tokens if reach else shortened, left))
            left -= own[-1]
        self.plan.tier_tokens[index] = own + [0]
        if reach and own and left > 0 and left * self.tiers[-1][1] <= \
                (self._resident(index) - self._n_young(index)) * self.budget.bits:
            self.plan.tier_tokens[index][-2] += left

    def _fixed_bytes(self, index):
        layer, cells, own = self.layers[index], self._resident(index), self.plan.tier_tokens[index]
        total = STORE_BYTES + cells / BLOCK * 4 + 2 * cells / 8 + self._n_old(index) * 2.0 * layer.n_kv_heads
        for tier in range(self.n_tiers - 1):
            one_by_one = tier == 0 or (layer.window and tier + 2 == self.n_tiers)
            slots = -(-(own[tier] + (BLOCK - 1 if one_by_one else 0)) // BLOCK) * BLOCK
            total += slots * (self._token_bytes(index, tier) + SLOT_BYTES)
        if self.n_tiers > 1:
            total += BLOCK * self._token_bytes(index, 0) + SINK_TABLE * SLOT_BYTES
        return total

    def _token_bytes(self, index, tier):
        return sum(2 * int(head.widths[tier].sum()) + 1 for side in self.heads[index] for head in side)

    def _narrow(self):
        for kind in sorted({self._kind(index) for index in range(len(self.layers))}, reverse=True):
            bits = self.bits[kind]
            for tier in range(self.n_tiers - 2, 0, -1):
                if bits[tier] - YOUNG_STEP >= self.tiers[tier][1] - NARROW_MOST[kind]:
                    bits[tier] -= YOUNG_STEP
                    return True
        return False

    def _shorten(self):
        found = False
        for tier in range(1, self.n_tiers - 1):
            shorter = self.tokens[tier] * 3 // 4 // BLOCK * BLOCK
            if shorter >= TIER_LEAST:
                self.tokens[tier] = shorter
                found = True
        return found


# ---- `.tqkv` ----------------------------------------------------------------------------------------------------


def read_plan(path, layers):
    """LabPlan of a `.tqkv` for HostLayers of the same model."""
    with open(path, "rb") as file:
        plan = oracle("decoder").read_plan(file.read())
    heads = []
    for layer, stored in zip(layers, plan.layers):
        order = RowMap.of(layer, RopeStyle(stored.rope.style)).k_order
        sides = []
        for side, of_side in enumerate(stored.sides):
            back = np.argsort(order) if side == Side.K and order is not None else slice(None)
            sides.append([HeadPlan(torch.from_numpy(head.mean[back].copy()), None,
                                   torch.from_numpy(head.transform[back].copy()), head.weight, head.weight, 1,
                                   [np.array(widths) for widths in head.layouts]) for head in of_side])
        heads.append(sides)
    return LabPlan(layers, [plan.frame_tokens] * len(layers), heads, [layer.tier_tokens for layer in plan.layers],
                   plan.n_tiers, plan.n_sinks, plan.context, plan.bits_total)


def write_plan(plan, path, style, arch):
    """
    A `.tqkv` of a LabPlan that has one frame length and no offset mean.

    style: RopeStyle of the engine's rows. arch: what GGUF files of the model say.
    """
    frame, = set(plan.frames)
    layers = []
    for layer, own, sides in zip(plan.layers, plan.tier_tokens, plan.heads):
        order = RowMap.of(layer, style).k_order
        made = []
        for side, of_side in enumerate(sides):
            to = order if side == Side.K and order is not None else slice(None)
            assert all(head.offsets is None for head in of_side)
            made.append([{"layouts": [[int(b) for b in widths] for widths in head.widths],
                          "mean": head.mean.numpy()[to], "weight": head.weight,
                          "matrix": head.transform.numpy()[to]} for head in of_side])
        layers.append({"n_heads": layer.n_heads, "k_dim": layer.k_dim, "v_dim": layer.v_dim, "window": layer.window,
                       "rope": (int(style), 2 * len(layer.inv_freq), layer.inv_freq), "tier_tokens": own,
                       "sides": made})
    data = oracle("plan_writer").write_plan({
        "names": ["lab", arch, "lab"], "n_tiers": plan.n_tiers, "n_sinks": plan.n_sinks,
        "frame_tokens": frame or 2 ** 24, "context": plan.context, "bits_total": plan.bits_total, "layers": layers})
    with open(path, "wb") as file:
        file.write(data)


# ---- sensitivity ------------------------------------------------------------------------------------------------


class Perturber:
    """
    Stands in for turboquant.Calibration in turboquant_transformers.sensitivity.measure.

    head: the only one of each layer that is made coarse; None: all of them.
    """

    def __init__(self, layers, frames, heads, n_sinks, head=None):
        self.layers, self.frames, self.heads, self.n_sinks, self.head = layers, frames, heads, n_sinks, head
        self.found = [[1.0, 1.0] for _ in layers]
        self._coders = {}

    def _coder(self, index, side, bits):
        key = index, side, bits
        if key not in self._coders:
            heads = self.heads[index][side]
            step = heads[0].step
            losses = np.concatenate([head.loss for head in heads])[::step].tolist()
            found, _ = allocate(losses, [1.0] * len(losses), bits * len(losses) + 1e-6)
            widths = np.repeat(found, step).reshape(len(heads), -1)
            self._coders[key] = LibraryCoder([(head.weight, [own]) for head, own in zip(heads, widths)])
        return self._coders[key]

    def perturb(self, index, side, bits, positions, rows):
        """Makes rows [n][n_kv_heads][dim] coarse in place. Their mean distortion."""
        coder, layer, total = self._coder(index, side, bits), self.layers[index], 0.0
        old = torch.from_numpy(positions >= self.n_sinks)
        bases = frame_bases(len(rows), self.frames[index])
        for g, head in enumerate(self.heads[index][side]):
            if self.head not in (None, g):
                continue
            x = torch.from_numpy(rows[:, g].copy())
            y = ((turn(x, layer, -bases) if side == Side.K else x) - head.mean) @ head.transform
            coded = coder(g, 0, y)
            squares = (coded - y)[old].double().square()
            total += float((squares @ torch.from_numpy(np.repeat(head.loss, 16)).double()).sum())
            back = head.mean + coded @ head.inverse
            rows[old.numpy(), g] = (turn(back, layer, bases) if side == Side.K else back)[old].numpy()
        return total / len(rows)

    def set_sensitivity(self, index, side, kl, distortion):
        self.found[index][side] = kl / distortion


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How sensitivities are measured: on pieces of a text, with plans fitted to the same text."""
    frame: int = 1024
    gamma: float = 0.5
    text: str = "mixed"
    n_tokens: int = 16384
    n_probes: int = 16


def sensitivities(model, probing, by_head=False):
    """[layer][side][head] KL for each unit of distortion."""
    most = max(layer.n_kv_heads for layer in model.layers)
    if by_head:
        found = [_sensitivities(model, probing, head) for head in range(most)]
    else:
        found = [_sensitivities(model, probing, None)] * most
    return [[[found[g][index][side] for g in range(layer.n_kv_heads)] for side in Side]
            for index, layer in enumerate(model.layers)]


def _sensitivities(model, probing, head):
    def measure():
        frames = [probing.frame] * len(model.layers)
        found = moments(model, probing.frame, text_name=probing.text, n_tokens=probing.n_tokens)
        heads = fit(found, Make(gamma=probing.gamma))
        perturber = Perturber(model.layers, frames, heads, N_SINKS, head)
        model.net.set_attn_implementation("sdpa")
        sensitivity.measure(model.net, perturber, model.layers, [RowMap.of(layer, RopeStyle.HALVES)
                                                                 for layer in model.layers],
                            model.calibration(probing.text), probing.n_probes, PERTURB_BITS, lambda *progress: None)
        return perturber.found
    return once(measure, "sensitivity", model.name, *vars(probing).values(), *([] if head is None else [head]))
