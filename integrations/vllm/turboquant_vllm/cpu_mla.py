# SPDX-License-Identifier: Apache-2.0
"""The attention backend of layers with multi-head latent attention (MLA), on the CPU.

vLLM's own splits a step in two. New tokens of prompts are attended as heads, whose keys and values are made of the
latents of the step: that is left to vLLM. Queries behind stored tokens go into the space of the latents by vLLM's
absorbed weights, meet every latent as key and as value (plan.h: latent layers), and come back: that is ours.

    do_kv_cache_update    the latents of all new tokens to tqkv_paged_write
    forward_mqa           decodes, drafts with them, to tqkv_paged_attend
    forward_mha           prompts: vLLM's, but those behind stored tokens, which go the same way as decodes

Decodes come first in a batch. A layer's cache is uint8 [blocks, block_size, token_bytes].
"""
from dataclasses import dataclass

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention.mla_attention import (MLACommonMetadata, MLACommonMetadataBuilder,
                                                                QueryLenSupport)
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from turboquant_vllm.attention_backend import LayerCache, TurboquantMetadata, to_rows
from turboquant_vllm.model_plan import Refusal, refuse_cache_dtype


class TurboquantMlaBackend(CPUMLABackend):
    @staticmethod
    def get_name():
        return "CPU_MLA"  # the member of AttentionBackendEnum that it takes the place of

    @staticmethod
    def get_impl_cls():
        return TurboquantMlaImpl

    @staticmethod
    def get_builder_cls():
        return TurboquantMlaMetadataBuilder


@dataclass
class TurboquantMlaMetadata(MLACommonMetadata):
    step: TurboquantMetadata | None = None


class TurboquantMlaMetadataBuilder(MLACommonMetadataBuilder[TurboquantMlaMetadata]):
    query_len_support = QueryLenSupport.VARLEN  # requests of a step may have drafts of unlike numbers

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, TurboquantMlaMetadata)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        step = TurboquantMetadata.of(common_attn_metadata)
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.step = step
        return metadata


class TurboquantMlaImpl(CPUMLAImpl):
    def __init__(self, *arguments, kv_cache_dtype="auto", indexer=None, **options):
        refuse_cache_dtype(kv_cache_dtype)
        if indexer is not None:
            raise Refusal("sparse attention over latents is not supported by turboquant")
        super().__init__(*arguments, kv_cache_dtype=kv_cache_dtype, indexer=indexer, **options)
        self.layer = None  # the MLAAttention that this belongs to, found at the first step
        self.cache = None  # LayerCache, made at the first step
        self.rows = None  # rotated keys and latents, [tokens, 1, channels], of a step whose queries will meet them here

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        if self.layer is None:
            layers = get_forward_context().no_compile_layers.values()
            self.layer = next(layer for layer in layers if getattr(layer, "impl", None) is self)
        metadata, *_ = get_attention_context(self.layer.layer_name)
        if metadata is None:  # profiling
            return
        if self.cache is None:
            self.cache = LayerCache(self.layer, kv_cache.unsqueeze(1))
        n = metadata.num_actual_tokens
        rows = to_rows(k_pe[:n].reshape(n, 1, -1), self.cache.order), to_rows(kv_c_normed[:n].unsqueeze(1), None)
        self.cache.write(*rows, metadata.step)
        if metadata.num_decodes > 0 or is_behind_stored(metadata.prefill):
            self.rows = rows

    def attend(self, ql_nope, q_pe, metadata, first, end):
        """Of requests [first, end) of the step. ql_nope, q_pe: of their tokens, [tokens, heads, channels].

        Returns weighted sums of latents, [tokens, heads, kv_lora_rank], in the type of the queries.
        """
        step, tokens = metadata.step.requests(first, end)
        key, value = (rows[tokens] for rows in self.rows)
        query = torch.cat([to_rows(q_pe, self.cache.order), to_rows(ql_nope, None)], dim=-1)
        q_pe, latent = query.split([self.qk_rope_head_dim, self.kv_lora_rank], dim=-1)
        out = torch.empty(latent.shape, dtype=torch.float32)
        self.cache.attend(q_pe, key, value, step, out, self.scale, latent=latent)
        if first == 0:  # decodes, if there are any, come after prompts
            self.rows = None
        return out.to(ql_nope.dtype)

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        ql_nope, q_pe = q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self.attend(ql_nope, q_pe, attn_metadata, 0, attn_metadata.num_decodes), None

    def forward_mha(self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale=None):
        """Prompts behind stored tokens come where vLLM cuts prompts or finds prefixes, which it does not on the CPU."""
        if not is_behind_stored(attn_metadata.prefill):
            return super().forward_mha(q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output,
                                       output_scale)
        q_nope, q_pe = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        ql_nope = torch.bmm(q_nope.transpose(0, 1), self.layer.W_UK_T).transpose(0, 1)
        out = self.attend(ql_nope, q_pe, attn_metadata, attn_metadata.num_decodes, attn_metadata.num_reqs)
        self.layer._v_up_proj(out, output)


def is_behind_stored(prefill):
    """Whether some of the prompts of a step, None without any, have tokens stored before."""
    return prefill is not None and prefill.chunked_context is not None
