#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts what bench/cpu.py measured into docs/SPEED.md: tables, and a plot beside it.

    bench/speed_page.py [--results FILE] [--page FILE] [--tables-only]

FILE is docs/results/cpu.json, a copy of build/bench/cpu.json from a machine that did nothing else. Tables stand between
"<!-- table: NAME -->" and "<!-- end -->" and are written over. The plot needs matplotlib
(`pip install -r bench/requirements-plots.txt`), tables nothing. What was not measured shows as a dash.
"""

import hashlib
import json
import sys

import quality_page
from quality_page import MISSING, table

LAYER = "llama-3-8b-layer"
MODELS = {LAYER: "layer of Llama 3 8B", "smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
PHASES = {"attention": "attention", "decode": "decoding", "prefill": "prefill"}
# In the styles of docs/QUALITY.md: the same cache looks the same on both pages.
CACHES = {"f16": ("f16", ""), "q8_0": ("q8_0", ""), "q4_0": ("q4_0", ""), "ours 5x": ("turboquant", "5x"),
          "ours 8x": ("turboquant", "8x")}
READING = "reading f16"  # as many bytes as f16 has, and no more than that: what memory allows one token
NOT_MEASURED = "Not measured yet.\n"


class Results:
    """The rows, found by what they are of."""

    def __init__(self, rows):
        fields = ("model", "phase", "threads", "depth", "cache")
        self.rows = {tuple(row[field] for field in fields): row for row in rows}
        self.digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def depths(self, phase, model=None):
        """Of one model, or of all."""
        return sorted({key[3] for key in self.rows if key[1] == phase and model in (None, key[0])})

    def groups(self, phase):
        """Models and numbers of threads that have rows, in the order of MODELS."""
        return [(model, threads) for model in MODELS
                for threads in sorted({key[2] for key in self.rows if key[:2] == (model, phase)})]


def read(path):
    return Results(json.loads(path.read_text()) if path.exists() else [])


# ---- tables ----

def rate_text(row):
    """Tokens/s, and how many times as fast as f16 with its spread."""
    if not row:
        return MISSING
    rate = f"{row['tokens_per_s']:.4g}" if row["tokens_per_s"] < 1000 else f"{row['tokens_per_s']:.0f}"
    if row["cache"] == "f16" or not row["ratio_f16"]:
        return rate
    return f"{rate} ({row['ratio_f16']:.2f}; {row['ratio_low']:.2f}..{row['ratio_high']:.2f})"


def threads_text(threads):
    return f"{threads} thread{'s' * (threads > 1)}"


def phase_table(results, phase):
    depths = results.depths(phase)
    caches = [*CACHES, READING] if phase == "attention" else CACHES
    lines = []
    for model, threads in results.groups(phase):
        for cache in caches:
            rows = [results.rows.get((model, phase, threads, depth, cache)) for depth in depths]
            if any(rows):
                lines.append([f"{MODELS[model]}, {threads_text(threads)}", cache, *map(rate_text, rows)])
    return table(["", "cache", *map(str, depths)], lines) if lines else NOT_MEASURED


def encode_table(results):
    rows = [row for key, row in sorted(results.rows.items()) if key[1] == "encode"]
    lines = [["one core", row["cache"], f"{row['f16_bytes_per_s'] / 1e9:.3f}",
              f"{row['f16_bytes_per_s_low'] / 1e9:.3f}..{row['f16_bytes_per_s_high'] / 1e9:.3f}"] for row in rows]
    return table(["", "what", "GB/s of f16", "quartiles"], lines)


def machine_table(results):
    found = sorted({(row["cpu"], row["compiler"], row["commit"]) for row in results.rows.values()})
    return table(["processor", "compiler", "commit"], map(list, found))


def tables(results):
    """What stands in the page, the plot's place included."""
    names = [*PHASES, "encode", "machine", "plot"]
    if not results.rows:
        return dict.fromkeys(names, NOT_MEASURED)
    made = {phase: phase_table(results, phase) for phase in PHASES}
    return made | {"encode": encode_table(results), "machine": machine_table(results),
                   "plot": "![Tokens per second against depth](speed.svg)\n"}


# ---- plot ----

def draw_one(axis, results, model, phase):
    """With the most threads that were measured; bars are the spread."""
    threads = max(key[2] for key in results.rows if key[:2] == (model, phase))
    for cache, style in CACHES.items():
        rows = [row for key, row in sorted(results.rows.items())
                if key[:3] == (model, phase, threads) and key[4] == cache]
        if not rows:
            continue
        colour, mark = quality_page.STYLES[style]
        middle = [row["tokens_per_s"] for row in rows]
        spread = [[row["tokens_per_s"] - row["tokens_per_s_low"] for row in rows],
                  [row["tokens_per_s_high"] - row["tokens_per_s"] for row in rows]]
        axis.errorbar([row["depth"] for row in rows], middle, yerr=spread, color=colour, marker=mark, markersize=4,
                      linewidth=1.2, elinewidth=0.8, capsize=2)
    axis.set_title(f"{MODELS[model]}: {PHASES[phase]}, {threads_text(threads)}")


def speed_plot(plt, results):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    panels = [(model, phase) for model in MODELS for phase in PHASES
              if any(key[:2] == (model, phase) for key in results.rows)]
    n_lines = (len(panels) + 1) // 2
    figure, axes = plt.subplots(n_lines, 2, squeeze=False, figsize=(8.33, 0.6 + 2.4 * n_lines), layout="constrained")
    for axis, (model, phase) in zip(axes.flat, panels):
        draw_one(axis, results, model, phase)
        depths = results.depths(phase, model)
        axis.set_xscale("symlog", base=2, linthresh=512)
        axis.set_yscale("log")
        axis.set_xticks(depths, list(map(str, depths)))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_locator(NullLocator())
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    figure.supxlabel("tokens in the cache")
    figure.supylabel("tokens per second")
    quality_page.legend(figure, {CACHES[key[4]] for key in results.rows if key[4] in CACHES})
    return figure


def draw(results, folder):
    plt = quality_page.pyplot()
    quality_page.save(plt, speed_plot(plt, results), folder / "speed.svg", results)


if __name__ == "__main__":
    quality_page.run(sys.modules[__name__], "cpu.json", "SPEED.md")
