#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures a plan in vLLM against the stock engine: quality, prefix hits, room, throughput.

    bench/serving.py PLAN --model smollm2 [--texts en,code,zh] [--context 2048] [--pieces 6] [--load 0] [--shared N]
                     [--rounds 3] [--device cuda --python PYTHON]

kl        mean KL of the second half of --context tokens of each text, read in chunks of --chunk
hit       mean KL of the 64 tokens behind a prefix of 1024, of --pieces places of each text: read in one go; after a
          prefix hit right behind the request that left it; after one when all the others have come in between
room      tokens that fit into --gib, by vLLM's own count, as a multiple of a stock cache of 16 bits
load      seconds for --load requests at once, each of --context tokens: --shared that are those of all (all but 128),
          its own, and 64 that are generated; stock by ours, median of rounds and their spread

On the CPU weights and the stock cache are f32, so nothing else rounds; vLLM is that of scripts/vllm_env.py. On a CUDA
device both are f16, and the load runs with captured graphs. The model is the GGUF file of scripts/fetch.py as a
checkpoint, made once under build/. Rows go into docs/results/vllm.json.
"""
import argparse
import copy
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", "tests/quality", "integrations/python",
                                                  "integrations/transformers")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import fetch  # noqa: E402
from kv_lab.lab_model import LabModel  # noqa: E402
from turboquant_transformers.sensitivity import kl_of  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "vllm.json"
PREFIX, TAIL = 1024, 64
ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


class Engines:
    """Runs serving_engine.py, stock or with the plan, on one checkpoint. What prompts compute is listened to by hooks,
    which a compiled model has not."""

    def __init__(self, python, checkpoint, plan, on_device, options):
        self.python, self.checkpoint, self.plan, self.eager = python, checkpoint, plan, not on_device
        self.options = {"dtype": "float32"} | options
        if on_device:
            self.options |= {"dtype": "float16", "gpu_memory_utilization": 0.1}  # the room is given
        self.stock_bits = 16 if on_device else 32

    def run(self, has_plan, prompts=(), load=(), rounds=0, prefix_caching=True):
        print(f"serving: {'the plan' if has_plan else 'stock'}, {len(prompts)} prompts, a load of {len(load)}, "
              f"{'with' if prefix_caching else 'without'} prefix caching", file=sys.stderr)
        env = {name: value for name, value in os.environ.items() if name not in ("TQKV_PLAN", "PYTHONPATH")}
        env = env | ENV | ({"TQKV_PLAN": str(self.plan)} if has_plan else {})
        options = self.options | {"enable_prefix_caching": prefix_caching, "enforce_eager": self.eager or not load}
        job = {"model": str(self.checkpoint), "prompts": prompts, "load": load, "load_tokens": TAIL, "rounds": rounds,
               "options": options}
        with tempfile.TemporaryDirectory() as folder:
            path, out = pathlib.Path(folder) / "job.json", pathlib.Path(folder) / "out.npz"
            path.write_text(json.dumps(job), encoding="utf-8")
            done = subprocess.run([self.python, ROOT / "bench" / "serving_engine.py", path, out], env=env, check=False,
                                  capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"serving: the engine failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            with np.load(out) as arrays:
                return dict(arrays)


def save_checkpoint(net, folder):
    """Its f32 weights; transformers itself does not save what came from a GGUF file."""
    config = copy.deepcopy(net.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(net)(config)
    plain.load_state_dict(net.state_dict())
    plain.save_pretrained(folder)


def divergences(net, want, got):
    """[n] KL of the distributions behind hidden states [n][channels]."""
    with torch.no_grad():
        return kl_of(*(net.lm_head(torch.from_numpy(hidden)) for hidden in (want, got))).numpy()


def numbers_of(kl):
    return {"kl_mean": float(kl.mean()), "kl_median": float(np.median(kl)), "kl_p999": float(np.quantile(kl, .999)),
            "tokens": len(kl)}


def quality(engines, net, texts, context, base):
    """A row for each text and one for all."""
    prompts = [tokens[:context] for tokens in texts.values()]
    want, got = (engines.run(has_plan, prompts, prefix_caching=False) for has_plan in (False, True))
    by_text = {name: divergences(net, *(run[f"hidden{i}"][context // 2:] for run in (want, got)))
               for i, name in enumerate(texts)}
    by_text["all"] = np.concatenate(list(by_text.values()))
    room = float(got["room_tokens"] / want["room_tokens"]) * 16 / engines.stock_bits
    return [*(base | {"measure": "kl", "domain": name, "context": context} | numbers_of(kl)
              for name, kl in by_text.items()),
            base | {"measure": "room", "ratio_f16": room, "tokens": int(got["room_tokens"])}]


def prefix_hits(engines, net, texts, n_pieces, base):
    whole = [tokens[at:at + PREFIX + TAIL] for tokens in texts.values()
             for at in range(0, n_pieces * 2 * PREFIX, 2 * PREFIX)]
    prefixes = [prompt[:PREFIX] for prompt in whole]
    in_turn = [prompt for pair in zip(prefixes, whole) for prompt in pair]
    n = len(whole)
    # Prompts, whether they are cached, and which of them are those of `whole`.
    runs = {"one go": (whole, False, slice(n)), "hit": (in_turn, True, slice(1, None, 2)),
            "hit after others": (prefixes + whole, True, slice(n, None))}
    want = engines.run(False, whole, prefix_caching=False)
    rows = []
    for case, (prompts, caching, at) in runs.items():
        got = engines.run(True, prompts, prefix_caching=caching)
        cached = got["cached"][at]
        if caching and not np.all((cached > 0) & (cached <= PREFIX)):
            sys.exit(f"serving: {case}: cached {cached.tolist()} tokens of {PREFIX}")
        kl = np.concatenate([divergences(net, want[f"hidden{i}"][-TAIL:], got[f"hidden{j}"][-TAIL:])
                             for i, j in enumerate(range(len(prompts))[at])])
        rows.append(base | {"measure": "hit", "case": case, "cached": float(cached.mean())} | numbers_of(kl))
    return rows


def load_prompts(tokens, n_requests, context, n_shared):
    """Prompts that leave room for what is generated; `n_shared` first tokens are those of all."""
    n_own = context - TAIL - n_shared
    return [tokens[:n_shared] + tokens[at:at + n_own]
            for at in range(n_shared + 2 * TAIL, n_shared + 2 * TAIL + n_requests * n_own, n_own)]


def load(engines, texts, n_requests, context, n_shared, n_rounds, base):
    prompts = load_prompts(next(iter(texts.values())), n_requests, context, n_shared)
    stock, ours = (engines.run(has_plan, load=prompts, rounds=n_rounds)["seconds"] for has_plan in (False, True))
    generated = n_requests * TAIL
    return [base | {"measure": "load", "requests": n_requests, "context": context, "shared": n_shared,
                    "ratio": float(np.median(stock) / np.median(ours)), "ratio_low": float(stock.min() / ours.max()),
                    "ratio_high": float(stock.max() / ours.min()), "tokens_per_s": float(generated / np.median(ours)),
                    "tokens_per_s_stock": float(generated / np.median(stock)), "rounds": n_rounds}]


def keep(rows):
    def key(row):
        return [row.get(field) for field in ("model", "profile", "measure", "domain", "case", "context", "requests",
                                              "shared", "device", "gib")]

    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = [key(row) for row in rows]
    kept = [row for row in old if key(row) not in new] + rows
    RESULTS.write_text(json.dumps(sorted(kept, key=lambda row: list(map(str, key(row)))), indent=0) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("plan", type=pathlib.Path)
    add("--model", choices=["smollm2", "qwen"], default="smollm2")
    add("--python", default=fetch.cache_dir() / "vllm-venv" / "bin" / "python")
    add("--profile", default="5x", help="name of the plan in the rows")
    add("--texts", default="en,code,zh")
    add("--context", type=int, default=2048)
    add("--pieces", type=int, default=6)
    add("--load", type=int, default=0)
    add("--shared", type=int)
    add("--rounds", type=int, default=3)
    add("--chunk", type=int, default=512, help="tokens of a step at most")
    add("--gib", type=int, default=1, help="room for the cache, copies counted")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def main():
    arguments = parse()
    model = LabModel(arguments.model)
    checkpoint = ROOT / "build" / "checkpoints" / arguments.model
    if not (checkpoint / "config.json").exists():
        save_checkpoint(model.net, checkpoint)
    n_shared = arguments.context - 2 * TAIL if arguments.shared is None else arguments.shared
    n = max(n_shared + 2 * TAIL + arguments.load * (arguments.context - TAIL - n_shared),
            arguments.context, arguments.pieces * 2 * PREFIX)
    texts = {name: model.held_out(name, n).tolist() for name in arguments.texts.split(",")}
    for name, tokens in texts.items():
        if len(tokens) < n:
            sys.exit(f"serving: {name} has {len(tokens)} tokens, {n} are needed: fewer requests, or a shorter context")
    on_device = arguments.device == "cuda"
    engines = Engines(arguments.python, checkpoint, arguments.plan.resolve(), on_device,
                      {"max_num_batched_tokens": arguments.chunk, "max_num_seqs": max(arguments.load, 2),
                       "max_model_len": max(arguments.context, PREFIX + TAIL) + 1,
                       "kv_cache_memory_bytes": arguments.gib << 30})
    base = {"model": arguments.model, "profile": arguments.profile,
            "command": "bench/serving.py " + shlex.join(sys.argv[1:])}
    if on_device:
        base |= {"device": torch.cuda.get_device_name(), "gib": arguments.gib}
    if arguments.load:
        rows = load(engines, texts, arguments.load, arguments.context, n_shared, arguments.rounds, base)
    else:
        rows = quality(engines, model.net, texts, arguments.context, base)
        rows += prefix_hits(engines, model.net, texts, arguments.pieces, base)
    keep(rows)
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items() if name != "command"))


if __name__ == "__main__":
    main()
