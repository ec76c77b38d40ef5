"""First-block cache and its general form, DBCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FirstBlockCache:
    """Compute the first blocks as a probe; reuse the rest while the probe's residual stays close.

    After ParaAttention's first-block cache and cache-dit's DBCache. With r the residual of the
    first `probe_blocks` blocks and r₀ the one at the last computed step, the blocks between probe
    and the last `tail_blocks` are reused while mean|r − r₀| / mean|r₀| < `threshold`.

    `warmup`: first steps, always computed. `max_skips`: most consecutive reuses (None: no limit).
    Adaptive: one host transfer a step and branch; rows of a batch decide together. Second
    probe-sized residual held besides what `reuse` holds.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.05},
        {"threshold": 0.1},
        {"threshold": 0.2},
    )

    threshold: float = 0.08
    probe_blocks: int = 1
    tail_blocks: int = 0
    warmup: int = 0
    max_skips: int | None = None
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_count(self.probe_blocks, 1), self, "probe_blocks", "a whole number ≥ 1")
        check(is_count(self.tail_blocks, 0), self, "tail_blocks", "a whole number ≥ 0")
        check(is_count(self.warmup, 0), self, "warmup", "a whole number ≥ 0")
        check(
            self.max_skips is None or is_count(self.max_skips, 1),
            self,
            "max_skips",
            "None or a whole number ≥ 1",
        )

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the blocks between probe and tail."""

        def policy(_: Branch) -> _Probe:
            return _Probe(self)

        return denoiser.cache(
            policy,
            self.reuse,
            start=self.probe_blocks,
            stop=-self.tail_blocks,
            method="FirstBlockCache",
        )


class _Probe:
    def __init__(self, settings: FirstBlockCache) -> None:
        self.settings = settings
        self.reference: Tensor | None = None
        self.now: Tensor | None = None

    def skip(self, context: StepContext, signals: Signals) -> bool:
        self.now = signals.hidden - signals.entry
        limit = self.settings.max_skips
        if (
            self.reference is None
            or self.settings.threshold == 0
            or context.step < self.settings.warmup
            or (limit is not None and context.skipped >= limit)
        ):
            return False
        return signals.relative_change(self.now, self.reference) < self.settings.threshold

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        self.reference = self.now
