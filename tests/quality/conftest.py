# SPDX-License-Identifier: Apache-2.0
"""Plans of real models, made once by the tqkv of the build under test (TQKV_BUILD_DIR)."""

import os
import pathlib
import subprocess

import pytest

import fetch

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKER = () if os.environ.get("TQKV_TEST_FULL") == "1" else ("--probes", "6")  # than by default; minutes a model


@pytest.fixture(scope="session")
def tqkv():
    folder = os.environ.get("TQKV_BUILD_DIR")
    program = ROOT / folder / "bin" / "tqkv" if folder else None
    if not program or not program.exists():
        pytest.skip("no tqkv; make test builds it")
    if "needs a build with llama.cpp" in subprocess.run([program, "eval", "--help"], text=True, check=False,
                                                        capture_output=True).stdout:
        pytest.skip("this tqkv was built without llama.cpp")
    return program


@pytest.fixture(scope="session", params=["smollm2", "qwen", "gemma"])
def calibrated(request, tqkv, tmp_path_factory):
    """(name, model, plan)"""
    model = fetch.fetch(request.param)
    plan = tmp_path_factory.mktemp(request.param) / "plan.tqkv"
    subprocess.run([tqkv, "calibrate", model, "-o", plan, *QUICKER], check=True, timeout=1800)
    return request.param, model, plan
