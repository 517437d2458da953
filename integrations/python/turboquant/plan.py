# SPDX-License-Identifier: Apache-2.0
"""Plans: how the cache of one model is stored (plan.h)."""
import ctypes
import enum
import os
from dataclasses import dataclass, field

import numpy as np

from . import abi
from .library import Handle, Log, address, check, load


class Side(enum.IntEnum):
    K = 0
    V = 1


class RopeStyle(enum.IntEnum):
    NONE = 0
    HALVES = 1  # channel i is paired with i + n_rot / 2
    PAIRS = 2   # channel 2i is paired with 2i + 1


class Builtin(enum.IntEnum):
    F16 = 0
    Q8 = 1


@dataclass(frozen=True)
class Rope:
    """Channels 2 * len(inv_freq) and on are not turned."""
    style: RopeStyle = RopeStyle.NONE
    inv_freq: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # [n_rot / 2] f32


@dataclass(frozen=True)
class PlanLayer:
    """Shape of one layer, and what a plan makes of it. n_kv_heads 0: a layer without a cache."""
    n_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    window: int = 0
    rope: Rope = Rope()
    tier_tokens: tuple = (0,) * abi.TIERS_MAX
    token_bytes: tuple = (0,) * abi.TIERS_MAX
    is_latent: bool = False  # plan.h: V serves as key as well

    def struct(self):
        """For the library, which ignores tiers. The result keeps inv_freq alive."""
        freqs = np.ascontiguousarray(self.rope.inv_freq, np.float32)
        rope = abi.Rope(self.rope.style, 2 * len(freqs), freqs.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        struct = abi.PlanLayer(self.n_heads, self.n_kv_heads, self.k_dim, self.v_dim, self.window, rope,
                                is_latent=self.is_latent)
        struct.kept = freqs
        return struct


class Plan(Handle):
    """Never changes: share it between threads and stores."""

    def __init__(self, pointer):
        super().__init__(pointer, load().tqkv_plan_destroy)
        info = abi.PlanInfo()
        load().tqkv_plan_get_info(self, ctypes.byref(info))
        self.model, self.arch, self.profile = info.model.decode(), info.arch.decode(), info.profile.decode()
        self.n_layers, self.n_tiers, self.n_sinks = info.n_layers, info.n_tiers, info.n_sinks
        self.frame_tokens, self.context, self.bits_total = info.frame_tokens, info.context, info.bits_total
        self.fingerprint = bytes(info.fingerprint)

    @classmethod
    def load(cls, path):
        out, log = ctypes.c_void_p(), Log()
        check(load().tqkv_plan_load(os.fsencode(path), log.struct, out), str(path), log)
        return cls(out)

    @classmethod
    def read(cls, data):
        """data: bytes of a `.tqkv` file."""
        out, log = ctypes.c_void_p(), Log()
        check(load().tqkv_plan_read(data, len(data), log.struct, out), "plan", log)
        return cls(out)

    @classmethod
    def builtin(cls, kind, shape):
        """One layer without calibration. kind: Builtin. shape: PlanLayer."""
        out = ctypes.c_void_p()
        check(load().tqkv_plan_builtin(kind, shape.struct(), out), f"built-in plan {Builtin(kind).name.lower()}")
        return cls(out)

    def share(self, rank, n_ranks):
        """The plan for one of the ranks that the heads of every layer are dealt out to."""
        out = ctypes.c_void_p()
        check(load().tqkv_plan_share(self, rank, n_ranks, out), f"share {rank} of {n_ranks} of the plan's heads")
        return Plan(out)

    def save(self, path):
        log = Log()
        check(load().tqkv_plan_save(self, os.fsencode(path), log.struct), str(path), log)

    def layer(self, index):
        got = abi.PlanLayer()
        check(load().tqkv_plan_get_layer(self, index, got), f"layer {index} of the plan")
        n = got.rope.n_rot // 2
        freqs = np.array(got.rope.inv_freq[:n], np.float32)
        return PlanLayer(got.n_heads, got.n_kv_heads, got.k_dim, got.v_dim, got.window,
                         Rope(RopeStyle(got.rope.style), freqs), tuple(got.tier_tokens), tuple(got.token_bytes),
                         bool(got.is_latent))

    def _units(self, layer, side):
        shape = self.layer(layer)
        return (shape.k_dim if side == Side.K else shape.v_dim) // abi.UNIT_CHANNELS

    def bits(self, layer, head, side, tier):
        """[dim / 16] u8: width of each unit."""
        out = np.zeros(self._units(layer, side), np.uint8)
        check(load().tqkv_plan_get_bits(self, layer, head, side, tier, address(out)), f"bits of layer {layer}")
        return out

    def weights(self, layer, head, side):
        """[dim / 16] f32: weight of each unit's squared error."""
        out = np.zeros(self._units(layer, side), np.float32)
        check(load().tqkv_plan_get_weights(self, layer, head, side, address(out)), f"weights of layer {layer}")
        return out
