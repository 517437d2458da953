# SPDX-License-Identifier: Apache-2.0
"""Compressed KV cache for vLLM: register() is the plugin's entry point."""


def register():
    """Called by vLLM in every process before the model is built, perhaps more than once."""
    from turboquant_vllm import model_plan, vllm_adapter

    if model_plan.plan_name():
        vllm_adapter.install(model_plan.plan_name())
