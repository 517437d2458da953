# SPDX-License-Identifier: Apache-2.0
"""Logits over a TurboQuantCache against those over a cache of transformers."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from turboquant_transformers import TurboQuantCache  # noqa: E402
from turboquant_transformers.host_layers import describe  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")

NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "cohere", "gpt_neox", "deepseek_v2", "deepseek_v3"]
OVER_CODES = [name for name in NAMES if not name.startswith("deepseek")]

# Sums in another order differ in the last bits of f32; next to a tie that makes another f16 of a stored value.
F16_STEP = 2.0 ** -11


@torch.no_grad()
def feed(model, cache, tokens, chunks, mask=None):
    """Logits [batch][n][vocabulary] of tokens that are fed in chunks."""
    logits, first = [], 0
    for n in chunks:
        chunk_mask = None if mask is None else mask[:, :first + n]
        positions = None if mask is None else (chunk_mask.cumsum(-1) - 1).clamp(min=0)[:, first:]
        logits.append(model(input_ids=tokens[:, first:first + n], attention_mask=chunk_mask, position_ids=positions,
                            use_cache=True, cache=cache).logits)
        first += n
    return torch.cat(logits, 1)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_f16_plan_equals_a_cache_that_rounds_to_f16(build_model, rounded_cache, random_tokens, name):
    """Bit for bit: what any attention implementation gets are the rounded rows themselves."""
    model, tokens, chunks = build_model(name), random_tokens(2, 70), (40, 1, 1, 20, 1, 7)
    expected = feed(model, rounded_cache(model), tokens, chunks)
    assert torch.equal(feed(model, TurboQuantCache(model, "f16"), tokens, chunks), expected)


@pytest.mark.parametrize("name", OVER_CODES)
def test_attention_over_codes(build_model, rounded_cache, random_tokens, name):
    tokens, chunks = random_tokens(2, 70), (40, 1, 1, 20, 1, 7)
    expected = feed(build_model(name), rounded_cache(build_model(name)), tokens, chunks)
    model = build_model(name, "turboquant")
    assert relative(feed(model, TurboQuantCache(model, "f16"), tokens, chunks), expected) < F16_STEP
    assert 0 < relative(feed(model, TurboQuantCache(model, "q8"), tokens, chunks), expected) < 0.2


def test_values_that_are_f16_lose_nothing(build_model, random_tokens):
    """A float16 model keeps f16 rows, so the plan "f16" is lossless for it."""
    from transformers import DynamicCache
    model, tokens, chunks = build_model("llama"), random_tokens(1, 30), (20, 1, 9)
    model.half()
    try:
        expected = feed(model, DynamicCache(config=model.config), tokens, chunks)
        assert torch.equal(feed(model, TurboQuantCache(model, "f16"), tokens, chunks), expected)
    finally:
        model.float()


@pytest.mark.parametrize("attention", [None, "turboquant"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_use_their_cells_in_turn(build_model, rounded_cache, random_tokens, name, attention):
    """Chunks longer than a piece, and a text longer than the cells of a window."""
    tokens, chunks = random_tokens(1, 1800), (1200, 1, 1, 595, 1, 1, 1)
    expected = feed(build_model(name), rounded_cache(build_model(name)), tokens, chunks)
    model = build_model(name, attention)
    cache = TurboQuantCache(model, "f16")
    got = feed(model, cache, tokens, chunks)
    assert relative(got, expected) < 5e-3 if attention else torch.equal(got, expected)
    window = cache.layers[0]
    assert window.n_cells < 1800 and window.store.stats().n_tokens[0] == window.n_cells


@pytest.mark.parametrize("attention", [None, "turboquant"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padding_on_the_left_is_not_stored(build_model, random_tokens, name, attention):
    model, tokens = build_model(name, attention), random_tokens(2, 90)
    n_padding = 37
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :n_padding] = 0
    cache = TurboQuantCache(model, "f16")
    got = feed(model, cache, tokens, (80, 1, 9), mask)
    alone = feed(model, TurboQuantCache(model, "f16"), tokens[1:, n_padding:], (80 - n_padding, 1, 9))
    assert relative(got[1:, n_padding:], alone) < F16_STEP
    assert cache.layers[1].store.stats().n_written == 2 * 90 - n_padding


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cropped_tokens_are_forgotten(build_model, random_tokens, name):
    model, tokens = build_model(name, "turboquant"), random_tokens(1, 120)
    straight, cropped = TurboQuantCache(model, "f16"), TurboQuantCache(model, "f16")
    expected = feed(model, straight, tokens, (100, 20))
    feed(model, cropped, torch.cat([tokens[:, :100], random_tokens(1, 12)], 1), (100, 12))
    cropped.crop(-12)
    assert cropped.get_seq_length() == 100
    assert relative(feed(model, cropped, tokens[:, 100:], (20,)), expected[:, 100:]) < F16_STEP


def test_streams_are_reordered_repeated_and_selected(build_model, random_tokens):
    model, tokens = build_model("llama", "turboquant"), random_tokens(3, 50)
    cache = TurboQuantCache(model, "q8")
    feed(model, cache, tokens[:, :40], (40,))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    sources = torch.tensor([2, 2, 0, 0])
    got = feed(model, cache, tokens[sources, 40:], (10,))
    fresh = TurboQuantCache(model, "q8")
    assert relative(got, feed(model, fresh, tokens[sources], (40, 10))[:, 40:]) < F16_STEP


def test_size_is_counted(build_model, random_tokens):
    model, cache = build_model("llama"), TurboQuantCache(build_model("llama"), "q8")
    assert cache.n_bytes == 0 and cache.bits_per_value == 0
    feed(model, cache, random_tokens(1, 1024), (1024,))
    assert cache.n_bytes == sum(layer.store.n_bytes for layer in cache.layers)
    assert 8 < cache.bits_per_value < 8.8
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.n_bytes == 0


def test_attention_without_a_cache(build_model, random_tokens):
    tokens = random_tokens(2, 60)
    for name in ("gemma2", "gemma3"):
        with torch.no_grad():
            expected = build_model(name)(input_ids=tokens, use_cache=False).logits
            got = build_model(name, "turboquant")(input_ids=tokens, use_cache=False).logits
        assert relative(got, expected) < F16_STEP


def test_threads_change_nothing(build_model, random_tokens):
    model, tokens, logits = build_model("gemma3", "turboquant"), random_tokens(1, 300), []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        cache = TurboQuantCache(model, "q8")
        torch.set_num_threads(1)  # of torch itself: its sums depend on them
        assert bool(cache.shared.workers) == (n_threads > 1)
        logits.append(feed(model, cache, tokens, (200, 1, 99)))
    assert torch.equal(*logits)


def test_models_in_training_are_described_too(build_model):
    model = build_model("llama")
    model.train()
    try:
        TurboQuantCache(model, "q8")
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_long_bias_in_slow_channels_does_not_hide_that_keys_turn(build_model, weights):
    """As in Qwen2.5, where all else is short beside a channel that hardly turns within a short text."""
    model = copy.deepcopy(build_model("qwen2"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(weights)
    table = model.base_model.rotary_emb.inv_freq
    table[-1] = 1e-6
    for layer in model.base_model.layers:
        layer.self_attn.k_proj.bias.data.view(-1, 2 * len(table))[:, len(table) - 1] = 2000
    for layer in describe(model):
        np.testing.assert_array_equal(layer.inv_freq, table.numpy())
