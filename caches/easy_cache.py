"""EasyCache: skip whole denoiser calls, judged by how far the latent moved."""

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
class EasyCache:
    """Skip the denoiser while the predicted change of its output stays small; needs no internals.

    Zhou et al. 2025. Between consecutive computed steps κ = mean|Δv| / mean|Δx| (v prediction, x
    latent). At later steps acc += κ · mean|xᵢ − xᵢ₋₁| / mean|v|; the call is skipped while
    acc < `threshold` and returns x plus the last computed v − x. The first branch of a step
    decides, the others follow. The first `warmup` steps and the last step are computed.
    Adaptive: host transfers at each step; rows of a batch decide together. Works on any denoiser,
    U-Nets included. Differs from the paper in nothing but that extra latent channels of
    image-to-video models are left out of the residual.
    """

    slot: ClassVar[str] = "model"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.02},
        {"threshold": 0.05},
        {"threshold": 0.1},
    )

    threshold: float = 0.05
    warmup: int = 10
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the whole denoiser."""
        leaders: list[_Accumulate] = []

        def policy(branch: Branch) -> _Accumulate | _Follow:
            if branch.ordinal == 0 or not leaders:
                leaders.append(_Accumulate(self))
                del leaders[:-1]
                return leaders[0]
            return _Follow(leaders)

        site = denoiser.cache_model(policy, self.reuse)
        return Handle.together([site, denoiser.when_forgetting(leaders.clear)])


class _Accumulate:
    def __init__(self, settings: EasyCache) -> None:
        self.settings = settings
        self.latent: Tensor | None = None
        self.computed_latent: Tensor | None = None
        self.prediction: Tensor | None = None
        self.rate: float | None = None
        self.total = 0.0
        self.skipped = False

    def skip(self, context: StepContext, signals: Signals) -> bool:
        previous, self.latent = self.latent, signals.hidden
        self.skipped = False
        if (
            context.step < self.settings.warmup
            or context.last
            or previous is None
            or self.rate is None
            or self.prediction is None
        ):
            return False
        moved = signals.mean_change(self.latent, previous, self.prediction)
        self.total += self.rate * moved
        self.skipped = self.total < self.settings.threshold
        return self.skipped

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        prediction = site.outputs[0]
        assert prediction is not None  # a whole denoiser always has an output
        if self.prediction is not None and self.computed_latent is not None:
            changed = signals.mean_change(prediction, self.prediction)
            moved = signals.mean_change(signals.hidden, self.computed_latent)
            self.rate = changed / (moved + 1e-8)
        self.prediction, self.computed_latent = prediction, signals.hidden
        self.total, self.skipped = 0.0, False


class _Follow:
    """A later guidance branch: skips exactly when the first branch of the step did."""

    def __init__(self, leaders: list[_Accumulate]) -> None:
        self.leaders = leaders  # the last one leads: it is made anew when its branch is dropped

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return self.leaders[-1].skipped

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass
