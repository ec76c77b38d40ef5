"""Plain cycle: compute every k-th step, reuse in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton, Taylor
from accel.caches.schedules import Cycle
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count
from accel.site import Approximator


@dataclass(frozen=True)
class PlainCycle:
    """Compute every `interval`-th step after `warmup` steps; the baseline of every cache.

    On chains of transformer blocks the whole stack's residual is reused; on U-Nets that of the
    whole denoiser. Static: no device value is read, rows of a batch are independent.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 2, "reuse": Newton(1)},
        {"interval": 3, "reuse": Taylor(1), "warmup": 3},
        {"interval": 4, "reuse": Taylor(1), "warmup": 3},
    )

    interval: int = 3
    warmup: int = 1
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.warmup, 0), self, "warmup", "a whole number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the block chain, or to the whole denoiser when there is none."""
        return denoiser.cache_widest(
            lambda _: Cycle(self.interval, self.warmup), self.reuse, "PlainCycle"
        )
