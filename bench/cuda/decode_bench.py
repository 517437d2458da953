#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA kernels beside f16 attention on the same device and writes a table and JSON.

    decode_bench.py --library build/cuda/lib/libturboquant-cuda.so [--json F] [--markdown F] [--shapes 0,2] [--flex 0]

KV of all launches of a timing cycle exceeds eight times L2, so that nothing is read from it. Launches
are replayed as a graph; times are medians of 60 replays with the fastest and the slowest. Every output
is compared with attention in float64 over the decoded rows before it is timed.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import numpy as np
import torch
import triton
import triton.language as tl

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "integrations" / "cuda"), str(ROOT / "tests" / "oracle"), str(ROOT / "bench" / "cuda")]
import fp16_attention  # noqa: E402
import plan_writer  # noqa: E402
import tqkv_cuda  # noqa: E402

CYCLE_BYTES = 8 * 50 << 20
PAGE_TOKENS = 64
REPLAYS = 60
# Widths of eight units of K and of V; heads of other sizes take each once or twice as often.
STORE_TOKENS = (1, 8, 64, 512, 4096, 16384)
PROFILES = {
    "4 bits": ([4] * 8, [4] * 8),
    "5x": ([6, 5, 4, 3, 3, 2, 2, 1], [4, 4, 4, 3, 3, 3, 2, 2]),
    "3 bits": ([3] * 8, [3] * 8),
    "2 bits": ([2] * 8, [2] * 8),
    "8 bits": ([8] * 8, [8] * 8),
}
SHAPES = [  # query heads, KV heads, dim, sequences, tokens
    (32, 8, 128, 64, 4096), (32, 8, 128, 16, 8192), (32, 8, 128, 1, 32768), (32, 8, 128, 1, 4096),
    (64, 8, 128, 32, 8192), (14, 2, 64, 32, 32768), (16, 8, 256, 8, 8192),
]


def shape_name(shape):
    return f"{shape[0]}/{shape[1]}/{shape[2]} {shape[3]}x{shape[4]}"


