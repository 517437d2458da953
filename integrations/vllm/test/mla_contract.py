# SPDX-License-Identifier: Apache-2.0
"""As gpu_contract.py, of multi-head latent attention: vLLM's own MLAAttention with our backend, against plain attention
over latents that are decoded from what the stand-in has stored.

    python mla_contract.py [CHECK ...]
"""
import dataclasses
import importlib
import inspect
import pathlib
import sys
import tempfile
import types
import unittest.mock

import gpu_contract as plain  # isort: skip  (first: it says where the others are)
import fake_cuda
import tiny_checkpoint as tiny
import tiny_plan
import torch
import vllm.platforms
from gpu_contract import BLOCK, MAX_LEN, MAX_SEQS, MAX_TOKENS, N_BLOCKS, N_DRAFTS, refusal
from turboquant_vllm import doctor, gpu_backend, gpu_mla, model_plan, vllm_adapter, vllm_features
from turboquant_vllm.model_plan import LayerPlan, Limits
from vllm import _custom_ops
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import mla_attention
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import backend as contract
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

LATENT, ROTATED, NOPE, VALUE = 512, 64, 32, 48  # channels
WORKSPACE = 192  # rows of a context that vLLM reads at a time
SCALE = .1


class PlainPrompts(MLAPrefillBackend):
    """Attention of prompts, in place of vLLM's kernels."""
    get_name = staticmethod(lambda: "PLAIN")

    def run_prefill_new_tokens(self, q, k, v, return_softmax_lse, out=None, output_scale=None):
        starts = self._prefill_metadata.query_start_loc.tolist()
        got, lse = attention_of_rows(q, k, v, starts, starts, is_causal=True)
        return (got, lse) if return_softmax_lse else got

    def run_prefill_context_chunk(self, q, k, v, chunk=None, chunk_idx=None):
        if chunk is None:
            of_chunks = self._prefill_metadata.chunked_context
            starts, ends = self._prefill_metadata.query_start_loc, of_chunks.cu_seq_lens[chunk_idx]
        else:
            starts, ends = chunk.query_start_loc, chunk.cu_seq_lens
        return attention_of_rows(q, k, v, starts.tolist(), ends.tolist(), is_causal=False)


def attention_of_rows(q, k, v, q_starts, k_starts, is_causal):
    """Output [tokens, heads, channels] and log of sums [heads, tokens]; zeros and -inf where there is no key."""
    out, lse = q.new_zeros(len(q), q.shape[1], v.shape[2]), torch.full((q.shape[1], len(q)), -torch.inf)
    for (first, end), (k_first, k_end) in zip(zip(q_starts, q_starts[1:]), zip(k_starts, k_starts[1:])):
        if k_end > k_first:
            scores = torch.einsum("qhd,khd->hqk", q[first:end].double(), k[k_first:k_end].double()) * SCALE
            if is_causal:
                scores += torch.full(scores.shape[1:], -torch.inf).triu(1)
            lse[:, first:end] = scores.logsumexp(2)
            out[first:end] = torch.einsum("hqk,khd->qhd", scores.softmax(2), v[k_first:k_end].double()).to(q.dtype)
    return out, lse


def merge(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None, **_):
    total = torch.logaddexp(prefix_lse, suffix_lse)
    weights = [(lse - total).exp().nan_to_num().t().unsqueeze(2) for lse in (prefix_lse, suffix_lse)]
    output.copy_(prefix_output * weights[0] + suffix_output * weights[1])
    if output_lse is not None:
        output_lse.copy_(total)


def patched(where, **names):
    return unittest.mock.patch.multiple(where, **names)


def unpinned(make):
    return lambda *arguments, pin_memory=False, **options: make(*arguments, **options)


