# SPDX-License-Identifier: Apache-2.0
"""Which pages of 64 tokens have copies in the younger tiers, and what the kernels of a step are told. Needs torch, on devices tqkv_cuda too.

The engine's blocks hold every token at the last tier's widths. Beside them lie copies of pages at the widths of the
younger tiers, found by page and replaced by least recent use, those of sinks after all others that no sequence has read
in the last step: a later prefix hit reads them. One object serves all layers of a model: it decides once a step, on the
device and without waiting, so a decode never stops for it. The host learns from each step which pages the youngest tier
has: where those of a hit's newest tokens are gone, the scheduler has them read again.

    page of the query - page of a token <= reach of a tier     its copy there is read, the youngest that is valid
    first pages (sinks)                                        as tier 0, always
    otherwise                                                  the engine's block

A copy is valid for the page that both tables name: copy_of[page] = copy and page_of[copy] = page. A valid copy has all
tokens of its page: it is taken, or given up, when the first token of the page is written, and gets every token after
that. So a page that the engine gives to other tokens, a copy that was given to another page and a rejected draft leave
nothing that could be read.
"""
from dataclasses import dataclass

import torch

PAGE_TOKENS = 64  # tokens that share a tier, as in the kernels
Q_MAX = 8  # tokens of a sequence in one decode
NEVER = 1 << 60  # step of a use that does not come
LATER = 1 << 40  # steps; more than there will be


@dataclass(frozen=True)
class Tiers:
    """The younger tiers, youngest first. reach: in pages; -1: the tier holds nothing."""
    reach: tuple
    n_copies: tuple
    n_sink_pages: int


