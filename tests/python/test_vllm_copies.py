# SPDX-License-Identifier: Apache-2.0
"""Which tiers get copies beside vLLM's blocks; needs no vLLM."""
import pathlib
import sys

import pytest
import tiny_checkpoint as tiny
import tiny_plan

pytest.importorskip("torch")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "integrations" / "vllm"))
from turboquant_vllm import model_plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")


@pytest.fixture(name="copies")
def copies_of_layers(tmp_path):
    """Sequences with copies, [layer][tier], of a plan with young tiers of 8 and 6 bits over layers of 2, 4 and 6."""
    path = str(tiny_plan.write(tmp_path / "tiny.tqkv", last_widths=(2, 4, 6)))
    plans = [model_plan.LayerPlan(path, index, tiny.HEADS, tiny.KV_HEADS, tiny.HEAD_SIZE, tiny.HEAD_SIZE, None)
             for index in range(3)]
    return lambda n_tokens, most: [model_plan.copies_for(plan, n_tokens, most) for plan in plans]


def test_sequences_are_those_that_fit(copies):
    assert copies(1024, 256)[0] == [8, 1]
    assert copies(64 * 1024, 256)[0] == [256, 64]
    assert copies(64 * 1024, 16)[0] == [16, 16]


def test_a_tier_hardly_wider_than_the_blocks_has_no_copies(copies):
    """The first one always has: it holds the sinks."""
    assert [len([n for n in own if n]) for own in copies(4096, 256)] == [2, 2, 1]
    assert copies(4096, 256)[2] == [32, 0]
