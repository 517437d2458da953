# SPDX-License-Identifier: Apache-2.0
"""How vLLM's memory is shared out between blocks and copies beside them; needs no vLLM."""
import pathlib
import sys

import pytest
import tiny_checkpoint as tiny
import tiny_plan

pytest.importorskip("torch")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "integrations" / "vllm"))
from turboquant_vllm import model_plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")

BLOCK = 32
WIDTHS = (2, 4, 6)  # of the last tier, by layer; the young ones have 8 and 6 bits


def plans_of(path, n_kv_heads=tiny.KV_HEADS, window=None, **rank):
    share = tiny.KV_HEADS // n_kv_heads
    return [model_plan.LayerPlan(str(path), index, tiny.HEADS // share, n_kv_heads, tiny.HEAD_SIZE, tiny.HEAD_SIZE,
                                 window, **rank) for index in range(len(WIDTHS))]


@pytest.fixture(name="plans")
def layer_plans(tmp_path):
    return plans_of(tiny_plan.write(tmp_path / "tiny.tqkv", last_widths=WIDTHS))


def limits(max_num_seqs):
    return model_plan.Limits(max_num_seqs, max_num_batched_tokens=64, num_drafts=0)


def promised(plans):
    """Bytes of a token at the plan's context: young ones at their widths, 4 sinks at the first."""
    young = [(32, tiny_plan.token_bytes(8)), (80, tiny_plan.token_bytes(6)), (4, tiny_plan.token_bytes(8))]
    old = [tiny_plan.token_bytes(width) for width in WIDTHS]
    return sum(sum(n * more + (1024 - n) * less for n, more in young) - 2 * 1024 * less for less in old) / 1024


@pytest.mark.parametrize("max_num_seqs", [1, 16, 32])
def test_blocks_and_copies_take_what_the_plan_promised(plans, max_num_seqs):
    available = 64 << 20
    n_blocks, beside = model_plan.room_for(plans, limits(max_num_seqs), BLOCK, available)
    assert n_blocks == int(available / promised(plans) / BLOCK)
    assert .97 * n_blocks <= (available - beside) / (BLOCK * sum(plan.token_bytes for plan in plans)) < 1.03 * n_blocks


def test_tiers_get_copies_from_the_youngest_on(plans):
    """Sequences that may run first, with the second tier for no more than fit at the context; then all tiers for others."""
    def copies(n_tokens, max_num_seqs):
        return model_plan.copies_for(plans, limits(max_num_seqs), BLOCK, n_tokens // BLOCK)

    few, some, many = (copies(1 << 18, most) for most in (1, 40, 80))
    assert few[0] == few[1] > 1
    assert some[0] == 40 > some[1] > 0
    assert many == [80, 0]
    assert copies(1024, 64) == [8, 0]


def test_a_window_that_young_tiers_hold_has_blocks_of_theirs(tmp_path):
    windowed = plans_of(tiny_plan.write(tmp_path / "window.tqkv", last_widths=(0, 0, 0), window=100), window=100)
    assert [plan.token_bytes for plan in windowed] == [tiny_plan.token_bytes(6)] * 3
    wider = plans_of(tiny_plan.write(tmp_path / "wider.tqkv", last_widths=WIDTHS, window=113), window=113)
    assert [plan.token_bytes for plan in wider] == [tiny_plan.token_bytes(width) for width in WIDTHS]


def test_a_rank_has_its_heads(plans, tmp_path):
    shares = [plans_of(tmp_path / "tiny.tqkv", n_kv_heads=1, rank=rank, n_ranks=2) for rank in range(2)]
    for whole, *ranks in zip(plans, *shares):
        assert sum(plan.token_bytes for plan in ranks) == whole.token_bytes
        assert ranks[0].plan.fingerprint != ranks[1].plan.fingerprint
    assert model_plan.young_tokens(str(tmp_path / "tiny.tqkv")) == (32, 112)
