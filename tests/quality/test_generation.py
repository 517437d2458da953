# SPDX-License-Identifier: Apache-2.0
"""What a user sees: does an answer that lies thousands of tokens back still come out exactly?

400 lines "key = value" fill some 5000 tokens, all but the last thousand of them in the oldest tier. Then
keys are asked for, from all over the list, under llama-server with an f16 cache of ours and with
the 5x plan. Asked in the same order, so each key is a pair.
"""

import random
import re

import pytest

import fetch
import real_host

N_LINES = 400
N_ASKED = 40
MISSES_MORE = 2  # of 40, than with f16


def make_list(seed):
    """Keys are words of the handbook, each once; values are numbers."""
    rng = random.Random(seed)
    text = (fetch.fetch("texts") / "eval" / "en.txt").read_text()
    keys = rng.sample(sorted(set(re.findall(r"\b[a-z]{6,10}\b", text))), N_LINES)
    return [(key, str(rng.randrange(1000, 9999))) for key in keys]


def ask(host, plugin, model, folder, **env):
    """{key: whether the right value came} for a key of every few lines."""
    pairs = make_list(1)
    listed = "".join(f'settings["{key}"] = "{value}"\n' for key, value in pairs)
    folder.mkdir()
    server = real_host.Server(host, model, folder, real_host.environment(plugin, **env), n_ctx=8192, n_slots=1,
                              n_threads=2)
    try:
        n_tokens = len(server.get("/tokenize", {"content": listed})["tokens"])
        assert 4500 < n_tokens < 8000, n_tokens
        right = {}
        for key, value in pairs[:: N_LINES // N_ASKED]:
            answer = server.complete(0, f'{listed}\nassert settings["{key}"] == "', n=12)
            right[key] = answer.startswith(f'{value}"')
        return right
    finally:
        server.stop()


def test_exact_retrieval(calibrated, tmp_path):
    name, model, plan = calibrated
    if name != "qwen":
        pytest.skip("the one of the three models that can do this with an f16 cache")
    host = real_host.Host(real_host.from_environment("TQKV_TEST_LLAMA_API3"))
    plugin = real_host.from_environment("TQKV_TEST_PLUGIN")
    exact = ask(host, plugin, model, tmp_path / "f16", TQKV_MODE="f16")
    ours = ask(host, plugin, model, tmp_path / "ours", TQKV_PLAN=str(plan))
    print(f"f16 {sum(exact.values())}, 5x {sum(ours.values())} of {len(exact)}")
    assert sum(exact.values()) >= N_ASKED * 3 // 4, "the model itself cannot do it"
    assert sum(ours.values()) >= sum(exact.values()) - MISSES_MORE
