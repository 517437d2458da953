#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times chunks of prompts behind stored contexts: one prefill launch, unpack + flash + merge a sequence at a time, and
the fastest attention over an f16 cache of the same tokens. All of a shape in one run, by turns.

    prefill_bench.py --library build/cuda/lib/libturboquant-cuda.so [--json F] [--shapes 0,2] [--profiles "4 bits"]

Times are of the attention over the context alone, microseconds; medians of 30 replays of a graph of four launches with
the fastest and the slowest. "host" is what the host needs for the calls, without a graph. Outputs are compared with
float64 over the decoded rows before anything is timed.
"""
import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "integrations" / "cuda"), str(ROOT / "integrations" / "vllm"), str(ROOT / "bench" / "cuda")]
import decode_bench  # noqa: E402
import tqkv_cuda  # noqa: E402
from turboquant_vllm.gpu_layer import SLAB_TOKENS, flash  # noqa: E402

REPLAYS = 30
N_LAUNCHES = 4
PROFILES = ("4 bits", "5x", "2 bits")
SHAPES = [  # query heads, KV heads, dim, sequences, new tokens, context
    (32, 8, 128, 1, 2048, 32768), (32, 8, 128, 1, 512, 8192), (32, 8, 128, 16, 64, 4096), (32, 8, 128, 32, 16, 4096),
    (14, 2, 64, 16, 64, 4096), (16, 8, 256, 4, 256, 4096),
]


def shape_name(shape):
    return f"{shape[0]}/{shape[1]}/{shape[2]} {shape[3]} x {shape[4]} behind {shape[5]}"


def stream():
    return torch.cuda.current_stream().cuda_stream


class Case:
    """Pages of one shape and profile, queries, and both ways to read them."""

    def __init__(self, library, shape, profile, frame_tokens):
        n_heads, n_kv_heads, dim, n_seqs, n_new, context = self.shape = shape
        self.pages_of = decode_bench.Compressed(library, (n_heads, n_kv_heads, dim, n_seqs, context), profile, frame_tokens)
        self.layer, self.n, self.scale = self.pages_of.layer, n_seqs * n_new, dim ** -0.5
        self.q = torch.randn(self.n, n_heads, dim, device="cuda").mul_(2.0).half()
        self.out, self.lse = torch.empty_like(self.q), torch.empty(self.n, n_heads, device="cuda")
        self.whole, self.sums = torch.zeros_like(self.q), torch.zeros(self.n, n_heads, device="cuda")
        self.starts = torch.arange(0, self.n + 1, n_new, dtype=torch.int32, device="cuda")
        self.slab = torch.empty(2, min(SLAB_TOKENS, context), n_kv_heads, dim, dtype=torch.float16, device="cuda")
        self.workspace = decode_bench.aligned_bytes(self.layer.prefill_bytes(n_seqs, self.n, n_new, context))

    def prefill(self, index, merges=True):
        _, _, dim, n_seqs, n_new, context = self.shape
        args = tqkv_cuda.PrefillArgs(self.pages_of.pages(index % self.pages_of.n_sets), self.q.data_ptr(), self.out.data_ptr(),
                                     self.lse.data_ptr(), self.starts.data_ptr(), self.pages_of.lengths.data_ptr(),
                                     self.workspace.data_ptr(), len(self.workspace), n_seqs, self.n, n_new, context, 0,
                                     self.scale, tqkv_cuda.F16)

        def launch():
            self.layer.prefill(args, stream())
            if merges:
                self.layer.merge(self.whole.data_ptr(), self.sums.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(),
                                 self.sums.numel(), dim, tqkv_cuda.F16, stream())
        return launch

    def slabs(self, index):
        _, n_kv_heads, dim, n_seqs, n_new, context = self.shape
        pages = self.pages_of.pages(index % self.pages_of.n_sets)

        def launch():
            for seq in range(n_seqs):
                rows = slice(seq * n_new, (seq + 1) * n_new)
                for first in range(0, context, SLAB_TOKENS):
                    n = min(SLAB_TOKENS, context - first)
                    k, v = self.slab[0, :n], self.slab[1, :n]
                    self.layer.unpack(tqkv_cuda.UnpackArgs(pages, k.data_ptr(), v.data_ptr(), seq, first, n, tqkv_cuda.F16), stream())
                    part, sums = flash(self.q[rows], k, v, self.scale, causal=False)
                    self.layer.merge(self.whole[rows].data_ptr(), self.sums[rows].data_ptr(), part.data_ptr(), sums.data_ptr(),
                                     sums.numel(), dim, tqkv_cuda.F16, stream())
        return launch

    def error(self):
        """The largest relative error of some rows of some sequences."""
        n_heads, n_kv_heads, dim, n_seqs, n_new, context = self.shape
        self.out.fill_(float("nan"))
        self.prefill(0, merges=False)()
        worst = 0.0
        for seq in sorted({0, n_seqs // 2, n_seqs - 1}):
            k, v = (torch.empty(context, n_kv_heads, dim, device="cuda") for _ in range(2))
            self.layer.unpack(tqkv_cuda.UnpackArgs(self.pages_of.pages(0), k.data_ptr(), v.data_ptr(), seq, 0, context,
                                                   tqkv_cuda.F32), stream())
            rows = torch.arange(seq * n_new, (seq + 1) * n_new, max(1, n_new // 16), device="cuda")
            q = self.q[rows].double().view(len(rows), n_kv_heads, -1, dim)
            weights = torch.softmax(torch.einsum("nghd,tgd->nght", q, k.double()) * self.scale, -1)
            want = torch.einsum("nght,tgd->nghd", weights, v.double()).reshape(len(rows), n_heads, dim)
            difference = (self.out[rows].double() - want).norm(dim=-1) / want.norm(dim=-1)
            worst = max(worst, float(torch.nan_to_num(difference, nan=9.0).max()))
        return worst


def fp16_candidates(shape):
    """Graphs of attention over an f16 cache, by name, and the tensors that they read."""
    n_heads, n_kv_heads, dim, n_seqs, n_new, context = shape
    kv = [torch.randn(2, n_seqs, n_kv_heads, context, dim, dtype=torch.float16, device="cuda") for _ in range(2)]
    q = torch.randn(n_seqs, n_heads, n_new, dim, dtype=torch.float16, device="cuda")
    found = {}
    for name, backend, grouped in (("sdpa flash", SDPBackend.FLASH_ATTENTION, False), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION, False),
                                   ("sdpa flash, group as queries", SDPBackend.FLASH_ATTENTION, True),
                                   ("sdpa cudnn, group as queries", SDPBackend.CUDNN_ATTENTION, True)):
        rows = q.view(n_seqs, n_kv_heads, -1, dim) if grouped else q

        def launch(i, backend=backend, rows=rows, grouped=grouped):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(rows, kv[i % 2][0], kv[i % 2][1], enable_gqa=not grouped)
        try:
            found[name] = decode_bench.capture([lambda i=i, launch=launch: launch(i) for i in range(N_LAUNCHES)])
        except Exception as problem:  # a backend that does not take the shape
            print(f"    {name}: {str(problem)[:80]!r}")
            torch.cuda.synchronize()
    return found, (kv, q)


def time_all(graphs):
    """Median, fastest and slowest of each graph, by turns."""
    times = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            times[name].append(decode_bench.time_replay(graph, N_LAUNCHES))
    return {name: [round(x, 1) for x in (statistics.median(t), min(t), max(t))] for name, t in times.items()}


def host_us(launch):
    """Of the calls alone: the device is behind."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch()
        times.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(times))


