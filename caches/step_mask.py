"""Step masks: a fixed list of computed steps, scaled to the run's length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton
from accel.caches.schedules import Table
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_schedule
from accel.site import Approximator

PRESETS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
"""cache-dit's presets for 28 steps: lengths of computed and of reused runs, alternating."""


@dataclass(frozen=True)
class StepMask:
    """Compute exactly the steps of `mask`; the steps-computation mask of cache-dit's DBCache.

    `mask`: "slow", "medium", "fast", "ultra" (28 steps), or ones (compute) and zeros (reuse), one
    for each step, the first of them a one. Step i of a run of N steps takes entry ⌊i·length / N⌋.
    Static: no device value is read, rows of a batch are independent.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"mask": "slow"},
        {"mask": "medium", "reuse": Newton(1)},
        {"mask": "fast"},
    )

    mask: str | tuple[int, ...] = "medium"
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        if isinstance(self.mask, str):
            check(self.mask in PRESETS, self, "mask", f"one of {', '.join(PRESETS)}, or 0s and 1s")
            return
        check(is_schedule(self.mask), self, "mask", "0s and 1s, the first of them a 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the block chain, or to the whole denoiser when there is none."""
        entries = preset(self.mask) if isinstance(self.mask, str) else self.mask
        return denoiser.cache_widest(lambda _: Table(entries), self.reuse, "StepMask")


def preset(name: str) -> tuple[int, ...]:
    """The 28 entries of a preset."""
    computed, reused = PRESETS[name]
    runs: Iterable[tuple[int, int]] = zip_longest(computed, reused, fillvalue=0)
    return tuple(chain.from_iterable((1,) * ones + (0,) * zeros for ones, zeros in runs))
