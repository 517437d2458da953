# SPDX-License-Identifier: Apache-2.0
"""What ties the backend into vLLM, each part behind a test for the feature that it needs; vllm_features has those that
differ between generations of vLLM.

    register_backend                        whose attention runs: CPU_ATTN, CPU_MLA, or CUSTOM
    Platform.get_attn_backend_cls           CUSTOM without being asked for; no other kind of latent attention
    Attention.get_kv_cache_spec             bytes of a token, layer by layer; of MLAAttention too
    MLAAttention.process_weights_after_loading  on devices, absorbed weights for latents as the kernels see them
    Worker.determine_available_memory       copies of young tokens are taken off the room for blocks
    kv_cache_utils                          prefix hashes of two plans differ
    KVCacheManager.get_computed_blocks      the newest tokens of a prefix hit are read again if their copies are gone
"""
import dataclasses
import functools
import sys
from dataclasses import dataclass

import torch
import turboquant
from vllm.logger import init_logger

from turboquant_vllm import model_plan, vllm_features
from turboquant_vllm.model_plan import LayerPlan, Limits, Refusal

logger = init_logger("vllm.turboquant")
DRAFTS_WITHOUT_A_MODEL = ("ngram", "suffix")
BACKENDS = {False: "turboquant_vllm.gpu_backend.TurboquantGpuBackend",  # on devices, by whether it is for MLA
            True: "turboquant_vllm.gpu_mla.TurboquantMlaBackend"}


@dataclass
class LayerSetup:
    """What a layer's cache is made from; layer.turboquant of each Attention or MLAAttention."""
    plan: LayerPlan
    channel_order: torch.Tensor | None
    limits: Limits
    plans: list = ()  # of all layers, in order
    n_blocks_counted: int = 0  # blocks of the engine whose copies were taken off its room
    gpu: object = None  # the GpuLayer on a device, made at the first step


def setups(vllm_config):
    """The LayerSetup of each layer that has a cache."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer.turboquant for layer in layers if hasattr(layer, "turboquant")]


def name():
    """The adapter for the vLLM that is installed."""
    missing = missing_features(on_device())
    if missing:
        raise Refusal("this vLLM has no " + ", no ".join(missing) + ", which turboquant needs")
    return ("packed state bytes" if vllm_features.spec_gives_shape() else "one head of bytes") + " in FullAttentionSpec"


def on_device():
    """Whether this vLLM runs on CUDA devices."""
    from vllm.platforms import current_platform
    return current_platform.is_cuda()


def missing_features(on_device):
    from vllm.model_executor.layers import rotary_embedding
    from vllm.v1.attention.backends import registry
    from vllm.v1.attention import backend
    features = {
        "register_backend": hasattr(registry, "register_backend"),
        "bytes of a token in FullAttentionSpec": vllm_features.counts_bytes(),
        "seed of prefix hashes": vllm_features.tells_plans_apart(),
        "prefix hits of KVCacheManager": vllm_features.shortens_hits(),
        "_ROPE_DICT": hasattr(rotary_embedding, "_ROPE_DICT"),
    }
    if on_device:
        steps = {field.name for field in dataclasses.fields(backend.CommonAttentionMetadata)}
        features |= {
            "CUSTOM backend": "CUSTOM" in registry.AttentionBackendEnum.__members__,
            "seq_lens_cpu_upper_bound in CommonAttentionMetadata": "seq_lens_cpu_upper_bound" in steps,
            "reorder_batch_threshold": hasattr(backend.AttentionMetadataBuilder, "_init_reorder_batch_threshold"),
        }
    else:
        features["CPU_ATTN backend"] = "CPU_ATTN" in registry.AttentionBackendEnum.__members__
    return [feature for feature, there in features.items() if not there]


@functools.cache
def install(plan):
    """plan: of TQKV_PLAN. Does its work once in a process."""
    name()
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    model_plan.load_plan(plan)
    if on_device():
        register_backend(AttentionBackendEnum.CUSTOM, BACKENDS[False])
        choose_custom(type(current_platform))
        MLAAttention.process_weights_after_loading = folding(MLAAttention.process_weights_after_loading, plan)
    else:
        register_backend(AttentionBackendEnum.CPU_ATTN, "turboquant_vllm.attention_backend.TurboquantBackend")
        if "CPU_MLA" in AttentionBackendEnum.__members__:
            register_backend(AttentionBackendEnum.CPU_MLA, "turboquant_vllm.cpu_mla.TurboquantMlaBackend")
        insist_on_cpu_mla(type(current_platform))
    for layer in (Attention, MLAAttention):
        layer.get_kv_cache_spec = compressed_spec(layer.get_kv_cache_spec, plan)
    vllm_features.tell_plans_apart(model_plan.fingerprint(plan).hex())
    KVCacheManager.get_computed_blocks = worth_finding(KVCacheManager.get_computed_blocks, plan)


def choose_custom(platform):
    """vLLM checks the backend against the model as one that the user has named. CUSTOM is one of two, by the model."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    get_attn_backend_cls = platform.get_attn_backend_cls.__func__

    @functools.wraps(get_attn_backend_cls)
    def chosen(cls, selected_backend, attn_selector_config, *arguments, **options):
        if selected_backend not in (None, AttentionBackendEnum.CUSTOM):
            raise Refusal(f"--attention-backend {selected_backend.name} contradicts TQKV_PLAN: leave it away")
        refuse_sparse(attn_selector_config)
        if attn_selector_config.use_mla and not vllm_features.gathers_latents():
            raise Refusal("this vLLM reads the latents before a prompt in a way that turboquant does not know")
        register_backend(AttentionBackendEnum.CUSTOM, BACKENDS[attn_selector_config.use_mla])
        return get_attn_backend_cls(cls, AttentionBackendEnum.CUSTOM, attn_selector_config, *arguments, **options)
    platform.get_attn_backend_cls = classmethod(chosen)


