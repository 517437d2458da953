# SPDX-License-Identifier: Apache-2.0
"""What the public headers declare, for ctypes: structures as they lie in memory, and functions.

Arrays are passed as addresses (c_void_p), so that numpy, torch and raw pages look alike. The
headers say what each function wants; nothing is repeated here.
"""
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64
from ctypes import c_size_t, c_uint8, c_uint32, c_uint64, c_void_p

ALIGN = 64
TIERS_MAX = 4
UNIT_CHANNELS = 16
FINGERPRINT_BYTES = 32

TASK = CFUNCTYPE(None, c_void_p, c_size_t, c_size_t)
RUN = CFUNCTYPE(None, c_void_p, c_size_t, TASK, c_void_p)
WRITE = CFUNCTYPE(None, c_void_p, c_int, c_char_p)


class Logger(Structure):
    _fields_ = [("user", c_void_p), ("write", WRITE)]


class Parallel(Structure):
    _fields_ = [("user", c_void_p), ("n_workers", c_size_t), ("run", RUN)]


class Rope(Structure):
    _fields_ = [("style", c_uint32), ("n_rot", c_uint32), ("inv_freq", POINTER(c_float))]


class PlanInfo(Structure):
    _fields_ = [("model", c_char_p), ("arch", c_char_p), ("profile", c_char_p), ("n_layers", c_uint32),
                ("n_tiers", c_uint32), ("n_sinks", c_uint32), ("frame_tokens", c_uint32), ("context", c_uint32),
                ("bits_total", c_double), ("fingerprint", c_uint8 * FINGERPRINT_BYTES)]


class PlanLayer(Structure):
    _fields_ = [("n_heads", c_uint32), ("n_kv_heads", c_uint32), ("k_dim", c_uint32), ("v_dim", c_uint32),
                ("window", c_uint32), ("rope", Rope), ("tier_tokens", c_uint32 * TIERS_MAX),
                ("token_bytes", c_uint32 * TIERS_MAX), ("is_latent", c_uint32)]


class StoreConfig(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("plan", c_void_p), ("layer", c_uint32), ("n_cells", c_uint32),
                ("n_streams", c_uint32), ("rope", POINTER(Rope)), ("mem", c_void_p)]


class AttendArgs(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("stream", c_uint32), ("n_q", c_uint32), ("n_cells", c_uint32),
                ("q", c_void_p), ("q_token_stride", c_size_t), ("q_head_stride", c_size_t), ("out", c_void_p),
                ("out_token_stride", c_size_t), ("out_head_stride", c_size_t), ("lse", c_void_p),
                ("mask", c_void_p), ("mask_row_stride", c_size_t), ("slopes", c_void_p), ("sinks", c_void_p),
                ("scale", c_float), ("softcap", c_float), ("causal", c_int), ("scratch", c_void_p),
                ("q_latent", c_void_p)]


class StoreStats(Structure):
    _fields_ = [("n_written", c_uint64), ("n_bad_rows", c_uint64), ("n_reencoded", c_uint64),
                ("n_tokens", c_uint64 * TIERS_MAX)]


class PagedConfig(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("plan", c_void_p), ("layer", c_uint32), ("block_tokens", c_uint32),
                ("n_blocks", c_uint32), ("n_sequences", c_uint32 * TIERS_MAX), ("n_drafts", c_uint32),
                ("n_batch_tokens", c_uint32), ("rope", POINTER(Rope)), ("mem", c_void_p)]


class PagedBatch(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("blocks", c_void_p), ("block_stride_bytes", c_size_t),
                ("n_seqs", c_uint32), ("query_start", c_void_p), ("seq_lens", c_void_p), ("block_table", c_void_p),
                ("block_table_stride", c_size_t), ("k", c_void_p), ("v", c_void_p), ("decode_tokens_max", c_uint32)]


