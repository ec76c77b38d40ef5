"""SpeCa: draft steps by Taylor series, and verify them on the last block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from accel.caches.approximators import Taylor
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_count, is_number
from accel.site import (
    Approximator,
    Branch,
    Computed,
    Policy,
    Shared,
    Signals,
    StepContext,
    Streams,
)


@dataclass(frozen=True)
class SpeCa:
    """Forecast steps until the last block, computed on its forecast input, disagrees with its own.

    Liu et al., "SpeCa: Speculative Feature Caching", 2025. After `warmup` full steps come drafts.
    From draft number `least` on the last block is really computed on its drafted input, and
    e = mean(|forecast − computed| / |computed|) compared with
    τ(i) = max(`threshold` · `decay`^(i/N), `floor`). Where e > τ, or after `most` drafts, the next
    step is full: the verdict comes one step late and nothing is rolled back.

    Differs from the authors' code: outputs of the blocks before the last one and of the last block
    are forecast, as TaylorSeer's lite form does, instead of every sublayer's. e is an element-wise
    relative error that small values dominate, hence thresholds above 1. Adaptive: one host transfer
    a verified step; rows of a batch decide together. Holds twice what `reuse` holds of a stack.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.3, "most": 4},
        {"threshold": 1.0, "most": 6},
        {"threshold": 7.0},
    )

    threshold: float = 1.0
    decay: float = 0.3
    floor: float = 0.1
    least: int = 2
    most: int = 8
    warmup: int = 3
    reuse: Approximator = Taylor(2)

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_number(self.decay) and 0 < self.decay <= 1, self, "decay", "in (0, 1]")
        check(is_number(self.floor) and self.floor >= 0, self, "floor", "a number ≥ 0")
        check(is_count(self.least, 0), self, "least", "a whole number ≥ 0")
        check(is_count(self.most, 0), self, "most", "a whole number ≥ 0")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the blocks before the last, and to the last."""
        denoiser.need_transformer("SpeCa")
        last = len(denoiser.chain.blocks) - 1

        def policies(_: Branch) -> list[Policy]:
            draft = _Drafts(self)
            return [_Body(draft), _Verified(draft)]

        shared = Shared(policies)
        cache = partial(denoiser.cache, reuse=self.reuse, method="SpeCa", keeps_output=True)
        body = cache(partial(shared.policy, 0), start=0, stop=last or None)
        return Handle.together([body, cache(partial(shared.policy, 1), start=last)])


class _Drafts:
    """What both spans of a branch know."""

    def __init__(self, settings: SpeCa) -> None:
        self.settings, self.made, self.full_next = settings, 0, False

    def begin(self, context: StepContext) -> bool:
        """Whether this step is a draft."""
        settings = self.settings
        full = context.step < settings.warmup or self.full_next or self.made >= settings.most
        self.full_next = False
        self.made = 0 if full else self.made + 1
        return not full

    def judge(self, context: StepContext, error: float) -> None:
        """A draft was verified."""
        progress = context.step / context.total
        limit = max(self.settings.threshold * self.settings.decay**progress, self.settings.floor)
        self.full_next = error > limit


class _Body:
    """The blocks before the last: drafts or computes."""

    def __init__(self, drafts: _Drafts) -> None:
        self.drafts = drafts

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return self.drafts.begin(context)

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass


class _Verified:
    """The last block: on drafts its forecast, checked from draft number `least` on."""

    def __init__(self, drafts: _Drafts) -> None:
        self.drafts = drafts

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return self.drafts.made > 0

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        pass

    def refine(
        self,
        context: StepContext,
        signals: Signals,
        forecast: Streams,
        compute: Callable[..., Streams],
    ) -> Streams:
        if self.drafts.made < self.drafts.settings.least or forecast[0] is None:
            return forecast
        true = compute()[0]
        assert true is not None  # a block returns its hidden states
        error = (forecast[0] - true).float().abs() / (true.float().abs() + 1e-8)
        self.drafts.judge(context, signals.mean_change(error, error.new_zeros(())))
        return forecast
