"""accel makes diffusers pipelines several times faster: `accel.patch(pipe)`, `accel.unpatch(pipe)`.

Importing this package loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.caches.approximators import HoldResidual, Newton, Taylor
    from accel.caches.easy_cache import EasyCache
    from accel.caches.first_block_cache import FirstBlockCache
    from accel.caches.mag_cache import MagCache
    from accel.caches.plain_cycle import PlainCycle
    from accel.caches.tea_cache import TeaCache
    from accel.calibrate_profile import profile
    from accel.calibrate_search import calibrate
    from accel.method import AccelError
    from accel.patching import patch, patched, stats, unpatch
    from accel.pipeline_patch import Patch
    from accel.recipe import Recipe
    from accel.report import Report

__version__ = "0.1.0"

# A wheel keeps caches/, samplers/, kernels/, pipelines/ and zoo/ inside this folder; a checkout
# keeps them beside it.
_here = Path(__file__).parent
if not (_here / "zoo").is_dir():  # the others may be links here, for type checkers
    __path__.append(str(_here.parent))

_ASSEMBLY = {
    "calibrate": "accel.calibrate_search",
    "profile": "accel.calibrate_profile",
    "patch": "accel.patching",
    "unpatch": "accel.patching",
    "patched": "accel.patching",
    "stats": "accel.patching",
    "Patch": "accel.pipeline_patch",
    "Recipe": "accel.recipe",
    "Report": "accel.report",
    "AccelError": "accel.method",
}

__all__ = [
    "AGD",
    "BAC",
    "FORA",
    "NABLA",
    "RALU",
    "RCFG",
    "VGDFR",
    "AccelError",
    "AdaCache",
    "AdaptiveGuidance",
    "Aligned",
    "Attention",
    "BlockCaching",
    "BottleneckSampling",
    "CachedMultiLoRA",
    "CfgCache",
    "CfgZeroStar",
    "Chebyshev",
    "ClusCa",
    "DPCache",
    "DeepCache",
    "DeltaDiT",
    "DiCache",
    "ERTACache",
    "EasyCache",
    "FasterCache",
    "FirstBlockCache",
    "FitCache",
    "FoCa",
    "Foresight",
    "GrowingLine",
    "GuidanceInterval",
    "HiCache",
    "HoldResidual",
    "LSSGen",
    "Linear",
    "LinearAG",
    "MagCache",
    "Newton",
    "Patch",
    "PlainCycle",
    "PrincipalAttention",
    "Progressive",
    "PyramidAttentionBroadcast",
    "RadialAttention",
    "Recipe",
    "Report",
    "SeaCache",
    "SmoothCache",
    "SpargeAttention",
    "SparseVideoGen",
    "SpeCa",
    "Spectrum",
    "SpeedUpNet",
    "StepMask",
    "TGate",
    "Taylor",
    "TaylorSeer",
    "TeaCache",
    "TextCache",
    "ToCa",
    "TokenMerging",
    "UniCP",
    "calibrate",
    "patch",
    "patched",
    "profile",
    "stats",
    "unpatch",
]


def _methods() -> dict[str, str]:
    from accel.registry import APPROXIMATORS, METHODS

    places = [place.split(":") for place in (*METHODS.values(), *APPROXIMATORS.values())]
    return {name: module for module, name in places}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    module = _ASSEMBLY.get(name) or _methods().get(name)
    if module is None:
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ASSEMBLY, *_methods()})
