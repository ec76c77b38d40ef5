"""The measuring run of schedules that are computed: inner products of all its steps."""

from __future__ import annotations

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


class Products(Compute):
    """Inner products of what one branch computed in one run; one host transfer each.

    Holds all of it to the run's end. `inputs`: also of what went in, and all in fp64: whole calls'
    residuals and latents are small, and nearly collinear.
    """

    def __init__(self, inputs: bool = False) -> None:
        self.inputs = inputs
        self.begin(-1)

    def begin(self, run: int) -> Products:
        """Forget; what follows is of run number `run`."""
        self.run, self.total = run, 0
        self.values: list[Tensor] = []
        self.rows: list[list[float]] = []
        self.places: list[int] = []
        self.log_snr: list[float] = []
        return self

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        """Multiply what was computed with all before it."""
        import torch

        new = [site.kept[0], site.inputs[0]][: 1 + self.inputs]
        self.places.append(context.place)
        self.total, self.log_snr = context.schedule, context.clock.log_snr
        for value in new:
            assert value is not None  # a span is remembered only with its hidden states
            flat = self._wide(value)
            self.values.append(flat if self.inputs else value)
            products = torch.stack([flat @ self._wide(old) for old in self.values])
            self.rows.append(products.tolist())
        if context.last:
            self.values = []

    def _wide(self, value: Tensor) -> Tensor:
        if not self.inputs:
            return value.float().flatten()
        value = value.cpu() if value.device.type == "mps" else value  # which has no fp64
        return value.double().flatten()

    def schedule(self, steps: list[int]) -> list[int]:
        """Ones and zeros for the scheduler's whole schedule; steps that did not run here are 1."""
        entries = [1] * self.total
        for index, place in enumerate(self.places):
            entries[place] = int(index in steps)
        return entries

    def matrix(self) -> Costs:
        """The Gram matrix, (steps, steps); with `inputs` (2·steps, 2·steps), inputs last."""
        lower = np.zeros((len(self.rows), len(self.rows)))
        for step, row in enumerate(self.rows):
            lower[step, : len(row)] = row
        gram = np.tril(lower) + np.tril(lower, -1).T
        if not self.inputs:
            return gram
        order = [*range(0, len(gram), 2), *range(1, len(gram), 2)]
        return gram[np.ix_(order, order)]
