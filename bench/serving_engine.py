# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine, for serving.py: what its model computes for prompts, and how fast it serves a load.

    python serving_engine.py JOB.json OUT.npz

JOB: {"model": folder, "options": {of vllm.LLM}, "prompts": [[token, ...], ...], "load": [[token, ...], ...],
"load_tokens": n, "rounds": n}. Prompts run one after another; OUT has "hidden<i>", [n - cached][channels] f32 of prompt
i behind the last norm, for the tokens that were not in the prefix cache, and "cached", tokens of each prompt that were.
The load runs at once, `rounds` times after one that warms up; "seconds" has a number for each round.
"""
import json
import sys
import time

import numpy as np
import torch
from vllm import LLM, SamplingParams


def sampling(n_tokens):
    return SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)


def generate(engine, prompts, n_tokens):
    return engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling(n_tokens), use_tqdm=False)


def read_prompts(engine, prompts):
    """What goes into OUT for them."""
    steps, out, cached = [], {}, []

    def listen(model):
        return model.model.norm.register_forward_hook(
            lambda _module, _inputs, output: steps.append(
                (output[0] if isinstance(output, tuple) else output).detach().to("cpu", torch.float32, copy=True)))

    hooks = engine.apply_model(listen)
    for i, prompt in enumerate(prompts):
        steps.clear()
        cached.append(generate(engine, [prompt], 1)[0].num_cached_tokens or 0)
        out[f"hidden{i}"] = torch.cat(steps)[:len(prompt) - cached[-1]].numpy()
    for hook in hooks:
        hook.remove()
    return out | {"cached": np.array(cached)}


def serve_load(engine, prompts, n_tokens, n_rounds):
    """Seconds of each round."""
    seconds = []
    for _ in range(1 + n_rounds):
        start = time.perf_counter()
        generate(engine, prompts, n_tokens)
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[1:])


def main(job, out):
    engine = LLM(job["model"], skip_tokenizer_init=True, **job["options"])
    found = read_prompts(engine, job["prompts"])
    if job["load"]:
        found["seconds"] = serve_load(engine, job["load"], job["load_tokens"], job["rounds"])
    found["room_tokens"] = np.array(engine.llm_engine.vllm_config.cache_config.num_gpu_blocks *
                                    engine.llm_engine.vllm_config.cache_config.block_size)
    np.savez(out, **found)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as stream:
        main(json.load(stream), sys.argv[2])
