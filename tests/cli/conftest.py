# SPDX-License-Identifier: Apache-2.0
"""Runs the tqkv of the build under test (TQKV_BUILD_DIR) and makes small files for it."""

import ctypes
import os
import pathlib
import struct
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIRST_MODELS = ("smollm2-135m-q4_1.gguf",)


def build_dir():
    named = os.environ.get("TQKV_BUILD_DIR")
    if not named or not (ROOT / named / "bin" / "tqkv").exists():
        pytest.skip("no tqkv; make test builds it")
    return ROOT / named


@pytest.fixture
def tqkv():
    """Calls tqkv; returns the finished process with its texts."""
    program = build_dir() / "bin" / "tqkv"

    def call(*args, env=None, timeout=60, **more):
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("TQKV_", "GGML_", "LLAMA_"))}
        return subprocess.run([program, *map(str, args)], capture_output=True, text=True, check=False,
                              env=kept | (env or {}), timeout=timeout, stdin=subprocess.DEVNULL, **more)
    call.program = program
    return call


@pytest.fixture
def has_llama(tqkv):
    return "needs a build with llama.cpp" not in tqkv("eval", "--help").stdout


@pytest.fixture
def real_model(has_llama):
    if not has_llama:
        pytest.skip("this tqkv was built without llama.cpp")
    cache = os.environ.get("TQKV_CACHE") or pathlib.Path.home() / ".cache" / "turboquant"
    for name in FIRST_MODELS:
        if (pathlib.Path(cache) / "models" / name).exists():
            return pathlib.Path(cache) / "models" / name
    pytest.skip("no model in the cache; scripts/fetch.py smollm2 gets one")


class Rope(ctypes.Structure):
    _fields_ = [("style", ctypes.c_uint32), ("n_rot", ctypes.c_uint32),
                ("inv_freq", ctypes.POINTER(ctypes.c_float))]


class PlanLayer(ctypes.Structure):
    _fields_ = [("n_heads", ctypes.c_uint32), ("n_kv_heads", ctypes.c_uint32), ("k_dim", ctypes.c_uint32),
                ("v_dim", ctypes.c_uint32), ("window", ctypes.c_uint32), ("rope", Rope),
                ("tier_tokens", ctypes.c_uint32 * 4), ("token_bytes", ctypes.c_uint32 * 4),
                ("is_latent", ctypes.c_uint32)]


@pytest.fixture
def plan_file(tmp_path):
    """A valid plan: one layer, 4 query heads, 2 KV heads of 64 channels, 8 bits."""
    library = build_dir() / "lib" / "libturboquant.so"
    if "TQKV_SANITIZE:STRING=\n" not in (build_dir() / "CMakeCache.txt").read_text():
        pytest.skip("a sanitized library cannot be loaded into Python")
    lib = ctypes.CDLL(str(library))
    inv_freq = (ctypes.c_float * 32)(*[10000 ** (-i / 32) for i in range(32)])
    layer = PlanLayer(n_heads=4, n_kv_heads=2, k_dim=64, v_dim=64, rope=Rope(1, 64, inv_freq))
    plan = ctypes.c_void_p()
    assert lib.tqkv_plan_builtin(1, ctypes.byref(layer), ctypes.byref(plan)) == 0
    path = tmp_path / "tiny.tqkv"
    assert lib.tqkv_plan_save(plan, str(path).encode(), None) == 0
    lib.tqkv_plan_destroy(plan)
    return path


@pytest.fixture
def mixed_plan():
    """Three layers: bits of all widths, no cache, a V head in plain f16."""
    return ROOT / "tests" / "golden" / "v0" / "plan.tqkv"


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_bytes(arch="llama", **keys):
    """The header of a GGUF file without tensors."""
    facts = {"block_count": 1, "embedding_length": 256, "context_length": 4096, "attention.head_count": 4,
             "attention.head_count_kv": 2}
    facts.update({name.replace("__", "."): value for name, value in keys.items()})
    body = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text(arch)
    for name, value in facts.items():
        body += gguf_text(f"{arch}.{name}")
        if isinstance(value, list):
            body += struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        else:
            body += struct.pack("<II", 4, value)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1 + len(facts)) + body


@pytest.fixture
def model_file(tmp_path):
    """Writes a model's header that the plan of plan_file fits, unless told otherwise."""
    def make(name="tiny.gguf", **keys):
        path = tmp_path / name
        path.write_bytes(gguf_bytes(**keys))
        return path
    return make
