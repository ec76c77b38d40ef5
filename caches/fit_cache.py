"""FitCache: skipped calls are fitted combinations of computed ones, at the steps that fit best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from accel.caches.approximators import Newton
from accel.caches.products import BranchProducts, Compute, scheduled
from accel.caches.schedules import Table
from accel.denoiser import Denoiser
from accel.guidance import is_doubled
from accel.kernels.weighted_sum import weighted_sum
from accel.method import AccelError, Handle, check, is_number, is_schedule, is_series
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

Weights = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class FitCache:
    """Compute a `share` of the denoiser's calls; the others are sums of the last two, fitted.

    Of this library, not of a paper. At a skipped step the residual (prediction minus latent) is
    a·Rᵢ + b·Rⱼ + c·x of the last two computed ones and the latent x at hand, with the a, b and c of
    that step and guidance branch that are nearest in least squares to what was really predicted
    there; `across`: of the last two of every branch, which tells how far guidance has come. That
    takes no formula for how predictions move, as the line, Taylor's or Hermite's do. Which steps to
    compute is found by dynamic programming over pairs, as in "DPCache", CVPR 2026, with another
    cost: ‖Σ strideₛ·errorₛ‖² over each gap, the drift of the latent that the solver makes of the
    errors. All need only the inner products of the residuals and latents of one full run;
    `accel.calibrate` takes those of several, and tries `across` and `early`: an error at the run's
    beginning weighs e^early times what one of its end does. None: 1 for flow matching, else −1:
    other strides are long at the beginning anyway. On the zoo, `across` is better where a tenth or
    less is computed, and then with a larger `early`.

    `schedule`: ones (compute) and zeros, and `weights`: for each branch in calling order one
    (a, b, c) for each 0, or with a and b of every branch in turn; a branch too many takes the last.
    The halves of a doubled batch are two branches, the conditional one first. They belong to one
    number of steps; in runs of another nothing is skipped. None: the first run of each length is
    computed and measured, and holds three latents for each step. Where other steps than the
    schedule's were computed, the forecast is the line through the last two; with `across` and one
    branch alone (guidance off) nothing is skipped.

    Whole calls are skipped, on any denoiser. Static: rows of a batch are independent; after the
    first run one device value is read a run, whether the batch is doubled. Holds two latents a
    branch.
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
        {"share": 0.1, "across": True},
        {"share": 0.08, "across": True},
        {"share": 0.06, "across": True},
    )

    share: float = 0.2
    early: float | None = None
    across: bool = False
    schedule: tuple[int, ...] | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        check(is_number(self.share) and 0 < self.share <= 1, self, "share", "in (0, 1]")
        check(self.early is None or is_number(self.early), self, "early", "None or a number")
        check(isinstance(self.across, bool), self, "across", "True or False")
        if (self.schedule is None) != (self.weights is None):
            raise AccelError("FitCache: schedule and weights are measured together; give both")
        if self.schedule is None or self.weights is None:
            return
        if not is_schedule(self.schedule):
            raise AccelError("FitCache(schedule=…): 0s and 1s, the first of them a 1")
        branches = len(self.weights) if isinstance(self.weights, list | tuple) else 0
        zeros, terms = self.schedule.count(0), 2 * branches + 1 if self.across else 3
        if not branches or any(_wrong(branch, zeros, terms) for branch in self.weights):
            raise AccelError(
                f"FitCache(weights=…): for each branch {terms} numbers for each of the {zeros} "
                "zeros of the schedule"
            )

    @classmethod
    def fitted(
        cls,
        shares: Sequence[float],
        early: float,
        across: bool,
        products: Costs,
        strides: Sequence[float],
    ) -> list[FitCache]:
        """The schedule and weights for each of some shares of the steps.

        `products`: see `fitted_weights`. `strides`: see `solver_strides`.
        """
        count, branches = len(strides), range(len(products) - 1)
        weighed = np.asarray(strides) * np.exp(-early * np.arange(count) / count)
        sources = [tuple(branches) if across else (branch,) for branch in branches]
        costs = sum(drift_costs(products, each, sources[each], weighed) for each in branches)
        found = []
        for computes in dict.fromkeys(min(max(round(each * count), 2), count) for each in shares):
            steps = cheapest_path(np.asarray(costs), computes)
            schedule = tuple(int(step in steps) for step in range(count))
            weights = tuple(_weights(products, each, sources[each], steps) for each in branches)
            found.append(cls(computes / count, early, across, schedule, weights))
        return found

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of reusing."""
        return self.schedule is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the whole denoiser."""
        found = {len(self.schedule): self} if self.schedule is not None else {}
        branches, kept = _Branches(denoiser), _Kept()
        measured: list[BranchProducts] = []

        def settle() -> None:
            if measured and measured[0].run == denoiser.clock.completed:
                first = measured.pop()
                found[first.total] = self._settled(first, denoiser.clock.prediction)

        def policy(branch: Branch) -> _Fitted | _Measuring | Compute:
            settle()
            if branch.ordinal == 0:
                kept.clear()
            if denoiser.clock.schedule in found:
                return _Fitted(found[denoiser.clock.schedule], branches, kept)
            if self.schedule is not None:
                return Compute()
            if branch.ordinal == 0:
                measured[:] = [BranchProducts(denoiser.clock.run)]
            return _Measuring(branches, measured[0])

        def settled() -> FitCache:
            settle()
            return list(found.values())[-1] if found else self

        if not found:
            logger.info("FitCache: no weights known; the first run is computed and measured")
        forgetting = denoiser.when_forgetting(lambda: _release(kept, measured))
        attached = Handle.together([forgetting, denoiser.cache_model(policy, Newton(1))])
        return attached.settling(settled)

    def _settled(self, measured: BranchProducts, prediction: str) -> FitCache:
        """From one full run."""
        log_snr = [measured.log_snr[place] for place in measured.places]
        strides = solver_strides(log_snr, prediction)
        early = self.early if self.early is not None else 1.0 if prediction == "flow" else -1.0
        (fitted,) = self.fitted([self.share], early, self.across, measured.matrix(), strides)
        steps = [step for step, entry in enumerate(fitted.schedule or ()) if entry]
        schedule = tuple(scheduled(measured.total, measured.places, steps))
        return replace(fitted, share=self.share, early=self.early, schedule=schedule)


