# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, and a cache of transformers that rounds to f16 as a plan "f16" does."""
import functools
import logging
import pathlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEED = 7
VOCABULARY = 256
WINDOW = 48
TEXT = pathlib.Path(__file__).resolve().parents[2] / "data" / "calibration" / "mixed.txt"

# Large weights: attention that looks somewhere, logits that are no ties.
COMMON = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=4096, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(num_key_value_heads=2, head_dim=32)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=32,
              v_head_dim=48, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
              moe_intermediate_size=32, first_k_dense_replace=1)

MODELS = {
    "llama": ("Llama", "LlamaConfig", HEADS),
    "qwen2": ("Qwen2", "Qwen2Config", HEADS),          # K has a bias
    "qwen3": ("Qwen3", "Qwen3Config", HEADS),          # K is normalised
    "mistral": ("Mistral", "MistralConfig", HEADS | dict(sliding_window=WINDOW)),
    "gemma2": ("Gemma2", "Gemma2Config", HEADS | dict(sliding_window=WINDOW)),  # scores are capped
    "gemma3": ("Gemma3", "Gemma3TextConfig", HEADS | dict(
        sliding_window=WINDOW, num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "cohere": ("Cohere", "CohereConfig", dict(num_key_value_heads=2)),  # RoPE turns neighbouring channels
    "gpt_neox": ("GPTNeoX", "GPTNeoXConfig", {}),                       # RoPE turns some channels only
    "deepseek_v2": ("DeepseekV2", "DeepseekV2Config", LATENT),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3Config", LATENT),
}


@functools.cache
def _model(name):
    torch.manual_seed(SEED)
    kind, config, own = MODELS[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config)(**COMMON | own)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("k_proj.bias"):
            torch.nn.init.normal_(parameter, std=5.0)
    model.generation_config.eos_token_id = None  # answers have their full length
    return model


@pytest.fixture(scope="session")
def build_model():
    """build_model(name): one of MODELS, with the attention that transformers gives it."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    def build(name, attention=None):
        model = _model(name)
        model.set_attn_implementation(attention or ("eager" if name == "gemma2" else "sdpa"))
        return model

    return build


@pytest.fixture
def random_tokens():
    """random_tokens(batch, n): [batch][n], neither padding nor special."""
    generator = torch.Generator().manual_seed(SEED)
    return lambda batch, n: torch.randint(3, VOCABULARY, (batch, n), generator=generator)


class RoundedLayer(transformers.cache_utils.DynamicLayer):
    """New tokens as they are, old ones rounded to f16."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = (states.half().to(states.dtype) for states in (keys, values))
        return keys, values


class RoundedSlidingLayer(transformers.cache_utils.DynamicSlidingWindowLayer):
    """The same for a window."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = (states.half().to(states.dtype) for states in (self.keys, self.values))
        return keys, values


@pytest.fixture(scope="session")
def rounded_cache():
    """rounded_cache(model): what a cache with the plan "f16" must equal."""
    def build(model):
        cache = transformers.DynamicCache(config=model.config)
        layers = [RoundedSlidingLayer(layer.sliding_window) if layer.is_sliding else RoundedLayer()
                  for layer in cache.layers]
        return transformers.Cache(layers=layers)

    return build


class ByteTokenizer:
    """A token for every byte."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.bos_token_id] * add_special_tokens + list(text.encode())}


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def calibration_text():
    """[12000 characters] of the text that comes with the project."""
    return [TEXT.read_text(encoding="utf-8")[:12000]]
