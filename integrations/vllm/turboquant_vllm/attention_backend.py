# SPDX-License-Identifier: Apache-2.0
"""The attention backend: block tables in, attention over compressed blocks out.

A layer's cache is uint8 [blocks, 1, block_size, token_bytes]. Within a block lie 16-token blocks of docs/FORMAT.md,
one after another; vLLM moves, shares and forgets blocks without looking into them.
"""
import weakref
from dataclasses import dataclass, replace

import torch
import turboquant
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType, MultipleOf

from turboquant_vllm import model_plan, openmp
from turboquant_vllm.model_plan import Refusal


class TurboquantBackend(AttentionBackend):
    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name():
        return "CPU_ATTN"  # the member of AttentionBackendEnum that it takes the place of

    @staticmethod
    def get_impl_cls():
        return TurboquantImpl

    @staticmethod
    def get_builder_cls():
        return TurboquantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        """Of the one head of bytes of vllm_features; asked for where no spec gives the shape."""
        return num_blocks, num_kv_heads, block_size, head_size

    @classmethod
    def supported_kv_cache_layouts(cls):
        from vllm.v1.kv_cache_interface import KVCacheLayout
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls):
        return True

    @classmethod
    def supports_sink(cls):
        return True


@dataclass
class TurboquantMetadata:
    """One step. Tensors are on the CPU and contiguous in their last dimension."""
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32, new tokens included
    block_table: torch.Tensor  # [num_reqs, blocks] int32

    @classmethod
    def of(cls, common):
        """common: vLLM's CommonAttentionMetadata."""
        if common.causal is not True:
            raise Refusal("attention that is not causal is not supported by turboquant")
        return cls(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc[:common.num_reqs + 1],
            seq_lens=common.seq_lens[:common.num_reqs],
            block_table=common.block_table_tensor[:common.num_reqs],
        )

    def requests(self, first, end):
        """The step of these requests alone, and which of all tokens are theirs."""
        starts = self.query_start_loc[first:end + 1]
        tokens = slice(int(starts[0]), int(starts[-1]))
        return replace(self, num_actual_tokens=tokens.stop - tokens.start, max_query_len=int(starts.diff().max()),
                       query_start_loc=starts - starts[0], seq_lens=self.seq_lens[first:end],
                       block_table=self.block_table[first:end]), tokens


