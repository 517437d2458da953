# SPDX-License-Identifier: Apache-2.0
"""The plugin in a real vLLM on a CUDA device, in f16: what is the same on the CPU in every token is near here.

TQKV_TEST_VLLM_CUDA names the Python of a vLLM with CUDA and both packages. Rounding of f16 decides between tokens that
are about as probable, so runs are compared as far as they choose the same tokens, and by how far that is.
"""
import concurrent.futures
import os

import pytest
import test_vllm_engine as on_cpu
import tiny_plan

OPTIONS = on_cpu.OPTIONS | {"dtype": "float16", "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}
GRAPHS = OPTIONS | {"enforce_eager": False}
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}}


@pytest.fixture(scope="module")
def engine(interpreter):
    path = os.environ.get("TQKV_TEST_VLLM_CUDA")
    if not path:
        pytest.skip("needs vLLM on a CUDA device")
    return interpreter(path)


def processes(models, tiny):
    """{name: (plan, jobs)}; the engines of a process follow each other."""
    shared = {kind: {"model": models[kind], "options": OPTIONS} | on_cpu.shared_prompts() for kind in models}
    growing = {"model": models["llama"], "options": OPTIONS} | on_cpu.growing_prompts()
    preempted = growing | {"options": OPTIONS | {"block_size": 64, "num_gpu_blocks_override": 10,
                                                 "max_model_len": 512}}
    repeating = {"model": models["llama"]} | on_cpu.repeating_prompts()
    whole = {"max_num_batched_tokens": 1024}
    few = OPTIONS | {"num_gpu_blocks_override": 128}  # of which copies for many sequences would take too much
    returning = {"model": models["llama"], "options": few} | on_cpu.returning_prompts()
    return {
        "stock": (None, shared | {"growing": growing}),
        "q8": ("q8", shared | {"growing": growing, "preempted": preempted,
                               "graphs": shared["llama"] | {"options": GRAPHS}}),
        "tiers": (tiny, {"plain": repeating | {"options": OPTIONS | whole}, "returning": returning,
                         "graphs": repeating | {"options": GRAPHS | whole},
                         "drafts": repeating | {"options": GRAPHS | whole | DRAFTS}}),
    }


def latent_processes(model, tiny):
    shared = {"model": model, "options": OPTIONS} | on_cpu.shared_prompts()
    repeating = {"model": model} | on_cpu.repeating_prompts()
    whole = {"max_num_batched_tokens": 1024}
    return {
        "stock": (None, {"shared": shared}),
        "q8": ("q8", {"shared": shared, "graphs": shared | {"options": GRAPHS}}),
        "tiers": (tiny, {"plain": repeating | {"options": OPTIONS | whole},
                         "drafts": repeating | {"options": GRAPHS | whole | DRAFTS}}),
    }


def run_all(engine, of_processes):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(engine.serve, plan, jobs) for name, (plan, jobs) in of_processes.items()}
        return {name: run.result() for name, run in runs.items()}


@pytest.fixture(scope="module")
def results(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {kind: engine.make_checkpoint(folder / kind, kind) for kind in ("llama", "qwen2")}
    return run_all(engine, processes(models, tiny_plan.write(folder / "tiny.tqkv")))


@pytest.fixture(scope="module")
def latents(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return run_all(engine, latent_processes(engine.make_checkpoint(folder / "deepseek", "deepseek"),
                                            tiny_plan.write_latent(folder / "tiny.tqkv")))


def assert_near(ours, theirs, agreement_min, logprob_max):
    """agreement: generated tokens up to the first that differs, of all."""
    for result in (ours, theirs):
        assert "error" not in result, result["error"]
    n_same = n_all = 0
    furthest = 0.0
    for one, other in zip(on_cpu.outputs(ours), on_cpu.outputs(theirs)):
        pairs = list(zip(one["tokens"], other["tokens"]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        n_same, n_all = n_same + same, n_all + len(pairs)
        furthest = max([furthest, *(abs(a - b) for a, b in zip(one["logprobs"][:same], other["logprobs"][:same]))])
    print(f"{n_same} of {n_all} tokens, log probabilities within {furthest:.4f}")
    assert n_same >= agreement_min * n_all and furthest <= logprob_max


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_8_bits_are_near_the_stock_engine(results, kind):
    """Four requests at a time, chunked prefill, prefix hits in both rounds."""
    assert_near(results["q8"][kind], results["stock"][kind], .4, .3)


def test_prefix_hits(results):
    """All four blocks of 64 tokens right after they were read; when others have come in between their copies are gone,
    and the tokens of both young tiers, 112, are read again."""
    cached = [output["cached"] for output in on_cpu.outputs(results["tiers"]["returning"])]
    assert cached == [0, 256, 0, *[0] * 8, 128, 128]


def test_preemption(results):
    assert results["q8"]["preempted"]["metrics"]["vllm:num_preemptions"] > 0
    assert_near(results["q8"]["preempted"], results["q8"]["growing"], .8, .3)


@pytest.mark.parametrize("plan, eager", [("q8", "llama"), ("tiers", "plain")])
def test_captured_graphs(results, plan, eager):
    assert_near(results[plan]["graphs"], results[plan][eager], .4, .1)


def test_ngram_drafts(results):
    """Drafts of a sequence all see the tiers of the first of them, so a page that changes its tier in between shows."""
    metrics = results["tiers"]["drafts"]["metrics"]
    assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"] < metrics["vllm:spec_decode_num_draft_tokens"]
    assert_near(results["tiers"]["drafts"], results["tiers"]["plain"], .4, .1)


def test_room_grows_as_counted(results):
    stock_bytes = on_cpu.LAYERS * on_cpu.KV_HEADS * on_cpu.HEAD_SIZE * 2 * 2
    stock, ours = (results[name]["llama"] for name in ("stock", "q8"))
    n_stock, n_ours = (result["n_blocks"] * result["block_size"] for result in (stock, ours))
    ratio = stock_bytes / (on_cpu.LAYERS * tiny_plan.token_bytes(8))
    assert n_ours / n_stock == pytest.approx(ratio, rel=.03)  # less what lies beside blocks


def test_latents_of_8_bits_are_near_the_stock_engine(latents):
    """Four requests at a time, prompts in chunks of 64 tokens, prefix hits."""
    assert_near(latents["q8"]["shared"], latents["stock"]["shared"], .4, .3)


def test_graphs_of_latents(latents):
    assert_near(latents["q8"]["graphs"], latents["q8"]["shared"], .4, .1)


def test_drafts_over_latents(latents):
    metrics = latents["tiers"]["drafts"]["metrics"]
    assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"] < metrics["vllm:spec_decode_num_draft_tokens"]
    assert_near(latents["tiers"]["drafts"], latents["tiers"]["plain"], .4, .1)


def test_room_for_latents_grows_as_counted(latents):
    n_stock, n_ours = (latents[name]["shared"]["n_blocks"] * latents[name]["shared"]["block_size"]
                       for name in ("stock", "q8"))
    assert n_ours / n_stock == pytest.approx((512 + 64) * 2 / (512 + 64 + 2), rel=.05)  # less what lies beside blocks
