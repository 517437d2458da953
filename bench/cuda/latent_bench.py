#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times decode, store and gather of latent layers (DeepSeek's MLA, 512 + 64 channels for all heads) beside attention over
latents in f16, all of a shape in one run.

    latent_bench.py --library build/cuda/lib/libturboquant-cuda.so [--json F] [--shapes 0,2] [--vllm]

Pages of random codes and shuffled tables, more than eight times L2 in a cycle; replays of graphs, microseconds: median of
60, fastest, slowest. Outputs are compared with float64 over gathered rows before anything is timed. With --vllm, of which
a device build has to be importable, its kernels are among those over f16.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import triton
import triton.language as tl

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "integrations" / "cuda"), str(ROOT / "tests" / "oracle"), str(ROOT / "bench" / "cuda")]
import decode_bench  # noqa: E402
import fp16_attention  # noqa: E402
import plan_writer  # noqa: E402
import tqkv_cuda  # noqa: E402
from decode_bench import CYCLE_BYTES, PAGE_TOKENS, aligned_bytes, time_launches, widths_for  # noqa: E402

LATENT, ROTATED = 512, 64
SCALE = 192 ** -0.5
FRAME_TOKENS = 1024
SHAPES = [  # query heads, sequences, tokens
    (16, 64, 4096), (16, 16, 8192), (16, 1, 32768), (16, 1, 4096), (128, 16, 4096), (128, 1, 32768),
]
PROFILES = {"5x": [4, 3, 3, 2, 2, 2, 2, 2], "4 bits": [4] * 8, "8 bits": [8] * 8}  # of the latent; the key has 8
COUNTS = (1, 8, 64, 512, 4096)  # tokens of store and gather


def stream():
    return torch.cuda.current_stream().cuda_stream


