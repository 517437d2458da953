# SPDX-License-Identifier: Apache-2.0
"""Which plan serves which layer, and whether they fit together.

TQKV_PLAN names a .tqkv file, or is `f16` or `q8`: plans that are built in and need no calibration.
"""
import bisect
import functools
import hashlib
import math
import os
from dataclasses import dataclass

import torch
import turboquant
from turboquant import Builtin, Plan, PlanLayer, RopeStyle

BUILTINS = {"f16": Builtin.F16, "q8": Builtin.Q8}
READ_AGAIN_MOST = 512  # of a prefix hit, and at most half of it; README.md has what 128, 256 and 512 leave of the loss
PLAIN_DTYPES = ("auto", "float16", "bfloat16", "float32")  # of vLLM's cache, that do not contradict a plan


class Refusal(ValueError):
    """What the plugin cannot serve, as a sentence for whoever starts the server."""


def refuse_cache_dtype(kv_cache_dtype):
    if kv_cache_dtype not in PLAIN_DTYPES:
        raise Refusal(f"--kv-cache-dtype {kv_cache_dtype} contradicts TQKV_PLAN: leave it at auto")


def plan_name():
    return os.environ.get("TQKV_PLAN")


@functools.cache
def load_plan(name):
    """The plan of a file; None for a built-in one, which is made layer by layer."""
    return None if name in BUILTINS else Plan.load(name)


@functools.cache
def load_share(name, rank, n_ranks):
    """Its heads of one tensor-parallel rank."""
    plan = load_plan(name)
    return plan if plan is None or n_ranks == 1 else plan.share(rank, n_ranks)


@functools.cache
def young_tokens(name):
    """Tokens of the youngest tier, and of all but the last; 0 where all tokens are stored alike."""
    plan = load_plan(name)
    tiers = [plan.layer(index).tier_tokens[:plan.n_tiers - 1] for index in range(plan.n_layers)] if plan else []
    return max((tokens[0] for tokens in tiers if tokens), default=0), max(map(sum, tiers), default=0)


