# SPDX-License-Identifier: Apache-2.0
"""Models with f32 weights, texts as tokens, and a folder for what is computed once."""
import contextlib
import fcntl
import functools
import os
import pathlib

import torch
import transformers

import fetch
from turboquant_transformers.host_layers import describe
from turboquant_transformers.pieces import hold_back, read_text

ROOT = pathlib.Path(__file__).resolve().parents[3]
SHIPPED_TEXT = ROOT / "data" / "calibration" / "mixed.txt"


class LabModel:
    """name: smollm2, qwen or gemma. device: where the model runs; rows and statistics are on the CPU."""

    def __init__(self, name, device="cpu"):
        self.name = name
        folder, file_name = os.path.split(fetch.fetch(name))
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.net = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file_name,
                                                                     dtype=torch.float32).eval().to(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
        self.layers = describe(self.net)

    @functools.cached_property
    def output_projections(self):
        """[layer] of [n_out][n_heads][v_dim] f32."""
        return [self.net.base_model.layers[index].self_attn.o_proj.weight.detach().cpu()
                .unflatten(1, (layer.n_heads, -1)) for index, layer in enumerate(self.layers)]

    def text(self, path):
        return read_text(self.tokenizer, [pathlib.Path(path).read_text(encoding="utf-8")])

    def held_out(self, name, n):
        """[n] tokens of a text that calibration never sees. name: en, code, chat, fr, zh, …"""
        return self.text(fetch.fetch("texts") / "eval" / f"{name}.txt").piece(0, n)

    def calibration(self, name):
        """Text of what calibration may see. name: mixed is the shipped one, others are code, en, …"""
        path = SHIPPED_TEXT if name == "mixed" else fetch.fetch("texts") / "calib" / f"{name}.txt"
        return hold_back(self.text(path))[0]


def kept(*key):
    """Where something computed once is kept: under $TQKV_CACHE, which can be deleted at any time."""
    folder = fetch.cache_dir() / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("-".join(str(part) for part in key) + ".pt")


@contextlib.contextmanager
def locked(*key):
    """One process at a time."""
    with open(kept(*key).with_suffix(".lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(compute, *key):
    """What compute() returns, kept on disk; others who want it wait."""
    path = kept(*key)
    with locked(*key):
        if not path.exists():
            part = path.with_suffix(f".part{os.getpid()}")
            torch.save(compute(), part)
            part.rename(path)
    return torch.load(path, weights_only=False)
