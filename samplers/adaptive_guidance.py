"""Adaptive Guidance: drop the unconditional branch for good once it agrees with the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.method import Handle, check, is_count, is_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaptiveGuidance:
    """Guide until the two predictions' cosine exceeds `threshold`, then run one branch.

    Castillo et al., "Adaptive Guidance", AAAI 2025. The cosine is the least over the rows of a
    batch, so that the slowest row decides; from the next step on the conditional prediction stands
    for both. The first `warmup` steps are guided. The paper's LinearAG, which fits earlier
    unconditional predictions by regression, is not built. Adaptive: one host transfer a guided
    step.
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