def measure_shape(library, shape, options):
    plain, _kept = fp16_candidates(shape)
    rows = []
    n_heads, _, dim, n_seqs, n_new, context = shape
    for profile in options.profiles:
        case = Case(library, shape, profile, options.frame)
        error = case.error()
        graphs = {"prefill": [case.prefill(i, False) for i in range(N_LAUNCHES)],
                  "prefill, merge": [case.prefill(i) for i in range(N_LAUNCHES)],
                  "unpack, flash, merge": [case.slabs(i) for i in range(N_LAUNCHES)]}
        times = time_all({**{name: decode_bench.capture(launches) for name, launches in graphs.items()}, **plain})
        best = min((name for name in plain), key=lambda name: times[name][0])
        tflops = 4.0 * n_heads * dim * n_seqs * n_new * context / 1e6
        row = {"shape": shape_name(shape), "profile": profile, "us": times, "best_fp16": best, "error": float(f"{error:.2e}"),
               "tflops": round(tflops / times["prefill"][0]), "tflops_fp16": round(tflops / times[best][0]),
               "workspace_mb": round(len(case.workspace) / 1e6, 1),
               "host_us": {"prefill, merge": host_us(case.prefill(0)), "unpack, flash, merge": host_us(case.slabs(0))}}
        rows.append(row)
        print(f"{row['shape']}, {profile}: error {error:.1e}, {row['tflops']} TFLOP/s (f16 {row['tflops_fp16']}), host {row['host_us']}")
        for name, t in times.items():
            print(f"    {name:32} {t[0]:9.1f} us ({t[1]:.1f} .. {t[2]:.1f})")
        del case, graphs
        torch.cuda.empty_cache()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--json")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--frame", type=int, default=1024, help="tokens of a frame")
    parser.add_argument("--shapes", default="", help="numbers of shapes, such as 0,2,3; all without")
    parser.add_argument("--profiles", type=lambda x: x.split(","), default=PROFILES)
    options = parser.parse_args()
    library, rows = tqkv_cuda.Library(options.library), []
    card, driver = decode_bench.smi("name"), decode_bench.smi("driver_version")
    for index in [int(i) for i in options.shapes.split(",") if i] or range(len(SHAPES)):
        rows += measure_shape(library, SHAPES[index], options)
        if options.json:
            done = [dict(row, card=card, driver=driver, commit=options.commit, frame_tokens=options.frame) for row in rows]
            pathlib.Path(options.json).write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
