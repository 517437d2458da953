# SPDX-License-Identifier: Apache-2.0
"""Holds the CUDA backend against the Python sources of the vLLM that is installed, on CPU tensors; launches go to
fake_cuda. Prints the checks that passed, one a line; an exception ends it.

    python gpu_contract.py [CHECK ...]
"""
import dataclasses
import inspect
import math
import pathlib
import sys
import tempfile
import types

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "cuda")]
sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("vllm._C_stable_libtorch"))  # CUDA builds have it

import fake_cuda  # noqa: E402
import tiny_checkpoint as tiny  # noqa: E402
import tiny_plan  # noqa: E402
import torch  # noqa: E402
import tqkv_cuda  # noqa: E402
import vllm.model_executor.layers.attention  # noqa: E402  (as on the CPU, before a check stands in for a device)
import vllm.platforms  # noqa: E402
from turboquant_vllm import doctor, gpu_backend, gpu_layer, model_plan, vllm_adapter, vllm_features  # noqa: E402
from turboquant_vllm.model_plan import LayerPlan, Limits, Refusal  # noqa: E402
from vllm.platforms.cuda import CudaPlatform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.attention import backend as contract  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402

N_BLOCKS, BLOCK, MAX_SEQS, MAX_LEN, MAX_TOKENS, N_DRAFTS = 24, 64, 4, 1024, 512, 3


def refusal(call, *arguments, kind=Refusal, **options):
    try:
        call(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} did not refuse")


def accepts(function, like):
    """Whether a call that fits `like` fits function, by position and by name."""
    parameters = list(inspect.signature(like).parameters.values())
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inspect.signature(function).bind(*plain)
    first = [p for p in plain if p.name == "self"]
    inspect.signature(function).bind(*first, **{p.name: None for p in plain if p.name != "self"})


def check_classes():
    for ours, theirs in ((gpu_backend.TurboquantGpuBackend, contract.AttentionBackend),
                         (gpu_backend.TurboquantGpuImpl, contract.AttentionImpl),
                         (gpu_backend.GpuMetadataBuilder, contract.AttentionMetadataBuilder)):
        assert issubclass(ours, theirs) and not inspect.isabstract(ours)
        for name, function in inspect.getmembers(ours, callable):
            if getattr(theirs, name, function) is not function and not name.startswith("__") or name == "__init__":
                accepts(function, getattr(theirs, name))
    assert gpu_backend.GpuMetadataBuilder._cudagraph_support is contract.AttentionCGSupport.UNIFORM_BATCH
    assert gpu_backend.TurboquantGpuBackend.get_preferred_block_size(16) == 64
    names = {field.name for field in dataclasses.fields(contract.CommonAttentionMetadata)}
    assert {"query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs", "max_seq_len",
            "num_actual_tokens", "block_table_tensor", "slot_mapping", "causal"} <= names


def check_features():
    assert vllm_adapter.missing_features(on_device=True) == []
    taken = vars(contract.AttentionMetadataBuilder)["_init_reorder_batch_threshold"]
    del contract.AttentionMetadataBuilder._init_reorder_batch_threshold
    try:
        assert vllm_adapter.missing_features(on_device=True) == ["reorder_batch_threshold"]
    finally:
        contract.AttentionMetadataBuilder._init_reorder_batch_threshold = taken


def selector(**options):
    return AttentionSelectorConfig(**({"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto",
                                       "block_size": None} | options))


class Device(CudaPlatform):
    capability = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls, device_id=0):
        return cls.capability


