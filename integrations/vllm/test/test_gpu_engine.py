# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of latent attention in a real engine on the CPU, with stand-ins for its launches: mla_engine.py."""
import json

import tiny_plan
from test_vllm_engine import outputs, repeating_prompts, returning_prompts, tokens
from test_vllm_mla import OPTIONS, model, shared_prompts  # noqa: F401  (a fixture)

LOGPROB_MAX = 1e-3  # f32 in another order; 2e-5 were seen
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}}


def test_mla_is_the_stock_engine(python, model, tmp_path):  # noqa: F811
    """Prompts in chunks of 64 tokens beside decodes, prefix hits, drafts of unlike numbers; a prefix whose copies are
    gone, as few blocks leave room for copies of few sequences."""
    shared, repeating = {"model": model} | shared_prompts(), {"model": model} | repeating_prompts()
    stock = python.serve(None, {"shared": shared | {"options": OPTIONS}, "drafts": repeating | {"options": OPTIONS}})
    options = {name: value for name, value in OPTIONS.items() if name != "attention_backend"}
    returning = {"model": model, "options": options | {"num_gpu_blocks_override": 64}} | returning_prompts()
    jobs = [shared | {"options": options}, returning, repeating | {"options": options | DRAFTS}]
    got = python.run(["mla_engine.py", tiny_plan.write_latent(tmp_path / "latent.tqkv"), json.dumps(jobs)])
    assert got.returncode == 0, got.stdout[-2000:] + got.stderr[-4000:]
    *_, results, launches = (line for line in got.stdout.splitlines() if line.startswith(("[{", "{")))
    ours = dict(zip(("shared", "returning", "drafts"), json.loads(results)))
    for name, result in zip(stock, (ours["shared"], ours["drafts"])):
        assert "error" not in result, result["error"]
        assert tokens(result) == tokens(stock[name])
        for one, other in zip(outputs(result), outputs(stock[name])):
            assert max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"])) < LOGPROB_MAX
    assert outputs(ours["shared"])[-1]["cached"] == 192
    assert [output["cached"] for output in outputs(ours["returning"])] == [0, 256, 0, *[0] * 8, 128, 128]
    assert "are for copies of young tokens" in got.stdout + got.stderr
    assert ours["drafts"]["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert min(json.loads(launches)[name] for name in ("store", "decode", "gather")) > 0
