# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend against the sources of a real vLLM, without a device: see gpu_contract.py."""
import pytest

CHECKS = ("classes", "features", "selection", "steps", "graphs", "room", "memory_hook", "refusals", "plain_math")


@pytest.mark.parametrize("check", CHECKS)
def test_contract(python, check):
    got = python.run(["gpu_contract.py", check])
    assert got.returncode == 0, got.stdout[-2000:] + got.stderr[-4000:]
    assert f"passed: {check}" in got.stdout
