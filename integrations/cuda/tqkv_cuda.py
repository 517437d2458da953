# SPDX-License-Identifier: Apache-2.0
"""libturboquant-cuda through ctypes: what turboquant/cuda.h declares, for attention backends in Python.

Device memory goes in as addresses (tensor.data_ptr()) and streams as handles (stream.cuda_stream), so
that nothing here depends on a framework. No call synchronises; all can be captured into graphs.
"""
import ctypes as c
import os
import pathlib

F32, F16, BF16 = 0, 1, 2
TILE_TOKENS = 64
TIERS_MAX = 4
LATENT_CHANNELS = 512


class Error(RuntimeError):
    """A call returned a status other than 0."""


def find():
    """Path of the library: what TQKV_CUDA_LIBRARY names, or the one installed beside this file; None: neither."""
    beside = pathlib.Path(__file__).with_name("libturboquant-cuda.so")
    return os.environ.get("TQKV_CUDA_LIBRARY") or (str(beside) if beside.exists() else None)


class Pages(c.Structure):
    """tqkv_cuda_pages. pool: an address per tier."""
    _fields_ = [("pool", c.c_void_p * TIERS_MAX), ("block_table", c.c_void_p), ("tiers", c.c_void_p),
                ("page_tokens", c.c_uint32), ("table_stride", c.c_uint32), ("tiers_stride", c.c_uint32)]

    def __init__(self, pool, block_table, page_tokens, table_stride, tiers=None, tiers_stride=0):
        super().__init__((c.c_void_p * TIERS_MAX)(*pool), block_table, tiers, page_tokens, table_stride, tiers_stride)


class StoreArgs(c.Structure):
    """tqkv_cuda_store_args. slots, pool: an address per tier, None without."""
    _fields_ = [("k", c.c_void_p), ("v", c.c_void_p), ("k_token_stride", c.c_size_t), ("v_token_stride", c.c_size_t),
                ("positions", c.c_void_p), ("slots", c.c_void_p * TIERS_MAX), ("pool", c.c_void_p * TIERS_MAX),
                ("n_tokens", c.c_uint32), ("page_tokens", c.c_uint32), ("type", c.c_int)]

    def __init__(self, k, v, k_token_stride, v_token_stride, positions, slots, pool, n_tokens, page_tokens, dtype):
        by_tier = c.c_void_p * TIERS_MAX
        super().__init__(k, v, k_token_stride, v_token_stride, positions, by_tier(*slots), by_tier(*pool), n_tokens,
                         page_tokens, dtype)


class DecodeArgs(c.Structure):
    """tqkv_cuda_decode_args. after_store may be left out."""
    _fields_ = [("pages", Pages), ("q", c.c_void_p), ("out", c.c_void_p), ("lse", c.c_void_p), ("seq_lens", c.c_void_p),
                ("workspace", c.c_void_p), ("n_seqs", c.c_uint32), ("q_len", c.c_uint32), ("max_tokens", c.c_uint32),
                ("scale", c.c_float), ("type", c.c_int), ("after_store", c.c_uint32)]


class PrefillArgs(c.Structure):
    """tqkv_cuda_prefill_args."""
    _fields_ = [("pages", Pages), ("q", c.c_void_p), ("out", c.c_void_p), ("lse", c.c_void_p), ("q_starts", c.c_void_p),
                ("context_lens", c.c_void_p), ("workspace", c.c_void_p), ("workspace_bytes", c.c_size_t),
                ("n_seqs", c.c_uint32), ("n_tokens", c.c_uint32), ("max_q", c.c_uint32), ("max_context", c.c_uint32),
                ("is_causal", c.c_uint32), ("scale", c.c_float), ("type", c.c_int)]


class UnpackArgs(c.Structure):
    """tqkv_cuda_unpack_args."""
    _fields_ = [("pages", Pages), ("k", c.c_void_p), ("v", c.c_void_p), ("sequence", c.c_uint32), ("first", c.c_uint32),
                ("n_tokens", c.c_uint32), ("type", c.c_int)]


class GatherArgs(c.Structure):
    """tqkv_cuda_gather_args."""
    _fields_ = [("pages", Pages), ("out", c.c_void_p), ("out_stride", c.c_size_t), ("starts", c.c_void_p),
                ("firsts", c.c_void_p), ("n_seqs", c.c_uint32), ("n_tokens", c.c_uint32), ("type", c.c_int)]


