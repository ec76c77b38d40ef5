"""SmoothCache: one schedule for each kind of sublayer, from how fast its outputs change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual
from accel.caches.schedules import Table
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_number, is_series
from accel.site import Approximator, Branch, Computed, Policy, Signals, StepContext
from accel.sublayer import KINDS, Sublayer, cache_sublayers, sublayers

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LAGS = 3


@dataclass(frozen=True)
class SmoothCache:
    """Reuse outputs for as many steps (up to three) as changed them by ≤ `threshold` when measured.

    Liu et al., "SmoothCache", 2024. E(i, l) = ‖F(i) − F(i+l)‖₁ / ‖F(i+l)‖₁ is averaged over all
    layers of a kind. From a computed step i the largest lag l with E(i, l) ≤ `threshold` is reused;
    the last step is computed. `errors`: for each kind, E as `LAGS` rows of one entry a step. None:
    the first run is computed and measured, with three host transfers a layer and step, and holds
    three outputs a layer. Static: rows of a batch are independent. Holds one tensor a sublayer and
    branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.1},
        {"threshold": 0.2},
        {"threshold": 0.35},
    )

    threshold: float = 0.18
    errors: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        wrong = f"SmoothCache(errors=…): {LAGS} rows of one length for kinds among {KINDS}"
        if not isinstance(self.errors, Mapping | None):
            raise AccelError(wrong)
        for kind, rows in (self.errors or {}).items():
            table = is_series(rows, lambda row: is_series(row, is_number), LAGS)
            if kind not in KINDS or not table or len(rows) > LAGS or len({*map(len, rows)}) != 1:
                raise AccelError(wrong)

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return not self.errors

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer."""
        found, measured = dict(self.errors or {}), _Measurement()

        def settle() -> None:
            if not found and measured.run == denoiser.clock.completed:
                found.update(measured.errors())

        def policies(branch: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            settle()
            if not found:
                measured.begin(denoiser.clock.run)
                return [_Watch(measured, layer.kind) for layer in layers]
            return [Table(schedule(found[layer.kind], self.threshold)) for layer in layers]

        def settled() -> SmoothCache:
            settle()
            return replace(self, errors=dict(found) or None)

        owner = type(denoiser.module).__name__
        lacking = {layer.kind for layer in sublayers(denoiser.chain, owner)} - found.keys()
        if found and lacking:
            raise AccelError(
                f"SmoothCache(errors=…): nothing for the {' and '.join(sorted(lacking))} layers of "
                f"{owner}"
            )
        if not found:
            logger.info("SmoothCache: no errors known; the first run is computed and measured")
        handle = cache_sublayers(denoiser, policies, self.reuse, "SmoothCache")
        return handle.settling(settled)


def schedule(errors: Sequence[Sequence[float]], threshold: float) -> tuple[int, ...]:
    """Ones where to compute: greedily the longest reuse whose error stays within `threshold`."""
    count = len(errors[0])
    entries, step = [0] * count, 0
    while step < count:
        entries[step] = 1
        fit = (
            lag
            for lag in range(LAGS, 0, -1)
            if step + lag < count - 1 and errors[lag - 1][step] <= threshold and threshold > 0
        )
        step += next(fit, 0) + 1
    entries[-1] = 1
    return tuple(entries)


@dataclass
class _Measurement:
    """E of every kind, lag and step of one run, over all layers and branches."""

    run: int = -1
    steps: int = 0
    found: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def begin(self, run: int) -> None:
        if run != self.run:
            self.run, self.found = run, {}

    def errors(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """For each kind `LAGS` rows; what was not measured counts as infinitely far."""
        kinds = {kind for kind, _, _ in self.found}
        return {
            kind: tuple(
                tuple(fmean(self.found.get((kind, lag, step), [1e9])) for step in range(self.steps))
                for lag in range(1, LAGS + 1)
            )
            for kind in sorted(kinds)
        }


class _Watch:
    def __init__(self, measurement: _Measurement, kind: str) -> None:
        self.measurement, self.kind = measurement, kind
        self.past: list[Tensor] = []

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        new = site.outputs[0]
        assert new is not None  # a layer returns a tensor
        self.measurement.steps = context.schedule
        for lag, old in enumerate(reversed(self.past), 1):
            place = (self.kind, lag, context.place - lag)
            change = signals.mean_change(old, new, new)
            self.measurement.found.setdefault(place, []).append(change)
        self.past = [*self.past, new][-LAGS:]
