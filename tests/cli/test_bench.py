# SPDX-License-Identifier: Apache-2.0
"""tqkv-bench: options, and small runs whose numbers must hang together."""

import json
import os
import subprocess

import pytest

SMALL = ["--heads", "4/2", "--dim", "32", "--rounds", "1", "--json", "-"]


@pytest.fixture
def bench(tqkv):
    def call(*args):
        return subprocess.run([tqkv.program.with_name("tqkv-bench"), *args], capture_output=True, text=True,
                              check=False, timeout=300, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    return call


def rows_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_help(bench):
    assert "attention" in bench("--help").stdout
    assert bench("encode", "--help").returncode == 0


@pytest.mark.parametrize("args", [[], ["decode"], ["attention", "-n", "x"], ["attention", "-t", "0"],
                                  ["attention", "--heads", "5/2"], ["attention", "--dim", "24"],
                                  ["attention", "--cache", "q9_9"], ["attention", "--profile", "1000x"],
                                  ["attention", "more"], ["encode", "--what"]])
def test_wrong_usage(bench, args):
    done = bench(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("tqkv-bench")
    assert "Try 'tqkv-bench" in done.stderr


@pytest.mark.parametrize("mode", ["attention", "prefill"])
def test_attention(bench, has_llama, mode):
    rows = rows_of(bench(mode, "-n", "600", "-t", "1,2", *SMALL))
    ours = [row for row in rows if row["cache"] == "ours 5x"]
    assert [row["threads"] for row in ours] == [1, 2]
    assert all(row["mode"] == mode and row["seconds"] > 0 and row["depth"] == 600 for row in rows)
    if has_llama:
        assert [row["cache"] for row in rows[:4]] == ["f16", "q8_0", "q4_0", "ours 5x"]
        assert [row["error"] for row in rows if row["cache"] == "f16"] == [0, 0]
        errors = [row["error"] for row in rows if row["cache"] not in ("f16", "reading f16")]
        assert all(0 < error < 0.3 for error in errors), "not the same attention"
        assert all(row["ratio_f16"] > 0 for row in rows)


def test_prefill_of_an_empty_cache(bench):
    rows = rows_of(bench("prefill", "-n", "0", "-t", "1", *SMALL))
    assert all(row["bits"] is None for row in rows)


def test_a_plan_brings_its_shape(bench, plan_file):
    rows = rows_of(bench("attention", "-n", "512", "--cache", "none", "--plan", plan_file, *SMALL))
    assert [row["cache"] for row in rows] == ["ours q8", "reading f16"]
    assert rows[0]["ratio_f16"] is None


def test_encode(bench):
    rows = rows_of(bench("encode", *SMALL))
    assert all(row["f16_bytes_per_s"] > 0 for row in rows)
    assert {"f16, no plan, K at 16.00 bits", "ours 5x, store, 1 token at a time"} <= {row["cache"] for row in rows}
