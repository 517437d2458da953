#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts what bench/quality.py measured into docs/QUALITY.md: tables, and plots beside it.

    bench/quality_page.py [--results FILE] [--page FILE] [--tables-only]

Tables stand between "<!-- table: NAME -->" and "<!-- end -->" and are written over; all else in the
page is left as it is. Plots need matplotlib (`pip install -r bench/requirements-plots.txt`), tables
nothing. What was not measured is left out, or shows as a dash beside what was.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
UBATCH = 512
CONTEXTS = [2048, 8192]
LONG = 8192
LONGEST = 16384  # of one model only: a table, but no plots
MODELS = {"smollm2": "SmolLM2-135M", "smollm2-f32": "SmolLM2-135M in f32",
          "qwen": "Qwen2.5-Coder-0.5B", "qwen-f32": "Qwen2.5-Coder-0.5B in f32",
          "gemma": "Gemma 3 270M"}
CACHES = {("f16", ""): "llama.cpp f16", ("q8_0", ""): "llama.cpp q8_0", ("q4_0", ""): "llama.cpp q4_0",
          ("turboquant", "near-lossless"): "ours near-lossless", ("turboquant", "5x"): "**ours 5x**",
          ("turboquant", "8x"): "ours 8x"}
DOMAINS = {"en": "English", "code": "code", "chat": "chat", "fr": "French", "zh": "Chinese", "ja": "Japanese",
           "all": "all"}
MISSING = "–"
PROFILES = ["8x", "5x"]  # of variants
DEFAULTS = "the defaults (the base)"  # the variant that plans are made as, unless options say otherwise

# Okabe and Ito's colours, which people who see fewer colours can tell apart; shapes say the same.
STYLES = {("f16", ""): ("#555555", "s"), ("q8_0", ""): ("#E69F00", "D"), ("q5_0", ""): ("#CC79A7", "v"),
          ("q4_0", ""): ("#D55E00", "^"), ("turboquant", "near-lossless"): ("#009E73", "h"),
          ("turboquant", "5x"): ("#0072B2", "o"), ("turboquant", "8x"): ("#56B4E9", "X")}
BAR_CACHES = [("f16", ""), ("turboquant", "near-lossless"), ("turboquant", "5x"), ("turboquant", "8x")]


def digest_of(rows):
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


class Results:
    """The rows, found by what they are of."""

    def __init__(self, rows, variants=()):
        self.variants = [row for row in variants if "ratio" in row]
        rows = [row for row in rows if row["ubatch"] == UBATCH]
        self.rows = {(row["model"], row["context"], (row["codec"], row["profile"]), row["domain"]): row for row in rows}
        self.digest = digest_of(rows)
        self.curve = sorted((row for row in self.variants if "bits" in row.get("tables", [])),
                            key=lambda row: row["bits"])

    def get(self, *key):
        return self.rows.get(key)

    def domains(self, model, context, cache):
        """Rows of single texts, in the order of DOMAINS."""
        found = [self.get(model, context, cache, domain) for domain in DOMAINS if domain != "all"]
        return [row for row in found if row]

    def models(self, context):
        return [model for model in MODELS if any(key[:2] == (model, context) for key in self.rows)]

    def contexts(self):
        return [context for context in CONTEXTS if self.models(context)]


def read(path):
    """Rows of path, and variants of the codec from the file beside it (tests/quality/lab.py made them)."""
    rows, variants = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
                      for file in (path, path.with_name("variants.json")))
    return Results(rows, variants)


# ---- tables ----

def kl_text(value):
    """Four decimals, or more where these would say too little."""
    if value is None:
        return MISSING
    digits = 4 if value >= 0.001 else 5 if value >= 0.0001 else 6
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def table(head, lines):
    """The first two columns hold names, the others numbers."""
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def measured(results, context):
    """Models and caches that have rows, with their names."""
    return [(model, cache, [MODELS[model], CACHES[cache]]) for model in MODELS for cache in CACHES
            if results.get(model, context, cache, "all")]


def context_table(results, context):
    head = ["model", "cache", "bits", "KL mean", "±", "median", "99.9 %", "same top token", "tokens"]
    lines = []
    for model, cache, names in measured(results, context):
        row = results.get(model, context, cache, "all")
        lines.append([*names, f"{row['bits']:.2f}", kl_text(row["kl_mean"]), kl_text(row.get("kl_ci95")),
                      kl_text(row["kl_median"]), kl_text(row["kl_p999"]), f"{100 * row['top1']:.1f} %",
                      str(row["tokens"])])
    return table(head, lines)


