# SPDX-License-Identifier: Apache-2.0
"""A second decoder and encoder, written from docs/FORMAT.md alone: numpy only, plain, slow.

    plan = read_plan(open("model.tqkv", "rb").read())
    head = plan.layers[0].sides[K][0]
    x = decode_row(plan, 0, K, 0, tier=1, base=256, scale=scale, codes=codes)
    scale, codes = encode_row(plan, 0, K, 0, tier=1, base=256, x=x)

Section numbers are those of the page.
"""
import hashlib
import math
import struct
from dataclasses import dataclass, field

import numpy as np

K, V = 0, 1
F32, F64 = np.float32, np.float64
UNIT = 16
PLAIN = 16
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8, 16)


class FormatError(Exception):
    """The bytes are not what the page allows."""


def need(condition, what):
    if not condition:
        raise FormatError(what)


# Section 1: rows

PLANES = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
STEP = {1: "0x1.9bbbdap-8", 2: "0x1.85b62ep-7", 3: "0x1.159e34p-6", 4: "0x1.608690p-6", 5: "0x1.a4a8fcp-6",
        6: "0x1.e304bep-6", 8: "0x1.020408p-5"}
STEP = {bits: F32(float.fromhex(text)) for bits, text in STEP.items()}
MAGNITUDES = {
    1: [127],
    2: [38, 127],
    3: [14, 45, 79, 127],
    4: [6, 18, 31, 44, 58, 75, 96, 127],
    5: [3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127],
    6: [1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 30, 32, 35, 38, 40, 43, 46, 49, 53, 56, 60, 64, 68, 73, 78, 84, 91,
        99, 110, 127],
    8: list(range(128)),
}
SCALE = np.array([0.0] + [2.0 ** ((c - 128) / 16) for c in range(1, 256)], F64).astype(F32)
SCALE_INVERSE = np.array([0.0] + [2.0 ** ((128 - c) / 16) for c in range(1, 256)], F64).astype(F32)


def level_table(bits):
    """Level of each code."""
    if bits == 8:
        return np.array([-127] + list(range(-127, 128)))
    magnitudes = MAGNITUDES[bits]
    return np.array([-m for m in reversed(magnitudes)] + magnitudes)


LEVELS = {bits: level_table(bits) for bits in STEP}


def row_bytes(widths):
    return 2 * sum(widths)


