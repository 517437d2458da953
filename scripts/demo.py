#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a real model with and without compression and prints one table.

    scripts/demo.py [--full] [--fresh]

Fetches the pinned llama.cpp and SmolLM2-135M, builds everything, calibrates, measures
quality and speed of four caches against f16, and lets the model answer a prompt with
its cache compressed. About fifteen minutes on two cores the first time; after that,
plans and quality are taken from build/demo as long as the model, the texts and the
programs are the same, and only speed and the prompt are run again.

The table is also in build/demo/result.json, and as pictures in build/demo/report.html.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import build_llama
import fetch

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "demo"
MODEL = "smollm2"
SHORT_TEXTS = ["en", "code"]  # one piece of 2048 tokens each
LONG_TEXTS = ["en"]           # one piece of 8192 tokens
STOCK = ["f16", "q8_0", "q4_0"]
PROFILES = {"5x": "ours 5x", "8x": "ours 8x"}
DEPTH = 4096
CALIBRATION = "calibration.json"  # beside the plans
PROMPT = "Explain in three sentences why the sky is blue."
started = time.monotonic()


def say(text):
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"\n== {minutes}:{seconds:02d}  {text}", file=sys.stderr, flush=True)


def run(command, **more):
    """Runs a command whose progress goes to the terminal; ends the demo if it fails."""
    done = subprocess.run([str(part) for part in command], check=False, **more)
    if done.returncode != 0:
        sys.exit(f"demo: failed with status {done.returncode}: {' '.join(str(part) for part in command)}")
    return done