def widths_for(widths, dim):
    return [widths[i * 8 // (dim // 16)] for i in range(dim // 16)]


def make_plan(shape, name, widths_of_tiers, tier_tokens, n_sinks, frame_tokens):
    """A plan of one layer with random rotations as transforms; a tier's widths are those of K and of V."""
    n_heads, n_kv_heads, dim = shape[:3]
    rng = np.random.default_rng(1)
    sides = []
    for side in range(2):
        layouts = [widths_for(widths[side], dim) for widths in widths_of_tiers]
        sides.append([{"layouts": layouts, "mean": (0.1 * rng.standard_normal(dim)).astype(np.float32),
                       "weight": np.ones(dim // 16, np.float32), "matrix": np.linalg.qr(rng.standard_normal((dim, dim)))[0]}
                      for _ in range(n_kv_heads)])
    inv_freq = (1e4 ** -(np.arange(dim // 2) * 2.0 / dim)).astype(np.float32)
    layer = {"n_heads": n_heads, "k_dim": dim, "v_dim": dim, "window": 0, "rope": (1, dim, inv_freq),
             "tier_tokens": tier_tokens, "sides": sides}
    return plan_writer.write_plan({"names": ["bench", "", name], "n_tiers": len(tier_tokens), "n_sinks": n_sinks,
                                   "frame_tokens": frame_tokens, "context": shape[4], "bits_total": 0.0, "layers": [layer]})


def make_profile(shape, profile, frame_tokens):
    """A plan of one tier."""
    return make_plan(shape, profile, [PROFILES[profile]], [0], 0, frame_tokens)


def aligned_bytes(n):
    memory = torch.empty(n + 256, dtype=torch.uint8, device="cuda")
    return memory[-memory.data_ptr() % 256:][:n]


def fill_pool(pool, shape, widths, block_bytes):
    """Random codes, about 2^30 at a time; scales near 1. widths: those of K and of V."""
    for part in pool.split(1 << 30):
        part.random_(0, 256)
        if widths[0][0] == 8:
            part.bitwise_or_(0x11)  # code 0 is never written
    blocks = pool.view(-1, block_bytes)
    at = 0
    for _ in range(shape[1]):
        for side in widths:
            blocks[:, at:at + 16].random_(112, 132)
            at += 16 * (1 + 2 * sum(widths_for(side, shape[2])))
    assert at == block_bytes


def capture(launches):
    """The launches as one graph that has run a few times."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(5):
        graph.replay()
    return graph


def time_replay(graph, n_launches):
    """Microseconds of one of the launches of a graph."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / n_launches


def time_launches(launches):
    """Median, fastest and slowest microseconds of one of the launches, captured and replayed as one graph."""
    graph = capture(launches)
    times = [time_replay(graph, len(launches)) for _ in range(REPLAYS)]
    return statistics.median(times), min(times), max(times)


def load_layer(library, plan_bytes):
    """The layer of a plan, its image on the device, which must be kept."""
    plan = library.read_plan(plan_bytes)
    layer = tqkv_cuda.Layer(library, plan)
    library.destroy_plan(plan)
    image = aligned_bytes(len(layer.image))
    image.copy_(torch.frombuffer(bytearray(layer.image), dtype=torch.uint8))
    layer.device_image = image.data_ptr()
    return layer, image


class Compressed:
    """Pages of random codes for enough launches of one shape and profile, and what decode needs."""

    def __init__(self, library, shape, profile, frame_tokens):
        n_heads, _, dim, n_seqs, tokens = shape
        self.shape = shape
        self.layer, self.image = load_layer(library, make_profile(shape, profile, frame_tokens))
        page_bytes = self.layer.page_bytes(0, PAGE_TOKENS)
        self.pages_of_seq = -(-tokens // PAGE_TOKENS)
        n_pages = self.pages_of_seq * n_seqs
        self.kv_bytes = n_seqs * tokens * page_bytes // PAGE_TOKENS
        self.n_sets = max(2, -(-CYCLE_BYTES // self.kv_bytes))
        self.pool = aligned_bytes(n_pages * self.n_sets * page_bytes)
        fill_pool(self.pool, shape, PROFILES[profile], page_bytes // (PAGE_TOKENS // 16))
        self.tables = torch.randperm(n_pages * self.n_sets, device="cuda").to(torch.int32).view(self.n_sets, n_seqs, -1)
        self.lengths = torch.full((n_seqs,), tokens, dtype=torch.int32, device="cuda")
        self.q = torch.randn(n_seqs, 1, n_heads, dim, device="cuda").mul_(2.0).half()
        self.out, self.lse = torch.empty_like(self.q), torch.empty(n_seqs, n_heads, device="cuda")
        self.workspace = aligned_bytes(self.layer.decode_bytes(n_seqs, 1, tokens)).zero_()
        self.scale = dim ** -0.5

    def pages(self, index):
        return tqkv_cuda.Pages([self.pool.data_ptr()], self.tables[index].data_ptr(), PAGE_TOKENS, self.pages_of_seq)

    def launch(self, index):
        args = tqkv_cuda.DecodeArgs(self.pages(index), self.q.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(),
                                    self.lengths.data_ptr(), self.workspace.data_ptr(), self.shape[3], 1, self.shape[4],
                                    self.scale, tqkv_cuda.F16)
        return lambda: self.layer.decode(args, torch.cuda.current_stream().cuda_stream)

    def error(self):
        """Relative error of some sequences beside float64 attention over decoded rows."""
        n_heads, n_kv_heads, dim, n_seqs, tokens = self.shape
        self.out.fill_(float("nan"))
        self.launch(0)()
        worst = 0.0
        for seq in sorted({0, n_seqs // 2, n_seqs - 1}):
            k, v = (torch.empty(tokens, n_kv_heads, dim, device="cuda") for _ in range(2))
            self.layer.unpack(tqkv_cuda.UnpackArgs(self.pages(0), k.data_ptr(), v.data_ptr(), seq, 0, tokens, tqkv_cuda.F32),
                              torch.cuda.current_stream().cuda_stream)
            q = self.q[seq, 0].double().view(n_kv_heads, -1, dim)
            weights = torch.softmax(torch.einsum("ghd,tgd->ght", q, k.double()) * self.scale, -1)
            want = torch.einsum("ght,tgd->ghd", weights, v.double()).view(n_heads, dim)
            difference = (self.out[seq, 0].double() - want).norm(dim=-1) / want.norm(dim=-1)
            worst = max(worst, float(torch.nan_to_num(difference, nan=9.0).max()))
        return worst

    def time(self):
        return time_launches([self.launch(i) for i in range(self.n_sets)])


def best_fp16(shape, with_flex):
    """Name and times of the fastest f16 attention, and the medians of all."""
    n_heads, n_kv_heads, dim, n_seqs, tokens = shape
    bytes_of_set = 4 * n_seqs * n_kv_heads * tokens * dim
    n_sets = max(2, -(-CYCLE_BYTES // bytes_of_set))
    kv = [torch.randn(2, n_seqs, n_kv_heads, tokens, dim, dtype=torch.float16, device="cuda") for _ in range(n_sets)]
    q = torch.randn(n_seqs, n_heads, 1, dim, dtype=torch.float16, device="cuda")
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:1].float(), kv[0][0][:1].float(), kv[0][1][:1].float(), scale=dim ** -0.5, enable_gqa=True)
    best, medians = None, {}
    for name, run in fp16_attention.candidates(n_seqs * n_kv_heads, with_flex):
        try:
            error = float((run(q, kv[0][0], kv[0][1], dim ** -0.5)[:1].float() - want).norm() / want.norm())
            assert error < 5e-3, f"error {error}"
            times = time_launches([lambda s=s, run=run: run(q, s[0], s[1], dim ** -0.5) for s in kv])
        except Exception as problem:  # a backend that does not take the shape
            print(f"    {name}: {str(problem)[:80]!r}")
            torch.cuda.synchronize()
            continue
        medians[name] = round(times[0], 2)
        if best is None or times[0] < best[1][0]:
            best = (name, times)
    return best, medians


@triton.jit
def read_kernel(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        total += tl.load(x + i + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    for i in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        tl.store(y + i + tl.arange(0, BLOCK), tl.load(x + i + tl.arange(0, BLOCK)))


def ceilings():
    """GB/s of a copy (read and written; the faster of the driver's and a kernel's) and of reading alone."""
    n = 1 << 30
    x, y = torch.ones(n // 4, dtype=torch.int32, device="cuda"), torch.empty(n // 4, dtype=torch.int32, device="cuda")
    copy = min(time_launches([lambda: y.copy_(x)])[0],
               time_launches([lambda: copy_kernel[(132 * 8,)](x, y, n // 4, 4096, num_warps=8)])[0])
    out = torch.empty(132 * 8, dtype=torch.int32, device="cuda")
    read = time_launches([lambda: read_kernel[(132 * 8,)](x, out, n // 4, 2048, num_warps=8)])[0]
    return 2 * n / copy / 1e3, n / read / 1e3


def time_store(library, n_tokens):
    """Microseconds of storing tokens of 32/8/128 at 4 bits, bytes read and written."""
    shape = (32, 8, 128, 1, 64)
    layer, image = load_layer(library, make_profile(shape, "4 bits", 256))
    k, v = (torch.randn(n_tokens, 8 * 128, device="cuda").bfloat16() for _ in range(2))
    page_bytes = layer.page_bytes(0, PAGE_TOKENS)
    pool = aligned_bytes((n_tokens + PAGE_TOKENS) // PAGE_TOKENS * page_bytes)
    positions = torch.arange(n_tokens, dtype=torch.int32, device="cuda") + 1000
    slots = torch.arange(n_tokens, dtype=torch.int64, device="cuda")
    args = tqkv_cuda.StoreArgs(k.data_ptr(), v.data_ptr(), 1024, 1024, positions.data_ptr(), [slots.data_ptr()], [pool.data_ptr()],
                               n_tokens, PAGE_TOKENS, tqkv_cuda.BF16)
    times = time_launches([lambda: layer.store(args, torch.cuda.current_stream().cuda_stream)] * 4)
    return times, n_tokens * (4096 + page_bytes / PAGE_TOKENS)


def smi(query):
    got = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return got.stdout.strip()


def write(result, options):
    """JSON: a list of the rows, each with the card and the commit. Markdown: the page of the run."""
    if options.json:
        rows = [dict(row, card=result["card"], commit=result["commit"], frame_tokens=result["frame_tokens"])
                for row in result["rows"]]
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        pathlib.Path(options.markdown).write_text(markdown(result))


def flags(arguments):
    """What changes numbers: arguments without files and the commit."""
    kept = []
    for name, value in zip(arguments, arguments[1:] + [""]):
        if name in ("--flex", "--shapes", "--frame"):
            kept += [name, value]
        elif name in ("--no-fp16", "--store"):
            kept.append(name)
    return kept


def measure(options):
    library = tqkv_cuda.Library(options.library)
    result = {"card": smi("name"), "driver": smi("driver_version"), "clocks before": smi("clocks.sm,clocks.mem"),
              "commit": options.commit, "command": " ".join(["bench/cuda/decode_bench.py"] + flags(sys.argv[1:])),
              "frame_tokens": options.frame, "rows": [], "store": []}
    copy, read = ceilings()
    result.update(copy_gbs=round(copy), read_gbs=round(read))
    result["clocks after"] = result["clocks before"]
    print(f"{result['card']}: copy {copy:.0f} GB/s, read {read:.0f} GB/s")
    for index in [] if options.store else [int(i) for i in options.shapes.split(",") if i] or range(len(SHAPES)):
        shape = SHAPES[index]
        best, medians = best_fp16(shape, str(index) in options.flex.split(",")) if not options.no_fp16 else (("none", (0, 0, 0)), {})
        torch.cuda.empty_cache()
        print(f"{shape_name(shape)}: best f16 {best[1][0]:.1f} us ({best[0]})")
        for profile in PROFILES:
            case = Compressed(library, shape, profile, options.frame)
            error, times = case.error(), case.time()
            row = {"shape": shape_name(shape), "profile": profile,
                   "bits": round(case.kv_bytes * 8 / (2 * shape[1] * shape[2] * shape[3] * shape[4]), 3),
                   "us": round(times[0], 2), "us_min": round(times[1], 2), "us_max": round(times[2], 2),
                   "best_fp16_us": round(best[1][0], 2), "best_fp16_name": best[0], "fp16_us": medians,
                   "speedup": round(best[1][0] / times[0], 3), "pct_copy": round(100 * case.kv_bytes / times[0] / 1e3 / copy, 1),
                   "kv_mb": round(case.kv_bytes / 1e6, 1), "error": float(f"{error:.2e}")}
            result["rows"].append(row)
            print(f"    {profile:7} {row['bits']:.3f} bits {times[0]:8.2f} us ({times[1]:.2f} .. {times[2]:.2f})  "
                  f"{row['speedup']:.2f}x  {row['pct_copy']:.0f} % of copy  error {error:.1e}")
            del case
            torch.cuda.empty_cache()
        write(result, options)
    for n_tokens in STORE_TOKENS:
        times, moved = time_store(library, n_tokens)
        result["store"].append({"tokens": n_tokens, "us": round(times[0], 2), "us_min": round(times[1], 2), "us_max": round(times[2], 2),
                                "pct_copy": round(100 * moved / times[0] / 1e3 / copy, 1)})
        print(f"store {n_tokens} tokens: {times[0]:.1f} us ({times[1]:.1f} .. {times[2]:.1f}), {moved / times[0] / 1e3:.0f} GB/s")
    result["clocks after"] = smi("clocks.sm,clocks.mem")
    write(result, options)


def markdown(result):
    lines = [f"{result['card']}, driver {result['driver']}, clocks {result['clocks before']} before and {result['clocks after']} after. "
             f"Copy {result['copy_gbs']} GB/s (read and written), read {result['read_gbs']} GB/s. Commit {result['commit']}, "
             f"`{result['command']}`.", ""]
    if result["rows"]:
        lines += ["| heads, dim, batch x tokens | profile | bits in all | us | spread | best f16, us | times as fast | % of copy | error |",
                  "|---|---|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['shape']} | {row['profile']} | {row['bits']:.2f} | {row['us']:.1f} | {row['us_min']:.1f}–{row['us_max']:.1f} | "
                     f"{row['best_fp16_us']:.1f} ({row['best_fp16_name']}) | {row['speedup']:.2f} | {row['pct_copy']:.0f} | {row['error']:.0e} |")
    lines += ["", "| store, tokens (32/8/128, 4 bits) | us | spread | % of copy |", "|---|---|---|---|"]
    lines += [f"| {row['tokens']} | {row['us']:.1f} | {row['us_min']:.1f}–{row['us_max']:.1f} | {row['pct_copy']:.1f} |" for row in result["store"]]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--frame", type=int, default=1024, help="tokens of a frame")
    parser.add_argument("--flex", default="", help="shapes with flex attention too; it compiles for long")
    parser.add_argument("--shapes", default="", help="numbers of shapes, such as 0,2,3; all without")
    parser.add_argument("--no-fp16", action="store_true", help="no baselines")
    parser.add_argument("--store", action="store_true", help="store only, no decode")
    options = parser.parse_args()
    measure(options)


if __name__ == "__main__":
    main()
