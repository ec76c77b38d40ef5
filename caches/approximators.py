"""What stands in for a skipped span: fixed linear combinations of residuals computed before.

Every history maps over the streams of a residual. Differences are taken in fp32 and stored in the
residual's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.kernels.weighted_sum import weighted_sum
from accel.method import check, is_count, is_number
from accel.site import Signals, Streams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HoldResidual:
    """Repeat the last computed residual."""

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return 1

    def start(self, total: int) -> _Polynomial:
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

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return self.order + 1

    def start(self, total: int) -> _Polynomial:
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

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return self.order + 1

    def start(self, total: int) -> _Differences:
        """An empty history."""
        return _Differences(self.order, lambda m, ahead: ahead**m)


@dataclass(frozen=True)
class HiCache:
    """TaylorSeer's differences on scaled Hermite polynomials (HiCache, 2025).

    Σ Δᵐ σᵐ Hₘ(σk) / m! with the physicists' Hₘ. Order 1 is the line damped by 2σ²: half its slope
    at σ = 0.5, `Taylor(1)` at σ = 1/√2. Holds up to `order` + 1 tensors of the residual's size.
    """

    order: int = 2
    sigma: float = 0.5

    def __post_init__(self) -> None:
        check(is_count(self.order, 0), self, "order", "a whole number ≥ 0")
        check(is_number(self.sigma) and 0 < self.sigma <= 1, self, "sigma", "in (0, 1]")

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return self.order + 1

    def start(self, total: int) -> _Differences:
        """An empty history."""
        return _Differences(
            self.order, lambda m, ahead: self.sigma**m * _hermite(m, self.sigma * ahead)
        )


@dataclass(frozen=True)
class Chebyshev:
    """Spectrum's forecast (CVPR 2026): ridge regression on Chebyshev polynomials of the step.

    All computed residuals of the run (the last `keep` when given) are fitted by polynomials up to
    `degree` with penalty `ridge`; `blend` of that forecast is mixed with 1 − `blend` of the line
    through the last two. The weights depend on the steps alone: one weighted sum of stored
    residuals. Differs from the paper: residuals instead of outputs, and steps scaled by the run's
    own length instead of 50.
    """

    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    keep: int | None = None

    def __post_init__(self) -> None:
        check(is_count(self.degree, 1), self, "degree", "a whole number ≥ 1")
        check(is_number(self.ridge) and self.ridge > 0, self, "ridge", "a number > 0")
        check(is_number(self.blend) and 0 <= self.blend <= 1, self, "blend", "between 0 and 1")
        keep = self.keep is None or is_count(self.keep, 2)
        check(keep, self, "keep", "None or a whole number ≥ 2")

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return total if self.keep is None else min(self.keep, total)

    def start(self, total: int) -> _Ridge:
        """An empty history."""
        return _Ridge(self, total)


@dataclass(frozen=True)
class Aligned:
    """DiCache's trajectory alignment: how far the probe went says how far the rest went.

    With p the probe's residual now (the span's input minus the chain's), p₁ and p₂ at the last two
    computed steps and R₁, R₂ the residuals then: R₂ + γ (R₁ − R₂), γ = mean|p − p₂| / mean|p₁ − p₂|
    between 1 and `limit`. Needs a probe before the span. Holds two residuals and two probes.
    """

    limit: float = 1.5

    def __post_init__(self) -> None:
        check(is_number(self.limit) and self.limit >= 1, self, "limit", "a number ≥ 1")

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return 4

    def start(self, total: int) -> _Alignment:
        """An empty history."""
        return _Alignment(self.limit)


@dataclass(frozen=True)
class GrowingLine:
    """FasterCache's forecast: F + w·(F − G) from the last two computed residuals, newest first.

    w grows linearly from 0 at `begin`, a share of the run, to `weight` at the end, whatever the
    distance of the two; it stays within 0 and 1. Holds two residuals.
    """

    begin: float = 0.25
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(is_number(self.begin) and 0 <= self.begin <= 1, self, "begin", "between 0 and 1")
        check(is_number(self.weight) and self.weight >= 0, self, "weight", "a number ≥ 0")

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return 2

    def start(self, total: int) -> _Growing:
        """An empty history."""
        return _Growing(self, total)


@dataclass(frozen=True)
class FoCa:
    """FoCa's forecast (2025): features as an ODE, a predictor step corrected like Heun's method.

    F̂ = F + (k/2) · (ΔF + ΔF̂) with F the last computed residual, k the steps since then but at most
    3, ΔF the last change of computed residuals and ΔF̂ that of the current sequence, forecasts
    included. The form in public use takes ΔF over a whole gap (`per_step=False`), which overshoots
    a straight line wherever a gap is longer than one step; here it is divided by its gap.
    **Reconstructed** from third-party use; no official code was read. Holds three residuals.
    """

    per_step: bool = True

    def __post_init__(self) -> None:
        check(isinstance(self.per_step, bool), self, "per_step", "True or False")

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return 4

    def start(self, total: int) -> _Heun:
        """An empty history."""
        return _Heun(self.per_step)


def _hermite(m: int, z: float) -> float:
    """The physicists' Hermite polynomial of degree m."""
    older, value = 0.0, 1.0
    for n in range(m):
        older, value = value, 2 * z * value - 2 * n * older
    return value


class _Points:
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


class _Polynomial(_Points):
    """Newton/Lagrange form: the weights depend only on the computed steps' positions."""

    def __init__(self, order: int) -> None:
        super().__init__(order + 1)

    def weights(self, places: list[int], step: int) -> list[float]:
        return [
            math.prod((step - other) / (place - other) for other in places if other != place)
            for place in places
        ]


class _Growing(_Points):
    """A weight that grows over the run, on the difference of the last two."""

    def __init__(self, settings: GrowingLine, total: int) -> None:
        super().__init__(2)
        self.settings, self.total = settings, total

    def weights(self, places: list[int], step: int) -> list[float]:
        first = self.settings.begin * self.total
        grown = self.settings.weight * (step - first) / max(self.total - 1 - first, 1)
        weight = min(max(grown, 0.0), 1.0)
        return [-weight, 1 + weight]


class _Ridge(_Points):
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


class _Alignment:
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


class _Heun:
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


class _Differences:
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
