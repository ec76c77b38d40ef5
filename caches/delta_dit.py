"""Δ-DiT: reuse the rear blocks while outlines form, the front blocks afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Computed, Signals, StepContext


@dataclass(frozen=True)
class DeltaDiT:
    """Compute every `interval`-th step in full and skip a range of blocks on the others.

    Chen et al., "Δ-DiT", 2024. Front blocks draw outlines and rear blocks draw details, so the
    increment of the last `share` of the blocks is reused before `boundary` (a share of the steps),
    that of the first `share` after it. The increment is taken at every step that computes the
    range, not at full steps only, so that it is as fresh as can be. Static: no device value is
    read, rows of a batch are independent. Holds what `reuse` holds, twice.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 3},
        {"interval": 2, "reuse": Newton(1)},
    )

    interval: int = 2
    share: float = 0.5
    boundary: float = 0.6
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        share = is_number(self.share) and 0 < self.share <= 0.5
        check(share, self, "share", "a share above 0 and up to 0.5")
        boundary = is_number(self.boundary) and 0 <= self.boundary <= 1
        check(boundary, self, "boundary", "a share between 0 and 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the first and to the last blocks of the chain."""
        denoiser.need_transformer("DeltaDiT")
        total = len(denoiser.chain.blocks)
        count = max(int(total * self.share), 1)
        front = denoiser.cache(
            lambda _: _Stage(self, late=True), self.reuse, 0, min(count, total), "DeltaDiT"
        )
        rear = denoiser.cache(
            lambda _: _Stage(self, late=False), self.reuse, total - count, total, "DeltaDiT"
        )
        return Handle.together([front, rear])


class _Stage:
    """Skips its range on the steps of one half of the run."""

    def __init__(self, settings: DeltaDiT, late: bool) -> None:
        self.settings, self.late = settings, late

    def skip(self, context: StepContext, signals: Signals) -> bool:
        if context.step % self.settings.interval == 0:
            return False
        return (context.place >= self.settings.boundary * context.schedule) == self.late

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass
