"""TeaCache: skip while the modulated input has not moved far enough to change the output."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_number, is_series
from accel.site import Approximator, Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
DEGREE = 4


@dataclass(frozen=True)
class TeaCache:
    """Skip while the accumulated, rescaled change of block 0's modulated input stays small.

    Liu et al., CVPR 2025. At every step d = mean|oᵢ − oᵢ₋₁| / mean|oᵢ₋₁| of the family's observer
    (the modulated input of block 0, or the timestep embedding), acc += p(d); the whole stack is
    skipped while acc < `threshold`. The first and the last step are computed.

    `polynomial`: coefficients of p, highest power first; None: the first run is computed in full
    and p is fitted (degree 4, least squares) to the relative change of the stack's output.
    `domain`: (least, most) d that p was fitted on; d is clamped to it, and p(d) to ≥ 0. The
    published form clamps neither and can run backwards outside its domain.
    Adaptive: one host transfer a step and branch; rows of a batch decide together.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.1},
        {"threshold": 0.2},
        {"threshold": 0.3},
    )

    threshold: float = 0.15
    polynomial: tuple[float, ...] | None = None
    domain: tuple[float, float] | None = None
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        if self.polynomial is not None and not is_series(self.polynomial, is_number):
            raise AccelError("TeaCache(polynomial=…) must be numbers, highest power first")
        if self.domain is not None and not (
            is_series(self.domain, is_number)
            and len(self.domain) == 2
            and self.domain[0] <= self.domain[1]
        ):
            raise AccelError(f"TeaCache(domain={self.domain!r}) must be (least, most)")

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return self.polynomial is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the whole block chain."""
        known: list[TeaCache] = [] if self.polynomial is None else [self]
        measured: dict[str, _Measurement] = {}

        def settle() -> None:
            if not known and any(
                each.run == denoiser.clock.completed and each.pairs for each in measured.values()
            ):
                known.append(_fit(self, measured))

        def policy(branch: Branch) -> _Accumulate | _Measurement:
            settle()
            if known:
                return _Accumulate(known[0])
            run = denoiser.clock.run
            if any(each.run != run for each in measured.values()):
                measured.clear()
            measured[branch.name] = _Measurement(run)
            return measured[branch.name]

        def settled() -> TeaCache:
            settle()
            return known[0] if known else self

        def release() -> None:
            for each in measured.values():
                each.observed = each.output = None

        if not known:
            logger.info("TeaCache: no polynomial known; the first run is computed and measured")
        handle = denoiser.cache(policy, self.reuse, method="TeaCache")
        forgetting = denoiser.when_forgetting(release)
        return Handle.together([handle, forgetting]).settling(settled)


class _Accumulate:
    def __init__(self, settings: TeaCache) -> None:
        self.settings = settings
        self.observed: Tensor | None = None
        self.total = 0.0

    def skip(self, context: StepContext, signals: Signals) -> bool:
        previous, self.observed = self.observed, signals.observed
        if previous is None or context.step == 0 or context.last:
            return False
        change = signals.relative_change(self.observed, previous)
        if self.settings.domain is not None:
            change = min(max(change, self.settings.domain[0]), self.settings.domain[1])
        assert self.settings.polynomial is not None  # policies are made once it is known
        self.total += max(float(np.polyval(self.settings.polynomial, change)), 0.0)
        return self.total < self.settings.threshold

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        self.total = 0.0


class _Measurement:
    """Never skips; records input change against output change of one branch in run `run`."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.observed: Tensor | None = None
        self.output: Tensor | None = None
        self.pairs: list[tuple[float, float]] = []

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        observed, output = signals.observed, site.outputs[0]
        assert output is not None  # the engine remembers no span without its hidden stream
        if self.observed is not None and self.output is not None:
            self.pairs.append(
                (
                    signals.relative_change(observed, self.observed),
                    signals.relative_change(output, self.output),
                )
            )
        self.observed, self.output = observed, output


def _fit(settings: TeaCache, measured: dict[str, _Measurement]) -> TeaCache:
    pairs = [pair for each in measured.values() for pair in each.pairs]
    changes, outputs = np.array(pairs).T
    degree = min(DEGREE, len(np.unique(changes)) - 1)
    coefficients = np.polyfit(changes, outputs, degree)
    return replace(
        settings,
        polynomial=tuple(float(value) for value in coefficients),
        domain=(float(changes.min()), float(changes.max())),
    )
