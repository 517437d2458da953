# SPDX-License-Identifier: Apache-2.0
"""bench/serving.py: what it makes of what engines computed. The engines themselves need vLLM."""
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import serving  # noqa: E402


class Net:
    """A vocabulary of two; the first channel is the difference of their logits."""

    @staticmethod
    def lm_head(hidden):
        return torch.stack([hidden[:, 0], torch.zeros(len(hidden))], dim=-1)


class Engines:
    """Hidden states that are off by what `errors` says of a case; which tokens were cached."""

    def __init__(self, errors, cached=serving.PREFIX, stock_bits=32):
        self.errors, self.cached, self.stock_bits = errors, cached, stock_bits

    def run(self, has_plan, prompts=(), prefix_caching=True):
        error = self.errors[prefix_caching] if has_plan else 0
        n_cached = [self.cached if prefix_caching and len(prompt) > serving.PREFIX else 0 for prompt in prompts]
        hidden = {f"hidden{i}": np.full((len(prompt) - n, 1), error, np.float32)
                  for i, (prompt, n) in enumerate(zip(prompts, n_cached))}
        return hidden | {"cached": np.array(n_cached), "room_tokens": np.array(1000 * (10 if has_plan else 1))}


def kl_of(error):
    q = 1 / (1 + math.exp(-error))
    return .5 * math.log(.5 / q) + .5 * math.log(.5 / (1 - q))


def texts(n):
    return {"en": list(range(n)), "zh": list(range(n, 2 * n))}


def test_divergence_is_that_of_two_distributions():
    kl = serving.divergences(Net, np.zeros((2, 1), np.float32), np.array([[0], [.5]], np.float32))
    assert kl == pytest.approx([0, kl_of(.5)], abs=1e-9)


@pytest.mark.parametrize("stock_bits, room", [(32, 5), (16, 10)])
def test_quality_scores_the_second_half_and_counts_room_in_16_bits(stock_bits, room):
    rows = serving.quality(Engines({False: .5}, stock_bits=stock_bits), Net, texts(100), 64, {"model": "m"})
    assert [row.get("domain") for row in rows] == ["en", "zh", "all", None]
    assert [row["tokens"] for row in rows[:3]] == [32, 32, 64]
    assert rows[2]["kl_mean"] == pytest.approx(kl_of(.5), rel=1e-6)
    assert rows[3]["ratio_f16"] == room


def test_prefix_hits_are_compared_behind_the_prefix():
    rows = serving.prefix_hits(Engines({False: .1, True: .3}), Net, texts(8 * serving.PREFIX), 2, {"model": "m"})
    assert [row["tokens"] for row in rows] == [4 * serving.TAIL] * 3
    assert [row["kl_mean"] for row in rows] == pytest.approx([kl_of(.1), kl_of(.3), kl_of(.3)], rel=1e-5)
    assert [row["cached"] for row in rows] == [0, serving.PREFIX, serving.PREFIX]


def test_a_hit_that_was_none_is_an_error():
    with pytest.raises(SystemExit, match="hit: cached"):
        serving.prefix_hits(Engines({False: .1, True: .3}, cached=0), Net, texts(4 * serving.PREFIX), 1, {})


def test_prompts_of_a_load_share_what_they_should():
    first, second = serving.load_prompts(list(range(10000)), 2, 1024, 300)
    assert first[:300] == second[:300] == list(range(300))
    assert not set(first[300:]) & set(second[300:])
    assert len(first) == len(second) == 1024 - serving.TAIL


def test_rows_are_replaced_by_their_key(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "RESULTS", tmp_path / "vllm.json")
    row = {"model": "m", "profile": "5x", "measure": "hit", "case": "hit"}
    serving.keep([row | {"kl_mean": 1}, row | {"case": "one go", "kl_mean": 2}])
    serving.keep([row | {"kl_mean": 3}])
    assert sorted(row["kl_mean"] for row in json.loads(serving.RESULTS.read_text())) == [2, 3]