class TurboquantMetadataBuilder(AttentionMetadataBuilder[TurboquantMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return TurboquantMetadata.of(common_attn_metadata)


class TurboquantImpl(AttentionImpl[TurboquantMetadata]):
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
                 kv_cache_dtype="auto", logits_soft_cap=None, attn_type=AttentionType.DECODER,
                 kv_sharing_target_layer_name=None, sinks=None, **unknown):
        refuse_options(attn_type, alibi_slopes, kv_cache_dtype, kv_sharing_target_layer_name)
        if unknown:
            raise Refusal(f"turboquant does not know the attention options {sorted(unknown)}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks  # [num_heads], loaded with the weights
        self.cache = None  # LayerCache, made at the first step

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
                output_block_scale=None):
        """query: [tokens, heads, head_size], key and value: [tokens, KV heads, head_size]; output is written."""
        refuse_scales(output_scale, output_block_scale)
        if attn_metadata is None:  # profiling
            return output.zero_()
        if self.cache is None:
            self.cache = LayerCache(layer, kv_cache)
        n = attn_metadata.num_actual_tokens
        out = output[:n] if output.dtype == torch.float32 and output.is_contiguous() else torch.empty(
            output[:n].shape, dtype=torch.float32)
        order = self.cache.order
        query, key, value = to_rows(query[:n], order), to_rows(key[:n], order), to_rows(value[:n], None)
        self.cache.write(key, value, attn_metadata)
        sinks = self.sinks.float().contiguous() if self.sinks is not None else None
        self.cache.attend(query, key, value, attn_metadata, out, self.scale, self.logits_soft_cap, sinks)
        if out.data_ptr() != output.data_ptr():
            output[:n] = out
        return output


def refuse_options(attn_type, alibi_slopes, kv_cache_dtype, kv_sharing_target_layer_name):
    if attn_type != AttentionType.DECODER:
        raise Refusal(f"attention of type {attn_type} is not supported by turboquant, only causal self-attention")
    if alibi_slopes is not None:
        raise Refusal("ALiBi is not supported by turboquant")
    model_plan.refuse_cache_dtype(kv_cache_dtype)
    if kv_sharing_target_layer_name is not None:
        raise Refusal(f"a layer shares the cache of {kv_sharing_target_layer_name}, which turboquant does not support")


def refuse_scales(*of_output):
    if any(scale is not None for scale in of_output):
        raise Refusal("fused quantisation of attention's output is not supported by turboquant")


class LayerCache:
    """The blocks of one layer: writes the new tokens of a step, then attends."""
    of_this_process = weakref.WeakSet()

    def __init__(self, layer, kv_cache):
        setup = layer.turboquant
        n_blocks, _, block_size, _ = kv_cache.shape
        if not kv_cache[0].is_contiguous():
            raise Refusal(f"{layer.layer_name}: the blocks of the KV cache layout are not contiguous")
        copies = model_plan.copies_for(setup.plans, setup.limits, block_size,
                                       min(n_blocks, setup.n_blocks_counted))
        config = model_plan.paged_config(setup.plan, setup.limits, block_size, n_blocks, copies)
        self.paged = turboquant.Paged(setup.plan.plan, config)
        self.order = setup.channel_order
        self.paged.batch.blocks = kv_cache.data_ptr()
        self.paged.batch.block_stride_bytes = kv_cache.stride(0)
        self.paged.batch.decode_tokens_max = 1 + setup.limits.num_drafts
        LayerCache.of_this_process.add(self)

    @classmethod
    def keeps_newest(cls, blocks, n_tokens):
        """Whether copies of the newest of n_tokens in these blocks are there; they are kept then, as more requests may
        find this prefix. Layers keep copies of the same blocks, so one stands for all. None: no layer is here."""
        caches = list(cls.of_this_process)
        if not caches:
            return None
        if caches[0].paged.lost(blocks, n_tokens) > 0:
            return False
        for cache in caches:
            cache.paged.keep(blocks, n_tokens)
        return True

    def write(self, key, value, metadata):
        """The new tokens of a step. key, value: of to_rows, [tokens, KV heads, channels]."""
        self.name_tokens(key, value, metadata)
        self.paged.write(openmp.parallel())

    def name_tokens(self, key, value, metadata):
        batch = self.paged.batch
        batch.n_seqs = len(metadata.seq_lens)
        batch.query_start = metadata.query_start_loc.data_ptr()
        batch.seq_lens = metadata.seq_lens.data_ptr()
        batch.block_table = metadata.block_table.data_ptr()
        batch.block_table_stride = metadata.block_table.stride(0)
        batch.k, batch.v = key.data_ptr(), value.data_ptr()

    def attend(self, query, key, value, metadata, out, scale, softcap=0.0, sinks=None, latent=None):
        """Of what was written, or of some requests of it.

        query: [tokens, heads, channels] f32, channels next to each other; latent: of latent layers, with the same strides.
        out: [tokens, heads, channels of V] f32. sinks: [heads] f32.
        """
        args = self.paged.args
        self.name_tokens(key, value, metadata)
        scratch = workspace(self.paged.scratch_bytes(metadata.max_query_len, metadata.max_seq_len, openmp.n_workers()))
        args.n_q = len(query)
        args.q, args.q_token_stride, args.q_head_stride = query.data_ptr(), query.stride(0), query.stride(1)
        args.out, args.out_token_stride, args.out_head_stride = out.data_ptr(), out.stride(0), out.stride(1)
        args.sinks = sinks.data_ptr() if sinks is not None else None
        args.q_latent = latent.data_ptr() if latent is not None else None
        args.scale, args.softcap = scale, softcap
        args.scratch = scratch
        self.paged.attend(openmp.parallel())


def to_rows(x, order):
    """[tokens, heads, channels] f32 contiguous, channels as in the plan."""
    return (x if order is None else x[..., order]).to(torch.float32).contiguous()


_workspace = torch.empty(0, dtype=torch.uint8)


def workspace(n_bytes):
    """Address of n_bytes of scratch, aligned to 64; layers run one after another and share it."""
    global _workspace
    if _workspace.numel() < n_bytes + 64:
        _workspace = torch.empty(n_bytes + 64, dtype=torch.uint8)
    return -(-_workspace.data_ptr() // 64) * 64
