# SPDX-License-Identifier: Apache-2.0
"""
Calibrates a model once, then generates with a compressed cache.

    python compressed_generate.py MODEL TEXT.txt
"""
import pathlib
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import turboquant


def main(name, text_path):
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    plan = pathlib.Path("model.tqkv")
    if not plan.exists():
        turboquant.calibrate(model, tokenizer, [pathlib.Path(text_path).read_text(encoding="utf-8")], plan)

    model.set_attn_implementation("turboquant")  # without it old keys and values are decoded, on any device
    cache = turboquant.TurboQuantCache(model, plan)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**inputs, cache=cache, max_new_tokens=20)
    print(tokenizer.decode(tokens[0]))
    print(f"{cache.get_seq_length()} tokens in {cache.n_bytes} bytes, {cache.bits_per_value:.2f} bits per value")


if __name__ == "__main__":
    main(*sys.argv[1:])
