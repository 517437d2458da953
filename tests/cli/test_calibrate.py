# SPDX-License-Identifier: Apache-2.0
"""tqkv calibrate checks plans on text that it held back. Little is observed, so that this is quick."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

QUICK = ("--tokens", "512", "--probes", "1", "--json")


def calibrate(tqkv, model, plan, *args):
    """What was done with one plan, and what was said."""
    done = tqkv("calibrate", model, *QUICK, "-o", plan, *args, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in plan.parent.iterdir()] == [plan.name]
    told = json.loads(done.stdout)
    assert [row["path"] for row in told["plans"]] == [str(plan)]
    return told["plans"][0], told["seconds"], done.stderr


def test_a_plan_that_loses_little_passes(tqkv, real_model, tmp_path):
    plans = [tmp_path / name / "p.tqkv" for name in ("checked", "not")]
    for plan in plans:
        plan.parent.mkdir()
    row, seconds, said = calibrate(tqkv, real_model, plans[0])
    assert row["profile"] == "5x" and row["asked_bits"] == 3.2
    assert row["bits"] == pytest.approx(3.2, rel=0.01)
    assert row["passes"] == 1 and row["kl_limit"] == 0.03
    assert 0 < row["kl_floor"] < 0.02 and 0 < row["kl_held_out"] < row["kl_floor"] + row["kl_limit"]
    assert seconds["check"] > 0 and "1/6 weights in f32" in said and "6/6 check" in said and "warning" not in said

    # without the check the plan is the same
    row, seconds, said = calibrate(tqkv, real_model, plans[1], "--max-kl", "0")
    assert row["passes"] == 0 and row["bits"] == pytest.approx(3.2, rel=0.01)
    assert row["kl_held_out"] is None and row["kl_floor"] is None and row["kl_limit"] is None
    assert seconds["check"] < 0.1 and "check" not in said and "5/5 solve" in said
    assert plans[0].read_bytes() == plans[1].read_bytes()


def test_weights_as_they_are(tqkv, real_model, tmp_path):
    plan = tmp_path / "p.tqkv"
    _, seconds, said = calibrate(tqkv, real_model, plan, "--weights", "file", "--max-kl", "0")
    assert seconds["weights"] == 0 and "f32" not in said and "4/4 solve" in said
    assert tqkv("calibrate", real_model, "-o", plan, "--weights", "f16").returncode == 2


def test_a_plan_that_loses_much_gets_more_bits(tqkv, real_model, tmp_path):
    plan = tmp_path / "p.tqkv"
    row, _, said = calibrate(tqkv, real_model, plan, "--profile", "8x", "--max-kl", "0.000001")
    assert row["profile"] == "8x" and row["asked_bits"] == 2
    assert 2.1 < row["bits"] <= 2.8  # 40 %
    assert row["passes"] > 1 and row["kl_limit"] == 0.000001
    assert row["kl_held_out"] > row["kl_floor"] + row["kl_limit"]
    assert "asked for 8x (2.00 bits)" in said and "most bits: layer" in said
    assert "warning" in said and "--max-kl" in said
    assert f"{row['bits']:.2f} bits per value" in tqkv("inspect", plan).stdout


def test_a_model_with_latents(tqkv, has_llama, tmp_path):
    """Random weights, the head shapes of DeepSeek-V2: every value counts alike, so only sizes are looked at."""
    if not has_llama:
        pytest.skip("this tqkv was built without llama.cpp")
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "integrations/llama.cpp/test/tiny_models.py")
    tiny_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_models)
    tiny_models.deepseek2_lite(tmp_path / "m.gguf", bytes_too=True)
    plan = tmp_path / "plan" / "p.tqkv"
    plan.parent.mkdir()
    # tokens are bytes: little text would not show them all, and the latent of layer 0 depends on nothing else
    row, _, _ = calibrate(tqkv, tmp_path / "m.gguf", plan, "--tokens", "8192")
    assert row["passes"] == 1 and 0 < row["kl_held_out"] < row["kl_limit"]
    assert 3.1 < row["bits"] <= 3.2  # at most 230.4 bytes for 512 + 64 values
    layers = json.loads(tqkv("inspect", "--json", plan).stdout)["layers"]
    assert len(layers) == 2
    for layer in layers:
        assert layer["is_latent"] and layer["n_kv_heads"] == 1 and (layer["k_dim"], layer["v_dim"]) == (64, 512)


def test_a_text_too_short_to_hold_some_back(tqkv, real_model, tmp_path):
    text = tmp_path / "t" / "text.txt"
    text.parent.mkdir()
    text.write_text("".join(f"Line {i}: the harbour opens at {i % 24} o'clock.\n" for i in range(100)))
    plan = tmp_path / "p" / "p.tqkv"
    plan.parent.mkdir()
    row, _, said = calibrate(tqkv, real_model, plan, "--text", text)
    assert row["passes"] == 0 and row["kl_limit"] is None
    assert "none are held back" in said
