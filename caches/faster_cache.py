"""FasterCache's dynamic feature reuse: attention outputs are extrapolated, ever more boldly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import GrowingLine
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Computed, Signals, StepContext
from accel.sublayer import cache_sublayers


@dataclass(frozen=True)
class FasterCache:
    """On a skipped step an attention's output is F + w·(F − G), with F and G the last two computed.

    Lv et al., "FasterCache", ICLR 2025, its feature reuse (the reuse between guidance branches is
    `CfgCache`). From `start` on, a share of the steps, every `interval`-th step is computed; w
    grows linearly from 0 there to `weight` at the end. Only computed outputs are kept, where
    diffusers' version extrapolates extrapolations. Static: rows of a batch are independent. Holds
    two tensors an attention and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"interval": 3},
        {"interval": 3, "start": 0.1, "weight": 0.5},
    )

    interval: int = 2
    start: float = 0.25
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_number(self.start) and 0 <= self.start <= 1, self, "start", "between 0 and 1")
        check(is_number(self.weight) and self.weight >= 0, self, "weight", "a number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention layer."""
        return cache_sublayers(
            denoiser,
            lambda _, layers: [_Window(self) for _ in layers],
            GrowingLine(self.start, self.weight),
            "FasterCache",
            ("self", "temporal", "cross"),
        )


class _Window:
    """Computes one step in `interval` after the start."""

    def __init__(self, settings: FasterCache) -> None:
        self.settings = settings

    def skip(self, context: StepContext, signals: Signals) -> bool:
        begun = context.step >= self.settings.start * context.total
        return begun and context.skipped < self.settings.interval - 1

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass
