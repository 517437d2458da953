# SPDX-License-Identifier: Apache-2.0
"""libturboquant for Python: plans, codecs, stores and calibration over numpy arrays.

The names of include/turboquant/*.h without their prefix. Failures raise TurboQuantError.
"""
from .calibration import Calibration
from .codec import Codec
from .library import TurboQuantError, version
from .paged import Paged, paged_bytes, paged_config, paged_old_tier
from .plan import Builtin, Plan, PlanLayer, Rope, RopeStyle, Side
from .store import Batch, Store
from .workers import Workers

__all__ = ["Batch", "Builtin", "Calibration", "Codec", "Paged", "Plan", "PlanLayer", "Rope", "RopeStyle", "Side",
           "Store", "TurboQuantError", "Workers", "paged_bytes", "paged_config", "paged_old_tier", "version"]


def __getattr__(name):
    """turboquant.calibrate and turboquant.TurboQuantCache, where turboquant_transformers is installed."""
    if name in ("calibrate", "TurboQuantCache"):
        import turboquant_transformers
        return getattr(turboquant_transformers, name)
    raise AttributeError(f"module 'turboquant' has no attribute '{name}'")
