#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts what bench/cuda/decode_bench.py measured into docs/GPU.md: a table for each card, and a plot beside it.

    bench/gpu_page.py [--results FILE] [--page FILE] [--tables-only]

FILE is docs/results/h200.json; h100.json is read beside it. Tables stand between "<!-- table: NAME -->" and
"<!-- end -->" and are written over. The plot needs matplotlib (`pip install -r bench/requirements-plots.txt`).
"""
import json
import sys

import quality_page
from quality_page import MISSING, digest_of, table

CARDS = ("h100", "h200")
COLOURS = {"8 bits": "#555555", "4 bits": "#56B4E9", "5x": "#0072B2", "3 bits": "#009E73", "2 bits": "#E69F00"}


class Results:
    """Rows of each card, in the order in which they were measured."""

    def __init__(self, by_card):
        self.by_card = by_card
        self.rows = [row for rows in by_card.values() for row in rows]
        self.digest = digest_of(self.rows)


def read(path):
    files = {card: path.with_name(f"{card}.json") for card in CARDS}
    return Results({card: json.loads(file.read_text()) for card, file in files.items() if file.exists()})


def decode_table(rows):
    lines = [[row["shape"], row["profile"], f"{row['bits']:.2f}", f"{row['us']:.1f} ({row['us_min']:.1f}–{row['us_max']:.1f})",
              f"{row['best_fp16_us']:.1f}", f"{row['speedup']:.2f}", f"{row['pct_copy']:.0f}", f"{row['error']:.0e}"]
             for row in rows]
    head = ["heads, dim, batch x tokens", "profile", "bits in all", "us", "best f16, us", "times as fast", "% of copy", "error"]
    return table(head, lines)


def baseline_table(results):
    """Which f16 attention was the fastest on each card."""
    names = {card: {row["shape"]: row["best_fp16_name"] for row in rows} for card, rows in results.by_card.items()}
    shapes = dict.fromkeys(row["shape"] for row in results.rows)
    cards = [f"{rows[0]['card']}, commit {rows[0]['commit']}" for rows in results.by_card.values()]
    return table(["best f16", *cards], [[shape, *(of.get(shape, MISSING) for of in names.values())] for shape in shapes])


def tables(results):
    made = {card: decode_table(rows) for card, rows in results.by_card.items()}
    return made | {"baselines": baseline_table(results), "plot": "![Decode beside the best f16](gpu.svg)\n"}


def draw_card(axis, rows):
    """Bars are medians, whiskers the fastest and the slowest replay."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    width = 0.8 / len(COLOURS)
    for i, (profile, colour) in enumerate(COLOURS.items()):
        found = [(shapes.index(row["shape"]), row) for row in rows if row["profile"] == profile]
        places = [x + (i - (len(COLOURS) - 1) / 2) * width for x, _ in found]
        fast = [row["best_fp16_us"] / row["us"] for _, row in found]
        spread = [[high - row["best_fp16_us"] / row["us_max"] for high, (_, row) in zip(fast, found)],
                  [row["best_fp16_us"] / row["us_min"] - high for high, (_, row) in zip(fast, found)]]
        axis.bar(places, fast, width, color=colour, label=profile, yerr=spread, ecolor="#222222",
                 error_kw={"elinewidth": 0.8, "capsize": 1.5})
    axis.axhline(1, color="#222222", linewidth=0.8)
    axis.set_xticks(range(len(shapes)), [shape.replace(" ", "\n") for shape in shapes])
    axis.grid(axis="x", visible=False)
    axis.set_title(rows[0]["card"])


def gpu_plot(plt, results):
    figure, axes = plt.subplots(len(results.by_card), 1, squeeze=False, figsize=(8.33, 3 * len(results.by_card)),
                                layout="constrained")
    for axis, rows in zip(axes.flat, results.by_card.values()):
        draw_card(axis, rows)
    figure.supylabel("times as fast as the best f16")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def draw(results, folder):
    plt = quality_page.pyplot()
    quality_page.save(plt, gpu_plot(plt, results), folder / "gpu.svg", results)


if __name__ == "__main__":
    quality_page.run(sys.modules[__name__], "h200.json", "GPU.md")
