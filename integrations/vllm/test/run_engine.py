# SPDX-License-Identifier: Apache-2.0
"""Serves checkpoints in this process, one job after another, and prints what they did as JSON on one line.

    python run_engine.py '[{"model": ..., "rounds": [[[token, ...], ...], ...], "max_tokens": 16, "options": {...}}]'

A round is a list of prompts that run at the same time; rounds follow each other in one engine. A job whose engine does
not start gives {"error": text} instead.
"""
import gc
import json
import sys
import traceback

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def generate(engine, prompts, max_tokens):
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [{"tokens": list(output.outputs[0].token_ids),
             "logprobs": [step[token].logprob for step, token in zip(output.outputs[0].logprobs,
                                                                     output.outputs[0].token_ids)],
             "cached": output.num_cached_tokens} for output in outputs]


def serve(job):
    options = {"dtype": "float32", "enforce_eager": True} | job["options"]
    engine = LLM(job["model"], skip_tokenizer_init=True, disable_log_stats=False, **options)
    config = engine.llm_engine.vllm_config.cache_config
    return {"n_blocks": config.num_gpu_blocks, "block_size": config.block_size,
            "rounds": [generate(engine, prompts, job["max_tokens"]) for prompts in job["rounds"]],
            "metrics": {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}}


def main(jobs):
    results = []
    for job in jobs:
        try:
            results.append(serve(job))
        except Exception:
            results.append({"error": traceback.format_exc()})
        gc.collect()
        cleanup_dist_env_and_memory()
    print("\n" + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
