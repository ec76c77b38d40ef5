"""UniCP: attention is cached in windows that follow its error, and pruned outside of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.kernels.principal_attention import PrincipalAttention, Pruning
from accel.method import Handle, check, is_count, is_number
from accel.site import Approximator, Branch, Computed, Policy, Signals, StepContext, Streams
from accel.sublayer import Sublayer, cache_sublayers

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("self", "temporal", "cross")


@dataclass(frozen=True)
class UniCP:
    """Reuse an attention's output inside a window that grows while its error stays small.

    Sun et al., "UniCP: A Unified Caching and Pruning Framework", 2025. **Reconstructed**: the
    paper's equations were not available.

    Windows (EDCW): when an attention is computed, e = ‖new − old‖₁ / ‖old‖₁ for each step between
    the two; e < `threshold` / 2 widens the window by one, up to `widest`; e > `threshold` sets it
    to 1; e > `spike` closes it. The window is the number of following steps that reuse the output.
    The first `warmup` steps and the last one are computed in full.

    Pruning (PCAS), when `variance` is given: outside the windows self-attention multiplies queries
    and keys in the few directions that hold that share of their variance, as
    `PrincipalAttention(variance)` does alone; after a spike the next computation is in full.

    Blending (DWS): what a pruned attention returns is ω · pruned + (1 − ω) · old with
    ω = min(e / `threshold`, 1), so that the pruned output takes over as the cache's error rises.

    Adaptive: one host transfer a computed attention; rows of a batch decide together. Holds two
    tensors an attention and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.05},
        {"threshold": 0.1},
        {"threshold": 0.2},
        {"threshold": 0.1, "variance": 0.95},
    )

    threshold: float = 0.1
    spike: float = 0.4
    widest: int = 5
    warmup: int = 2
    variance: float | None = None
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_number(self.spike) and self.spike >= 0, self, "spike", "a number ≥ 0")
        check(is_count(self.widest, 0), self, "widest", "a whole number ≥ 0")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")
        share = self.variance
        accepted = share is None or (is_number(share) and 0 < share <= 1)
        check(accepted, self, "variance", "None or a number in (0, 1]")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention layer."""
        if self.variance is None:
            return self._cache(denoiser, None)
        pruning = Pruning(PrincipalAttention(self.variance), denoiser)
        pruned = pruning.attach("UniCP(variance=…)")
        try:
            return Handle.together([pruned, self._cache(denoiser, pruning)])
        except BaseException:
            pruned.remove()
            raise

    def _cache(self, denoiser: Denoiser, pruning: Pruning | None) -> Handle:
        def policies(_: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            return [_Window(self, layer.modules[0], pruning) for layer in layers]

        return cache_sublayers(denoiser, policies, self.reuse, "UniCP", KINDS)


class _Window:
    """The window of one attention in one branch."""

    def __init__(self, settings: UniCP, attention: Any, pruning: Pruning | None) -> None:
        self.settings, self.attention, self.pruning = settings, attention, pruning
        self.width, self.last, self.spiked = 0, 0, False
        self.output: Streams = ()

    def skip(self, context: StepContext, signals: Signals) -> bool:
        free = context.step >= self.settings.warmup and not context.last
        if self.pruning is not None:
            self.pruning.allow(self.attention, free and not self.spiked)
        return free and context.skipped < self.width

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> Streams | None:
        old, self.output = self.output, site.outputs
        gap, self.last = context.step - self.last, context.step
        if not old or old[0] is None or site.outputs[0] is None or gap < 1:
            return None
        error = signals.relative_change(site.outputs[0], old[0]) / gap
        self._resize(error)
        if self.pruning is not None and self.pruning.pruned(self.attention):
            self.output = self._blend(error, site.outputs, old)
        return self.output

    def _resize(self, error: float) -> None:
        settings = self.settings
        self.spiked = error > settings.spike
        if self.spiked:
            self.width = 0
        elif error > settings.threshold:
            self.width = min(1, settings.widest) if settings.threshold > 0 else 0
        elif error < settings.threshold / 2:
            self.width = min(self.width + 1, settings.widest)

    def _blend(self, error: float, pruned: Streams, old: Streams) -> Streams:
        if error >= self.settings.threshold:
            return pruned
        weight = error / self.settings.threshold
        return tuple(_mixed(new, kept, weight) for new, kept in zip(pruned, old, strict=True))


def _mixed(new: Tensor | None, old: Tensor | None, weight: float) -> Tensor | None:
    return new if new is None or old is None else old.lerp(new, weight)
