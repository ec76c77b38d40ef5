"""DeepCache: a U-Net's deep layers every few steps, its outermost ones always."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton
from accel.caches.schedules import Cycle
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_count
from accel.site import Approximator


@dataclass(frozen=True)
class DeepCache:
    """Reuse the feature that enters the up path at a skip connection; compute what lies outside.

    Ma et al., "DeepCache", CVPR 2024. Every `interval`-th step is computed in full. On the others
    the layers that skip connection `branch` goes round are left out, and the feature they gave is
    taken from the last full step. Connection 0 is the outermost: only the last layer of the up
    path stays. `reuse` is free: `Newton(1)` extrapolates the feature instead of repeating it. The
    authors' non-uniform refresh steps are not built. Static: rows of a batch are independent.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 3},
        {"interval": 3, "reuse": Newton(1)},
    )

    interval: int = 3
    branch: int = 0
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.branch, 0), self, "branch", "a whole number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the layers inside the skip connection; raises when there is none."""
        spans = denoiser.family.spans(denoiser.module) if denoiser.family.spans else []
        if not denoiser.chain.blocks or not spans:
            raise AccelError(
                f"DeepCache needs a U-Net with skip connections; {type(denoiser.module).__name__} "
                "has none"
            )
        check(self.branch < len(spans), self, "branch", f"below {len(spans)} for this U-Net")
        start, stop = spans[self.branch]
        return denoiser.cache(
            lambda _: Cycle(self.interval), self.reuse, start, stop, "DeepCache", keeps_output=True
        )
