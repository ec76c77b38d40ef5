"""Adaptive Guidance: drop the unconditional branch once it agrees, or forecast it by regression."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.method import AccelError, Handle, check, is_count, is_number, is_series

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptiveGuidance:
    """Guide until the two predictions' cosine exceeds `threshold`, then run one branch.

    Castillo et al., "Adaptive Guidance", AAAI 2025. The cosine is the least over the rows of a
    batch, so that the slowest row decides; from the next step on the conditional prediction stands
    for both. The first `warmup` steps are guided. Adaptive: one host transfer a guided step.
    """

    slot: ClassVar[str] = "guidance"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"threshold": 0.999},
        {"threshold": 0.995},
        {"threshold": 0.98},
    )

    threshold: float = 0.995
    warmup: int = 5

    def __post_init__(self) -> None:
        threshold = is_number(self.threshold) and -1 <= self.threshold <= 1
        check(threshold, self, "threshold", "a cosine between −1 and 1")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches."""
        return guide(denoiser, lambda: _UntilAgreed(self), "AdaptiveGuidance")


class _UntilAgreed:
    def __init__(self, settings: AdaptiveGuidance) -> None:
        self.settings, self.agreed = settings, False

    def begin(self, context: GuidanceContext) -> str:
        return "cond" if self.agreed and context.step >= self.settings.warmup else "full"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        if self.settings.threshold < 1:
            rows = cond.float().flatten(1), uncond.float().flatten(1)
            cosine = torch.nn.functional.cosine_similarity(*rows).min()
            self.agreed = float(cosine) > self.settings.threshold
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        return cond


TERMS = 5
"""c of this step and of the two before, u of the two before."""


@dataclass(frozen=True)
class LinearAG:
    """Forecast u as a fixed combination of this and past predictions, fitted once for each step.

    Castillo et al., "Adaptive Guidance", AAAI 2025, its LinearAG: û_i = Σ a·c_j + Σ b·u_j over
    c of the steps i, i−1, i−2 and u of the steps i−1, i−2, by least squares on guided runs. In the
    first `share` of the run every `interval`-th step is guided in full and the others are
    forecast; after it all are, where the paper's Adaptive Guidance drops the branch.

    `coefficients`: five numbers for each step. None, or a run of another number of steps: a run is
    computed in full and fitted over all its rows, a small host transfer a step. Static after that:
    rows of a batch are independent. Holds four tensors of the prediction's size.
    """

    slot: ClassVar[str] = "guidance"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"share": 1.0}, {}, {"interval": 4})

    interval: int = 2
    share: float = 0.5
    coefficients: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        check(is_count(self.interval, 2), self, "interval", "a whole number ≥ 2")
        check(is_number(self.share) and 0 <= self.share <= 1, self, "share", "a share in [0, 1]")
        rows = () if self.coefficients is None else self.coefficients
        if not is_series(rows, lambda row: is_series(row, is_number) and len(row) == TERMS, 0):
            raise AccelError(f"LinearAG(coefficients=…): {TERMS} numbers for each step")

    @property
    def unmeasured(self) -> bool:
        """Whether the first run measures instead of leaving out."""
        return self.coefficients is None

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches."""
        clock, found, fit = denoiser.clock, list(self.coefficients or ()), _Fit()

        def settle() -> None:
            if fit.grams and fit.run == clock.completed:
                found[:] = fit.solved()
                fit.grams = {}

        def policy() -> _Forecast | _Fit:
            settle()
            if found and len(found) == clock.total:
                return _Forecast(self, found)
            if fit.run != clock.run:
                fit.run, fit.total, fit.grams = clock.run, clock.total, {}
            fit.past = _Past()  # of another size, where the policy is made anew during a run
            return fit

        def settled() -> LinearAG:
            settle()
            return replace(self, coefficients=tuple(found) or None)

        if not found:
            logger.info("LinearAG: no coefficients known; the first run is computed and measured")
        guided = guide(denoiser, policy, "LinearAG")
        forgetting = denoiser.when_forgetting(lambda: setattr(fit, "past", _Past()))
        return Handle.together([guided, forgetting]).settling(settled)


class _Past:
    """Predictions of the last two steps, newest first."""

    def __init__(self) -> None:
        self.cond: list[Tensor] = []
        self.uncond: list[Tensor] = []

    def terms(self, cond: Tensor) -> list[Tensor]:
        """What is combined; fewer in the first two steps."""
        return [cond, *self.cond, *self.uncond]

    def add(self, cond: Tensor, uncond: Tensor) -> None:
        self.cond, self.uncond = [cond, *self.cond[:1]], [uncond, *self.uncond[:1]]


class _Forecast:
    def __init__(self, settings: LinearAG, coefficients: Sequence[Sequence[float]]) -> None:
        self.settings, self.coefficients, self.past = settings, coefficients, _Past()

    def begin(self, context: GuidanceContext) -> str:
        early = context.step < self.settings.share * context.total
        guided = early and context.step % self.settings.interval == 0
        known = len(self.past.cond) == 2 and any(self.coefficients[context.step])
        return "full" if guided or not known else "cond"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        self.past.add(cond, uncond)
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        row, terms = self.coefficients[context.step], self.past.terms(cond)
        uncond = sum(a * term.float() for a, term in zip(row, terms, strict=True))
        assert isinstance(uncond, torch.Tensor)  # there are terms
        self.past.add(cond, uncond.to(cond.dtype))
        return uncond.to(cond.dtype)


class _Fit:
    """Leaves nothing out; for each step the products of all terms and u with one another."""

    def __init__(self) -> None:
        self.run, self.total, self.past = -1, 0, _Past()
        self.grams: dict[int, Tensor] = {}

    def begin(self, context: GuidanceContext) -> str:
        return "full"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        terms = [each.double().flatten() for each in (*self.past.terms(cond), uncond)]
        stacked = torch.stack(terms)
        self.grams[context.step] = (stacked @ stacked.T).cpu()
        self.past.add(cond, uncond)
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        return cond  # never asked: every step is full

    def solved(self) -> list[tuple[float, ...]]:
        """A row for each step: least squares with a ridge of a millionth.

        Zeros, never forecast with, in the first two steps and in those of another denoiser.
        """
        rows = [(0.0,) * TERMS] * self.total
        for step, gram in self.grams.items():
            known, target = gram[:-1, :-1], gram[:-1, -1]
            if len(known) == TERMS:
                ridge = 1e-6 * known.diagonal().mean() * torch.eye(TERMS, dtype=known.dtype)
                rows[step] = tuple(torch.linalg.solve(known + ridge, target).tolist())
        return rows
