# SPDX-License-Identifier: Apache-2.0
"""plan.h and paged.h through ctypes. Knows neither torch nor vLLM: arrays come as addresses."""
import ctypes
import functools
import os
import pathlib
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p

TIERS_MAX = 4
UNSUPPORTED = 6
BUILTIN = {"f16": 0, "q8": 1}


class TurboquantError(Exception):
    """A status other than TQKV_OK."""


class Logger(ctypes.Structure):
    WRITE = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p)
    _fields_ = [("user", c_void_p), ("write", WRITE)]


class Rope(ctypes.Structure):
    _fields_ = [("style", c_uint32), ("n_rot", c_uint32), ("inv_freq", POINTER(c_float))]


class PlanInfo(ctypes.Structure):
    _fields_ = [("model", c_char_p), ("arch", c_char_p), ("profile", c_char_p), ("n_layers", c_uint32),
                ("n_tiers", c_uint32), ("n_sinks", c_uint32), ("frame_tokens", c_uint32), ("context", c_uint32),
                ("bits_total", c_double), ("fingerprint", c_uint8 * 32)]


class PlanLayer(ctypes.Structure):
    _fields_ = [("n_heads", c_uint32), ("n_kv_heads", c_uint32), ("k_dim", c_uint32), ("v_dim", c_uint32),
                ("window", c_uint32), ("rope", Rope), ("tier_tokens", c_uint32 * TIERS_MAX),
                ("token_bytes", c_uint32 * TIERS_MAX)]


class PagedConfig(ctypes.Structure):
    _fields_ = [("struct_bytes", c_size_t), ("plan", c_void_p), ("layer", c_uint32), ("block_tokens", c_uint32),
                ("n_blocks", c_uint32), ("n_sequences", c_uint32 * TIERS_MAX), ("n_drafts", c_uint32),
                ("n_batch_tokens", c_uint32), ("rope", c_void_p), ("mem", c_void_p)]


class PagedBatch(ctypes.Structure):
    _fields_ = [("struct_bytes", c_size_t), ("blocks", c_void_p), ("block_stride_bytes", c_size_t),
                ("n_seqs", c_uint32), ("query_start", c_void_p), ("seq_lens", c_void_p), ("block_table", c_void_p),
                ("block_table_stride", c_size_t), ("k", c_void_p), ("v", c_void_p), ("decode_tokens_max", c_uint32)]


class AttendArgs(ctypes.Structure):
    _fields_ = [("struct_bytes", c_size_t), ("stream", c_uint32), ("n_q", c_uint32), ("n_cells", c_uint32),
                ("q", c_void_p), ("q_token_stride", c_size_t), ("q_head_stride", c_size_t), ("out", c_void_p),
                ("out_token_stride", c_size_t), ("out_head_stride", c_size_t), ("lse", c_void_p), ("mask", c_void_p),
                ("mask_row_stride", c_size_t), ("slopes", c_void_p), ("sinks", c_void_p), ("scale", c_float),
                ("softcap", c_float), ("causal", c_int), ("scratch", c_void_p)]


class PagedStats(ctypes.Structure):
    _fields_ = [("n_written", c_uint64), ("n_bad_rows", c_uint64), ("n_young", c_uint64), ("n_missing", c_uint64)]


@functools.cache
def library():
    """The library beside this file, or the one that TQKV_LIBRARY names."""
    path = os.environ.get("TQKV_LIBRARY") or pathlib.Path(__file__).with_name("libturboquant.so")
    lib = ctypes.CDLL(str(path))
    lib.tqkv_status_text.restype = c_char_p
    lib.tqkv_version.restype = c_char_p
    for name in ("tqkv_paged_block_bytes", "tqkv_paged_bytes", "tqkv_paged_scratch_bytes"):
        getattr(lib, name).restype = c_size_t
    for name in ("tqkv_plan_destroy", "tqkv_plan_get_info", "tqkv_paged_config_init", "tqkv_paged_destroy",
                 "tqkv_paged_batch_init", "tqkv_attend_args_init", "tqkv_paged_get_stats"):
        getattr(lib, name).restype = None
    lib.tqkv_plan_destroy.argtypes = lib.tqkv_paged_destroy.argtypes = [c_void_p]
    lib.tqkv_paged_scratch_bytes.argtypes = [c_void_p, c_uint32, c_uint32, c_size_t]
    return lib