def key_of(paths, *more):
    """A name for what follows from these files and settings."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for path in paths:
        digest.update(fetch.sha256_of(path).encode())
    return digest.hexdigest()[:16]


def build_all():
    say("llama.cpp, unmodified (built once, kept in the cache folder)")
    llama = build_llama.build("api3", "tools", os.cpu_count() or 1)
    say("turboquant")
    folder = BUILD / "cmake"
    run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DTQKV_TESTS=OFF",
         f"-DTQKV_LLAMA={llama}", "--log-level=WARNING"], stdout=subprocess.DEVNULL)
    run(["cmake", "--build", folder], stdout=subprocess.DEVNULL)
    return llama, folder / "bin" / "tqkv", folder / "lib" / "libggml-turboquant.so"


def calibrate(tqkv, plugin, model):
    text = ROOT / "data" / "calibration" / "mixed.txt"
    folder = BUILD / f"plans-{key_of([model, text, tqkv, plugin], list(PROFILES))}"
    kept = folder / CALIBRATION
    if kept.exists():
        say("calibration: done before")
    else:
        say("calibration: once per model")
        folder.mkdir(parents=True, exist_ok=True)
        done = run([tqkv, "calibrate", model, "--profile", ",".join(PROFILES), "-o", f"{folder}/", "--json"],
                   stdout=subprocess.PIPE)
        kept.write_bytes(done.stdout)
    return {plan["profile"]: pathlib.Path(plan["path"]) for plan in json.loads(kept.read_text())["plans"]}


def evaluate(tqkv, plugin, model, plans, texts, n_ctx, caches):
    """The file with all numbers at one context length; kept as long as nothing it follows from changes."""
    kept = BUILD / f"eval-{key_of([model, tqkv, plugin, *plans.values(), *texts], n_ctx, caches)}.json"
    if kept.exists():
        say(f"quality at {n_ctx} tokens: measured before")
    else:
        say(f"quality at {n_ctx} tokens: every cache is fed the same text and compared with f16")
        command = [tqkv, "eval", model, "--cache", ",".join(caches), "-c", n_ctx, "--json", kept]
        for path in plans.values():
            command += ["--plan", path]
        for path in texts:
            command += ["--text", path]
        run(command, stdout=subprocess.DEVNULL)
    return kept


def by_cache(path):
    return {row["cache"]: row for row in json.loads(path.read_text())["results"]}


def draw(tqkv, plan, evals):
    page = BUILD / "report.html"
    run([tqkv, "report", plan, "--calibration", plan.parent / CALIBRATION,
         *[part for path in evals for part in ("--eval", path)], "-o", page])
    return page


def time_decoding(tqkv, model, plans, text):
    say(f"tokens/s at {DEPTH} tokens of context: all caches in turn, so that what else runs hits all alike")
    kept = BUILD / "speed.json"
    command = [tqkv, "eval", model, "--speed-only", "--depth", DEPTH, "--quick-fill", "--text", text,
               "--cache", ",".join([*STOCK, "ours"]), "--json", kept]
    for path in plans.values():
        command += ["--plan", path]
    run(command, stdout=subprocess.DEVNULL)
    return {row["cache"]: row for row in json.loads(kept.read_text())["speed"]}


def make_rows(short, long, speed):
    rows = []
    for cache in short:
        wide = long.get(cache)
        sized = wide or short[cache]  # size counts where the context is longest
        rows.append({"cache": cache, "bits": sized["bits"], "ratio": sized["ratio"],
                     "kl_mean": short[cache]["kl_mean"], "kl_mean_8k": wide and wide["kl_mean"],
                     "top1": short[cache]["top1"], "tokens_per_s": speed[cache]["decode"]})
    return rows


def print_table(rows):
    print(f"\nSmolLM2-135M, KL divergence from an f16 cache (lower is better), {os.cpu_count()} threads\n")
    head = ["cache", "bits/value", "ratio", "KL mean, 2048", "KL mean, 8192", "same top token", f"tokens/s at {DEPTH}"]
    lines = [[row["cache"], f"{row['bits']:.2f}", f"{row['ratio']:.2f}x", f"{row['kl_mean']:.4f}",
              "-" if row["kl_mean_8k"] is None else f"{row['kl_mean_8k']:.4f}", f"{100 * row['top1']:.1f} %",
              f"{row['tokens_per_s']:.1f}"] for row in rows]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    for line in [head, *lines]:
        print("  ".join(text.ljust(width) if i == 0 else text.rjust(width)
                        for i, (text, width) in enumerate(zip(line, widths))))
    print("\nBits and ratio: bytes really held, everything counted, at the longest context measured.\n"
          "The reference is turboquant's own uncompressed cache. The f16 row is llama.cpp's: what it shows is not\n"
          "loss but another order of summation, the least difference that matters.")
    if any(row["kl_mean_8k"] is None for row in rows):
        print("-: llama.cpp fills its quantised caches slowly; --full measures them too (ten minutes more).")


def answer(tqkv, llama, model, plan):
    say(f"a prompt with the cache compressed: {PROMPT}")
    log = BUILD / "completion.log"
    with open(log, "w", encoding="utf-8") as file:
        run([tqkv, "run", "--plan", plan, "--", llama / "bin" / "llama-completion", "-m", model, "-p", PROMPT,
             "-n", "96", "--temp", "0", "-c", "4096", "--no-warmup", "-st"], stdin=subprocess.DEVNULL, stderr=file)
    active = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("turboquant: active")]
    if not active:
        sys.exit(f"demo: the compressed cache was not on; see {log}")
    print("\n".join(active), file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--full", action="store_true", help="measure every cache at 8192 tokens")
    parser.add_argument("--fresh", action="store_true", help="calibrate and measure again")
    args = parser.parse_args()

    say("model and texts")
    model, texts = fetch.fetch(MODEL), fetch.fetch("texts") / "eval"
    llama, tqkv, plugin = build_all()
    if args.fresh:
        for path in [*BUILD.glob("plans-*/*"), *BUILD.glob("eval-*.json")]:
            path.unlink()
    plans = calibrate(tqkv, plugin, model)
    caches = [*STOCK, "ours"]
    short = evaluate(tqkv, plugin, model, plans, [texts / f"{name}.txt" for name in SHORT_TEXTS], 2048, caches)
    long = evaluate(tqkv, plugin, model, plans, [texts / f"{name}.txt" for name in LONG_TEXTS], 8192,
                    caches if args.full else ["f16", "ours"])
    speed = time_decoding(tqkv, model, plans, texts / "en.txt")

    rows = make_rows(by_cache(short), by_cache(long), speed)
    (BUILD / "result.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    page = draw(tqkv, plans["5x"], [long, short])
    answer(tqkv, llama, model, plans["5x"])
    sys.stderr.flush()
    print_table(rows)
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"\nDone in {minutes}:{seconds:02d}. Numbers: {(BUILD / 'result.json').relative_to(ROOT)}; "
          f"pictures: {page.relative_to(ROOT)}; plans: {plans['5x'].parent.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
