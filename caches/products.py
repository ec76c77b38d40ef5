"""The measuring run of schedules that are computed: inner products of all its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from accel.optimal_steps import Costs
from accel.site import Computed, Signals, StepContext

if TYPE_CHECKING:
    from torch import Tensor


class Compute:
    """Skips nothing."""

    def skip(self, context: StepContext, signals: Signals) -> bool:
        """Never."""
        return False

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Nothing to learn."""


def scheduled(total: int, places: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Ones and zeros for the scheduler's whole schedule; steps that did not run are 1.

    `places`: of the steps that ran; `steps`: which of these to compute.
    """
    entries = [1] * total
    for index, place in enumerate(places):
        entries[place] = int(index in steps)
    return entries


class Gram:
    """Inner products of all tensors given so far; one host transfer each."""

    def __init__(self, wide: bool = False) -> None:
        """`wide`: in fp64, for what is small and nearly collinear."""
        self.wide = wide
        self.values: list[Tensor] = []
        self.rows: list[list[float]] = []

    def add(self, value: Tensor) -> None:
        """Multiply it with all before it."""
        import torch

        self.values.append(self._flat(value) if self.wide else value)
        flat = self._flat(value)
        self.rows.append(torch.stack([flat @ self._flat(old) for old in self.values]).tolist())

    def _flat(self, value: Tensor) -> Tensor:
        if not self.wide:
            return value.float().flatten()
        value = value.cpu() if value.device.type == "mps" else value  # which has no fp64
        return value.double().flatten()

    def matrix(self) -> Costs:
        """(given, given), in the order in which they were given."""
        lower = np.zeros((len(self.rows), len(self.rows)))
        for place, row in enumerate(self.rows):
            lower[place, : len(row)] = row
        return np.tril(lower) + np.tril(lower, -1).T


class Products(Compute):
    """Inner products of what one branch computed in one run. Holds all of it to the run's end."""

    def __init__(self) -> None:
        self.begin(-1)

    def begin(self, run: int) -> Products:
        """Forget; what follows is of run number `run`."""
        self.run, self.total, self.gram = run, 0, Gram()
        self.places: list[int] = []
        return self

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Multiply what was computed with all before it."""
        assert site.kept[0] is not None  # a span is remembered only with its hidden states
        self.places.append(context.place)
        self.total = context.schedule
        self.gram.add(site.kept[0])

    def release(self) -> None:
        """Hold no tensor after the run; the products stay."""
        self.gram.values.clear()


class BranchProducts:
    """Inner products of all branches' residuals and of the latents of one run of whole calls.

    In fp64: they are small, and nearly collinear. Holds all of it to the run's end.
    """

    def __init__(self, run: int) -> None:
        self.run, self.total = run, 0
        self.gram = Gram(wide=True)
        self.given: list[tuple[int, int]] = []
        """Branch and place of each; the latents' branch is −1."""
        self.log_snr: list[float] = []

    def add(self, context: StepContext, branch: int, latent: Tensor, residual: Tensor) -> None:
        """What a branch computed; all have one latent."""
        self.total, self.log_snr = context.schedule, context.clock.log_snr
        self.gram.add(residual)
        self.given.append((branch, context.place))
        if (-1, context.place) not in self.given:
            self.gram.add(latent)
            self.given.append((-1, context.place))

    @property
    def places(self) -> list[int]:
        """Of the steps that ran, in the scheduler's whole schedule."""
        return [place for branch, place in self.given if branch == -1]

    def matrix(self) -> Costs:
        """As `accel.optimal_steps.fitted_weights` takes them.

        Of branches that ran at all steps; those that were left out at some are not measured.
        """
        places = self.places
        numbers = sorted({branch for branch, _ in self.given} - {-1})
        rows = [[(branch, place) for place in places] for branch in (*numbers, -1)]
        whole = [row for row in rows if set(row) <= set(self.given)]
        order = [self.given.index(each) for row in whole for each in row]
        return self.gram.matrix()[np.ix_(order, order)].reshape(
            (len(whole), len(places), len(whole), len(places))
        )
