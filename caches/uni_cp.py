"""UniCP: every attention has its own cache window, which its measured error widens and closes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Computed, Signals, StepContext
from accel.sublayer import cache_sublayers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UniCP:
    """Reuse an attention's output inside a window that grows while its error stays small.

    Sun et al., "UniCP: A Unified Caching and Pruning Framework", 2025: its error-driven cache
    windows. **Reconstructed**: the paper's equations were not available. When an attention is
    computed, e = ‖new − old‖₁ / ‖old‖₁ for each step between the two; e < `threshold` / 2 widens
    the window by one, up to `widest`; e > `threshold` sets it to 1; e > `spike` closes it. The
    window is the number of following steps that reuse the output. The first `warmup` steps and the
    last one are computed.

    The pruning of attention that cannot be cached is a method of its own, `PrincipalAttention`:
    `accel.patch(pipe, UniCP(), PrincipalAttention())`. Where the paper blends the two outputs, an
    attention is either reused or pruned here.

    Adaptive: one host transfer a computed attention; rows of a batch decide together. Holds two
    tensors an attention and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.05},
        {"threshold": 0.1},
        {"threshold": 0.2},
    )

    threshold: float = 0.1
    spike: float = 0.4
    widest: int = 5
    warmup: int = 2
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_number(self.spike) and self.spike >= 0, self, "spike", "a number ≥ 0")
        check(is_count(self.widest, 0), self, "widest", "a whole number ≥ 0")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention layer."""
        return cache_sublayers(
            denoiser,
            lambda _, layers: [_Window(self) for _ in layers],
            self.reuse,
            "UniCP",
            ("self", "temporal", "cross"),
        )


class _Window:
    def __init__(self, settings: UniCP) -> None:
        self.settings, self.width, self.last = settings, 0, 0
        self.output: Tensor | None = None

    def skip(self, context: StepContext, signals: Signals) -> bool:
        if context.step < self.settings.warmup or context.last:
            return False
        return context.skipped < self.width

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        old, self.output = self.output, site.outputs[0]
        gap, self.last = context.step - self.last, context.step
        if old is None or self.output is None or gap < 1:
            return
        error = signals.relative_change(self.output, old) / gap
        if error > self.settings.spike:
            self.width = 0
        elif error > self.settings.threshold:
            self.width = min(1, self.settings.widest) if self.settings.threshold > 0 else 0
        elif error < self.settings.threshold / 2:
            self.width = min(self.width + 1, self.settings.widest)
