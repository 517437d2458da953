# SPDX-License-Identifier: Apache-2.0
"""Rows of one KV head to codes and back (codec.h), for engines that keep their own pages."""
import ctypes

import numpy as np

from .library import Handle, address, check, load


class Codec(Handle):
    """The heads of one layer of a plan. Never changes: share it."""

    def __init__(self, plan, layer):
        out = ctypes.c_void_p()
        check(load().tqkv_codec_create(plan, layer, None, None, out), f"codec of layer {layer}")
        super().__init__(out, load().tqkv_codec_destroy)
        self.plan = plan  # outlives the codec

    def row_bytes(self, head, side, tier):
        return load().tqkv_codec_row_bytes(self, head, side, tier)

    def encode(self, head, side, tier, base, rows):
        """rows: [n][dim] f32, contiguous in dim. Scales [n] u8, codes [n][row_bytes] u8, and rows that were bad."""
        n = len(rows)
        scales = np.zeros(n, np.uint8)
        codes = np.zeros((n, self.row_bytes(head, side, tier)), np.uint8)
        n_bad = ctypes.c_size_t()
        check(load().tqkv_codec_encode(self, head, side, tier, base, address(rows), rows.strides[0] // 4, n,
                                       address(scales), address(codes), n_bad), "encode")
        return scales, codes, n_bad.value

    def decode(self, head, side, tier, base, scales, codes, rows):
        """The inverse. scales, codes: contiguous. rows: [n][dim] f32 out, contiguous in dim."""
        check(load().tqkv_codec_decode(self, head, side, tier, base, address(scales), address(codes), len(rows),
                                       address(rows), rows.strides[0] // 4), "decode")
