# SPDX-License-Identifier: Apache-2.0
"""Watches Q, K and V of a model and makes plans (calib.h)."""
import ctypes

from . import abi
from .library import Handle, Log, address, check, load
from .plan import Plan
from .workers import parallel


class Calibration(Handle):
    """Arrays are numpy, C-contiguous, and borrowed. One call at a time."""

    def __init__(self, model, arch, n_layers, workers=None):
        self._log, self._workers = Log(), workers
        config, out = abi.CalibConfig(), ctypes.c_void_p()
        load().tqkv_calib_config_init(config)
        config.model, config.arch, config.n_layers = model.encode(), arch.encode(), n_layers
        config.log = ctypes.pointer(self._log.struct)
        check(load().tqkv_calib_create(config, out), "calibration", self._log)
        super().__init__(out, load().tqkv_calib_destroy)

    def set_layer(self, layer, shape, w_o=None, resident=0):
        """shape: PlanLayer. w_o: [n_out][n_heads * v_dim] f32, or None where it is not known."""
        n_out = 0 if w_o is None else len(w_o)
        self._check(load().tqkv_calib_set_layer(self, layer, shape.struct(), address(w_o), n_out, resident,
                                                parallel(self._workers)), layer)

    def observe(self, layer, q, k, v, positions, scale, softcap=0.0):
        """
        q: [n][n_heads][k_dim], k: [n][n_kv_heads][k_dim], v: [n][n_kv_heads][v_dim] f32. positions: [n] i32.
        In a latent layer q is [n][n_heads][k_dim + v_dim], its part for V last.
        """
        self._check(load().tqkv_calib_observe(self, layer, len(q), address(q), address(k), address(v),
                                              address(positions), scale, softcap, parallel(self._workers)), layer)

    def prepare(self):
        check(load().tqkv_calib_prepare(self, parallel(self._workers)), "transforms", self._log)

    def perturb(self, layer, side, bits, positions, rows):
        """Makes rows [n][n_kv_heads][dim] f32 coarse in place. Their mean distortion."""
        distortion = ctypes.c_double()
        self._check(load().tqkv_calib_perturb(self, layer, side, bits, len(rows), address(positions),
                                              address(rows), distortion, parallel(self._workers)), layer)
        return distortion.value

    def set_sensitivity(self, layer, side, kl, distortion):
        self._check(load().tqkv_calib_set_sensitivity(self, layer, side, kl, distortion), layer)

    def solve(self, name, bits_total, context):
        """The plan for a budget of bits per value at a context, everything counted."""
        profile, out = abi.Profile(), ctypes.c_void_p()
        load().tqkv_profile_init(profile, name.encode(), bits_total, context)
        check(load().tqkv_calib_solve(self, profile, out), f"profile {name} ({bits_total:.2f} bits)", self._log)
        return Plan(out)

    def _check(self, status, layer):
        check(status, f"layer {layer}", self._log)
