# SPDX-License-Identifier: Apache-2.0
"""The attention backend on CUDA devices, AttentionBackendEnum.CUSTOM: vLLM's metadata to gpu_pages and gpu_layer."""
import functools
import pathlib
import tempfile
import weakref
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from turboquant_vllm import gpu_pages, model_plan, vllm_adapter
from turboquant_vllm.attention_backend import TurboquantBackend, TurboquantImpl, refuse_scales
from turboquant_vllm.gpu_pages import PAGE_TOKENS, Q_MAX
from turboquant_vllm.model_plan import Refusal

LATENT_SHAPE, LATENT_HEADS_MAX = (64, 512), 128  # channels of K and V
OTHER_VERSION = "libturboquant-cuda is of another version than the turboquant package: install both anew"
NO_LIBRARY = ("turboquant's CUDA library is not installed: pip install ./integrations/cuda builds it, with CMake and "
              "nvcc; or name a libturboquant-cuda.so (cmake --preset cuda) in TQKV_CUDA_LIBRARY")


class DeviceBackend:
    """What the backends of both kinds of attention have in common."""
    supported_dtypes = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_name():
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supports_compute_capability(cls, capability):
        return capability >= (8, 0)

    @classmethod
    def supports_sliding_window(cls):
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls):
        return False


class TurboquantGpuBackend(DeviceBackend, TurboquantBackend):
    """forward() stores too (forward_includes_kv_cache_update): nothing that vLLM launches comes between store and decode."""

    @staticmethod
    def get_impl_cls():
        return TurboquantGpuImpl

    @staticmethod
    def get_builder_cls():
        return GpuMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls):
        return [64, 128, 256]

    @classmethod
    def supports_sink(cls):
        return False


@functools.cache
def library():
    try:
        import tqkv_cuda
    except ImportError as error:
        raise Refusal(NO_LIBRARY) from error
    path = tqkv_cuda.find()
    if path is None:
        raise Refusal(NO_LIBRARY)
    found = tqkv_cuda.Library(path)
    if not hasattr(found.lib, "tqkv_cuda_page_tables"):
        raise Refusal(OTHER_VERSION)
    return found


@functools.cache
def cuda_plan(plan):
    """The plan in the CUDA library, which may be another build than the one that `plan` lives in."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plan.tqkv"
        plan.save(path)
        return library().read_plan(path.read_bytes())


def cuda_layer(layer_plan):
    """The tqkv_cuda.Layer of a LayerPlan."""
    import tqkv_cuda
    if layer_plan.shape.window:
        raise Refusal("sliding windows have no CUDA kernels in turboquant")
    shape = layer_plan.shape
    if shape.is_latent and ((shape.k_dim, shape.v_dim) != LATENT_SHAPE or shape.n_heads > LATENT_HEADS_MAX):
        raise Refusal(f"latents of {shape.v_dim} channels with a rotated key of {shape.k_dim} for {shape.n_heads} heads "
                      "have no CUDA kernels in turboquant, only 512 with 64 for up to 128 heads")
    plan = cuda_plan(layer_plan.plan)
    try:
        layer = tqkv_cuda.Layer(library(), plan, layer_plan.index)
    except tqkv_cuda.Error as error:
        raise Refusal("there are no CUDA kernels for this layer: heads have 64, 128 or 256 channels, K as many as V "
                      "(but for latents), all of them coded (the built-in plan f16 is not), in frames of whole 64 tokens") from error
    if layer.page_bytes(layer_plan.old_tier, PAGE_TOKENS) != PAGE_TOKENS * layer_plan.token_bytes:
        raise Refusal(OTHER_VERSION)
    return layer


@dataclass(frozen=True)
class Sizes:
    """What the scheduler and the model ask for."""
    max_seqs: int
    max_tokens: int
    max_seq_len: int
    q_len: int = 1

    @classmethod
    def of(cls, vllm_config):
        speculative = vllm_config.speculative_config
        q_len = 1 + (speculative.num_speculative_tokens if speculative else 0)
        if q_len > Q_MAX:
            raise Refusal(f"more than {Q_MAX - 1} speculative tokens have no CUDA kernels in turboquant")
        return cls(vllm_config.scheduler_config.max_num_seqs,
                   max(vllm_config.scheduler_config.max_num_batched_tokens,
                       vllm_config.compilation_config.max_cudagraph_capture_size or 0),
                   vllm_config.model_config.max_model_len, q_len)

    def workspace_bytes(self, plans):
        from turboquant_vllm import gpu_layer
        return max(gpu_layer.workspace_bytes(cuda, self.max_seqs, range(1, self.q_len + 1), self.max_seq_len)
                   for cuda in layer_of_each_shape(plans))

    def prefill_bytes(self, plans):
        """None for latents, whose prompts are vLLM's."""
        from turboquant_vllm import gpu_layer
        return max((gpu_layer.prefill_bytes(cuda, self.max_tokens, self.max_seq_len)
                    for cuda in layer_of_each_shape(with_heads(plans))), default=0)

    @staticmethod
    def slab_bytes(plans):
        from turboquant_vllm import gpu_layer
        return gpu_layer.slab_bytes(max((plan.shape.n_kv_heads * plan.shape.k_dim for plan in with_heads(plans)),
                                        default=0))

    def fixed_bytes(self, plans):
        """Beside blocks and copies."""
        from turboquant_vllm import gpu_layer
        images = sum(gpu_layer.GpuLayer.bytes_beside(plan.cuda, ()) for plan in plans)
        return images + self.workspace_bytes(plans) + self.prefill_bytes(plans) + self.slab_bytes(plans)


