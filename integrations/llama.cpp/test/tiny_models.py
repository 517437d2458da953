# SPDX-License-Identifier: Apache-2.0
"""Models of two layers with random weights, one for each kind of cache that a host can ask for.

    tiny_models.py FOLDER

The weights mean nothing; stock llama.cpp and the plugin must still agree about them. They have no
tokenizer, so they serve libllama programs only; `bytes_too` gives one, of single bytes.
"""

import math
import pathlib
import random
import struct
import sys

VOCAB, EMBD, FF, LAYERS = 96, 64, 96, 2

UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
BYTES_VOCAB = 259
ALIGNMENT = 32


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, value):
    out = text(key)
    if isinstance(value, str):
        return out + struct.pack("<I", STRING) + text(value)
    if isinstance(value, float):
        return out + struct.pack("<If", FLOAT32, value)
    if isinstance(value, list):
        kind, data = (STRING, b"".join(map(text, value))) if isinstance(value[0], str) else \
            (FLOAT32, struct.pack(f"<{len(value)}f", *value)) if isinstance(value[0], float) else \
            (INT32, struct.pack(f"<{len(value)}i", *value))
        return out + struct.pack("<IIQ", ARRAY, kind, len(value)) + data
    return out + struct.pack("<II", UINT32, value)


def bytes_vocab():
    """A vocabulary of three special tokens and every byte."""
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * BYTES_VOCAB,
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256, "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2}


def write_gguf(path, arch, settings, tensors):
    """tensors: name -> (shape, fastest dimension first; list of floats)."""
    n_vocab = tensors["token_embd.weight"][0][1]
    vocab = bytes_vocab() if n_vocab == BYTES_VOCAB else {"tokenizer.ggml.model": "no_vocab"}
    keys = {"general.architecture": arch, **vocab, f"{arch}.vocab_size": n_vocab,
            f"{arch}.context_length": 4096, f"{arch}.embedding_length": EMBD, f"{arch}.block_count": LAYERS,
            f"{arch}.feed_forward_length": FF}
    keys.update({f"{arch}.{key}": value for key, value in settings.items()})
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(entry(*kv) for kv in keys.items())
    data = b""
    for name, (shape, values) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)


class Weights(dict):
    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    def add(self, name, *shape, scale=None, about=0.0):
        n = 1
        for s in shape:
            n *= s
        scale = scale if scale is not None else 1.5 / shape[0] ** 0.5
        self[name] = (shape, [about + self.random.gauss(0, scale) for _ in range(n)])

    def norm(self, name, n=EMBD):
        self.add(f"{name}.weight", n, scale=0.1, about=1.0)

    def ends(self, norm="output_norm", vocab=VOCAB):
        self.add("token_embd.weight", EMBD, vocab, scale=1.0)
        self.add("output.weight", EMBD, vocab, scale=0.3)
        self.norm(norm)

    def gated_ffn(self, i):
        self.norm(f"blk.{i}.ffn_norm")
        self.add(f"blk.{i}.ffn_gate.weight", EMBD, FF)
        self.add(f"blk.{i}.ffn_up.weight", EMBD, FF)
        self.add(f"blk.{i}.ffn_down.weight", FF, EMBD)

    def attention(self, i, heads, kv_heads, dim):
        self.norm(f"blk.{i}.attn_norm")
        self.add(f"blk.{i}.attn_q.weight", EMBD, heads * dim)
        self.add(f"blk.{i}.attn_k.weight", EMBD, kv_heads * dim)
        self.add(f"blk.{i}.attn_v.weight", EMBD, kv_heads * dim)
        self.add(f"blk.{i}.attn_output.weight", heads * dim, EMBD)


def heads_of(heads, kv_heads, dim):
    return {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "attention.key_length": dim,
            "attention.value_length": dim, "rope.dimension_count": dim, "attention.layer_norm_rms_epsilon": 1e-5}


