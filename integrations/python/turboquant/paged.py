# SPDX-License-Identifier: Apache-2.0
"""One layer of an engine that owns its cache as blocks, and attention over block tables (paged.h)."""
import ctypes

from . import abi
from .library import Handle, check, load


def paged_config(plan, layer, block_tokens, n_blocks, n_sequences, n_drafts, n_batch_tokens):
    """n_sequences: for each tier but the last, youngest first. The plan outlives the config."""
    config = abi.PagedConfig()
    load().tqkv_paged_config_init(config)
    config.plan, config.layer, config.block_tokens, config.n_blocks = plan._as_parameter_, layer, block_tokens, n_blocks
    config.n_sequences[:len(n_sequences)] = n_sequences
    config.n_drafts, config.n_batch_tokens = n_drafts, n_batch_tokens
    return config


def paged_old_tier(plan, layer):
    """Tier that the engine's blocks have the widths of."""
    return load().tqkv_paged_old_tier(plan, layer)


def paged_bytes(config):
    """Most bytes that an object with this config holds beside the engine's blocks."""
    return load().tqkv_paged_bytes(config)


class Paged(Handle):
    """
    batch, args: structures of abi, which the caller fills with addresses before write and attend.

    plan: the one in config.
    """

    def __init__(self, plan, config):
        out = ctypes.c_void_p()
        check(load().tqkv_paged_create(config, out), "cache of a layer")
        super().__init__(out, load().tqkv_paged_destroy)
        self.plan = plan  # outlives this object
        self.batch, self.args = abi.PagedBatch(), abi.AttendArgs()
        load().tqkv_paged_batch_init(self.batch)
        load().tqkv_attend_args_init(self.args)

    def scratch_bytes(self, n_q, seq_len, n_workers):
        return load().tqkv_paged_scratch_bytes(self, n_q, seq_len, n_workers)

    def lost(self, blocks, seq_len):
        """Copies, of 16 tokens each, that the token behind seq_len tokens in `blocks` (numbers) wants and that are gone."""
        return load().tqkv_paged_lost(self, (ctypes.c_int32 * len(blocks))(*blocks), seq_len)

    def keep(self, blocks, seq_len):
        """Keeps copies of the newest of these tokens longer than by use alone; see tqkv_paged_keep."""
        check(load().tqkv_paged_keep(self, (ctypes.c_int32 * len(blocks))(*blocks), seq_len), "keeping copies")

    def write(self, parallel):
        """The tokens of self.batch. parallel: an abi.Parallel, or None."""
        check(load().tqkv_paged_write(self, self.batch, parallel), "writing tokens")

    def attend(self, parallel):
        """The queries of self.args, over self.batch."""
        check(load().tqkv_paged_attend(self, self.batch, self.args, parallel), "attention")