def layer_of_each_shape(plans):
    """A tqkv_cuda.Layer for each shape of layers; the others need as much memory."""
    return {(plan.shape.n_heads, plan.shape.n_kv_heads, plan.shape.k_dim): plan.cuda for plan in plans}.values()


def with_heads(plans):
    """Those of layers that are not latent."""
    return [plan for plan in plans if not plan.shape.is_latent]


def tiers_for(plans, block_size, n_blocks, n_sequences):
    """The gpu_pages.Tiers of all layers: each tier is as long as in the layer where it is longest."""
    n_young = plans[0].old_tier
    tokens = [max(plan.shape.tier_tokens[tier] for plan in plans) for tier in range(n_young)]
    return gpu_pages.tiers_of(tokens, plans[0].plan.n_sinks, n_sequences, n_blocks * block_size // PAGE_TOKENS)


def bytes_beside(plans, limits, block_size, n_blocks, n_sequences):
    """Copies and tables beside n_blocks of the engine; stands in for model_plan.bytes_beside."""
    from turboquant_vllm.gpu_layer import GpuLayer
    tiers = tiers_for(plans, block_size, n_blocks, n_sequences)
    n_pages = n_blocks * block_size // PAGE_TOKENS
    copies = sum(GpuLayer.bytes_beside(plan.cuda, tiers.n_copies) - len(plan.cuda.image) for plan in plans)
    return copies + 8 * len(tiers.reach) * (n_pages + 2 * max(tiers.n_copies, default=0))


@dataclass
class GpuMetadata:
    """One step: tables on the device, sizes on the host."""
    pages: gpu_pages.Pages
    batch: object  # gpu_layer.Batch


class Shared:
    """What the builders of all layers have in common: the tables, made once a step."""
    of_engines = weakref.WeakValueDictionary()

    def __init__(self, vllm_config, device, n_blocks, block_size):
        from turboquant_vllm import gpu_layer
        setups = vllm_adapter.setups(vllm_config)
        plans, sizes = [setup.plan for setup in setups], Sizes.of(vllm_config)
        self.block_size, self.max_seq_len = block_size, sizes.max_seq_len
        # While vLLM measures memory no copies have been counted, and there are none.
        counted = min(n_blocks, setups[0].n_blocks_counted)
        chosen = model_plan.copies_for(plans, setups[0].limits, block_size, counted, bytes_beside) if counted else (
            [0] * plans[0].old_tier)
        tiers = tiers_for(plans, block_size, n_blocks, chosen)
        self.pages = gpu_pages.Pages(tiers, n_blocks * block_size // PAGE_TOKENS, sizes.max_seqs,
                                     -(-sizes.max_seq_len // PAGE_TOKENS), sizes.max_tokens, device,
                                     library().page_tables if device.type == "cuda" else None)
        self.workspace = gpu_layer.Workspace(sizes.workspace_bytes(plans), sizes.prefill_bytes(plans),
                                             sizes.slab_bytes(plans), device)
        self.common = self.metadata = None

    @classmethod
    def of(cls, vllm_config, device, n_blocks, block_size):
        key = id(vllm_config), n_blocks, block_size
        shared = cls.of_engines.get(key)
        if shared is None:
            shared = cls.of_engines[key] = cls(vllm_config, device, n_blocks, block_size)
        return shared

    @classmethod
    def keeps_newest(cls, blocks, n_tokens):
        """Whether the newest of n_tokens in these blocks have copies. None: no layer has had a step in this process."""
        of_engine = list(cls.of_engines.values())[-1:]
        if not of_engine:
            return None
        n_pages = of_engine[0].block_size // PAGE_TOKENS
        pages = [block * n_pages + i for block in blocks for i in range(n_pages)]
        return of_engine[0].pages.has_newest(pages[:n_tokens // PAGE_TOKENS])

    def step(self, common, decode_threshold, with_prompts=True):
        """The metadata of a step, which vLLM asks for once for each kind of layer."""
        if self.common is not common:
            max_seq_len = min(max(common.max_seq_len, 1), self.max_seq_len)  # what vLLM knows may be an upper bound
            self.fill(common, max_seq_len)
            self.common = common
            self.metadata = GpuMetadata(self.pages, batch_of(common, decode_threshold, max_seq_len, with_prompts))
        return self.metadata

    def fill(self, common, max_seq_len):
        n, table = common.num_reqs, common.block_table_tensor
        if self.block_size > PAGE_TOKENS:
            n_pages = self.block_size // PAGE_TOKENS
            offsets = torch.arange(n_pages, dtype=table.dtype, device=table.device)
            table = (table.unsqueeze(2) * n_pages + offsets).flatten(1)
        self.pages.step(common.query_start_loc[:n + 1], common.seq_lens[:n], table[:n],
                        common.slot_mapping[:common.num_actual_tokens], max_seq_len)


def batch_of(common, decode_threshold, max_seq_len, with_prompts):
    from turboquant_vllm.gpu_layer import Batch
    starts = common.query_start_loc_cpu[:common.num_reqs + 1].tolist()
    n_new = [end - start for start, end in zip(starts, starts[1:])]
    n_decodes = split_decodes_and_prefills(common, decode_threshold=decode_threshold)[0]
    q_len = max([1, *n_new[:n_decodes]])
    rows = places = None
    if any(n != q_len for n in n_new[:n_decodes]):  # queries stand at the end of q_len places
        ends = common.query_start_loc[1:n_decodes + 1]
        rows = (ends.unsqueeze(1) - q_len + torch.arange(q_len, device=ends.device)).clamp_(min=0).flatten()
        token = torch.arange(starts[n_decodes], dtype=ends.dtype, device=ends.device)
        row = torch.searchsorted(ends, token, right=True)
        places = (row + 1) * q_len - ends[row] + token
    return Batch(common.num_actual_tokens, n_decodes, q_len, max_seq_len, rows, places,
                 prompts_of(common, starts, n_decodes) if with_prompts else None)


def prompts_of(common, starts, n_decodes):
    """The rows behind the decodes; None if they have no tokens. starts: query_start_loc, on the host."""
    from turboquant_vllm.gpu_layer import Prompts
    rows, first = slice(n_decodes, common.num_reqs), starts[n_decodes]
    if starts[-1] == first:
        return None
    ends = common.query_start_loc[n_decodes:common.num_reqs + 1]
    lengths = common.seq_lens_cpu_upper_bound[rows].tolist()
    contexts = [length - (starts[row + 1] - starts[row]) for row, length in enumerate(lengths, n_decodes)]
    return Prompts.of(n_decodes, first, [start - first for start in starts[n_decodes:]], contexts,
                      (ends - first, common.seq_lens[rows] - ends.diff()))


class StepTables:
    """What the builders of both kinds of attention have in common: the tables of a step."""
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    shared = None  # made at the first step, when the layers have their blocks

    def step_of(self, common, with_prompts=True):
        if common.causal is not True:
            raise Refusal("attention that is not causal is not supported by turboquant")
        if self.shared is None:
            with torch.inference_mode(False):  # these tensors are written in later steps too
                self.prepare()
        return self.shared.step(common, self.reorder_batch_threshold, with_prompts)

    def prepare(self):
        """Returns the layers of this builder."""
        from turboquant_vllm.gpu_layer import GpuLayer
        layers = [self.vllm_config.compilation_config.static_forward_context[name] for name in self.layer_names]
        for layer in layers:
            n_blocks, *_, block_size, _ = layer.kv_cache.shape
            if not layer.kv_cache.is_contiguous() or layer.kv_cache.data_ptr() % 16 != 0:
                raise Refusal(f"{layer.layer_name}: the blocks of the KV cache layout are not contiguous")
            self.shared = Shared.of(self.vllm_config, self.device, n_blocks, block_size)
            layer.turboquant.gpu = GpuLayer(layer.turboquant.plan.cuda, self.shared.pages.tiers_young.n_copies,
                                            self.shared.workspace, self.device)
            if layer.turboquant.channel_order is not None:
                layer.turboquant.channel_order = layer.turboquant.channel_order.to(self.device)
        return layers


class GpuMetadataBuilder(StepTables, AttentionMetadataBuilder[GpuMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return self.step_of(common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """A graph is replayed for sequences of any length."""
        common_attn_metadata.max_seq_len = self.vllm_config.model_config.max_model_len
        return self.build(0, common_attn_metadata)


class TurboquantGpuImpl(TurboquantImpl):
    can_return_lse_for_decode = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.logits_soft_cap > 0:
            raise Refusal("a soft cap on attention logits has no CUDA kernels in turboquant")
        if self.sinks is not None:
            raise Refusal("attention sinks of a model have no CUDA kernels in turboquant")

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
                output_block_scale=None):
        """As TurboquantImpl.forward, on the current stream; with the log of the sums where vLLM asks for it."""
        refuse_scales(output_scale, output_block_scale)
        if attn_metadata is None:  # profiling
            return output.zero_()
        setup, batch = layer.turboquant, attn_metadata.batch
        query, key, value = query[:batch.n_tokens], key[:batch.n_tokens], value[:batch.n_tokens]
        if setup.channel_order is not None:
            query, key = query[..., setup.channel_order], key[..., setup.channel_order]
        blocks = kv_cache.data_ptr()
        lse = setup.gpu.store_and_attend(blocks, attn_metadata.pages, batch, self.scale, query, key, value,
                                         output[:batch.n_tokens])
        return (output, lse) if self.need_to_return_lse_for_decode else output
