"""LSSGen: whole runs at growing sizes, joined by a learned latent upsampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accel import trained_folder
from accel.clock import StepClock
from accel.crossing import Crossing
from accel.denoiser import Denoiser
from accel.latent_upsampler import LatentUpsampler
from accel.layout import Layout
from accel.method import AccelError, Handle, check, is_number
from accel.noise_levels import NoiseLevels
from accel.stages import Stage, check_plan
from accel.staging import stage

if TYPE_CHECKING:
    from torch import Tensor

TRAIN = (
    "train an upsampler for its VAE as demos/zoo/upsampler.py does and give "
    "LSSGen(upsampler=FOLDER), or use Progressive, which needs none"
)


@dataclass(frozen=True)
class LSSGen:
    """Latent space scaling generation (2025, arXiv 2507.16154).

    Each stage samples down to no noise at its size; its clean latent is doubled by a small trained
    network and made noisy again, where the next stage has `start` of its schedule left, with the
    run's own first noise, so that the picture stays the seed's. `scales` of rows and columns, each
    twice the one before, the last 1; `shares` of the run's steps. The defaults are the paper's rule
    for two stages: with N steps for the full size a stage has N over log2 of the area ratio, later
    ones only `start` of theirs. Each stage's timestep shift is the run's times √(share of tokens)
    (flow matching). `upsampler` is a folder with its weights; None is `adapters/lssgen` beside the
    model, which the zoo's models have. `positions`: see `Layout`.

    Raises `AccelError` where there is no upsampler, when attaching, and for one of another VAE, at
    the start of a run.

    Differs from the paper, which draws the noise anew: the steps of all stages are the pipeline's
    number of steps; for FLUX the shift is not computed anew from the number of tokens, whose
    formula is close to the square root.
    """

    slot: ClassVar[str] = "size"
    folders: ClassVar[tuple[str, ...]] = ("upsampler",)
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"shares": (0.25, 0.75)},
        {},
        {"start": 0.5, "shares": (0.6, 0.4)},
    )

    scales: tuple[float, ...] = (0.5, 1.0)
    shares: tuple[float, ...] = (0.4, 0.6)
    start: float = 0.75
    upsampler: str | None = None
    positions: str = "native"

    def __post_init__(self) -> None:
        check_plan(self, self.scales, self.shares)
        doubled = all(
            abs(large - 2 * small) < 1e-6
            for small, large in zip(self.scales, self.scales[1:], strict=False)
        )
        check(doubled, self, "scales", "numbers that are each twice the one before")
        check(is_number(self.start) and 0 < self.start < 1, self, "start", "between 0 and 1")
        accepted = self.upsampler is None or isinstance(self.upsampler, str)
        check(accepted, self, "upsampler", "None or the path of a folder")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to a denoiser whose family can take other sizes."""
        upsampler = LatentUpsampler.load(
            trained_folder.find(self.upsampler, denoiser.module, "lssgen", TRAIN)
        )
        staged = stage(denoiser, _Stages(self, upsampler, denoiser.clock), self.positions)
        denoiser.clock.staging.name = type(self).__name__
        return staged


@dataclass(frozen=True)
class _Stages:
    """The stages of one pipeline's runs."""

    method: LSSGen
    upsampler: LatentUpsampler
    clock: StepClock

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """Each stage ends without noise."""
        vae = getattr(self.clock.staging.pipe, "vae", None)
        if vae is not None:
            self.upsampler.check(vae)
        shares, found, begin = self.method.shares, [], 0
        for number, scale in enumerate(self.method.scales):
            end = round(levels.steps * sum(shares[: number + 1]))
            if end <= begin:
                raise AccelError(
                    f"LSSGen: a run of {levels.steps} steps is too short for stages of the shares "
                    f"{shares}: stage {number + 1} would have none"
                )
            start = self._start(levels, scale) if number else levels.sigmas[0]
            found.append(Stage(levels.spaced(start, levels.sigmas[-1], end - begin, scale), scale))
            begin = end
        return found

    def _start(self, levels: NoiseLevels, scale: float) -> float:
        """The level at which `start` of the schedule at `scale` is left."""
        place = (1 - self.method.start) * levels.steps
        return float(np.interp(place, np.arange(levels.steps + 1), levels.curve(scale)))

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """T1 with the clean latent doubled."""
        assert crossing.layout.grid is not None  # stages of one size are grids
        planes = crossing.form.planes(crossing.clean, crossing.layout.grid)
        doubled = self.upsampler.to(planes.device)(planes)
        grid = crossing.grid(crossing.after.scale)
        layout = Layout.resized(crossing.layout.full, grid, self.method.positions)
        return layout, crossing.renoise(doubled, layout)
