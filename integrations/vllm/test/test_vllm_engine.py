# SPDX-License-Identifier: Apache-2.0
"""The plugin in a real vLLM: tiny checkpoints with random weights, in f32, so that what should be equal is equal.

Nothing is lossless in f32 but the stock cache: the built-in plan `f16` rounds K and V to f16, which moves a log
probability here by less than .02 and no token. Where two runs of the plugin must agree, they must in every token.

Starting an engine takes long, so the engines of one plan share a process and tests look at what they left.
"""
import random
import re

import pytest
import tiny_plan
from tiny_checkpoint import HEAD_SIZE, KV_HEADS, LAYERS

F16_LOGPROB_MAX = 0.02
OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 1024}


def random_tokens(rng, n):
    return [rng.randrange(2, 512) for _ in range(n)]


def shared_prompts():
    """Three that share 300 tokens, and a short one; the second round finds the first in the prefix cache."""
    rng = random.Random(1)
    shared = random_tokens(rng, 300)
    first = [shared + random_tokens(rng, 20) for _ in range(3)] + [random_tokens(rng, 9)]
    return {"rounds": [first, first[:2]], "max_tokens": 24}


def repeating_prompts():
    """Phrases that come again, so that n-gram drafts are made."""
    rng = random.Random(2)
    phrases = [random_tokens(rng, 7) for _ in range(4)]
    return {"rounds": [[(phrase * 30)[:180 + 5 * i] for i, phrase in enumerate(phrases)]], "max_tokens": 60}


def growing_prompts():
    """Four that fit into 17 blocks of 32 tokens when they start, and not when they end."""
    rng = random.Random(3)
    return {"rounds": [[random_tokens(rng, 100) for _ in range(4)]], "max_tokens": 80}


def returning_prompts():
    """300 tokens that come twice in a row and again after others, and 300 that come before and after those alone."""
    rng = random.Random(4)
    shared, once = random_tokens(rng, 300), random_tokens(rng, 300)
    again = [[shared + random_tokens(rng, 20)] for _ in range(3)]
    rare = [[once + random_tokens(rng, 20)] for _ in range(2)]
    others = [random_tokens(rng, 320) for _ in range(8)]
    return {"rounds": [again[0], again[1], rare[0], others, again[2], rare[1]], "max_tokens": 8}


@pytest.fixture(scope="module")
def models(checkpoint):
    return {"llama": checkpoint("llama"), "qwen2": checkpoint("qwen2"), "mistral": checkpoint("mistral", window=100)}


def common_jobs(models):
    return {"shared": {"model": models["llama"], "options": OPTIONS} | shared_prompts(),
            "qwen2": {"model": models["qwen2"], "options": OPTIONS} | shared_prompts(),
            "window": {"model": models["mistral"], "options": OPTIONS} | shared_prompts(),
            "growing": {"model": models["llama"], "options": OPTIONS} | growing_prompts()}


@pytest.fixture(scope="module")
def stock(python, models):
    return python.serve(None, common_jobs(models))


@pytest.fixture(scope="module")
def f16(python, models):
    jobs = common_jobs(models)
    jobs["growing"]["options"] = OPTIONS | {"block_size": 32, "num_gpu_blocks_override": 18, "max_model_len": 512}
    jobs["fp8"] = jobs["shared"] | {"options": OPTIONS | {"kv_cache_dtype": "fp8"}}
    jobs["block size"] = jobs["shared"] | {"options": OPTIONS | {"block_size": 40}}
    jobs["match unit"] = jobs["shared"] | {"options": OPTIONS | {"prefix_match_unit": 16}}
    return python.serve("f16", jobs)


@pytest.fixture(scope="module")
def tiered(python, models, tmp_path_factory):
    """Tiers of 8 and 6 bits, then 3 and 4.

    Prompts are read in one piece: drafts take tokens from the budget of a step, and where a prompt is cut decides
    which of its tokens see each other as they came.
    """
    whole = OPTIONS | {"max_num_batched_tokens": 1024}
    path = tiny_plan.write(tmp_path_factory.mktemp("plan") / "tiny.tqkv")
    plain = {"model": models["llama"], "options": whole} | repeating_prompts()
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    few = OPTIONS | {"num_gpu_blocks_override": 40}  # of which copies for more than four sequences would take too much
    returning = {"model": models["llama"], "options": few} | returning_prompts()
    drafting = plain | {"options": whole | {"speculative_config": drafts}}  # last: vLLM starts no engine after drafts
    return python.serve(path, {"plain": plain, "returning": returning, "drafts": drafting})


def outputs(result):
    return [output for outputs in result["rounds"] for output in outputs]


def tokens(result):
    return [output["tokens"] for output in outputs(result)]


