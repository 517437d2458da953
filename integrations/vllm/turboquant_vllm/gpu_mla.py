# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention on CUDA devices, AttentionBackendEnum.CUSTOM for models that have it.

vLLM's own classes do it, but for what touches the cache. Kernels see a latent x as w with x = w @ inverse
(turboquant/cuda.h), so that no query is transformed at run time:

    decodes    queries and outputs are in the space of w, as the weights that vLLM absorbs make them: fold()
    prompts    the latents before them are decoded into vLLM's workspace and multiplied by inverse there; what makes
               keys and values of them, and attends, is vLLM's
"""
import functools
import weakref
from dataclasses import dataclass

import torch
from vllm import _custom_ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)

from turboquant_vllm.attention_backend import TurboquantBackend, refuse_options
from turboquant_vllm.gpu_backend import LATENT_SHAPE, DeviceBackend, GpuMetadata, StepTables
from turboquant_vllm.model_plan import Refusal

UPDATE_OP = "vllm::unified_mla_kv_cache_update"


class TurboquantMlaBackend(DeviceBackend, MLACommonBackend):
    supported_kv_cache_dtypes = TurboquantBackend.supported_kv_cache_dtypes

    @staticmethod
    def get_impl_cls():
        return TurboquantMlaImpl

    @staticmethod
    def get_builder_cls():
        return MlaMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls):
        return [sum(LATENT_SHAPE)]

    @classmethod
    def supported_kv_cache_layouts(cls):
        return TurboquantBackend.supported_kv_cache_layouts()


@dataclass
class MlaMetadata(MLACommonMetadata):
    """vLLM's, with our tables. Row r of these is the batch's; that of prompt i is num_decodes + i."""
    step: GpuMetadata | None = None


class MlaMetadataBuilder(StepTables, MLACommonMetadataBuilder[MlaMetadata]):
    query_len_support = QueryLenSupport.VARLEN
    workspaces = weakref.WeakValueDictionary()

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, MlaMetadata)
        self.layer_names = layer_names
        # One for all builders: vLLM makes one for each number of bytes that a token takes, and layers run in turn.
        self.chunked_prefill_workspace = self.workspaces.setdefault((id(vllm_config), device),
                                                                    self.chunked_prefill_workspace)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.step = self.step_of(common_attn_metadata, with_prompts=False)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """A graph is replayed for sequences of any length."""
        common_attn_metadata.max_seq_len = self.vllm_config.model_config.max_model_len
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def prepare(self):
        refuse_graphs_of_updates(self.vllm_config.compilation_config)
        for layer in super().prepare():
            layer.impl.bind(layer)


def refuse_graphs_of_updates(compilation):
    """Piecewise graphs are captured without the tables of a step, so the cache is written outside of them."""
    piecewise = compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_piecewise_cudagraphs()
    if piecewise and UPDATE_OP not in (compilation.splitting_ops or ()):
        raise Refusal(f"piecewise CUDA graphs cannot hold {UPDATE_OP} with turboquant: leave splitting_ops and "
                      "use_inductor_graph_partition as they are")


def leave_updates_to_us(compilation):
    """A pass of vLLM's compiler would turn keys and write plain rows into the cache at once, past the implementation."""
    if getattr(compilation.pass_config, "fuse_rope_kvcache_cat_mla", False):
        compilation.pass_config.fuse_rope_kvcache_cat_mla = False


