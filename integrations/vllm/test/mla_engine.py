# SPDX-License-Identifier: Apache-2.0
"""A real vLLM on the CPU whose attention is gpu_mla, as on a device, with launches that fake_cuda answers. Nothing is
rounded, so that it gives what vLLM gives by itself. Prints what run_engine.py prints, and then the launches.

    python mla_engine.py PLAN JOBS          PLAN: of the checkpoint's layers, JOBS: of run_engine.py
"""
import collections
import functools
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "cuda")]

import fake_cuda  # noqa: E402
import run_engine  # noqa: E402
import torch  # noqa: E402
from turboquant_vllm import gpu_backend, model_plan, vllm_adapter  # noqa: E402
from vllm.model_executor.layers.attention import mla_attention  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

CHUNK = 64  # tokens of prompts in a step
launches = collections.Counter()


class Layer(fake_cuda.LatentLayer):
    def __init__(self, plan):
        super().__init__(plan.shape.n_heads, plan.n_tiers, seed=plan.index)

    def _launch(self, name, *arguments):
        launches[name] += 1
        getattr(super(), name)(*arguments)

    def store(self, *arguments):
        self._launch("store", *arguments)

    def decode(self, *arguments):
        self._launch("decode", *arguments)

    def gather(self, *arguments):
        self._launch("gather", *arguments)


class LikeDevice(CpuPlatform):
    """For mla_attention: contexts are gathered as on a device."""

    def is_cpu(self):
        return False


def schedule_as_on_devices(update):
    """The platform class switches cut prompts and prefix hits off for MLA on the CPU."""
    def updated(cls, config):
        update(cls, config)
        config.scheduler_config.enable_chunked_prefill = config.cache_config.enable_prefix_caching = True
        config.scheduler_config.max_num_batched_tokens, config.cache_config.block_size = CHUNK, gpu_backend.PAGE_TOKENS
    return classmethod(updated)


def choose_as_on_devices(chosen):
    def choose(cls, selected_backend, attn_selector_config, num_heads=None):
        chosen(cls, selected_backend, attn_selector_config, num_heads)
        return AttentionBackendEnum.CUSTOM.get_path()
    return classmethod(choose)


@functools.cache
def reserve_memory():
    worker = sys.modules["vllm.v1.worker.cpu_worker"].CPUWorker
    worker.determine_available_memory = vllm_adapter.memory_for_blocks(worker.determine_available_memory)


def stand_in(plan):
    fake_cuda.rounded = lambda x, tier: x.float()
    vllm_adapter.on_device = lambda: True
    vllm_adapter.missing_features = lambda on_device: []
    vllm_adapter.reserve_memory = reserve_memory
    gpu_backend.cuda_layer = Layer
    model_plan.LayerPlan.token_bytes = property(lambda plan: 4 * sum(gpu_backend.LATENT_SHAPE))
    # Another order than the model's, whatever the plan says.
    model_plan.channel_order = lambda plan, ropes: torch.arange(plan.shape.k_dim).view(2, -1).t().flatten()
    mla_attention.current_platform = LikeDevice()
    CpuPlatform.check_and_update_config = schedule_as_on_devices(CpuPlatform.check_and_update_config.__func__)
    vllm_adapter.install(plan)
    CpuPlatform.get_attn_backend_cls = choose_as_on_devices(CpuPlatform.get_attn_backend_cls.__func__)


if __name__ == "__main__":
    stand_in(sys.argv[1])
    run_engine.main(json.loads(sys.argv[2]))
    print(json.dumps(launches))