def insist_on_cpu_mla(platform):
    """The platform decides by itself which backend serves MLA; of these only CPU_MLA is ours."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    get_attn_backend_cls = platform.get_attn_backend_cls.__func__

    @functools.wraps(get_attn_backend_cls)
    def chosen(cls, selected_backend, attn_selector_config, *arguments, **options):
        refuse_sparse(attn_selector_config)
        if attn_selector_config.use_mla and "CPU_MLA" not in AttentionBackendEnum.__members__:
            raise Refusal("this vLLM has no CPU_MLA backend, which turboquant needs for multi-head latent attention")
        path = get_attn_backend_cls(cls, selected_backend, attn_selector_config, *arguments, **options)
        if attn_selector_config.use_mla and path != AttentionBackendEnum.CPU_MLA.get_path():
            raise Refusal(f"vLLM takes {path.rsplit('.')[-1]} for multi-head latent attention here, which turboquant "
                          "does not replace: add --attention-backend CPU_MLA")
        return path
    platform.get_attn_backend_cls = classmethod(chosen)


def refuse_sparse(attn_selector_config):
    if attn_selector_config.use_sparse:
        raise Refusal("attention to tokens that an indexer chooses (DeepSeek V3.2) is not supported by turboquant")


def worth_finding(get_computed_blocks, plan):
    """With one rank scheduler and layers share a process. Where the next step is scheduled while one runs, what is
    known of copies may be out of date by that step; then tokens are read again in vain, or not."""
    @functools.wraps(get_computed_blocks)
    def found(self, request):
        blocks, n_tokens, *more = get_computed_blocks(self, request)
        groups = self.kv_cache_config.kv_cache_groups
        if n_tokens > 0 and len(groups) == 1:
            block_size, ids = groups[0].kv_cache_spec.block_size, blocks.get_block_ids()[0]
            n_kept = model_plan.tokens_worth_finding(plan, keeps_newest(ids, n_tokens), n_tokens, block_size)
            if n_kept < n_tokens:
                # What is read again takes the place of these blocks, so that the next request finds its copies.
                self.evict_blocks(set(ids[n_kept // block_size:]))
                blocks, n_tokens = vllm_features.first_blocks(self, blocks, n_kept, block_size), n_kept
        return blocks, n_tokens, *more
    return found


def keeps_newest(blocks, n_tokens):
    """Whether copies of the newest of n_tokens in cached blocks are there. None: nothing is known of copies, as where
    there are several ranks and the layers are in other processes than this scheduler."""
    if on_device():
        from turboquant_vllm.gpu_backend import Shared
        return Shared.keeps_newest(blocks, n_tokens)
    from turboquant_vllm.attention_backend import LayerCache
    return LayerCache.keeps_newest(blocks, n_tokens)


def compressed_spec(get_kv_cache_spec, plan):
    @functools.wraps(get_kv_cache_spec)
    def spec_of(self, vllm_config):
        refuse_config(vllm_config)
        reserve_memory()
        token_bytes = setup_of(self, vllm_config, plan).plan.token_bytes
        return vllm_features.byte_spec(vllm_config.cache_config.block_size, token_bytes, self)
    return spec_of


def folding(process_weights_after_loading, plan):
    """Called again when weights are loaded anew."""
    @functools.wraps(process_weights_after_loading)
    def process(self, act_dtype):
        from turboquant_vllm import gpu_mla
        process_weights_after_loading(self, act_dtype)
        gpu_mla.fold(self, setup_of(self, self._vllm_config, plan).plan)
    return process


def setup_of(layer, vllm_config, plan):
    """Made when an MLAAttention has its weights, otherwise when vLLM asks for the bytes of a token."""
    if not hasattr(layer, "turboquant"):
        layer.turboquant = set_up(layer, vllm_config, plan)
    return layer.turboquant


def set_up(layer, vllm_config, plan):
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.models.utils import extract_layer_index
    speculative = vllm_config.speculative_config
    try:
        layer_plan = LayerPlan(plan, extract_layer_index(layer.layer_name), *shape_of(layer),
                               get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(),
                               is_mla(layer))
        if on_device():
            from turboquant_vllm import gpu_backend
            layer_plan.cuda = gpu_backend.cuda_layer(layer_plan)
        return LayerSetup(plan=layer_plan,
                          channel_order=model_plan.channel_order(layer_plan, list(_ROPE_DICT.values())),
                          limits=Limits(vllm_config.scheduler_config.max_num_seqs,
                                        vllm_config.scheduler_config.max_num_batched_tokens,
                                        speculative.num_speculative_tokens if speculative else 0))
    except (Refusal, turboquant.TurboQuantError) as error:
        raise Refusal(f"{layer.layer_name}: {error}") from error


def is_mla(layer):
    return hasattr(layer, "kv_lora_rank")


def shape_of(layer):
    """(heads, KV heads, channels of K, of V, window) of an Attention or, as a plan has them, of an MLAAttention."""
    if not is_mla(layer):
        return layer.num_heads, layer.num_kv_heads, layer.head_size, layer.head_size_v, layer.sliding_window
    model_plan.refuse_cache_dtype(layer.kv_cache_dtype)
    if getattr(layer, "sliding_window", None):
        raise Refusal("latent attention in a sliding window is not supported by turboquant")
    return layer.num_heads, 1, layer.qk_rope_head_dim, layer.kv_lora_rank, None


def refuse_config(vllm_config):
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    parallel, cache, speculative = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.speculative_config
    for option in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size",
                   "num_ubatches"):
        if getattr(parallel, option, 1) > 1:
            raise Refusal(f"{option} above 1 is not supported by turboquant")
    if vllm_config.kv_transfer_config is not None or getattr(cache, "kv_offloading_size", None):
        raise Refusal("KV connectors and offloading fill blocks past turboquant: leave them off")
    if getattr(cache, "prefix_match_unit", None) not in (None, cache.block_size):
        raise Refusal("prefix hits inside a block copy it past turboquant: leave --prefix-match-unit away")
    if speculative and speculative.method not in DRAFTS_WITHOUT_A_MODEL:
        raise Refusal(f"speculative method {speculative.method} is not supported by turboquant, "
                      f"only {' and '.join(DRAFTS_WITHOUT_A_MODEL)}")
    unit = 16
    if on_device():
        from turboquant_vllm import gpu_backend
        gpu_backend.Sizes.of(vllm_config)
        unit = gpu_backend.PAGE_TOKENS
    if cache.block_size % unit != 0:
        raise Refusal(f"--block-size {cache.block_size} is not a multiple of {unit}, which turboquant needs")
    kinds = set()
    for layer_name, layer in vllm_config.compilation_config.static_forward_context.items():
        if hasattr(layer, "get_kv_cache_spec"):
            kinds.add(type(layer))
            if type(layer) not in (Attention, MLAAttention):
                raise Refusal(f"{layer_name}: a cache of {type(layer).__name__} is not supported by turboquant")
    if len(kinds) > 1:
        raise Refusal("models of latent (MLA) and other attention layers are not supported by turboquant")


@functools.cache
def reserve_memory():
    """By now the worker's module is loaded, and its memory is not yet shared out."""
    worker = (sys.modules["vllm.v1.worker.gpu_worker"].Worker if on_device()
              else sys.modules["vllm.v1.worker.cpu_worker"].CPUWorker)
    worker.determine_available_memory = memory_for_blocks(worker.determine_available_memory)


