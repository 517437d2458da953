#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A little serving engine on a CUDA device: what the vLLM plugin does in a step, without vLLM.

    serving_loop.py --library build/cuda/lib/libturboquant-cuda.so [--time]

Requests come and go, share a prefix, take over each other's blocks, are read in chunks, decoded one by one under a
captured graph, verified four at a time and with unlike numbers of drafts. Every output is compared with attention in
float64 over rows decoded from bytes that were stored afresh, each token in the tier where the rule of ages puts it;
what a graph gives is compared with eager. One line for each check; exit code 1 if one failed. --time: a step of 64 x 4096
tokens.
"""
import argparse
import pathlib
import statistics
import sys
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("integrations/cuda", "integrations/vllm", "tests/oracle")]
import plan_writer  # noqa: E402
import tqkv_cuda  # noqa: E402
from turboquant_vllm import gpu_layer  # noqa: E402
from turboquant_vllm.gpu_layer import Batch, GpuLayer, Prompts, Workspace, prefill_bytes, workspace_bytes  # noqa: E402
from turboquant_vllm.gpu_pages import PAGE_TOKENS, Pages, tiers_of  # noqa: E402

DTYPE = torch.bfloat16
TIER_TOKENS, N_SINKS = (32, 224, 768), 4
WIDTHS = ([8, 6, 4, (4, 4, 3, 3, 3, 2, 2, 1)], [8, 6, 4, 3])  # of tiers, in two kinds of layers
ERROR_MAX = 1e-2  # beside float64; a page in a wrong tier shows ten times as much
gpu_layer.LONG_TOKENS = 400  # chunks here are shorter than those that a context is unpacked for
failures = []


def report(name, good, details=""):
    print(f"{'ok  ' if good else 'FAIL'} {name}{': ' + details if details else ''}", flush=True)
    if not good:
        failures.append(name)


class Shape:
    def __init__(self, n_heads, n_kv_heads, dim, n_layers):
        self.n_heads, self.n_kv_heads, self.dim, self.n_layers = n_heads, n_kv_heads, dim, n_layers


def plan_bytes(shape):
    """Random rotations as transforms."""
    rng, layers = np.random.default_rng(1), []
    units = shape.dim // 16
    inv_freq = (1e4 ** -(np.arange(shape.dim // 2) * 2.0 / shape.dim)).astype(np.float32)
    for index in range(shape.n_layers):
        layouts = [[widths] * units if isinstance(widths, int) else [widths[i * 8 // units] for i in range(units)]
                   for widths in WIDTHS[index % 2]]
        sides = [[{"layouts": layouts, "mean": (.1 * rng.standard_normal(shape.dim)).astype(np.float32),
                   "weight": np.ones(units, np.float32),
                   "matrix": np.linalg.qr(rng.standard_normal((shape.dim, shape.dim)))[0]}
                  for _ in range(shape.n_kv_heads)] for _ in range(2)]
        layers.append({"n_heads": shape.n_heads, "k_dim": shape.dim, "v_dim": shape.dim, "window": 0,
                       "rope": (1, shape.dim, inv_freq), "tier_tokens": [*TIER_TOKENS, 0], "sides": sides})
    return plan_writer.write_plan({"names": ["serving", "", "test"], "n_tiers": 4, "n_sinks": N_SINKS, "context": 4096,
                                   "frame_tokens": 1024, "bits_total": 0.0, "layers": layers})


class Machine:
    """Layers with blocks of the engine, and the tables that they share."""

    def __init__(self, library, plan, shape, device, n_pages, max_seqs, max_len, max_tokens, n_sequences):
        self.shape, self.device, self.max_len = shape, device, max_len
        tiers = tiers_of(TIER_TOKENS, N_SINKS, n_sequences, n_pages)
        self.pages = Pages(tiers, n_pages, max_seqs, -(-max_len // PAGE_TOKENS), max_tokens, device, library.page_tables)
        cuda = [tqkv_cuda.Layer(library, plan, index) for index in range(shape.n_layers)]
        self.workspace = Workspace(max(workspace_bytes(layer, max_seqs, (1, 4), max_len) for layer in cuda),
                                   max(prefill_bytes(layer, max_tokens, max_len) for layer in cuda),
                                   gpu_layer.slab_bytes(shape.n_kv_heads * shape.dim), device)
        self.layers = [GpuLayer(layer, tiers.n_copies, self.workspace, device) for layer in cuda]
        self.blocks = [torch.zeros(n_pages * layer.page_bytes(3, PAGE_TOKENS), dtype=torch.uint8, device=device)
                       for layer in cuda]
        self.scale = shape.dim ** -0.5

    def run(self, batch, q, k, v, out, beside=True):
        """q, out: [layers, tokens, heads, dim]. beside: as in GpuLayer.store_and_attend."""
        n = batch.n_tokens
        sums = []
        for layer, blocks, *x in zip(self.layers, self.blocks, q, k, v, out):
            x = [part[:n] for part in x]
            sums.append(layer.store_and_attend(blocks.data_ptr(), self.pages, batch, self.scale, *x, beside=beside))
        return torch.stack(sums)


class Request:
    """rows: K and V of all its tokens, [layers, tokens, 2, KV heads, dim]."""

    def __init__(self, rows, n_prompt):
        self.rows, self.n_prompt, self.n_done, self.blocks, self.shared = rows, n_prompt, 0, [], 0


class Reference:
    """Rows of a request as each tier decodes them: stored afresh one after another, and unpacked."""

    def __init__(self, machine):
        self.machine = machine

    def rows(self, layer_index, request, n, tiers):
        """[n, 2, KV heads, dim] f64, each page from its tier."""
        got = None
        for tier in sorted(set(tiers)):
            decoded = self.decode(layer_index, request.rows[layer_index, :n], tier)
            picks = torch.tensor([t == tier for t in tiers], device=decoded.device).repeat_interleave(PAGE_TOKENS)[:n]
            got = decoded if got is None else torch.where(picks.view(-1, 1, 1, 1), decoded, got)
        return got

    def decode(self, index, rows, tier):
        layer, device, n = self.machine.layers[index].cuda, rows.device, len(rows)
        n_pages = -(-n // PAGE_TOKENS)
        pool = torch.zeros(n_pages * layer.page_bytes(tier, PAGE_TOKENS), dtype=torch.uint8, device=device)
        positions = torch.arange(n, dtype=torch.int32, device=device)
        table = torch.arange(n_pages, dtype=torch.int32, device=device)
        tiers = torch.full((n_pages,), tier, dtype=torch.uint8, device=device)
        k, v = (rows[:, side].contiguous() for side in (0, 1))
        stride, slots = k.stride(0), positions.long()
        others = [None] * tier
        args = tqkv_cuda.StoreArgs(k.data_ptr(), v.data_ptr(), stride, stride, positions.data_ptr(),
                                   [*others, slots.data_ptr()], [*others, pool.data_ptr()], n, PAGE_TOKENS,
                                   tqkv_cuda.BF16)
        layer.store(args, stream())
        out = torch.empty(2, n, *k.shape[1:], device=device)
        pages = tqkv_cuda.Pages([pool.data_ptr()] * 4, table.data_ptr(), PAGE_TOKENS, n_pages, tiers.data_ptr(),
                                n_pages)
        args = tqkv_cuda.UnpackArgs(pages, out[0].data_ptr(), out[1].data_ptr(), 0, 0, n, tqkv_cuda.F32)
        layer.unpack(args, stream())
        return out.transpose(0, 1).double().clone()


def stream():
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0


def attention(q, rows, scale):
    """q: [tokens, heads, dim], of the last tokens of rows. Output and log of sums in f64."""
    group = q.shape[1] // rows.shape[2]
    k, v = (rows[:, side].repeat_interleave(group, 1) for side in (0, 1))
    scores = torch.einsum("qhd,nhd->hqn", q.double(), k) * scale
    hidden = torch.ones(len(q), len(rows), dtype=torch.bool, device=q.device).triu_(len(rows) - len(q) + 1)
    scores.masked_fill_(hidden, -torch.inf)
    return torch.einsum("hqn,nhd->qhd", scores.softmax(2), v), scores.logsumexp(2).t()


def tier_by_age(index, query_page):
    """The rule, as docs say it, in pages."""
    reach = [-(-sum(TIER_TOKENS[:tier + 1]) // PAGE_TOKENS) for tier in range(3)]
    if index * PAGE_TOKENS < N_SINKS:
        return 0
    return next((tier for tier in range(3) if query_page - index <= reach[tier]), 3)


class Server:
    """Rows of a step, checked. graphs: {(sequences, q_len): (graph, batch, buffers)}."""

    def __init__(self, machine, generator, max_seqs, n_blocks):
        self.machine, self.generator, self.max_seqs = machine, generator, max_seqs
        self.reference, self.free, self.graphs = Reference(machine), list(range(n_blocks)), {}
        self.worst = self.worst_lse = 0.0
        self.n_steps = self.n_tiers_checked = self.n_replays = 0
        self.by_rule = self.replays_agree = True

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, device=self.machine.device).to(DTYPE)

    def request(self, n_prompt, n_all, prefix=None, n_shared=0):
        shape = self.machine.shape
        request = Request(self.random(shape.n_layers, n_all, 2, shape.n_kv_heads, shape.dim), n_prompt)
        if prefix is not None:
            request.rows[:, :n_shared] = prefix.rows[:, :n_shared]
            request.blocks, request.n_done, request.shared = prefix.blocks[:n_shared // PAGE_TOKENS], n_shared, n_shared
        return request

    def end(self, request, keep=()):
        self.free += [block for block in request.blocks if block not in keep]
        request.blocks = []

    def inputs(self, work):
        """work: (request, new tokens, how many of them are junk at the end)."""
        kv = []
        for request, n, junk in work:
            rows = request.rows[:, request.n_done:request.n_done + n].clone()
            rows[:, n - junk:] = self.random(*rows[:, n - junk:].shape)
            kv.append(rows)
        kv = torch.cat(kv, 1)
        q = self.random(kv.shape[0], kv.shape[1], self.machine.shape.n_heads, self.machine.shape.dim) * 2
        return q, kv[:, :, 0], kv[:, :, 1]

    def tables(self, work, n_rows, n_tokens):
        """The step of gpu_pages, rows and tokens padded."""
        device, width = self.machine.device, self.machine.pages.block_table.shape[1]
        starts, lens, slots, table = [0], [], [], torch.zeros(n_rows, width, dtype=torch.int32)
        for r, (request, n, _) in enumerate(work):
            while len(request.blocks) * PAGE_TOKENS < request.n_done + n:
                request.blocks.append(self.free.pop(0))
            table[r, :len(request.blocks)] = torch.tensor(request.blocks)
            slots += [request.blocks[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS
                      for p in range(request.n_done, request.n_done + n)]
            starts.append(len(slots))
            lens.append(request.n_done + n)
        starts += [starts[-1]] * (n_rows - len(work))
        slots += [-1] * (n_tokens - len(slots))
        self.machine.pages.step(torch.tensor(starts, dtype=torch.int32, device=device),
                                torch.tensor(lens + [0] * (n_rows - len(work)), dtype=torch.int32, device=device),
                                table.to(device), torch.tensor(slots, dtype=torch.int64, device=device), max(lens))
        return starts

    def batch(self, work, starts, q_max):
        """As gpu_backend.batch_of makes it: rows of up to q_max new tokens are decoded; they come first."""
        n_new, device = [n for _, n, _ in work], self.machine.device
        n_decodes = sum(n <= q_max for n in n_new)
        q_len = max(n_new[:n_decodes], default=1)
        rows = places = None
        if any(n != q_len for n in n_new[:n_decodes]):
            ends = starts[1:n_decodes + 1]
            rows = torch.tensor([max(0, end - q_len + i) for end in ends for i in range(q_len)], device=device)
            places = torch.tensor([(r + 1) * q_len - ends[r] + token for r in range(n_decodes)
                                   for token in range(starts[r], ends[r])], device=device)
        prompts, first = None, starts[n_decodes]
        if n_decodes < len(work):
            sizes = ([start - first for start in starts[n_decodes:len(work) + 1]],
                     [request.n_done for request, _, _ in work[n_decodes:]])
            on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in sizes]
            prompts = Prompts.of(n_decodes, first, *sizes, on_device)
        most = max(request.n_done + n for request, n, _ in work)
        return Batch(starts[len(work)], n_decodes, q_len, most, rows, places, prompts)

    def step(self, work, q_max=1, graph=False, check=True):
        """work: (request, new tokens, junk); decodes first. The junk is rejected afterwards."""
        work = sorted(work, key=lambda entry: entry[1] > q_max)
        q, k, v = self.inputs(work)
        out = torch.full_like(q, torch.nan)
        n_rows = self.max_seqs if graph else len(work)
        starts = self.tables(work, n_rows, n_rows * work[0][1] if graph else q.shape[1])
        sums = self.machine.run(self.batch(work, starts, q_max), q, k, v, out)
        if graph:
            self.replay(work, q, k, v, out, sums)
        if check:
            self.compare(work, starts, (q, k, v), out, sums, q_max)
        for request, n, junk in work:
            request.n_done += n - junk
        self.n_steps += 1

    def capture(self, q_len):
        """A graph for max_seqs sequences of any length with q_len new tokens each."""
        shape, n = self.machine.shape, self.max_seqs * q_len
        buffers = [torch.zeros(shape.n_layers, n, heads, shape.dim, dtype=DTYPE, device=self.machine.device)
                   for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads, shape.n_heads)]
        batch = Batch(n, self.max_seqs, q_len, self.machine.max_len)
        self.machine.pages.slots.fill_(-1)
        self.machine.pages.seq_lens.zero_()
        self.machine.run(batch, *buffers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums = self.machine.run(batch, *buffers)
        self.graphs[q_len] = graph, buffers, sums

    def replay(self, work, q, k, v, out, sums):
        """The same step once more, by the graph: twice alike, and near to eager, which may cut sequences otherwise as it
        is launched for their lengths."""
        graph, buffers, graph_sums = self.graphs[work[0][1]]
        for buffer, x in zip(buffers, (q, k, v)):
            buffer[:, :x.shape[1]] = x
        graph.replay()
        first = buffers[3].clone()
        graph.replay()
        n = q.shape[1]
        same = torch.equal(buffers[3], first) and not buffers[3].isnan().any()
        near = (buffers[3][:, :n].float() - out.float()).norm() <= 2e-3 * out.float().norm()
        near_sums = (graph_sums[:, :n] - sums).abs().max() < 1e-3
        self.replays_agree = self.replays_agree and bool(same and near and near_sums)
        self.n_replays += 1

    def compare(self, work, starts, new, out, sums, q_max):
        q, k, v = new
        tiers = self.machine.pages.tiers.cpu()
        for r, (request, n, _) in enumerate(work):
            tokens, before = slice(starts[r], starts[r] + n), request.n_done
            here = tiers[r, :-(-(before + n) // PAGE_TOKENS)].tolist()
            if request.shared == 0:
                rule = [tier_by_age(index, before // PAGE_TOKENS) for index in range(len(here))]
                n_read = len(here) if n <= q_max else -(-before // PAGE_TOKENS)
                self.by_rule = self.by_rule and here[:n_read] == rule[:n_read]
                self.n_tiers_checked += n_read
            for layer in range(self.machine.shape.n_layers):
                raw = torch.stack([k[layer, tokens], v[layer, tokens]], 1)
                if n <= q_max:
                    saved = request.rows[layer, before:before + n].clone()
                    request.rows[layer, before:before + n] = raw
                    rows = self.reference.rows(layer, request, before + n, here)
                    request.rows[layer, before:before + n] = saved
                else:
                    rows = raw.double()
                    if before:
                        old = self.reference.rows(layer, request, before, here[:-(-before // PAGE_TOKENS)])
                        if n >= gpu_layer.LONG_TOKENS:
                            old = old.to(DTYPE)  # as they are unpacked
                        rows = torch.cat([old.double(), rows])
                want, want_sums = attention(q[layer, tokens], rows, self.machine.scale)
                wrong = (out[layer, tokens].double() - want).norm(dim=-1) / want.norm(dim=-1)
                wrong_sums = (sums[layer, tokens] - want_sums).abs()
                self.worst = max(self.worst, float(wrong.nan_to_num(9.0).max()))
                self.worst_lse = max(self.worst_lse, float(wrong_sums.nan_to_num(9.0).max()))


def check_serving(machine, generator, with_graphs, n_steps):
    """About n_steps of decode between the events."""
    server = Server(machine, generator, machine.pages.seq_lens.shape[0], machine.pages.n_pages)
    server.free.remove(0)  # the engine's null block

    def done(name):
        report(name, server.worst < ERROR_MAX and server.worst_lse < 2e-3 and server.by_rule and server.replays_agree,
               f"{server.n_steps} steps, error {server.worst:.1e}, log of sums {server.worst_lse:.1e}, "
               f"{server.n_tiers_checked} tiers by rule, {server.n_replays} replays")
        server.worst = server.worst_lse = 0.0
        server.n_steps = server.n_tiers_checked = server.n_replays = 0

    if with_graphs:
        for q_len in (1, 4):
            server.capture(q_len)
    a, b, c = server.request(700, 2000), server.request(40, 500), server.request(1500, 2000)
    server.step([(a, 256, 0), (b, 40, 0), (c, 512, 0)])
    server.step([(b, 1, 0), (a, 256, 0), (c, 512, 0)])
    server.step([(b, 1, 0), (a, 188, 0), (c, 476, 0)])
    done("prompts in chunks beside a decode")
    for i in range(n_steps):
        server.step([(a, 1, 0), (b, 1, 0), (c, 1, 0)], graph=with_graphs, check=i % 8 == 0)
    done("decodes across page borders" + (", graph as eager" if with_graphs else ""))
    for i in range(n_steps // 2):
        junk = torch.randint(0, 4, (3,), generator=torch.Generator().manual_seed(i)).tolist()
        server.step([(x, 4, j) for x, j in zip((a, b, c), junk)], q_max=4, graph=with_graphs, check=i % 4 == 0)
    done("four tokens verified, rejected drafts" + (", graph as eager" if with_graphs else ""))
    for i in range(12):
        server.step([(a, 1 + i % 4, i % 2 and i % 4), (b, 4, 3), (c, 2, 1)], q_max=4)
    done("unlike numbers of drafts")
    d = server.request(600, 900, prefix=a, n_shared=512)
    server.step([(a, 1, 0), (b, 1, 0), (c, 1, 0), (d, 88, 0)])
    for i in range(20):
        server.step([(x, 1, 0) for x in (a, b, c, d)], graph=with_graphs, check=i % 8 == 0)
    done("a shared prefix")
    server.end(a, keep=d.blocks)
    server.end(b)
    server.free.sort()  # what was given back comes first
    e = server.request(900, 1300)
    server.step([(c, 1, 0), (d, 1, 0), (e, 500, 0)])
    server.step([(c, 1, 0), (d, 1, 0), (e, 400, 0)])
    for i in range(40):
        server.step([(x, 1, 0) for x in (c, d, e)], graph=with_graphs, check=i % 8 == 0)
    done("blocks of requests that ended")
    again = Request(e.rows, e.n_done)
    server.end(e)
    server.step([(c, 1, 0), (again, again.n_prompt, 0)])
    server.step([(c, 1, 0), (again, 1, 0)], graph=with_graphs)
    done("a request that was preempted")


def check_few_copies(machine, generator):
    """More sequences than copies: tiers are older, bytes are right."""
    server = Server(machine, generator, machine.pages.seq_lens.shape[0], machine.pages.n_pages)
    requests = [server.request(n, 1200) for n in (100, 300, 500, 700)]
    server.step([(x, x.n_prompt, 0) for x in requests])
    for i in range(70):
        server.step([(x, 1, 0) for x in requests], check=i % 10 == 0)
    report("more sequences than copies", server.worst < ERROR_MAX and not server.by_rule, f"error {server.worst:.1e}")


def check_workspace(library, device):
    """One workspace for calls of all sizes."""
    shape = Shape(32, 8, 128, 1)
    plan = library.read_plan(plan_bytes(shape))
    layer = tqkv_cuda.Layer(library, plan)
    n_pages, n_seqs = 64, 24
    machine_image = torch.frombuffer(bytearray(layer.image), dtype=torch.uint8).to(device)
    layer.device_image = machine_image.data_ptr()
    pool = torch.randint(112, 132, (n_pages * layer.page_bytes(3, 64),), dtype=torch.uint8, device=device)
    table = torch.arange(n_pages, dtype=torch.int32, device=device).repeat(n_seqs, 1)
    q = torch.randn(n_seqs, 32, 128, device=device).to(DTYPE)
    workspace = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    lens, outs = torch.full((n_seqs,), 4096, dtype=torch.int32, device=device), []
    for n in (n_seqs, 1, n_seqs, 3, n_seqs):
        out = torch.full_like(q[:n], torch.nan)
        pages = tqkv_cuda.Pages([0, 0, 0, pool.data_ptr()], table.data_ptr(), 64, n_pages)
        args = tqkv_cuda.DecodeArgs(pages, q.data_ptr(), out.data_ptr(), None, lens.data_ptr(), workspace.data_ptr(),
                                    n, 1, 4096, .09, tqkv_cuda.BF16)
        layer.decode(args, stream())
        outs.append(out)
    report("one workspace for decodes of all sizes", all(torch.equal(out, outs[0]) for out in outs[2::2]))


def timed(call, n):
    """Microseconds of the device for one call, and of the host until it has launched all: medians."""
    device, host = [], []
    for _ in range(n):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        begin = time.perf_counter()
        call()
        host.append((time.perf_counter() - begin) * 1e6)
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end) * 1e3)
    return statistics.median(device), statistics.median(host)


def graph_of(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_step(library, device, generator):
    """64 sequences of 4096 tokens, four layers of 32/8/128 after each other, so that nothing is in L2."""
    n_seqs, tokens, shape = 64, 4096, Shape(32, 8, 128, 4)
    plan = library.read_plan(plan_bytes(shape))
    width = tokens // PAGE_TOKENS
    machine = Machine(library, plan, shape, device, n_seqs * width + 1, n_seqs, 32768,
                      8192, (n_seqs, n_seqs, n_seqs))
    pages = machine.pages
    table = (torch.randperm(n_seqs * width, device=device).to(torch.int32) + 1).view(n_seqs, width)
    slots = lambda first, n: (table[:, first // 64].long() * 64 + first % 64)[:, None] + torch.arange(n, device=device)
    starts = torch.arange(n_seqs + 1, dtype=torch.int32, device=device)
    kv = [torch.randn(2, n_seqs * 64, 8, 128, generator=generator, device=device).to(DTYPE)
          for _ in range(shape.n_layers)]
    for first in range(0, tokens - 64, 64):
        lens = torch.full((n_seqs,), first + 64, dtype=torch.int32, device=device)
        pages.step(starts * 64, lens, table, slots(first, 64).flatten(), first + 64)
        for layer, blocks, (k, v) in zip(machine.layers, machine.blocks, kv):
            layer.store(blocks.data_ptr(), pages, k, v)
    q = torch.randn(shape.n_layers, n_seqs, 32, 128, generator=generator, device=device).to(DTYPE)
    k, v = (torch.randn(shape.n_layers, n_seqs, 8, 128, generator=generator, device=device).to(DTYPE) for _ in range(2))
    out = torch.empty_like(q)
    lens = torch.full((n_seqs,), tokens, dtype=torch.int32, device=device)
    last = slots(tokens - 64, 64)[:, -1].contiguous()
    build = lambda: pages.step(starts, lens, table, last, tokens)
    build()
    print("tiers of a sequence:", pages.tiers[0, :width].bincount().tolist(), flush=True)
    print("tables of a step (once for all layers), us of device and host: {:.0f} {:.0f}".format(*timed(build, 60)))
    batch = Batch(n_seqs, n_seqs, 1, tokens)
    graphs = [graph_of(lambda beside=beside: machine.run(batch, q, k, v, out, beside)) for beside in (True, False)]
    whole, apart = (timed(graph.replay, 60)[0] / shape.n_layers for graph in graphs)

    def stores():
        for layer, blocks, x, y in zip(machine.layers, machine.blocks, k, v):
            layer.store(blocks.data_ptr(), pages, x, y)

    def decodes(batch):
        for layer, blocks, x, to in zip(machine.layers, machine.blocks, q, out):
            layer.decode(blocks.data_ptr(), pages, batch, machine.scale, x, to, torch.empty(n_seqs, 32, device=device))
    print(f"64 x 4096, us a layer: store and attend {whole:.1f}, one after the other {apart:.1f}", flush=True)
    us = timed(graph_of(stores).replay, 60)[0] / shape.n_layers
    print(f"    store into four tiers {us:.1f}", flush=True)
    bare = timed(graph_of(lambda: decodes(batch)).replay, 60)[0] / shape.n_layers
    print(f"    decode {bare:.1f}", flush=True)
    for most in (8192, 32768):
        graph = graph_of(lambda: decodes(Batch(n_seqs, n_seqs, 1, most)))
        print(f"    decode, launched for {most} tokens {timed(graph.replay, 60)[0] / shape.n_layers:.1f}", flush=True)
    order = torch.randperm(width, device=device)
    for x in (pages.tiers, pages.block_table):
        x[:, :width] = x[:, order]
    mixed = timed(graph_of(lambda: decodes(batch)).replay, 60)[0] / shape.n_layers
    print(f"    decode, the same pages in another order {mixed:.1f}", flush=True)
    pages.tiers.fill_(3)
    pages.block_table[:, :width] = table
    old = timed(graph_of(lambda: decodes(batch)).replay, 60)[0] / shape.n_layers
    print(f"    decode of blocks alone, no copies {old:.1f}", flush=True)
    print("eager, us of host for a layer:",
          f"{timed(lambda: machine.run(batch, q, k, v, out), 20)[1] / shape.n_layers:.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--time", action="store_true", help="time a step, after the checks")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    device, library = torch.device("cuda"), tqkv_cuda.Library(options.library)
    print(f"{torch.cuda.get_device_name()}, seed {options.seed}", flush=True)
    generator = torch.Generator(device).manual_seed(options.seed)
    check_workspace(library, device)
    for shape in (Shape(16, 4, 128, 2), Shape(14, 2, 64, 2), Shape(8, 4, 256, 2)):
        plan = library.read_plan(plan_bytes(shape))
        print(f"{shape.n_heads}/{shape.n_kv_heads}/{shape.dim}", flush=True)
        check_serving(Machine(library, plan, shape, device, 120, 6, 4096, 1600, (6, 6, 6)), generator, True, 70)
        check_few_copies(Machine(library, plan, shape, device, 120, 6, 4096, 1600, (2, 0, 1)), generator)
    if options.time:
        time_step(library, device, generator)
    print(f"{len(failures)} failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
