# SPDX-License-Identifier: Apache-2.0
"""What tqkv_cuda.Layer does, on the CPU, with plain rows in place of codes: rounded to 2^-6 in tier 0, 2^-5 in tier 1,
and so on, so that an output shows which tier was read. For tests without a device; addresses are of CPU tensors."""
import ctypes
import math

import torch
import tqkv_cuda
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {tqkv_cuda.F32: torch.float32, tqkv_cuda.F16: torch.float16, tqkv_cuda.BF16: torch.bfloat16}


def at(address, dtype, *shape, stride=None):
    """The tensor that begins at an address. stride: of the first dimension, in elements."""
    stride = (stride or math.prod(shape[1:]),) + tuple(math.prod(shape[i + 1:]) for i in range(1, len(shape)))
    n_bytes = (1 + sum((n - 1) * s for n, s in zip(shape, stride))) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype=dtype).as_strided(shape, stride)


class Launches(TorchDispatchMode):
    """Notes in `calls` what torch would launch, so that a decode with after_store finds it there."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.__name__:
            self.calls.append(f"torch {function}")
        return function(*args, **(kwargs or {}))


def rounded(x, tier):
    return torch.round(x.float() * 2 ** (6 - tier)) / 2 ** (6 - tier)


class Layer:
    def __init__(self, n_heads, n_kv_heads, dim, n_tiers):
        self.n_heads, self.n_kv_heads, self.dim, self.n_tiers = n_heads, n_kv_heads, dim, n_tiers
        self.cell = (2, n_kv_heads, dim)  # what a token is stored as: K and V
        self.image, self.device_image, self.calls = bytes(256), None, []

    def page_bytes(self, tier, page_tokens):
        return page_tokens * math.prod(self.cell) * 4

    def decode_bytes(self, n_seqs, q_len, max_tokens):
        return 256 * n_seqs * q_len

    def prefill_bytes(self, n_seqs, n_tokens, max_q, max_context):
        return 128 * n_tokens

    def cells(self, pool, slots):
        """Cells up to the last of these slots, where they are stored."""
        return at(pool, torch.float32, int(slots.max()) + 1, *self.cell)

    def store(self, args, stream):
        new = self.encode(args)
        for tier in range(self.n_tiers):
            slots = at(args.slots[tier], torch.int64, args.n_tokens)
            live = slots >= 0
            if live.any():
                self.cells(args.pool[tier], slots)[slots[live]] = rounded(new[live], tier)
        self.calls.append("store")

    def encode(self, args):
        """The cells of these tokens, before they are rounded."""
        shape = (args.n_tokens, self.n_kv_heads, self.dim)
        return torch.stack([at(x, DTYPES[args.type], *shape, stride=stride) for x, stride in (
            (args.k, args.k_token_stride), (args.v, args.v_token_stride))], 1)

    def rows(self, pages, sequence, first, n):
        """Cells of tokens [first, first + n) of a sequence."""
        got = torch.empty(n, *self.cell)
        for index in range(first // 64, -(-(first + n) // 64)):
            page = at(pages.block_table + 4 * (sequence * pages.table_stride + index), torch.int32, 1)
            tier = at(pages.tiers + sequence * pages.tiers_stride + index, torch.uint8, 1)
            positions = torch.arange(max(first, index * 64), min(first + n, (index + 1) * 64))
            slots = int(page) * 64 + positions % 64
            got[positions - first] = self.cells(pages.pool[int(tier)], slots)[slots]
        return got

    def decode(self, args, stream):
        assert self.calls[-1:] == ["store"] or not args.after_store
        self.calls.append(f"decode {args.n_seqs} x {args.q_len}" + (" beside" if args.after_store else ""))
        shape = (args.n_seqs, args.q_len, self.n_heads, self.dim)
        q, out = at(args.q, DTYPES[args.type], *shape), at(args.out, DTYPES[args.type], *shape)
        lse, lens = at(args.lse, torch.float32, *shape[:3]), at(args.seq_lens, torch.int32, args.n_seqs)
        out.zero_(), lse.fill_(-math.inf)
        for r, length in enumerate(lens.tolist()):
            for i in range(args.q_len):
                n = length - args.q_len + i + 1
                if n > 0:
                    out[r, i], lse[r, i] = attention(q[r, i], self.rows(args.pages, r, 0, n), args.scale)

    def prefill(self, args, stream):
        self.calls.append(f"prefill {args.n_tokens} of {args.n_seqs}")
        shape = (args.n_tokens, self.n_heads, self.dim)
        q, out = at(args.q, DTYPES[args.type], *shape), at(args.out, DTYPES[args.type], *shape)
        lse = at(args.lse, torch.float32, *shape[:2])
        starts = at(args.q_starts, torch.int32, args.n_seqs + 1).tolist()
        contexts = at(args.context_lens, torch.int32, args.n_seqs).tolist()
        assert max(contexts) <= args.max_context and starts[-1] <= args.n_tokens
        out.zero_(), lse.fill_(-math.inf)
        for r, n in enumerate(contexts):
            assert starts[r + 1] - starts[r] <= args.max_q
            for i in range(starts[r], starts[r + 1] if n > 0 else 0):
                out[i], lse[i] = attention(q[i], self.rows(args.pages, r, 0, n), args.scale)

    def unpack(self, args, stream):
        self.calls.append(f"unpack {args.n_tokens} of {args.sequence}")
        rows = self.rows(args.pages, args.sequence, args.first, args.n_tokens)
        for side, address in enumerate((args.k, args.v)):
            at(address, DTYPES[args.type], args.n_tokens, self.n_kv_heads, self.dim).copy_(rows[:, side])

    def merge(self, out_a, lse_a, out_b, lse_b, n_rows, dim, kind, stream):
        self.calls.append("merge")
        outs = [at(x, DTYPES[kind], n_rows, dim) for x in (out_a, out_b)]
        sums = [at(x, torch.float32, n_rows) for x in (lse_a, lse_b)]
        total = torch.logaddexp(*sums)
        outs[0].copy_(sum(out.float() * (lse - total).exp().unsqueeze(1) for out, lse in zip(outs, sums)))
        sums[0].copy_(total)


class LatentLayer(Layer):
    """Cells are w and K: a latent is w @ inverse."""
    LATENT, ROTATED = tqkv_cuda.LATENT_CHANNELS, 64

    def __init__(self, n_heads, n_tiers, seed):
        super().__init__(n_heads, 1, self.ROTATED, n_tiers)
        self.cell = (self.LATENT + self.ROTATED,)
        generator = torch.Generator().manual_seed(seed)
        turn, _ = torch.linalg.qr(torch.randn(self.LATENT, self.LATENT, generator=generator, dtype=torch.float64))
        self.plain_of_coded = (turn * (.5 + torch.rand(self.LATENT, generator=generator))).float()

    def inverse(self):
        return self.plain_of_coded.numpy().tobytes()

    def coded(self, latent):
        return torch.linalg.solve(self.plain_of_coded.double(), latent.double(), left=False)

    def encode(self, args):
        k, v = (at(x, DTYPES[args.type], args.n_tokens, dim, stride=stride) for x, dim, stride in (
            (args.k, self.ROTATED, args.k_token_stride), (args.v, self.LATENT, args.v_token_stride)))
        return torch.cat([self.coded(v), k.double()], 1)

    def decode(self, args, stream):
        self.calls.append(f"decode {args.n_seqs} x {args.q_len}")
        shape, kind = (args.n_seqs, args.q_len, self.n_heads), DTYPES[args.type]
        q, out = at(args.q, kind, *shape, *self.cell), at(args.out, kind, *shape, self.LATENT)
        lse, lens = at(args.lse, torch.float32, *shape), at(args.seq_lens, torch.int32, args.n_seqs)
        out.zero_(), lse.fill_(-math.inf)
        for r, length in enumerate(lens.tolist()):
            for i in range(args.q_len):
                n = length - args.q_len + i + 1
                if n > 0:
                    rows = self.rows(args.pages, r, 0, n).unsqueeze(1).unsqueeze(1).expand(-1, 2, -1, -1)
                    got, lse[r, i] = attention(q[r, i], rows, args.scale)
                    out[r, i] = got[:, :self.LATENT]

    def gather(self, args, stream):
        self.calls.append(f"gather {args.n_tokens} of {args.n_seqs}")
        starts = at(args.starts, torch.int32, args.n_seqs + 1).tolist()
        firsts = at(args.firsts, torch.int32, args.n_seqs).tolist()
        out = at(args.out, DTYPES[args.type], args.n_tokens, *self.cell, stride=args.out_stride)
        assert starts[0] == 0 and starts[-1] == args.n_tokens and args.out_stride % 8 == 0
        for r, first in enumerate(firsts):
            if starts[r + 1] > starts[r]:
                out[starts[r]:starts[r + 1]] = self.rows(args.pages, r, first, starts[r + 1] - starts[r])

    def prefill(self, args, stream):
        raise AssertionError("not for latent layers")

    prefill_bytes = unpack = prefill


def attention(q, rows, scale):
    """q: [heads, dim]; rows: [n][2][KV heads][dim]. Output [heads, dim] and log of sums [heads]."""
    k, v = (rows[:, side].double().repeat_interleave(len(q) // rows.shape[2], 1) for side in (0, 1))
    scores = torch.einsum("hd,nhd->hn", q.double(), k) * scale
    lse = scores.logsumexp(1)
    return torch.einsum("hn,nhd->hd", (scores - lse.unsqueeze(1)).exp(), v).to(q.dtype), lse.float()