class TurboquantMlaImpl(MLACommonImpl[MlaMetadata]):
    can_return_lse_for_decode = True

    def __init__(self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
                 logits_soft_cap, attn_type, kv_sharing_target_layer_name, **mla_options):
        refuse_options(attn_type, alibi_slopes, kv_cache_dtype, kv_sharing_target_layer_name)
        if sliding_window or logits_soft_cap:
            raise Refusal("sliding windows and soft caps have no CUDA kernels in turboquant")
        super().__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
                         logits_soft_cap, attn_type, kv_sharing_target_layer_name, **mla_options)
        self.folded = {}  # by name, the parameters that fold() has made
        self.inverse = None  # [512, 512] in the model's type
        self.layer_name = self.setup = None  # from the first step on
        leave_updates_to_us(get_current_vllm_config().compilation_config)
        read_ours_first()

    def bind(self, layer):
        self.layer_name, self.setup = layer.layer_name, layer.turboquant

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        """Slots are those of the step's tables, for all tiers; of slot_mapping only the length counts."""
        metadata = get_attention_context(self.layer_name)[0] if self.setup else None
        if metadata is None or slot_mapping is None:  # nothing that is to be kept
            return
        n = slot_mapping.numel()
        key = k_pe.view(len(k_pe), -1)[:n]
        if self.setup.channel_order is not None:
            key = key[:, self.setup.channel_order]
        self.setup.gpu.store(kv_cache.data_ptr(), metadata.step.pages, key, kv_c_normed[:n])

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        latent, rotated = q if isinstance(q, tuple) else q.split((self.kv_lora_rank, self.qk_rope_head_dim), -1)
        if self.setup.channel_order is not None:
            rotated = rotated[..., self.setup.channel_order]
        q, step = torch.cat([latent, rotated], -1), attn_metadata.step
        out = latent.new_empty(latent.shape)
        lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        self.setup.gpu.decode(kv_c_and_k_pe_cache.data_ptr(), step.pages, step.batch, self.scale, q, out, lse)
        return out, lse

    def _compute_prefill_context(self, q, kv_c_and_k_pe_cache, attn_metadata, k_scale):
        stored = StoredLatents(self, kv_c_and_k_pe_cache.data_ptr(), attn_metadata)
        return super()._compute_prefill_context(q, stored, attn_metadata, k_scale)


@dataclass
class StoredLatents:
    """Stands for the cache where vLLM reads what comes before prompts. blocks: address of the first."""
    impl: TurboquantMlaImpl
    blocks: int
    metadata: MlaMetadata

    def read(self, dst, block_table, cu_seq_lens, num_tokens, seq_starts):
        """As gather_and_maybe_dequant_cache; block_table is some rows of the prompts', and tells us which."""
        n, impl = int(num_tokens), self.impl
        of_prompts = self.metadata.prefill.block_table
        row = (block_table.storage_offset() - of_prompts.storage_offset()) // of_prompts.stride(0)
        if n == 0:
            return
        impl.setup.gpu.gather(self.blocks, self.metadata.step.pages, self.metadata.num_decodes + row, cu_seq_lens,
                              seq_starts, n, dst)
        latent, rotated = dst[:n].split((impl.kv_lora_rank, impl.qk_rope_head_dim), -1)
        latent.copy_(latent @ impl.inverse)
        if impl.setup.channel_order is not None:
            rotated.copy_(rotated[:, impl.setup.channel_order.argsort()])


@functools.cache
def read_ours_first():
    """vLLM looks the function up in its module at each call, and names its arguments."""
    gather = _custom_ops.gather_and_maybe_dequant_cache

    @functools.wraps(gather)
    def gathered(src_cache, *arguments, **options):
        if not isinstance(src_cache, StoredLatents):
            return gather(src_cache, *arguments, **options)
        return src_cache.read(*(options[name] for name in ("dst", "block_table", "cu_seq_lens", "num_tokens",
                                                           "seq_starts")))
    _custom_ops.gather_and_maybe_dequant_cache = gathered


def fold(layer, plan):
    """Takes the inverse into the weights that an MLAAttention has just made of kv_b_proj, into which they may be views.
    Captured graphs read them, so loading weights anew writes where the first time did. plan: the LayerPlan."""
    if not (hasattr(layer, "W_UK_T") and hasattr(layer, "W_UV")):
        raise Refusal(f"{layer.layer_name}: absorbed weights that are quantised are not supported by turboquant")
    inverse = torch.frombuffer(bytearray(plan.cuda.inverse()), dtype=torch.float32).view(2 * (layer.kv_lora_rank,))
    layer.impl.inverse = inverse.to(layer.W_UV)
    inverse = inverse.to(layer.W_UV.device, torch.float64)
    for name, of in (("W_UK_T", lambda w: w @ inverse.t()), ("W_UV", lambda w: inverse @ w)):
        new = of(getattr(layer, name).data.double())
        kept = layer.impl.folded.get(name)
        if kept is None:
            kept = layer.impl.folded[name] = torch.nn.Parameter(new.to(layer.W_UV.dtype), requires_grad=False)
        else:
            kept.data.copy_(new)
        setattr(layer, name, kept)
