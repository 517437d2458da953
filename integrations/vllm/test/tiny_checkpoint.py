# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights, small enough to serve in seconds: config.json and model.safetensors."""
import json

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS = 512, 256, 3, 4, 2
HEAD_SIZE = HIDDEN // HEADS  # 64, the least that has CUDA kernels
LATENT, ROPE, NOPE = 512, 64, 128  # of DeepSeek: NOPE channels of a head of K do not turn, and as many has one of V


def config(kind, window):
    common = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": LAYERS,
              "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE,
              "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
              "hidden_act": "silu"}
    if kind == "llama":
        return common | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if kind == "qwen2":
        return common | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    if kind == "mistral":
        return common | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if kind == "deepseek":
        del common["head_dim"]
        # YaRN by a factor of 1 turns as plain RoPE does, which the CPU build of vLLM 0.32.0 gets wrong in views of rows.
        yarn = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
                "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
        return common | {"rope_scaling": yarn, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
                         "num_key_value_heads": HEADS, "q_lora_rank": None, "kv_lora_rank": LATENT,
                         "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": NOPE,
                         "first_k_dense_replace": LAYERS, "n_routed_experts": 4}
    raise ValueError(kind)


def projections(kind):
    """(outputs, inputs) of the matrices of a layer."""
    mlp = {"mlp.gate_proj": (256, HIDDEN), "mlp.up_proj": (256, HIDDEN), "mlp.down_proj": (HIDDEN, 256)}
    if kind == "deepseek":
        return mlp | {"self_attn.q_proj": (HEADS * (NOPE + ROPE), HIDDEN),
                      "self_attn.kv_a_proj_with_mqa": (LATENT + ROPE, HIDDEN),
                      "self_attn.kv_b_proj": (HEADS * 2 * NOPE, LATENT),
                      "self_attn.o_proj": (HIDDEN, HEADS * NOPE)}
    return {"self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE)} | mlp


def make(folder, kind="llama", window=None, seed=0):
    """Writes the checkpoint; scores are sharp enough that greedy decoding has clear winners."""
    import torch  # here, so that tiny_plan.py can read the sizes without it
    from safetensors.torch import save_file
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    tensors = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN, std=1.0),
               "lm_head.weight": normal(VOCAB, HIDDEN, std=0.3), "model.norm.weight": torch.ones(HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, shape in projections(kind).items():
            tensors[f"{layer}{name}.weight"] = normal(*shape, std=1.5 / shape[1] ** 0.5)
            if kind == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{layer}{name}.bias"] = normal(shape[0], std=0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = torch.ones(HIDDEN)
        if kind == "deepseek":
            tensors[f"{layer}self_attn.kv_a_layernorm.weight"] = torch.ones(LATENT)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(kind, window)))
    return folder
