# SPDX-License-Identifier: Apache-2.0
"""Tables of copies against a model that goes token by token, over random batches of an engine that shares blocks, takes
them away, drafts and rejects. Memory is numbers: each token writes its own, and every query must find them all."""
import pathlib
import random
import sys

import pytest

torch = pytest.importorskip("torch")
HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2] / "cuda")]
import tqkv_cuda  # noqa: E402
from turboquant_vllm.gpu_pages import PAGE_TOKENS, Pages, Tiers, tiers_of  # noqa: E402

MAX_SEQS, MAX_PAGES, MAX_TOKENS, N_PAGES = 6, 12, 700, 24
REACH, N_SINK_PAGES = (1, -1, 3), 1
TABLES = ("slots", "positions", "seq_lens", "block_table", "tiers")
STATE = ("copy_of", "page_of", "used", "is_sink", "youngest")


def made_with(*arguments, device="cpu"):
    """On a device by its kernels, on the CPU with tensors."""
    launch = tqkv_cuda.Library(tqkv_cuda.find()).page_tables if device == "cuda" else None
    return Pages(*arguments, device, launch)


needs_device = pytest.mark.skipif(not (torch.cuda.is_available() and tqkv_cuda.find()),
                                  reason="needs a CUDA device and libturboquant-cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_device)])
def device(request):
    return request.param


class Sequence:
    def __init__(self, tokens, blocks, n_done):
        self.tokens, self.blocks, self.n_done = tokens, blocks, n_done  # n_done: tokens in the cache


class Engine:
    """Requests over blocks of block_tokens tokens. plain: numbers in blocks; copies: [tier] {slot: number}."""

    def __init__(self, rng, block_tokens, n_copies, device):
        self.rng, self.device = rng, device
        self.block_tokens, self.pages_of_block = block_tokens, block_tokens // PAGE_TOKENS
        self.pages = made_with(Tiers(REACH, n_copies, N_SINK_PAGES), N_PAGES, MAX_SEQS, MAX_PAGES, MAX_TOKENS,
                               device=device)
        self.plain, self.copies = {}, [{} for _ in REACH]
        self.complete = [{} for _ in REACH]  # page: cells that a copy of it would have if there were enough copies
        self.free, self.running, self.next_token = list(range(N_PAGES // self.pages_of_block)), [], 0
        self.cached = []  # (tokens, block) of full blocks that nobody has, oldest first
        self.seen = {"shared": 0, "rejected": 0, "taken away": 0, "reused": 0, "young": 0, "lost": 0,
                     "newest": 0, "no newest": 0}

    def new_tokens(self, n):
        self.next_token += n
        return list(range(self.next_token - n, self.next_token))

    def take_block(self):
        if not self.free:
            return None
        block = self.free.pop(0)
        if any(block == other for _, other in self.cached):
            self.seen["reused"] += 1
            self.cached = [entry for entry in self.cached if entry[1] != block]
        return block

    def start(self, tokens=None):
        """A prompt, perhaps behind the start of another that has ended or still runs."""
        old = [(s.tokens[:s.n_done], s.blocks) for s in self.running]
        blocks, start = [], []
        if tokens is None and old and self.rng.random() < 0.5:
            start, others = self.rng.choice(old)
            n = self.rng.randint(0, len(start) // self.block_tokens)
            start, blocks = start[:n * self.block_tokens], others[:n]
            self.seen["shared"] += n
        if tokens is None:
            tokens = start + self.new_tokens(self.rng.randint(1, 330))
        if not blocks:  # what ended before
            for prefix, block in self.cached:
                n = (len(blocks) + 1) * self.block_tokens
                if tokens[:n] == prefix and n < len(tokens):
                    blocks.append(block)
            self.free = [block for block in self.free if block not in blocks]
            self.cached = [entry for entry in self.cached if entry[1] not in blocks]
        if blocks:
            self.check_newest(blocks)
        self.running.append(Sequence(tokens, list(blocks), len(blocks) * self.block_tokens))

    def check_newest(self, blocks):
        """What the host is told of a hit, against the model; sequences that this step starts are not in it."""
        pages = self.page_table(Sequence([], blocks, 0))
        has, whole = self.pages.has_newest(pages), [len(self.complete[0].get(page, ())) == PAGE_TOKENS for page in pages]
        has_all = all(whole[-REACH[0]:])
        self.seen["newest" if has else "no newest"] += 1
        assert has_all or not has
        assert has or not has_all or self.pages.tiers_young.n_copies[0] < 60

    def end(self, sequence):
        self.running.remove(sequence)
        for i, block in enumerate(sequence.blocks):
            if any(block in other.blocks for other in self.running):
                continue
            self.free.append(block)
            if (i + 1) * self.block_tokens <= sequence.n_done:
                self.cached.append((sequence.tokens[:(i + 1) * self.block_tokens], block))

    def step(self):
        rows = []  # (sequence, new tokens, how many stay)
        for sequence in list(self.running):
            left = len(sequence.tokens) - sequence.n_done
            if left > 0:
                n = min(left, self.rng.choice([left, 17, 64, 100]))
                new, kept = sequence.tokens[sequence.n_done:sequence.n_done + n], n
            else:
                drafts = self.rng.choice([0, 0, 3, 7])
                new, kept = self.new_tokens(1 + drafts), self.rng.randint(1, 1 + drafts)
                self.seen["rejected"] += 1 + drafts - kept
            end = sequence.n_done + len(new)
            while len(sequence.blocks) * self.block_tokens < end:
                block = self.take_block()
                if block is None:
                    break
                sequence.blocks.append(block)
            if len(sequence.blocks) * self.block_tokens < end or end > MAX_PAGES * PAGE_TOKENS:
                self.end(sequence)  # preempted, or at its longest
                if end <= MAX_PAGES * PAGE_TOKENS:
                    self.seen["taken away"] += 1
                    self.start(sequence.tokens)
                continue
            if sum(len(row[1]) for row in rows) + len(new) <= MAX_TOKENS - 8:
                rows.append((sequence, new, kept))
        if rows:
            self.run(rows)
        for sequence, new, kept in rows:
            before, after = sequence.tokens[:sequence.n_done], sequence.tokens[sequence.n_done + len(new):]
            sequence.tokens = before + new[:kept] + after
            sequence.n_done += kept

    def page_table(self, sequence):
        return [block * self.pages_of_block + j for block in sequence.blocks for j in range(self.pages_of_block)]

    def run(self, rows):
        n_padding = self.rng.choice([0, MAX_SEQS - len(rows)])
        starts, lens, slots = [0], [], []
        table = torch.zeros(len(rows) + n_padding, MAX_PAGES, dtype=torch.int32)
        for r, (sequence, new, _) in enumerate(rows):
            pages = self.page_table(sequence)
            table[r, :len(pages)] = torch.tensor(pages[:MAX_PAGES])
            slots += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS
                      for p in range(sequence.n_done, sequence.n_done + len(new))]
            starts.append(len(slots))
            lens.append(sequence.n_done + len(new))
        table[len(rows):] = self.rng.randrange(N_PAGES)
        starts += [starts[-1]] * n_padding
        padded = torch.tensor(slots + [-1] * (3 if n_padding else 0), dtype=torch.int64)
        inputs = (torch.tensor(starts, dtype=torch.int32), torch.tensor(lens + [0] * n_padding, dtype=torch.int32), table,
                  padded)
        self.pages.step(*(x.to(self.device) for x in inputs), max(lens))
        self.tables = {name: getattr(self.pages, name).cpu() for name in TABLES}
        self.store(rows, starts, slots)
        for r, row in enumerate(rows):
            self.check(r, row)

    def store(self, rows, starts, slots):
        got = self.tables["slots"][:, :len(slots)]
        assert (self.tables["slots"][:, len(slots):] == -1).all()
        for tier, row in enumerate(got):
            written = row[row >= 0]
            assert len(written.unique()) == len(written)
            assert tier == len(REACH) or (written < PAGE_TOKENS * self.pages.tiers_young.n_copies[tier]).all()
        for (sequence, new, _), start in zip(rows, starts):
            next_page = max(sequence.n_done, sequence.n_done + len(new) - 8) // PAGE_TOKENS
            for i, number in enumerate(new):
                position, slot = sequence.n_done + i, slots[start + i]
                assert self.tables["positions"][start + i] == position
                assert got[-1, start + i] == slot
                self.plain[slot] = number
                for tier, reach in enumerate(REACH):
                    if got[tier, start + i] >= 0:
                        self.copies[tier][int(got[tier, start + i])] = number
                    self.model(tier, slot, next_page - position // PAGE_TOKENS <= reach or
                               (tier == 0 and position < N_SINK_PAGES * PAGE_TOKENS))

    def model(self, tier, slot, wanted):
        page, cell = divmod(slot, PAGE_TOKENS)
        cells = self.complete[tier]
        if cell == 0 and wanted:
            cells[page] = {0}
        elif cell == 0:
            cells.pop(page, None)
        elif page in cells:
            cells[page].add(cell)

    def check(self, r, row):
        sequence, new, _ = row
        assert self.tables["seq_lens"][r] == sequence.n_done + len(new)
        numbers = sequence.tokens[:sequence.n_done] + new
        pages, query_page = self.page_table(sequence), sequence.n_done // PAGE_TOKENS
        for index in range(-(-len(numbers) // PAGE_TOKENS)):
            first = index * PAGE_TOKENS
            tier, place = int(self.tables["tiers"][r, index]), int(self.tables["block_table"][r, index])
            memory = self.plain if tier == len(REACH) else self.copies[tier]
            expected = numbers[first:first + PAGE_TOKENS]
            assert [memory.get(place * PAGE_TOKENS + i) for i in range(len(expected))] == expected
            best = min([t for t, reach in enumerate(REACH)
                        if (query_page - index <= reach or (t == 0 and index < N_SINK_PAGES))
                        and len(self.complete[t].get(pages[index], ())) >= len(expected)], default=len(REACH))
            self.seen["young"] += tier < len(REACH)
            self.seen["lost"] += tier > best
            assert tier >= best


@pytest.mark.parametrize("block_tokens", [64, 128])
@pytest.mark.parametrize("n_copies", [(60, 0, 60), (5, 0, 7), (1, 0, 0)])
def test_every_query_finds_its_tokens(block_tokens, n_copies, device):
    rng = random.Random(f"{block_tokens} {n_copies}")
    engine = Engine(rng, block_tokens, n_copies, device)
    for _ in range(250):
        while len(engine.running) < MAX_SEQS and rng.random() < 0.5:
            engine.start()
        engine.step()
        for sequence in list(engine.running):
            if rng.random() < 0.02:
                engine.end(sequence)
    assert all(engine.seen[event] > 0 for event in ("shared", "rejected", "taken away", "reused", "young")), engine.seen
    assert (engine.seen["lost"] > 0) == (n_copies[0] < 60), engine.seen
    assert (engine.seen["newest"] > 0) == (n_copies[0] > 1) and (engine.seen["no newest"] > 0) == (n_copies[0] < 60)


def test_a_plan_without_young_tiers_reads_blocks(device):
    pages = made_with(Tiers((), (), 0), 8, 2, 4, 100, device=device)
    prompt_step(pages, [3, 5, 0, 0], 70)
    assert pages.block_table[0, :2].tolist() == [3, 5] and pages.tiers.sum() == 0
    assert pages.slots[0, :70].tolist() == [*range(3 * 64, 4 * 64), *range(5 * 64, 5 * 64 + 6)]
    assert pages.positions[:70].tolist() == [*range(70)] and pages.has_newest([3])


def prompt_step(pages, table, n_tokens):
    position = torch.arange(n_tokens)
    slots = torch.tensor(table)[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
    inputs = (torch.tensor([0, n_tokens], dtype=torch.int32), torch.tensor([n_tokens], dtype=torch.int32),
              torch.tensor([table], dtype=torch.int32), slots)
    pages.step(*(x.to(pages.slots.device) for x in inputs), n_tokens)


def test_the_host_knows_which_prefixes_have_their_newest_copies(device):
    """The copy of page 5 is given up when a longer prompt writes it, out of reach of its end, and is not taken yet."""
    pages = made_with(Tiers((1,), (9,), 1), 20, 2, 5, 300, device=device)
    assert not pages.has_newest([3, 5])
    prompt_step(pages, [3, 5, 6, 0, 0], 140)
    assert pages.has_newest([3]) and pages.has_newest([3, 5]) and not pages.has_newest([3, 7])
    prompt_step(pages, [8, 5, 9, 10, 11], 300)
    assert pages.has_newest([8, 5, 9, 10]) and not pages.has_newest([8, 5])
    assert made_with(Tiers((-1,), (0,), 1), 8, 2, 4, 100, device=device).has_newest([3])  # its youngest tier holds nothing


def test_sinks_of_ended_sequences_stay_longest(device):
    """Copies for nine pages; each of four prompts takes three, its first page and its newest two, and ends."""
    pages = made_with(Tiers((1,), (9,), 1), 20, 2, 4, 300, device=device)
    for prompt in range(4):
        prompt_step(pages, [4 * prompt + i for i in range(4)], 200)
        assert pages.tiers[0, :4].tolist() == [0, 1, 0, 0]
    assert sorted(pages.page_of[0, :-1].tolist()) == [0, 4, 7, 8, 10, 11, 12, 14, 15]


def test_a_page_that_was_a_sink_is_let_go_of_like_others(device):
    """Page 5 begins one prompt and is later in the middle of another; then others come. Page 4 is a sink till the end."""
    pages = made_with(Tiers((1,), (9,), 1), 20, 2, 4, 300, device=device)
    prompt_step(pages, [5, 0, 0, 0], 30)
    prompt_step(pages, [4, 5, 0, 0], 100)
    for prompt in (6, 9, 12):
        prompt_step(pages, [prompt, prompt + 1, prompt + 2, 0], 180)
    assert {4, 5} & set(pages.page_of[0, :-1].tolist()) == {4}


def test_a_replayed_step_changes_nothing(device):
    """vLLM may build the metadata of a step more than once."""
    engine = Engine(random.Random(1), 64, (6, 0, 6), device)
    for _ in range(6):
        engine.start()
    calls, step = [], engine.pages.step

    def twice(*arguments):
        step(*arguments)
        before = [x.clone() for x in (engine.pages.block_table, engine.pages.tiers, engine.pages.slots)]
        step(*arguments)
        assert all(map(torch.equal, before, (engine.pages.block_table, engine.pages.tiers, engine.pages.slots)))
        calls.append(arguments)
    engine.pages.step = twice
    for _ in range(60):
        engine.step()
    assert len(calls) > 30


@needs_device
def test_kernels_decide_as_tensors_do():
    """Tables and state, after every step, of more tokens and copies than the kernels have threads."""
    tiers = Tiers((1, 4, 40), (40, 150, 1500), 1)
    sizes = (tiers, 3000, 80, 50, 5000)
    ours, reference = made_with(*sizes, device="cuda"), made_with(*sizes)
    rng = random.Random(5)
    lengths, free = {}, list(range(3000))
    rng.shuffle(free)
    for step in range(80):
        for seq in [seq for seq in lengths if rng.random() < .1]:
            free += lengths.pop(seq)[1]
        while len(lengths) < 70 and rng.random() < .9:
            lengths[object()] = [0, [], rng.randint(1, 2500)]
        rows, starts, slots = [], [0], []
        for entry in lengths.values():
            done, pages, n_prompt = entry
            n = min(n_prompt - done, 700) if done < n_prompt else rng.randint(1, 8)
            if len(slots) + n > 5000 or done + n > 50 * PAGE_TOKENS or len(free) < 20:
                continue
            while len(pages) * PAGE_TOKENS < done + n:
                pages.append(free.pop(0))
            slots += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in range(done, done + n)]
            entry[0] += n
            rows.append(([*pages, *[0] * 50][:50], entry[0]))
            starts.append(len(slots))
        slots += [-1] * rng.choice([0, min(7, 5000 - len(slots))])
        inputs = [torch.tensor(x, dtype=torch.int32) for x in (starts, [n for _, n in rows], [row for row, _ in rows])]
        longest = max(n for _, n in rows)
        reference.step(*inputs, torch.tensor(slots), longest)
        ours.step(*(x.cuda() for x in inputs), torch.tensor(slots).cuda(), longest)
        for name in (*TABLES, *STATE):
            one, other = getattr(ours, name).cpu(), getattr(reference, name)
            n = {"copy_of": 3000, "page_of": 1500, "used": 1500, "is_sink": 1500, "youngest": 1500,
                 "positions": len(slots)}.get(name)  # the places for what is masked are not compared
            if name in ("block_table", "tiers"):
                one, other = (x[:len(rows), :-(-longest // PAGE_TOKENS)] for x in (one, other))
            assert one[..., :n].equal(other[..., :n]), (step, name)
    assert (reference.used[:, :-1] == reference.now).any()


def test_sizes():
    """32 tokens can lie in two pages before the query's; a tier of no tokens has no copies."""
    tiers = tiers_of((32, 0, 224, 768), 4, (2, 9, 1, 1), 1000)
    assert tiers == Tiers((1, -1, 4, 16), (2 * (1 + 2 + 1), 0, 6, 18), 1)
    assert tiers_of((32,), 4, (500,), 10).n_copies == (10,)
