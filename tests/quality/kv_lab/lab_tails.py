# SPDX-License-Identifier: Apache-2.0
"""How heavy the tails are that the codes meet: of the rows that calibration saw, behind the shipped transforms."""
import numpy as np
import torch

from turboquant import Side

from .lab_plan import Make, fit
from .lab_stats import N_SINKS, frame_bases, moments, record, turn


def tails(model, frame, n_tokens):
    """A dictionary for each layer and side; its first KV head, first tokens of a piece apart."""
    heads = fit(moments(model, frame, n_tokens=n_tokens), Make())
    for index, (layer, rows) in enumerate(zip(model.layers, record(model, n_tokens=n_tokens))):
        bases = frame_bases(rows.k.shape[1], frame)
        for side, given in zip(Side, (rows.k, rows.v)):
            pieces = [turn(x[:, 0], layer, -bases) if side == Side.K else x[:, 0] for x in given]
            yield {"layer": index, "side": side.name, **of_rows(torch.cat([x[N_SINKS:] for x in pieces]),
                                                                heads[index][side][0])}


def of_rows(x, head):
    """x: [n][dim]. Energy is the squared error that a row left out would make, in the attention metric."""
    y = ((x - head.mean) @ head.transform).double()
    energy = y.square() @ torch.from_numpy(np.repeat(head.loss, 16)).double()
    kurtosis = y.pow(4).mean(0) / y.square().mean(0).square()
    heaviest = energy.sort(descending=True).values[:max(len(energy) // 100, 1)]
    return {"kurtosis": kurtosis.mean().item(), "kurtosis_most": kurtosis.max().item(),
            "heaviest": (energy.max() / energy.mean()).item(), "top_percent": (heaviest.sum() / energy.sum()).item()}


def line(row):
    return (f"{row['layer']:3} {row['side']} kurtosis {row['kurtosis']:.1f}, of one channel "
            f"{row['kurtosis_most']:.1f}; heaviest row {row['heaviest']:.0f} times the mean; the top percent holds "
            f"{100 * row['top_percent']:.1f} %")
