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

    What is reused is the block chain's residual; with `whole`, or where no chain is known, that of
    the whole denoiser, prediction minus latent. `whole` also saves embeddings and head, holds one
    latent instead of all tokens, and works on compiled models. Static: no device value is read,
    rows of a batch are independent.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 2, "reuse": Newton(1)},
        {"interval": 3, "reuse": Taylor(1), "warmup": 3},
        {"interval": 4, "reuse": Taylor(1), "warmup": 3},
        {"interval": 4, "reuse": Taylor(1), "warmup": 3, "whole": True},
    )

    interval: int = 3
    warmup: int = 1
    reuse: Approximator = HoldResidual()
    whole: bool = False

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.warmup, 0), self, "warmup", "a whole number ≥ 0")
        check(isinstance(self.whole, bool), self, "whole", "True or False")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the block chain, or to the whole denoiser when there is none."""
        cycle = Cycle(self.interval, self.warmup)
        return denoiser.cache_widest(lambda _: cycle, self.reuse, "PlainCycle", self.whole)