def tokens_worth_finding(name, keeps_newest, n_tokens, block_size):
    """Of n_tokens in cached blocks, a prefix hit, those that are not better read again.

    keeps_newest: whether copies of the newest ones are there; None: nothing is known. With them all tokens are worth
    it. Where they are gone, so are mostly those of the older young tiers, and more is read again than the youngest.
    """
    n_again, n_young = young_tokens(name)
    if n_again == 0 or keeps_newest:
        return n_tokens
    if keeps_newest is not None:
        n_again = max(n_again, min(n_young, READ_AGAIN_MOST, n_tokens // 2))
    return max(n_tokens - n_again, 0) // block_size * block_size


def fingerprint(name):
    """Bytes that differ whenever stored bytes may mean something else."""
    plan = load_plan(name)
    return plan.fingerprint if plan else hashlib.sha256(f"built-in {name} 0".encode()).digest()


class LayerPlan:
    """The plan of one attention layer, heads of one rank: plan, index of its layer, shape (turboquant.PlanLayer).

    Of a latent layer (turboquant/plan.h) head_size is that of the rotated key, head_size_v that of the latent.
    """

    def __init__(self, name, index, n_heads, n_kv_heads, head_size, head_size_v, window, rank=0, n_ranks=1,
                 is_latent=False):
        loaded = load_share(name, rank, n_ranks)
        self.plan = loaded or Plan.builtin(BUILTINS[name], PlanLayer(
            n_heads, n_kv_heads, head_size, head_size_v, window or 0, is_latent=is_latent))
        self.index = index if loaded else 0
        self.cuda = None  # the tqkv_cuda.Layer on a device
        if self.index >= self.plan.n_layers:
            raise Refusal(f"layer {index}: the plan has {self.plan.n_layers} layers; it is of another model")
        self.shape = self.plan.layer(self.index)
        if is_latent != self.shape.is_latent:
            kinds = ("keys and values of its own", "latents (MLA)")
            raise Refusal(f"layer {index} has {kinds[is_latent]} in the model and {kinds[self.shape.is_latent]} in the "
                          "plan; it is of another model")
        has = (n_heads, n_kv_heads, head_size, head_size_v, window or 0)
        wants = (self.shape.n_heads, self.shape.n_kv_heads, self.shape.k_dim, self.shape.v_dim, self.shape.window)
        if has != wants:
            raise Refusal(f"layer {index}: (heads, KV heads, K channels, V channels, window) are {has} in the model "
                          f"and {wants} in the plan; it is of another model")

    @property
    def n_tiers(self):
        return self.plan.n_tiers

    @property
    def old_tier(self):
        return turboquant.paged_old_tier(self.plan, self.index)

    @property
    def token_bytes(self):
        """Bytes of one token in a block of the engine."""
        return self.shape.token_bytes[self.old_tier]

    @property
    def spare_bytes(self):
        """Per token of the plan's context: what its young tiers take beyond the widths of the blocks."""
        shape, wider = self.shape, [n - self.token_bytes for n in self.shape.token_bytes[:self.old_tier + 1]]
        return (sum(map(math.prod, zip(shape.tier_tokens, wider))) + self.plan.n_sinks * wider[0]) / self.plan.context

    def inv_freq(self):
        return torch.tensor(self.shape.rope.inv_freq)


def channel_order(plan, ropes):
    """Channel of the model for each channel of K in the plan, or None where they are the same.

    ropes: the model's RoPE modules. A plan made from a GGUF file may pair channels 2i and 2i + 1 where
    the model pairs i and i + n/2; the frequencies must be the same.
    """
    style, n_rot = plan.shape.rope.style, 2 * len(plan.shape.rope.inv_freq)
    if style == RopeStyle.NONE:
        return None
    for rope in ropes:
        if rope.rotary_dim == n_rot and has_frequencies(rope, plan.inv_freq()):
            break
    else:
        raise Refusal(f"layer {plan.index}: no RoPE of the model has the plan's {n_rot} channels and frequencies")
    if rope.is_neox_style == (style == RopeStyle.HALVES):
        return None
    channels = torch.arange(n_rot)
    pairs = channels.view(2, -1).t() if style == RopeStyle.PAIRS else channels.view(-1, 2).t()
    return torch.cat([pairs.flatten(), torch.arange(n_rot, plan.shape.k_dim)])


def has_frequencies(rope, inv_freq):
    """Whether a token at position 1 is turned by these angles; a factor on all of them does not matter."""
    table = rope.cos_sin_cache[1].float().cpu()  # [cosines, sines]
    turned = torch.cat([inv_freq.cos(), inv_freq.sin()])
    length = table.norm() / turned.norm()
    return torch.allclose(table / length, turned, atol=4 * torch.finfo(rope.cos_sin_cache.dtype).eps)


@dataclass
class Limits:
    """What the scheduler may do at a time."""
    max_num_seqs: int
    max_num_batched_tokens: int
    num_drafts: int


def paged_config(plan, limits, block_size, n_blocks, n_sequences):
    return turboquant.paged_config(plan.plan, plan.index, block_size, n_blocks, n_sequences, limits.num_drafts,
                                   limits.max_num_batched_tokens)


def bytes_beside(plans, limits, block_size, n_blocks, n_sequences):
    """Of copies and tables beside n_blocks of the engine, in all layers."""
    return sum(turboquant.paged_bytes(paged_config(plan, limits, block_size, n_blocks, n_sequences)) for plan in plans)


def copies_for(plans, limits, block_size, n_blocks, bytes_beside=bytes_beside):
    """Sequences for which each younger tier holds copies beside n_blocks of the engine; the same in all layers.

    Blocks and copies together take what the plan promised for its context, so the room for tokens is the promised
    one. The youngest tier matters most: as many sequences as may run, but eight times as many as fit at the plan's
    context. Then the older ones, for as many as fit there, and what is left is for prompts that no sequence uses now.
    bytes_beside: on a device it is that of gpu_backend.
    """
    n_tokens = n_blocks * block_size
    budget = n_tokens * sum(plan.spare_bytes for plan in plans)
    n_young = max(plan.old_tier for plan in plans)
    at_context = math.ceil(n_tokens / plans[0].plan.context)
    chosen = [min(limits.max_num_seqs, 8 * at_context) if tier == 0 else 0 for tier in range(n_young)]

    def add(n, tiers):
        return [have + n * (tier in tiers) for tier, have in enumerate(chosen)]

    older = [([tier], min(limits.max_num_seqs, at_context)) for tier in range(1, n_young)]
    for tiers, most in [*older, (range(n_young), at_context)]:
        chosen = add(bisect.bisect_right(range(1, most + 1), budget, key=lambda n: bytes_beside(
            plans, limits, block_size, n_blocks, add(n, tiers))), tiers)
    return chosen


def room_for(plans, limits, block_size, available, bytes_beside=bytes_beside):
    """(blocks, bytes of copies and tables beside them) in all layers, of the bytes that are available."""
    block_bytes = block_size * sum(plan.token_bytes for plan in plans)
    n_blocks = max(1, int(available // (block_bytes + block_size * sum(plan.spare_bytes for plan in plans))))
    n_most = max(1, available // block_bytes)  # if there were no copies: tables are as long
    return n_blocks, bytes_beside(plans, limits, block_size, n_most,
                                  copies_for(plans, limits, block_size, n_blocks, bytes_beside))