def domain_table(results, context):
    lines = []
    for model, cache, names in measured(results, context):
        rows = [results.get(model, context, cache, domain) for domain in DOMAINS]
        lines.append([*names, *(kl_text(row and row["kl_mean"]) for row in rows)])
    return table(["model", "cache", *DOMAINS.values()], lines)


def ratio_text(row, name):
    return f"{row[name]:.2f} ± {row[name + '_ci95']:.2f}"


def variant_table(_results, rows):
    """A line for each variant: mean KL, its ratio to that of the shipped one, geometric mean of the tokens' ratios."""
    found = {}
    for row in rows:
        found.setdefault(row["variant"], {})[row["profile"]] = row
    lines = []
    for variant, by_profile in found.items():
        cells = []
        for profile in PROFILES:
            row = by_profile.get(profile)
            cells += [kl_text(row["kl_mean"]), *(ratio_text(row, name) for name in ("ratio", "typical"))
                      ] if row else [MISSING] * 3
        tokens = {row["tokens"] for row in by_profile.values()}
        lines.append([variant, "/".join(str(n) for n in sorted(tokens)), *cells])
    columns = [f"{what} at {profile}" for profile in PROFILES for what in ("KL", "ratio", "typical")]
    return table(["variant", "tokens", *columns], lines)


def variant_text_table(_results, rows):
    """A line for each variant that was kept by text: mean KL of the texts, and the ratios of all of them together."""
    texts = [text for text in DOMAINS if any(text in row["kl_by_text"] for row in rows)]
    lines = [[row["variant"], row["profile"], *(kl_text(row["kl_by_text"].get(text)) for text in texts),
              kl_text(row["kl_mean"]), ratio_text(row, "ratio"), ratio_text(row, "typical")]
             for row in sorted(rows, key=lambda row: PROFILES.index(row["profile"]))]
    return table(["variant", "size", *(DOMAINS[text] for text in texts), "all", "ratio", "typical"], lines)


def floor_of(results, model):
    """Row of llama.cpp's f16 cache on the model's file, or None: no cache shows less there."""
    return results.get(model, LONG, ("f16", ""), "all")


def curve_table(results, rows):
    """A line for each model: what its file shows at least, and mean KL of its f32 weights at each size."""
    sizes = sorted({f"{row['bits']:.1f}" for row in rows}, key=float)
    lines = []
    for model in curve_models(results):
        cells = {f"{row['bits']:.1f}": kl_text(row["kl_mean"]) for row in rows if row["model"] == f"{model}-f32"}
        floor = floor_of(results, model)
        lines.append([MODELS[model], kl_text(floor and floor["kl_mean"]), *(cells.get(size, MISSING) for size in sizes)])
    return table(["model", "f16 on the file", *(f"{size} bits" for size in sizes)], lines)


def tiers_table(_results, rows):
    """A line for each model, context and size: mean KL with each choice of tiers, the least in bold."""
    choices, found = {}, {}
    for row in rows:
        name = row["variant"].removeprefix("tiers ")
        choices[name] = None
        found.setdefault((row["model"].removesuffix("-f32"), row["context"], row["profile"]), {})[name] = row["kl_mean"]
    lines = []
    for (model, context, profile), by_name in sorted(found.items(), key=lambda item: (
            list(MODELS).index(item[0][0]), item[0][1], PROFILES.index(item[0][2]))):
        cells = [kl_text(by_name.get(name)) for name in choices]
        best = list(choices).index(min(by_name, key=by_name.get))
        cells[best] = f"**{cells[best]}**"
        lines.append([MODELS[model], str(context), profile, *cells])
    return table(["model", "tokens", "size", *("as made" if name == DEFAULTS else name for name in choices)], lines)


VARIANT_TABLES = {"variants": variant_table, "calibration": variant_text_table, "bits": curve_table,
                  "tiers": tiers_table}


def variant_tables(results):
    rows_of = {}
    for row in results.variants:
        kind = "calibration" if "kl_by_text" in row else "variants"
        own = [f"{kind}-{row['model'].removesuffix('-f32')}-{row['context']}"]
        for name in row.get("tables", own):
            rows_of.setdefault(name, []).append(row)
    return {name: VARIANT_TABLES[name.split("-")[0]](results, rows) for name, rows in rows_of.items()}