def memory_for_blocks(determine_available_memory):
    @functools.wraps(determine_available_memory)
    def determine(self):
        available = determine_available_memory(self)
        beside = bytes_beside_blocks(self.vllm_config, available)
        logger.info("turboquant: %.2f GiB of %.2f GiB are for copies of young tokens", beside / 2**30,
                    available / 2**30)
        return available - beside
    return determine


def bytes_beside_blocks(vllm_config, available):
    """What the layers' objects take at most."""
    of_layers = setups(vllm_config)
    plans, sizes = [setup.plan for setup in of_layers], None
    if on_device():
        from turboquant_vllm import gpu_backend
        sizes = gpu_backend.Sizes.of(vllm_config)
    n_blocks, beside = room_for(plans, of_layers[0].limits, vllm_config.cache_config.block_size, available, sizes)
    for setup in of_layers:
        setup.plans, setup.n_blocks_counted = plans, n_blocks
    return beside


def room_for(plans, limits, block_size, available, sizes):
    """model_plan.room_for, with all that lies beside blocks on a device. sizes: gpu_backend.Sizes; None: on the CPU."""
    if sizes is None:
        return model_plan.room_for(plans, limits, block_size, available)
    from turboquant_vllm import gpu_backend
    fixed = sizes.fixed_bytes(plans)
    n_blocks, beside = model_plan.room_for(plans, limits, block_size, available - fixed, gpu_backend.bytes_beside)
    return n_blocks, beside + fixed
