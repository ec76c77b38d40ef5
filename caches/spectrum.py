"""Spectrum: compute in growing windows, forecast by Chebyshev regression over the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import Chebyshev
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Computed, Signals, StepContext


@dataclass(frozen=True)
class Spectrum:
    """Compute every w-th step after `warmup` steps, where w starts at `window` and grows.

    "Spectrum", CVPR 2026. At each computed step w grows by `growth`; its whole part counts. With
    50 steps, growth 0.75 computes 14 and growth 3 computes 10. The forecast (see `Chebyshev`)
    uses every computed step of the run, so that memory grows with their number; give
    `reuse=Chebyshev(keep=6)` where that is too much. Static: rows of a batch are independent.
    Differs from the paper in what is forecast: the stack's residual, not its output.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"growth": 0.25},
        {"growth": 0.75},
        {"growth": 2},
    )

    growth: float = 0.75
    window: float = 2
    warmup: int = 5
    reuse: Approximator = Chebyshev()

    def __post_init__(self) -> None:
        check(is_number(self.growth) and self.growth >= 0, self, "growth", "a number ≥ 0")
        check(is_number(self.window) and self.window >= 1, self, "window", "a number ≥ 1")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the block chain, or to the whole denoiser when there is none."""
        return denoiser.cache_widest(lambda _: _Windows(self), self.reuse, "Spectrum")


class _Windows:
    def __init__(self, settings: Spectrum) -> None:
        self.settings, self.window = settings, settings.window

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return (
            context.step >= self.settings.warmup and (context.skipped + 1) % int(self.window) != 0
        )

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        if context.step >= self.settings.warmup:
            self.window += self.settings.growth
