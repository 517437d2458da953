# SPDX-License-Identifier: Apache-2.0
"""The example runs as its README says, in a process of its own."""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = pathlib.Path(__file__).resolve().parents[2]
INTEGRATIONS = ROOT / "integrations"


def save_byte_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_example_calibrates_and_generates(built_library, build_model, tmp_path):
    transformers.LlamaForCausalLM(build_model("llama").config).save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    text = (ROOT / "data" / "calibration" / "mixed.txt").read_text(encoding="utf-8")[:3000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    paths = os.pathsep.join(str(INTEGRATIONS / name) for name in ("python", "transformers"))
    example = (INTEGRATIONS / "transformers" / "examples" / "compressed_generate.py").read_text(encoding="utf-8")
    small = example.replace('encoding="utf-8")], plan)', 'encoding="utf-8")], plan, "2.5x", n_probes=1)')
    assert small != example  # heads of 32 channels take more for their scales than 5x leaves
    got = subprocess.run([sys.executable, "-c", small, "model", "text.txt"], cwd=tmp_path, text=True, check=False,
                         capture_output=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert got.returncode == 0, got.stderr[-2000:]
    assert "bits per value" in got.stdout and "turboquant: sensitivity: 4 of 4" in got.stderr
    assert (tmp_path / "model.tqkv").exists()


def test_pip_installs_library_and_packages(tmp_path):
    """What pip puts into a folder of its own runs without the build under test."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    sources = tmp_path / "source"  # pip builds in the tree that it is given
    for name in ("CMakeLists.txt", "cmake", "include", "src", "integrations/python", "integrations/transformers"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, sources / name)
    target = tmp_path / "packages"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target,
                    sources / "integrations" / "python", sources / "integrations" / "transformers"], check=True)
    metadata = next(target.glob("turboquant_transformers-*/METADATA")).read_text()
    assert f"Requires-Dist: turboquant @ {(sources / 'integrations' / 'python').as_uri()}" in metadata
    code = "import turboquant; print(turboquant.TurboQuantCache.__name__, turboquant.library.find())"
    environment = {name: value for name, value in os.environ.items() if name != "TQKV_LIBRARY"}
    got = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, check=True, capture_output=True,
                         env=environment | {"PYTHONPATH": str(target)})
    assert got.stdout.split() == ["TurboQuantCache", str(target / "turboquant" / "libturboquant.so")]
