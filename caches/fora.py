"""FORA: attention and MLP outputs repeat between full steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.caches.schedules import Cycle
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count
from accel.site import Approximator
from accel.sublayer import cache_sublayers


@dataclass(frozen=True)
class FORA:
    """Compute every `interval`-th step; on the others reuse each attention and MLP output.

    Selvaraju et al., "FORA: Fast-Forward Caching", 2024. Outputs are kept before the gates, which
    stay live. The degenerate case of `TaylorSeer` (order 0) and `ToCa` (no fresh tokens). Static:
    rows of a batch are independent. Holds one tensor a sublayer and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 3},
        {"interval": 5},
    )

    interval: int = 3
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer."""
        return cache_sublayers(
            denoiser,
            lambda _, layers: [Cycle(self.interval) for _ in layers],
            self.reuse,
            "FORA",
        )
