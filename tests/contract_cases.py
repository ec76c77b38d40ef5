"""What the contract tests share: settings that act, settings that do not, and the pairs to try."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_pipelines import TINY, Tiny, built

from accel import HoldResidual, registry
from accel.clock import StepClock
from accel.site import Branch, StepContext
from accel.sublayer import KINDS

COND = Branch("cond", 0)

RATIOS = tuple(1.0 - 0.001 * step for step in range(50))
ACTIVE: dict[str, Any] = {
    "magcache": {"threshold": 0.5, "max_skips": 2, "retention": 0.2, "ratios": RATIOS},
    "firstblockcache": {"threshold": 1e6, "max_skips": 1},
    "easycache": {"threshold": 1e6, "warmup": 3},
    "teacache": {"threshold": 1e6, "polynomial": (1.0, 0.1)},
    "plaincycle": {"interval": 2},
    "blockcaching": {"threshold": 0.15, "changes": ((0.0, 0.1, 0.1),)},
    "foresight": {"gamma": 1e6},
    "dicache": {"threshold": 1e6, "warmup": 0.3, "reuse": HoldResidual()},
    "dpcache": {"schedule": (1, 1, 0, 1), "reuse": HoldResidual()},
    "fitcache": {"schedule": (1, 0) * 4, "weights": (((-0.5, 1.5, 0.0),) * 4,)},
    "deltadit": {"interval": 2, "boundary": 0.5},
    "deepcache": {"interval": 2},
    "spectrum": {"window": 2, "growth": 1.0, "warmup": 2, "reuse": HoldResidual()},
    "stepmask": {"mask": (1, 1, 0, 1, 0, 0)},
    "fora": {"interval": 2},
    "taylorseer": {"interval": 2, "warmup": 1},
    "pyramidattentionbroadcast": {"window": (1, 999)},
    "fastercache": {"start": 0.1},
    "smoothcache": {"threshold": 0.1, "errors": {kind: ((0.05,) * 8,) * 3 for kind in KINDS}},
    "adacache": {"codebook": ((1e6, 2),)},
    "bac": {"schedules": ((1, 0, 1, 0),)},
    "unicp": {"threshold": 1e6, "spike": 1e6, "warmup": 2},
    "speca": {"threshold": 1e6, "floor": 1e6, "most": 2, "least": 1, "warmup": 1},
    "seacache": {"threshold": 1.0},
    "toca": {"interval": 2, "warmup": 1, "ratio": 0.3},
    "ertacache": {"scales": (0.0, 0.9, 0.0, 1.1)},
    "clusca": {"interval": 2, "warmup": 1, "clusters": 3},
}
IDENTITY: dict[str, Any] = {
    "magcache": {"threshold": 0, "ratios": (1.0, 1.0)},
    "firstblockcache": {"threshold": 0},
    "easycache": {"threshold": 0},
    "teacache": {"threshold": 0, "polynomial": (1.0, 0.0)},
    "plaincycle": {"interval": 1},
    "blockcaching": {"threshold": 0, "changes": ((0.0, 0.1),)},
    "foresight": {"gamma": 0},
    "dicache": {"threshold": 0},
    "dpcache": {"schedule": (1,)},
    "fitcache": {"schedule": (1,), "weights": ((),)},
    "deltadit": {"interval": 1},
    "deepcache": {"interval": 1},
    "spectrum": {"window": 1, "growth": 0.0},
    "stepmask": {"mask": (1,)},
    "fora": {"interval": 1},
    "taylorseer": {"interval": 1},
    "pyramidattentionbroadcast": {"spatial": 1, "temporal": 1, "cross": 1},
    "fastercache": {"interval": 1},
    "smoothcache": {"threshold": 0, "errors": {kind: ((0.0, 0.0),) * 3 for kind in KINDS}},
    "adacache": {"codebook": ()},
    "bac": {"schedules": ((1,),)},
    "unicp": {"threshold": 0},
    "speca": {"most": 0},
    "seacache": {"threshold": 0},
    "toca": {"interval": 1},
    "ertacache": {"scales": (0.0,)},
    "clusca": {"interval": 1},
}
OTHER_SLOTS = {"textcache", "tokenmerging", "cachedmultilora"}
"""Caches that skip no part of the denoiser; like samplers and kernels they have their own tests."""
METHODS = [
    name
    for name, place in registry.METHODS.items()
    if place.startswith("accel.caches.") and name not in OTHER_SLOTS
]
UNETS = {"sd15", "sdxl"}
UNET_ONLY = {"deepcache"}
TRANSFORMER_ONLY = {"deltadit", "speca"}
SUBLAYER = {
    *("fora", "taylorseer", "pyramidattentionbroadcast", "fastercache", "smoothcache"),
    *("adacache", "bac", "unicp", "toca", "clusca"),
}
"""Methods that skip layers inside blocks."""
GENERAL = [name for name in METHODS if name not in UNET_ONLY]
"""Methods for every transformer."""
FIXED_REUSE = {"ertacache", "fastercache", "fitcache", "toca"}
"""Methods whose forecast is the method itself."""
SEVERAL = {"ertacache", "fitcache", "blockcaching", "foresight", "deltadit", "speca", *SUBLAYER}
ONE_SPAN = [name for name in GENERAL if name not in SEVERAL]
"""Methods that skip one span, the same at every step."""
STATIC = {
    "blockcaching",
    "deepcache",
    "deltadit",
    "dpcache",
    "ertacache",
    "fitcache",
    "magcache",
    "plaincycle",
    "spectrum",
    "stepmask",
    *(SUBLAYER - {"adacache", "unicp", "clusca", "toca"}),
}


def applies(method: str, family: str) -> bool:
    """Whether a method is made for a family; elsewhere it is refused with the reason."""
    return method not in (TRANSFORMER_ONLY if family in UNETS else UNET_ONLY)


def pairs_of(methods: list[str]) -> Any:
    """Every method on every family that it applies to."""
    return pytest.mark.parametrize(
        ("name", "tiny"),
        [
            pytest.param(method, family, id=f"{method}-{family}")
            for method in methods
            for family in TINY
            if applies(method, family)
        ],
        indirect=["tiny"],
    )


pairs = pairs_of(METHODS)


def make(name: str, settings: dict[str, dict[str, Any]]) -> Any:
    return registry.method(name)(**settings[name])


def family_of(tiny: Tiny) -> str:
    return next(family for family in TINY if built(family)[0] is tiny)


def context_at(step: int, total: int, branch: Branch = COND, skipped: int = 0) -> StepContext:
    """A step of a run over timesteps from 1000 down."""
    timesteps = [1000 * (1 - each / total) for each in range(total)]
    clock = StepClock(total=total, timesteps=timesteps, log_snr=[0.0] * total)
    return StepContext(step, total, step, clock, branch, skipped)
