# SPDX-License-Identifier: Apache-2.0
"""A real model under transformers against the same model under llama.cpp: the same plan loses the same."""
import json
import os
import pathlib
import subprocess

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fetch  # noqa: E402
from turboquant_transformers.held_out import plan_kl  # noqa: E402
from turboquant_transformers.pieces import read_text  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")
N_TOKENS = 2048


@pytest.fixture
def programs():
    """Folder with tqkv and f32_model of a build with llama.cpp."""
    if not os.environ.get("TQKV_TEST_FULL"):
        pytest.skip("minutes long; set TQKV_TEST_FULL=1")
    folder = pathlib.Path(os.environ["TQKV_BUILD_DIR"]).resolve() / "bin"
    if not (folder / "f32_model").exists():
        pytest.skip("this build has no llama.cpp")
    return folder


def test_kl_is_that_of_llama_cpp(programs, tmp_path):
    model_file, text = fetch.fetch("smollm2"), pathlib.Path(fetch.fetch("texts")) / "eval" / "en.txt"
    plan, f32_file = tmp_path / "plan.tqkv", tmp_path / "f32.gguf"
    subprocess.run([programs / "tqkv", "calibrate", model_file, "-o", plan], check=True)
    subprocess.run([programs / "f32_model", model_file, f32_file], check=True)  # a host that rounds no activations
    subprocess.run([programs / "tqkv", "eval", f32_file, "--text", text, "--plan", plan, "--cache", "ours",
                    "-c", str(N_TOKENS), "--json", tmp_path / "eval.json"], check=True)
    expected = json.loads((tmp_path / "eval.json").read_text())["results"][0]["kl_mean"]

    folder, name = os.path.split(model_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokens = read_text(transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name),
                       [text.read_text(encoding="utf-8")]).piece(0, N_TOKENS)
    for attention in ("sdpa", "turboquant"):
        model.set_attn_implementation(attention)
        assert plan_kl(model, plan, tokens) == pytest.approx(expected, rel=0.1)
