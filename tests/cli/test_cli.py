# SPDX-License-Identifier: Apache-2.0
"""tqkv from outside: help, exit codes, messages for bad input, and that it leaves no half files."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import time

import pytest

COMMANDS = ["calibrate", "eval", "inspect", "report", "run", "doctor"]
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def test_help_names_every_command(tqkv):
    done = tqkv("--help")
    assert done.returncode == OK and done.stderr == ""
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(tqkv, command):
    done = tqkv(command, "--help")
    assert done.returncode == OK and done.stderr == ""
    assert f"tqkv {command}" in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_version(tqkv):
    done = tqkv("--version")
    assert done.returncode == OK
    assert done.stdout.startswith("tqkv ") and done.stdout.count(".") == 2


@pytest.mark.parametrize("args", [
    [], ["unknown"], ["--unknown"], ["inspect"], ["inspect", "a", "b"], ["inspect", "--no-such", "a"],
    ["inspect", "--tier"], ["inspect", "--tier", "x", "a"], ["inspect", "--tier", "99", "a"],
    ["run"], ["run", "--plan"], ["run", "--", "true"], ["doctor", "a", "b"], ["doctor", "--plan", "p"],
])
def test_wrong_usage(tqkv, args):
    done = tqkv(*args)
    assert done.returncode == USAGE
    assert done.stdout == "" and "--help" in done.stderr


@pytest.mark.parametrize("args", [
    ["eval"], ["eval", "m.gguf"], ["eval", "m.gguf", "--text", "t", "-c", "0"],
    ["eval", "m.gguf", "--text", "t", "-c", "2048,,512"], ["eval", "m.gguf", "--text", "t", "-ub", "many"],
    ["eval", "m.gguf", "--text", "t", "-t", "0"], ["eval", "m.gguf", "--text", "t", "--speed-only"],
    ["eval", "m.gguf", "--text", "t", "--depth", "512,0"], ["eval", "m.gguf", "--text", "t", "--depth", "deep"],
    ["eval", "m.gguf", "--text", "t", "--speed-threads", "0"],
    ["calibrate"], ["calibrate", "a", "b"], ["calibrate", "m.gguf", "--bits", "0"],
    ["calibrate", "m.gguf", "--bits", "nan"], ["calibrate", "m.gguf", "--profile", "big"],
    ["calibrate", "m.gguf", "--profile", "5x,8x", "-o", "one.tqkv"], ["calibrate", "m.gguf", "--tokens", "-4"],
    ["calibrate", "m.gguf", "--max-kl", "-1"], ["calibrate", "m.gguf", "--max-kl", "nan"],
])
def test_wrong_usage_of_commands_that_run_a_model(tqkv, has_llama, args):
    if not has_llama:
        pytest.skip("this tqkv was built without llama.cpp")
    done = tqkv(*args)
    assert done.returncode == USAGE
    assert "--help" in done.stderr


# ---- inspect ----------------------------------------------------------------------------------


def test_inspect(tqkv, plan_file):
    done = tqkv("inspect", plan_file)
    assert done.returncode == OK and done.stderr == ""
    assert "bits per value" in done.stdout and "\033" not in done.stdout
    assert "32768" in done.stdout


def test_inspect_json(tqkv, plan_file):
    done = tqkv("inspect", "--json", plan_file)
    assert done.returncode == OK
    told = json.loads(done.stdout)
    assert told["n_layers"] == 1
    assert told["layers"][0]["n_kv_heads"] == 2
    # 8 bits and a scale byte per head of 64: 8.125 and what tables take
    assert 8.1 <= told["totals"][-1]["bits_total"] < 8.6


def test_inspect_of_a_plan_with_a_layer_that_has_no_cache(tqkv, mixed_plan):
    done = tqkv("inspect", mixed_plan)
    assert done.returncode == OK and done.stderr == ""
    assert "32768" in done.stdout


def output_on_terminal(program, *args, env=None):
    main, side = pty.openpty()
    process = subprocess.Popen([program, *map(str, args)], stdout=side, stderr=side, stdin=subprocess.DEVNULL,
                               env=dict(os.environ, TERM="xterm", **(env or {})))
    os.close(side)
    text = b""
    while True:
        try:
            block = os.read(main, 65536)
        except OSError:
            break
        if not block:
            break
        text += block
    process.wait()
    os.close(main)
    return text.decode()


def test_colours_only_on_a_terminal_that_wants_them(tqkv, plan_file, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[48;5;" in output_on_terminal(tqkv.program, "inspect", plan_file)
    assert "\033[" not in output_on_terminal(tqkv.program, "inspect", plan_file, env={"NO_COLOR": "1"})


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_inspect_refuses_damaged_plans(tqkv, plan_file, damage):
    data = bytearray(plan_file.read_bytes())
    if damage == "empty":
        data = b""
    elif damage == "truncated":
        data = data[:len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data = b"GGUF" + bytes(data[4:])
    plan_file.write_bytes(data)
    done = tqkv("inspect", plan_file)
    assert done.returncode == FAILED and done.stdout == ""
    assert str(plan_file) in done.stderr


def test_inspect_names_a_missing_plan(tqkv, tmp_path):
    done = tqkv("inspect", tmp_path / "none.tqkv")
    assert done.returncode == FAILED
    assert "none.tqkv" in done.stderr and "tqkv calibrate" in done.stderr
    assert tqkv("inspect", tmp_path).returncode == FAILED


def test_full_disk(tqkv, plan_file):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([tqkv.program, "inspect", plan_file], stdout=full, stderr=subprocess.PIPE, text=True,
                              check=False)
    assert done.returncode == FAILED and "stdout" in done.stderr


# ---- run --------------------------------------------------------------------------------------


def fake_plugin(tmp_path):
    path = tmp_path / "libggml-turboquant.so"
    path.write_bytes(b"")
    return path


def test_run_sets_the_environment(tqkv, plan_file, model_file, tmp_path):
    model, plugin = model_file(), fake_plugin(tmp_path)
    done = tqkv("run", "--plugin", plugin, "--", "sh", "-c", 'echo "$GGML_BACKEND_PATH $LLAMA_ARG_DEVICE $TQKV_PLAN"',
                "-m", model)
    assert done.stderr == "" and done.returncode == OK
    assert done.stdout.split() == [str(plugin), "TURBOQUANT0", str(plan_file)]


def test_run_passes_status_and_arguments_on(tqkv, plan_file, model_file, tmp_path):
    done = tqkv("run", "--plan", plan_file, "--plugin", fake_plugin(tmp_path), "--", "sh", "-c",
                'echo "$2"; exit 7', "sh", "--model=" + str(model_file()), "--plan")
    assert done.returncode == 7 and done.stdout == "--plan\n"


def test_run_without_a_program_to_run(tqkv, plan_file, model_file, tmp_path):
    done = tqkv("run", "--plugin", fake_plugin(tmp_path), "--", "no-such-program", "-m", model_file())
    assert done.returncode == FAILED and "no-such-program" in done.stderr


@pytest.mark.parametrize("change, told", [
    ({"block_count": 2}, "2"), ({"attention__head_count_kv": 4}, "4"), ({"attention__head_count_kv": [1]}, "1"),
    ({"attention__key_length": 128}, "128"), ({"arch": "qwen2"}, "qwen2"),
])
def test_run_refuses_a_plan_of_another_model(tqkv, plan_file, model_file, tmp_path, change, told):
    model = model_file("other.gguf", **change)
    if change.get("arch"):
        plan = json.loads(tqkv("inspect", "--json", plan_file).stdout)
        if not plan["arch"]:
            pytest.skip("a built-in plan fits every architecture")
    done = tqkv("run", "--plan", plan_file, "--plugin", fake_plugin(tmp_path), "--", "true", "-m", model)
    assert done.returncode == FAILED
    assert "other.gguf" in done.stderr and "tiny.tqkv" in done.stderr and told in done.stderr


def test_run_names_a_missing_plugin(tqkv, plan_file, model_file):
    done = tqkv("run", "--plugin", "/nowhere/x.so", "--", "true", "-m", model_file())
    assert done.returncode == FAILED and "/nowhere/x.so" in done.stderr


# ---- GGUF headers -----------------------------------------------------------------------------


@pytest.mark.parametrize("content, told", [
    (b"", "not a GGUF"), (b"PK\3\4" + bytes(100), "not a GGUF"), (b"GGUF", "not a GGUF"),
    (b"GGUF" + (9).to_bytes(4, "little") + bytes(100), "version 9"),
    (b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1 << 60).to_bytes(8, "little") + bytes(64), "keys"),
    (b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + (1 << 62).to_bytes(8, "little"),
     "ends early"),
    (b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "general.architecture"),
])
def test_bad_models(tqkv, plan_file, tmp_path, content, told):
    model = tmp_path / "bad.gguf"
    model.write_bytes(content)
    done = tqkv("run", "--plan", plan_file, "--", "true", "-m", model)
    assert done.returncode == FAILED
    assert "bad.gguf" in done.stderr and told in done.stderr


def test_every_truncation_of_a_model_is_told(tqkv, plan_file, model_file, tmp_path):
    whole = model_file().read_bytes()
    for n in range(0, len(whole), 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        done = tqkv("run", "--plan", plan_file, "--", "true", "-m", tmp_path / "cut.gguf")
        assert done.returncode == FAILED and "cut.gguf" in done.stderr, n


def test_a_model_without_attention(tqkv, plan_file, model_file):
    model = model_file("rnn.gguf", arch="mamba", attention__head_count=0, attention__head_count_kv=0)
    done = tqkv("run", "--plan", plan_file, "--", "true", "-m", model)
    assert done.returncode == FAILED and "mamba" in done.stderr and "head_count" in done.stderr


# ---- doctor -----------------------------------------------------------------------------------


def test_doctor(tqkv, plan_file, model_file):
    if not (tqkv.program.parent.parent / "lib" / "libggml-turboquant.so").exists():
        pytest.skip("no plugin")
    done = tqkv("doctor", model_file())
    assert done.returncode == OK, done.stdout + done.stderr
    assert "can be loaded" in done.stdout and "Nothing stands in the way" in done.stdout
    assert "Bytes per token" in done.stdout


def test_doctor_finds_what_is_missing(tqkv, model_file, tmp_path):
    done = tqkv("doctor", model_file("lonely.gguf"), "--plugin", fake_plugin(tmp_path))
    assert done.returncode == FAILED
    assert "BAD   plugin" in done.stdout and "BAD   plan" in done.stdout and "tqkv calibrate" in done.stdout


def test_doctor_refuses_a_program_that_is_none_of_llama_cpp(tqkv):
    done = tqkv("doctor", "--program", "sh")
    assert done.returncode == FAILED and "libggml-base" in done.stdout


def test_doctor_reads_the_environment(tqkv):
    done = tqkv("doctor", env={"GGML_BACKEND_PATH": "/nowhere/x.so"})
    assert done.returncode == FAILED and "/nowhere/x.so" in done.stdout


# ---- commands that run a model ----------------------------------------------------------------


def test_without_llama_the_way_out_is_named(tqkv, has_llama):
    if has_llama:
        pytest.skip("this tqkv was built with llama.cpp")
    for command in ("eval", "calibrate"):
        done = tqkv(command, "m.gguf")
        assert done.returncode == FAILED and "make llama" in done.stderr


def test_eval_says_what_is_wrong_before_the_work(tqkv, has_llama, model_file, tmp_path):
    if not has_llama:
        pytest.skip("this tqkv was built without llama.cpp")
    text = tmp_path / "t.txt"
    text.write_text("a few words\n")
    for args, told in [
        (["none.gguf", "--text", text], "none.gguf"),
        ([model_file(), "--text", text, "--cache", "q3_9"], "q3_9"),
        ([model_file(), "--text", text, "--plan", tmp_path / "none.tqkv"], "none.tqkv"),
        ([model_file(), "--text", text, "--cache", "f16", "--json", tmp_path / "no" / "dir.json"], "dir.json"),
        ([model_file(), "--text", text, "--cache", "ours-q8", "--plugin", "/nowhere/x.so"], "/nowhere/x.so"),
    ]:
        done = tqkv("eval", *args)
        assert done.returncode in (FAILED, USAGE), args
        assert told in done.stderr, args


def test_calibrate_says_what_is_wrong_before_the_work(tqkv, has_llama, model_file, tmp_path):
    if not has_llama:
        pytest.skip("this tqkv was built without llama.cpp")
    for args, told in [
        (["none.gguf"], "none.gguf"),
        (["none.gguf", "--profile", "5x,near-lossless,4"], "none.gguf"),
        ([model_file(), "-o", tmp_path / "no" / "plan.tqkv"], "plan.tqkv"),
        ([model_file(), "-o", tmp_path], "not a file"),
        ([model_file(), "--text", tmp_path / "none.txt"], "none.txt"),
    ]:
        done = tqkv("calibrate", *args)
        assert done.returncode == FAILED, args
        assert told in done.stderr, args
    assert not list(tmp_path.glob("*.tmp"))


def test_text_too_short(tqkv, real_model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("This text has about ten tokens in it.\n")
    done = tqkv("eval", real_model, "--text", text, "--cache", "f16", "-c", "512")
    assert done.returncode == FAILED
    assert "short.txt" in done.stderr and "512" in done.stderr and "tokens" in done.stderr
    done = tqkv("calibrate", real_model, "--text", text, "-o", tmp_path / "p.tqkv")
    assert done.returncode == FAILED and "tokens" in done.stderr
    assert not (tmp_path / "p.tqkv").exists()


def check_parts(row):
    """Texts and positions split the scored tokens of a row; their means add up to its mean."""
    assert [part["text"] for part in row["texts"]] == ["text.txt"]
    assert row["texts"][0]["kl_p999"] == row["kl_p999"] and row["texts"][0]["top1"] == row["top1"]
    assert len(row["positions"]) == 16
    assert row["positions"][0]["first"] == 64 and row["positions"][-1]["last"] == 126
    for before, part in zip(row["positions"], row["positions"][1:]):
        assert part["first"] == before["last"] + 1
        assert part["last"] - part["first"] + 1 == part["tokens"]
    for parts in row["texts"], row["positions"]:
        assert sum(part["tokens"] for part in parts) == row["n_scored"]
        mean = sum(part["tokens"] * part["kl_mean"] for part in parts) / row["n_scored"]
        assert mean == pytest.approx(row["kl_mean"], rel=1e-5, abs=1e-9)


def test_eval_of_a_real_model(tqkv, real_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: the harbour opens at {i % 24} o'clock.\n" for i in range(100)))
    done = tqkv("eval", real_model, "--text", text, "--cache", "f16,q4_0,ours-f16,ours-q8", "-c", "128", "-ub", "32",
                "--json", tmp_path / "out.json", timeout=300)
    assert done.returncode == OK, done.stderr
    rows = {row["cache"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert all(row["n_scored"] == 63 for row in rows.values())
    assert abs(rows["ours-f16"]["kl_mean"]) < 1e-7 and rows["ours-f16"]["top1"] == 1
    assert rows["ours-q8"]["kl_mean"] < rows["q4_0"]["kl_mean"]
    assert rows["q4_0"]["bits"] == 4.5 and 8 < rows["ours-q8"]["bits"] < 9
    for row in rows.values():
        check_parts(row)
        assert row["kl_ci95"] is None, "63 tokens are too few"
    assert not list(tmp_path.glob("*.tmp"))


def test_speed_of_a_real_model(tqkv, real_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: the harbour opens at {i % 24} o'clock.\n" for i in range(100)))
    done = tqkv("eval", real_model, "--text", text, "--cache", "f16,ours-q8", "--speed-only", "--depth", "0,24",
                "--speed-threads", "1,2", "--quick-fill", "--json", tmp_path / "out.json", timeout=300,
                env={"OMP_WAIT_POLICY": "passive"})
    assert done.returncode == OK, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["speed"]
    assert [(row["depth"], row["n_threads"], row["cache"]) for row in rows] == [
        (depth, threads, cache) for depth in (0, 24) for threads in (1, 2) for cache in ("f16", "ours-q8")]
    for row in rows:
        assert 0 < row["decode_low"] <= row["decode"] <= row["decode_high"]
        assert row["prefill"] is None and row["prefill_rounds"] == 0


def test_calibration_of_little_text(tqkv, real_model, tmp_path):
    """It works, says what is wrong with the text, and gives the same file on any number of threads."""
    text = tmp_path / "copies.txt"
    text.write_text("The harbour opens at noon. Nobody knows why the bridge was painted green.\n" * 50)
    plans = []
    for n_threads in (1, 2):
        plan = tmp_path / f"{n_threads}.tqkv"
        done = tqkv("calibrate", real_model, "--text", text, "--tokens", "512", "--probes", "1", "-t", n_threads,
                    "-o", plan, timeout=300)
        assert done.returncode == OK, done.stderr
        assert "tokens; with fewer than 8192" in done.stderr and "repeats itself" in done.stderr
        plans.append(plan.read_bytes())
    assert plans[0] == plans[1]


def test_interrupted_calibration_leaves_nothing(tqkv, real_model, tmp_path):
    process = subprocess.Popen([tqkv.program, "calibrate", str(real_model), "-o", str(tmp_path / "p.tqkv")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []
