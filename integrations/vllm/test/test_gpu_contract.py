# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend against the sources of a real vLLM, without a device: see gpu_contract.py."""
import pytest

CHECKS = ("classes", "features", "selection", "steps", "graphs", "room", "memory_hook", "spec", "generations", "refusals",
          "plain_math", "doctor")


@pytest.fixture(scope="module")
def contract(python):
    return python.run(["gpu_contract.py", *CHECKS])


@pytest.mark.parametrize("check", CHECKS)
def test_contract(contract, check):
    assert f"passed: {check}\n" in contract.stdout, contract.stdout[-2000:] + contract.stderr[-4000:]
