# SPDX-License-Identifier: Apache-2.0
"""A compressed KV cache for Hugging Face transformers, and calibration of its plans."""
from . import attention  # noqa: F401  registers attn_implementation="turboquant"
from .calibrate import CalibrationResult, calibrate
from .kv_cache import TurboQuantCache

__all__ = ["CalibrationResult", "TurboQuantCache", "calibrate"]
