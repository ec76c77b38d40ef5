"""Histories: what forecasts keep of the residuals computed so far, and what they make of it.

Every history maps over the streams of a residual. Differences are taken in fp32 and stored in the
residual's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from accel.kernels.weighted_sum import weighted_sum
from accel.site import Signals, Streams

if TYPE_CHECKING:
    from torch import Tensor

    from accel.caches.approximators import Chebyshev, GrowingLine


class Points:
    """Computed residuals with their steps; a subclass weighs them."""

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self.points: list[tuple[int, Streams]] = []

    def update(self, step: int, value: Streams, signals: Signals) -> None:
        self.points.append((step, value))
        if self.keep is not None:
            del self.points[: -self.keep]

    def predict(self, step: int, signals: Signals) -> Streams:
        if len(self.points) == 1:
            return self.points[0][1]
        weights = self.weights([place for place, _ in self.points], step)
        return combine(weights, [value for _, value in self.points])

    def weights(self, places: list[int], step: int) -> list[float]:
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        return bool(self.points)

    @property
    def extrapolates(self) -> bool:
        return len(self.points) > 1

    def tensors(self) -> list[Tensor]:
        return [tensor for _, value in self.points for tensor in value if tensor is not None]


class Polynomial(Points):
    """Newton/Lagrange form: the weights depend only on the computed steps' positions."""

    def __init__(self, order: int) -> None:
        super().__init__(order + 1)

    def weights(self, places: list[int], step: int) -> list[float]:
        return [
            math.prod((step - other) / (place - other) for other in places if other != place)
            for place in places
        ]


class Growing(Points):
    """A weight that grows over the run, on the difference of the last two."""

    def __init__(self, settings: GrowingLine, total: int) -> None:
        super().__init__(2)
        self.settings, self.total = settings, total

    def weights(self, places: list[int], step: int) -> list[float]:
        first = self.settings.begin * self.total
        grown = self.settings.weight * (step - first) / max(self.total - 1 - first, 1)
        weight = min(max(grown, 0.0), 1.0)
        return [-weight, 1 + weight]


class Ridge(Points):
    """Ridge regression over all points, blended with the line through the last two."""

    def __init__(self, settings: Chebyshev, total: int) -> None:
        super().__init__(settings.keep)
        self.settings, self.total = settings, total

    def weights(self, places: list[int], step: int) -> list[float]:
        import torch

        rows = torch.tensor([self._basis(place) for place in places], dtype=torch.float64)
        now = torch.tensor(self._basis(step), dtype=torch.float64)
        penalty = self.settings.ridge * torch.eye(len(now), dtype=torch.float64)
        fitted = rows @ torch.linalg.solve(rows.T @ rows + penalty, now) * self.settings.blend
        weights: list[float] = fitted.tolist()
        ahead = (step - places[-1]) / (places[-1] - places[-2])
        weights[-1] += (1 - self.settings.blend) * (1 + ahead)
        weights[-2] -= (1 - self.settings.blend) * ahead
        return weights

    def _basis(self, step: int) -> list[float]:
        """T₀ … T_degree at the step's place in [−1, 1]."""
        z = 2 * step / self.total - 1
        values = [1.0, z]
        while len(values) <= self.settings.degree:
            values.append(2 * z * values[-1] - values[-2])
        return values


class Alignment:
    """The last two residuals with their probes; the newest last."""

    def __init__(self, limit: float) -> None:
        self.limit, self.apart = limit, 0.0
        self.values: list[Streams] = []
        self.probes: list[Tensor] = []

    def update(self, step: int, value: Streams, signals: Signals) -> None:
        self.values = [*self.values, value][-2:]
        self.probes = [*self.probes, signals.hidden - signals.entry][-2:]
        if len(self.probes) == 2:
            self.apart = signals.mean_change(self.probes[1], self.probes[0])

    def predict(self, step: int, signals: Signals) -> Streams:
        if len(self.values) == 1 or self.apart == 0:
            return self.values[-1]
        gone = signals.mean_change(signals.hidden - signals.entry, self.probes[0])
        share = min(max(gone / self.apart, 1.0), self.limit)
        return combine([1 - share, share], self.values)

    @property
    def ready(self) -> bool:
        return bool(self.values)

    @property
    def extrapolates(self) -> bool:
        return len(self.values) > 1

    def tensors(self) -> list[Tensor]:
        held = [tensor for value in self.values for tensor in value if tensor is not None]
        return [*held, *self.probes]


class Heun:
    """FoCa's two changes: of computed residuals, and of the current sequence."""

    def __init__(self, per_step: bool) -> None:
        self.per_step, self.step = per_step, 0
        self.computed: Streams | None = None
        self.change: Streams | None = None
        self.latest: tuple[Streams, Streams] | None = None
        """The last two of the current sequence."""

    def update(self, step: int, value: Streams, signals: Signals) -> None:
        if self.computed is not None:
            gap = step - self.step if self.per_step else 1
            self.change = combine([1 / gap, -1 / gap], [value, self.computed])
        self.computed, self.step, self.latest = value, step, None

    def predict(self, step: int, signals: Signals) -> Streams:
        assert self.computed is not None  # asked only when ready
        if self.change is None:
            return self.computed
        half = min(step - self.step, 3) / 2
        if self.latest is None:
            forecast = combine([1.0, 2 * half], [self.computed, self.change])
            self.latest = (self.computed, forecast)
        else:
            old, new = self.latest
            weights = [1.0, half, half, -half]
            forecast = combine(weights, [self.computed, self.change, new, old])
            self.latest = (new, forecast)
        return forecast

    @property
    def ready(self) -> bool:
        return self.computed is not None

    @property
    def extrapolates(self) -> bool:
        return self.change is not None

    def tensors(self) -> list[Tensor]:
        values = [value for value in (self.computed, self.change) if value is not None]
        values += self.latest or ()
        return [tensor for value in values for tensor in value if tensor is not None]


class Differences:
    """TaylorSeer's table of backward differences, taken at computed steps only."""

    def __init__(self, order: int, basis: Callable[[int, int], float]) -> None:
        self.order, self.basis = order, basis
        self.step = 0
        self.terms: list[Streams] = []

    def update(self, step: int, value: Streams, signals: Signals) -> None:
        gap = step - self.step
        terms = [value]
        for old in self.terms[: self.order]:
            terms.append(combine([1 / gap, -1 / gap], [terms[-1], old]))
        self.terms, self.step = terms, step

    def predict(self, step: int, signals: Signals) -> Streams:
        if len(self.terms) == 1:
            return self.terms[0]
        ahead = step - self.step
        weights = [self.basis(m, ahead) / math.factorial(m) for m in range(len(self.terms))]
        return combine(weights, self.terms)

    @property
    def ready(self) -> bool:
        return bool(self.terms)

    @property
    def extrapolates(self) -> bool:
        return len(self.terms) > 1

    def tensors(self) -> list[Tensor]:
        return [tensor for value in self.terms for tensor in value if tensor is not None]


def combine(weights: list[float], values: list[Streams]) -> Streams:
    """Weighted sum of residuals, stream by stream, in fp32."""

    def one(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        if any(tensor is None for tensor in tensors):
            return None
        present = [tensor for tensor in tensors if tensor is not None]
        return weighted_sum(weights, present)

    return tuple(one(tensors) for tensors in zip(*values, strict=True))
