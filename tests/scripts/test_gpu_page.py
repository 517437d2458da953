# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_page.py: docs/GPU.md says what docs/results/h200.json and h100.json say."""

import json

import gpu_page
import quality_page

PAGE = quality_page.DOCS / "GPU.md"
RESULTS = quality_page.DOCS / "results" / "h200.json"
STALE = "run bench/gpu_page.py"


def test_tables_of_the_page_are_those_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    made = gpu_page.tables(gpu_page.read(RESULTS))
    assert quality_page.with_tables(page, made) == page, STALE
    assert all(f"<!-- table: {name} -->" in page for name in made)


def test_the_plot_was_drawn_from_the_results():
    plot = (quality_page.DOCS / "gpu.svg").read_text(encoding="utf-8")
    assert quality_page.digest_text(gpu_page.read(RESULTS)) in plot, STALE


def test_rows_land_in_their_cells(tmp_path):
    row = {"shape": "32/8/128 1x64", "profile": "5x", "bits": 3.25, "us": 10.0, "us_min": 9.5, "us_max": 12.0,
           "best_fp16_us": 20.0, "best_fp16_name": "flex", "speedup": 2.0, "pct_copy": 40.2, "error": 1.2e-3,
           "card": "a card", "commit": "abc"}
    (tmp_path / "h200.json").write_text(json.dumps([row]))
    made = gpu_page.tables(gpu_page.read(tmp_path / "h200.json"))
    assert made["h200"].splitlines()[2] == "| 32/8/128 1x64 | 5x | 3.25 | 10.0 (9.5–12.0) | 20.0 | 2.00 | 40 | 1e-03 |"
    assert made["baselines"].splitlines()[2] == "| 32/8/128 1x64 | flex |"
