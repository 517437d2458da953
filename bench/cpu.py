#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures speed on this CPU, ours and llama.cpp side by side, and keeps every number.

    bench/cpu.py BUILD [--only kernels,layer,encode,smollm2,qwen] [--depths 0,512,2048,8192,32768] [--threads 1,2]
                 [--model-depth 8192] [--prefill-depth 2048] [--results FILE] [--fresh]

kernels  every kernel of every table of this CPU (printed, not kept)
layer    attention and prefill of one layer of the shape of Llama 3 8B (tqkv-bench)
encode   rows to codes, on one core (tqkv-bench)
smollm2, qwen  a whole model under llama.cpp: decoding and prefill (tqkv eval --speed-only)

Rows go to FILE (build/bench/cpu.json) as soon as they are there, and a run measures what is missing
in it, so that it can be stopped and done part by part. --fresh measures all that is asked for anew.
Prefill is of 512 tokens, after no more than --prefill-depth: llama.cpp's quantised caches take minutes
beyond it. Models are not filled beyond --model-depth: our caches have to read every token, about ten minutes
each for 32768. All parts take less than an hour on two cores that do nothing else.

A row: {"model", "threads", "depth", "phase", "cache", "tokens_per_s", "ratio_f16"}, with the spread of both over
rounds in which all caches take turns, and "cpu", "compiler", "commit" and "command". Of the layer "phase" is
"attention" or "prefill": tokens/s that attention in 32 such layers would leave if nothing else were computed.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

import quality

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "bench" / "cpu.json"
KEY = ["model", "phase", "threads", "depth", "cache"]
PARTS = ["kernels", "layer", "encode", "smollm2", "qwen"]
STOCK = ["f16", "q8_0", "q4_0"]
PROFILES = ["5x", "8x"]
OURS = [f"ours {profile}" for profile in PROFILES]
LAYER, LAYERS, PREFILL_TOKENS = "llama-3-8b-layer", 32, 512
PREFILL_ROUNDS = 3
EMPTY_ROUNDS = 100  # there caches differ by hundredths
KERNEL_TESTS = ["test_kernels", "test_tiles", "test_blocks", "test_decode"]


