# SPDX-License-Identifier: Apache-2.0
"""bench/speed_page.py: docs/SPEED.md says what docs/results/cpu.json says. And the rows of bench/cpu.py."""

import json

import pytest

import cpu
import quality_page
import speed_page

PAGE = quality_page.DOCS / "SPEED.md"
RESULTS = quality_page.DOCS / "results" / "cpu.json"
STALE = "run bench/speed_page.py"
ABOUT = {"cpu": "a CPU, 2 cores", "compiler": "GCC", "commit": "abc", "command": "tqkv-bench"}


def row(cache, rate, **more):
    return {"model": "smollm2", "phase": "decode", "threads": 2, "depth": 512, "cache": cache, "tokens_per_s": rate,
            "tokens_per_s_low": rate - 1, "tokens_per_s_high": rate + 1, "ratio_f16": rate / 40, "ratio_low": 1.1,
            "ratio_high": 1.7, **ABOUT, **more}


def speed(cache, decode, prefill_rounds):
    made = {"cache": cache, "depth": 512, "n_threads": 2}
    for phase, rounds in (("decode", 4), ("prefill", prefill_rounds)):
        made |= {phase: decode, f"{phase}_low": decode - 2, f"{phase}_high": decode + 2, f"{phase}_rounds": rounds}
    return made


def test_tables_of_the_page_are_those_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    made = speed_page.tables(speed_page.read(RESULTS))
    assert quality_page.with_tables(page, made) == page, STALE
    assert all(f"<!-- table: {name} -->" in page for name in made)


def test_the_plot_was_drawn_from_the_results():
    results = speed_page.read(RESULTS)
    if not results.rows:
        pytest.skip("nothing is measured yet")
    plot = (quality_page.DOCS / "speed.svg").read_text(encoding="utf-8")
    assert quality_page.digest_text(results) in plot, STALE


def test_rows_land_in_their_cells():
    results = speed_page.Results([row("f16", 40.0), row("ours 5x", 50.0), row("ours 5x", 30.0, depth=2048)])
    lines = speed_page.tables(results)["decode"].splitlines()
    assert lines[0] == "|  | cache | 512 | 2048 |"
    assert lines[2] == "| SmolLM2-135M, 2 threads | f16 | 40 | – |"
    assert lines[3] == "| SmolLM2-135M, 2 threads | ours 5x | 50 (1.25; 1.10..1.70) | 30 (0.75; 1.10..1.70) |"


def test_without_results_the_page_says_so(tmp_path):
    made = speed_page.tables(speed_page.read(tmp_path / "none.json"))
    assert set(made.values()) == {"Not measured yet.\n"}


def test_what_is_kept_is_not_missing(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    results = cpu.Results(path, False)
    wanted = ("smollm2", "decode", 2, 512, ["f16", "ours 5x"])
    results.keep([row("f16", 40.0)])
    assert results.lacks(*wanted)
    results.keep([row("ours 5x", 50.0)])
    assert not results.lacks(*wanted)
    assert not cpu.Results(path, False).lacks(*wanted)
    assert cpu.Results(path, True).lacks(*wanted), "--fresh measures anew"
    assert len(json.loads(path.read_text())) == 2


def test_a_layer_is_told_in_tokens_of_the_model():
    measured = {"mode": "prefill", "cache": "f16", "depth": 0, "n_q": 512, "threads": 1, "seconds": 2, "seconds_low": 1,
                "seconds_high": 4, "ratio_f16": 1, "ratio_low": 1, "ratio_high": 1, "bits": 16, "bytes_per_s": 1,
                "memory_bytes_per_s": 2}
    made = cpu.layer_row(measured, ABOUT)
    assert (made["tokens_per_s_low"], made["tokens_per_s"], made["tokens_per_s_high"]) == (4, 8, 16)
    assert made["commit"] == "abc" and made["model"] == cpu.LAYER


def test_ratios_of_a_model():
    made = list(cpu.model_rows("qwen", [speed("f16", 40, 0), speed("ours 5x", 60, 1)], ABOUT))
    assert [(one["cache"], one["phase"]) for one in made] == [
        ("f16", "decode"), ("ours 5x", "decode"), ("ours 5x", "prefill")]
    assert made[1]["ratio_f16"] == 1.5
    assert (made[1]["ratio_low"], made[1]["ratio_high"]) == (round(58 / 42, 4), round(62 / 38, 4))
