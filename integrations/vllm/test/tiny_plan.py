# SPDX-License-Identifier: Apache-2.0
"""Plans for the tiny checkpoints: orthogonal transforms, and widths that differ from tier to tier and layer to layer."""
import pathlib
import sys

import numpy as np
import tiny_checkpoint as tiny

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "tests" / "oracle"))
from plan_writer import write_plan  # noqa: E402

HALVES, PAIRS = 1, 2


def head(rng, widths):
    matrix, _ = np.linalg.qr(rng.standard_normal((tiny.HEAD_SIZE, tiny.HEAD_SIZE)))
    units = tiny.HEAD_SIZE // 16
    return {"layouts": [[width] * units for width in widths], "mean": np.zeros(tiny.HEAD_SIZE, np.float32),
            "weight": np.ones(units, np.float32), "matrix": matrix}


def layer(rng, widths, style, window):
    inv_freq = (10000.0 ** -(np.arange(tiny.HEAD_SIZE // 2) * 2.0 / tiny.HEAD_SIZE)).astype(np.float32)
    return {"n_heads": tiny.HEADS, "k_dim": tiny.HEAD_SIZE, "v_dim": tiny.HEAD_SIZE, "window": window,
            "rope": (style, tiny.HEAD_SIZE, inv_freq), "tier_tokens": [32, 80][:len(widths) - 1] + [0],
            "sides": [[head(rng, widths) for _ in range(tiny.KV_HEADS)] for _ in range(2)]}


def write(path, last_widths=(3, 4, 3), young_widths=(8, 6), style=HALVES, window=0, seed=0):
    """One plan file; last_widths: of the last tier, by layer."""
    rng = np.random.default_rng(seed)
    path.write_bytes(write_plan({
        "names": ["tiny", "llama", "test"], "n_tiers": len(young_widths) + 1, "n_sinks": 4 if young_widths else 0,
        "frame_tokens": 64, "context": 1024, "bits_total": 4.0,
        "layers": [layer(rng, (*young_widths, width), style, window) for width in last_widths]}))
    return path


def token_bytes(width):
    """Of one token of one layer: codes and a scale byte for each KV head and side."""
    return 2 * tiny.KV_HEADS * (tiny.HEAD_SIZE * width // 8 + 1)
