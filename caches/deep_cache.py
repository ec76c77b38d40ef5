"""DeepCache: a U-Net's deep layers every few steps, its outermost ones always."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton
from accel.caches.schedules import Cycle, Table
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Branch, Policy


@dataclass(frozen=True)
class DeepCache:
    """Reuse the feature that enters the up path at a skip connection; compute what lies outside.

    Ma et al., "DeepCache", CVPR 2024. Every `interval`-th step is computed in full. On the others
    the layers that skip connection `branch` goes round are left out, and the feature they gave is
    taken from the last full step. Connection 0 is the outermost: only the last layer of the up
    path stays. `reuse` is free: `Newton(1)` extrapolates the feature instead of repeating it.

    `centre`: the authors' non-uniform refresh, as many full steps crowded around this share of the
    run by a power law of exponent `power`, which is lowered by 0.02 until all are different steps.
    Static: rows of a batch are independent.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 3},
        {"interval": 3, "reuse": Newton(1)},
    )

    interval: int = 3
    branch: int = 0
    centre: float | None = None
    power: float = 1.2
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_count(self.branch, 0), self, "branch", "a whole number ≥ 0")
        centre = self.centre is None or (is_number(self.centre) and 0 <= self.centre <= 1)
        check(centre, self, "centre", "None or a share between 0 and 1")
        check(is_number(self.power) and self.power >= 1, self, "power", "a number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the layers inside the skip connection; raises when there is none."""
        spans = denoiser.skip_spans("DeepCache")
        check(self.branch < len(spans), self, "branch", f"below {len(spans)} for this U-Net")
        start, stop = spans[self.branch]

        def policy(_: Branch) -> Policy:
            if self.centre is None:
                return Cycle(self.interval)
            total = denoiser.clock.schedule
            steps = crowded(total, -(-total // self.interval), self.centre, self.power)
            return Table(tuple(int(step in steps) for step in range(total)))

        return denoiser.cache(policy, self.reuse, start, stop, "DeepCache", keeps_output=True)


def crowded(total: int, count: int, centre: float, power: float) -> list[int]:
    """`count` different steps of `total`, 0 among them, crowded around `centre` · `total`."""
    middle = centre * (total - 1)
    while power > 1:
        low, high = -(middle ** (1 / power)), (total - 1 - middle) ** (1 / power)
        places = [low + (high - low) * n / max(count - 1, 1) for n in range(count)]
        steps = {round(middle + math.copysign(abs(place) ** power, place)) for place in places}
        if len(steps) == count:
            return sorted(steps)
        power -= 0.02
    return sorted({round((total - 1) * n / max(count - 1, 1)) for n in range(count)})
