#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the vLLM plugin does with latent layers in a step, on a CUDA device, without vLLM: serving_loop.py for them.

    latent_loop.py --library build/cuda/lib/libturboquant-cuda.so
    latent_loop.py --stand-in              on the CPU, with launches that a stand-in answers: checks this file

Decodes are compared with attention in float64, contexts of prompts bit by bit, with rows gathered from bytes that were
stored afresh, each token in the tier where the rule of ages puts it. One line for each check; exit code 1 if one failed.
"""
import argparse
import pathlib
import sys

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "integrations" / "vllm" / "test")]
import serving_loop as loop  # noqa: E402
import tqkv_cuda  # noqa: E402
from serving_loop import DTYPE, ERROR_MAX, N_SINKS, TIER_TOKENS, WIDTHS, Request, Server  # noqa: E402
from turboquant_vllm.gpu_layer import Batch, GpuLayer, Workspace, workspace_bytes  # noqa: E402
from turboquant_vllm.gpu_pages import PAGE_TOKENS, Pages, tiers_of  # noqa: E402

LATENT, ROTATED = tqkv_cuda.LATENT_CHANNELS, 64
OUT_STRIDE = LATENT + ROTATED + 8  # of gathered rows
SCALE = 2 * (LATENT + ROTATED) ** -0.5  # scores spread by 2


def plan_bytes(n_heads, kind):
    """Random rotations as transforms. kind: of WIDTHS."""
    rng = np.random.default_rng(kind)

    def head(dim):
        units = dim // 16
        layouts = [[w] * units if isinstance(w, int) else [w[i * 8 // units] for i in range(units)] for w in WIDTHS[kind]]
        return {"layouts": layouts, "mean": (.1 * rng.standard_normal(dim)).astype(np.float32),
                "weight": np.ones(units, np.float32), "matrix": np.linalg.qr(rng.standard_normal((dim, dim)))[0]}

    inv_freq = (1e4 ** -(np.arange(ROTATED // 2) * 2.0 / ROTATED)).astype(np.float32)
    layer = {"n_heads": n_heads, "k_dim": ROTATED, "v_dim": LATENT | 1 << 31, "window": 0, "rope": (2, ROTATED, inv_freq),
             "tier_tokens": [*TIER_TOKENS, 0], "sides": [[head(ROTATED)], [head(LATENT)]]}
    return loop.plan_writer.write_plan({"names": ["latent", "", "test"], "n_tiers": 4, "n_sinks": N_SINKS, "context": 4096,
                                        "frame_tokens": 1024, "bits_total": 0.0, "layers": [layer]})


class Machine:
    """A layer with blocks of the engine."""

    def __init__(self, cuda, launch, n_heads, device, n_pages, max_seqs, max_len, max_tokens):
        self.n_heads, self.device, self.max_len = n_heads, device, max_len
        tiers = tiers_of(TIER_TOKENS, N_SINKS, (max_seqs,) * 3, n_pages)
        self.pages = Pages(tiers, n_pages, max_seqs, -(-max_len // PAGE_TOKENS), max_tokens, device, launch)
        workspace = Workspace(workspace_bytes(cuda, max_seqs, (1, 4), max_len), 0, 0, device)
        self.layer = GpuLayer(cuda, tiers.n_copies, workspace, device)
        self.blocks = torch.zeros(n_pages * cuda.page_bytes(3, PAGE_TOKENS), dtype=torch.uint8, device=device)
        self.inverse = torch.frombuffer(bytearray(cuda.inverse()), dtype=torch.float32).view(LATENT, LATENT).to(
            device, torch.float64)

    def store(self, rows):
        self.layer.store(self.blocks.data_ptr(), self.pages, rows[:, LATENT:], rows[:, :LATENT])

    def decode(self, batch, q):
        """q: in coded space, [tokens, heads, LATENT + ROTATED]."""
        out = torch.full((*q.shape[:2], LATENT), torch.nan, dtype=DTYPE, device=self.device)
        lse = torch.full(q.shape[:2], torch.nan, device=self.device)
        self.layer.decode(self.blocks.data_ptr(), self.pages, batch, SCALE, q, out, lse)
        return out, lse

    def gather(self, first_row, firsts, ends):
        """Rows [firsts[i], ends[i]) of batch row first_row + i, one after another."""
        starts = torch.tensor([0, *(e - f for f, e in zip(firsts, ends))], device=self.device).cumsum(0).to(torch.int32)
        n = int(starts[-1])
        out = torch.full((n + 1, OUT_STRIDE), torch.nan, dtype=DTYPE, device=self.device)
        self.layer.gather(self.blocks.data_ptr(), self.pages, first_row, starts,
                          torch.tensor(firsts, dtype=torch.int32, device=self.device), n, out)
        if not (out[n].isnan().all() and out[:, LATENT + ROTATED:].isnan().all()):
            loop.report("gather stays within its rows", False)
        return out[:n, :LATENT + ROTATED]


class Reference(loop.Reference):
    def rows(self, request, n, tiers):
        """In coded space, [n, LATENT + ROTATED] f32, each page from its tier."""
        got = None
        for tier in sorted(set(tiers)):
            decoded = self.decode(request.rows[:n], tier)
            picks = torch.tensor([t == tier for t in tiers], device=decoded.device).repeat_interleave(PAGE_TOKENS)[:n]
            got = decoded if got is None else torch.where(picks.unsqueeze(1), decoded, got)
        return got

    def decode(self, rows, tier):
        cuda, device, n = self.machine.layer.cuda, rows.device, len(rows)
        n_pages = -(-n // PAGE_TOKENS)
        pool = torch.zeros(n_pages * cuda.page_bytes(tier, PAGE_TOKENS), dtype=torch.uint8, device=device)
        positions = torch.arange(n, dtype=torch.int32, device=device)
        table = torch.arange(n_pages, dtype=torch.int32, device=device)
        tiers, slots = torch.full((n_pages,), tier, dtype=torch.uint8, device=device), positions.long()
        skipped = torch.full_like(slots, -1)  # of the other tiers
        cuda.store(tqkv_cuda.StoreArgs(
            rows[:, LATENT:].data_ptr(), rows.data_ptr(), rows.stride(0), rows.stride(0), positions.data_ptr(),
            [slots.data_ptr() if t == tier else skipped.data_ptr() for t in range(4)], [pool.data_ptr()] * 4, n,
            PAGE_TOKENS, tqkv_cuda.BF16), loop.stream())
        out = torch.empty(n, LATENT + ROTATED, device=device)
        starts, first = torch.tensor([[0, n], [0, 0]], dtype=torch.int32, device=device)
        pages = tqkv_cuda.Pages([pool.data_ptr()] * 4, table.data_ptr(), PAGE_TOKENS, n_pages, tiers.data_ptr(), n_pages)
        cuda.gather(tqkv_cuda.GatherArgs(pages, out.data_ptr(), out.stride(0), starts.data_ptr(), first.data_ptr(), 1, n,
                                         tqkv_cuda.F32), loop.stream())
        return out.clone()


class LatentServer(Server):
    """rows of a Request: [tokens, LATENT + ROTATED]."""

    def __init__(self, machine, generator, max_seqs, n_blocks):
        super().__init__(machine, generator, max_seqs, n_blocks)
        self.reference, self.gathers_agree, self.n_gathered = Reference(machine), True, 0

    def request(self, n_prompt, n_all, prefix=None, n_shared=0):
        request = Request(self.random(n_all, LATENT + ROTATED), n_prompt)
        if prefix is not None:
            request.rows[:n_shared] = prefix.rows[:n_shared]
            request.blocks, request.n_done, request.shared = prefix.blocks[:n_shared // PAGE_TOKENS], n_shared, n_shared
        return request

    def inputs(self, work):
        parts = []
        for request, n, junk in work:
            rows = request.rows[request.n_done:request.n_done + n].clone()
            rows[n - junk:] = self.random(junk, LATENT + ROTATED)
            parts.append(rows)
        return torch.cat(parts)

    def step(self, work, q_max=1, graph=False, check=True):
        work = sorted(work, key=lambda entry: entry[1] > q_max)
        new = self.inputs(work)
        n_rows = self.max_seqs if graph else len(work)
        starts = self.tables(work, n_rows, n_rows * work[0][1] if graph else len(new))
        batch = self.batch(work, starts, q_max)
        self.machine.store(new)
        q = self.random(starts[batch.n_decodes], self.machine.n_heads, LATENT + ROTATED)
        out, lse = self.machine.decode(batch, q) if batch.n_decodes else (q, None)
        if graph and self.graphs:
            self.replay(work[0][1], new, q, out, lse)
        if check:
            self.compare(work, starts, batch.n_decodes, new, q, out, lse)
        for request, n, junk in work:
            request.n_done += n - junk
        self.n_steps += 1

    def capture(self, q_len):
        """A graph for max_seqs sequences of any length with q_len new tokens each."""
        machine, n = self.machine, self.max_seqs * q_len
        rows = torch.zeros(n, LATENT + ROTATED, dtype=DTYPE, device=machine.device)
        q = torch.zeros(n, machine.n_heads, LATENT + ROTATED, dtype=DTYPE, device=machine.device)
        batch = Batch(n, self.max_seqs, q_len, machine.max_len)
        machine.pages.slots.fill_(-1)
        machine.pages.seq_lens.zero_()
        machine.store(rows), machine.decode(batch, q)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            machine.store(rows)
            out, lse = machine.decode(batch, q)
        self.graphs[q_len] = graph, rows, q, out, lse

    def replay(self, q_len, new, q, out, lse):
        graph, rows, graph_q, graph_out, graph_lse = self.graphs[q_len]
        rows[:len(new)], graph_q[:len(q)] = new, q
        graph.replay()
        first = graph_out.clone()
        graph.replay()
        same = torch.equal(graph_out, first) and not graph_out.isnan().any()
        near = (graph_out[:len(out)].float() - out.float()).norm() <= 2e-3 * out.float().norm()
        near_sums = (graph_lse[:len(lse)] - lse).abs().max() < 1e-3
        self.replays_agree = self.replays_agree and bool(same and near and near_sums)
        self.n_replays += 1

    def compare(self, work, starts, n_decodes, new, q, out, lse):
        tiers = self.machine.pages.tiers.cpu()
        contexts = [request.n_done for request, _, _ in work[n_decodes:]]
        halves = [context // 3 for context in contexts]
        gathered = [self.machine.gather(n_decodes, firsts, ends) if sum(ends) > sum(firsts) else None
                    for firsts, ends in (([0] * len(contexts), halves), (halves, contexts))]
        for r, (request, n, _) in enumerate(work):
            before = request.n_done
            here = tiers[r, :-(-(before + n) // PAGE_TOKENS)].tolist()
            if request.shared == 0:
                rule = [loop.tier_by_age(index, before // PAGE_TOKENS) for index in range(len(here))]
                n_read = len(here) if r < n_decodes else -(-before // PAGE_TOKENS)
                self.by_rule = self.by_rule and here[:n_read] == rule[:n_read]
                self.n_tiers_checked += n_read
            if r < n_decodes:
                tokens = slice(starts[r], starts[r] + n)
                saved = request.rows[before:before + n].clone()
                request.rows[before:before + n] = new[tokens]
                rows = self.reference.rows(request, before + n, here)
                request.rows[before:before + n] = saved
                self.compare_decode(rows.double(), q[tokens], out[tokens], lse[tokens])
            elif before:
                i = r - n_decodes
                rows = self.reference.rows(request, before, here[:-(-before // PAGE_TOKENS)]).to(DTYPE)
                got = [part[sum(sizes[:i]):sum(sizes[:i + 1])] for part, sizes in zip(gathered, (
                    halves, [c - h for c, h in zip(contexts, halves)])) if part is not None]
                self.gathers_agree = self.gathers_agree and torch.equal(torch.cat(got), rows)
                self.n_gathered += before

    def compare_decode(self, rows, q, out, lse):
        """All in coded space; rows: [tokens seen by the last of q, LATENT + ROTATED] f64."""
        scores = torch.einsum("qhd,nd->hqn", q.double(), rows) * SCALE
        hidden = torch.ones(len(q), len(rows), dtype=torch.bool, device=q.device).triu_(len(rows) - len(q) + 1)
        scores.masked_fill_(hidden, -torch.inf)
        want = torch.einsum("hqn,nd->qhd", scores.softmax(2), rows[:, :LATENT])
        wrong = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
        self.worst = max(self.worst, float(wrong.nan_to_num(9.0).max()))
        self.worst_lse = max(self.worst_lse, float((lse - scores.logsumexp(2).t()).abs().nan_to_num(9.0).max()))


def check_inverse(server):
    """A latent is w @ inverse: of 8 bits it is near to what was stored."""
    rows = server.random(200, LATENT + ROTATED)
    got = server.reference.decode(rows, 0).double()
    latent = (got[:, :LATENT] @ server.machine.inverse - rows[:, :LATENT].double()).norm() / rows[:, :LATENT].norm()
    key = (got[:, LATENT:] - rows[:, LATENT:].double()).norm() / rows[:, LATENT:].norm()
    loop.report("8 bits give latents and keys back", latent < .02 and key < .02, f"error {latent:.1e}, {key:.1e}")


def check_serving(machine, generator, with_graphs, n_steps):
    server = LatentServer(machine, generator, machine.pages.seq_lens.shape[0], machine.pages.n_pages)
    server.free.remove(0)  # the engine's null block

    def done(name):
        loop.report(name, server.worst < ERROR_MAX and server.worst_lse < 2e-3 and server.by_rule and
                    server.replays_agree and server.gathers_agree,
                    f"{server.n_steps} steps, error {server.worst:.1e}, log of sums {server.worst_lse:.1e}, "
                    f"{server.n_tiers_checked} tiers by rule, {server.n_gathered} rows gathered, "
                    f"{server.n_replays} replays")
        server.worst = server.worst_lse = 0.0
        server.n_steps = server.n_tiers_checked = server.n_replays = server.n_gathered = 0

    check_inverse(server)
    if with_graphs:
        for q_len in (1, 4):
            server.capture(q_len)
    a, b, c = server.request(700, 1200), server.request(40, 500), server.request(1500, 2000)
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
    for i in range(6):
        server.step([(a, 1 + i % 4, i % 2 and i % 4), (b, 4, 3), (c, 2, 1)], q_max=4)
    done("unlike numbers of drafts")
    d = server.request(600, 900, prefix=a, n_shared=512)
    server.step([(a, 1, 0), (b, 1, 0), (c, 1, 0), (d, 88, 0)])
    for i in range(16):
        server.step([(x, 1, 0) for x in (a, b, c, d)], graph=with_graphs, check=i % 8 == 0)
    done("a shared prefix")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--library", help="libturboquant-cuda.so")
    where.add_argument("--stand-in", action="store_true", help="fake_cuda, on the CPU")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    device = torch.device("cpu" if options.stand_in else "cuda")
    print(f"{device if options.stand_in else torch.cuda.get_device_name()}, seed {options.seed}", flush=True)
    generator = torch.Generator(device).manual_seed(options.seed)
    for n_heads, kind in ((16, 0), (128, 1)):
        if options.stand_in:
            import fake_cuda
            n_heads, cuda, launch = n_heads // 8, fake_cuda.LatentLayer(n_heads // 8, 4, kind), None
        else:
            library = tqkv_cuda.Library(options.library)
            cuda, launch = tqkv_cuda.Layer(library, library.read_plan(plan_bytes(n_heads, kind))), library.page_tables
        print(f"{n_heads} heads", flush=True)
        check_serving(Machine(cuda, launch, n_heads, device, 120, 6, 4096, 1600), generator, not options.stand_in,
                      16 if options.stand_in else 70)
    print(f"{len(loop.failures)} failed")
    sys.exit(1 if loop.failures else 0)


if __name__ == "__main__":
    main()
