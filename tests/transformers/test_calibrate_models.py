# SPDX-License-Identifier: Apache-2.0
"""Plans that calibrate() makes of tiny models, and what they lose."""
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import turboquant  # noqa: E402
from turboquant_transformers import TurboQuantCache, held_out  # noqa: E402
from turboquant_transformers.calibrate import _latent_query  # noqa: E402
from turboquant_transformers.host_layers import describe  # noqa: E402
from turboquant_transformers.observer import observe_piece  # noqa: E402
from turboquant_transformers.pieces import Text, hold_back  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")

# Heads are small here, and so take more for their scales than those of a real model.
BITS = 5.5
QUICK = dict(n_tokens=1024, n_probes=1, context=4096, progress=lambda *unused: None)


@pytest.fixture(scope="module")
def calibrated(build_model, tokenizer, calibration_text, tmp_path_factory):
    """calibrated(name): model, path, CalibrationResult."""
    made = {}

    def calibrate(name):
        model = build_model(name)
        if name not in made:
            path = tmp_path_factory.mktemp("plans") / f"{name}.tqkv"
            made[name] = path, turboquant.calibrate(model, tokenizer, calibration_text, path, BITS, max_kl=100, **QUICK)
        return model, *made[name]

    return calibrate


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "deepseek_v3"])
def test_plan_is_of_the_model_and_loses_less_than_none(calibrated, name):
    model, path, result = calibrated(name)
    plan = turboquant.Plan.load(path)
    assert plan.fingerprint == result.plan.fingerprint
    assert (plan.arch, plan.profile, plan.context) == (model.config.model_type, str(BITS), 4096)
    assert plan.bits_total <= BITS
    for index, layer in enumerate(describe(model)):
        mine = plan.layer(index)
        assert (mine.n_kv_heads, mine.k_dim, mine.v_dim, mine.is_latent, mine.window) == \
            (layer.n_kv_heads, layer.k_dim, layer.v_dim, name == "deepseek_v3", layer.window)
        np.testing.assert_array_equal(mine.rope.inv_freq, layer.inv_freq)
    assert 0 < result.kl < forgetful_kl(model) / 10


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_queries_for_latents_give_the_models_attention(build_model, name):
    """Scores from what calibration sees, against the probabilities of the model itself."""
    model = build_model(name, "eager")
    tokens = torch.arange(40) * 37 % 253 + 3
    with torch.no_grad():
        wanted = model(input_ids=tokens[None], output_attentions=True).attentions
    layers, seen = describe(model), {}

    def on_layer(module, query, keys, values, scaling, softcap):
        layer = layers[module.layer_idx]
        latent_query = _latent_query(module, query[0], layer)
        turned = query[0, ..., -layer.k_dim:] @ values[0].transpose(1, 2)
        scores = (turned + latent_query @ keys[0].transpose(1, 2)) * scaling
        seen[module.layer_idx] = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)

    with torch.no_grad():
        observe_piece(model, tokens, on_layer)
    assert len(seen) == len(wanted)
    for index, probabilities in seen.items():
        torch.testing.assert_close(probabilities, wanted[index][0], rtol=1e-3, atol=1e-5)


def forgetful_kl(model):
    """KL of a model that remembers nothing but the chunk it reads, as held_out measures."""
    tokens = torch.arange(2048) * 37 % 253 + 3
    with torch.no_grad():
        whole = model(input_ids=tokens[None]).logits[0, 1024:-1]
        chunks = torch.cat([model(input_ids=chunk[None], position_ids=positions[None]).logits[0]
                            for chunk, positions in zip(tokens.split(512), torch.arange(2048).split(512))])
    return held_out.kl_of(whole, chunks[1024:-1]).mean().item()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_attention_over_codes_of_a_plan(build_model, calibrated, name):
    """Old tokens are narrow and tiers age: both paths read the same codes."""
    model, path, _ = calibrated(name)
    tokens = torch.arange(1200)[None] * 41 % 253 + 3
    logits = []
    for attention in (None, "turboquant"):
        model = build_model(name, attention)
        cache = TurboQuantCache(model, path)
        with torch.no_grad():
            logits.append([model(input_ids=chunk, cache=cache).logits for chunk in tokens.split(400, 1)])
        assert cache.bits_per_value < 16
    for decoded, over_codes in zip(*logits):
        assert held_out.kl_of(decoded[0], over_codes[0]).max() < 1e-3


