"""FitCache: skipped calls are fitted combinations of computed ones, at the steps that fit best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from accel.caches.approximators import Newton
from accel.caches.histories import combine
from accel.caches.products import Compute, Products
from accel.caches.schedules import Table
from accel.denoiser import Denoiser
from accel.method import AccelError, Handle, check, is_number
from accel.model_calls import latent_like
from accel.optimal_steps import (
    Costs,
    cheapest_path,
    drift_costs,
    fitted_weights,
    solver_strides,
)
from accel.site import Branch, Computed, Signals, StepContext, Streams

logger = logging.getLogger(__name__)

Weights = tuple[tuple[tuple[float, float, float], ...], ...]


@dataclass(frozen=True)
class FitCache:
    """Compute a `share` of the denoiser's calls; the others are sums of the last two, fitted.

    Of this library, not of a paper. At a skipped step the residual (prediction minus latent) is
    a·Rᵢ + b·Rⱼ + c·x of the last two computed ones and the latent x at hand, with the a, b and c of
    that step (and guidance branch) that are nearest in least squares to what was really predicted
    there. That takes no formula for how predictions move, as the line, Taylor's or Hermite's do.
    Which steps to compute is found by dynamic programming over pairs, as in "DPCache", CVPR 2026,
    with another cost: ‖Σ strideₛ·errorₛ‖² over each gap, the drift of the latent that the solver
    makes of the errors. Both need only the inner products of the residuals and latents of one full
    run; `accel.calibrate` takes those of several. `early`: an error at the run's beginning weighs
    e^early times what one of its end does. None: 1 for flow matching, where the zoo's models are
    best at 2 and at 0 to 1, else 0: other strides are long at the beginning anyway.

    `schedule`: ones (compute) and zeros, and `weights`: for each branch in calling order one
    (a, b, c) for each 0; a branch too many takes the last. They belong to one number of steps; in
    runs of another nothing is skipped. None: the first run of each length is computed and
    measured, and holds two latents for each step. Where other steps than the schedule's were
    computed, the forecast is the line through the last two.

    Whole calls are skipped, on any denoiser. Static: rows of a batch are independent, no device
    value is read after the first run. Holds two latents a branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"share": 0.3},
        {"share": 0.2},
        {"share": 0.16},
        {"share": 0.16, "early": 0.0},
        {"share": 0.16, "early": 2.0},
        {"share": 0.12},
        {"share": 0.1},
    )

    share: float = 0.2
    early: float | None = None
    schedule: tuple[int, ...] | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        check(is_number(self.share) and 0 < self.share <= 1, self, "share", "in (0, 1]")
        check(self.early is None or is_number(self.early), self, "early", "None or a number")
        if (self.schedule is None) != (self.weights is None):
            raise AccelError("FitCache: schedule and weights are measured together; give both")
        if self.schedule is None or self.weights is None:
            return
        if (
            not self.schedule
            or self.schedule[0] != 1
            or any(each not in (0, 1) for each in self.schedule)
        ):
            raise AccelError("FitCache(schedule=…): 0s and 1s, the first of them a 1")
        zeros = self.schedule.count(0)
        if not self.weights or any(_wrong(branch, zeros) for branch in self.weights):
            raise AccelError(
                f"FitCache(weights=…): for each branch three numbers for each of the {zeros} zeros "
                "of the schedule"
            )

    @classmethod
    def fitted(
        cls, share: float, early: float, products: Sequence[Costs], strides: Sequence[float]
    ) -> FitCache:
        """The schedule and weights for a share of the steps.

        `products`: of each branch, see `fitted_weights`. `strides`: see `solver_strides`.
        """
        count = len(strides)
        computes = min(max(round(share * count), 2), count)
        weighed = np.asarray(strides) * np.exp(-early * np.arange(count) / count)
        costs = [drift_costs(each, weighed) for each in products]
        steps = cheapest_path(np.sum(costs, axis=0), computes)
        schedule = tuple(int(step in steps) for step in range(count))
        weights = tuple(_weights(each, steps) for each in products)
        return cls(computes / count, early, schedule, weights)

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return self.schedule is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the whole denoiser."""
        measured: dict[int, Products] = {}
        found = {len(self.schedule): self} if self.schedule is not None else {}

        def settle() -> None:
            first = measured.get(0)
            if first and first.run == denoiser.clock.completed and first.rows:
                fitted = self._settled(list(measured.values()), denoiser.clock.prediction)
                found[first.total] = fitted
                measured.clear()

        def policy(branch: Branch) -> _Fitted | Products | Compute:
            settle()
            if denoiser.clock.schedule in found:
                return _Fitted(found[denoiser.clock.schedule], branch)
            if self.schedule is not None:
                return Compute()
            return measured.setdefault(branch.ordinal, Products(inputs=True)).begin(
                denoiser.clock.run
            )

        def settled() -> FitCache:
            settle()
            return list(found.values())[-1] if found else self

        if not found:
            logger.info("FitCache: no weights known; the first run is computed and measured")
        return denoiser.cache_model(policy, Newton(1)).settling(settled)

    def _settled(self, branches: Sequence[Products], prediction: str) -> FitCache:
        """From one full run; branches that were left out at some steps count with the first."""
        first = branches[0]
        products = [each.matrix() for each in branches if each.places == first.places]
        log_snr = [first.log_snr[place] for place in first.places]
        strides = solver_strides(log_snr, prediction)
        early = self.early if self.early is not None else float(prediction == "flow")
        fitted = self.fitted(self.share, early, products, strides)
        steps = [step for step, entry in enumerate(fitted.schedule or ()) if entry]
        return replace(
            fitted, share=self.share, early=self.early, schedule=tuple(first.schedule(steps))
        )


def _weights(products: Costs, steps: Sequence[int]) -> tuple[tuple[float, float, float], ...]:
    """Of every step that is not computed, in order."""
    found: list[tuple[float, float, float]] = []
    for index, newer in enumerate(steps):
        end = steps[index + 1] if index + 1 < len(steps) else len(products) // 2
        gap = range(newer + 1, end)
        if gap:
            rows = fitted_weights(products, steps[max(index - 1, 0)], newer, gap).tolist()
            found += [(a, b, c) for a, b, c in rows]
    return tuple(found)


def _wrong(branch: Sequence[Sequence[float]], zeros: int) -> bool:
    return len(branch) != zeros or any(
        len(row) != 3 or not all(is_number(each) for each in row) for row in branch
    )


class _Fitted(Table):
    """The schedule; where its own steps were computed before, their fitted sum stands in."""

    def __init__(self, settings: FitCache, branch: Branch) -> None:
        assert settings.schedule is not None and settings.weights is not None
        super().__init__(settings.schedule)
        self.weights = settings.weights[min(branch.ordinal, len(settings.weights) - 1)]
        self.places: list[int] = []
        self.kept: list[Streams] = []

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Keep the last two."""
        self.places = [*self.places, context.place][-2:]
        self.kept = [*self.kept, site.kept][-2:]

    def refine(
        self, context: StepContext, signals: Signals, forecast: Streams, compute: Any
    ) -> Streams:
        """The fitted sum, or the forecast where the weights are of other steps."""
        before = self.entries[: context.place]
        known = [place for place, entry in enumerate(before) if entry][-2:]
        if self.places != known[-len(self.places) :]:
            return forecast
        older, newer, latent = self.weights[before.count(0)]
        if len(self.kept) == 1 and older:
            return forecast
        assert self.kept[-1][0] is not None  # whole calls have one stream
        now = (latent_like(signals.hidden, self.kept[-1][0].shape),)
        return combine([older, newer, latent][-1 - len(self.kept) :], [*self.kept, now])
