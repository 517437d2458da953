# SPDX-License-Identifier: Apache-2.0
"""What decode over plain f16 K and V is compared with. k, v: [batch][KV heads][tokens][dim], all lengths alike."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel


@triton.jit
def split_kernel(q, k, v, part, stats, tokens, chunk, scale, GROUP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
                 ROWS: tl.constexpr):
    """One split of one KV head: sums of V, top and sum of each of its query heads."""
    head, split, n_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows, d, n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, N)
    queries = tl.load(q + (head * GROUP + rows)[:, None] * D + d[None, :], mask=rows[:, None] < GROUP, other=0.0)
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32)
    base = head.to(tl.int64) * tokens * D
    for first in range(split * chunk, tl.minimum(split * chunk + chunk, tokens), N):
        seen = first + n < tokens
        keys = tl.load(k + base + (first + n)[None, :] * D + d[:, None], mask=seen[None, :], other=0.0)
        s = tl.where(seen[None, :], tl.dot(queries, keys) * scale, -1e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        old = tl.exp2(top - new_top)
        values = tl.load(v + base + (first + n)[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
        total = total * old + tl.sum(p, 1)
        sums = sums * old[:, None] + tl.dot(p.to(values.dtype), values)
        top = new_top
    at = (head * GROUP + rows) * n_splits + split
    tl.store(part + at[:, None] * D + d[None, :], sums, mask=rows[:, None] < GROUP)
    tl.store(stats + at * 2, top, mask=rows < GROUP)
    tl.store(stats + at * 2 + 1, total, mask=rows < GROUP)


@triton.jit
def join_kernel(part, stats, out, n_splits, D: tl.constexpr, S: tl.constexpr):
    row, s, d = tl.program_id(0), tl.arange(0, S), tl.arange(0, D)
    there = s < n_splits
    top = tl.load(stats + (row * n_splits + s) * 2, mask=there, other=-1e30)
    total = tl.load(stats + (row * n_splits + s) * 2 + 1, mask=there, other=0.0)
    factor = tl.exp2(top - tl.max(top, 0))
    sums = tl.load(part + (row * n_splits + s)[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
    value = tl.sum(sums * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty))


def triton_split(n_splits, block, warps, stages):
    """Split-K decode of ours for f16. Buffers are made once, on the first call for a shape."""
    buffers = {}

    def run(q, k, v, scale):
        batch, n_heads, _, dim = q.shape
        n_kv_heads, tokens = k.shape[1:3]
        if "out" not in buffers:
            buffers["part"] = torch.empty(batch * n_heads * n_splits * dim, device="cuda")
            buffers["stats"] = torch.empty(batch * n_heads * n_splits * 2, device="cuda")
            buffers["out"] = torch.empty_like(q)
        chunk = triton.cdiv(triton.cdiv(tokens, n_splits), block) * block
        split_kernel[(batch * n_kv_heads, n_splits)](
            q, k, v, buffers["part"], buffers["stats"], tokens, chunk, scale * 1.44269504, n_heads // n_kv_heads, dim,
            block, 16, num_warps=warps, num_stages=stages)
        join_kernel[(batch * n_heads,)](buffers["part"], buffers["stats"], buffers["out"], n_splits, dim,
                                        triton.next_power_of_2(n_splits), num_warps=4)
        return buffers["out"]

    return run


def sdpa(backend):
    def run(q, k, v, scale):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return run


def grouped(backend):
    """The heads of a group as queries of one KV head: what kernels without grouped heads need."""
    def run(q, k, v, scale):
        batch, n_heads, _, dim = q.shape
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.view(batch, k.shape[1], n_heads // k.shape[1], dim), k, v,
                                                  scale=scale).view(batch, n_heads, 1, dim)
    return run


def flex():
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, scale: compiled(q, k, v, scale=scale, enable_gqa=True)


def candidates(n_heads, with_flex):
    """(name, function) of every baseline. n_heads: KV heads of the whole batch."""
    found = [("sdpa flash", sdpa(SDPBackend.FLASH_ATTENTION)), ("sdpa cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)),
             ("sdpa efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION)),
             ("sdpa flash, group as queries", grouped(SDPBackend.FLASH_ATTENTION)),
             ("sdpa cudnn, group as queries", grouped(SDPBackend.CUDNN_ATTENTION))]
    if with_flex:
        found.append(("flex", flex()))
    for n_splits in sorted({min(128, max(1, n // n_heads)) for n in (264, 528, 1056)}):
        for block, warps, stages in ((64, 4, 3), (64, 4, 4), (128, 8, 3)):
            found.append((f"triton {n_splits} splits, {block} tokens, {warps} warps, {stages} stages",
                          triton_split(n_splits, block, warps, stages)))
    return found
