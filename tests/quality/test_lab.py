# SPDX-License-Identifier: Apache-2.0
"""
The laboratory (lab.py) agrees with what it stands in for: its coders with the library, its rows with a store, its KL
with that of a cache in transformers and, with TQKV_TEST_FULL=1, of llama.cpp.
"""
import json
import os
import pathlib
import shlex
import subprocess
import sys
import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import fetch  # noqa: E402
import lab  # noqa: E402
from kv_lab import lab_model, lab_plan, lab_quant, lab_run, lab_stats, lab_table, lab_tails, lab_variant  # noqa: E402
from turboquant import Batch, Plan, RopeStyle, Side, Store  # noqa: E402
from turboquant_transformers.held_out import plan_kl  # noqa: E402
from turboquant_transformers.host_layers import describe  # noqa: E402
from turboquant_transformers.pieces import Text  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")
SEED = 11
N = 1024
WINDOW = 100
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 32,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2}
CONFIGS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
}


class TinyModel(lab_model.LabModel):
    """Random weights, random text."""

    def __init__(self, name):
        torch.manual_seed(SEED)
        self.name, self.net = f"tiny-{name}", CONFIGS[name]().eval()
        self.layers = describe(self.net)

    def calibration(self, name):
        made = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return Text(torch.randint(256, (2 * lab_stats.PIECE_TOKENS,), generator=made), None)