def _weights(
    products: Costs, branch: int, sources: Sequence[int], steps: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """Of every step that is not computed, in order."""
    found: list[tuple[float, ...]] = []
    for index, newer in enumerate(steps):
        gap = range(newer + 1, [*steps, products.shape[1]][index + 1])
        if gap:
            pair = steps[max(index - 1, 0)], newer
            found += map(tuple, fitted_weights(products, branch, sources, pair, gap).tolist())
    return tuple(found)


def _wrong(branch: Sequence[Sequence[float]], zeros: int, terms: int) -> bool:
    rows = is_series(branch, lambda row: is_series(row, is_number) and len(row) == terms, least=0)
    return not rows or len(branch) != zeros


class _Branches:
    """Which branches a call holds: one, or both in a doubled batch."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.doubled = False

    def of(self, branch: Branch) -> tuple[int, ...]:
        """Of the call in flight, in the order of its rows."""
        assert self.denoiser.forward is not None  # asked by policies only
        if branch.ordinal:
            return (branch.ordinal + self.doubled,)
        self.doubled = is_doubled(self.denoiser, self.denoiser.forward.arguments)
        if not self.doubled:
            return (0,)
        return (0, 1) if self.denoiser.family.cond_first else (1, 0)


class _Measuring(Compute):
    """Skips nothing and multiplies what each branch computed."""

    def __init__(self, branches: _Branches, products: BranchProducts) -> None:
        self.branches, self.products = branches, products
        self.own: tuple[int, ...] = ()

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Tell apart the branches in the call."""
        self.own = self.own or self.branches.of(context.branch)
        latents, residuals = (_parts(each, len(self.own)) for each in (site.inputs, site.kept))
        for each, latent, residual in zip(self.own, latents, residuals, strict=True):
            self.products.add(context, each, latent, residual)


class _Kept(dict[int, "list[tuple[int, Tensor]]"]):
    """The last two residuals of each branch, with their places."""

    def of(self, branch: int, places: list[int]) -> list[Tensor] | None:
        """Those of `places`, if these were computed last."""
        points = self.get(branch, [])
        if not points or [place for place, _ in points] != places:
            return None
        return [value for _, value in points]


class _Fitted(Table):
    """The schedule; where its own steps were computed before, their fitted sum stands in."""

    def __init__(self, settings: FitCache, branches: _Branches, kept: _Kept) -> None:
        assert settings.schedule is not None and settings.weights is not None
        super().__init__(settings.schedule)
        self.weights, self.across = settings.weights, settings.across
        self.branches, self.kept = branches, kept
        self.own: tuple[int, ...] = ()

    def skip(self, context: StepContext, signals: Signals) -> bool:
        """What the schedule says, unless a branch that the sums need does not run at all."""
        lacking = self.across and len(self.kept) < len(self.weights)
        return super().skip(context, signals) and not lacking

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Keep the last two."""
        self.own = self.own or self.branches.of(context.branch)
        for each, value in zip(self.own, _parts(site.kept, len(self.own)), strict=True):
            self.kept[each] = [*self.kept.get(each, []), (context.place, value)][-2:]

    def refine(
        self, context: StepContext, signals: Signals, forecast: Streams, compute: Any
    ) -> Streams:
        """The fitted sum, or the forecast where the weights are of other steps."""
        before = self.entries[: context.place]
        places = [place for place, entry in enumerate(before) if entry][-2:]
        assert forecast[0] is not None  # whole calls have a prediction
        latent = latent_like(signals.hidden, forecast[0].shape)
        sums = []
        for each, part in zip(self.own, latent.chunk(len(self.own)), strict=True):
            row = self.weights[min(each, len(self.weights) - 1)][before.count(0)]
            sources = range(len(self.weights)) if self.across else (each,)
            kept = [self.kept.of(source, places) for source in sources]
            older = row[:-1:2] if len(places) == 1 else ()
            if any(values is None for values in kept) or any(older):
                return forecast
            terms = [value for values in kept for value in values or ()]
            weights = row[1:-1:2] if len(places) == 1 else row[:-1]
            sums.append(weighted_sum([*weights, row[-1]], [*terms, part]))
        return (torch.cat(sums) if len(sums) > 1 else sums[0], *forecast[1:])


def _release(kept: _Kept, measured: Sequence[BranchProducts]) -> None:
    """Hold no tensor after a run; the products stay."""
    kept.clear()
    for each in measured:
        each.gram.values.clear()


def _parts(streams: Streams, count: int) -> list[Tensor]:
    """The one stream of whole calls, cut into `count` runs of rows."""
    assert streams[0] is not None
    return list(streams[0].chunk(count))