class PageTablesArgs(c.Structure):
    """tqkv_cuda_page_tables_args."""
    _fields_ = [*((name, c.c_void_p) for name in (
        "copy_of", "page_of", "used", "is_sink", "clock", "query_start", "seq_lens", "block_table", "slots", "positions",
        "tier_slots", "places", "tiers", "lengths", "youngest")), ("reach", c.c_int32 * TIERS_MAX), *(
        (name, c.c_uint32) for name in ("n_young", "n_copies", "n_pages", "n_sink_pages", "n_seqs", "n_tokens", "n_width",
                                        "max_seqs", "max_tokens", "table_stride", "slots_stride", "places_stride"))]


def check(status):
    if status != 0:
        raise Error(f"turboquant: status {status}")


class Library:
    """The loaded library. path: of libturboquant-cuda.so."""

    def __init__(self, path):
        self.lib = lib = c.CDLL(str(path))
        lib.tqkv_cuda_layer_image.restype = c.c_void_p
        lib.tqkv_cuda_layer_inverse.restype = c.c_void_p
        lib.tqkv_cuda_page_bytes.restype = c.c_size_t
        lib.tqkv_cuda_decode_bytes.restype = c.c_size_t
        lib.tqkv_cuda_prefill_bytes.restype = c.c_size_t
        lib.tqkv_plan_destroy.restype = lib.tqkv_cuda_layer_destroy.restype = None
        lib.tqkv_plan_destroy.argtypes = lib.tqkv_cuda_layer_destroy.argtypes = [c.c_void_p]
        lib.tqkv_cuda_merge.argtypes = [c.c_void_p] * 4 + [c.c_size_t, c.c_uint32, c.c_int, c.c_void_p]

    def read_plan(self, data):
        """A plan from the bytes of a .tqkv file; give it back with destroy_plan."""
        plan = c.c_void_p()
        check(self.lib.tqkv_plan_read(data, c.c_size_t(len(data)), None, c.byref(plan)))
        return plan

    def destroy_plan(self, plan):
        self.lib.tqkv_plan_destroy(plan)

    def page_tables(self, args, stream):
        check(self.lib.tqkv_cuda_page_tables(c.byref(args), c.c_void_p(stream)))


class Layer:
    """One layer of a plan. The plan may be destroyed afterwards.

    image: bytes for the caller to copy to a 256-aligned device address, which then goes to device_image.
    """

    def __init__(self, library, plan, index=0):
        self.lib, self.handle = library.lib, c.c_void_p()
        check(self.lib.tqkv_cuda_layer_create(plan, c.c_uint32(index), None, None, c.byref(self.handle)))
        n_bytes = c.c_size_t()
        address = self.lib.tqkv_cuda_layer_image(self.handle, c.byref(n_bytes))
        self.image = c.string_at(address, n_bytes.value)
        self.device_image = None

    def close(self):
        self.lib.tqkv_cuda_layer_destroy(self.handle)
        self.handle = c.c_void_p()

    def inverse(self):
        """Of a latent layer: f32 bytes of [512][512], as turboquant/cuda.h has it; None of another."""
        address = self.lib.tqkv_cuda_layer_inverse(self.handle)
        return c.string_at(address, 4 * LATENT_CHANNELS**2) if address else None

    def page_bytes(self, tier, page_tokens):
        return self.lib.tqkv_cuda_page_bytes(self.handle, c.c_uint32(tier), c.c_uint32(page_tokens))

    def decode_bytes(self, n_seqs, q_len, max_tokens):
        return self.lib.tqkv_cuda_decode_bytes(self.handle, c.c_uint32(n_seqs), c.c_uint32(q_len), c.c_uint32(max_tokens))

    def prefill_bytes(self, n_seqs, n_tokens, max_q, max_context):
        return self.lib.tqkv_cuda_prefill_bytes(self.handle, c.c_uint32(n_seqs), c.c_uint32(n_tokens), c.c_uint32(max_q),
                                                c.c_uint32(max_context))

    def merge(self, out_a, lse_a, out_b, lse_b, n_rows, dim, kind, stream):
        check(self.lib.tqkv_cuda_merge(out_a, lse_a, out_b, lse_b, n_rows, dim, kind, stream))

    def _launch(self, function, args, stream):
        check(function(self.handle, c.c_void_p(self.device_image), c.byref(args), c.c_void_p(stream)))

    def store(self, args, stream):
        self._launch(self.lib.tqkv_cuda_store, args, stream)

    def decode(self, args, stream):
        self._launch(self.lib.tqkv_cuda_decode, args, stream)

    def prefill(self, args, stream):
        self._launch(self.lib.tqkv_cuda_prefill, args, stream)

    def unpack(self, args, stream):
        self._launch(self.lib.tqkv_cuda_unpack, args, stream)

    def gather(self, args, stream):
        self._launch(self.lib.tqkv_cuda_gather, args, stream)