class Results:
    """Rows of a file, which is written whenever some come."""

    def __init__(self, path, is_fresh):
        self.path = path
        rows = json.loads(path.read_text()) if path.exists() else []
        self.rows = {self.key(row): row for row in rows}
        self.wanted_anew = is_fresh
        self.measured = set()

    @staticmethod
    def key(row):
        return tuple(row[field] for field in KEY)

    def lacks(self, model, phase, threads, depth, caches=(*STOCK, *OURS)):
        keys = {(model, phase, threads, depth, cache) for cache in caches}
        known = self.measured if self.wanted_anew else self.rows.keys()
        return not keys <= known

    def keep(self, rows):
        self.rows |= {self.key(row): row for row in rows}
        self.measured |= {self.key(row) for row in rows}
        lines = ",\n".join(json.dumps(self.rows[key]) for key in sorted(self.rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(f"[\n{lines}\n]\n")
        part.rename(self.path)


def commit():
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True,
                          check=False)
    return done.stdout.strip() or "unknown"


class Programs:
    """tqkv and tqkv-bench of a build; what they print as JSON."""

    def __init__(self, build):
        self.build = build
        done = subprocess.run([build / "bin" / "tqkv-bench", "encode", "--rounds", "1", "--heads", "1/1", "--dim", "16",
                               "--json", "-"], check=True, capture_output=True)
        machine = json.loads(done.stdout)["machine"]
        self.facts = {"cpu": f"{machine['cpu']}, {machine['processors']} cores", "compiler": machine["compiler"],
                      "commit": commit()}

    def run(self, name, *args):
        command = [name, *map(str, args)]
        print(f"-- {shlex.join(command)}", file=sys.stderr)
        done = subprocess.run([self.build / "bin" / name, *command[1:], "--json", "-"], check=True,
                              stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    def about(self, name, *args):
        """Where a row comes from. Files go by their names alone."""
        words = [arg.name if isinstance(arg, pathlib.Path) else str(arg) for arg in args]
        return self.facts | {"command": shlex.join([name, *words])}


def time_kernels(programs):
    for name in KERNEL_TESTS:
        subprocess.run([programs.build / "bin" / name, "--bench"], check=True)


def layer_row(row, about):
    """Tokens per second that attention in all layers of the model leaves."""
    def rate(seconds):
        return float(f"{row['n_q'] / LAYERS / seconds:.5g}")
    return {"model": LAYER, "threads": row["threads"], "depth": row["depth"], "phase": row["mode"],
            "cache": row["cache"], "tokens_per_s": rate(row["seconds"]), "tokens_per_s_low": rate(row["seconds_high"]),
            "tokens_per_s_high": rate(row["seconds_low"]), "ratio_f16": row["ratio_f16"],
            "ratio_low": row["ratio_low"], "ratio_high": row["ratio_high"], "bits": row["bits"],
            "bytes_per_s": row["bytes_per_s"], "memory_bytes_per_s": row["memory_bytes_per_s"], **about}


def time_layer(programs, results, args):
    wanted = [("attention", depth) for depth in args.depths if depth > 0]
    wanted += [("prefill", depth) for depth in args.depths if depth <= args.prefill_depth]
    for mode, depth in wanted:
        for threads in args.threads:
            if not results.lacks(LAYER, mode, threads, depth):
                continue
            command = ["tqkv-bench", mode, "-n", depth, "-t", threads]
            command += ["--rounds", PREFILL_ROUNDS] if mode == "prefill" else []
            made = programs.run(*command)["rows"]
            results.keep([layer_row(row, programs.about(*command)) for row in made])


def time_encoding(programs, results):
    command = ["tqkv-bench", "encode"]
    if not results.lacks(LAYER, "encode", 1, 0, ["ours 5x, store, 512 tokens at a time"]):
        return
    results.keep([{"model": LAYER, "threads": 1, "depth": 0, "phase": "encode", "cache": row["cache"],
                   "f16_bytes_per_s": row["f16_bytes_per_s"], "f16_bytes_per_s_low": row["f16_bytes_per_s_low"],
                   "f16_bytes_per_s_high": row["f16_bytes_per_s_high"], **programs.about(*command)}
                  for row in programs.run(*command)["rows"]])


def model_rows(name, speeds, about):
    """Two rows for each speed. The ratio of a quartile to f16's other one is its spread."""
    f16 = {row["n_threads"]: row for row in speeds if row["cache"] == "f16"}
    for row in speeds:
        base = f16[row["n_threads"]]
        for phase in ("decode", "prefill"):
            if not row[f"{phase}_rounds"]:
                continue
            middle, low, high = (row[phase + ending] for ending in ("", "_low", "_high"))
            yield {"model": name, "threads": row["n_threads"], "depth": row["depth"], "phase": phase,
                   "cache": row["cache"], "tokens_per_s": middle, "tokens_per_s_low": low, "tokens_per_s_high": high,
                   "ratio_f16": round(middle / base[phase], 4), "ratio_low": round(low / base[f"{phase}_high"], 4),
                   "ratio_high": round(high / base[f"{phase}_low"], 4), "rounds": row[f"{phase}_rounds"], **about}


def time_model(programs, results, args, name):
    """One depth at a time, so that little is lost when it is stopped. llama.cpp's caches are filled by copying."""
    model = quality.model_file(programs.build, name)
    text = quality.fetch.fetch("texts") / "eval" / "en.txt"
    plans = quality.calibrate(programs.build / "bin" / "tqkv", programs.build, model, PROFILES)
    for depth in [depth for depth in args.depths if depth <= args.model_depth]:
        phases = ["decode", "prefill"] if depth <= args.prefill_depth else ["decode"]
        if not any(results.lacks(name, phase, threads, depth) for phase in phases for threads in args.threads):
            continue
        command = ["tqkv", "eval", model, "--text", text, "--cache", ",".join([*STOCK, "ours"]), "--speed-only",
                   "--quick-fill", "--depth", depth, "--speed-threads", ",".join(map(str, args.threads))]
        command += ["--prefill"] if "prefill" in phases else []
        command += ["--rounds", EMPTY_ROUNDS] if depth == 0 else []
        for plan in plans:
            command += ["--plan", pathlib.Path(plan)]
        results.keep(list(model_rows(name, programs.run(*command)["speed"], programs.about(*command))))


def numbers(text):
    return [int(word) for word in text.split(",")]


def parts(text):
    chosen = text.split(",")
    if not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}")
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--only", type=parts, default=PARTS, metavar="PARTS")
    parser.add_argument("--depths", type=numbers, default=[0, 512, 2048, 8192, 32768])
    parser.add_argument("--model-depth", type=int, default=8192)
    parser.add_argument("--prefill-depth", type=int, default=2048)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    programs = Programs(args.build)
    results = Results(args.results, args.fresh)
    for part in args.only:
        if part == "kernels":
            time_kernels(programs)
        elif part == "layer":
            time_layer(programs, results, args)
        elif part == "encode":
            time_encoding(programs, results)
        else:
            time_model(programs, results, args, part)
    print(f"{len(results.rows)} rows in {args.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