def check_selection():
    """vLLM's own checks of a backend that was named, without anyone naming it."""
    vllm.platforms._current_platform = Device()
    try:
        assert vllm_adapter.on_device()
        vllm_adapter.install("q8")
        choose = Device.get_attn_backend_cls
        assert choose(None, attn_selector_config=selector(), num_heads=8) == (
            "turboquant_vllm.gpu_backend.TurboquantGpuBackend")
        assert AttentionBackendEnum.CUSTOM.get_class() is gpu_backend.TurboquantGpuBackend
        for options in ({"head_size": 80}, {"dtype": torch.float32}, {"has_sink": True}, {"has_sliding_window": True},
                        {"use_mla": True}, {"kv_cache_dtype": "fp8"}, {"block_size": 16}):
            if options.keys() <= set(AttentionSelectorConfig._fields):  # not all ask for sliding windows
                assert "CUSTOM" in refusal(choose, None, attn_selector_config=selector(**options), kind=ValueError)
        assert "FLASH_ATTN" in refusal(choose, AttentionBackendEnum.FLASH_ATTN, attn_selector_config=selector())
        Device.capability = DeviceCapability(7, 5)
        assert "compute capability" in refusal(choose, None, attn_selector_config=selector(), kind=ValueError)
    finally:
        vllm.platforms._current_platform = None


def plans():
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_plan.write(pathlib.Path(folder) / "tiny.tqkv")
        model_plan.load_plan(str(path))
        found = [LayerPlan(str(path), index, tiny.HEADS, tiny.KV_HEADS, tiny.HEAD_SIZE, tiny.HEAD_SIZE, None)
                 for index in range(2)]
    for plan in found:
        plan.cuda = fake_cuda.Layer(tiny.HEADS, tiny.KV_HEADS, tiny.HEAD_SIZE, 3)
    return found


def make_config(n_drafts=N_DRAFTS):
    return types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS),
        model_config=types.SimpleNamespace(max_model_len=MAX_LEN), use_v2_model_runner=True,
        cache_config=types.SimpleNamespace(block_size=BLOCK),
        parallel_config=types.SimpleNamespace(decode_context_parallel_size=1, num_ubatches=0),
        speculative_config=types.SimpleNamespace(num_speculative_tokens=n_drafts, parallel_drafting=False,
                                                 method="ngram"),
        kv_transfer_config=None,
        compilation_config=types.SimpleNamespace(static_forward_context={}, max_cudagraph_capture_size=8))


