# SPDX-License-Identifier: Apache-2.0
"""The compressed K and V of one layer, and attention over them (store.h)."""
import ctypes

import numpy as np

from . import abi
from .library import Handle, address, check, load
from .plan import Side
from .workers import parallel


def aligned(n_bytes):
    """[n_bytes] u8 that begins on a multiple of ALIGN."""
    room = np.empty(n_bytes + abi.ALIGN, np.uint8)
    return room[-room.ctypes.data % abi.ALIGN:][:n_bytes]


class Store(Handle):
    """n_streams sequences of n_cells cells each; cell = stream * n_cells + index."""

    def __init__(self, plan, layer, n_cells, n_streams=1):
        config, out = abi.StoreConfig(), ctypes.c_void_p()
        load().tqkv_store_config_init(config)
        config.plan, config.layer = plan._as_parameter_, layer
        config.n_cells, config.n_streams = n_cells, n_streams
        check(load().tqkv_store_create(config, out), f"store of {n_streams} x {n_cells} tokens")
        super().__init__(out, load().tqkv_store_destroy)
        self.plan, self.layer = plan, layer  # the plan outlives the store
        self.n_cells, self.n_streams = n_cells, n_streams
        self.shape = plan.layer(layer)
        self._scratch = aligned(0)

    @property
    def n_bytes(self):
        """Memory that holds tokens now, everything counted."""
        return load().tqkv_store_bytes(self)

    def bytes_at(self, n_tokens):
        return load().tqkv_store_bytes_at(self, n_tokens)

    def stats(self):
        out = abi.StoreStats()
        load().tqkv_store_get_stats(self, out)
        return out

    def clear(self):
        load().tqkv_store_clear(self)

    def copy_stream(self, stream, source, source_stream):
        """source: a store of the same plan, layer and n_cells."""
        check(load().tqkv_store_copy_stream(self, stream, source, source_stream), "copy of a stream")

    def read(self, cells, side):
        """cells: integers. [n][n_kv_heads][dim] f32, decoded; zeros where nothing was written."""
        dim = self.shape.k_dim if side == Side.K else self.shape.v_dim
        out = np.empty((len(cells), self.shape.n_kv_heads, dim), np.float32)
        read, start, step = load().tqkv_store_read, address(out), out.strides[0]
        for i, cell in enumerate(cells):
            check(read(self, cell, side, start + i * step), "read")
        return out

    def export(self, cell, side):
        """The record of one side of a cell."""
        record = np.zeros(load().tqkv_store_record_bytes(self, side), np.uint8)
        n_bytes = ctypes.c_size_t()
        check(load().tqkv_store_export(self, cell, side, address(record), n_bytes), "export")
        return record[:n_bytes.value].tobytes()

    def restore(self, cell, side, record):
        """What export gave. K of a cell before its V."""
        check(load().tqkv_store_import(self, cell, side, record, len(record)), "import")

    def attend(self, batch, q, out, n_cells, *, q_latent=None, stream=0, mask=None, causal=False, scale, softcap=0.0,
               lse=None, workers=None):
        """
        Attention of q over cells [0, n_cells) of a stream and the tokens of an open batch (or None).

        q: [n_q][n_heads][k_dim], out: [n_q][n_heads][v_dim] f32, contiguous in the last dimension.
        q_latent: [n_q][n_heads][v_dim] f32 with the strides of q, in a latent layer.
        mask: [n_q][n_cells] f16, contiguous in n_cells, or None: see causal in store.h.
        lse: [n_q][n_heads] f32 out, or None.
        """
        args = abi.AttendArgs()
        load().tqkv_attend_args_init(args)
        args.stream, args.n_q, args.n_cells = stream, len(q), n_cells
        args.q, args.q_token_stride, args.q_head_stride = address(q), q.strides[0] // 4, q.strides[1] // 4
        args.out, args.out_token_stride, args.out_head_stride = address(out), out.strides[0] // 4, out.strides[1] // 4
        if q_latent is not None:
            if q_latent.strides[:2] != q.strides[:2]:
                raise ValueError("q and q_latent must be parts of one array")
            args.q_latent = address(q_latent)
        args.lse, args.scale, args.softcap, args.causal = address(lse), scale, softcap, causal
        if mask is not None:
            args.mask, args.mask_row_stride = address(mask), mask.strides[0] // 2
        n_scratch = load().tqkv_store_scratch_bytes(self, len(q), workers.n if workers else 1)
        if self._scratch.nbytes < n_scratch:
            self._scratch = aligned(n_scratch)
        args.scratch = address(self._scratch)
        check(load().tqkv_store_attend(self, batch, args, parallel(workers)), "attention")


class Batch(Handle):
    """Tokens that are staged, attended and then committed. One may serve many stores in turn."""

    def __init__(self):
        out = ctypes.c_void_p()
        check(load().tqkv_batch_create(None, out), "batch")
        super().__init__(out, load().tqkv_batch_destroy)
        self._store = None  # lives as long as it has an open batch

    def begin(self, store, cells, positions):
        """cells: [n] i64, distinct. positions: [n] i32 or None. Commits what is open."""
        check(load().tqkv_batch_begin(self, store, address(cells), address(positions), len(cells)), "batch")
        self._store = store

    def put(self, side, rows):
        """rows: [n][n_kv_heads][dim] f32, contiguous in a token."""
        check(load().tqkv_batch_put(self, side, address(rows), rows.strides[0] // 4), "batch")

    def commit(self, workers=None):
        check(load().tqkv_batch_commit(self, parallel(workers)), "commit")
        self._store = None
