#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures quality on real models under real llama.cpp and keeps every number.

    bench/quality.py BUILD [--models smollm2,gemma,qwen] [--contexts 2048,8192] [--ubatch 512]
                     [--profiles 5x,8x,near-lossless] [--caches f16,q8_0,q4_0,ours]
                     [--texts en,code,chat,fr,zh,ja]

Calibrates each model on the shipped text with the tqkv of BUILD (such as build/release), evaluates
on texts that calibration never sees, and puts one row per model, context, cache and text, and one
with "domain": "all", into docs/results/quality.json; that one also has "positions": the first token
of each part of the scored half, and its mean KL. A row that is there already is replaced. Its
"command" measures it again once PLAN is made by `tqkv calibrate MODEL --profile PROFILE -o PLAN`.
A model called NAME-f32 is NAME with f32 weights, whose host rounds no activations (f32_model.c says why);
its plans are those of NAME.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import fetch  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "quality.json"
KEY = ["model", "context", "ubatch", "codec", "profile", "domain"]


def model_file(build, name):
    """The model of that name; NAME-f32 is a copy with f32 weights, made once per build folder."""
    plain = name.removesuffix("-f32")
    model = fetch.fetch(plain)
    if plain == name:
        return model
    copy = build.resolve() / "quality" / f"{name}.gguf"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_suffix(".part")
        subprocess.run([build / "bin" / "f32_model", model, part], check=True)
        part.rename(copy)
    return copy


def words(text):
    return text.split(",")


def calibrate(tqkv, build, model, profiles):
    """Plans, made once per build folder. What was made is in a file beside them."""
    folder = build.resolve() / "quality"
    kept = folder / f"{model.stem}.json"
    plans = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [profile for profile in profiles if profile not in plans]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([tqkv, "calibrate", model, "--profile", ",".join(missing), "-o", f"{folder}/", "--json"],
                              check=True, stdout=subprocess.PIPE)
        plans |= {plan["profile"]: plan["path"] for plan in json.loads(done.stdout)["plans"]}
        kept.write_text(json.dumps(plans))
    return [plans[profile] for profile in profiles]


def measure(tqkv, model, plans, args, context):
    texts = fetch.fetch("texts") / "eval"
    command = [tqkv, "eval", model, "--cache", ",".join(args.caches), "-c", context, "-ub", args.ubatch, "--json", "-"]
    for name in args.texts:
        command += ["--text", texts / f"{name}.txt"]
    for plan in plans:
        command += ["--plan", plan]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)["results"]


def rows_of(name, model, result, args):
    """Rows of one cache: a text each, and all of them together."""
    ours = result["cache"].startswith("ours ")
    profile = result["cache"].split()[1] if ours else ""
    cache = "ours --plan PLAN" if ours else result["cache"]
    for part in [*result["texts"], {**result, "text": "all.txt", "tokens": result["n_scored"]}]:
        domain = part["text"].removesuffix(".txt")
        texts = args.texts if domain == "all" else [domain]
        listed = " ".join(f"--text {text}.txt" for text in texts)
        yield {"model": name, "context": result["n_ctx"], "ubatch": result["n_ubatch"],
               "codec": "turboquant" if ours else result["cache"], "profile": profile, "bits": result["bits"],
               "domain": domain, "kl_mean": part["kl_mean"], "kl_ci95": part["kl_ci95"],
               "kl_median": part["kl_median"], "kl_p999": part["kl_p999"], "top1": part["top1"],
               "tokens": part["tokens"],
               "command": f"tqkv eval {model.name} --cache {cache} -c {result['n_ctx']} -ub {result['n_ubatch']} "
                          + listed,
               **({"positions": [[part["first"], part["kl_mean"]] for part in result["positions"]]}
                  if domain == "all" else {})}


def keep(new):
    """Adds rows to the results, in order, in place of older ones."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    table = {tuple(row[field] for field in KEY): row for row in [*old, *new]}
    RESULTS.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(table[key]) for key in sorted(table))
    RESULTS.write_text(f"[\n{lines}\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--models", type=words, default=["smollm2", "gemma", "qwen"])
    parser.add_argument("--contexts", type=words, default=["2048", "8192"])
    parser.add_argument("--ubatch", default="512")
    parser.add_argument("--profiles", type=words, default=["5x", "8x", "near-lossless"])
    parser.add_argument("--caches", type=words, default=["f16", "q8_0", "q4_0", "ours"])
    parser.add_argument("--texts", type=words, default=["en", "code", "chat", "fr", "zh", "ja"])
    args = parser.parse_args()
    tqkv = args.build / "bin" / "tqkv"
    for name in args.models:
        model = model_file(args.build, name)
        plans = calibrate(tqkv, args.build, fetch.fetch(name.removesuffix("-f32")), args.profiles)
        for context in args.contexts:
            for result in measure(tqkv, model, plans, args, context):
                keep(list(rows_of(name, model, result, args)))


if __name__ == "__main__":
    main()
