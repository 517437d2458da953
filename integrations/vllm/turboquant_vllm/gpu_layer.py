# SPDX-License-Identifier: Apache-2.0
"""The launches of one layer: new tokens into blocks and copies, attention of decodes and of prompts. No vLLM needed.

Everything runs on torch's current stream, waits for nothing and, for decodes, can be captured into a graph.
"""
from dataclasses import dataclass

import torch
import tqkv_cuda

from turboquant_vllm.gpu_pages import PAGE_TOKENS

TYPES = {torch.float32: tqkv_cuda.F32, torch.float16: tqkv_cuda.F16, torch.bfloat16: tqkv_cuda.BF16}
LONG_TOKENS = 1024  # so many new tokens of a prompt see its context faster unpacked than in codes (docs/GPU.md)
SLAB_TOKENS = 8192  # of a context that are unpacked at a time


@dataclass(frozen=True)
class LongPrompt:
    """A row with many new tokens, from token `start` of its Prompts on, and n_context before them."""
    row: int
    start: int
    n_new: int
    n_context: int


@dataclass(frozen=True)
class Prompts:
    """The rows of a batch from first_row on, which are not decoded; their n_tokens new tokens start at first_token.
    starts [rows + 1]: of the tokens of each, counted from there; contexts [rows]: how many tokens come before, 0 of those
    in `long`; int32, on the device. max_new, max_context: of a row, of those that contexts has."""
    first_row: int
    first_token: int
    n_tokens: int
    starts: torch.Tensor
    contexts: torch.Tensor
    max_new: int
    max_context: int
    long: tuple = ()

    @classmethod
    def of(cls, first_row, first_token, starts, contexts, on_device):
        """starts, contexts: of all rows, lists; on_device: the same as tensors."""
        n_new = [end - start for start, end in zip(starts, starts[1:])]
        rows = range(len(n_new))
        long = tuple(LongPrompt(first_row + r, starts[r], n_new[r], contexts[r])
                     for r in rows if n_new[r] >= LONG_TOKENS and contexts[r] > 0)
        device_starts, device_contexts = on_device
        if long:
            device_contexts = device_contexts * (device_starts.diff() < LONG_TOKENS)
        short = [contexts[r] for r in rows if n_new[r] < LONG_TOKENS]
        return cls(first_row, first_token, starts[-1], device_starts, device_contexts, max(n_new), max(short, default=0),
                   long)


@dataclass(frozen=True)
class Batch:
    """What the host knows of a step. The first n_decodes rows have q_len new tokens each, or, with `rows` and `places`,
    up to q_len: rows [n_decodes * q_len] are the tokens that the queries are taken from, places [tokens] where the
    outputs of the tokens are among these."""
    n_tokens: int
    n_decodes: int = 0
    q_len: int = 1
    max_tokens: int = 1  # no decode reads more
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    prompts: Prompts | None = None


@dataclass(frozen=True)
class Decode:
    """A decode that is ready to run: reads q, writes `to` and sums, whose rows `places` go to out and lse, if there are any."""
    args: tqkv_cuda.DecodeArgs
    q: torch.Tensor
    to: torch.Tensor
    sums: torch.Tensor
    places: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor


def aligned(n_bytes, device):
    """Zeros from an address that is a multiple of 256 on."""
    memory = torch.zeros(n_bytes + 256, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % 256:][:n_bytes]


def workspace_bytes(layer, max_seqs, q_lens, max_tokens):
    """That decodes of all sizes need; fewer sequences can need more, as their tokens are split among more blocks."""
    return max(layer.decode_bytes(n, q_len, max_tokens) for n in range(1, max_seqs + 1) for q_len in q_lens)


def prefill_bytes(layer, max_tokens, max_len):
    """That a prompt needs which is read in chunks of any length; the tokens of several are split into fewer parts."""
    lengths = [2**i for i in range(max_tokens.bit_length())]
    return max(layer.prefill_bytes(1, n, n, max_len) for n in lengths)


def slab_bytes(n_channels):
    """K and V of SLAB_TOKENS tokens, each with so many channels."""
    return 2 * 2 * SLAB_TOKENS * n_channels


class Workspace:
    """Memory of a device that layers share, as they run one after another: of decodes, of prompts, of slabs of a
    context."""

    def __init__(self, decode, prefill, slab, device):
        self.decode, self.prefill, self.slab = (aligned(n_bytes, device) for n_bytes in (decode, prefill, slab))


