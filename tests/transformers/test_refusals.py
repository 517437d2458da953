# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused with a sentence that says what and where."""
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import turboquant  # noqa: E402
from turboquant_transformers import TurboQuantCache  # noqa: E402
from turboquant_transformers.host_layers import describe  # noqa: E402
from turboquant_transformers.plan_fit import plan_shape, plans_for  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")


@pytest.fixture
def plan_of():
    """plan_of(layer): a plan of one layer for a HostLayer."""
    return lambda layer: turboquant.Plan.builtin(turboquant.Builtin.Q8, plan_shape(layer, turboquant.RopeStyle.HALVES))


@pytest.mark.parametrize("change, sentence", [
    (dict(n_heads=8), "layer 0 has n_heads 4 in the plan and 8 in this model"),
    (dict(n_kv_heads=4), "layer 0 has n_kv_heads 2 in the plan and 4"),
    (dict(k_dim=64), "layer 0 has k_dim 32 in the plan and 64"),
    (dict(v_dim=16), "layer 0 has v_dim 32 in the plan and 16"),
    (dict(window=128), "layer 0 has window 0 in the plan and 128"),
    (dict(inv_freq=np.zeros(0, np.float32), pairs=np.zeros((0, 2), int)), "layer 0 has another RoPE .* none in this"),
])
def test_plans_of_other_models(build_model, plan_of, tmp_path, change, sentence):
    layer = describe(build_model("llama"))[0]
    path = tmp_path / "one.tqkv"
    plan_of(layer).save(path)
    assert plans_for([layer], path)[0].rows.k_order is None
    with pytest.raises(ValueError, match=f"one.tqkv is for another model: {sentence}"):
        plans_for([dataclasses.replace(layer, **change)], path)


def test_plans_of_other_rope(build_model, plan_of):
    layer = describe(build_model("llama"))[0]
    other = dataclasses.replace(layer, inv_freq=layer.inv_freq * np.float32(1.01))
    with pytest.raises(ValueError, match=r"another RoPE \(32 channels, slowest 0.000178 in the plan"):
        plans_for([other], plan_of(layer))


def test_plans_of_other_depth(build_model, plan_of):
    model = build_model("llama")
    with pytest.raises(ValueError, match="is for another model: it has 1 layers, this model 2"):
        TurboQuantCache(model, plan_of(describe(model)[0]))


def test_files_that_are_no_plans(build_model, tmp_path):
    with pytest.raises(turboquant.TurboQuantError, match="missing.tqkv.*cannot open"):
        TurboQuantCache(build_model("llama"), tmp_path / "missing.tqkv")


def tiny(kind, **own):
    return getattr(transformers, f"{kind}Config")(vocab_size=64, hidden_size=64, num_hidden_layers=2, **own)


@pytest.mark.parametrize("kind, own, sentence", [
    ("Mamba", {}, "layer 0 keeps a cache of its own kind .LinearAttentionLayer"),
    ("GptOss", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4),
     "layer 1 turns its keys with the position in a way"),  # attention with sinks
])
def test_models_that_are_not_understood(kind, own, sentence):
    model = getattr(transformers, f"{kind}ForCausalLM")(tiny(kind, **own))
    with pytest.raises(ValueError, match=sentence):
        TurboQuantCache(model, "q8")


def test_heads_of_odd_sizes():
    model = transformers.LlamaForCausalLM(tiny("Llama", num_attention_heads=8, intermediate_size=64))
    with pytest.raises(ValueError, match="layer 0: heads of 8 .K. and 8 .V. channels; turboquant takes multiples of 16"):
        TurboQuantCache(model, "q8")


def test_latents_over_codes(build_model, random_tokens):
    model = build_model("deepseek_v3", "turboquant")
    with pytest.raises(ValueError, match="layer 0 caches latents.*another attn_implementation than 'turboquant'"):
        model(input_ids=random_tokens(1, 4), cache=TurboQuantCache(model, "q8"))


def test_more_tokens_than_asked_for(build_model, random_tokens):
    model = build_model("llama")
    with pytest.raises(ValueError, match="the cache is full: 0 [+] 40 tokens, and it was made for max_tokens=32"):
        model(input_ids=random_tokens(1, 40), cache=TurboQuantCache(model, "q8", max_tokens=32))


def test_a_batch_of_another_size(build_model, random_tokens):
    model = build_model("llama")
    cache = TurboQuantCache(model, "q8")
    model(input_ids=random_tokens(2, 5), cache=cache)
    with pytest.raises(ValueError, match="layer 0 got K .3, 2, 5, 32.*the cache holds a batch of 2"):
        model(input_ids=random_tokens(3, 5), cache=cache)


def test_going_back_further_than_a_window_keeps(build_model, random_tokens):
    model = build_model("mistral", "turboquant")
    cache = TurboQuantCache(model, "q8")
    model(input_ids=random_tokens(1, 2000), cache=cache)
    cache.crop(-500)
    with pytest.raises(ValueError, match="layer 0 cannot go back by 400 tokens: it sees 48 and keeps 768"):
        cache.crop(-400)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(10)


def test_arguments_that_change_scores(build_model, random_tokens):
    from turboquant_transformers.attention import attend_over_codes
    states = torch.zeros(1, 2, 3, 16)
    module = build_model("llama").model.layers[1].self_attn
    with pytest.raises(ValueError, match="layer 1: attention with s_aux is not supported"):
        attend_over_codes(module, states, states, states, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="no dropout"):
        attend_over_codes(module, states, states, states, None, dropout=0.1)
