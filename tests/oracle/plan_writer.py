# SPDX-License-Identifier: Apache-2.0
"""Random plan files, written from docs/FORMAT.md section 6 without the library."""
import hashlib
import struct

import numpy as np

MAGIC = bytes.fromhex("89 54 51 4b 56 0d 0a 1a")


def round_transform(matrix):
    """f16 values and the exponent of each output channel."""
    exponents = np.zeros(matrix.shape[1], int)
    halves = np.zeros(matrix.shape, np.float16)
    for j in range(matrix.shape[1]):
        column = matrix[:, j].astype(np.float64)
        largest = np.abs(column).max()
        e = 0 if largest == 0 else int(np.floor(np.log2(largest))) - 14
        e = min(max(e, -100), 112)
        halves[:, j] = (column * 2.0 ** -e).astype(np.float16)
        if np.abs(halves[:, j]).max() >= 2 ** 15 and e < 112:  # rounded up to the next power of two
            e += 1
            halves[:, j] = (column * 2.0 ** -e).astype(np.float16)
        exponents[j] = e
    return halves, exponents


def hadamard(dim):
    """Walsh-Hadamard matrices on the diagonal, as large as the largest power of two that divides dim."""
    block = dim & -dim
    i = np.arange(block)
    odd = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    return np.kron(np.eye(dim // block), 1.0 - 2.0 * odd)


def random_head(rng, dim, layouts):
    if layouts[0][0] == 16:
        return {"layouts": layouts}
    gain = np.exp(rng.uniform(-1.5, 1.5, dim))
    matrix = (np.eye(dim) + 0.3 * rng.standard_normal((dim, dim)) / np.sqrt(dim)) * gain
    if not rng.integers(4):
        matrix = hadamard(dim) * np.float16(gain)[:, None]
    mean = rng.standard_normal(dim) * 0.5 if rng.integers(4) else np.zeros(dim)
    weight = rng.uniform(0.1, 2.0, dim // 16) if rng.integers(4) else rng.integers(0, 2, dim // 16) * 1.0
    return {"layouts": layouts, "mean": mean.astype(np.float32), "weight": weight.astype(np.float32),
            "matrix": matrix}


def random_widths(rng, n_units, kind):
    if kind == 1:  # uniform
        return [int(rng.choice([1, 2, 3, 4, 5, 6, 8]))] * n_units
    if kind == 2:  # falling, as calibration makes them
        return sorted((int(b) for b in rng.choice([0, 1, 2, 3, 4, 5, 6, 8], n_units)), reverse=True)
    return [int(b) for b in rng.choice([0, 1, 2, 3, 4, 5, 6, 8], n_units)]


def random_plan(seed, dims=(32, 48), n_layers=3, n_kv_heads=2, n_tiers=3, is_latent=False):
    """A dictionary for write_plan. Layer 1 has no cache; head 0 of V of the last layer is plain."""
    rng = np.random.default_rng(seed)
    layers = []
    for index in range(n_layers):
        if index == 1:
            layers.append(None)
            continue
        sides = []
        for side, dim in enumerate(dims):
            heads = []
            for g in range(n_kv_heads):
                plain = index == n_layers - 1 and side == 1 and g == 0
                layouts = [[16] * (dim // 16) if plain else random_widths(rng, dim // 16, int(rng.integers(3)))
                           for _ in range(n_tiers)]
                heads.append(random_head(rng, dim, layouts))
            sides.append(heads)
        n_rot = dims[0] if index == 0 else dims[0] // 2
        style = [1, 2, 0][index % 3] if index else 1 + seed % 2
        inv_freq = (10000.0 ** -(np.arange(n_rot // 2) * 2.0 / n_rot)).astype(np.float32) if style else []
        layers.append({"n_heads": 2 * n_kv_heads, "k_dim": dims[0], "v_dim": dims[1] | is_latent << 31,
                       "window": 64 * index, "rope": (style, n_rot if style else 0, inv_freq),
                       "tier_tokens": [32 << t for t in range(n_tiers - 1)] + [0], "sides": sides})
    return {"names": ["model é", "arch", "test"], "n_tiers": n_tiers, "n_sinks": 4, "frame_tokens": 256,
            "context": 8192, "bits_total": 3.2, "layers": layers}


def rope_key(rope):
    style, n_rot, inv_freq = rope
    return (style, n_rot, tuple(int(bits) for bits in np.asarray(inv_freq, np.float32).view(np.uint32)))


def write_plan(plan):
    cached = [layer for layer in plan["layers"] if layer]
    ropes = sorted({rope_key(layer["rope"]) for layer in cached})
    heads = [head for layer in cached for side in layer["sides"] for head in side]
    layouts = sorted({(len(widths), tuple(widths)) for head in heads for widths in head["layouts"]})

    body = b""
    for name in plan["names"]:
        text = name.encode("utf-8")
        body += struct.pack("<H", len(text)) + text
    for style, n_rot, bits in ropes:
        body += struct.pack("<2I", style, n_rot) + np.array(bits, "<u4").tobytes()
    for n_units, widths in layouts:
        body += struct.pack("<H", n_units) + bytes(widths)
    for layer in plan["layers"]:
        if layer is None:
            body += struct.pack("<I", 0)
            continue
        body += struct.pack("<6I", len(layer["sides"][0]), layer["n_heads"], layer["k_dim"], layer["v_dim"],
                            layer["window"], ropes.index(rope_key(layer["rope"])))
        body += struct.pack(f"<{plan['n_tiers']}I", *layer["tier_tokens"])
    for head in heads:
        for widths in head["layouts"]:
            body += struct.pack("<I", layouts.index((len(widths), tuple(widths))))
        if "matrix" in head:
            halves, exponents = round_transform(head["matrix"])
            body += head["mean"].astype("<f4").tobytes() + head["weight"].astype("<f4").tobytes()
            body += exponents.astype("i1").tobytes() + halves.astype("<f2").tobytes()

    start = MAGIC + struct.pack("<2IQ", 0, 0, 96 + len(body))
    numbers = struct.pack("<8Id", len(plan["layers"]), plan["n_tiers"], plan["n_sinks"], plan["frame_tokens"],
                          plan["context"], len(ropes), len(layouts), 0, plan["bits_total"])
    return start + hashlib.sha256(start + numbers + body).digest() + numbers + body