class PagedStats(Structure):
    _fields_ = [("n_written", c_uint64), ("n_bad_rows", c_uint64), ("n_young", c_uint64), ("n_missing", c_uint64),
                ("n_shared", c_uint64)]


class CalibConfig(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("model", c_char_p), ("arch", c_char_p), ("n_layers", c_uint32),
                ("frame_tokens", c_uint32), ("gamma", c_float), ("n_sinks", c_uint32), ("mem", c_void_p),
                ("log", POINTER(Logger))]


class Profile(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("name", c_char_p), ("bits_total", c_double), ("context", c_uint32),
                ("n_tiers", c_uint32), ("tier_tokens", c_uint32 * TIERS_MAX), ("tier_bits", c_float * TIERS_MAX)]


STATUS = c_int
OBJECT = c_void_p
OUT = POINTER(c_void_p)
ARRAY = c_void_p
LOG = POINTER(Logger)
PARALLEL = POINTER(Parallel)

# name: (result, arguments)
FUNCTIONS = {
    "tqkv_status_text": (c_char_p, [STATUS]),
    "tqkv_version": (c_char_p, []),
    "tqkv_plan_read": (STATUS, [c_char_p, c_size_t, LOG, OUT]),
    "tqkv_plan_load": (STATUS, [c_char_p, LOG, OUT]),
    "tqkv_plan_save": (STATUS, [OBJECT, c_char_p, LOG]),
    "tqkv_plan_builtin": (STATUS, [c_int, POINTER(PlanLayer), OUT]),
    "tqkv_plan_share": (STATUS, [OBJECT, c_uint32, c_uint32, OUT]),
    "tqkv_plan_destroy": (None, [OBJECT]),
    "tqkv_plan_get_info": (None, [OBJECT, POINTER(PlanInfo)]),
    "tqkv_plan_get_layer": (STATUS, [OBJECT, c_uint32, POINTER(PlanLayer)]),
    "tqkv_plan_get_bits": (STATUS, [OBJECT, c_uint32, c_uint32, c_int, c_uint32, ARRAY]),
    "tqkv_plan_get_weights": (STATUS, [OBJECT, c_uint32, c_uint32, c_int, ARRAY]),
    "tqkv_codec_create": (STATUS, [OBJECT, c_uint32, POINTER(Rope), c_void_p, OUT]),
    "tqkv_codec_destroy": (None, [OBJECT]),
    "tqkv_codec_row_bytes": (c_size_t, [OBJECT, c_uint32, c_int, c_uint32]),
    "tqkv_codec_encode": (STATUS, [OBJECT, c_uint32, c_int, c_uint32, c_int32, ARRAY, c_size_t, c_size_t, ARRAY,
                                   ARRAY, POINTER(c_size_t)]),
    "tqkv_codec_decode": (STATUS, [OBJECT, c_uint32, c_int, c_uint32, c_int32, ARRAY, ARRAY, c_size_t, ARRAY,
                                   c_size_t]),
    "tqkv_store_config_init": (None, [POINTER(StoreConfig)]),
    "tqkv_store_create": (STATUS, [POINTER(StoreConfig), OUT]),
    "tqkv_store_destroy": (None, [OBJECT]),
    "tqkv_store_bytes_at": (c_size_t, [OBJECT, c_size_t]),
    "tqkv_store_bytes": (c_size_t, [OBJECT]),
    "tqkv_store_bytes_max": (c_size_t, [OBJECT]),
    "tqkv_batch_create": (STATUS, [c_void_p, OUT]),
    "tqkv_batch_destroy": (None, [OBJECT]),
    "tqkv_batch_begin": (STATUS, [OBJECT, OBJECT, ARRAY, ARRAY, c_size_t]),
    "tqkv_batch_put": (STATUS, [OBJECT, c_int, ARRAY, c_size_t]),
    "tqkv_batch_rows": (c_void_p, [OBJECT, c_int]),
    "tqkv_batch_commit": (STATUS, [OBJECT, PARALLEL]),
    "tqkv_attend_args_init": (None, [POINTER(AttendArgs)]),
    "tqkv_store_scratch_bytes": (c_size_t, [OBJECT, c_uint32, c_size_t]),
    "tqkv_store_attend": (STATUS, [OBJECT, OBJECT, POINTER(AttendArgs), PARALLEL]),
    "tqkv_store_read": (STATUS, [OBJECT, c_int64, c_int, ARRAY]),
    "tqkv_store_write": (STATUS, [OBJECT, c_int64, c_int, POINTER(c_int32), ARRAY]),
    "tqkv_store_record_bytes": (c_size_t, [OBJECT, c_int]),
    "tqkv_store_export": (STATUS, [OBJECT, c_int64, c_int, ARRAY, POINTER(c_size_t)]),
    "tqkv_store_import": (STATUS, [OBJECT, c_int64, c_int, c_char_p, c_size_t]),
    "tqkv_store_shift": (STATUS, [OBJECT, c_int64, ARRAY, c_size_t]),
    "tqkv_store_copy_stream": (STATUS, [OBJECT, c_uint32, OBJECT, c_uint32]),
    "tqkv_store_clear": (None, [OBJECT]),
    "tqkv_store_get_stats": (None, [OBJECT, POINTER(StoreStats)]),
    "tqkv_paged_config_init": (None, [POINTER(PagedConfig)]),
    "tqkv_paged_create": (STATUS, [POINTER(PagedConfig), OUT]),
    "tqkv_paged_destroy": (None, [OBJECT]),
    "tqkv_paged_block_bytes": (c_size_t, [OBJECT]),
    "tqkv_paged_old_tier": (c_uint32, [OBJECT, c_uint32]),
    "tqkv_paged_bytes": (c_size_t, [POINTER(PagedConfig)]),
    "tqkv_paged_batch_init": (None, [POINTER(PagedBatch)]),
    "tqkv_paged_write": (STATUS, [OBJECT, POINTER(PagedBatch), PARALLEL]),
    "tqkv_paged_attend": (STATUS, [OBJECT, POINTER(PagedBatch), POINTER(AttendArgs), PARALLEL]),
    "tqkv_paged_scratch_bytes": (c_size_t, [OBJECT, c_uint32, c_uint32, c_size_t]),
    "tqkv_paged_lost": (c_uint32, [OBJECT, POINTER(c_int32), c_uint32]),
    "tqkv_paged_keep": (c_int, [OBJECT, POINTER(c_int32), c_uint32]),
    "tqkv_paged_get_stats": (None, [OBJECT, POINTER(PagedStats)]),
    "tqkv_calib_config_init": (None, [POINTER(CalibConfig)]),
    "tqkv_calib_create": (STATUS, [POINTER(CalibConfig), OUT]),
    "tqkv_calib_destroy": (None, [OBJECT]),
    "tqkv_calib_set_layer": (STATUS, [OBJECT, c_uint32, POINTER(PlanLayer), ARRAY, c_size_t, c_uint32, PARALLEL]),
    "tqkv_calib_observe": (STATUS, [OBJECT, c_uint32, c_size_t, ARRAY, ARRAY, ARRAY, ARRAY, c_float, c_float,
                                    PARALLEL]),
    "tqkv_calib_prepare": (STATUS, [OBJECT, PARALLEL]),
    "tqkv_calib_perturb": (STATUS, [OBJECT, c_uint32, c_int, c_float, c_size_t, ARRAY, ARRAY, POINTER(c_double),
                                    PARALLEL]),
    "tqkv_calib_set_sensitivity": (STATUS, [OBJECT, c_uint32, c_int, c_double, c_double]),
    "tqkv_profile_init": (None, [POINTER(Profile), c_char_p, c_double, c_uint32]),
    "tqkv_calib_solve": (STATUS, [OBJECT, POINTER(Profile), OUT]),
}