def test_keys_of_llama_lie_in_pairs_as_in_gguf(calibrated):
    assert calibrated("llama")[2].plan.layer(0).rope.style == turboquant.RopeStyle.PAIRS
    assert calibrated("qwen2")[2].plan.layer(0).rope.style == turboquant.RopeStyle.HALVES


def test_the_same_text_makes_the_same_plan(calibrated, tokenizer, calibration_text, tmp_path):
    model, path, _ = calibrated("qwen2")
    turboquant.calibrate(model, tokenizer, calibration_text, tmp_path / "again.tqkv", BITS, max_kl=100, **QUICK)
    assert (tmp_path / "again.tqkv").read_bytes() == path.read_bytes()


def test_a_plan_that_loses_too_much_gets_more_bits(build_model, tokenizer, calibration_text, tmp_path):
    with pytest.warns(UserWarning, match="too the KL on held-back text is .* above 0.0000: ask for more bits"):
        result = turboquant.calibrate(build_model("llama"), tokenizer, calibration_text, tmp_path / "x.tqkv", 4.5,
                                      max_kl=1e-9, **QUICK)
    assert 4.5 * 1.3 < result.plan.bits_total <= 4.5 * held_out.BITS_MOST


def test_steps_are_those_of_the_command_line():
    assert held_out.kl_limit(3.2) == pytest.approx(0.03)
    assert held_out.kl_limit(2.0) == pytest.approx(0.12)
    assert held_out.kl_limit(16) == 0.002
    assert held_out.next_bits(3.2, 3.2, 1.1) == pytest.approx(3.36)
    assert held_out.next_bits(3.2, 3.2, 2.0 ** 4) == pytest.approx(3.2 * 1.05 ** 4)
    assert held_out.next_bits(3.2, 3.2, 1e9) == pytest.approx(4.48)
    assert held_out.next_bits(3.2, 4.48, 2.0) is None


def test_progress_is_told(build_model, tokenizer, calibration_text, tmp_path):
    told = []
    turboquant.calibrate(build_model("llama"), tokenizer, calibration_text, tmp_path / "x.tqkv", BITS,
                         **QUICK | dict(progress=lambda *what: told.append(what)))
    phases = [phase for phase, _ in itertools.groupby(phase for phase, _, _ in told)]
    assert phases == ["observe", "sensitivity", "check"]
    assert ("observe", 1, 1) in told and ("sensitivity", 4, 4) in told
    assert all(0 < done <= total for _, done, total in told)


def test_short_texts_are_not_cut():
    text = Text(torch.arange(5000), None)
    assert hold_back(text) == (text, None)
    seen, held_back = hold_back(Text(torch.arange(9000), 1))
    assert (len(seen.tokens), len(held_back.tokens)) == (9000 - 2048, 2048)
    assert held_back.piece(0, 3).tolist() == [1, 9000 - 2047, 9000 - 2046]


@pytest.mark.parametrize("profile", ["5", "x", "0x", "zip", 0.4, "17"])
def test_profiles_are_checked(profile, tmp_path):
    from turboquant_transformers.calibrate import _profile_bits
    if profile == "5":
        assert (_profile_bits("5"), _profile_bits("5x"), _profile_bits("near-lossless")) == (5.0, 3.2, 4.5)
    else:
        with pytest.raises(ValueError, match="5x, 8x, near-lossless or bits per value"):
            _profile_bits(profile)


def test_texts_must_be_long_enough(build_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="the texts have 5 tokens, at least 256 are needed"):
        turboquant.calibrate(build_model("llama"), tokenizer, ["short"], tmp_path / "x.tqkv")