def tables(results):
    made = {f"context-{context}": context_table(results, context) for context in [*CONTEXTS, LONGEST]}
    made |= {f"domains-{context}": domain_table(results, context) for context in CONTEXTS}
    return made | variant_tables(results)


def with_tables(page, made):
    """The page with every table in it written anew; one of an unknown name is an error."""
    def replace(match):
        if match[1] not in made:
            raise SystemExit(f"no table is called {match[1]}")
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n<!-- end -->"
    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


# ---- plots ----

def name_of(cache):
    return CACHES.get(cache, cache[0]).strip("*").removeprefix("llama.cpp ")


def order(caches):
    return [cache for cache in STYLES if cache in caches]


def caches_of(results, model, context):
    return order({key[2] for key in results.rows if key[:2] == (model, context)})


def log_kl(axis):
    """0.001, not a power of ten."""
    from matplotlib.ticker import FuncFormatter, NullLocator
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def kl_against_bits(figure, axis, ticks):
    """Both axes, and what they are called, for all that share them with this one."""
    from matplotlib.ticker import NullLocator
    axis.set_xscale("log", base=2)
    log_kl(axis)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("bits per value, everything counted")
    figure.supylabel("mean KL divergence (nats)")


def legend(figure, caches):
    from matplotlib.lines import Line2D
    marks = [Line2D([], [], color=STYLES[cache][0], marker=STYLES[cache][1], linestyle="none", label=name_of(cache))
             for cache in order(caches)]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, handletextpad=0.2,
                  columnspacing=1.4)


def files_of(models):
    """Without those in f32: a plot with a column for each model has room for the files as people run them."""
    return [model for model in models if not model.endswith("-f32")]


def draw_bits(plt, results):
    """Mean KL against bits: all domains as a large mark, each as a small one to the right of it."""
    aside = 1.1
    contexts = results.contexts()
    models = files_of(model for model in MODELS if any(model in results.models(context) for context in contexts))
    figure, axes = plt.subplots(len(contexts), len(models), sharex=True, sharey=True, squeeze=False,
                                figsize=(8.33, 0.6 + 2.5 * len(contexts)), layout="constrained")
    for line, context in zip(axes, contexts):
        for axis, model in zip(line, models):
            for cache in caches_of(results, model, context):
                colour, mark = STYLES[cache]
                parts, whole = results.domains(model, context, cache), results.get(model, context, cache, "all")
                axis.plot([row["bits"] * aside for row in parts], [row["kl_mean"] for row in parts], mark, color=colour,
                          markersize=3.5, alpha=0.7, markeredgewidth=0)
                if whole:
                    axis.plot(whole["bits"], whole["kl_mean"], mark, color=colour, markersize=8,
                              markeredgecolor="white", markeredgewidth=0.8)
            axis.set_title(f"{MODELS[model]}, {context} tokens")
    kl_against_bits(figure, axes[0][0], [2, 3, 4, 6, 8, 12, 16])
    legend(figure, {key[2] for key in results.rows if key[1] in contexts})
    return figure


def draw_domains(plt, results):
    """Bars begin at zero, so the axis is linear; llama.cpp's coarser caches would not fit on it."""
    models = results.models(LONG)
    domains = [domain for domain in DOMAINS if any(key[1] == LONG and key[3] == domain for key in results.rows)]
    figure, axes = plt.subplots(len(models), 1, sharex=True, squeeze=False, figsize=(8.33, 0.5 + 1.9 * len(models)),
                                layout="constrained")
    width = 0.8 / len(BAR_CACHES)
    for axis, model in zip(axes[:, 0], models):
        for i, cache in enumerate(BAR_CACHES):
            found = [(j, results.get(model, LONG, cache, domain)) for j, domain in enumerate(domains)]
            found = [(j + (i + 0.5) * width - 0.4, row) for j, row in found if row]
            axis.bar([x for x, _ in found], [row["kl_mean"] for _, row in found], width, color=STYLES[cache][0],
                     yerr=[row.get("kl_ci95") or 0 for _, row in found], ecolor="#222222",
                     error_kw={"elinewidth": 0.8, "capsize": 1.5})
        axis.set_title(f"{MODELS[model]}, {LONG} tokens")
        axis.grid(axis="x", visible=False)
    axes[-1, 0].set_xticks(range(len(domains)), [DOMAINS[domain] for domain in domains])
    figure.supylabel("mean KL divergence (nats)")
    legend(figure, set(BAR_CACHES) & {key[2] for key in results.rows})
    return figure


