# SPDX-License-Identifier: Apache-2.0
"""The library under test through ctypes: only what plan.h, codec.h and store.h declare."""
import ctypes
import os
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def find_library():
    """TQKV_TEST_LIB names the file, or TQKV_BUILD_DIR the build; skips without one."""
    path = os.environ.get("TQKV_TEST_LIB")
    folder = os.environ.get("TQKV_BUILD_DIR")
    if not path and folder:
        cache = ROOT / folder / "CMakeCache.txt"
        if cache.exists() and "TQKV_SANITIZE:STRING=\n" not in cache.read_text():
            pytest.skip("Python cannot load a library with sanitizers")
        path = ROOT / folder / "lib" / "libturboquant.so"
    if not path or not os.path.exists(path):
        pytest.skip("no library; set TQKV_TEST_LIB or use make test")
    return str(path)


def array_pointer(array, kind):
    return array.ctypes.data_as(ctypes.POINTER(kind))


class Logger(ctypes.Structure):
    WRITE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    _fields_ = [("user", ctypes.c_void_p), ("write", WRITE)]


class RopeStruct(ctypes.Structure):
    _fields_ = [("style", ctypes.c_uint32), ("n_rot", ctypes.c_uint32), ("inv_freq", ctypes.POINTER(ctypes.c_float))]


class LayerStruct(ctypes.Structure):
    _fields_ = [("n_heads", ctypes.c_uint32), ("n_kv_heads", ctypes.c_uint32), ("k_dim", ctypes.c_uint32),
                ("v_dim", ctypes.c_uint32), ("window", ctypes.c_uint32), ("rope", RopeStruct),
                ("tier_tokens", ctypes.c_uint32 * 4), ("token_bytes", ctypes.c_uint32 * 4),
                ("is_latent", ctypes.c_uint32)]


class InfoStruct(ctypes.Structure):
    _fields_ = [("model", ctypes.c_char_p), ("arch", ctypes.c_char_p), ("profile", ctypes.c_char_p),
                ("n_layers", ctypes.c_uint32), ("n_tiers", ctypes.c_uint32), ("n_sinks", ctypes.c_uint32),
                ("frame_tokens", ctypes.c_uint32), ("context", ctypes.c_uint32), ("bits_total", ctypes.c_double),
                ("fingerprint", ctypes.c_uint8 * 32)]


class LibraryPlan:
    """A plan that the library holds. status: of tqkv_plan_read; text: what it logged."""

    def __init__(self, lib, data=None, handle=None):
        self.lib, self.texts = lib, []
        self.handle = handle or ctypes.c_void_p()
        self.status = 0
        if data is not None:
            write = Logger.WRITE(lambda user, level, text: self.texts.append(text.decode()))
            logger = Logger(None, write)
            self.status = lib.tqkv_plan_read(data, ctypes.c_size_t(len(data)), ctypes.byref(logger),
                                             ctypes.byref(self.handle))

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.lib.tqkv_plan_destroy(self.handle)

    def info(self):
        info = InfoStruct()
        self.lib.tqkv_plan_get_info(self.handle, ctypes.byref(info))
        return info

    def layer(self, index):
        layer = LayerStruct()
        assert self.lib.tqkv_plan_get_layer(self.handle, index, ctypes.byref(layer)) == 0
        return layer

    def bits(self, layer, head, side, tier, n_units):
        out = np.zeros(n_units, np.uint8)
        assert self.lib.tqkv_plan_get_bits(self.handle, layer, head, side, tier,
                                           array_pointer(out, ctypes.c_uint8)) == 0
        return list(out)

    def save(self, path):
        assert self.lib.tqkv_plan_save(self.handle, os.fsencode(path), None) == 0


