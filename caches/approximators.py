"""What stands in for a skipped span: fixed linear combinations of residuals computed before."""

from __future__ import annotations

from dataclasses import dataclass

from accel.caches.histories import Alignment, Differences, Growing, Heun, Polynomial, Ridge
from accel.method import check, is_count, is_number


@dataclass(frozen=True)
class HoldResidual:
    """Repeat the last computed residual."""

    def depth(self, total: int) -> int:
        """The most tensors of a residual's size that a run of `total` steps holds."""
        return 1

    def start(self, total: int) -> Polynomial:
        """An empty history."""
        return Polynomial(0)


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

    def start(self, total: int) -> Polynomial:
        """An empty history."""
        return Polynomial(self.order)


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

    def start(self, total: int) -> Differences:
        """An empty history."""
        return Differences(self.order, lambda m, ahead: ahead**m)


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

    def start(self, total: int) -> Differences:
        """An empty history."""
        return Differences(
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

    def start(self, total: int) -> Ridge:
        """An empty history."""
        return Ridge(self, total)


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

    def start(self, total: int) -> Alignment:
        """An empty history."""
        return Alignment(self.limit)


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

    def start(self, total: int) -> Growing:
        """An empty history."""
        return Growing(self, total)


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

    def start(self, total: int) -> Heun:
        """An empty history."""
        return Heun(self.per_step)


def _hermite(m: int, z: float) -> float:
    """The physicists' Hermite polynomial of degree m."""
    older, value = 0.0, 1.0
    for n in range(m):
        older, value = value, 2 * z * value - 2 * n * older
    return value