def make_plan(n_heads, widths):
    rng = np.random.default_rng(1)
    sides = [[{"layouts": [layout], "mean": (0.1 * rng.standard_normal(dim)).astype(np.float32),
               "weight": np.ones(dim // 16, np.float32), "matrix": np.linalg.qr(rng.standard_normal((dim, dim)))[0]}]
             for dim, layout in ((ROTATED, [8] * 4), (LATENT, widths_for(widths, LATENT)))]
    inv_freq = (1e4 ** -(np.arange(ROTATED // 2) * 2.0 / ROTATED)).astype(np.float32)
    layer = {"n_heads": n_heads, "k_dim": ROTATED, "v_dim": LATENT | 1 << 31, "window": 0, "rope": (2, ROTATED, inv_freq),
             "tier_tokens": [0], "sides": sides}
    return plan_writer.write_plan({"names": ["bench", "", "latent"], "n_tiers": 1, "n_sinks": 0, "frame_tokens": FRAME_TOKENS,
                                   "context": 4096, "bits_total": 0.0, "layers": [layer]})


class Compressed:
    """Pages of random codes for enough launches, and what decode needs."""

    def __init__(self, library, shape, profile):
        n_heads, n_seqs, tokens = self.shape = shape
        self.layer, self.image = decode_bench.load_layer(library, make_plan(n_heads, PROFILES[profile]))
        page_bytes = self.layer.page_bytes(0, PAGE_TOKENS)
        self.pages_of_seq = -(-tokens // PAGE_TOKENS)
        n_pages = self.pages_of_seq * n_seqs
        self.token_bytes = page_bytes // PAGE_TOKENS
        self.kv_bytes = n_seqs * tokens * self.token_bytes
        self.n_sets = max(2, -(-CYCLE_BYTES // self.kv_bytes))
        self.pool = aligned_bytes(n_pages * self.n_sets * page_bytes)
        self.pool.random_(0, 256)
        self.pool.bitwise_or_(0x11)  # code 0 of width 8 is never written
        blocks, at = self.pool.view(-1, 16 * self.token_bytes), 0
        for n_bytes in (ROTATED, self.token_bytes - ROTATED - 2):
            blocks[:, at:at + 16].random_(112, 132)
            at += 16 * (1 + n_bytes)
        self.tables = torch.randperm(n_pages * self.n_sets, device="cuda").to(torch.int32).view(self.n_sets, n_seqs, -1)
        self.lengths = torch.full((n_seqs,), tokens, dtype=torch.int32, device="cuda")
        self.q = torch.randn(n_seqs, 1, n_heads, LATENT + ROTATED, device="cuda").half()
        self.out = torch.empty(n_seqs, 1, n_heads, LATENT, dtype=torch.float16, device="cuda")
        self.lse = torch.empty(n_seqs, n_heads, device="cuda")
        self.workspace = aligned_bytes(self.layer.decode_bytes(n_seqs, 1, tokens)).zero_()
        self.first = torch.zeros(1, dtype=torch.int32, device="cuda")

    def pages(self, index):
        return tqkv_cuda.Pages([self.pool.data_ptr()], self.tables[index].data_ptr(), PAGE_TOKENS, self.pages_of_seq)

    def launch(self, index):
        args = tqkv_cuda.DecodeArgs(self.pages(index), self.q.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(),
                                    self.lengths.data_ptr(), self.workspace.data_ptr(), self.shape[1], 1, self.shape[2],
                                    SCALE, tqkv_cuda.F16)
        return lambda: self.layer.decode(args, stream())

    def gather(self, n_tokens, kind, dtype, seq=0):
        """Rows of the first tokens of one sequence, and the launch that fills them."""
        rows = torch.empty(n_tokens, LATENT + ROTATED, dtype=dtype, device="cuda")
        starts = torch.tensor([0, n_tokens], dtype=torch.int32, device="cuda")
        pages = tqkv_cuda.Pages([self.pool.data_ptr()], self.tables[0, seq].data_ptr(), PAGE_TOKENS, self.pages_of_seq)
        args = tqkv_cuda.GatherArgs(pages, rows.data_ptr(), LATENT + ROTATED, starts.data_ptr(), self.first.data_ptr(), 1,
                                    n_tokens, kind)
        return rows, lambda: (self.layer.gather(args, stream()), starts)

    def error(self):
        """Relative error of some sequences beside float64 attention over gathered rows."""
        self.out.fill_(float("nan"))
        self.launch(0)()
        worst = 0.0
        for seq in sorted({0, self.shape[1] // 2, self.shape[1] - 1}):
            rows, launch = self.gather(self.shape[2], tqkv_cuda.F32, torch.float32, seq)
            launch()
            weights = torch.softmax(self.q[seq, 0].double() @ rows.double().t() * SCALE, -1)
            want = weights @ rows[:, :LATENT].double()
            difference = (self.out[seq, 0].double() - want).norm(dim=-1) / want.norm(dim=-1)
            worst = max(worst, float(torch.nan_to_num(difference, nan=9.0).max()))
        return worst

    def time(self):
        return time_launches([self.launch(i) for i in range(self.n_sets)])


@triton.jit
def latent_split_kernel(q, rows, part, stats, n_heads, tokens, chunk, scale, V: tl.constexpr, K: tl.constexpr,
                        N: tl.constexpr, ROWS: tl.constexpr):
    """One split of one sequence and ROWS of its heads: sums of latents, top and sum of each head."""
    seq, tile, split, n_splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    head, v, k, n = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, V), tl.arange(0, K), tl.arange(0, N)
    at = (seq * n_heads + head)[:, None] * (V + K)
    of_latent = tl.load(q + at + v[None, :], mask=(head < n_heads)[:, None], other=0.0)
    of_key = tl.load(q + at + V + k[None, :], mask=(head < n_heads)[:, None], other=0.0)
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V], tl.float32)
    base = rows + seq.to(tl.int64) * tokens * (V + K)
    for first in range(split * chunk, tl.minimum(split * chunk + chunk, tokens), N):
        token = base + (first + n)[:, None] * (V + K)
        seen = first + n < tokens
        latents = tl.load(token + v[None, :], mask=seen[:, None], other=0.0)
        keys = tl.load(token + V + k[None, :], mask=seen[:, None], other=0.0)
        s = tl.dot(of_latent, tl.trans(latents)) + tl.dot(of_key, tl.trans(keys))
        s = tl.where(seen[None, :], s * scale, -1e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(p, 1)
        sums = sums * old[:, None] + tl.dot(p.to(latents.dtype), latents)
        top = new_top
    to = (seq * n_heads + head) * n_splits + split
    tl.store(part + to[:, None] * V + v[None, :], sums, mask=(head < n_heads)[:, None])
    tl.store(stats + to * 2, top, mask=head < n_heads)
    tl.store(stats + to * 2 + 1, total, mask=head < n_heads)


def triton_split(n_splits, block, rows_of_block, warps, stages):
    buffers = {}

    def run(q, rows):
        n_seqs, n_heads = q.shape[:2]
        tokens = rows.shape[1]
        if "out" not in buffers:
            buffers["part"] = torch.empty(n_seqs * n_heads * n_splits * LATENT, device="cuda")
            buffers["stats"] = torch.empty(n_seqs * n_heads * n_splits * 2, device="cuda")
            buffers["out"] = torch.empty(n_seqs, n_heads, LATENT, dtype=q.dtype, device="cuda")
        chunk = triton.cdiv(triton.cdiv(tokens, n_splits), block) * block
        latent_split_kernel[(n_seqs, triton.cdiv(n_heads, rows_of_block), n_splits)](
            q, rows, buffers["part"], buffers["stats"], n_heads, tokens, chunk, SCALE * 1.44269504, LATENT, ROTATED, block,
            rows_of_block, num_warps=warps, num_stages=stages)
        fp16_attention.join_kernel[(n_seqs * n_heads,)](buffers["part"], buffers["stats"], buffers["out"], n_splits, LATENT,
                                                        triton.next_power_of_2(n_splits), num_warps=4)
        return buffers["out"]
    return run


def matrix_products(q, rows):
    weights = torch.softmax(torch.bmm(q, rows.transpose(1, 2)).float() * SCALE, -1).to(q.dtype)
    return torch.bmm(weights, rows[..., :LATENT])


def vllm_kernels(n_seqs, tokens):
    """What vLLM decodes latents with on Hopper: FlashAttention 3, by default, and its Triton kernel."""
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    table = torch.arange(n_seqs * tokens // PAGE_TOKENS, dtype=torch.int32, device="cuda").view(n_seqs, -1)
    lengths = torch.full((n_seqs,), tokens, dtype=torch.int32, device="cuda")
    starts = torch.arange(n_seqs + 1, dtype=torch.int32, device="cuda")
    one = torch.ones(1, device="cuda")

    def in_pages(rows):
        return rows.view(-1, PAGE_TOKENS, 1, LATENT + ROTATED)

    def of_triton(splits):
        def run(q, rows):
            out, lse = q.new_zeros(*q.shape[:2], LATENT), q.new_zeros(*q.shape[:2])
            middle = torch.empty(*q.shape[:2], splits, LATENT + 1, device="cuda")
            pages = in_pages(rows)
            decode_attention_fwd(q, pages, pages[..., :LATENT], out, lse, table, lengths, middle, splits, SCALE, PAGE_TOKENS,
                                 k_scale=one, v_scale=one, is_mla=True)
            return out
        return run


    def flash(q, rows):
        pages = in_pages(rows)
        return flash_attn_varlen_func(q=q[..., LATENT:], k=pages[..., LATENT:], v=pages[..., :LATENT], q_v=q[..., :LATENT],
                                      max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=tokens, seqused_k=lengths,
                                      block_table=table, softmax_scale=SCALE, causal=True, fa_version=3)
    return [*((f"vllm triton {n} splits", of_triton(n)) for n in (4, 16, 64)), ("vllm flash attention 3", flash)]


def best_f16(shape, with_vllm):
    """(name, (median, fastest, slowest)) of the fastest attention over latents in f16, and the medians of all."""
    n_heads, n_seqs, tokens = shape
    n_sets = max(2, -(-CYCLE_BYTES // (2 * n_seqs * tokens * (LATENT + ROTATED))))
    sets = [torch.randn(n_seqs, tokens, LATENT + ROTATED, dtype=torch.float16, device="cuda") for _ in range(n_sets)]
    q = torch.randn(n_seqs, n_heads, LATENT + ROTATED, dtype=torch.float16, device="cuda")
    want = matrix_products(q.float(), sets[0].float()) if n_seqs * tokens <= 1 << 18 else None
    found = [("matrix products", matrix_products)]
    tiles = n_seqs * -(-n_heads // 16)
    for n_splits in sorted({min(128, max(1, n // tiles)) for n in (132, 264, 528)}):
        for block, rows, warps, stages in ((32, 16, 4, 2), (64, 16, 8, 2), (32, 64, 8, 2)):
            if rows <= max(16, n_heads):
                found.append((f"triton {n_splits} splits, {block} tokens, {rows} heads", triton_split(n_splits, block, rows, warps, stages)))
    best, medians = None, {}
    for name, run in found + (vllm_kernels(n_seqs, tokens) if with_vllm else []):
        try:
            if want is not None:
                error = float((run(q, sets[0]).float() - want).norm() / want.norm())
                assert error < 0.02, f"error {error}"
            times = time_launches([lambda i=i, run=run: run(q, sets[i]) for i in range(n_sets)])
        except Exception as problem:  # one that does not take the shape
            print(f"    {name}: {str(problem)[:100]!r}")
            torch.cuda.synchronize()
            continue
        medians[name] = round(times[0], 1)
        if best is None or times[0] < best[1][0]:
            best = name, times
    return best, medians


def time_moves(library):
    """Store and gather of one layer, 5x."""
    case = Compressed(library, (16, 1, 8192), "5x")
    for n in COUNTS:
        k, v = (torch.randn(n, dim, dtype=torch.float16, device="cuda") for dim in (ROTATED, LATENT))
        positions = torch.arange(n, dtype=torch.int32, device="cuda")
        slots = torch.randperm(8192, device="cuda")[:n].contiguous()
        args = tqkv_cuda.StoreArgs(k.data_ptr(), v.data_ptr(), ROTATED, LATENT, positions.data_ptr(), [slots.data_ptr()],
                                   [case.pool.data_ptr()], n, PAGE_TOKENS, tqkv_cuda.F16)
        store = time_launches([lambda: case.layer.store(args, stream())] * 4)
        gather = time_launches([case.gather(n, tqkv_cuda.F16, torch.float16)[1]] * 4)
        yield {"tokens": n, "store_us": [round(x, 1) for x in store], "gather_us": [round(x, 1) for x in gather]}


def measure(options):
    library, rows = tqkv_cuda.Library(options.library), []
    about = {"card": decode_bench.smi("name"), "driver": decode_bench.smi("driver_version"), "commit": options.commit}
    for index in [int(i) for i in options.shapes.split(",") if i] or range(len(SHAPES)):
        shape = SHAPES[index]
        name = f"{shape[0]} heads, {shape[1]}x{shape[2]}"
        best, medians = ("none", (0, 0, 0)), {}
        if not options.no_f16:
            best, medians = best_f16(shape, options.vllm)
        torch.cuda.empty_cache()
        print(f"{name}: best f16 {best[1][0]:.1f} us ({best[0]})", flush=True)
        for profile in PROFILES:
            case = Compressed(library, shape, profile)
            error, times = case.error(), case.time()
            rows.append({"shape": name, "profile": profile, "bytes": case.token_bytes, "us": [round(x, 1) for x in times],
                         "best_f16_us": [round(x, 1) for x in best[1]], "best_f16_name": best[0], "f16_us": medians,
                         "speedup": round(best[1][0] / times[0], 2), "error": float(f"{error:.1e}"), **about})
            print(f"    {profile:7} {case.token_bytes} bytes {times[0]:8.1f} us ({times[1]:.1f} .. {times[2]:.1f})  "
                  f"{best[1][0] / times[0]:.2f}x  {case.kv_bytes / times[0] / 1e3:.0f} GB/s  error {error:.1e}", flush=True)
            del case
            torch.cuda.empty_cache()
    for row in time_moves(library):
        rows.append({**row, **about})
        print(f"{row['tokens']} tokens: store {row['store_us']} us, gather {row['gather_us']} us", flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--json")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--shapes", default="", help="numbers of shapes, such as 0,2,3; all without")
    parser.add_argument("--vllm", action="store_true", help="kernels of vLLM among the baselines")
    parser.add_argument("--no-f16", action="store_true", help="no baselines")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
