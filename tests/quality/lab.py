#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tries a variant of the codec on a real model (tests/quality/kv_lab says how).

    tests/quality/lab.py smollm2 --bits 2.0 --frame 256 --keep "frames of 256"

prints KL and its ratio to the shipped variant, or to that of --base, on the same tokens; --keep adds the row, with
this command, to docs/results/variants.json. The library is that of TQKV_LIBRARY or build/release.
"""
import argparse
import os
import pathlib
import shlex
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", "integrations/python", "integrations/transformers")]

import torch  # noqa: E402

from kv_lab import lab_table, lab_tails, lab_variant  # noqa: E402


def numbers(text):
    return tuple(int(part) for part in text.split(","))


def tiers(text):
    return tuple((int(tokens), float(bits)) for tokens, bits in (part.split("@") for part in text.split(",")))


def base_of(text):
    """{name: value} of a variant, such as lab_variant.SHIPPED."""
    made = vars(parser().parse_args(["smollm2", *shlex.split(text)]))
    return {name: made[name] for name in lab_variant.SHIPPED}


def parser():
    made = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add = made.add_argument
    add("model", choices=["smollm2", "qwen", "gemma"])
    add("--base", type=base_of, default=lab_variant.SHIPPED, metavar="OPTIONS",
        help="of the variant that ratios are to, quoted; sensitivities are measured with its frames and gamma")
    add("--device", default="cpu", help="that the model runs on, such as cuda; results are the same but for rounding")
    add("--bits", type=float, default=2.0, help="per value, everything counted at --context")
    add("--context", type=int, default=8192, help="that the plan is made for")
    add("--n", type=int, default=4096, help="tokens of each text")
    add("--scored", type=int, default=256,
        help="of them at the end; 0: the second half, and errors add up as they do in use")
    add("--chunk", type=int, default=512, help="tokens attended before they are coded, with --scored 0")
    add("--texts", default="en,zh")
    add("--by-text", action="store_true", help="keep the mean KL of each text, too")
    add("--threads", type=int, default=1)
    add("--plan", help="a .tqkv instead of a plan made here")
    add("--save", help="write the plan to this .tqkv")
    add("--keep", metavar="NAME", help="put the row into docs/results/variants.json")
    add("--tables", metavar="NAMES", help="of docs/QUALITY.md that the row is kept for, if not that of its model and n")
    add("--frame", type=int, default=1024, help="tokens; 0: absolute positions")
    add("--frame-full", type=int, help="of layers without a window, where the model has others")
    add("--offsets", action="store_true", help="remove mean + R(j) b instead of a mean")
    add("--transform", choices=["both", "hadamard", "eigen"], default="both")
    add("--gamma", type=float, default=0.5)
    add("--band", type=int, default=0, help="channels that one Hadamard mixes")
    add("--step", type=int, default=0, help="units of 16 channels that share a width")
    add("--spread", type=int, default=0, help="tokens: metric of K averaged over queries from so far away")
    add("--no-w-o", action="store_true", help="in the metric of V")
    add("--widths", type=numbers, default=(0, 1, 2, 3, 4, 5, 6, 8))
    add("--scale", choices=["search", "rms", "fine", "coarse", "free"], default="search")
    add("--calibration", default="mixed")
    add("--calibration-tokens", type=int, default=lab_variant.N_TOKENS)
    add("--sensitivity", choices=["layer", "head", "none"], default="layer")
    add("--probes", type=int, default=16, help="pieces of text that sensitivities are measured on")
    add("--probe-text", default="mixed", help="that they are pieces of")
    add("--k-share", type=float, help="of the old tokens' bytes")
    add("--tiers", type=tiers, default=((32, 8.0), (224, 6.0), (768, 4.0)))
    add("--fixed-tiers", action="store_true",
        help="leave the last young tier as short as it is given, however much room is left")
    add("--exact", default="", help="K or V of layers left exact, as 5K,5V,17K: where the loss comes from")
    add("--tails", action="store_true", help="say how heavy the tails are that the codes meet, and nothing else")
    return made


def main(argv):
    args = parser().parse_args(argv)
    os.environ.setdefault("TQKV_LIBRARY", str(ROOT / "build" / "release" / "lib" / "libturboquant.so"))
    torch.set_num_threads(args.threads)
    if args.tails:
        for row in lab_tails.tails(lab_variant.load(args.model, args.device), args.frame,
                                  lab_variant.N_TOKENS):
            print(lab_tails.line(row), flush=True)
        return
    row = lab_variant.run(args)
    row["command"] = "tests/quality/lab.py " + shlex.join(lab_table.without_keep(argv))
    print(lab_table.line(row), flush=True)
    if args.keep:
        tables = {"tables": args.tables.split(",")} if args.tables else {}
        lab_table.keep({"variant": args.keep, **tables, **row})


if __name__ == "__main__":
    main(sys.argv[1:])
