#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times store, and store with the decode that follows it, by one build of the library or by several in turn.

    step_bench.py --library build/cuda/lib/libturboquant-cuda.so [--library OTHER ...] [--json F] [--commit C]
    step_bench.py --library before=OLD/libturboquant-cuda.so --library now=build/cuda/lib/libturboquant-cuda.so --json F

Store: tokens of 32/8/128 into the last of four tiers, or into all of them. Step: one new token of each sequence into four
tiers, then decode of all pages, one after the other and beside each other (after_store). Pages, graphs, turns and errors
are those of tier_bench.py.
"""
import json
import pathlib
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "integrations" / "cuda"), str(ROOT / "bench" / "cuda")]
import decode_bench  # noqa: E402
import tier_bench  # noqa: E402
import tqkv_cuda  # noqa: E402
from decode_bench import PAGE_TOKENS, aligned_bytes, shape_name  # noqa: E402

N_TIERS, PLAN = tier_bench.N_TIERS, "serving"
STORE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096)
STORE_SHAPE = (32, 8, 128, 1, 4096)
N_STORES = 8  # in a graph, each of other rows into other pages
STEPS = [(32, 8, 128, n, 4096) for n in (1, 16, 64)]


def stream():
    return torch.cuda.current_stream().cuda_stream


def plan_of(shape):
    young, widths = tier_bench.PLANS[PLAN]
    return decode_bench.make_plan(shape, PLAN, widths, [*young, 0], tier_bench.SINKS, tier_bench.FRAME_TOKENS)


def row_of(times):
    return {"us": round(statistics.median(times), 2), "us_min": round(min(times), 2), "us_max": round(max(times), 2)}


class Stores:
    """Stores of n_tokens into some tiers by one library."""

    def __init__(self, library, n_tokens, tiers):
        self.layer, self.image = decode_bench.load_layer(library, plan_of(STORE_SHAPE))
        self.n_sets, self.n_tokens = N_STORES, n_tokens
        self.rows = torch.randn(N_STORES, 2, n_tokens, 8 * 128, device="cuda").half()
        self.positions = torch.arange(n_tokens, dtype=torch.int32, device="cuda") + 1000
        n_pages = -(-n_tokens // PAGE_TOKENS)
        self.slots = torch.arange(N_STORES * n_pages * PAGE_TOKENS, dtype=torch.int64, device="cuda").view(N_STORES, -1)
        self.pools = [aligned_bytes(N_STORES * n_pages * self.layer.page_bytes(tier, PAGE_TOKENS)) if tier in tiers else None
                      for tier in range(N_TIERS)]

    def launch(self, index):
        k, v = self.rows[index]
        used = [pool is not None for pool in self.pools]
        args = tqkv_cuda.StoreArgs(k.data_ptr(), v.data_ptr(), 1024, 1024, self.positions.data_ptr(),
                                   [self.slots[index].data_ptr() if use else None for use in used],
                                   [pool.data_ptr() if use else None for use, pool in zip(used, self.pools)],
                                   self.n_tokens, PAGE_TOKENS, tqkv_cuda.F16)
        return lambda: self.layer.store(args, stream())


class Step(tier_bench.Build):
    """Store and decode by one library. The page of the new token is in the first tier, its other copies are not read."""

    def __init__(self, layer, image, tiered, shape, beside):
        super().__init__(layer, image, shape, tiered)
        n_seqs = shape[3]
        self.beside = beside
        self.rows = torch.randn(self.n_sets, 2, n_seqs, shape[1] * shape[2], device="cuda").half()
        self.positions = torch.full((n_seqs,), shape[4] - 1, dtype=torch.int32, device="cuda")
        self.read = tiered.tables[:, :, -1].long() * PAGE_TOKENS + PAGE_TOKENS - 1
        self.slots = torch.arange(n_seqs, dtype=torch.int64, device="cuda") * PAGE_TOKENS
        self.copies = [aligned_bytes(n_seqs * layer.page_bytes(tier, PAGE_TOKENS)) for tier in range(1, N_TIERS)]

    def launch(self, index):
        k, v = self.rows[index]
        stride = k.stride(0)
        pools = [self.tiered.pools[0].data_ptr(), *(pool.data_ptr() for pool in self.copies)]
        slots = [self.read[index].data_ptr()] + [self.slots.data_ptr()] * (N_TIERS - 1)
        store = tqkv_cuda.StoreArgs(k.data_ptr(), v.data_ptr(), stride, stride, self.positions.data_ptr(), slots, pools,
                                    len(k), PAGE_TOKENS, tqkv_cuda.F16)
        decode = tqkv_cuda.DecodeArgs(self.pages(index), self.q.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(),
                                      self.lengths.data_ptr(), self.workspace.data_ptr(), self.shape[3], 1, self.shape[4],
                                      self.scale, tqkv_cuda.F16, int(self.beside))

        def run():
            self.layer.store(store, stream())
            self.layer.decode(decode, stream())
        return run


def measure_store(libraries, n_tokens, tiers):
    stores = [Stores(library, n_tokens, tiers) for library in libraries.values()]
    row = {"store": n_tokens, "tiers": len(tiers)}
    row.update((name, row_of(times)) for name, times in zip(libraries, tier_bench.time_in_turn(stores)))
    return row


def measure_step(libraries, shape):
    layers = {name: decode_bench.load_layer(library, plan_of(shape)) for name, library in libraries.items()}
    tiered = tier_bench.TieredPages(next(iter(layers.values()))[0], shape, PLAN, True)
    steps = {f"{name}{', beside' if beside else ''}": Step(*layers[name], tiered, shape, beside)
             for name in libraries for beside in (False, True)}
    errors = [step.error() for step in steps.values()]
    row = {"step": shape_name(shape), "pages": tiered.counts}
    for name, error, times in zip(steps, errors, tier_bench.time_in_turn(list(steps.values()))):
        row[name] = {**row_of(times), "error": float(f"{error:.2e}")}
    return row


def measure(options):
    libraries = tier_bench.load_libraries(options)
    result = {"card": decode_bench.smi("name"), "driver": decode_bench.smi("driver_version"), "commit": options.commit,
              "command": " ".join(["bench/cuda/step_bench.py"] + sys.argv[1:]), "rows": []}
    cases = [lambda n=n, tiers=tiers: measure_store(libraries, n, tiers)
             for tiers in ([N_TIERS - 1], list(range(N_TIERS))) for n in STORE_TOKENS]
    for case in cases + [lambda shape=shape: measure_step(libraries, shape) for shape in STEPS]:
        row = case()
        result["rows"].append(row)
        print("  ".join(f"{name} {value['us']:.2f} us ({value['us_min']:.1f} .. {value['us_max']:.1f})"
                        f"{' error ' + format(value['error'], '.0e') if 'error' in value else ''}"
                        if isinstance(value, dict) else f"{name} {value}" for name, value in row.items()), flush=True)
        torch.cuda.empty_cache()
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    measure(tier_bench.parse(__doc__))