class LibraryCodec:
    """Rows of one layer."""

    def __init__(self, plan, layer):
        self.lib = plan.lib
        self.handle = ctypes.c_void_p()
        self.status = self.lib.tqkv_codec_create(plan.handle, layer, None, None, ctypes.byref(self.handle))

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.lib.tqkv_codec_destroy(self.handle)

    def encode(self, head, side, tier, base, rows):
        """rows: [n][dim]. Scales, codes [n][row_bytes], number of bad rows."""
        rows = np.ascontiguousarray(rows, np.float32)
        n, dim = rows.shape
        n_bytes = self.lib.tqkv_codec_row_bytes(self.handle, head, side, tier)
        scales, codes = np.zeros(n, np.uint8), np.zeros((n, n_bytes), np.uint8)
        bad = ctypes.c_size_t()
        status = self.lib.tqkv_codec_encode(
            self.handle, head, side, tier, base, array_pointer(rows, ctypes.c_float), ctypes.c_size_t(dim),
            ctypes.c_size_t(n), array_pointer(scales, ctypes.c_uint8), array_pointer(codes, ctypes.c_uint8),
            ctypes.byref(bad))
        assert status == 0
        return scales, codes, bad.value

    def decode(self, head, side, tier, base, scales, codes, dim):
        scales, codes = np.ascontiguousarray(scales, np.uint8), np.ascontiguousarray(codes, np.uint8)
        out = np.full((len(scales), dim), np.nan, np.float32)
        status = self.lib.tqkv_codec_decode(
            self.handle, head, side, tier, base, array_pointer(scales, ctypes.c_uint8),
            array_pointer(codes, ctypes.c_uint8), ctypes.c_size_t(len(scales)), array_pointer(out, ctypes.c_float),
            ctypes.c_size_t(dim))
        assert status == 0
        return out


class StoreConfig(ctypes.Structure):
    _fields_ = [("struct_bytes", ctypes.c_size_t), ("plan", ctypes.c_void_p), ("layer", ctypes.c_uint32),
                ("n_cells", ctypes.c_uint32), ("n_streams", ctypes.c_uint32), ("rope", ctypes.c_void_p),
                ("mem", ctypes.c_void_p)]


class LibraryStore:
    """One stream of n_cells."""

    def __init__(self, plan, layer, n_cells):
        self.lib, self.handle, self.batch = plan.lib, ctypes.c_void_p(), ctypes.c_void_p()
        config = StoreConfig()
        self.lib.tqkv_store_config_init(ctypes.byref(config))
        config.plan, config.layer, config.n_cells, config.n_streams = plan.handle, layer, n_cells, 1
        assert self.lib.tqkv_store_create(ctypes.byref(config), ctypes.byref(self.handle)) == 0
        assert self.lib.tqkv_batch_create(None, ctypes.byref(self.batch)) == 0

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.lib.tqkv_batch_destroy(self.batch)
        self.lib.tqkv_store_destroy(self.handle)

    def append(self, first, sides):
        """sides: rows [n][n_kv_heads * dim] of K and of V, for cells and positions first, first + 1, ..."""
        n = len(sides[0])
        cells = np.arange(first, first + n, dtype=np.int64)
        positions = cells.astype(np.int32)
        assert self.lib.tqkv_batch_begin(self.batch, self.handle, array_pointer(cells, ctypes.c_int64),
                                         array_pointer(positions, ctypes.c_int32), ctypes.c_size_t(n)) == 0
        for side, rows in enumerate(sides):
            assert self.lib.tqkv_batch_put(self.batch, side, array_pointer(rows, ctypes.c_float),
                                           ctypes.c_size_t(rows.shape[1])) == 0
        assert self.lib.tqkv_batch_commit(self.batch, None) == 0

    def export(self, cell, side):
        out = np.zeros(self.lib.tqkv_store_record_bytes(self.handle, side), np.uint8)
        used = ctypes.c_size_t()
        assert self.lib.tqkv_store_export(self.handle, ctypes.c_int64(cell), side, array_pointer(out, ctypes.c_uint8),
                                          ctypes.byref(used)) == 0
        return out[:used.value].tobytes()

    def read(self, cell, side, n_floats):
        out = np.zeros(n_floats, np.float32)
        assert self.lib.tqkv_store_read(self.handle, ctypes.c_int64(cell), side,
                                        array_pointer(out, ctypes.c_float)) == 0
        return out


def load():
    lib = ctypes.CDLL(find_library())
    lib.tqkv_codec_row_bytes.restype = ctypes.c_size_t
    lib.tqkv_store_record_bytes.restype = ctypes.c_size_t
    for name in ("tqkv_plan_destroy", "tqkv_codec_destroy", "tqkv_plan_get_info", "tqkv_store_config_init",
                 "tqkv_store_destroy", "tqkv_batch_destroy"):
        getattr(lib, name).restype = None
    return lib
