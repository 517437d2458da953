# SPDX-License-Identifier: Apache-2.0
"""Every way of generating, with a TurboQuantCache and with a cache of transformers that stores the same."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from turboquant_transformers import TurboQuantCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("built_library")

WAYS = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "chunked prefill": dict(do_sample=False, prefill_chunk_size=16),
}


def generate(model, tokens, cache, n=24, **how):
    torch.manual_seed(11)
    return model.generate(tokens, cache=cache, max_new_tokens=n, min_new_tokens=n, **how)


@pytest.fixture(params=[None, "turboquant"], ids=["decoded", "over codes"])
def attention(request):
    return request.param


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_tokens_are_those_of_the_same_storage(build_model, rounded_cache, random_tokens, attention, name, way):
    tokens = random_tokens(1, 60).repeat(1, 2)  # prompt lookup finds the answer in the prompt
    expected = generate(build_model(name), tokens, rounded_cache(build_model(name)), **WAYS[way])
    model = build_model(name, attention)
    cache = TurboQuantCache(model, "f16")
    assert torch.equal(generate(model, tokens, cache, **WAYS[way]), expected)
    assert cache.get_seq_length() >= tokens.shape[1] + 23


def test_latents_are_generated_from(build_model, rounded_cache, random_tokens):
    model, tokens = build_model("deepseek_v3"), random_tokens(2, 40)
    for way in ("greedy", "beams", "prompt lookup"):
        prompt = tokens[:1] if way == "prompt lookup" else tokens
        expected = generate(model, prompt, rounded_cache(model), **WAYS[way])
        assert torch.equal(generate(model, prompt, TurboQuantCache(model, "f16"), **WAYS[way]), expected)


def test_greedy_tokens_of_an_f32_model_are_kept(build_model, random_tokens, attention):
    """f16 storage rounds what an f32 model computes; where no two tokens are nearly alike, the answer is the same."""
    from transformers import DynamicCache
    model, tokens = build_model("llama", attention), random_tokens(1, 60)
    expected = generate(model, tokens, DynamicCache(config=model.config), do_sample=False)
    assert torch.equal(generate(model, tokens, TurboQuantCache(model, "f16"), do_sample=False), expected)


def test_padding_on_the_left(build_model, random_tokens, attention):
    model, tokens = build_model("gemma3", attention), random_tokens(3, 70)
    mask = torch.ones_like(tokens)
    mask[1, :25], mask[2, :66] = 0, 0
    together = generate(model, tokens, TurboQuantCache(model, "q8"), attention_mask=mask, do_sample=False)
    for row in range(3):
        alone = tokens[row:row + 1, int((mask[row] == 0).sum()):]
        expected = generate(model, alone, TurboQuantCache(model, "q8"), do_sample=False)
        assert torch.equal(together[row, 70:], expected[0, alone.shape[1]:])


def test_an_assistant_proposes(build_model, random_tokens, attention):
    model, tokens = build_model("llama", attention), random_tokens(1, 60)
    expected = generate(model, tokens, TurboQuantCache(model, "f16"), do_sample=False)
    cache = TurboQuantCache(model, "f16")
    got = generate(model, tokens, cache, do_sample=False, assistant_model=build_model("qwen2"))
    assert torch.equal(got, expected)
    assert cache.layers[0].store.stats().n_written > cache.get_seq_length()  # proposals were stored and cropped


def test_a_cache_is_used_again(build_model, rounded_cache, random_tokens, attention):
    model, first, more = build_model("gemma3", attention), random_tokens(1, 60), random_tokens(1, 30)
    caches = [TurboQuantCache(model, "f16"), rounded_cache(model)]
    talks = []
    for cache in caches:
        talk = generate(model, first, cache, do_sample=False)
        talks.append(generate(model, torch.cat([talk, more], 1), cache, do_sample=False))
    assert torch.equal(*talks)
