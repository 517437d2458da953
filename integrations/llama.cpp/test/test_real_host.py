# SPDX-License-Identifier: Apache-2.0
"""The plugin in real, unmodified llama.cpp tools.

    TQKV_TEST_LLAMA_API3, TQKV_TEST_LLAMA_API2   build folders of llama.cpp (scripts/build_llama.py)
    TQKV_TEST_MODELS                             folder with the GGUF files of scripts/fetch.py
    TQKV_TEST_PLUGIN                             libggml-turboquant.so, libturboquant.a beside it

What is not given is skipped. Everything is greedy and deterministic.
"""

import filecmp
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest

from real_host import Host, Server, environment, from_environment

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SMOL = "smollm2-135m-q4_1.gguf"
QWEN = "qwen2.5-coder-0.5b-q4_k_m.gguf"
GEMMA = "gemma3-270m-q4_k_m.gguf"
# What follows is so likely that no rounding changes it: stock attention itself rounds to f16 on the way.
CERTAIN = "one two three four five six seven eight nine ten\none two three four five six seven eight nine ten\none two"
PROMPT = "The three largest rivers of Europe are"


@pytest.fixture(scope="session", params=["API3", "API2"])
def host(request):
    return Host(from_environment(f"TQKV_TEST_LLAMA_{request.param}"))


@pytest.fixture(scope="session")
def plugin():
    return from_environment("TQKV_TEST_PLUGIN")


@pytest.fixture(scope="session")
def models():
    return from_environment("TQKV_TEST_MODELS")


@pytest.fixture(scope="session")
def model(models):
    def find(name):
        path = models / name
        if not path.exists():
            pytest.skip(f"{path} is missing")
        return path

    return find


