#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times decode where sequences have young tokens in wider tiers, by one build of the library or by several in turn.

    tier_bench.py --library build/cuda/lib/libturboquant-cuda.so [--library OTHER ...] [--json F] [--commit C]
    tier_bench.py --library before=OLD/libturboquant-cuda.so --library now=build/cuda/lib/libturboquant-cuda.so --json F

Plans have four tiers; the pages of a sequence lie in them as an engine leaves them, or all in the last one.
All libraries read the same pages: random codes, shuffled tables, more than eight times L2 in a cycle. Graphs of the
libraries are replayed in turn; times are medians of 60 with the fastest and the slowest. Every output is compared
with attention in float64 over the decoded rows before it is timed.
"""
import argparse
import json
import pathlib
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "integrations" / "cuda"), str(ROOT / "bench" / "cuda")]
import decode_bench  # noqa: E402
import tqkv_cuda  # noqa: E402
from decode_bench import PAGE_TOKENS, aligned_bytes, shape_name  # noqa: E402

SINKS = 4
N_TIERS = 4
FRAME_TOKENS = 1024
PLANS = {  # tokens of the young tiers; widths of eight units of K and of V in each tier
    "serving": ((32, 224, 768), [([8] * 8,) * 2, ([6] * 8,) * 2, ([4] * 8,) * 2, ([4, 4, 3, 3, 3, 2, 2, 1],) * 2]),
    "5x": ((32, 224, 1536), [([8] * 8,) * 2, ([6] * 8,) * 2, ([4] * 8,) * 2, decode_bench.PROFILES["5x"]]),
    "8x": ((32, 224, 1728), [([8] * 8,) * 2, ([6] * 8,) * 2, ([3] * 8,) * 2,
                             ([3, 3, 2, 2, 2, 1, 1, 1], [3, 2, 2, 2, 2, 2, 1, 1])]),
}
LLAMA = [(32, 8, 128, n, tokens) for n, tokens in ((64, 4096), (64, 1024), (16, 4096), (1, 4096), (1, 1024), (4, 4096),
                                                   (1, 32768), (8, 32768), (16, 8192))]
OTHERS = [(64, 8, 128, 32, 8192), (14, 2, 64, 64, 4096), (14, 2, 64, 32, 32768), (16, 8, 256, 8, 8192),
          (16, 8, 256, 32, 4096)]
CASES = [  # shape as in decode_bench.py, plan, whether pages are of young tiers too
    *((shape, "serving", True) for shape in LLAMA[:8]), (LLAMA[0], "serving", False),
    *((LLAMA[i], "5x", True) for i in (0, 1, 8, 3, 7)), *((LLAMA[i], "8x", True) for i in (0, 1, 8, 3)),
    *((shape, plan, True) for shape in OTHERS for plan in ("serving", "5x")),
    *((OTHERS[i], "5x", False) for i in (0, 2, 3)),
]


def tiers_of_pages(n_pages, young, has_young):
    """The tier that each page of a sequence is read from; sinks are in the first."""
    if not has_young:
        return [N_TIERS - 1] * n_pages
    reach = [-(-sum(young[:i + 1]) // PAGE_TOKENS) for i in range(N_TIERS - 1)]
    tiers = []
    for i in range(n_pages):
        by_age = next((t for t, pages in enumerate(reach) if n_pages - 1 - i <= pages), N_TIERS - 1)
        tiers.append(0 if i * PAGE_TOKENS < SINKS else by_age)
    return tiers


class TieredPages:
    """Pools of all tiers, tables for enough launches, and what all libraries read and write."""

    def __init__(self, layer, shape, plan, has_young):
        n_heads, _, dim, n_seqs, tokens = shape
        young, widths = PLANS[plan]
        tiers = tiers_of_pages(-(-tokens // PAGE_TOKENS), young, has_young)
        self.width, self.counts = len(tiers), [tiers.count(t) for t in range(N_TIERS)]
        page_bytes = [layer.page_bytes(t, PAGE_TOKENS) for t in range(N_TIERS)]
        self.kv_bytes = n_seqs * sum(n * size for n, size in zip(self.counts, page_bytes))
        self.n_sets = max(2, -(-decode_bench.CYCLE_BYTES // self.kv_bytes))
        self.pools, self.tables = [], torch.empty(self.n_sets, n_seqs, self.width, dtype=torch.int32, device="cuda")
        which = torch.tensor(tiers, device="cuda")
        for t in range(N_TIERS):
            n_pages = self.n_sets * n_seqs * self.counts[t]
            pool = aligned_bytes(max(n_pages, 1) * page_bytes[t])
            decode_bench.fill_pool(pool, shape, widths[t], page_bytes[t] // (PAGE_TOKENS // 16))
            self.pools.append(pool)
            if n_pages:
                pages = torch.randperm(n_pages, device="cuda").to(torch.int32)
                self.tables[:, :, which == t] = pages.view(self.n_sets, n_seqs, -1)
        self.tiers = which.to(torch.uint8).repeat(n_seqs, 1).contiguous()
        self.lengths = torch.full((n_seqs,), tokens, dtype=torch.int32, device="cuda")
        self.q = torch.randn(n_seqs, 1, n_heads, dim, device="cuda").mul_(2.0).half()
        self.out, self.lse = torch.empty_like(self.q), torch.empty(n_seqs, n_heads, device="cuda")


class Build(decode_bench.Compressed):
    """Decode of tiered pages by one library."""

    def __init__(self, layer, image, shape, tiered):
        _, _, dim, n_seqs, tokens = shape
        self.layer, self.image, self.shape, self.tiered = layer, image, shape, tiered
        self.lengths, self.q, self.out, self.lse = tiered.lengths, tiered.q, tiered.out, tiered.lse
        self.workspace = aligned_bytes(layer.decode_bytes(n_seqs, 1, tokens)).zero_()
        self.scale, self.n_sets = dim ** -0.5, tiered.n_sets

    def pages(self, index):
        tiered = self.tiered
        return tqkv_cuda.Pages([pool.data_ptr() for pool in tiered.pools], tiered.tables[index].data_ptr(), PAGE_TOKENS,
                               tiered.width, tiered.tiers.data_ptr(), tiered.width)


def time_in_turn(builds):
    """Microseconds of a launch in every replay, a list for each build; every second round goes backwards."""
    graphs = [decode_bench.capture([build.launch(i) for i in range(build.n_sets)]) for build in builds]
    times = [[] for _ in graphs]
    for turn in range(decode_bench.REPLAYS):
        for which in range(len(graphs)) if turn % 2 else reversed(range(len(graphs))):
            times[which].append(decode_bench.time_replay(graphs[which], builds[which].n_sets))
    return times


def measure_case(libraries, shape, plan, has_young):
    young, widths = PLANS[plan]
    data = decode_bench.make_plan(shape, plan, widths, [*young, 0], SINKS, FRAME_TOKENS)
    layers = [decode_bench.load_layer(library, data) for library in libraries.values()]
    tiered = TieredPages(layers[0][0], shape, plan, has_young)
    builds = [Build(layer, image, shape, tiered) for layer, image in layers]
    row = {"shape": shape_name(shape), "plan": plan, "young": has_young, "pages": tiered.counts,
           "kv_mb": round(tiered.kv_bytes / 1e6, 1)}
    errors = [build.error() for build in builds]
    for name, error, times in zip(libraries, errors, time_in_turn(builds)):
        row[name] = {"us": round(statistics.median(times), 2), "us_min": round(min(times), 2),
                     "us_max": round(max(times), 2), "error": float(f"{error:.2e}")}
    return row


def measure(options):
    libraries = load_libraries(options)
    result = {"card": decode_bench.smi("name"), "driver": decode_bench.smi("driver_version"),
              "clocks before": decode_bench.smi("clocks.sm,clocks.mem"), "commit": options.commit,
              "command": " ".join(["bench/cuda/tier_bench.py"] + sys.argv[1:]), "rows": []}
    for case in CASES:
        row = measure_case(libraries, *case)
        result["rows"].append(row)
        times = "  ".join(f"{name} {row[name]['us']:.2f} us ({row[name]['us_min']:.1f} .. {row[name]['us_max']:.1f}) "
                          f"error {row[name]['error']:.0e}" for name in libraries)
        print(f"{row['shape']:20} {row['plan']:8}{'' if row['young'] else 'no young pages '} {row['pages']}  {times}",
              flush=True)
        torch.cuda.empty_cache()
    result["clocks after"] = decode_bench.smi("clocks.sm,clocks.mem")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


def parse(description):
    """What benchmarks of several builds take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, action="append",
                        help="PATH or NAME=PATH, the name of its column; repeatable")
    parser.add_argument("--json")
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


def load_libraries(options):
    """{column: tqkv_cuda.Library}."""
    named = (given.rpartition("=") for given in options.library)
    return {name or path: tqkv_cuda.Library(path) for name, _, path in named}


if __name__ == "__main__":
    measure(parse(__doc__))
