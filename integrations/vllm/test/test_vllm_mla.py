# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's latent attention (MLA) in a real vLLM on the CPU: a tiny checkpoint with the true shape of the latents.

Prompts see each other as they came in both engines, so first tokens are the same whatever the plan. The built-in plan
`f16` rounds latents to f16 and moves a log probability here by less than .02, which may break a tie; 8 bits move it by
less than .5.
"""
import json
import random
import re

import pytest
import tiny_plan
from test_vllm_engine import growing_prompts, outputs, random_tokens, repeating_prompts, tokens
from tiny_checkpoint import LATENT, LAYERS, ROPE

OPTIONS = {"max_num_seqs": 4, "max_model_len": 1024, "attention_backend": "CPU_MLA"}
F16_LOGPROB_MAX = 0.02
EIGHT_BITS_LOGPROB_MAX = 0.5
# As vLLM is with MLA on other devices: its platform class switches both off for MLA on the CPU.
CUT_PROMPTS = """
import json, sys
from vllm.platforms.cpu import CpuPlatform
update = CpuPlatform.check_and_update_config.__func__
def updated(cls, config):
    update(cls, config)
    config.scheduler_config.enable_chunked_prefill = config.cache_config.enable_prefix_caching = True
    config.scheduler_config.max_num_batched_tokens = 64
