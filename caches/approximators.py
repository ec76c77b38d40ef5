"""What stands in for a skipped span: fixed linear combinations of residuals computed before.

Every history maps over the streams of a residual. Differences are taken in fp32 and stored in the
residual's own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.method import check, is_count
from accel.site import Streams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HoldResidual:
    """Repeat the last computed residual."""

    def start(self) -> _Polynomial:
        """An empty history."""
        return _Polynomial(0)


@dataclass(frozen=True)
class Newton:
    """The polynomial of degree `order` through the last `order` + 1 computed residuals.

    Newton's backward form, exact for polynomials up to that degree at any spacing of the computed
    steps (TaylorSeer's formula is biased from order 2 on). Holds `order` + 1 residuals.
    """

    order: int = 1

    def __post_init__(self) -> None:
        check(is_count(self.order, 0), self, "order", "a whole number ≥ 0")

    def start(self) -> _Polynomial:
        """An empty history."""
        return _Polynomial(self.order)


@dataclass(frozen=True)
class Taylor:
    """TaylorSeer's forecast (Liu et al. 2025): Σ Δᵐ kᵐ / m!, Δ by backward differences.

    k counts steps since the last computed one; Δᵐ⁺¹ = (Δᵐ new − Δᵐ old) / gap. Orders above the
    number of computed steps are left out. Holds up to `order` + 1 tensors of the residual's size.
    """

    order: int = 1

    def __post_init__(self) -> None:
        check(is_count(self.order, 0), self, "order", "a whole number ≥ 0")

    def start(self) -> _Differences:
        """An empty history."""
        return _Differences(self.order)


class _Polynomial:
    """Newton/Lagrange form: the weights depend only on the computed steps' positions."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.points: list[tuple[int, Streams]] = []

    def update(self, step: int, value: Streams) -> None:
        self.points = [*self.points, (step, value)][-(self.order + 1) :]

    def predict(self, step: int) -> Streams:
        if len(self.points) == 1:
            return self.points[0][1]
        places = [place for place, _ in self.points]
        weights = [
            math.prod((step - other) / (place - other) for other in places if other != place)
            for place in places
        ]
        return _combine(weights, [value for _, value in self.points])

    @property
    def ready(self) -> bool:
        return bool(self.points)

    @property
    def extrapolates(self) -> bool:
        return len(self.points) > 1

    def tensors(self) -> list[Tensor]:
        return [tensor for _, value in self.points for tensor in value if tensor is not None]


class _Differences:
    """TaylorSeer's table of backward differences, taken at computed steps only."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.step = 0
        self.terms: list[Streams] = []

    def update(self, step: int, value: Streams) -> None:
        gap = step - self.step
        terms = [value]
        for old in self.terms[: self.order]:
            terms.append(_combine([1 / gap, -1 / gap], [terms[-1], old]))
        self.terms, self.step = terms, step

    def predict(self, step: int) -> Streams:
        if len(self.terms) == 1:
            return self.terms[0]
        ahead = step - self.step
        weights = [ahead**m / math.factorial(m) for m in range(len(self.terms))]
        return _combine(weights, self.terms)

    @property
    def ready(self) -> bool:
        return bool(self.terms)

    @property
    def extrapolates(self) -> bool:
        return len(self.terms) > 1

    def tensors(self) -> list[Tensor]:
        return [tensor for value in self.terms for tensor in value if tensor is not None]


def _combine(weights: list[float], values: list[Streams]) -> Streams:
    """Weighted sum of residuals, stream by stream, in fp32."""

    def one(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        if any(tensor is None for tensor in tensors):
            return None
        present = [tensor for tensor in tensors if tensor is not None]
        total = present[0].float() * weights[0]
        for weight, tensor in zip(weights[1:], present[1:], strict=True):
            total.add_(tensor, alpha=weight)
        return total.to(present[0].dtype)

    return tuple(one(tensors) for tensors in zip(*values, strict=True))
