"""MagCache: the ratio of successive residual norms is the same for every prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from accel.caches.approximators import HoldResidual, Newton
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_count, is_number, is_series
from accel.site import Approximator, Branch, Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MagCache:
    """Skip while the product of known norm ratios says that the old residual still fits.

    Ma et al., "MagCache", NeurIPS 2025. With γᵢ the mean over tokens of ‖Rᵢ‖ / ‖Rᵢ₋₁‖ of the whole
    stack's residual, a skip at step i multiplies acc by γᵢ and adds |1 − acc| to err; the stack is
    skipped while err < `threshold` and at most `max_skips` times in a row. The first `retention`
    share of the steps is always computed. The ratio of a step that ends up computed is used up.

    `ratios`: γ for each step, one list or one for each branch ("cond", "uncond", "batched");
    resampled by nearest index to other step counts. None: the first run is computed in full and
    measured, later runs reuse; the patch's `methods` then carry the measured ratios.
    Static: no device value is read, rows of a batch are independent. Holds one residual a branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.06, "max_skips": 2},
        {"threshold": 0.12},
        {"threshold": 0.12, "reuse": Newton(1)},
        {"threshold": 0.24, "max_skips": 6},
    )

    threshold: float = 0.12
    max_skips: int = 4
    retention: float = 0.2
    ratios: tuple[float, ...] | Mapping[str, tuple[float, ...]] | None = None
    reuse: Approximator = HoldResidual()

    def __post_init__(self) -> None:
        check(is_number(self.threshold) and self.threshold >= 0, self, "threshold", "a number ≥ 0")
        check(is_count(self.max_skips, 0), self, "max_skips", "a whole number ≥ 0")
        check(
            is_number(self.retention) and 0 <= self.retention <= 1,
            self,
            "retention",
            "a share between 0 and 1",
        )
        tables = self.ratios.values() if isinstance(self.ratios, Mapping) else [self.ratios]
        for table in () if self.ratios is None else tables:
            if not is_series(table, lambda ratio: is_number(ratio) and ratio > 0, least=2):
                raise AccelError(
                    "MagCache(ratios=…): each table needs at least two positive numbers"
                )

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return not _tables(self.ratios)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the whole block chain."""
        tables = dict(_tables(self.ratios))
        measured: dict[str, _Measurement] = {}

        def settle() -> None:
            if not tables and any(
                known.run == denoiser.clock.completed for known in measured.values()
            ):
                tables.update(_measured_tables(measured))

        def policy(branch: Branch) -> _RatioChain | _Measurement:
            settle()
            if tables:
                return _RatioChain(self, tables.get(branch.name) or next(iter(tables.values())))
            run = denoiser.clock.run
            if any(known.run != run for known in measured.values()):
                measured.clear()
            measured[branch.name] = _Measurement(run)
            return measured[branch.name]

        def settled() -> MagCache:
            settle()
            return replace(self, ratios=self.ratios or dict(tables) or None)

        def release() -> None:
            for each in measured.values():
                each.norms = None

        if not tables:
            logger.info("MagCache: no ratios known; the first run is computed in full and measured")
        handle = denoiser.cache(policy, self.reuse, method="MagCache")
        forgetting = denoiser.when_forgetting(release)
        return Handle.together([handle, forgetting]).settling(settled)


class _RatioChain:
    """The decision rule of one branch during one run."""

    def __init__(self, settings: MagCache, ratios: tuple[float, ...]) -> None:
        self.settings, self.ratios = settings, ratios
        self.forget()

    def forget(self) -> None:
        self.product, self.error = 1.0, 0.0

    def skip(self, context: StepContext, signals: Signals) -> bool:
        if context.step < int(self.settings.retention * context.total + 0.5):
            return False
        place = context.place * (len(self.ratios) - 1) / max(context.schedule - 1, 1)
        self.product *= self.ratios[round(place)]
        self.error += abs(1 - self.product)
        return self.error < self.settings.threshold and context.skipped < self.settings.max_skips

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        self.forget()


class _Measurement:
    """Never skips; measures the ratios of one branch during run number `run`."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.schedule = 0
        self.ratios: dict[int, float] = {}
        self.norms: Tensor | None = None

    def skip(self, context: StepContext, signals: Signals) -> bool:
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        change = site.kept[0]
        assert change is not None  # the engine remembers no span without its hidden stream
        norms = change.float().norm(dim=-1)
        if self.norms is not None:
            self.ratios[context.place] = float((norms / (self.norms + 1e-8)).mean())
        self.norms, self.schedule = norms, context.schedule

    def table(self) -> tuple[float, ...]:
        """One ratio for each step of the schedule; the nearest one where none was measured."""
        known = list(self.ratios)
        nearest = (min(known, key=lambda k: abs(k - place)) for place in range(self.schedule))
        return tuple(self.ratios[place] for place in nearest)


def _measured_tables(measured: Mapping[str, _Measurement]) -> dict[str, tuple[float, ...]]:
    """The tables of all branches that made two steps or more; one step has no ratio."""
    return {name: each.table() for name, each in measured.items() if each.ratios}


def _tables(
    ratios: tuple[float, ...] | Mapping[str, tuple[float, ...]] | None,
) -> Mapping[str, tuple[float, ...]]:
    if ratios is None:
        return {}
    if isinstance(ratios, Mapping):
        return {name: tuple(table) for name, table in ratios.items()}
    return {"": tuple(ratios)}
