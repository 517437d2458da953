# SPDX-License-Identifier: Apache-2.0
"""turboquant-vllm doctor MODEL: what the plugin would do with a model, without starting a server."""
import argparse
import os
import sys

import turboquant

from turboquant_vllm import model_plan
from turboquant_vllm.model_plan import LayerPlan, Limits, Refusal

BATCH_TOKENS = 2048  # of --max-num-batched-tokens, by default
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def windows(config):
    """Tokens that each layer sees; None: all."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def layer_plans(plan, config):
    if hasattr(config, "index_topk"):
        raise Refusal("attention to tokens that an indexer chooses (DeepSeek V3.2) is not supported by turboquant")
    if getattr(config, "kv_lora_rank", None):
        return [LayerPlan(plan, index, config.num_attention_heads, 1, config.qk_rope_head_dim, config.kv_lora_rank, None,
                          is_latent=True) for index in range(config.num_hidden_layers)]
    n_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [LayerPlan(plan, index, config.num_attention_heads, n_kv_heads, head_size, head_size, window)
            for index, window in enumerate(windows(config))]


def print_layers(plans, dtype_bytes):
    """One line for each run of layers that are stored alike."""
    print("layers      KV heads x channels   bytes per token now   by tier")
    first = 0
    for index in range(1, len(plans) + 1):
        plan = plans[first]
        if index < len(plans) and plans[index].shape.token_bytes == plan.shape.token_bytes:
            continue
        shape = plan.shape
        stock = shape.n_kv_heads * (shape.k_dim + shape.v_dim) * dtype_bytes
        tiers = " ".join(map(str, shape.token_bytes[:plan.n_tiers]))
        label = f"{first}" if index == first + 1 else f"{first}-{index - 1}"
        kind = f"{shape.v_dim} + {shape.k_dim}, latent" if shape.is_latent else f"{shape.n_kv_heads} x {shape.k_dim}"
        print(f"{label:<11} {kind:<21} {stock:>8} {plan.token_bytes:>12}   {tiers}")
        first = index


def bytes_beside_blocks(plans, arguments, available):
    """As the engine takes them off its room."""
    from turboquant_vllm import vllm_adapter
    sizes = None
    if vllm_adapter.on_device():
        from turboquant_vllm import gpu_backend
        for plan in plans:
            plan.cuda = gpu_backend.cuda_layer(plan)
        sizes = gpu_backend.Sizes(arguments.max_num_seqs, BATCH_TOKENS, arguments.max_model_len)
    limits = Limits(arguments.max_num_seqs, BATCH_TOKENS, num_drafts=0)
    return vllm_adapter.room_for(plans, limits, arguments.block_size, available, sizes)[1]


def print_room(plans, arguments):
    gib, dtype_bytes = arguments.gib, DTYPE_BYTES[arguments.dtype]
    available = int(gib * 2**30)
    stock_bytes = sum(plan.shape.n_kv_heads * (plan.shape.k_dim + plan.shape.v_dim) * dtype_bytes for plan in plans)
    token_bytes = sum(plan.token_bytes for plan in plans)
    beside = bytes_beside_blocks(plans, arguments, available)
    stock, now = available // stock_bytes, max(0, available - beside) // token_bytes
    print(f"tokens in {gib:g} GiB: {stock:,} in vLLM as it is, {now:,} compressed: {now / stock:.2f}x, with "
          f"{beside / available:.0%} for copies of young tokens counted")


def doctor(arguments):
    from transformers import AutoConfig

    from turboquant_vllm import vllm_adapter
    print(f"adapter: {vllm_adapter.name()}")
    plan = model_plan.plan_name()
    if not plan:
        raise Refusal("TQKV_PLAN is not set: vLLM runs as it is. Set it to a .tqkv file, or to f16 or q8")
    loaded = model_plan.load_plan(plan)
    if loaded:
        print(f"plan: {plan}, of {loaded.model}, profile {loaded.profile}, "
              f"{loaded.bits_total:.2f} bits per value at {loaded.context} tokens")
    else:
        print(f"plan: {plan}, built in")
    print(f"fingerprint: {model_plan.fingerprint(plan).hex()[:16]}")
    config = AutoConfig.from_pretrained(arguments.model).get_text_config()
    plans = layer_plans(plan, config)
    print_layers(plans, DTYPE_BYTES[arguments.dtype])
    arguments.max_model_len = arguments.max_model_len or config.max_position_embeddings
    print_room(plans, arguments)


def main():
    parser = argparse.ArgumentParser(prog="turboquant-vllm")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("doctor", help="which layers are compressed, and how many tokens fit")
    command.add_argument("model", help="folder or name of a checkpoint, as vllm serve takes it")
    command.add_argument("--gib", type=float, default=float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 4),
                         help="memory for the cache (VLLM_CPU_KVCACHE_SPACE)")
    command.add_argument("--dtype", choices=sorted(DTYPE_BYTES), default="bfloat16", help="of vLLM's own cache")
    command.add_argument("--max-num-seqs", type=int, default=256)
    command.add_argument("--block-size", type=int, default=128)
    command.add_argument("--max-model-len", type=int, help="the model's own, if not given")
    try:
        doctor(parser.parse_args())
    except (Refusal, turboquant.TurboQuantError) as error:
        sys.exit(f"turboquant: {error}")