class GpuLayer:
    """cuda: the tqkv_cuda.Layer. n_copies: pages that each younger tier has copies of."""

    def __init__(self, cuda, n_copies, workspace, device):
        self.cuda, self.workspace = cuda, workspace
        self.image = aligned(len(cuda.image), device)
        self.image.copy_(torch.frombuffer(bytearray(cuda.image), dtype=torch.uint8))
        cuda.device_image = self.image.data_ptr()
        self.copies = [aligned(n_bytes, device) for n_bytes in self.copy_bytes(cuda, n_copies)]

    @staticmethod
    def copy_bytes(cuda, n_copies):
        """By tier."""
        return [max(n, 1) * cuda.page_bytes(tier, PAGE_TOKENS) for tier, n in enumerate(n_copies)]

    @staticmethod
    def bytes_beside(cuda, n_copies):
        """Of image and copies, with what aligns them."""
        sizes = [len(cuda.image), *GpuLayer.copy_bytes(cuda, n_copies)]
        return sum(sizes) + 256 * len(sizes)

    def pools(self, blocks):
        return [*(pool.data_ptr() for pool in self.copies), blocks]

    def pages(self, blocks, pages, first_row=0):
        return tqkv_cuda.Pages(self.pools(blocks), pages.block_table[first_row:].data_ptr(), PAGE_TOKENS,
                               pages.block_table.stride(0), pages.tiers[first_row:].data_ptr(), pages.tiers.stride(0))

    def store(self, blocks, pages, key, value):
        """key, value: [tokens, KV heads, dim]. blocks: address of the engine's first page. One launch for all tiers."""
        slots, row = pages.slots.data_ptr(), pages.slots.stride(0) * pages.slots.element_size()
        pools = self.pools(blocks)
        args = tqkv_cuda.StoreArgs(key.data_ptr(), value.data_ptr(), key.stride(0), value.stride(0),
                                   pages.positions.data_ptr(), [slots + tier * row for tier in range(len(pools))], pools,
                                   len(key), PAGE_TOKENS, TYPES[key.dtype])
        self.cuda.store(args, stream_of(key))

    def store_and_attend(self, blocks, pages, batch, scale, query, key, value, out, beside=True):
        """query, out: [tokens, heads, dim], key and value: [tokens, KV heads, dim]; out is contiguous and written. Returns
        the log of the sums of exp: [tokens, heads] f32, natural. What a decode needs is made before the store, so that
        nothing comes between both and work on its queries runs beside the store; not so if `beside` is False."""
        lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        decode = self.prepare_decode(blocks, pages, batch, scale, query, out, lse) if batch.n_decodes > 0 else None
        self.store(blocks, pages, key, value)
        if decode is not None:
            decode.args.after_store = int(beside)
            self.run_decode(decode)
        if batch.prompts is not None:
            tokens = slice(batch.prompts.first_token, batch.prompts.first_token + batch.prompts.n_tokens)
            self.read_prompts(blocks, pages, batch.prompts, scale, (query[tokens], key[tokens], value[tokens]),
                              out[tokens], lse[tokens])
        return lse

    def decode(self, blocks, pages, batch, scale, query, out, lse):
        """Of the tokens of the decodes, which come first. query, out: [tokens, heads, dim], lse: [tokens, heads] f32.
        In a latent layer the kernels' own space is meant: turboquant/cuda.h, and gpu_mla."""
        self.run_decode(self.prepare_decode(blocks, pages, batch, scale, query, out, lse))

    def prepare_decode(self, blocks, pages, batch, scale, query, out, lse):
        n = batch.n_decodes * batch.q_len
        if batch.rows is None:
            q, to, sums = query[:n].contiguous(), out[:n], lse[:n]
        else:
            q, to = query[batch.rows], out.new_empty(n, *out.shape[1:])
            sums = lse.new_empty(n, *lse.shape[1:])
        args = tqkv_cuda.DecodeArgs(self.pages(blocks, pages), q.data_ptr(), to.data_ptr(), sums.data_ptr(),
                                    pages.seq_lens.data_ptr(), self.workspace.decode.data_ptr(), batch.n_decodes,
                                    batch.q_len, batch.max_tokens, scale, TYPES[q.dtype])
        return Decode(args, q, to, sums, batch.places, out, lse)

    def run_decode(self, decode):
        self.cuda.decode(decode.args, stream_of(decode.q))
        if decode.places is not None:
            decode.out[:len(decode.places)] = decode.to[decode.places]
            decode.lse[:len(decode.places)] = decode.sums[decode.places]

    def gather(self, blocks, pages, first_row, starts, firsts, n_tokens, out):
        """Latents and rotated keys of rows first_row on into the first n_tokens rows of out: of row r those from
        position firsts[r] on to starts[r] .. starts[r + 1] - 1; both int32 on the device."""
        self.cuda.gather(tqkv_cuda.GatherArgs(self.pages(blocks, pages, first_row), out.data_ptr(), out.stride(0),
                                              starts.data_ptr(), firsts.data_ptr(), len(starts) - 1, n_tokens,
                                              TYPES[out.dtype]), stream_of(out))

    def read_prompts(self, blocks, pages, prompts, scale, new, out, lse):
        """New tokens see each other as they came, and those before them as they are stored."""
        query = new[0].contiguous()
        whole, sums = flash_chunks(query, *new[1:], scale, prompts.starts, prompts.max_new)
        if prompts.max_context == 0:
            out.copy_(whole)
            lse.copy_(sums)
        else:
            self.read_short(blocks, pages, prompts, scale, query, (whole, sums), (out, lse))
        for prompt in prompts.long:
            tokens = slice(prompt.start, prompt.start + prompt.n_new)
            self.read_long(blocks, pages, prompt, scale, (query[tokens], new[1]), out[tokens], lse[tokens])

    def read_short(self, blocks, pages, prompts, scale, query, among, to):
        """Contexts that are read as codes, of all rows at once. among: output and log of sums of new tokens among
        themselves; to: of both."""
        (whole, sums), (out, lse) = among, to
        stream, kind = stream_of(query), TYPES[query.dtype]
        self.cuda.prefill(tqkv_cuda.PrefillArgs(
            self.pages(blocks, pages, prompts.first_row), query.data_ptr(), out.data_ptr(), lse.data_ptr(),
            prompts.starts.data_ptr(), prompts.contexts.data_ptr(), self.workspace.prefill.data_ptr(),
            len(self.workspace.prefill), len(prompts.contexts), prompts.n_tokens, prompts.max_new, prompts.max_context, 0,
            scale, kind), stream)
        self.cuda.merge(out.data_ptr(), lse.data_ptr(), whole.data_ptr(), sums.data_ptr(), sums.numel(), out.shape[-1],
                        kind, stream)

    def read_long(self, blocks, pages, prompt, scale, new, out, lse):
        """Adds the context of a prompt to its out and lse, a slab at a time."""
        query, key = new
        stream, kind = stream_of(query), TYPES[query.dtype]
        for first in range(0, prompt.n_context, SLAB_TOKENS):
            n = min(SLAB_TOKENS, prompt.n_context - first)
            k, v = self.workspace.slab.view(key.dtype)[:2 * n * key[0].numel()].view(2, n, *key.shape[1:])
            self.cuda.unpack(tqkv_cuda.UnpackArgs(self.pages(blocks, pages), k.data_ptr(), v.data_ptr(), prompt.row,
                                                  first, n, kind), stream)
            part, sums = flash(query, k, v, scale, causal=False)
            self.cuda.merge(out.data_ptr(), lse.data_ptr(), part.data_ptr(), sums.data_ptr(), sums.numel(), out.shape[-1],
                            kind, stream)


def stream_of(tensor):
    """Handle of the current stream of its device; 0 on the CPU."""
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else 0


def flash(query, key, value, scale, causal):
    """Output [tokens, heads, dim] and log of sums [tokens, heads], both contiguous."""
    operator = (torch.ops.aten._scaled_dot_product_flash_attention if query.is_cuda
                else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    out, lse, *_ = operator(*(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)), 0.0, causal, scale=scale)
    return out[0].transpose(0, 1).contiguous(), lse[0].t().contiguous()


def flash_chunks(query, key, value, scale, starts, longest):
    """Causal attention of chunks among themselves: chunk i has tokens starts[i] .. starts[i + 1] - 1, at most `longest`.
    Output and log of sums as of flash."""
    if query.is_cuda:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, starts, starts, longest, longest, 0.0,
                                                               True, False, scale=scale)
        return out, lse.t().contiguous()
    chunks = zip(starts.tolist(), starts.tolist()[1:])
    parts = [flash(query[first:end], key[first:end], value[first:end], scale, causal=True)
             for first, end in chunks if end > first]
    return tuple(torch.cat(part) for part in zip(*parts))
