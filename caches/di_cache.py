"""DiCache: a shallow probe decides, and aligns what is reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import Aligned
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DiCache:
    """Skip while the summed change of the first blocks' output stays below `threshold`.

    "DiCache", 2025. With p the output of the first `probe_blocks` blocks, which are computed at
    every step, and p₋ that of the step before, computed or not, a step's error is
    e = mean|p − p₋| / mean|p₋|, or |e − the same of the blocks' input| with `minus`. The rest is
    skipped while the sum of e since the last computed step stays below `threshold`. The first
    `warmup` share of the steps is computed. What is reused is aligned to the probe, see `Aligned`.

    Adaptive: up to three host transfers a step and branch; rows of a batch decide together.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.05},
        {"threshold": 0.1},
        {"threshold": 0.2},
    )

    threshold: float = 0.1
    probe_blocks: int = 1
    warmup: float = 0.2
    minus: bool = False
    reuse: Approximator = Aligned()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_count(self.probe_blocks, 1), self, "probe_blocks", "a whole number ≥ 1")
        warmup = is_number(self.warmup) and 0 <= self.warmup <= 1
        check(warmup, self, "warmup", "a share between 0 and 1")
        check(isinstance(self.minus, bool), self, "minus", "True or False")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the blocks after the probe."""

        def policy(_: Branch) -> _Probe:
            return _Probe(self)

        return denoiser.cache(policy, self.reuse, start=self.probe_blocks, method="DiCache")


class _Probe:
    def __init__(self, settings: DiCache) -> None:
        self.settings = settings
        self.probe: Tensor | None = None
        self.entry: Tensor | None = None
        self.sum = 0.0

    def skip(self, context: StepContext, signals: Signals) -> bool:
        probe, entry = self.probe, self.entry
        self.probe, self.entry = signals.hidden, signals.entry
        if probe is None or entry is None or self.settings.threshold == 0:
            return False
        if context.step < round(self.settings.warmup * context.total):
            return False
        error = signals.relative_change(self.probe, probe)
        if self.settings.minus:
            error = abs(error - signals.relative_change(self.entry, entry))
        self.sum += error
        return self.sum < self.settings.threshold

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        self.sum = 0.0
