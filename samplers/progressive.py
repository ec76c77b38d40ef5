"""Progressive: from small to full size, each stage from the clean estimate of the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.crossing import Crossing
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_number
from accel.noise_levels import NoiseLevels
from accel.stages import Stage, check_plan, plan
from accel.staging import stage
from accel.text_bias import amplify_text

if TYPE_CHECKING:
    from torch import Tensor

    from accel.layout import Layout


@dataclass(frozen=True)
class Progressive:
    """Sample the first steps at small sizes; the rule of Jenga's ProRes (Zhang et al., 2025).

    `scales` of rows and columns and `shares` of the steps, stage by stage; the last scale is 1. At
    a change of size the clean estimate is resized and made noisy again, `renoise` times the
    noise-to-signal ratio that was reached. `noise` "initial" takes the run's own first noise, each
    place's part of it, so that the picture stays the seed's; "fresh", as the authors, draws anew
    and makes another picture. `gain` multiplies each further stage's
    timestep shift (flow matching), beside the factor √(share of tokens). `positions`: see `Layout`;
    "native" is what models know that were trained at several sizes. `text_bias` ρ (Jenga: 0.5):
    in smaller stages ρ·log(full/live places) is added to the logits of picture to text in joint
    attention, so that the field of view does not narrow.
    """

    slot: ClassVar[str] = "size"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"shares": (0.3, 0.7)}, {}, {"renoise": 2.0})

    scales: tuple[float, ...] = (0.5, 1.0)
    shares: tuple[float, ...] = (0.5, 0.5)
    renoise: float = 1.0
    gain: float = 1.0
    positions: str = "native"
    noise: str = "initial"
    text_bias: float = 0.0

    def __post_init__(self) -> None:
        check_plan(self, self.scales, self.shares)
        for name in ("renoise", "gain"):
            value = getattr(self, name)
            check(is_number(value) and value > 0, self, name, "a number above 0")
        positive = is_number(self.text_bias) and self.text_bias >= 0
        check(positive, self, "text_bias", "a number ≥ 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to a denoiser whose family can take other sizes."""
        staged = stage(denoiser, self, self.positions, self.noise)
        if not self.text_bias:
            return staged
        try:
            amplified = amplify_text(denoiser, "Progressive(text_bias=…)", self.text_bias)
        except BaseException:
            staged.remove()
            raise
        return Handle.together((staged, amplified))

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """Each stage ends where its steps would end in the untouched run."""
        factors = [self.renoise] * (len(self.scales) - 1)
        return plan(levels, self.scales, self.shares, factors, self.gain)

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """The clean estimate resized."""
        return crossing.resized(self.positions)