CpuPlatform.check_and_update_config = classmethod(updated)
import run_engine
run_engine.main(json.loads(sys.argv[1]))
"""


def four_prompts():
    rng = random.Random(1)
    return {"rounds": [[random_tokens(rng, n) for n in (300, 150, 40, 9)]], "max_tokens": 24}


def shared_prompts():
    """The second round finds the first in the prefix cache, where there is one."""
    rng = random.Random(5)
    shared = random_tokens(rng, 200)
    return {"rounds": [[shared + random_tokens(rng, n) for n in (20, 1, 70)], [shared + random_tokens(rng, 30)]],
            "max_tokens": 12}


@pytest.fixture(scope="module")
def model(python, checkpoint):
    has = "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E; print('CPU_MLA' in E.__members__)"
    if "True" not in python.run(["-c", has]).stdout:
        pytest.skip("this vLLM has no CPU_MLA backend")
    return checkpoint("deepseek")


@pytest.fixture(scope="module")
def stock(python, model):
    common = {"model": model, "options": OPTIONS}
    return python.serve(None, {"four": common | four_prompts(), "growing": common | growing_prompts(),
                               "shared": common | shared_prompts()})


@pytest.fixture(scope="module")
def f16(python, model):
    common = {"model": model, "options": OPTIONS}
    few = OPTIONS | {"num_gpu_blocks_override": 36, "max_model_len": 512}
    return python.serve("f16", {"four": common | four_prompts(),
                                "growing": common | {"options": few} | growing_prompts(),
                                "fp8": common | {"options": OPTIONS | {"kv_cache_dtype": "fp8"}} | four_prompts()})


@pytest.fixture(scope="module")
def tiered(python, model, tmp_path_factory):
    """Tiers of 8 and 6 bits, then 3 and 4."""
    path = tiny_plan.write_latent(tmp_path_factory.mktemp("plan") / "latent.tqkv")
    plain = {"model": model, "options": OPTIONS} | repeating_prompts()
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    drafting = plain | {"options": OPTIONS | {"speculative_config": drafts}}  # last: vLLM starts no engine after drafts
    return python.serve(path, {"plain": plain, "drafts": drafting})


def assert_near(result, stock):
    """The same tokens, but that one request may go on otherwise behind two tokens that are as likely."""
    assert "error" not in result, result["error"]
    parted = [ours != theirs for ours, theirs in zip(tokens(result), tokens(stock), strict=True)]
    assert sum(parted) <= 1
    for ours, theirs in zip(outputs(result), outputs(stock)):
        for a, b, one, other in zip(ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"]):
            assert abs(one - other) < F16_LOGPROB_MAX
            if a != b:
                break


def test_f16_is_the_stock_engine(stock, f16):
    """Four requests at a time, prompts and decodes in one batch."""
    assert_near(f16["four"], stock["four"])


def test_preemption(stock, f16):
    """Too few blocks for four requests: some are thrown out and read again."""
    assert f16["growing"]["metrics"]["vllm:num_preemptions"] > 0
    assert_near(f16["growing"], stock["growing"])


def test_two_ranks_are_the_stock_engine(python, model):
    """Each has all of the latents and half of the query heads."""
    job = {"model": model, "options": OPTIONS | {"tensor_parallel_size": 2}} | four_prompts()
    stock, f16 = (python.serve(plan, {"two": job}, n_ranks=2)["two"] for plan in (None, "f16"))
    assert_near(f16, stock)


def test_prompts_behind_stored_tokens(python, model, stock):
    """Prompts that are cut, and prefix hits, beside decodes."""
    job = {"model": model, "options": OPTIONS} | shared_prompts()
    got = python.run(["-c", CUT_PROMPTS, json.dumps([job])], "f16")
    assert got.returncode == 0, got.stderr[-4000:]
    result = json.loads([line for line in got.stdout.splitlines() if line.startswith("[{")][-1])[0]
    assert_near(result, stock["shared"])
    assert outputs(result)[-1]["cached"] >= 192


@pytest.mark.parametrize("style", [tiny_plan.PAIRS, tiny_plan.HALVES])
def test_eight_bits_are_near(python, model, stock, tmp_path, style):
    """Codes, of a plan that pairs channels of the rotated key as the model does or in halves."""
    path = tiny_plan.write(tmp_path / "wide.tqkv", last_widths=(8, 8, 8), young_widths=(), style=style,
                           dims=(ROPE, LATENT), is_latent=True)
    got = python.serve(path, {"four": {"model": model, "options": OPTIONS} | four_prompts()})["four"]
    assert "error" not in got, got["error"]
    for ours, theirs in zip(outputs(got), outputs(stock["four"])):
        assert ours["tokens"][:2] == theirs["tokens"][:2]
        assert ours["logprobs"][:2] == pytest.approx(theirs["logprobs"][:2], abs=EIGHT_BITS_LOGPROB_MAX)


def test_room_grows_as_counted(stock, tiered):
    """By the bytes of a token in blocks, less what copies of young tokens take."""
    result = tiered["plain"]
    assert "error" not in result, result["error"]
    stock_bytes = LAYERS * (LATENT + ROPE) * 4
    bytes_now = sum((LATENT + ROPE) * width // 8 + 2 for width in (3, 4, 3))  # codes, scales of K and V
    beside = float(re.search(r"turboquant: ([\d.]+) GiB of 1.00 GiB", tiered["log"]).group(1))
    ratio = result["n_blocks"] / stock["four"]["n_blocks"]
    assert (1 - beside - .01) * stock_bytes / bytes_now <= ratio <= (1 - beside + .01) * stock_bytes / bytes_now
    said = [int(n.replace(",", "")) for n in re.findall(r"KV cache size: ([\d,]+) tokens", tiered["log"])]
    assert said[0] == pytest.approx(result["n_blocks"] * result["block_size"], rel=2e-3)


def test_ngram_drafts_change_nothing(tiered):
    """Accepted and rejected drafts, of unlike numbers in a batch, over coded tokens of every tier."""
    assert "error" not in tiered["drafts"], tiered["drafts"]["error"]
    metrics = tiered["drafts"]["metrics"]
    assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"] < metrics["vllm:spec_decode_num_draft_tokens"]
    assert tokens(tiered["drafts"]) == tokens(tiered["plain"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(python, model, dtype):
    """Answers of the right kind; rounding of the model itself is larger than anything to compare with."""
    job = {"model": model, "options": OPTIONS | {"dtype": dtype}} | four_prompts()
    got = python.serve("q8", {"half": job})["half"]
    assert "error" not in got, got["error"]
    assert [len(output) for output in tokens(got)] == [24] * 4


def test_fp8_caches_are_refused(f16):
    assert "--kv-cache-dtype fp8 contradicts TQKV_PLAN" in f16["fp8"]["error"]
