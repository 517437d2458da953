# SPDX-License-Identifier: Apache-2.0
"""bench/quality_page.py: docs/QUALITY.md says what docs/results/quality.json says."""

import re

import pytest

import quality_page

PAGE = quality_page.DOCS / "QUALITY.md"
RESULTS = quality_page.DOCS / "results" / "quality.json"
STALE = "run bench/quality_page.py"


def row(domain, kl, **more):
    return {"model": "smollm2", "context": 8192, "ubatch": 512, "codec": "turboquant", "profile": "5x", "bits": 3.176,
            "domain": domain, "kl_mean": kl, "kl_ci95": 0.00012, "kl_median": 0.004, "kl_p999": 0.07, "top1": 0.963,
            "tokens": 4095, **more}


def line_of(table, *names):
    return [cell.strip() for line in table.splitlines() if all(name in line for name in names)
            for cell in line.strip("|").split("|")][2:]


def test_tables_of_the_page_are_those_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    made = quality_page.tables(quality_page.read(RESULTS))
    assert quality_page.with_tables(page, made) == page, STALE
    assert all(f"<!-- table: {name} -->" in page for name in made)


def test_plots_were_drawn_from_the_results():
    results = quality_page.read(RESULTS)
    if not results.rows:
        pytest.skip("nothing is measured yet")
    plots = re.findall(r"\((quality-\w+\.svg)\)", PAGE.read_text(encoding="utf-8"))
    assert plots
    for name in plots:
        plot = (quality_page.DOCS / name).read_text(encoding="utf-8")
        assert quality_page.digest_text(results) in plot, STALE
        assert name != "quality-curve.svg" or quality_page.curve_digest_text(results) in plot, STALE


def test_a_row_lands_in_its_cells():
    results = quality_page.Results([row("all", 0.00604), row("chat", 0.0421), row("en", 0.9, ubatch=16)])
    made = quality_page.tables(results)
    assert line_of(made["context-8192"], "SmolLM2", "5x") == [
        "3.18", ".0060", ".00012", ".0040", ".0700", "96.3 %", "4095"]
    assert line_of(made["domains-8192"], "SmolLM2", "5x") == ["–", "–", ".0421", "–", "–", "–", ".0060"]
    assert line_of(made["context-2048"], "SmolLM2", "5x") == []


def test_a_variant_has_a_line():
    kept = {"variant": "bands of 32", "model": "smollm2-f32", "context": 4096, "kl_mean": 0.0123, "kl_median": 0.004,
            "ratio": 0.951, "ratio_ci95": 0.049, "typical": 0.9, "typical_ci95": 0.02, "tokens": 512}
    older = {"variant": "measured elsewhere", "model": "smollm2-f32", "context": 4096, "kl_mean": 1.0}
    results = quality_page.Results([], [{**kept, "profile": "8x"}, older, {**kept, "profile": "5x", "kl_mean": 0.003}])
    made = quality_page.tables(results)["variants-smollm2-4096"]
    assert line_of(made, "bands of 32") == [".0123", "0.95 ± 0.05", "0.90 ± 0.02", ".0030", "0.95 ± 0.05", "0.90 ± 0.02"]
    assert "elsewhere" not in made


def test_a_variant_kept_by_text_has_another_table():
    kept = {"variant": "code alone", "profile": "8x", "model": "smollm2-f32", "context": 4096, "kl_mean": 0.0123,
            "ratio": 1, "ratio_ci95": 0, "typical": 1, "typical_ci95": 0, "tokens": 512,
            "kl_by_text": {"zh": 0.03, "en": 0.002}}
    other = {**{name: kept[name] for name in kept if name != "kl_by_text"}, "variant": "base"}
    made = quality_page.tables(quality_page.Results([], [kept, other]))
    calibration, variants = made["calibration-smollm2-4096"], made["variants-smollm2-4096"]
    assert "| variant | size | English | Chinese | all |" in calibration
    assert line_of(calibration, "code alone") == [".0020", ".0300", ".0123", "1.00 ± 0.00", "1.00 ± 0.00"]
    assert "code alone" not in variants and "base" in variants and "base" not in calibration


def kept_in(tables, variant, bits, kl, **more):
    return {"variant": variant, "tables": tables, "profile": "8x", "model": "smollm2-f32", "context": 8192,
            "bits": bits, "kl_mean": kl, "ratio": 1, "ratio_ci95": 0, "typical": 1, "typical_ci95": 0, "tokens": 512,
            **more}


def test_a_variant_lands_in_the_tables_that_it_names():
    base = kept_in(["bits", "tiers"], quality_page.DEFAULTS, 1.999, 0.012, kl_by_text={"en": 0.012})
    rows = [kept_in(["bits"], quality_page.DEFAULTS, 4.98, 0.00045, profile="5 bits"), base,
            kept_in(["tiers"], "tiers 32@8 480@4", 2.0, 0.009)]
    floor = row("all", 0.0032, codec="f16", profile="")
    made = quality_page.tables(quality_page.Results([floor], rows))
    assert "| model | f16 on the file | 2.0 bits | 5.0 bits |" in made["bits"]
    assert line_of(made["bits"], "SmolLM2") == [".0120", ".00045"]
    assert "| model | tokens | size | as made | 32@8 480@4 |" in made["tiers"]
    assert line_of(made["tiers"], "SmolLM2", "8192") == ["8x", ".0120", "**.0090**"]
    assert set(made) >= {"bits", "tiers"} and not [name for name in made if name.endswith("smollm2-8192")]


def test_only_tables_change():
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    once = quality_page.with_tables(page, {"x": "X\n", "y": "Y\n"})
    assert once == "a\n<!-- table: x -->\n\nX\n\n<!-- end -->\nb\n<!-- table: y -->\n\nY\n\n<!-- end -->\n"
    assert quality_page.with_tables(once, {"x": "X\n", "y": "Y\n"}) == once
    with pytest.raises(SystemExit, match="x"):
        quality_page.with_tables(page, {"y": "Y\n"})