def tiers_of(tier_tokens, n_sinks, n_sequences, n_pages):
    """tier_tokens: of the younger tiers. n_sequences: for which each holds copies: pages within reach, the query's
    own, and the one that has just left reach, which by use may be newer than another's that is still needed."""
    reach, n_copies, n_tokens = [], [], 0
    n_sink_pages = -(-n_sinks // PAGE_TOKENS)
    for tier, (tokens, n) in enumerate(zip(tier_tokens, n_sequences)):
        n_tokens += tokens
        reach.append(-(-n_tokens // PAGE_TOKENS) if tokens > 0 else -1)
        per_sequence = (reach[-1] + 2 if tokens > 0 else 0) + (n_sink_pages if tier == 0 else 0)
        n_copies.append(min(n * per_sequence, n_pages))
    return Tiers(tuple(reach), tuple(n_copies), n_sink_pages)


class Pages:
    """Tables that outlive a step, and buffers at fixed addresses that a captured graph reads. launch: page_tables of
    the tqkv_cuda.Library, which does on a device in two kernels what is written here with tensors.

    After step(): positions, slots[tier] (one row for the blocks, the last), block_table, tiers, seq_lens, as
    turboquant/cuda.h has them.
    """

    def __init__(self, tiers, n_pages, max_seqs, max_pages, max_tokens, device, launch=None):
        n_young, n_most = len(tiers.reach), max(tiers.n_copies, default=0)
        self.tiers_young, self.n_pages, self.no_copy = tiers, n_pages, n_most
        self.reach = torch.tensor(tiers.reach, device=device).view(-1, 1)
        # One more page and one more copy: what is masked goes there, and it never becomes valid.
        self.copy_of = torch.full((n_young, n_pages + 1), n_most, device=device)
        self.page_of = torch.full((n_young, n_most + 1), -1, device=device)
        self.used = torch.full((n_young, n_most + 1), NEVER, device=device)  # step of the last use
        for tier, n in enumerate(tiers.n_copies):
            self.used[tier, :n] = 0
        self.is_sink = torch.zeros(n_most + 1, dtype=torch.bool, device=device)  # copies of the youngest tier
        self.now = torch.zeros((), dtype=torch.int64, device=device)  # number of the step
        self.range = torch.arange(max(max_tokens, max_pages), dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.slots = torch.full((n_young + 1, max_tokens), -1, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(max_seqs, max_pages, dtype=torch.int32, device=device)
        self.tiers = torch.full((max_seqs, max_pages), n_young, dtype=torch.uint8, device=device)
        self.seq_lens = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        # Page of each copy of the youngest tier, -1 where it is not valid; the same on the host, as of the last step.
        is_cuda = torch.device(device).type == "cuda"
        self.copies = torch.arange(n_most + 1, device=device)
        self.youngest = torch.full((n_most + 1,), -1, device=device)
        self.on_host = torch.full((n_most + 1,), -1, pin_memory=is_cuda)
        self.told = torch.cuda.Event() if is_cuda else None
        self.launch = launch
        if launch is not None:
            self.clock = torch.zeros(2, dtype=torch.int64, device=device)
            self.args = self.arguments()

    def arguments(self):
        """Of tqkv_cuda_page_tables, but for what a step brings."""
        from tqkv_cuda import PageTablesArgs
        args = PageTablesArgs(places=self.block_table.data_ptr(), tier_slots=self.slots.data_ptr(),
                              lengths=self.seq_lens.data_ptr())
        for name in ("copy_of", "page_of", "used", "is_sink", "clock", "positions", "tiers", "youngest"):
            setattr(args, name, getattr(self, name).data_ptr())
        args.reach[:len(self.reach)] = self.tiers_young.reach
        args.n_young, args.n_copies, args.n_pages = len(self.reach), self.no_copy, self.n_pages
        args.n_sink_pages = self.tiers_young.n_sink_pages
        args.max_seqs, args.places_stride = self.block_table.shape
        args.max_tokens = args.slots_stride = self.slots.shape[1]
        return args

    def step(self, query_start, seq_lens, block_table, slots, max_seq_len):
        """query_start: [n + 1], seq_lens: [n] with the new tokens, block_table: [n][pages of 64 tokens], slots:
        [tokens] page * 64 + cell, or -1 for padding; all on the device. max_seq_len: no sequence is longer."""
        block_table = block_table[:, :-(-max_seq_len // PAGE_TOKENS)]
        if self.launch is None:
            self.tabulate(query_start, seq_lens, block_table, slots)
        else:
            self.launch_step(query_start, seq_lens, block_table, slots)
        self.on_host.copy_(self.youngest, non_blocking=True)
        if self.told is not None:
            self.told.record()

    def launch_step(self, query_start, seq_lens, block_table, slots):
        args = self.args
        args.query_start, args.seq_lens = query_start.data_ptr(), seq_lens.data_ptr()
        args.block_table, args.slots = block_table.data_ptr(), slots.data_ptr()
        args.n_seqs, args.n_tokens = len(seq_lens), len(slots)
        args.n_width, args.table_stride = block_table.shape[1], block_table.stride(0)
        self.launch(args, torch.cuda.current_stream().cuda_stream)

    def has_newest(self, pages):
        """Whether the youngest tier has, as of the last step, what a query right behind these pages reads of them there.
        Waits for the tables of that step, not for its layers."""
        reach = max(self.tiers_young.reach[:1], default=0)
        if reach <= 0:
            return True
        if self.told is not None:
            self.told.synchronize()
        return bool(torch.isin(torch.tensor(pages[-reach:]), self.on_host).all())

    def tabulate(self, query_start, seq_lens, block_table, slots):
        """step() with tensors."""
        self.now += 1
        first = seq_lens - query_start.diff()  # position of the first new token
        self.seq_lens[len(seq_lens):] = 0
        self.seq_lens[:len(seq_lens)] = seq_lens
        self.write(query_start, seq_lens, first, slots)
        self.read(seq_lens, first, block_table.long())

    def write(self, query_start, seq_lens, first, slots):
        """Copies for the new tokens. Pages that a prompt's end leaves out of reach go to the block alone, but for one
        that has a copy already, which the queries of this step may read."""
        token = self.range[:len(slots)]
        row = torch.searchsorted(query_start[1:], token, right=True).clamp_(max=len(seq_lens) - 1)
        first = first[row]
        position = token - query_start[row] + first
        # The next query is at the end, or among the newest tokens where drafts are rejected.
        next_query = torch.maximum(first, seq_lens[row] - Q_MAX)
        self.positions[:len(slots)] = position.clamp(min=0)
        self.slots[:, len(slots):] = -1
        self.slots[-1, :len(slots)] = slots
        if len(self.reach) == 0 or self.no_copy == 0:
            return
        page, cell = slots.div(PAGE_TOKENS, rounding_mode="floor"), slots % PAGE_TOKENS
        page = page.where(slots >= 0, self.n_pages).expand(len(self.reach), -1)
        is_first = (slots >= 0) & ((cell == 0) | (position == first))  # new token of its page
        wanted = next_query // PAGE_TOKENS - position // PAGE_TOKENS <= self.reach
        is_sink = position < self.tiers_young.n_sink_pages * PAGE_TOKENS
        wanted[0] |= is_sink
        copy = self.copy_of.gather(1, page)
        keeps = is_first & (wanted | (cell > 0)) & (self.page_of.gather(1, copy) == page)
        kept = copy.where(keeps, self.no_copy)
        self.use(kept)
        copy = self.take(is_first & wanted & ~keeps & (cell == 0), page)
        begun = kept[0].where(keeps[0] & (cell == 0), copy[0])  # the page may have been another sequence's before
        self.is_sink.scatter_(0, begun, is_sink & (begun < self.no_copy))
        self.copy_of.scatter_(1, page.where(is_first & ~keeps, self.n_pages), copy)
        copy = self.copy_of.gather(1, page)
        self.slots[:-1, :len(slots)] = (copy * PAGE_TOKENS + cell).where(self.page_of.gather(1, copy) == page, -1)
        page = self.page_of[0]
        copy = self.copy_of[0].gather(0, page.where(page >= 0, self.n_pages))
        self.youngest.copy_(page.where(copy == self.copies, -1))

    def use(self, copy):
        self.used.scatter_(1, copy, self.now.expand_as(copy))

    def take(self, takes, page):
        """A copy for each of these pages: the least recently used, none that this step has used."""
        used = self.used[:, :-1]
        rank = takes.cumsum(1) - 1
        takes = takes & (rank < (used < self.now).sum(1, keepdim=True))
        # Those of this step last, before them those of the last step; within each sinks after the others.
        order = used + 2 * LATER * ((used >= self.now - 1).long() + (used >= self.now).long())
        order[0] += LATER * self.is_sink[:-1]
        copy = order.argsort(dim=1, stable=True).gather(1, rank.clamp(0, self.no_copy - 1)).where(takes, self.no_copy)
        self.page_of.scatter_(1, copy, page.where(takes, -1))
        self.use(copy)
        return copy

    def read(self, seq_lens, first, page):
        """What queries from `first` on read of each page: [n][width]."""
        n_young, (n, width) = len(self.reach), page.shape
        tier = torch.full_like(page, n_young, dtype=torch.uint8)
        if n_young > 0 and self.no_copy > 0:
            index = self.range[:width]
            copy = self.copy_of.gather(1, page.reshape(1, -1).expand(n_young, -1)).view(n_young, n, width)
            reached = (first // PAGE_TOKENS).unsqueeze(1) - index <= self.reach.unsqueeze(2)
            reached[0] |= index < self.tiers_young.n_sink_pages
            valid = self.page_of.gather(1, copy.view(n_young, -1)).view_as(copy) == page
            reads = reached & valid & (index * PAGE_TOKENS < seq_lens.unsqueeze(1))
            copy = copy.where(reads, self.no_copy)
            # Copies in older tiers are used too: their turn comes when the younger ones no longer reach.
            self.use(copy.view(n_young, -1))
            for young in reversed(range(n_young)):
                page = copy[young].where(reads[young], page)
                tier.masked_fill_(reads[young], young)
        self.block_table[:n, :width] = page
        self.tiers[:n, :width] = tier
