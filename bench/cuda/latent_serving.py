#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Serves loads with vLLM as it is and with the plugin, a model of DeepSeek-V2-Lite's shapes with made-up weights (27 layers
of latent attention, 16 heads; every layer with the dense MLP, no experts). What a load takes does not depend on weights.

    latent_serving.py --python PYTHON [--json F]      PYTHON: of a vLLM with CUDA, the plugin and its CUDA library

Each engine runs alone and says how many tokens its cache holds and how long each round of a load took, the first of
which fills caches:

    shared   32 requests over one prefix of 3968 tokens, 64 of their own, 64 to write
    own      64 requests of 4032 tokens that share nothing, 128 to write
"""
import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
HEADS, LATENT, ROTATED = 16, 512, 64
TIERS = [[8] * 8, [6] * 8, [4] * 8, [4, 3, 3, 2, 2, 2, 2, 2]]  # widths of the latent; the rotated key has 8 bits
TIER_TOKENS = [128, 128, 768, 0]
ROUNDS = {"shared": 5, "own": 3}
TO_WRITE = {"shared": 64, "own": 128}


def config(n_layers):
    return {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
            "num_hidden_layers": n_layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": LATENT,
            "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": ROTATED, "v_head_dim": 128,
            "intermediate_size": 10944, "moe_intermediate_size": 1408, "first_k_dense_replace": n_layers,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "vocab_size": 102400,
            "max_position_embeddings": 16384, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float16",
            "attention_bias": False}


def plan(n_layers):
    """Bytes of a plan; random rotations as transforms."""
    sys.path.insert(0, str(HERE.parents[1] / "tests" / "oracle"))
    import numpy as np
    import plan_writer
    rng = np.random.default_rng(1)

    def side(dim, widths_of_tiers):
        units = dim // 16
        return [{"layouts": [[widths[i * 8 // units] for i in range(units)] for widths in widths_of_tiers],
                 "mean": np.zeros(dim, np.float32), "weight": np.ones(units, np.float32),
                 "matrix": np.linalg.qr(rng.standard_normal((dim, dim)))[0]}]
    inv_freq = (1e4 ** -(np.arange(ROTATED // 2) * 2.0 / ROTATED)).astype(np.float32)
    layer = {"n_heads": HEADS, "k_dim": ROTATED, "v_dim": LATENT | 1 << 31, "window": 0, "rope": (2, ROTATED, inv_freq),
             "tier_tokens": TIER_TOKENS, "sides": [side(ROTATED, [[8] * 8] * 4), side(LATENT, TIERS)]}
    return plan_writer.write_plan({"names": ["bench", "", "5x"], "n_tiers": 4, "n_sinks": 4, "frame_tokens": 1024,
                                   "context": 4096, "bits_total": 3.0, "layers": [layer] * n_layers})


def loads(n_requests):
    rng = random.Random(1)
    tokens = [rng.randrange(1000, 100000) for _ in range(5000 + 4032 * n_requests)]
    return {"shared": [tokens[:3968] + tokens[4000 + i:4064 + i] for i in range(0, 32 * n_requests, 64)],
            "own": [tokens[5000 + i:5000 + i + 4032] for i in range(0, 4032 * n_requests, 4032)]}


def serve(model, n_requests, cache_bytes):
    """In the process of an engine: prints what main() collects."""
    from vllm import LLM, SamplingParams
    size = {"kv_cache_memory_bytes": cache_bytes, "gpu_memory_utilization": .3} if cache_bytes else {}
    engine = LLM(model, skip_tokenizer_init=True, dtype="float16", load_format="dummy", max_num_batched_tokens=4096,
                 max_num_seqs=64, max_model_len=4224, enable_prefix_caching=True, block_size=64, **size)
    cache = engine.llm_engine.vllm_config.cache_config
    found = {"tokens": cache.num_gpu_blocks * cache.block_size}
    for name, prompts in loads(n_requests).items():
        sampling = SamplingParams(temperature=0, max_tokens=TO_WRITE[name], ignore_eos=True, detokenize=False)
        found[name] = []
        for _ in range(ROUNDS[name]):
            start = time.perf_counter()
            engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
            found[name].append(round(time.perf_counter() - start, 3))
    print("\n" + json.dumps(found), flush=True)


def run(options, model, plan_path):
    env = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    env.pop("TQKV_PLAN", None)
    if plan_path:
        env["TQKV_PLAN"] = plan_path
    got = subprocess.run([options.python, __file__, "--serve", model, "--requests", str(options.requests), "--cache-bytes",
                          str(options.cache_bytes)], env=env, capture_output=True, text=True, check=False)
    lines = [line for line in got.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(got.stdout[-2000:] + got.stderr[-4000:])
    return json.loads(lines[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--requests", type=int, default=64, help="of the load `own`; `shared` has half as many")
    parser.add_argument("--cache-bytes", type=int, default=2 << 30, help="0: what vLLM takes by itself")
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.requests, options.cache_bytes)
    with tempfile.TemporaryDirectory() as folder:
        model, path = pathlib.Path(folder) / "model", pathlib.Path(folder) / "plan.tqkv"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config(options.layers)))
        path.write_bytes(plan(options.layers))
        found = {name: run(options, str(model), plan_path) for name, plan_path in (("stock", None), ("ours", str(path)))}
    for name, result in found.items():
        print(f"{name}: {result['tokens']} tokens, seconds of rounds: shared {result['shared']}, own {result['own']}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