@pytest.fixture(scope="session")
def compiled(host, plugin, tmp_path_factory):
    """Compiles host_*.c against the host."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    library = plugin.parent / "libturboquant.a"
    if not compiler or not library.exists():
        pytest.skip("no C compiler, or no libturboquant.a beside the plugin")

    def compile_program(name):
        program = tmp_path_factory.mktemp("program") / name
        subprocess.run(
            [compiler, "-std=c11", "-O1", "-D_GNU_SOURCE", f"-I{ROOT}/include", f"-I{HERE.parent}/include",
             f"-I{host.source}/include", f"-I{host.source}/ggml/include", str(HERE / f"{name}.c"),
             "-o", str(program), str(library), f"-L{host.bin}", "-lllama", "-lggml", "-lggml-base",
             f"-Wl,-rpath,{host.bin}", "-lm", "-lpthread"], check=True)
        return program

    return compile_program


@pytest.fixture(scope="session")
def program(compiled):
    return compiled("host_state")


@pytest.fixture(scope="session")
def state_program(program, plugin, model, tmp_path_factory):
    """What host_state says about a real model, and the plan it made on the way."""
    plan = tmp_path_factory.mktemp("plan") / "smollm2.tqkv"
    done = subprocess.run([str(program), str(model(SMOL)), str(plan)], text=True, timeout=500,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment(TQKV_TEST_PLUGIN=str(plugin)))
    return done, plan


@pytest.fixture(scope="session")
def plan(state_program):
    _, path = state_program
    assert path.exists(), state_program[0].stdout
    return path


def complete(host, model, *args, env, n=16, prompt=PROMPT, threads=1):
    """Greedy text of llama-completion, its status, and what it wrote on stderr.

    One thread: on a busy machine the barriers of llama.cpp's own threads cost a hundred times the work.
    """
    command = [host.tool("llama-completion"), "-m", str(model), "-p", prompt, "-n", str(n), "--temp", "0",
               "-no-cnv", "-t", str(threads), "--no-display-prompt", "--no-warmup", *map(str, args)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, env=env)
    return done.stdout, done.returncode, done.stderr.decode(errors="replace")


def tiny_models():
    spec = importlib.util.spec_from_file_location("tiny_models", HERE / "tiny_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_one_graph(stderr):
    """Whether llama.cpp (-lv 4) made one graph of the whole model, for prompts and for tokens."""
    found = re.findall(r"sched_reserve: graph.*splits = (.*?), input", stderr)
    return bool(found) and all(set(n.split(" / ")) == {"1"} for n in found)


def ours(stderr):
    return "\n".join(line for line in stderr.splitlines() if line.startswith("turboquant: "))


def test_states_copies_and_shifts(state_program):
    done, _ = state_program
    assert done.returncode == 0, done.stdout
    assert " 0 failed" in done.stdout


def test_states_copies_and_shifts_of_short_contexts(program, plugin, model, tmp_path):
    """The same where most of it begins in plain storage and outgrows it."""
    done = subprocess.run([str(program), str(model(SMOL)), str(tmp_path / "plan.tqkv")], text=True, timeout=500,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment(TQKV_TEST_PLUGIN=str(plugin), TQKV_SHORT="108"))
    assert done.returncode == 0, done.stdout
    assert " 0 failed" in done.stdout


@pytest.mark.parametrize("short", ["0", "42"])
@pytest.mark.parametrize("mode", ["f16", "q8"])
def test_graphs(compiled, plugin, tmp_path, mode, short):
    """In pieces, with many threads, stopped in the middle, outgrowing a short context."""
    tiny_models().llama(tmp_path / "llama.gguf")
    done = subprocess.run([str(compiled("host_graph")), str(tmp_path / "llama.gguf")], text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment(TQKV_TEST_PLUGIN=str(plugin), TQKV_MODE=mode, TQKV_SHORT=short))
    assert done.returncode == 0, done.stdout
    assert "turboquant: active" in done.stdout


def test_short_contexts_with_a_plan(compiled, plugin, model, plan):
    done = subprocess.run([str(compiled("host_graph")), str(model(SMOL)), "short"], text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment(TQKV_TEST_PLUGIN=str(plugin), TQKV_PLAN=str(plan)))
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


# What the plugin says about an architecture; nothing but this line tells it apart from stock.
LINES = {
    "llama": "active: 1.0x",
    "llama_odd": "not active: heads of 40 and 40 channels are not supported",
    "llama_yarn": "active: 1.0x",
    "gemma2": "active: 1.0x",
    "mpt": "active: 1.0x",
    "deepseek2": "active: 1.0x",
    "deepseek2_lite": "active: 1.0x",
    "lfm2": "active: 1.0x",
    "mamba": "not active: llama.cpp keeps the cache to itself",
}


WITH_TIERS = ("llama", "deepseek2", "deepseek2_lite")


@pytest.mark.parametrize("short", ["0", "108"])
@pytest.mark.parametrize("name", LINES)
def test_architectures(program, plugin, tmp_path, name, short):
    """Random weights: shifts, streams, states, plain storage and short contexts, against stock."""
    assert set(LINES) == set(tiny_models().ALL)
    tiny_models().ALL[name](tmp_path / f"{name}.gguf")
    done = subprocess.run([str(program), "--tiers" if name in WITH_TIERS else "--compare",
                           str(tmp_path / f"{name}.gguf")], text=True, timeout=300, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT,
                          env=environment(TQKV_TEST_PLUGIN=str(plugin), TQKV_SHORT=short))
    assert done.returncode == 0, done.stdout
    assert f"turboquant: {LINES[name]}" in done.stdout


def test_loaded_by_ctypes(host, plugin):
    """As llama-cpp-python does: nothing of ggml is visible to the plugin's own lookups."""
    script = f"""
import ctypes
ggml = ctypes.CDLL("{host.bin}/libggml.so")
base = ctypes.CDLL("{host.bin}/libggml-base.so")
ggml.ggml_backend_load.restype = ctypes.c_void_p
reg = ggml.ggml_backend_load(b"{plugin}")
assert reg
base.ggml_backend_reg_name.restype = ctypes.c_char_p
assert base.ggml_backend_reg_name(ctypes.c_void_p(reg)) == b"TURBOQUANT"
assert ggml.ggml_backend_load(b"{plugin}") == reg
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), timeout=60)


@pytest.mark.parametrize("name", [SMOL, QWEN, GEMMA])
def test_f16_gives_the_same_text(host, plugin, model, name):
    want, status, _ = complete(host, model(name), "-c", 256, prompt=CERTAIN, n=10, env=environment())
    assert status == 0 and b"three four" in want
    text, status, log = complete(host, model(name), "-c", 256, prompt=CERTAIN, n=10,
                                 env=environment(plugin, TQKV_MODE="f16"))
    assert status == 0, log
    assert "turboquant: active: 1.0x" in log
    assert text == want


@pytest.mark.parametrize("name", [SMOL, GEMMA])
def test_q8_without_a_plan(host, plugin, model, name):
    text, status, log = complete(host, model(name), "-c", 256, env=environment(plugin))
    assert status == 0, log
    assert re.search(r"turboquant: active: (1\.9|2\.0)x .* built-in q8 \(no plan", log), ours(log)
    assert text.strip()


def test_two_threads(host, plugin, model, plan):
    env = environment(plugin, TQKV_PLAN=str(plan))
    one, _, _ = complete(host, model(SMOL), "-c", 256, n=4, env=env)
    two, status, log = complete(host, model(SMOL), "-c", 256, n=4, env=env, threads=2)
    assert status == 0, log
    assert one == two


def test_plan_by_name(host, plugin, model, plan):
    text, status, log = complete(host, model(SMOL), "-c", 8192, "-lv", 4, env=environment(plugin, TQKV_PLAN=str(plan)))
    assert status == 0, log
    found = re.search(r"active: ([0-9.]+)x \(([0-9.]+) bits per value at 8192 tokens\), plan smollm2.tqkv, 30 layers",
                      log)
    assert found and float(found[1]) > 4.0, ours(log)
    size = re.search(r"TURBOQUANT KV buffer size = +([0-9.]+) MiB", log)
    assert size and float(size[1]) < 180 / 4, "llama.cpp reports what the cache takes"
    assert is_one_graph(log)
    assert text.strip()


def test_plan_beside_the_model(host, plugin, model, plan, tmp_path):
    (tmp_path / "m.gguf").symlink_to(model(SMOL))
    shutil.copy(plan, tmp_path / "m.tqkv")
    _, status, log = complete(host, tmp_path / "m.gguf", "-c", 256, n=2, env=environment(plugin))
    assert status == 0, log
    assert "plan m.tqkv, 30 layers" in log


def test_plan_of_another_model(host, plugin, model, plan):
    _, status, log = complete(host, model(GEMMA), "-c", 256, n=2, env=environment(plugin, TQKV_PLAN=str(plan)))
    assert status != 0
    assert "was made for another model" in log and "tqkv calibrate" in log
    assert "unable to create context" in log or "failed to" in log


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    data = bytearray(data)
    data[len(data) // 2] ^= 4
    return bytes(data)


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: b"GGUF" + data[4:]],
                         ids=["cut", "flipped", "empty", "foreign"])
def test_damaged_plan(host, plugin, model, plan, tmp_path, damage):
    path = tmp_path / "bad.tqkv"
    path.write_bytes(damage(plan.read_bytes()))
    _, status, log = complete(host, model(SMOL), "-c", 256, n=2, env=environment(plugin, TQKV_PLAN=str(path)))
    assert status > 0, log  # no signal, no run without compression
    assert f"turboquant: not active: plan {path}" in log


@pytest.mark.parametrize("variables", [{"TQKV_PLAN": "/nonexistent/x.tqkv"}, {"TQKV_MODE": "fast"},
                                       {"TQKV_STATE": "quick"}, {"TQKV_SHORT": "-1"},
                                       {"TQKV_SHORT": "12x"}], ids=lambda v: next(iter(v)))
def test_settings_without_meaning(host, plugin, model, variables):
    _, status, log = complete(host, model(SMOL), "-c", 256, n=2, env=environment(plugin, **variables))
    assert status > 0
    assert "turboquant: not active" in log and next(iter(variables.values())) in log
    assert "TURBOQUANT0" in log  # llama.cpp stops because the device is missing


def test_no_flash_attention(host, plugin, model):
    want, _, _ = complete(host, model(SMOL), "-c", 256, "-fa", "off", env=environment())
    text, status, log = complete(host, model(SMOL), "-c", 256, "-fa", "off", "-lv", 4, env=environment(plugin))
    assert status == 0, log
    assert is_one_graph(log)
    assert "not active: flash attention is off" in log
    assert text == want


def test_quantised_cache_type(host, plugin, model, plan):
    text, status, log = complete(host, model(SMOL), "-c", 256, "-ctk", "q8_0", "-ctv", "q8_0",
                                 env=environment(plugin, TQKV_PLAN=str(plan)))
    assert status == 0 and text.strip(), log
    assert "built-in q8" in log and "leave -ctk and -ctv at f16" in log


@pytest.mark.parametrize("args", [["-nkvo"], ["-ngl", "0"]], ids=["nkvo", "ngl0"])
def test_cache_kept_by_the_host(host, plugin, model, args):
    _, status, log = complete(host, model(SMOL), "-c", 256, *args, n=2, env=environment(plugin))
    assert status == 0, log
    assert "turboquant: not active: llama.cpp keeps the cache" in log


def test_a_split_graph(host, plugin, model, plan):
    settings = {"TQKV_PLAN": str(plan)}
    want, _, _ = complete(host, model(SMOL), "-c", 256, env=environment(plugin, **settings))
    text, status, log = complete(host, model(SMOL), "-c", 256, "-lv", 4, env=environment(plugin, **settings, TQKV_GRAPH="split"))
    assert status == 0, log
    assert not is_one_graph(log)
    assert text == want
    _, status, log = complete(host, model(SMOL), "-c", 256, n=2, env=environment(plugin, **settings, TQKV_GRAPH="half"))
    assert status != 0 and "TQKV_GRAPH=half has no meaning; use whole or split" in log


def test_some_layers(host, plugin, model, plan):
    _, status, log = complete(host, model(SMOL), "-c", 256, "-ngl", 10, "-lv", 4, n=4,
                              env=environment(plugin, TQKV_PLAN=str(plan)))
    assert status == 0, log
    assert "plan smollm2.tqkv, 9 layers" in log
    assert not is_one_graph(log)  # the other layers belong to the host's CPU backend


def test_scaled_rope(host, plugin, model, plan):
    text, status, log = complete(host, model(SMOL), "-c", 256, "--rope-scaling", "yarn", "--rope-scale", 4,
                                 "--yarn-orig-ctx", 2048, env=environment(plugin, TQKV_PLAN=str(plan)))
    assert status == 0 and text.strip(), log
    assert "RoPE of layer 0 is not the one" in log


def test_context_shift(host, plugin, model, plan):
    """Twice around a small context."""
    text, status, log = complete(host, model(SMOL), "-c", 128, "--context-shift", "--ignore-eos", n=200,
                                 env=environment(plugin, TQKV_PLAN=str(plan)))
    assert status == 0, log
    assert len(text) > 300
    assert "uncompressed" not in log


@pytest.mark.parametrize("mode", ["f16", "plan"])
def test_server_slots(host, plugin, model, plan, tmp_path, mode):
    env = environment(plugin, TQKV_MODE="f16") if mode == "f16" else environment(plugin, TQKV_PLAN=str(plan))
    server = Server(host, model(SMOL), tmp_path, env)
    try:
        # two sequences at once
        texts = [None, None]
        prompts = [PROMPT, "def fibonacci(n):\n    "]

        def ask(i):
            texts[i] = server.complete(i, prompts[i])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(texts)

        server.slot(0, "save", filename="first")
        server.slot(0, "erase")
        restored = server.slot(0, "restore", filename="first")
        assert restored["n_restored"] > 10
        server.slot(0, "save", filename="second")
        assert filecmp.cmp(tmp_path / "first", tmp_path / "second", shallow=False)
        # the restored tokens are used and say the same
        longer = prompts[0] + texts[0]
        after = server.complete(0, longer)
        assert after
    finally:
        server.stop()
    log = (tmp_path / "server.log").read_text()
    assert "turboquant: active" in log


def test_draft_model(host, plugin, model, plan, tmp_path):
    """Two contexts of ours, each with one graph of its own: the model guesses what it will say itself."""
    path = model(SMOL)
    server = Server(host, path, tmp_path, environment(plugin, TQKV_PLAN=str(plan)), n_slots=1,
                    args=("-md", path, "--spec-type", "draft-simple"))
    try:
        answer = server.answer(0, CERTAIN, n=48)
    finally:
        server.stop()
    assert answer["content"].startswith(" three four five six seven eight nine ten")
    assert answer["timings"]["draft_n"] > 10
    assert answer["timings"]["draft_n_accepted"] > 0.7 * answer["timings"]["draft_n"]
    assert (tmp_path / "server.log").read_text().count("turboquant: active") == 2
