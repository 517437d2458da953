# SPDX-License-Identifier: Apache-2.0
"""Serves a checkpoint in this process and prints what it did as JSON on the last line.

    python run_engine.py '{"model": ..., "rounds": [[[token, ...], ...], ...], "max_tokens": 16, "options": {...}}'

A round is a list of prompts that run at the same time; rounds follow each other in one engine.
"""
import json
import sys

from vllm import LLM, SamplingParams


def main(job):
    engine = LLM(job["model"], skip_tokenizer_init=True, dtype=job.get("dtype", "float32"), enforce_eager=True,
                 **job.get("options", {}))
    config = engine.llm_engine.vllm_config.cache_config
    result = {"n_blocks": config.num_gpu_blocks, "block_size": config.block_size, "rounds": []}
    for prompts in job["rounds"]:
        sampling = [SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=1,
                                   detokenize=False) for _ in prompts]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        result["rounds"].append([{
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [step[token].logprob for step, token in zip(output.outputs[0].logprobs,
                                                                    output.outputs[0].token_ids)],
            "cached": output.num_cached_tokens} for output in outputs])
    result["metrics"] = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