def stand_in():
    """For what runs on devices only, where vLLM's Python looks for it."""
    vllm.platforms._current_platform = plain.Device()
    mla_attention.current_platform = plain.Device()
    mla_attention.merge_attn_states = merge
    if hasattr(mla_attention, "mask_empty_context"):  # rows without keys are as it makes them
        mla_attention.mask_empty_context = lambda *_: None
    mla_attention.get_mla_prefill_backend = lambda config: PlainPrompts
    mla_attention.MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size = staticmethod(lambda c: WORKSPACE)
    torch.empty, torch.zeros = unpinned(torch.empty), unpinned(torch.zeros)


def make_config(dtype, n_drafts=N_DRAFTS):
    vllm.platforms._current_platform = CpuPlatform()
    importlib.import_module("vllm.model_executor.layers.quantization.fp8")  # later it would ask a device for kernels
    config = VllmConfig()
    of_plain = plain.make_config(n_drafts)
    for part in ("scheduler_config", "cache_config", "compilation_config", "parallel_config"):
        for name, value in vars(getattr(of_plain, part)).items():
            if name != "num_ubatches":
                setattr(getattr(config, part), name, value)
    config.cache_config.cache_dtype = "auto"
    config.speculative_config = of_plain.speculative_config
    dims = {"q_lora_rank": None, "kv_lora_rank": LATENT, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROTATED,
            "v_head_dim": VALUE}
    config.model_config = types.SimpleNamespace(
        dtype=dtype, max_model_len=MAX_LEN, get_head_size=lambda: LATENT + ROTATED,
        get_num_attention_heads=lambda _: tiny.HEADS, hf_text_config=types.SimpleNamespace(**dims))
    return config, dims


def plans(last_widths=(3, 4), order=None):
    with tempfile.TemporaryDirectory() as folder:
        path = str(tiny_plan.write_latent(pathlib.Path(folder) / "latent.tqkv", last_widths=last_widths))
        found = [LayerPlan(path, index, tiny.HEADS, 1, ROTATED, LATENT, None, is_latent=True)
                 for index in range(len(last_widths))]
    for plan in found:
        plan.cuda = fake_cuda.LatentLayer(tiny.HEADS, 3, plan.index)
    return found


class KvB(torch.nn.Module):
    """kv_b_proj: latents to the keys' unrotated channels and values of all heads."""

    def __init__(self, dtype):
        super().__init__()
        weight = torch.randn(tiny.HEADS * (NOPE + VALUE), LATENT) / LATENT**.5
        self.weight, self.quant_method = torch.nn.Parameter(weight.to(dtype), requires_grad=False), None

    def forward(self, x):
        return x @ self.weight.t(), None


