# SPDX-License-Identifier: Apache-2.0
"""The CUDA backends against the sources of a real vLLM, without a device: see gpu_contract.py and mla_contract.py."""
import pytest

CHECKS = {
    "gpu_contract.py": ("classes", "features", "selection", "steps", "graphs", "room", "memory_hook", "spec", "generations",
                        "refusals", "plain_math", "doctor"),
    "mla_contract.py": ("mla_classes", "mla_steps", "mla_types", "mla_graphs", "mla_fold", "mla_gather", "mla_room",
                        "mla_spec", "mla_selection", "mla_on_cpu", "mla_refusals", "mla_refused_configs", "mla_set_up",
                        "mla_doctor"),
}


@pytest.fixture(scope="module")
def contracts(python):
    return {script: python.run([script, *checks]) for script, checks in CHECKS.items()}


@pytest.mark.parametrize("script, check", [(script, check) for script, checks in CHECKS.items() for check in checks])
def test_contract(contracts, script, check):
    got = contracts[script]
    assert f"passed: {check}\n" in got.stdout, got.stdout[-2000:] + got.stderr[-4000:]