def assert_near(result, stock):
    assert "error" not in result, result["error"]
    assert tokens(result) == tokens(stock)
    for ours, theirs in zip(outputs(result), outputs(stock)):
        assert max(abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"])) < F16_LOGPROB_MAX


@pytest.mark.parametrize("job", ["shared", "qwen2", "window"])
def test_f16_is_the_stock_engine(stock, f16, job):
    """Four requests at a time, chunked prefill, prefix hits in both rounds; full attention and a sliding window."""
    assert_near(f16[job], stock[job])


def test_prefix_cache_hits(stock, f16):
    cached = [output["cached"] for output in outputs(f16["shared"])]
    assert cached == [output["cached"] for output in outputs(stock["shared"])]
    assert cached[-2:] == [256, 256]


def test_two_ranks_are_the_stock_engine(python, models):
    """Each has one of the two KV heads; a hit of a plan without tiers is not shortened."""
    job = {"model": models["llama"], "options": OPTIONS | {"tensor_parallel_size": 2}} | shared_prompts()
    stock, f16 = (python.serve(plan, {"two": job}, n_ranks=2)["two"] for plan in (None, "f16"))
    assert_near(f16, stock)
    assert [output["cached"] for output in outputs(f16)] == [output["cached"] for output in outputs(stock)]


def test_ranks_share_a_plan(python, models, tmp_path):
    """Four prompts in two ranks, with codes: what one rank gives, but for rounding. The newest tokens of hits, about
    which the scheduler cannot ask ranks, are read again."""
    path = tiny_plan.write(tmp_path / "tiny.tqkv", last_widths=(8, 8, 8))
    job = {"model": models["llama"], "options": OPTIONS} | shared_prompts()
    one = python.serve(path, {"job": job})["job"]
    job["options"] = OPTIONS | {"tensor_parallel_size": 2}
    two = python.serve(path, {"job": job}, n_ranks=2)["job"]
    assert "error" not in two, two["error"]
    for ours, theirs in zip(outputs(two), outputs(one)):
        assert ours["tokens"][0] == theirs["tokens"][0]
        assert ours["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=0.02)
    assert [output["cached"] for output in outputs(two)][-2:] == [128, 128]


def test_preemption(stock, f16):
    """Too few blocks for four requests: some are thrown out and read again."""
    assert f16["growing"]["metrics"]["vllm:num_preemptions"] > 0
    assert_near(f16["growing"], stock["growing"])


def test_room_grows_as_counted(stock, f16):
    stock_bytes, bytes_now = LAYERS * KV_HEADS * HEAD_SIZE * 2 * 4, LAYERS * tiny_plan.token_bytes(16)
    ratio = f16["shared"]["n_blocks"] / stock["shared"]["n_blocks"]
    assert ratio == pytest.approx(stock_bytes / bytes_now, rel=2e-3)
    said = [int(n.replace(",", "")) for n in re.findall(r"KV cache size: ([\d,]+) tokens", f16["log"])]
    assert said[0] == pytest.approx(f16["shared"]["n_blocks"] * f16["shared"]["block_size"], rel=2e-3)


def test_copies_are_taken_off_the_room(tiered):
    """Layers of unlike widths; blocks get what the copies leave, to a hundredth of a GiB."""
    result = tiered["plain"]
    assert "error" not in result, result["error"]
    beside = float(re.search(r"turboquant: ([\d.]+) GiB of 1.00 GiB", tiered["log"]).group(1))
    room = 2**30 / (sum(tiny_plan.token_bytes(width) for width in (3, 4, 3)) * result["block_size"])
    assert (1 - beside - .01) * room <= result["n_blocks"] <= (1 - beside + .01) * room


def test_ngram_drafts_change_nothing(tiered):
    """Accepted and rejected drafts over coded tokens of every tier: the tokens of one by one."""
    if "sample_recovered_tokens_kernel" in tiered["drafts"].get("error", ""):
        pytest.skip("this vLLM's CPU build samples no drafts, without the plugin neither")
    assert "error" not in tiered["drafts"], tiered["drafts"]["error"]
    metrics = tiered["drafts"]["metrics"]
    assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"] < metrics["vllm:spec_decode_num_draft_tokens"]
    assert tokens(tiered["drafts"]) == tokens(tiered["plain"])


def test_newest_tokens_of_a_hit_are_read_again_where_copies_are_gone(tiered):
    """A prefix of two blocks of 128 tokens that was found once is kept; of another one a block is read again."""
    result = tiered["returning"]
    assert "error" not in result, result["error"]
    assert [output["cached"] for output in outputs(result)] == [0, 256, 0, *[0] * 8, 256, 128]


def test_how_much_of_a_hit_is_read_again(python, tmp_path):
    """Young tiers of 32 and 80 tokens, blocks of 16: nothing with copies, both tiers without, but half at most; where
    nothing is known of copies the youngest one. All tokens of the plan q8 are stored alike."""
    tiers = str(tiny_plan.write(tmp_path / "tiers.tqkv", last_widths=(3, 3, 3), young_widths=(8, 4)))
    program = ("from turboquant_vllm.model_plan import tokens_worth_finding\n"
               "def found(name, keeps_newest, *hits):\n"
               "    return [tokens_worth_finding(name, keeps_newest, n, 16) for n in hits]\n"
               f"print(*found({tiers!r}, True, 1024), *found({tiers!r}, False, 1024, 208, 64, 16), "
               f"*found({tiers!r}, None, 1024), *found('q8', False, 1024))")
    assert python.run(["-c", program], None).stdout.split() == "1024 912 96 32 0 992 1024".split()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(python, models, dtype):
    """Answers of the right kind; rounding of the model itself is larger than anything to compare with."""
    job = {"model": models["llama"], "options": OPTIONS | {"dtype": dtype}} | repeating_prompts()
    got = python.serve("q8", {"half": job})["half"]
    assert [len(output) for output in tokens(got)] == [60] * 4


def test_channel_order_of_gguf_plans(python, models, stock, tmp_path):
    """A plan that pairs neighbouring channels, as those from GGUF files do, for a model that pairs halves."""
    path = tiny_plan.write(tmp_path / "pairs.tqkv", last_widths=(8, 8, 8), young_widths=(), style=tiny_plan.PAIRS)
    job = {"model": models["llama"], "options": OPTIONS} | shared_prompts()
    got = python.serve(path, {"shared": job})["shared"]
    assert "error" not in got, got["error"]
    for ours, theirs in zip(outputs(got), outputs(stock["shared"])):
        assert ours["tokens"][0] == theirs["tokens"][0]
        assert ours["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=0.1)


def test_window_within_the_young_tiers(python, models, stock, tmp_path):
    """Its last tier stores nothing, so blocks have the widths of the one before: all of a window of 100 is there."""
    path = tiny_plan.write(tmp_path / "window.tqkv", last_widths=(0, 0, 0), young_widths=(8, 8), window=100)
    job = {"model": models["mistral"], "options": OPTIONS | {"num_gpu_blocks_override": 40}} | shared_prompts()
    got = python.serve(path, {"window": job})["window"]
    assert "error" not in got, got["error"]
    assert outputs(got)[-1]["cached"] == 256
    for ours, theirs in zip(outputs(got), outputs(stock["window"])):
        assert ours["tokens"][0] == theirs["tokens"][0]
        assert ours["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=0.1)


def test_refusals(python, models, f16, tmp_path):
    """Each names the option or the layer."""
    short = tiny_plan.write(tmp_path / "short.tqkv", last_widths=(3, 3))
    windowless = tiny_plan.write(tmp_path / "windowless.tqkv")
    window = {"model": models["mistral"], "options": OPTIONS} | shared_prompts()
    job = {"model": models["llama"], "options": OPTIONS} | shared_prompts()
    assert "--kv-cache-dtype fp8 contradicts TQKV_PLAN" in f16["fp8"]["error"]
    assert re.search("leave --prefix-match-unit away|unexpected keyword argument 'prefix_match_unit'",
                     f16["match unit"]["error"])
    assert "--block-size 40 is not a multiple of 16" in f16["block size"]["error"]
    assert "model.layers.0.self_attn.attn: layer 0: (heads, KV heads" in python.serve(
        windowless, {"window": window})["window"]["error"]
    assert "layer 2: the plan has 2 layers" in python.serve(short, {"short": job})["short"]["error"]


def test_prefix_hashes_tell_plans_apart(python):
    program = ("import os; os.environ['PYTHONHASHSEED'] = '1'; from vllm.v1.core import kv_cache_utils as u; from "
               "vllm.v1.core.kv_cache_utils import init_none_hash; from vllm.utils.hashing import sha256; import "
               "turboquant_vllm as t; t.register(); t.register(); init_none_hash(sha256); "
               "print(u.hash_block_tokens(sha256, None, (1, 2)).hex())")
    hashes = [python.run(["-c", program], plan).stdout.split()[-1] for plan in (None, "f16", "q8", "f16")]
    assert len(set(hashes)) == 3 and hashes[1] == hashes[3]


def test_doctor(python, models, tmp_path):
    path = tiny_plan.write(tmp_path / "tiny.tqkv")
    program = ["-c", "from turboquant_vllm.doctor import main; main()", "doctor", models["llama"], "--dtype", "float32"]
    text = python.run(program, path).stdout
    assert re.search("adapter: (packed state bytes|one head of bytes) in FullAttentionSpec", text)
    assert re.search(r"\n1 +2 x 64 +1024 +132 +260 196 132\n", text), text
    assert "TQKV_PLAN is not set" in python.run(program).stderr