def draw_positions(plt, results):
    """None where no row has positions."""
    rows = {key: row["positions"] for key, row in results.rows.items() if key[1] == LONG and row.get("positions")}
    models = files_of(model for model in MODELS if any(key[0] == model for key in rows))
    if not models:
        return None
    figure, axes = plt.subplots(1, len(models), sharex=True, sharey=True, squeeze=False, figsize=(8.33, 3.1),
                                layout="constrained")
    for axis, model in zip(axes[0], models):
        for cache in order({key[2] for key in rows if key[0] == model}):
            parts = rows[model, LONG, cache, "all"]
            axis.plot([first for first, _ in parts], [kl for _, kl in parts], color=STYLES[cache][0],
                      marker=STYLES[cache][1], markersize=3.5, linewidth=1.2)
        axis.set_title(f"{MODELS[model]}, {LONG} tokens")
    log_kl(axes[0][0])
    figure.supxlabel("position in the text (tokens)")
    figure.supylabel("mean KL divergence (nats)")
    legend(figure, {key[2] for key in rows})
    return figure


def curve_models(results):
    return [model for model in MODELS if any(row["model"] == f"{model}-f32" for row in results.curve)]


def draw_curve(plt, results):
    """Mean KL against bits of f32 weights, and what the 4-bit file of the same model shows. None without rows."""
    models = curve_models(results)
    if not models:
        return None
    colour, mark = STYLES["turboquant", "5x"]
    grey, _ = STYLES["f16", ""]
    figure, axes = plt.subplots(1, len(models), sharex=True, sharey=True, squeeze=False, figsize=(8.33, 3.4),
                                layout="constrained")
    for axis, model in zip(axes[0], models):
        rows = [row for row in results.curve if row["model"] == f"{model}-f32"]
        axis.plot([row["bits"] for row in rows], [row["kl_mean"] for row in rows], color=colour, marker=mark,
                  markersize=5, linewidth=1.2, label="cache alone: f32 weights")
        files = [results.get(model, LONG, ("turboquant", profile), "all") for profile in PROFILES]
        axis.plot([row["bits"] for row in files if row], [row["kl_mean"] for row in files if row], marker="D",
                  color=STYLES["turboquant", "8x"][0], linestyle="none", markersize=5, label="4-bit file")
        if floor := floor_of(results, model):
            axis.axhline(floor["kl_mean"], color=grey, linestyle="--", linewidth=1.2, label="f16 cache on the 4-bit file")
        axis.set_title(f"{MODELS[model]}, {LONG} tokens")
    kl_against_bits(figure, axes[0][0], [1.6, 2, 2.5, 3.2, 4, 5, 6.5])
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


DRAWINGS = {"bits": draw_bits, "domains": draw_domains, "positions": draw_positions,
            "curve": draw_curve}


def digest_text(results):
    """What a plot says of the rows that it was drawn from."""
    return f"rows {results.digest}"


def curve_digest_text(results):
    return f"variants {digest_of(results.curve)}"


def pyplot():
    """Set up so that the same rows make the same file, which shows its text as text."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "turboquant", "font.size": 9.5, "axes.titlesize": 9.5,
        "figure.labelsize": 9.5, "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # of equal widths
        "savefig.facecolor": "white", "axes.edgecolor": "#888888", "axes.grid": True, "grid.color": "#e4e4e4",
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(plt, figure, path, results, *more):
    """more: of what it says beside digest_text."""
    figure.savefig(path, metadata={"Date": None, "Description": ", ".join([digest_text(results), *more])})
    plt.close(figure)


def draw(results, folder):
    plt = pyplot()
    for name, drawing in DRAWINGS.items():
        figure = drawing(plt, results)
        if figure:
            more = [curve_digest_text(results)] if name == "curve" else []
            save(plt, figure, folder / f"quality-{name}.svg", results, *more)


def run(module, results_name, page_name):
    """The command line of a page. module: __doc__, read(path), tables(results) and draw(results, folder)."""
    parser = argparse.ArgumentParser(description=module.__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--results", type=pathlib.Path, default=DOCS / "results" / results_name)
    parser.add_argument("--page", type=pathlib.Path, default=DOCS / page_name)
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    results = module.read(args.results)
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(with_tables(page, module.tables(results)), encoding="utf-8")
    if results.rows and not args.tables_only:
        module.draw(results, args.page.parent)


if __name__ == "__main__":
    run(sys.modules[__name__], "quality.json", "QUALITY.md")
