"""TaylorSeer: forecast every sublayer's output by its Taylor series in the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import Taylor
from accel.caches.schedules import Cycle
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count
from accel.site import Approximator
from accel.sublayer import cache_sublayers


@dataclass(frozen=True)
class TaylorSeer:
    """Compute `warmup` steps, then every `interval`-th; forecast the outputs of the others.

    Liu et al., "From Reusing to Forecasting", ICCV 2025. The forecast is made for each attention
    and MLP output before its gate; `lite` makes one for the output of the last block, with a small
    part of the memory. `reuse` is the forecast: `HiCache(2)` and `Newton(2)` are drop-in bases, and
    Newton's is unbiased from order 2 on. Static: rows of a batch are independent. Holds order + 1
    tensors a sublayer and branch, or in all.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 3},
        {"interval": 5},
        {"interval": 5, "lite": True},
        {"interval": 7, "lite": True},
        {"interval": 9, "lite": True},
    )

    interval: int = 5
    warmup: int = 3
    lite: bool = False
    reuse: Approximator = Taylor(1)

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")
        check(isinstance(self.lite, bool), self, "lite", "True or False")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer, or for `lite` to the whole stack."""

        def cycle() -> Cycle:
            return Cycle(self.interval, self.warmup)

        if self.lite:
            return denoiser.cache(
                lambda _: cycle(), self.reuse, method="TaylorSeer", keeps_output=True
            )
        return cache_sublayers(
            denoiser, lambda _, layers: [cycle() for _ in layers], self.reuse, "TaylorSeer"
        )