class Engine:
    """Two layers of unlike widths with a builder each, as vLLM makes them."""

    def __init__(self, n_counted=N_BLOCKS):
        self.config, all_plans = make_config(), plans()
        limits = Limits(MAX_SEQS, MAX_TOKENS, N_DRAFTS)
        for plan in all_plans:
            bytes_of_token = plan.cuda.page_bytes(2, 1)
            setup = vllm_adapter.LayerSetup(plan, None, limits, all_plans, n_counted)
            self.config.compilation_config.static_forward_context[f"layers.{plan.index}"] = types.SimpleNamespace(
                turboquant=setup, kv_cache=torch.zeros(N_BLOCKS, 1, BLOCK, bytes_of_token, dtype=torch.uint8),
                layer_name=f"layers.{plan.index}")
        self.layers = list(self.config.compilation_config.static_forward_context.values())
        self.builders = [gpu_backend.GpuMetadataBuilder(self.spec(layer), [layer.layer_name], self.config,
                                                        torch.device("cpu")) for layer in self.layers]
        self.impl = gpu_backend.TurboquantGpuImpl(tiny.HEADS, tiny.HEAD_SIZE, .2, tiny.KV_HEADS)
        self.rows = {}  # (layer, row): K and V of its tokens
        self.blocks = torch.randperm(N_BLOCKS - 1).view(-1)[:20].view(MAX_SEQS, 5) + 1

    @staticmethod
    def spec(layer):
        shape = types.SimpleNamespace(num_kv_heads=tiny.KV_HEADS, head_size=tiny.HEAD_SIZE, head_size_v=tiny.HEAD_SIZE)
        return vllm_features.byte_spec(BLOCK, layer.kv_cache.shape[-1], shape)

    def common(self, before, n_new, n_padding=0):
        starts = torch.tensor([0, *n_new]).cumsum(0).to(torch.int32)
        lens = torch.tensor([a + b for a, b in zip(before, n_new)], dtype=torch.int32)
        slots = [self.blocks[r, p // BLOCK] * BLOCK + p % BLOCK for r, (first, n) in enumerate(zip(before, n_new))
                 for p in range(first, first + n)]
        return contract.CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=lens,
            seq_lens_cpu_upper_bound=lens.clone(),
            num_reqs=len(n_new), num_actual_tokens=len(slots) + n_padding, max_query_len=max(n_new),
            max_seq_len=int(lens.max()), block_table_tensor=self.blocks.to(torch.int32),
            slot_mapping=torch.tensor(slots + [-1] * n_padding, dtype=torch.int64))

    def step(self, before, n_new, n_decodes):
        """Runs and compares. Returns the calls of the first layer."""
        common, n = self.common(before, n_new), sum(n_new)
        metadata = [builder.build(0, common) for builder in self.builders]
        assert metadata[0] is metadata[1]
        for layer in self.layers:
            layer.turboquant.plan.cuda.calls.clear()
            fused = torch.randn(n, (tiny.HEADS + 2 * tiny.KV_HEADS) * tiny.HEAD_SIZE, dtype=torch.bfloat16)
            q, k, v = (x.unflatten(1, (-1, tiny.HEAD_SIZE)) for x in fused.split(
                [heads * tiny.HEAD_SIZE for heads in (tiny.HEADS, tiny.KV_HEADS, tiny.KV_HEADS)], 1))
            out = torch.full((n, tiny.HEADS, tiny.HEAD_SIZE), torch.nan, dtype=torch.bfloat16)
            self.impl.need_to_return_lse_for_decode = True
            with fake_cuda.Launches(layer.turboquant.plan.cuda.calls):
                got, lse = self.impl.forward(layer, q, k, v, layer.kv_cache, metadata[0], out)
            assert got is out
            start = 0
            for r, (first, new) in enumerate(zip(before, n_new)):
                tokens = slice(start, start + new)
                raw = torch.stack([k[tokens], v[tokens]], 1)
                past = self.rows.get((layer.layer_name, r), raw[:0])[:first]
                everything = torch.cat([past, raw])
                self.rows[layer.layer_name, r] = everything
                tiers = metadata[0].pages.tiers[r, :-(-len(everything) // 64)].tolist()
                stored = torch.cat([fake_cuda.rounded(part, tier) for tier, part in zip(tiers, everything.split(64))])
                assert tiers[0] == tiers[first // 64] == 0
                if r >= n_decodes:
                    stored[first:] = raw
                for i in range(new):
                    want, want_lse = fake_cuda.attention(q[start + i], stored[:first + i + 1], .2)
                    assert (out[start + i].float() - want.float()).norm() < .02 * want.float().norm()
                    assert (lse[start + i] - want_lse).abs().max() < .02
                start += new
        return [call for call in self.layers[0].turboquant.plan.cuda.calls if not call.startswith("torch ")]


def check_steps():
    """Prompts in chunks, decodes, drafts of one number and of several, in one engine."""
    torch.manual_seed(1)
    engine = Engine()
    assert [builder.reorder_batch_threshold for builder in engine.builders] == [1 + N_DRAFTS] * 2
    assert "decode 1 x 1 beside" not in engine.step([0, 0, 0], [200, 70, 100], 0)
    calls = engine.step([200, 70, 100], [1, 1, 100], 2)
    assert calls == ["store", "decode 2 x 1 beside", "prefill 100 of 1", "merge"]
    for i in range(60):
        assert engine.step([201 + i, 71 + i, 200 + i], [1, 1, 1], 3) == ["store", "decode 3 x 1 beside"]
    assert engine.step([261, 131, 260], [4, 4, 4], 3)[-1] == "decode 3 x 4 beside"
    assert engine.step([262, 131, 264], [4, 2, 1], 3)[-1] == "decode 3 x 4 beside"
    assert engine.step([0, 131], [5, 90], 0)[-2:] == ["prefill 95 of 2", "merge"]
    gpu_layer.LONG_TOKENS = 80  # the context of the second is unpacked
    assert engine.step([5, 221], [70, 90], 0)[-4:] == ["prefill 160 of 2", "merge", "unpack 221 of 1", "merge"]
    assert engine.step([75, 130], [80, 90], 0)[-4:] == ["unpack 75 of 0", "merge", "unpack 130 of 1", "merge"]


def check_graphs():
    """What a captured graph reads stays where it is, whatever the batch; padding writes nothing."""
    engine = Engine()
    captured = engine.builders[0].build_for_cudagraph_capture(engine.common([0] * 4, [1] * 4))
    assert captured.batch.max_tokens == MAX_LEN and captured.batch.n_decodes == 4 and captured.batch.rows is None
    pages, before = captured.pages, {}
    for name, x in vars(captured.pages).items():
        before[name] = x.data_ptr() if isinstance(x, torch.Tensor) else None
    common = engine.common([100, 70], [1, 1], n_padding=2)
    common = common.replace(num_reqs=4, max_seq_len=MAX_LEN + 5,
                            query_start_loc=torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
                            query_start_loc_cpu=torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
                            seq_lens=torch.tensor([101, 71, 0, 0], dtype=torch.int32))
    assert engine.builders[0].build(0, common).batch.max_tokens == MAX_LEN
    assert pages.seq_lens.tolist() == [101, 71, 0, 0] and (pages.slots[:, 2:] == -1).all()
    assert all(before[name] is None or x.data_ptr() == before[name] for name, x in vars(pages).items())


def check_room():
    """What is allocated fits into what was taken off the memory for blocks."""
    engine = Engine(n_counted=0)
    available = 40 * 2**20
    beside = vllm_adapter_bytes(engine.config, available)
    setup = engine.layers[0].turboquant
    blocks = setup.n_blocks_counted * BLOCK * sum(plan.token_bytes for plan in setup.plans)
    assert 0 < beside < available and beside + blocks <= available and setup.n_blocks_counted > N_BLOCKS
    engine.step([0], [100], 0)
    shared = engine.builders[0].shared
    held = [shared.workspace.decode, shared.workspace.prefill, shared.workspace.slab]
    for layer in engine.layers:
        held += [layer.turboquant.gpu.image, *layer.turboquant.gpu.copies]
    held += [shared.pages.copy_of, shared.pages.page_of, shared.pages.used]
    assert max(shared.pages.tiers_young.n_copies) > 0
    assert sum(x.numel() * x.itemsize for x in held) <= beside


def vllm_adapter_bytes(config, available):
    on_device, vllm_adapter.on_device = vllm_adapter.on_device, lambda: True
    try:
        return vllm_adapter.bytes_beside_blocks(config, available)
    finally:
        vllm_adapter.on_device = on_device


def check_memory_hook():
    """The worker of CUDA devices has the method that the plugin wraps, and the binding of blocks is where it looks."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker import utils
    from vllm.v1.worker.gpu_worker import Worker
    assert inspect.signature(Worker.determine_available_memory).parameters.keys() == {"self"}
    if hasattr(Attention, "bind_kv_cache"):
        assert "kv_cache" in inspect.signature(Attention.bind_kv_cache).parameters
    else:
        layer, blocks = types.SimpleNamespace(), torch.zeros(2, 1, 64, 8)
        utils.bind_kv_cache({"model.layers.0": blocks}, {"model.layers.0": layer}, [])
        assert layer.kv_cache is blocks


def check_spec():
    """What vLLM makes of a spec: the cache of every layer as the plugin reads it, and pages counted as they are."""
    layer = types.SimpleNamespace(num_kv_heads=tiny.KV_HEADS, head_size=tiny.HEAD_SIZE, head_size_v=tiny.HEAD_SIZE)
    narrow, wide = (vllm_features.byte_spec(BLOCK, n, layer) for n in (68, 100))
    assert (narrow.page_size_bytes, wide.page_size_bytes) == (BLOCK * 68, BLOCK * 100)
    merged = type(narrow).merge([narrow, dataclasses.replace(narrow)])
    assert merged == narrow and narrow.copy_with_new_block_size(16).page_size_bytes == 16 * 68
    if not vllm_features.spec_gives_shape():
        assert gpu_backend.TurboquantGpuBackend.get_kv_cache_shape(
            N_BLOCKS, BLOCK, wide.num_kv_heads, wide.head_size, "auto") == (N_BLOCKS, 1, BLOCK, 100)


def check_generations():
    """What vllm_features does where vLLM lacks something that the installed one may have, with stand-ins."""
    manager = types.SimpleNamespace(create_kv_cache_blocks=lambda blocks: types.SimpleNamespace(blocks=blocks))
    hit = types.SimpleNamespace(blocks=([5, 7, 9],))
    for n, kept in ((0, []), (2, [5, 7]), (3, [5, 7, 9])):
        assert vllm_features.first_blocks(manager, hit, n * BLOCK, BLOCK).blocks == (kept,)

    kv_cache_utils.NONE_HASH, stock = b"none", kv_cache_utils.hash_block_tokens
    of_a, again, of_b = (vllm_features.first_parent_with(stock, plan) for plan in "aab")
    firsts = [hashed(sha256, None, (1, 2), ("salt",)) for hashed in (of_a, again, of_b, stock)]
    assert firsts[0] == firsts[1] and len(set(firsts)) == 3
    assert of_a(sha256, firsts[0], (3, 4)) == stock(sha256, firsts[0], (3, 4))

    there = vars(contract.AttentionBackend).get("get_kv_cache_shape")
    contract.AttentionBackend.get_kv_cache_shape = there or gpu_backend.TurboquantGpuBackend.get_kv_cache_shape
    try:
        assert vllm_features.counts_bytes() and not vllm_features.spec_gives_shape()
        check_spec()
    finally:
        if there is None:
            del contract.AttentionBackend.get_kv_cache_shape


def check_refusals():
    impl = (tiny.HEADS, tiny.HEAD_SIZE, .2, tiny.KV_HEADS)
    assert "soft cap" in refusal(gpu_backend.TurboquantGpuImpl, *impl, logits_soft_cap=30.0)
    assert "sinks" in refusal(gpu_backend.TurboquantGpuImpl, *impl, sinks=torch.zeros(4))
    assert "ALiBi" in refusal(gpu_backend.TurboquantGpuImpl, *impl, alibi_slopes=[1.0])
    assert "speculative" in refusal(gpu_backend.Sizes.of, make_config(n_drafts=8))
    plan = plans()[0]
    tqkv_cuda.find = lambda: None
    assert "cmake --preset cuda" in refusal(gpu_backend.cuda_layer, plan)
    plan.shape = dataclasses.replace(plan.shape, window=100)
    assert "sliding windows" in refusal(gpu_backend.cuda_layer, plan)
    vllm_adapter.on_device = lambda: True
    for part, option, value in (("parallel_config", "num_ubatches", 2), ("cache_config", "block_size", 32)):
        config = make_config()
        setattr(getattr(config, part), option, value)
        assert option.removesuffix("_size") in refusal(vllm_adapter.refuse_config, config).replace("-", "_")


def check_plain_math():
    """fake_cuda's attention is attention."""
    q, rows = torch.randn(2, 8), torch.randn(5, 2, 1, 8)
    out, lse = fake_cuda.attention(q, rows, .3)
    scores = q @ rows[:, 0, 0].t() * .3
    assert torch.allclose(out, scores.softmax(1) @ rows[:, 1, 0], atol=1e-5) and math.isfinite(float(lse.sum()))


def check_doctor():
    """Counts what the adapter takes off the room."""
    vllm_adapter.on_device, gpu_backend.cuda_layer = lambda: True, lambda plan: plan.cuda
    engine = Engine()
    engine.config.scheduler_config.max_num_batched_tokens = doctor.BATCH_TOKENS
    engine.config.speculative_config = None
    arguments = types.SimpleNamespace(max_num_seqs=MAX_SEQS, block_size=BLOCK, max_model_len=MAX_LEN)
    for available in (4 << 20, 64 << 20):
        beside = doctor.bytes_beside_blocks(plans(), arguments, available)
        assert 0 < beside == vllm_adapter.bytes_beside_blocks(engine.config, available)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or CHECKS:
        CHECKS[wanted]()
        print(f"passed: {wanted}", flush=True)
