"""Bottleneck Sampling: full size for the composition, small in the middle, full for the details."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.crossing import Crossing
from accel.denoiser import Denoiser
from accel.method import Handle, check, is_number
from accel.noise_levels import NoiseLevels
from accel.stages import Stage, check_plan, plan
from accel.staging import stage

if TYPE_CHECKING:
    from torch import Tensor

    from accel.layout import Layout


@dataclass(frozen=True)
class BottleneckSampling:
    """High, low, high resolution (Tian et al., 2025, arXiv 2503.18940).

    `shares` of the steps in the three stages, the middle one at `scale` of rows and columns. At
    both changes the clean estimate is resized and made noisy again: `down` and `up` times the
    noise-to-signal ratio that was reached; √m for m times the pixels keeps the estimate as hard to
    see. Each stage's timestep shift is the run's times √(share of tokens) and, from stage to stage,
    `gain` (flow matching). The noise levels that the paper tuned for each model were not at hand;
    here they are settings. `noise`: as of `Progressive`; `positions`: see `Layout`.
    """

    slot: ClassVar[str] = "size"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"shares": (0.3, 0.3, 0.4)},
        {},
        {"shares": (0.1, 0.6, 0.3)},
    )

    scale: float = 0.5
    shares: tuple[float, float, float] = (0.2, 0.5, 0.3)
    down: float = 1.0
    up: float = 2.0
    gain: float = 1.0
    positions: str = "native"
    noise: str = "initial"

    def __post_init__(self) -> None:
        check(is_number(self.scale) and 0 < self.scale <= 1, self, "scale", "above 0, at most 1")
        check_plan(self, (1.0, self.scale, 1.0), self.shares)
        for name in ("down", "up", "gain"):
            value = getattr(self, name)
            check(is_number(value) and value > 0, self, name, "a number above 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to a denoiser whose family can take other sizes."""
        return stage(denoiser, self, self.positions, self.noise)

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """Each stage ends where its steps would end in the untouched run."""
        scales = (1.0, self.scale, 1.0)
        return plan(levels, scales, self.shares, [self.down, self.up], self.gain)

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """The clean estimate resized."""
        return crossing.resized(self.positions)
