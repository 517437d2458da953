# SPDX-License-Identifier: Apache-2.0
"""Plans for the tiny checkpoints: orthogonal transforms, and widths that differ from tier to tier and layer to layer."""
import pathlib
import sys

import numpy as np
import tiny_checkpoint as tiny

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "tests" / "oracle"))
from plan_writer import write_plan  # noqa: E402

HALVES, PAIRS = 1, 2


def head(rng, dim, widths):
    matrix, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    units = dim // 16
    return {"layouts": [[width] * units for width in widths], "mean": np.zeros(dim, np.float32),
            "weight": np.ones(units, np.float32), "matrix": matrix}


def layer(rng, widths, style, window, dims=(tiny.HEAD_SIZE, tiny.HEAD_SIZE), is_latent=False, inv_freq=None):
    """dims: channels of K and V."""
    if inv_freq is None:
        inv_freq = (10000.0 ** -(np.arange(dims[0] // 2) * 2.0 / dims[0])).astype(np.float32)
    return {"n_heads": tiny.HEADS, "k_dim": dims[0], "v_dim": dims[1] | is_latent << 31, "window": window,
            "rope": (style, dims[0], inv_freq), "tier_tokens": [32, 80][:len(widths) - 1] + [0],
            "sides": [[head(rng, dim, widths) for _ in range(1 if is_latent else tiny.KV_HEADS)] for dim in dims]}


def write(path, last_widths=(3, 4, 3), young_widths=(8, 6), style=HALVES, window=0, seed=0, **shape):
    """One plan file; last_widths: of the last tier, by layer. shape: of layer()."""
    rng = np.random.default_rng(seed)
    path.write_bytes(write_plan({
        "names": ["tiny", "llama", "test"], "n_tiers": len(young_widths) + 1, "n_sinks": 4 if young_widths else 0,
        "frame_tokens": 64, "context": 1024, "bits_total": 4.0,
        "layers": [layer(rng, (*young_widths, width), style, window, **shape) for width in last_widths]}))
    return path


def write_latent(path, style=PAIRS, **options):
    """Of DeepSeek's shape: a rotated key of 64 channels, a latent of 512."""
    return write(path, style=style, dims=(64, 512), is_latent=True, **options)


def token_bytes(width):
    """Of one token of one layer: codes and a scale byte for each KV head and side."""
    return 2 * tiny.KV_HEADS * (tiny.HEAD_SIZE * width // 8 + 1)