def llama(path, dim=32, factors=True, **settings):
    """Interleaved RoPE with frequency factors."""
    w = Weights(1)
    w.ends()
    for i in range(LAYERS):
        w.attention(i, 4, 2, dim)
        w.gated_ffn(i)
    if factors:
        w["rope_freqs.weight"] = ((dim // 2,), [1.0 + 0.5 * i for i in range(dim // 2)])
    write_gguf(path, "llama", {**heads_of(4, 2, dim), "rope.freq_base": 10000.0, **settings}, w)


def llama_odd(path):
    """Heads of a size that is no multiple of 16."""
    llama(path, dim=40, factors=False)


def llama_yarn(path):
    """YaRN by four. The attention factor takes back the growth of K, which llama.cpp's own shift repeats."""
    llama(path, factors=False, **{
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 1.0 / (1.0 + 0.1 * math.log(4.0))})


def gemma2(path):
    """Soft cap of the scores, and a sliding window of 32 tokens in every other layer."""
    w = Weights(2)
    w.ends()
    del w["output.weight"]
    for i in range(LAYERS):
        w.attention(i, 4, 1, 32)
        w.gated_ffn(i)
        w.norm(f"blk.{i}.post_attention_norm")
        w.norm(f"blk.{i}.post_ffw_norm")
    write_gguf(path, "gemma2", {**heads_of(4, 1, 32), "attention.sliding_window": 32, "attn_logit_softcapping": 20.0,
                                "final_logit_softcapping": 30.0}, w)


def mpt(path):
    """ALiBi, six heads (not a power of two), no RoPE."""
    w = Weights(3)
    w.ends()
    for i in range(LAYERS):
        w.norm(f"blk.{i}.attn_norm")
        w.add(f"blk.{i}.attn_qkv.weight", 96, 3 * 96)
        w.add(f"blk.{i}.attn_output.weight", 96, 96)
        w.norm(f"blk.{i}.ffn_norm")
        w.add(f"blk.{i}.ffn_up.weight", 96, FF)
        w.add(f"blk.{i}.ffn_down.weight", FF, 96)
    for name in [n for n in w if n.endswith("norm.weight")]:
        w.norm(name.removesuffix(".weight"), 96)
    w.add("token_embd.weight", 96, VOCAB, scale=1.0)
    w.add("output.weight", 96, VOCAB, scale=0.3)
    write_gguf(path, "mpt", {"embedding_length": 96, "attention.head_count": 6, "attention.head_count_kv": 6,
                             "attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 8.0}, w)


def deepseek2(path, heads=4, rank=64, rope=16, nope=32, v=32, vocab=VOCAB):
    """Latent attention: one K tensor that is V as well."""
    w = Weights(4)
    w.ends(vocab=vocab)
    for i in range(LAYERS):
        w.norm(f"blk.{i}.attn_norm")
        w.norm(f"blk.{i}.attn_q_a_norm", 48)
        w.norm(f"blk.{i}.attn_kv_a_norm", rank)
        w.add(f"blk.{i}.attn_q_a.weight", EMBD, 48)
        w.add(f"blk.{i}.attn_q_b.weight", 48, heads * (nope + rope))
        w.add(f"blk.{i}.attn_kv_a_mqa.weight", EMBD, rank + rope)
        w.add(f"blk.{i}.attn_k_b.weight", nope, rank, heads)
        w.add(f"blk.{i}.attn_v_b.weight", rank, v, heads)
        w.add(f"blk.{i}.attn_output.weight", heads * v, EMBD)
        w.gated_ffn(i)
    write_gguf(path, "deepseek2", {
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.key_length": rank + rope,
        "attention.value_length": rank, "attention.key_length_mla": nope + rope, "attention.value_length_mla": v,
        "attention.q_lora_rank": 48, "attention.kv_lora_rank": rank, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": rope, "leading_dense_block_count": LAYERS, "expert_feed_forward_length": FF,
        "expert_shared_count": 1}, w)


def deepseek2_lite(path, bytes_too=False):
    """Latent attention with the heads of DeepSeek-V2, fewer of them."""
    deepseek2(path, rank=512, rope=64, nope=128, v=128, vocab=BYTES_VOCAB if bytes_too else VOCAB)


def lfm2(path):
    """A short convolution with recurrent state, then attention."""
    w = Weights(5)
    w.ends("token_embd_norm")
    w.norm("blk.0.attn_norm")
    w.add("blk.0.shortconv.conv.weight", 3, EMBD)
    w.add("blk.0.shortconv.in_proj.weight", EMBD, 3 * EMBD)
    w.add("blk.0.shortconv.out_proj.weight", EMBD, EMBD)
    w.gated_ffn(0)
    w.attention(1, 4, 2, 16)
    w.norm("blk.1.attn_q_norm", 16)
    w.norm("blk.1.attn_k_norm", 16)
    w.gated_ffn(1)
    write_gguf(path, "lfm2", {"attention.head_count": 4, "attention.head_count_kv": [0, 2], "shortconv.l_cache": 3,
                              "attention.layer_norm_rms_epsilon": 1e-5}, w)


def mamba(path):
    """Recurrent state and nothing else."""
    inner, state, rank = 2 * EMBD, 16, 4
    w = Weights(6)
    w.ends()
    for i in range(LAYERS):
        w.norm(f"blk.{i}.attn_norm")
        w.add(f"blk.{i}.ssm_in.weight", EMBD, 2 * inner)
        w.add(f"blk.{i}.ssm_conv1d.weight", 4, inner)
        w.add(f"blk.{i}.ssm_conv1d.bias", inner)
        w.add(f"blk.{i}.ssm_x.weight", inner, rank + 2 * state)
        w.add(f"blk.{i}.ssm_dt.weight", rank, inner)
        w.add(f"blk.{i}.ssm_dt.bias", inner)
        w.add(f"blk.{i}.ssm_a", state, inner, scale=0.1, about=-1.0)
        w.add(f"blk.{i}.ssm_d", inner)
        w.add(f"blk.{i}.ssm_out.weight", inner, EMBD)
    write_gguf(path, "mamba", {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state,
                               "ssm.time_step_rank": rank, "attention.layer_norm_rms_epsilon": 1e-5,
                               "attention.head_count": 0, "feed_forward_length": 0}, w)


ALL = {f.__name__: f for f in (llama, llama_odd, llama_yarn, gemma2, mpt, deepseek2, deepseek2_lite, lfm2, mamba)}

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in ALL.items():
        make(folder / f"{name}.gguf")