class Engine:
    """Two layers of unlike widths with a builder each, as vLLM makes them. order: of the plan's channels of K."""

    def __init__(self, dtype=torch.float32, order=None, n_counted=N_BLOCKS):
        self.config, dims = make_config(dtype)
        self.dtype, all_plans = dtype, plans()
        self.layers, names = [], [f"model.layers.{plan.index}.self_attn.attn" for plan in all_plans]
        stand_in()
        self.config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = True
        with set_current_vllm_config(self.config):
            for plan, name in zip(all_plans, names):
                layer = mla_attention.MLAAttention(
                    num_heads=tiny.HEADS, scale=SCALE, kv_b_proj=KvB(dtype), cache_config=self.config.cache_config,
                    prefix=name, attn_backend=gpu_mla.TurboquantMlaBackend, **dims)
                layer.turboquant = vllm_adapter.LayerSetup(plan, order, Limits(MAX_SEQS, MAX_TOKENS, N_DRAFTS), all_plans,
                                                           n_counted)
                layer.impl.dcp_world_size, layer.use_direct_call = 1, True
                cache = torch.zeros(N_BLOCKS, 1, BLOCK, plan.cuda.page_bytes(2, 1), dtype=torch.uint8)
                if hasattr(layer, "bind_kv_cache"):
                    layer.bind_kv_cache(cache)
                else:
                    layer.kv_cache = cache.squeeze(1)
                vllm_adapter.folding(mla_attention_process, "")(layer, dtype)
                self.layers.append(layer)
            self.builders = [gpu_mla.MlaMetadataBuilder(
                vllm_features.byte_spec(BLOCK, layer.kv_cache.shape[-1], layer), [layer.layer_name], self.config,
                torch.device("cpu")) for layer in self.layers]
        self.rows = {}  # (layer, row): latents and rotated keys of its tokens
        self.blocks = torch.randperm(N_BLOCKS - 1).view(-1)[:20].view(MAX_SEQS, 5) + 1

    common = plain.Engine.common

    def build(self, before, n_new):
        batch = self.common(before, n_new)
        return batch, {layer.layer_name: builder.build(0, batch) for layer, builder in zip(self.layers, self.builders)}

    def step(self, before, n_new, n_decodes):
        """Runs and compares. Returns the calls of the first layer."""
        batch, metadata = self.build(before, n_new)
        for layer in self.layers:
            layer.turboquant.plan.cuda.calls.clear()
            q = torch.randn(sum(n_new), tiny.HEADS, NOPE + ROTATED).to(self.dtype)
            fused = torch.randn(sum(n_new), LATENT + ROTATED).to(self.dtype)
            latent, rotated = fused[:, :LATENT].contiguous(), fused[:, LATENT:].unsqueeze(1)
            with set_forward_context(metadata, self.config, slot_mapping={layer.layer_name: batch.slot_mapping}):
                out = layer(q, latent, rotated, output_shape=(len(q), tiny.HEADS * VALUE))
            self.compare(layer, metadata[layer.layer_name], before, n_new, n_decodes, q, fused,
                         out.view(-1, tiny.HEADS, VALUE))
        return self.layers[0].turboquant.plan.cuda.calls

    def compare(self, layer, metadata, before, n_new, n_decodes, q, fused, out):
        start, cuda = 0, layer.turboquant.plan.cuda
        tolerance = 1e-4 if self.dtype == torch.float32 else 4e-2
        for r, (first, new) in enumerate(zip(before, n_new)):
            raw = fused[start:start + new].double()
            past = self.rows.get((layer.layer_name, r), raw[:0])[:first]
            everything = self.rows[layer.layer_name, r] = torch.cat([past, raw])
            tiers = metadata.step.pages.tiers[r, :-(-len(everything) // 64)].tolist()
            stored = torch.cat([as_stored(cuda, part, tier) for tier, part in zip(tiers, everything.split(64))])
            assert tiers[0] == tiers[first // 64] == 0
            if r >= n_decodes:
                stored[first:] = raw
            for i in range(new):
                want = plain_mla(layer, q[start + i].double(), stored[:first + i + 1])
                error = (out[start + i].double() - want).norm() / want.norm()
                assert error < tolerance, (r, i, error)
            start += new


mla_attention_process = mla_attention.MLAAttention.process_weights_after_loading


def as_stored(cuda, rows, tier):
    w = fake_cuda.rounded(cuda.coded(rows[:, :LATENT]), tier).double()
    return torch.cat([w @ cuda.plain_of_coded.double(), fake_cuda.rounded(rows[:, LATENT:], tier).double()], 1)


def plain_mla(layer, q, rows):
    """Of one query [heads, channels] over rows [n, latent and rotated key], by keys and values of each head."""
    expanded = (rows[:, :LATENT] @ layer.kv_b_proj.weight.double().t()).view(len(rows), tiny.HEADS, NOPE + VALUE)
    scores = torch.einsum("hd,nhd->hn", q[:, :NOPE], expanded[..., :NOPE]) + q[:, NOPE:] @ rows[:, LATENT:].t()
    return torch.einsum("hn,nhd->hd", (SCALE * scores).softmax(1), expanded[..., NOPE:])


def check_mla_classes():
    for ours, theirs in ((gpu_mla.TurboquantMlaBackend, mla_attention.MLACommonBackend),
                         (gpu_mla.TurboquantMlaImpl, mla_attention.MLACommonImpl),
                         (gpu_mla.MlaMetadataBuilder, mla_attention.MLACommonMetadataBuilder)):
        assert issubclass(ours, theirs) and not inspect.isabstract(ours)
    for name in ("do_kv_cache_update", "forward_mqa", "_compute_prefill_context"):
        plain.accepts(getattr(gpu_mla.TurboquantMlaImpl, name), getattr(mla_attention.MLACommonImpl, name))
    assert gpu_mla.MlaMetadataBuilder._cudagraph_support is contract.AttentionCGSupport.UNIFORM_BATCH
    assert gpu_mla.TurboquantMlaBackend.get_name() == "CUSTOM" and gpu_mla.TurboquantMlaBackend.is_mla()
    assert gpu_mla.TurboquantMlaBackend.get_preferred_block_size(16) == 64


def check_mla_steps():
    """Prompts in chunks, decodes, drafts of one number and of several, in one engine."""
    torch.manual_seed(1)
    engine = Engine()
    assert [builder.reorder_batch_threshold for builder in engine.builders] == [1 + N_DRAFTS] * 2
    assert len({builder.chunked_prefill_workspace.data_ptr() for builder in engine.builders}) == 1
    assert engine.step([0, 0, 0], [200, 70, 100], 0) == ["store"]
    assert engine.step([200, 70, 100], [1, 1, 60], 2) == ["store", "gather 100 of 1", "decode 2 x 1"]
    for i in range(40):
        assert engine.step([201 + i, 71 + i, 160 + i], [1, 1, 1], 3) == ["store", "decode 3 x 1"]
    assert engine.step([241, 111, 200], [4, 4, 4], 3) == ["store", "decode 3 x 4"]
    assert engine.step([242, 111, 204], [4, 2, 1], 3) == ["store", "decode 3 x 4"]  # drafts of 241 and 111 were rejected
    calls = engine.step([246, 113, 205], [2, 40, 30], 1)  # more rows than fit the workspace
    assert calls[0] == "store" and calls[-1] == "decode 1 x 2" and len(calls) > 3
    assert sum(int(call.split()[1]) for call in calls[1:-1]) == 113 + 205
    calls = engine.step([0, 0, 235], [9, 12, 6], 0)
    assert sum(int(call.split()[1]) for call in calls[1:]) == 235


def check_mla_types():
    """In the types that models have, with rotated channels in another order than the model's."""
    torch.manual_seed(2)
    order = torch.arange(ROTATED).view(2, -1).t().flatten()
    for dtype in (torch.bfloat16, torch.float16):
        engine = Engine(dtype, order)
        engine.step([0, 0], [150, 70], 0)
        assert engine.step([150, 70], [3, 50], 1) == ["store", "gather 70 of 1", "decode 1 x 3"]
        engine.step([153, 120], [1, 1], 2)


def check_mla_graphs():
    """A captured graph finds tables and slots at fixed addresses; without metadata nothing is stored."""
    engine = Engine()
    batch = engine.common([0] * 4, [1] * 4)
    captured = [builder.build_for_cudagraph_capture(batch) for builder in engine.builders]
    step = captured[0].step
    assert step is captured[1].step and step.batch.max_tokens == MAX_LEN and step.batch.n_decodes == 4
    assert captured[0].num_decode_tokens == 4 and captured[0].prefill is None
    layer = engine.layers[0]
    layer.turboquant.plan.cuda.calls.clear()
    with set_forward_context(None, engine.config, slot_mapping={layer.layer_name: batch.slot_mapping}):
        layer(torch.randn(4, tiny.HEADS, NOPE + ROTATED), torch.randn(4, LATENT), torch.randn(4, 1, ROTATED),
              output_shape=(4, tiny.HEADS * VALUE))
    assert layer.turboquant.plan.cuda.calls == []
    assert engine.config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla is False
    engine.config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    engine.config.compilation_config.splitting_ops = []
    for builder in engine.builders:
        builder.shared = None
    assert "splitting_ops" in refusal(engine.builders[0].build, 0, engine.common([0], [1]))
    engine.config.compilation_config.splitting_ops = [gpu_mla.UPDATE_OP]
    engine.builders[0].build(0, engine.common([0], [1]))


def check_mla_fold():
    """Weights that are loaded anew are folded anew, in place; kv_b_proj, which the first ones are views of, stays."""
    engine = Engine()
    layer = engine.layers[0]
    kept = {name: getattr(layer, name) for name in ("W_UK_T", "W_UV")}
    before = {name: weight.clone() for name, weight in kept.items()}
    raw = layer.kv_b_proj.weight.clone()
    for factor in (1, 2):
        layer.kv_b_proj.weight.copy_(factor * raw)
        vllm_adapter.folding(mla_attention_process, "")(layer, torch.float32)
        for name, weight in kept.items():
            assert getattr(layer, name) is weight and torch.allclose(weight, factor * before[name], atol=1e-6)
        assert torch.equal(layer.kv_b_proj.weight, factor * raw)
    del layer.W_UV
    assert "quantised" in refusal(gpu_mla.fold, layer, layer.turboquant.plan)


def check_mla_gather():
    """Others' caches are read as before."""
    asked = []
    with patched(_custom_ops, gather_and_maybe_dequant_cache=lambda *given, **named: asked.append((given, named))):
        assert not vllm_features.gathers_latents()  # the stand-in names no arguments
        gpu_mla.read_ours_first.__wrapped__()
        _custom_ops.gather_and_maybe_dequant_cache(torch.zeros(1), 2, dst=3)
    assert asked[0][0][1:] == (2,) and asked[0][1] == {"dst": 3}


def check_mla_room():
    """What is allocated fits into what was taken off the memory for blocks; no slab, no workspace of prompts."""
    engine = Engine(n_counted=0)
    available = 60 * 2**20
    beside = plain.vllm_adapter_bytes(engine.config, available)
    setup = engine.layers[0].turboquant
    blocks = setup.n_blocks_counted * BLOCK * sum(plan.token_bytes for plan in setup.plans)
    assert 0 < beside < available and beside + blocks <= available and setup.n_blocks_counted > N_BLOCKS
    sizes = gpu_backend.Sizes.of(engine.config)
    assert sizes.prefill_bytes(setup.plans) == sizes.slab_bytes(setup.plans) == 0
    engine.build([0], [100])
    shared = engine.builders[0].shared
    held = [shared.workspace.decode, shared.workspace.prefill, shared.workspace.slab, shared.pages.copy_of,
            shared.pages.page_of, shared.pages.used]
    for layer in engine.layers:
        held += [layer.turboquant.gpu.image, *layer.turboquant.gpu.copies]
    assert max(shared.pages.tiers_young.n_copies) > 0
    assert sum(x.numel() * x.itemsize for x in held) <= beside


def check_mla_spec():
    """vLLM counts the bytes of the plan, in a group for all layers, whatever each takes; the cache is read as it is
    shaped."""
    engine = Engine()
    spec_of = vllm_adapter.compressed_spec(mla_attention.MLAAttention.get_kv_cache_spec, "")
    with patched(vllm_adapter, on_device=lambda: True, reserve_memory=lambda: None):
        specs = {layer.layer_name: spec_of(layer, engine.config) for layer in engine.layers}
    for layer in engine.layers:
        spec = specs[layer.layer_name]
        token_bytes = layer.turboquant.plan.token_bytes
        assert spec.page_size_bytes == BLOCK * token_bytes < BLOCK * (LATENT + ROTATED)
        if not vllm_features.spec_gives_shape():
            assert gpu_mla.TurboquantMlaBackend.get_kv_cache_shape(
                N_BLOCKS, BLOCK, spec.num_kv_heads, spec.head_size, "auto") == (N_BLOCKS, BLOCK, token_bytes)
        else:
            assert gpu_mla.TurboquantMlaBackend.customize_spec(spec) == spec
        assert layer.kv_cache.shape == (N_BLOCKS, BLOCK, layer.turboquant.plan.cuda.page_bytes(2, 1))
    from vllm.v1.core import kv_cache_utils
    assert not kv_cache_utils.is_kv_cache_spec_uniform(specs)
    whole = UniformTypeKVCacheSpecs.from_specs(specs)
    assert whole.page_size_bytes == sum(spec.page_size_bytes for spec in specs.values())


def selector(**options):
    return plain.selector(**({"head_size": LATENT + ROTATED, "use_mla": True} | options))


def check_mla_selection():
    """MLA and other attention each get their own class of CUSTOM; no other kind of MLA is taken on a CPU."""
    vllm.platforms._current_platform = plain.Device()
    vllm_adapter.install("q8")
    choose = plain.Device.get_attn_backend_cls
    for _ in range(2):
        assert choose(None, selector(), num_heads=16) == "turboquant_vllm.gpu_mla.TurboquantMlaBackend"
        assert choose(None, attn_selector_config=plain.selector()) == "turboquant_vllm.gpu_backend.TurboquantGpuBackend"
    for options in ({"head_size": 320}, {"dtype": torch.float32}, {"kv_cache_dtype": "fp8"}, {"block_size": 16}):
        assert "CUSTOM" in refusal(choose, None, selector(**options), kind=ValueError)
    assert "indexer" in refusal(choose, None, selector(use_sparse=True))
    assert "TRITON_MLA" in refusal(choose, AttentionBackendEnum.TRITON_MLA, selector())
    with patched(plain.Device, capability=DeviceCapability(7, 5)):
        assert "compute capability" in refusal(choose, None, selector(), kind=ValueError)
    with patched(vllm_features, gathers_latents=lambda: False):
        assert "latents" in refusal(choose, None, selector())


def check_mla_on_cpu():
    class Cpu(CpuPlatform):
        taken = "a.module.AMXMLABackend"

        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            return cls.taken
    vllm_adapter.insist_on_cpu_mla(Cpu)
    choose = Cpu.get_attn_backend_cls
    assert choose(None, plain.selector()) == Cpu.taken
    assert "indexer" in refusal(choose, None, selector(use_sparse=True))
    if "CPU_MLA" not in AttentionBackendEnum.__members__:
        assert "no CPU_MLA" in refusal(choose, None, selector())
        return
    assert "AMXMLABackend" in refusal(choose, None, selector())
    Cpu.taken = AttentionBackendEnum.CPU_MLA.get_path()
    assert choose(None, selector()) == Cpu.taken


def check_mla_refusals():
    layer = types.SimpleNamespace(num_heads=16, qk_rope_head_dim=ROTATED, kv_lora_rank=LATENT, kv_cache_dtype="auto",
                                  sliding_window=None)
    assert vllm_adapter.shape_of(layer) == (16, 1, ROTATED, LATENT, None)
    layer.kv_cache_dtype = "fp8"
    assert "--kv-cache-dtype fp8" in refusal(vllm_adapter.shape_of, layer)
    layer.kv_cache_dtype, layer.sliding_window = "auto", 512
    assert "sliding window" in refusal(vllm_adapter.shape_of, layer)
    plan = plans()[0]
    for change in ({"v_dim": 256}, {"k_dim": 32}, {"n_heads": 256}):
        wrong = types.SimpleNamespace(shape=dataclasses.replace(plan.shape, **change))
        assert "no CUDA kernels" in refusal(gpu_backend.cuda_layer, wrong)
    with tempfile.TemporaryDirectory() as folder:
        path = str(tiny_plan.write(pathlib.Path(folder) / "plain.tqkv"))
        assert "latents (MLA) in the model" in refusal(LayerPlan, path, 0, tiny.HEADS, 1, ROTATED, LATENT, None,
                                                       is_latent=True)
    impl = (tiny.HEADS, LATENT + ROTATED, SCALE, 1)
    assert "ALiBi" in refusal(gpu_mla.TurboquantMlaImpl, *impl, [1.0], None, "auto", None, "decoder", None)
    assert "soft caps" in refusal(gpu_mla.TurboquantMlaImpl, *impl, None, None, "auto", 30.0, "decoder", None)


def check_mla_refused_configs():
    engine = Engine()
    vllm_adapter.refuse_config(engine.config)
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        config = plain.make_config()
        setattr(config.parallel_config, option, 2)
        assert option in refusal(vllm_adapter.refuse_config, config)
    from vllm.model_executor.layers.attention import Attention
    engine.config.compilation_config.static_forward_context["other"] = object.__new__(Attention)
    assert "latent (MLA) and other" in refusal(vllm_adapter.refuse_config, engine.config)


def check_mla_set_up():
    """A plan meets an MLAAttention and the RoPE of DeepSeek; with several ranks each has its heads and all latents."""
    from vllm import distributed
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import DeepseekScalingRotaryEmbedding
    engine = Engine()
    yarn = {"beta_fast": 32, "beta_slow": 1, "mscale": .707, "mscale_all_dim": .707}
    with (set_current_vllm_config(engine.config), tempfile.TemporaryDirectory() as folder,
          patched(vllm_adapter, on_device=lambda: False)):
        rope = DeepseekScalingRotaryEmbedding(ROTATED, ROTATED, 4096, 10000.0, False, 40.0, torch.float32, **yarn)
        inv_freq = rope._compute_inv_freq(40.0).numpy()
        rotary_embedding._ROPE_DICT["deepseek"] = rope
        for style, has_order in ((tiny_plan.PAIRS, False), (tiny_plan.HALVES, True)):
            path = str(tiny_plan.write_latent(pathlib.Path(folder) / f"{style}.tqkv", style=style, inv_freq=inv_freq))
            for n_ranks in (1, 2):
                layer = types.SimpleNamespace(num_heads=tiny.HEADS // n_ranks, qk_rope_head_dim=ROTATED,
                                              kv_lora_rank=LATENT, kv_cache_dtype="auto",
                                              layer_name="model.layers.1.self_attn.attn")
                with patched(distributed, get_tensor_model_parallel_world_size=lambda n=n_ranks: n,
                             get_tensor_model_parallel_rank=lambda n=n_ranks: n - 1):
                    setup = vllm_adapter.setup_of(layer, engine.config, path)
                assert setup.plan.shape.is_latent and setup is vllm_adapter.setup_of(layer, engine.config, path)
                assert (setup.channel_order is not None) == has_order
                assert setup.plan.token_bytes == (LATENT + ROTATED) * 4 // 8 + 2
        wrong = str(tiny_plan.write_latent(pathlib.Path(folder) / "wrong.tqkv"))
        with patched(distributed, get_tensor_model_parallel_world_size=lambda: 2,
                     get_tensor_model_parallel_rank=lambda: 0):
            assert "no RoPE" in refusal(vllm_adapter.set_up, layer, engine.config, wrong)


def check_mla_doctor():
    config = types.SimpleNamespace(num_attention_heads=tiny.HEADS, kv_lora_rank=LATENT, qk_rope_head_dim=ROTATED,
                                   num_hidden_layers=2)
    found = doctor.layer_plans("q8", config)
    assert [(plan.shape.is_latent, plan.token_bytes) for plan in found] == [(True, LATENT + ROTATED + 2)] * 2
    doctor.print_layers(found, 2)
    config.index_topk = 2048
    assert "indexer" in refusal(doctor.layer_plans, "q8", config)
    arguments = types.SimpleNamespace(max_num_seqs=MAX_SEQS, block_size=BLOCK, max_model_len=MAX_LEN)
    with patched(vllm_adapter, on_device=lambda: True), patched(gpu_backend, cuda_layer=lambda plan: plan.cuda):
        assert 0 < doctor.bytes_beside_blocks(plans(), arguments, 64 << 20) < 64 << 20


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or CHECKS:
        CHECKS[wanted]()
        print(f"passed: {wanted}", flush=True)