def check(status, what):
    if status != 0:
        raise TurboquantError(f"{what}: {library().tqkv_status_text(status).decode()}")


class Plan:
    """A tqkv_plan, destroyed with this object."""

    def __init__(self, handle):
        self.handle = handle
        self.info = PlanInfo()
        library().tqkv_plan_get_info(handle, ctypes.byref(self.info))

    def __del__(self):
        library().tqkv_plan_destroy(self.handle)

    @classmethod
    def load(cls, path):
        texts, handle = [], c_void_p()
        write = Logger.WRITE(lambda user, level, text: texts.append(text.decode()))
        logger = Logger(None, write)
        status = library().tqkv_plan_load(os.fsencode(path), ctypes.byref(logger), ctypes.byref(handle))
        check(status, "; ".join([str(path)] + texts))
        return cls(handle)

    @classmethod
    def builtin(cls, kind, n_heads, n_kv_heads, head_size, head_size_v, window):
        """One layer without calibration: "f16" or "q8"."""
        handle = c_void_p()
        shape = PlanLayer(n_heads=n_heads, n_kv_heads=n_kv_heads, k_dim=head_size, v_dim=head_size_v, window=window)
        status = library().tqkv_plan_builtin(BUILTIN[kind], ctypes.byref(shape), ctypes.byref(handle))
        check(status, f"built-in plan {kind}")
        return cls(handle)

    def layer(self, index):
        layer = PlanLayer()
        check(library().tqkv_plan_get_layer(self.handle, index, ctypes.byref(layer)), f"layer {index} of the plan")
        return layer


def paged_config(plan, layer, block_tokens, n_blocks, n_sequences, n_drafts, n_batch_tokens):
    """n_sequences: for each tier but the last, youngest first."""
    config = PagedConfig()
    library().tqkv_paged_config_init(ctypes.byref(config))
    config.plan, config.layer, config.block_tokens, config.n_blocks = plan.handle, layer, block_tokens, n_blocks
    config.n_sequences[:len(n_sequences)] = n_sequences
    config.n_drafts, config.n_batch_tokens = n_drafts, n_batch_tokens
    return config


def paged_bytes(config):
    return library().tqkv_paged_bytes(ctypes.byref(config))


class Paged:
    """A tqkv_paged, destroyed with this object. plan: the one in config, kept alive."""

    def __init__(self, plan, config):
        self.plan, self.handle = plan, c_void_p()
        check(library().tqkv_paged_create(ctypes.byref(config), ctypes.byref(self.handle)), "cache of a layer")
        self.batch, self.args = PagedBatch(), AttendArgs()
        library().tqkv_paged_batch_init(ctypes.byref(self.batch))
        library().tqkv_attend_args_init(ctypes.byref(self.args))

    def __del__(self):
        library().tqkv_paged_destroy(self.handle)

    def scratch_bytes(self, n_q, seq_len, n_workers):
        return library().tqkv_paged_scratch_bytes(self.handle, n_q, seq_len, n_workers)

    def write(self, parallel):
        """The tokens of self.batch."""
        check(library().tqkv_paged_write(self.handle, ctypes.byref(self.batch), parallel), "writing tokens")

    def attend(self, parallel):
        """The queries of self.args, over self.batch."""
        check(library().tqkv_paged_attend(self.handle, ctypes.byref(self.batch), ctypes.byref(self.args), parallel),
              "attention")

    def stats(self):
        stats = PagedStats()
        library().tqkv_paged_get_stats(self.handle, ctypes.byref(stats))
        return stats