@pytest.fixture(name="tiny", scope="module", params=sorted(CONFIGS))
def tiny_fixture(request, built_library, tmp_path_factory):
    """(model, plan, path of the same plan as `.tqkv`), whose tokens grow old soon."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQKV_CACHE", str(tmp_path))
        yield make_tiny(request.param, tmp_path)


def make_tiny(name, folder):
    torch.set_num_threads(1)
    model = TinyModel(name)
    frames = [64] * len(model.layers)
    heads = lab_plan.fit(lab_stats.moments(model, 64, n_tokens=4096), lab_plan.Make())
    budget = lab_plan.Budget(2.4, N, ((32, 8.0), (64, 6.0), (128, 4.0)))
    weights = [[[1.0] * layer.n_kv_heads] * 2 for layer in model.layers]
    plan = lab_plan.Solver(model.layers, frames, heads, weights, budget).solve()
    lab_plan.write_plan(plan, folder / "tiny.tqkv", RopeStyle.HALVES, name)
    return model, plan, folder / "tiny.tqkv"


def random_heads():
    rng = np.random.default_rng(SEED)
    tiers = [[int(b) for b in rng.choice(lab_plan.WIDTHS, 4)] for _ in range(16)]
    rows = torch.from_numpy(rng.standard_normal((4000, 64)).astype(np.float32))
    rows *= torch.from_numpy(np.exp(rng.uniform(-2, 2, (4000, 1))).astype(np.float32))
    rows[::7, 5] *= 20  # outliers
    return rng.uniform(.1, 2, 4), tiers, rows


def test_search_in_torch_is_that_of_the_library():
    """As good: the library searches in whole numbers, ScaleCoder in f32; what is next to a threshold differs."""
    weight, tiers, rows = random_heads()
    weights = torch.from_numpy(np.repeat(weight, 16)).float()
    for widths in tiers:
        mine, theirs = ((coder([(weight, [widths])])(0, 0, rows) - rows).square() @ weights
                        for coder in (lab_quant.ScaleCoder, lab_quant.LibraryCoder))
        assert theirs.sum().item() == pytest.approx(mine.sum().item(), rel=1e-3), widths
        assert ((theirs / mine - 1).abs() < 0.01).float().mean() > 0.998, widths


def test_levels_lose_what_allocation_counts_with():
    rows = torch.randn(2000, 256, generator=torch.Generator().manual_seed(SEED))
    for bits, expected in lab_plan.DISTORTION.items():
        coder = lab_quant.ScaleCoder([(np.ones(16), [[bits] * 16])], below=0, above=0, is_stable=False)
        assert (coder(0, 0, rows) - rows).square().mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_rows_are_those_of_a_store(tiny, chunk):
    """Tiers, frames, ageing and codes of a layer, batch after batch."""
    model, _, path = tiny
    plan = lab_plan.read_plan(path, model.layers)  # with the transforms rounded as they are stored
    index = [layer.window for layer in model.layers].index(0)
    layer, stored = model.layers[index], Plan.load(path)
    recording = lab_stats.record(model, n_tokens=4096)[index]
    k, v = recording.k[0, :N].contiguous(), recording.v[0, :N].contiguous()
    rows = lab_run.LayerRows(plan, index, lab_run.Options(), k.transpose(0, 1), v.transpose(0, 1))
    store, batch = Store(stored, index, N, 1), Batch()
    for first in range(0, N, chunk):
        at = np.arange(first, min(first + chunk, N))
        batch.begin(store, at, at.astype(np.int32))
        batch.put(Side.K, k[at].numpy())
        batch.put(Side.V, v[at].numpy())
        batch.commit()
        rows.store(at[-1] + 1)
    for side, given in zip(Side, (k, v)):
        read = store.read(list(range(N)), side)
        mine = rows.decoded[side].transpose(0, 1).numpy()
        same = np.isclose(read, mine, rtol=1e-3, atol=1e-3 * given.abs().max().item()).all((1, 2))
        # f32 sums in another order change a code where a value lies between two levels
        assert same.mean() > 0.97, (side, same.mean())
        errors = [np.square(coded - given.numpy()).sum() for coded in (read, mine)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert layer.n_kv_heads == 2


def test_kl_is_that_of_a_cache(tiny):
    model, plan, path = tiny
    tokens = torch.randint(256, (N,), generator=torch.Generator().manual_seed(SEED))
    base, test = (lab_run.hidden_states(model, tokens, made)[N // 2:-1] for made in (None, plan))
    model.net.set_attn_implementation("sdpa")
    expected = plan_kl(model.net, Plan.load(path), tokens)
    assert expected > 1e-3
    with torch.no_grad():
        assert lab_run.compare(model, base, test).kl.mean() == pytest.approx(expected, rel=0.03)


def test_a_plan_read_back_is_the_same(tiny):
    model, plan, path = tiny
    again = lab_plan.read_plan(path, model.layers)
    assert again.frames == plan.frames and again.tier_tokens == plan.tier_tokens
    for mine, theirs in zip(plan.heads, again.heads):
        for a, b in zip((head for side in mine for head in side), (head for side in theirs for head in side)):
            assert np.array_equal(a.widths, b.widths)
            assert torch.allclose(a.transform, b.transform, rtol=1e-3, atol=1e-5)


SWITCHES = ["--frame 64", "--frame 0", "--frame-full 64", "--offsets", "--transform hadamard", "--transform eigen",
            "--gamma 0", "--spread 4096", "--band 32", "--step 2", "--no-w-o", "--widths 0,2,4,8", "--sensitivity none",
            "--k-share 0.3", "--tiers 32@8,64@5", "--bits 3.2", "--context 4096", "--calibration code",
            "--calibration-tokens 2048"]


def facts(plan):
    """Everything in a plan, to be compared."""
    yield plan.frames, plan.tier_tokens
    for head in (head for sides in plan.heads for side in sides for head in side):
        yield head.transform.tolist(), head.mean.tolist(), head.offsets is None, np.concatenate(head.widths).tolist()


def test_every_switch_changes_the_plan(tiny):
    model, _, _ = tiny
    if model.name != "tiny-gemma3":
        pytest.skip("one model says it")

    def made(options):
        return list(facts(lab_variant.make_plan(model, lab.parser().parse_args(["gemma", *shlex.split(options)]))))
    shipped = made("")
    assert made("--frame 1024 --gamma 0.5 --base '--gamma 0.5 --probes 8'") == shipped
    for switch in SWITCHES:
        assert made(switch) != shipped, switch


def test_probing_is_as_asked_for(tiny, monkeypatch):
    model, _, _ = tiny
    asked = []
    monkeypatch.setattr(lab_plan, "sensitivities", lambda _, probing, by_head: asked.append((probing, by_head)) or [
        [[1.0] * layer.n_kv_heads] * 2 for layer in model.layers])
    for options in ("", "--probes 2 --probe-text code --gamma 1 --sensitivity head", "--base '--gamma 0.75 --frame 64'"):
        lab_variant.make_plan(model, lab.parser().parse_args(["gemma", *shlex.split(options)]))
    probing = lab_plan.Probing
    assert asked == [(probing(), False), (probing(text="code", n_probes=2), True), (probing(gamma=.75, frame=64), False)]


def test_probing_changes_sensitivities(tiny):
    model, _, _ = tiny
    few = {"n_probes": 2, "n_tokens": 2048}
    found = [lab_plan.sensitivities(model, lab_plan.Probing(**{**few, **more}))
             for more in ({}, {"text": "code"}, {"gamma": .75}, {"frame": 64}, {"n_probes": 1}, {"n_tokens": 4096})]
    assert len(set(map(str, found))) == len(found)


def test_the_last_young_tier_is_drawn_out_unless_fixed(tiny):
    options = ["gemma", "--bits", "3.2", "--context", "16384", "--sensitivity", "none"]
    n_young = []
    for more in ([], ["--fixed-tiers"]):
        plan = lab_variant.make_plan(tiny[0], lab.parser().parse_args([*options, *more]))
        n_young.append(plan.tier_tokens[[layer.window for layer in plan.layers].index(0)][2])
    assert n_young[0] > n_young[1] == 768


def test_ratios_are_to_the_base(tiny, monkeypatch):
    """A variant is its own base; to another one its ratio is what both lose."""
    model, _, _ = tiny
    monkeypatch.setattr(lab_variant, "load", lambda *_: model)
    monkeypatch.setattr(TinyModel, "held_out", lambda self, name, n: self.calibration(name).piece(0, n), raising=False)
    base = "--gamma 0 --sensitivity none --tiers 32@8,64@5 --bits 2.4"
    common = shlex.split(f"{base} --context 1024 --n 1024 --scored 0 --texts en,zh --by-text")
    rows = [lab_variant.run(lab.parser().parse_args(["gemma", *common, *more, "--base", base]))
            for more in ([], ["--exact", "0V,1V,2V"])]
    assert rows[0]["ratio"] == 1 and rows[0]["typical"] == 1
    assert rows[1]["ratio"] < 0.9
    assert rows[1]["ratio"] == pytest.approx(rows[1]["kl_mean"] / rows[0]["kl_mean"], rel=0.01)
    assert rows[1]["kl_mean"] == pytest.approx(np.mean(list(rows[1]["kl_by_text"].values())), rel=1e-9)


def test_only_w_o_changes_without_w_o(tiny):
    """K is fitted as before."""
    model, _, _ = tiny
    plans = [lab_variant.make_plan(model, lab.parser().parse_args(["gemma", *more])) for more in ([], ["--no-w-o"])]
    for mine, theirs in zip(*(plan.heads for plan in plans)):
        for side in Side:
            same = all(torch.equal(a.transform, b.transform) for a, b in zip(mine[side], theirs[side]))
            assert same == (side == Side.K)


def test_tails_show_a_heavy_row():
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(SEED))
    head = lab_plan.HeadPlan(torch.zeros(32), None, torch.eye(32), np.ones(2), np.ones(2))
    plain = lab_tails.of_rows(x, head)
    assert plain["kurtosis"] == pytest.approx(3, abs=.1) and plain["heaviest"] < 3
    x[7] *= 10
    assert lab_tails.of_rows(x, head)["heaviest"] > 30


def test_tails_of_a_model(tiny):
    found = list(lab_tails.tails(tiny[0], 64, 4096))
    assert [(row["layer"], row["side"]) for row in found] == [(i, side) for i in range(3) for side in "KV"]
    assert all(1 < row["kurtosis"] < 20 and row["top_percent"] >= .01 for row in found)


def test_what_is_kept_is_computed_once(tiny):
    """Processes that want the same at the same time wait for the first one."""
    code = ("import sys, time; sys.path[:0] = sys.argv[1:]; from kv_lab import lab_model\n"
            "def compute():\n    print('computed'); time.sleep(1); return 5\n"
            "assert lab_model.once(compute, 'waits') == 5")
    others = [subprocess.Popen([sys.executable, "-c", code, *sys.path], stdout=subprocess.PIPE) for _ in range(2)]
    assert b"".join(other.communicate(timeout=300)[0] for other in others) == b"computed\n"
    assert [other.returncode for other in others] == [0, 0]


def test_intervals():
    rng = np.random.default_rng(SEED)
    kl = rng.exponential(1, 64 * 400)
    assert lab_run.half_interval(kl) == pytest.approx(1.96 / 160, rel=0.1)
    ratio, half = lab_run.paired_ratio(2 * kl + .01 * rng.standard_normal(len(kl)), kl)
    assert ratio == pytest.approx(2, abs=.01) and half < .001


def test_every_row_of_the_table_says_what_made_it():
    for row in lab_table.read():
        assert row.get("command") or row.get("measured_with"), row


@pytest.mark.skipif(os.environ.get("TQKV_TEST_FULL") != "1", reason="minutes long; TQKV_TEST_FULL=1 runs it")
def test_kl_is_that_of_llama_cpp(tqkv, calibrated, tmp_path):
    name, model_file, path = calibrated
    if name != "smollm2":
        pytest.skip("one model says it")
    torch.set_num_threads(1)
    model, f32_file = lab_model.LabModel(name), tmp_path / "f32.gguf"
    subprocess.run([tqkv.parent / "f32_model", model_file, f32_file], check=True)
    subprocess.run([tqkv, "eval", f32_file, "--text", fetch.fetch("texts") / "eval" / "en.txt", "--plan", path,
                    "--cache", "ours", "-c", "2048", "--json", tmp_path / "eval.json"], check=True)
    expected = json.loads((tmp_path / "eval.json").read_text())["results"][0]["kl_mean"]
    mine = lab_run.score_text(model, "en", 2048, lab_plan.read_plan(path, model.layers))
    assert mine.kl.mean() == pytest.approx(expected, rel=0.1)
