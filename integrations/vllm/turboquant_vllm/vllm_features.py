# SPDX-License-Identifier: Apache-2.0
"""What generations of vLLM do each in their own way. Which way is asked of what is there, never of a version.

    bytes of a token    fields of the spec that vLLM makes the shape from, or one head of as many uint8 channels
    prefix hashes       the seed of all of them, or the parent of a first block's hash
    a shorter hit       KVCacheManager.truncate_computed_blocks, or a slice of the blocks
    latents of a context  ops.gather_and_maybe_dequant_cache, on devices
"""
import dataclasses
import functools
import inspect

import torch

PACKED_FIELDS = {"num_head_slots", "state_content_bytes"}


def spec_gives_shape():
    """Whether vLLM makes the shape of a layer's cache from its spec; otherwise the backend is asked."""
    from vllm.v1.attention.backend import AttentionBackend
    return not hasattr(AttentionBackend, "get_kv_cache_shape")


def byte_spec(block_size, token_bytes, layer):
    """The FullAttentionSpec of an Attention or MLAAttention layer whose tokens take token_bytes, K and V together.

    Either way its cache is uint8 [blocks, 1, block_size, token_bytes], without the 1 in an MLAAttention, and its pages
    are counted as that. (MLAAttentionSpec would do, but some generations take layers of unlike bytes for the same.)
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    if spec_gives_shape():
        return FullAttentionSpec(block_size=block_size, num_kv_heads=layer.num_kv_heads, head_size=layer.head_size,
                                 head_size_v=getattr(layer, "head_size_v", 0), dtype=torch.uint8, num_head_slots=1,
                                 state_content_bytes=token_bytes)
    return FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=token_bytes, head_size_v=0,
                             dtype=torch.uint8)


def counts_bytes():
    """Whether a spec can say the bytes of a token."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    fields = {field.name for field in dataclasses.fields(FullAttentionSpec)}
    if spec_gives_shape():
        return PACKED_FIELDS <= fields
    return "head_size_v" in fields and byte_spec(16, 100, None).page_size_bytes == 16 * 100


def gathers_latents():
    """Whether MLA on devices takes what is stored before a prompt from one function, with what gpu_mla reads of it."""
    from vllm import _custom_ops
    gather = getattr(_custom_ops, "gather_and_maybe_dequant_cache", None)
    return gather is not None and {"src_cache", "dst", "block_table", "cu_seq_lens", "num_tokens",
                                   "seq_starts"} <= inspect.signature(gather).parameters.keys()


def tells_plans_apart():
    from vllm.v1.core import kv_cache_utils
    return hasattr(kv_cache_utils, "resolve_none_hash_seed") or (
        hasattr(kv_cache_utils, "hash_block_tokens") and hasattr(kv_cache_utils, "init_none_hash"))


def tell_plans_apart(fingerprint):
    """Makes the plan a part of every prefix hash of this process. fingerprint: of the plan, in hexadecimal."""
    from vllm.v1.core import kv_cache_utils
    if hasattr(kv_cache_utils, "resolve_none_hash_seed"):
        kv_cache_utils.resolve_none_hash_seed = seed_with(kv_cache_utils.resolve_none_hash_seed, fingerprint)
    else:
        kv_cache_utils.hash_block_tokens = first_parent_with(kv_cache_utils.hash_block_tokens, fingerprint)


def seed_with(resolve_none_hash_seed, fingerprint):
    @functools.wraps(resolve_none_hash_seed)
    def resolve(hash_fn):
        return f"{resolve_none_hash_seed(hash_fn)}/turboquant:{fingerprint}"
    return resolve


def first_parent_with(hash_block_tokens, fingerprint):
    """The engine took init_none_hash by name before plugins were loaded; what hashes a block is looked up each time."""
    @functools.wraps(hash_block_tokens)
    def hashed(hash_function, parent_block_hash, *block):
        from vllm.v1.core import kv_cache_utils
        if not parent_block_hash:
            parent_block_hash = hash_function((kv_cache_utils.NONE_HASH, f"turboquant:{fingerprint}"))
        return hash_block_tokens(hash_function, parent_block_hash, *block)
    return hashed


def shortens_hits():
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    there = vars(KVCacheManager)
    return {"get_computed_blocks", "evict_blocks"} <= set(there) and (
        "truncate_computed_blocks" in there or "create_kv_cache_blocks" in there)


def first_blocks(manager, blocks, n_tokens, block_size):
    """Of a hit in the one group of a KVCacheManager, the blocks of its first n_tokens. Counts of references stay."""
    if hasattr(manager, "truncate_computed_blocks"):
        return manager.truncate_computed_blocks(blocks, n_tokens)
    return manager.create_kv_cache_blocks((list(blocks.blocks[0][:n_tokens // block_size]),))
