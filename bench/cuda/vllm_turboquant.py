#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times decode beside that of vLLM's own TurboQuant kernels (Triton), on the same device in one run.

    vllm_turboquant.py --library build/cuda/lib/libturboquant-cuda.so --vllm DIR [--json F] [--shapes 0,3]

DIR: vllm/v1/attention/ops of vLLM's sources or of an installed vLLM, of which two files are read; vLLM itself is not
imported. Its pages have 16 tokens and random bytes, with norms and scales that are numbers; its number of splits is the
fastest of 8, 16 and 32 (32 is its default). Both launch the rotation of queries with the rest. All is replayed as
graphs, as in decode_bench.py.
"""
import argparse
import importlib.util
import json
import pathlib
import sys
import types

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import decode_bench  # noqa: E402
from decode_bench import tqkv_cuda  # noqa: E402

BLOCK_TOKENS = 16
SPLITS = (8, 16, 32)
PRESETS = {  # bits of K (8: FP8) and of V; the profile of ours beside it
    "turboquant_k8v4": (8, 4, "8 bits"), "turboquant_4bit_nc": (4, 4, "4 bits"), "turboquant_3bit_nc": (3, 3, "3 bits"),
}
PACKAGES = ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops")


def load_kernels(folder):
    """The module of vLLM's decode, with what it imports of vLLM stood in for."""
    platform = types.SimpleNamespace(is_rocm=lambda: False, is_cuda_alike=lambda: True)
    stand_ins = {name: types.ModuleType(name) for name in (*PACKAGES, "vllm.platforms", "vllm.triton_utils")}
    stand_ins["vllm.platforms"].current_platform = platform
    stand_ins["vllm.triton_utils"].tl, stand_ins["vllm.triton_utils"].triton = tl, triton
    sys.modules.update(stand_ins)
    for name in ("triton_decode_attention", "triton_turboquant_decode"):
        spec = importlib.util.spec_from_file_location(f"vllm.v1.attention.ops.{name}", pathlib.Path(folder) / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


class Theirs:
    """Pages for enough launches of one shape, and what a decode needs."""

    def __init__(self, kernels, shape, preset):
        n_heads, n_kv_heads, dim, n_seqs, tokens = shape
        k_bits, v_bits, _ = PRESETS[preset]
        self.kernels, self.shape, self.is_fp8 = kernels, shape, k_bits == 8
        self.k_bits, self.v_bits = k_bits, v_bits
        k_codes, v_codes = dim * k_bits // 8, dim * v_bits // 8
        self.k_bytes = k_codes + (0 if self.is_fp8 else 2)
        slot = self.k_bytes + v_codes + 4
        self.bits = slot * 8 / (2 * dim)
        blocks_of_seq = -(-tokens // BLOCK_TOKENS)
        n_blocks = blocks_of_seq * n_seqs
        self.n_sets = max(2, -(-decode_bench.CYCLE_BYTES // (n_blocks * BLOCK_TOKENS * n_kv_heads * slot)))
        self.pool = torch.randint(0, 120 if self.is_fp8 else 256, (n_blocks * self.n_sets, BLOCK_TOKENS, n_kv_heads, slot),
                                  dtype=torch.uint8, device="cuda")
        one = torch.tensor([0.1], dtype=torch.float16, device="cuda").view(torch.uint8)
        for at in ([] if self.is_fp8 else [k_codes]) + [self.k_bytes + v_codes, self.k_bytes + v_codes + 2]:
            self.pool[..., at:at + 2] = one
        self.tables = torch.randperm(len(self.pool), device="cuda").to(torch.int32).view(self.n_sets, n_seqs, -1)
        self.lengths = torch.full((n_seqs,), tokens, dtype=torch.int32, device="cuda")
        self.q = torch.randn(n_seqs, n_heads, dim, dtype=torch.float16, device="cuda")
        self.rotation = torch.linalg.qr(torch.randn(dim, dim, device="cuda"))[0].contiguous()
        self.levels = torch.linspace(-2, 2, 1 << (v_bits if self.is_fp8 else k_bits), device="cuda") * dim**-.5

    def launches(self, splits):
        n_heads, _, dim, n_seqs, _ = self.shape
        middle = torch.empty(n_seqs, n_heads, splits, dim + 1, device="cuda")
        out, lse = torch.empty_like(self.q), torch.empty(n_seqs, n_heads, device="cuda")

        def launch(index):
            self.kernels.triton_turboquant_decode_attention(
                self.q, self.pool, self.tables[index], self.lengths, self.rotation, self.levels, dim**-.5,
                self.v_bits if self.is_fp8 else self.k_bits, self.k_bytes, self.v_bits, self.is_fp8, not self.is_fp8,
                self.rotation, middle, out, lse, None, splits)
            return out
        assert not launch(0).isnan().any()
        return [lambda i=i: launch(i) for i in range(self.n_sets)]

    def time(self):
        """Splits, and median, fastest and slowest, of the fastest number of splits."""
        found = {splits: decode_bench.time_launches(self.launches(splits)) for splits in SPLITS}
        best = min(found, key=lambda splits: found[splits][0])
        return best, found[best]


def measure(library, kernels, shape, best_fp16):
    for preset, (_, _, profile) in PRESETS.items():
        theirs = Theirs(kernels, shape, preset)
        splits, times = theirs.time()
        bits = theirs.bits
        del theirs
        torch.cuda.empty_cache()
        ours = decode_bench.Compressed(library, shape, profile, 1024)
        our_times, our_bits = ours.time(), 4 * ours.kv_bytes / (shape[1] * shape[2] * shape[3] * shape[4])
        del ours
        torch.cuda.empty_cache()
        yield {"shape": decode_bench.shape_name(shape), "preset": preset, "bits": round(bits, 2), "splits": splits,
               "us": [round(x, 1) for x in times], "profile": profile, "our_bits": round(our_bits, 2),
               "our_us": [round(x, 1) for x in our_times], "best_fp16": best_fp16[0],
               "best_fp16_us": round(best_fp16[1][0], 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--vllm", required=True, help="folder with triton_turboquant_decode.py of vLLM")
    parser.add_argument("--version", default="unknown", help="of that vLLM, for the JSON")
    parser.add_argument("--json")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--shapes", default="0,1,3", help="numbers of shapes of decode_bench.py")
    options = parser.parse_args()
    library, kernels, rows = tqkv_cuda.Library(options.library), load_kernels(options.vllm), []
    about = {"card": decode_bench.smi("name"), "driver": decode_bench.smi("driver_version"), "vllm": options.version,
             "commit": options.commit}
    for index in options.shapes.split(","):
        shape = decode_bench.SHAPES[int(index)]
        best = decode_bench.best_fp16(shape, False)[0]
        for row in measure(library, kernels, shape, best):
            rows.append(dict(row, **about))
            print(f"{row['shape']:18} {row['preset']:18} {row['bits']:5.2f} bits {row['us'][0]:7.1f} us ({row['us'][1]} .. "
                  f"{row['us'][2]}), {row['splits']} splits | ours {row['our_bits']:5.2f} bits {row['our_us'][0]:6.1f} us "
                  f"({row['our_us'][1]} .. {row['our_us'][2]}) | f16 {row['best_fp16_us']} us ({row['best_fp16']})", flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