def unpack_unit(data, bits):
    """Sixteen codes."""
    codes = [0] * UNIT
    at = shift = 0
    for w in PLANES[bits]:
        for d in range(UNIT):
            byte = data[at + d % (2 * w)]
            codes[d] |= ((byte >> (d // (2 * w) * w)) & ((1 << w) - 1)) << shift
        at += 2 * w
        shift += w
    return codes


def pack_unit(codes, bits):
    data = bytearray(2 * bits)
    at = shift = 0
    for w in PLANES[bits]:
        for d in range(UNIT):
            data[at + d % (2 * w)] |= ((codes[d] >> shift) & ((1 << w) - 1)) << (d // (2 * w) * w)
        at += 2 * w
        shift += w
    return bytes(data)


def unpack_row(codes, widths, scale):
    """yhat of section 2, step 3."""
    yhat = np.zeros(UNIT * len(widths), F32)
    at = 0
    for u, bits in enumerate(widths):
        if bits:
            levels = LEVELS[bits][unpack_unit(codes[at:at + 2 * bits], bits)].astype(F32)
            yhat[UNIT * u:UNIT * (u + 1)] = SCALE[scale] * (STEP[bits] * levels)
        at += 2 * bits
    return yhat


# Section 2: decoding

def decode_row(plan, layer, side, head, tier, base, scale, codes, rope=None):
    h = plan.layers[layer].sides[side][head]
    widths = h.layouts[tier]
    need(len(codes) == row_bytes(widths), "length of a row")
    dim = UNIT * len(widths)
    if scale == 0:
        return np.zeros(dim, F32)
    if h.plain:
        x = np.frombuffer(codes, "<f2").astype(F32)
        return np.where(np.isfinite(x), x, F32(0))
    yhat = unpack_row(codes, widths, scale).astype(F64)
    x = (h.mean.astype(F64) + yhat @ h.inverse()).astype(F32)
    if side == K:
        x = turn(x, rope or plan.layers[layer].rope, base)
    return x


def decode_bound(plan, layer, side, head, tier, scale, codes):
    """Sum of |terms| of each decoded channel, for bounds on rounding errors."""
    h = plan.layers[layer].sides[side][head]
    if scale == 0 or h.plain:
        return np.zeros(UNIT * len(h.layouts[tier]))
    yhat = np.abs(unpack_row(codes, h.layouts[tier], scale).astype(F64))
    terms = np.abs(h.mean.astype(F64)) + yhat @ np.abs(h.inverse())
    return np.full(terms.shape, terms.max()) if side == K else terms  # turning mixes channels


# Section 4: turning

SIN_TERMS = [-1, 1, -1, 1, -1, 1, -1]      # of 1/3!, 1/5!, ... 1/15!
COS_TERMS = [-1, 1, -1, 1, -1, 1, -1, 1]   # of 1/2!, 1/4!, ... 1/16!


def sin_cos(base, inv_freq):
    angle = F64(base) * inv_freq.astype(F64)
    angle = np.where(np.abs(angle) <= 2.0 ** 33, angle, 0.0)
    n = np.trunc(angle * float.fromhex("0x1.45f306dc9c883p-1") + np.where(angle >= 0, 0.5, -0.5))
    r = angle
    for part in ("0x1.921fap+0", "0x1.54442p-20", "0x1.a308cp-41", "0x1.313198a2e037p-61"):
        r = r - n * float.fromhex(part)
    q = r * r
    p_sum = np.full(r.shape, SIN_TERMS[-1] / math.factorial(15))
    for k in range(5, -1, -1):
        p_sum = p_sum * q + SIN_TERMS[k] / math.factorial(2 * k + 3)
    q_sum = np.full(r.shape, COS_TERMS[-1] / math.factorial(16))
    for k in range(6, -1, -1):
        q_sum = q_sum * q + COS_TERMS[k] / math.factorial(2 * k + 2)
    s, c = r + r * (q * p_sum), 1.0 + q * q_sum
    quarter = n.astype(np.int64) & 3
    sine = np.choose(quarter, [s, c, -s, -c])
    cosine = np.choose(quarter, [c, -s, -c, s])
    return sine.astype(F32), cosine.astype(F32)


def turn(x, rope, base, inverse=False):
    if rope.style == 0 or base == 0:
        return x
    s, c = sin_cos(base, rope.inv_freq)
    if inverse:
        s = -s
    i = np.arange(rope.n_rot // 2)
    first, second = (i, i + rope.n_rot // 2) if rope.style == 1 else (2 * i, 2 * i + 1)
    a, b = x[first], x[second]
    out = x.copy()
    out[first] = a * c - b * s
    out[second] = b * c + a * s
    return out


# Section 5: encoding

ENERGY = np.array([2.0 ** ((2 * i - 257) / 16) for i in range(1, 256)], F64).astype(F32)
PEAK = np.array([2.0 ** ((2 * i - 257) / 32) for i in range(1, 256)], F64).astype(F32)
INV_STEP2 = {bits: F32(2.0 / F64(step)) for bits, step in STEP.items()}
INV_PEAK = {bits: F32(1.0 / F64(F32(F64(127) * F64(step)))) for bits, step in STEP.items()}
HALF_MAX = F32(65504)
CHANNEL_MAX = F32(4096)


def fma(a, b, c):
    """f32(a b + c), rounded once: the sum of f64 is rounded to odd first, so that the second rounding is right."""
    product, c = np.asarray(a, F64) * np.asarray(b, F64), np.asarray(c, F64)
    total = np.atleast_1d(product + c)
    part = total - product
    lost = np.atleast_1d((product - (total - part)) + (c - part))
    bits = total.view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    bits += np.where((lost != 0) & np.isfinite(total) & (bits % 2 == 0), away, 0)
    return total.astype(F32).reshape(np.shape(product + c))


def lane_sum(values):
    """values: [units][16]."""
    lanes = np.zeros(UNIT, F32)
    for unit in values:
        lanes = lanes + unit
    for n in (8, 4, 2, 1):
        lanes = lanes[:n] + lanes[n:2 * n]
    return lanes[0]


def sum_of_squares(values, factors):
    """values: [units][16] of integers; factors: [units]."""
    lane = np.zeros(UNIT // 2, F32)
    for unit, factor in zip(values, factors):
        lane = fma(factor, (unit[0::2] ** 2 + unit[1::2] ** 2).astype(F32), lane)
    return ((lane[0] + lane[2]) + (lane[4] + lane[6])) + ((lane[1] + lane[3]) + (lane[5] + lane[7]))


def index_of(table, v):
    return max(1, int((table <= v).sum()))


def limited(c):
    return min(max(c, 1), 255)


class Coder:
    """The units of width > 0 of one row; arrays are [units][16]."""

    def __init__(self, widths, weights, a):
        self.units = [u for u, bits in enumerate(widths) if bits]
        self.bits = [widths[u] for u in self.units]
        self.only_8 = set(self.bits) == {8}
        self.weights = weights[self.units]
        self.a = a[self.units]
        self.n = F32(UNIT * len(self.units))
        self.k = 12 - (math.frexp(max(float(self.a.max()), 2.0 ** -7))[1] - 1)
        self.q = np.rint(self.a * F32(2.0 ** self.k)).astype(int)

    def candidates(self):
        mean = sum_of_squares(self.q, np.ones(len(self.bits), F32)) / self.n * F32(2.0 ** (-2 * self.k))
        energy = index_of(ENERGY, mean)
        inv_peak = np.array([INV_PEAK[b] for b in self.bits], F32)[:, None]
        peak = index_of(PEAK, (self.a * inv_peak).max())
        for c in range(1, 256):
            by_energy, by_peak = energy - 4 <= c <= energy + 8, peak - 1 <= c <= peak + 1
            if peak - 2 <= c <= peak + 3 if self.only_8 else by_energy or by_peak:
                yield c

    def code(self, c):
        """Indices, levels, and what comes first in the order of candidates."""
        index, level, difference = (np.zeros(self.q.shape, int) for _ in range(3))
        exact = np.zeros(self.q.shape, F32)
        for i, bits in enumerate(self.bits):
            magnitudes = np.array(MAGNITUDES[bits])
            to_half_levels = SCALE_INVERSE[c] * INV_STEP2[bits] * F32(2.0 ** (15 - self.k))
            to_size = SCALE[c] * STEP[bits] * F32(2.0 ** (self.k + 7))
            t = self.q[i] * min(int(np.rint(to_half_levels)), 65535) >> 15
            index[i] = np.searchsorted(magnitudes[:-1] + magnitudes[1:], np.minimum(t, 254), side="right")
            level[i] = magnitudes[index[i]]
            difference[i] = self.q[i] - (level[i] * min(int(np.rint(to_size)), 65535) >> 7)
            exact[i] = self.a[i] - SCALE[c] * (STEP[bits] * level[i].astype(F32))
        error = sum_of_squares(difference, self.weights)
        near = error <= F32(16) * self.n
        if near:
            error = lane_sum(self.weights[:, None] * (exact * exact))
        return index, level, (not near, error, c)

    def again(self, c, level):
        """peak' and energy'."""
        largest = level.max()
        peak = c + round(16 * math.log2(largest / 127)) if largest else 1
        factors = [STEP[bits] * STEP[bits] for bits in self.bits]
        return limited(peak), limited(c - 128 + index_of(ENERGY, sum_of_squares(level, factors) / self.n))

    def is_stable(self, c, level):
        peak, energy = self.again(c, level)
        return peak - 1 <= c <= peak + 2 if self.only_8 else energy - 3 <= c <= energy + 7 or c == peak

    def choose(self):
        """Scale, indices and levels."""
        tried = sorted((self.code(c) for c in self.candidates()), key=lambda coded: coded[2])
        index, level, (_, _, c) = next(coded for coded in tried if self.is_stable(coded[2][2], coded[1]))
        if not level.any():
            return 1, index, level
        lower, _ = self.again(c, level)
        if c > lower and (c - lower) % 16 == 0:
            doubled = level << (c - lower) // 16
            if all(set(unit) <= set(MAGNITUDES[bits]) for unit, bits in zip(doubled.tolist(), self.bits)):
                index = np.array([np.searchsorted(MAGNITUDES[bits], unit) for unit, bits in zip(doubled, self.bits)])
                return lower, index, doubled
        return c, index, level


def encode_y(head, widths, y):
    """From step 4 on."""
    zero = (0, bytes(row_bytes(widths)))
    largest = head.weight.max()
    weights = np.ones(len(widths), F32) if largest == 0 else np.maximum(head.weight / largest, F32(2.0 ** -20))
    if not any(widths):
        return zero if not head.mean.any() else (1, b"")
    y = y.reshape(-1, UNIT)
    coder = Coder(widths, weights, np.minimum(np.abs(y), CHANNEL_MAX))
    scale, index, level = coder.choose()
    if scale == 1 and not head.mean.any() and not level.any():
        return zero
    out = b""
    for k, bits in enumerate(coder.bits):
        n = 1 << (bits - 1)
        negative = np.signbit(y[coder.units[k]])
        below = n - index[k] if bits == 8 else n - 1 - index[k]
        out += pack_unit([int(code) for code in np.where(negative, below, n + index[k])], bits)
    return scale, out


def hadamard_factors(transform):
    """Factors of the input channels and the size of the blocks, or None where it is no such matrix."""
    dim = len(transform)
    block = dim & -dim
    i = np.arange(dim)
    odd = np.array([[bin(a & b & (block - 1)).count("1") % 2 for b in i] for a in i])
    factors = transform[i, i - i % block]
    inside = i[:, None] // block == i[None, :] // block
    wanted = np.where(inside, np.where(odd, -factors[:, None], factors[:, None]), 0)
    return (factors, block) if (wanted == transform).all() else None


def apply_transform(transform, z):
    hadamard = hadamard_factors(transform)
    if hadamard is None:
        y = np.zeros(len(z), F32)
        for i, row in enumerate(transform):
            y = fma(row, z[i], y)
        return y
    factors, block = hadamard
    y, n = factors * z, 1
    while n < block:
        first = np.array([j for j in range(len(y)) if not j & n])
        a, b = y[first], y[first + n]
        y[first], y[first + n] = a + b, a - b
        n *= 2
    return y


def encode_row(plan, layer, side, head, tier, base, x, rope=None):
    h = plan.layers[layer].sides[side][head]
    widths = h.layouts[tier]
    zero = (0, bytes(row_bytes(widths)))
    if not np.isfinite(x).all() or not x.any():
        return zero
    if h.plain:
        halves = np.clip(x, -HALF_MAX, HALF_MAX).astype("<f2")
        return (1, halves.tobytes()) if halves.any() else zero
    with np.errstate(over="ignore", invalid="ignore"):
        if side == K:
            x = turn(x, rope or plan.layers[layer].rope, base, inverse=True)
        y = apply_transform(h.transform, x - h.mean)
    return encode_y(h, widths, y) if np.isfinite(y).all() else zero


def recode_row(plan, layer, side, head, tier_from, scale, codes, tier_to):
    h = plan.layers[layer].sides[side][head]
    if scale == 0:
        return 0, bytes(row_bytes(h.layouts[tier_to]))
    if h.plain:
        return scale, codes
    return encode_y(h, h.layouts[tier_to], unpack_row(codes, h.layouts[tier_from], scale))


# Section 6: the plan file

@dataclass
class Rope:
    style: int
    n_rot: int
    inv_freq: np.ndarray


@dataclass
class Head:
    layouts: list  # widths for each tier
    mean: np.ndarray = None
    weight: np.ndarray = None
    transform: np.ndarray = None  # [input channel][output channel]
    _inverse: np.ndarray = None

    @property
    def plain(self):
        return self.layouts[0][0] == PLAIN

    def inverse(self):
        """[output channel][input channel], as the library rounds it."""
        if self._inverse is None:
            self._inverse = np.linalg.inv(self.transform.astype(F64)).astype(F32).astype(F64)
        return self._inverse


@dataclass
class Layer:
    n_heads: int = 0
    n_kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    window: int = 0
    rope: Rope = None
    tier_tokens: list = field(default_factory=list)
    sides: list = field(default_factory=lambda: [[], []])
    is_latent: int = 0


@dataclass
class Plan:
    n_tiers: int
    n_sinks: int
    frame_tokens: int
    context: int
    bits_total: float
    fingerprint: bytes
    names: list
    layers: list


MAGIC = bytes.fromhex("89 54 51 4b 56 0d 0a 1a")
HEADER_BYTES = 96


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        need(n <= len(self.data) - self.at, f"the file ends at byte {self.at}")
        self.at += n
        return self.data[self.at - n:self.at]

    def number(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def array(self, kind, n):
        return np.frombuffer(self.take(n * np.dtype(kind).itemsize), kind)


def plan_fingerprint(data):
    return hashlib.sha256(data[:24] + data[56:]).digest()


def read_plan(data):
    need(data[:8] == MAGIC, "magic")
    r = Reader(data)
    r.take(8)
    need(r.number("I") == 0, "version")
    need(r.number("I") == 0, "reserved")
    need(r.number("Q") == len(data) >= HEADER_BYTES, "length")
    fingerprint = r.take(32)
    need(fingerprint == plan_fingerprint(data), "fingerprint")
    n_layers, n_tiers, n_sinks, frame_tokens, context, n_ropes, n_layouts = (r.number("I") for _ in range(7))
    need(r.number("I") == 0, "reserved")
    bits_total = r.number("d")
    need(1 <= n_layers <= 4096 and 1 <= n_tiers <= 4, "n_layers, n_tiers")
    need(n_sinks <= 65536 and 1 <= frame_tokens <= 2 ** 24 and 1 <= context < 2 ** 31, "numbers")
    need(0 <= bits_total < math.inf, "bits_total")

    names = [r.take(r.number("H")).decode("utf-8") for _ in range(3)]
    ropes = [read_rope(r) for _ in range(n_ropes)]
    layouts = [list(r.take(r.number("H"))) for _ in range(n_layouts)]
    for widths in layouts:
        need(1 <= len(widths) <= 64 and all(b in WIDTHS for b in widths), "widths")
        need(PLAIN not in widths or set(widths) == {PLAIN}, "f16 mixed with others")
    layers = [read_layer(r, ropes, n_tiers) for _ in range(n_layers)]
    for layer in layers:
        for side, dim in ((K, layer.k_dim), (V, layer.v_dim)):
            layer.sides[side] = [read_head(r, layouts, n_tiers, dim) for _ in range(layer.n_kv_heads)]
    need(r.at == len(data), "bytes after the last head")
    return Plan(n_tiers, n_sinks, frame_tokens, context, bits_total, fingerprint, names, layers)


def read_rope(r):
    style, n_rot = r.number("I"), r.number("I")
    need(style <= 2 and n_rot % 2 == 0 and n_rot <= 1024 and (style == 0) == (n_rot == 0), "rope")
    inv_freq = r.array("<f4", n_rot // 2)
    need((np.abs(inv_freq) <= 4).all(), "inv_freq")
    return Rope(style, n_rot, inv_freq)


def read_layer(r, ropes, n_tiers):
    n_kv_heads = r.number("I")
    if n_kv_heads == 0:
        return Layer()
    n_heads, k_dim, v_dim, window, rope = (r.number("I") for _ in range(5))
    is_latent, v_dim = v_dim >> 31, v_dim & 0x7fffffff
    need(not is_latent or n_kv_heads == 1, "latent layer of several KV heads")
    tier_tokens = [r.number("I") for _ in range(n_tiers)]
    need(n_heads % n_kv_heads == 0 and n_heads <= 4096, "n_heads")
    need(all(0 < dim <= 1024 and dim % UNIT == 0 for dim in (k_dim, v_dim)), "dims")
    need(rope < len(ropes) and ropes[rope].n_rot <= k_dim, "rope")
    need(tier_tokens[-1] == 0 and max(tier_tokens) <= 2 ** 24, "tier_tokens")
    return Layer(n_heads, n_kv_heads, k_dim, v_dim, window, ropes[rope], tier_tokens, is_latent=is_latent)


def read_head(r, layouts, n_tiers, dim):
    ids = [r.number("I") for _ in range(n_tiers)]
    need(all(i < len(layouts) and len(layouts[i]) == dim // UNIT for i in ids), "layout")
    head = Head([layouts[i] for i in ids])
    need(len({PLAIN in widths for widths in head.layouts}) == 1, "f16 in some tiers")
    if head.plain:
        return head
    head.mean = r.array("<f4", dim)
    head.weight = r.array("<f4", dim // UNIT)
    exponents = r.array("i1", dim).astype(int)
    halves = r.array("<f2", dim * dim).reshape(dim, dim)
    need(np.isfinite(head.mean).all() and np.isfinite(halves).all(), "NaN or infinity")
    need((head.weight >= 0).all() and (head.weight <= 2.0 ** 64).all(), "weight")
    need((exponents >= -100).all() and (exponents <= 112).all(), "exponent")
    head.transform = (halves.astype(F64) * 2.0 ** exponents).astype(F32)
    return head


# Section 7: records

@dataclass
class Record:
    side: int
    tier: int
    sink: int
    layer: int
    base: int
    rows: list  # (scale, codes) of each KV head


def read_record(plan, data):
    need(len(data) >= 32 and data[:4] == bytes.fromhex("54 7e 51 4b"), "magic")
    version, side, tier, sink, n_heads, layer, base = struct.unpack("<4B2Hi", data[4:16])
    need(version == 0, "version")
    need(struct.unpack("<I", data[24:28])[0] == len(data), "length")
    need(hashlib.sha256(data[:-4]).digest()[:4] == data[-4:], "check")
    need(data[16:24] == plan.fingerprint[:8], "fingerprint")
    need(layer < len(plan.layers) and side in (K, V) and tier < plan.n_tiers, "place")
    need(sink <= (tier == 0) and (side == K or base == 0), "sink, base")
    heads = plan.layers[layer].sides[side]
    need(n_heads == len(heads), "n_kv_heads")
    at, rows = 28, []
    for head in heads:
        n = row_bytes(head.layouts[tier])
        rows.append((data[at], data[at + 1:at + 1 + n]))
        at += 1 + n
    need(at + 4 == len(data), "length")
    return Record(side, tier, sink, layer, base, rows)
