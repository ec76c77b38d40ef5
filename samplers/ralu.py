"""RALU: coarse tokens first, then fine ones on the picture's edges, then all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from accel.crossing import Crossing
from accel.denoiser import Denoiser
from accel.layout import Layout
from accel.method import AccelError, Handle, check, is_number, is_series
from accel.noise_levels import NoiseLevels, Sigmas
from accel.stages import Stage, check_words
from accel.staging import stage
from accel.transitions import draw_noise

if TYPE_CHECKING:
    from torch import Tensor

LOW, HIGH = 100.0, 200.0
"""Canny's thresholds, for 8-bit luma."""


def _positive(value: object) -> bool:
    return is_number(value) and value > 0  # type: ignore[operator]


@dataclass(frozen=True)
class RALU:
    """Region-adaptive latent upsampling (Jeong et al., 2025, arXiv 2507.08422).

    Three stages over data times 0 → `ends[0]` → `ends[1]` → 1 (1 − σ): every 2×2 block of tokens as
    one; the `ratio` of coarse tokens with most edge pixels split; all split. `shares` of the steps.
    At a boundary the latent's pixels are repeated, and their noise-to-signal ratio is multiplied by
    `jump` (Z in the paper, 2 or more); `shifts` are the stages' timestep shifts. `noise` "initial"
    gives each token its own part of the run's first noise, so that the picture stays the seed's;
    "fresh", as the authors, whitens with correlated noise and makes another picture. Defaults: the
    paper's FLUX setting of 5×, whose 15 steps are shared 4, 5, 6. `ratio` 1 splits everything at
    the first boundary, 0 at the second: both are plain two-stage runs. `regions`: "edges", or
    "random" to compare with. `positions`: see `Layout`.

    Differs from the authors' code: a coarse token's four latent pixels become the four fine tokens
    (theirs repeats whole packed tokens, which tiles what is inside them), the decoded picture's
    dark half is not clipped away before edges are looked for, tokens that are not split get exactly
    the noise of the level, seeds are the call's, and a batch shares one choice of regions (its
    summed edges), because FLUX has one table of coordinates for the whole batch.
    """

    slot: ClassVar[str] = "size"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"ratio": 0.3}, {}, {"ratio": 0.1})

    shares: tuple[float, float, float] = (4 / 15, 5 / 15, 6 / 15)
    ends: tuple[float, float] = (0.3, 0.45)
    shifts: tuple[float, float, float] = (5.12, 2.64, 2.25)
    jump: float = 7.52
    ratio: float = 0.2
    regions: str = "edges"
    positions: str = "native"
    noise: str = "initial"

    def __post_init__(self) -> None:
        shares = is_series(self.shares, _positive) and len(self.shares) == 3
        shares = shares and abs(sum(self.shares) - 1) < 1e-6
        check(shares, self, "shares", "three positive numbers that add up to 1")
        ends = is_series(self.ends, is_number) and len(self.ends) == 2
        ends = ends and 0 < self.ends[0] < self.ends[1] < 1
        check(ends, self, "ends", "two growing data times between 0 and 1")
        shifts = is_series(self.shifts, _positive) and len(self.shifts) == 3
        check(shifts, self, "shifts", "three numbers above 0")
        check(is_number(self.jump) and self.jump >= 2, self, "jump", "a number of at least 2")
        check(is_number(self.ratio) and 0 <= self.ratio <= 1, self, "ratio", "between 0 and 1")
        check(self.regions in ("edges", "random"), self, "regions", '"edges" or "random"')
        check_words(self)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to a model whose tokens carry coordinates; raises for others."""
        if not denoiser.family.coordinates:
            raise AccelError(
                f"RALU mixes tokens of two sizes, which needs their coordinates as an input; "
                f"{type(denoiser.module).__name__} has none (FLUX has). Use Progressive"
            )
        return stage(denoiser, self, self.positions, self.noise)

    def stages(self, levels: NoiseLevels) -> list[Stage]:
        """Three stages; two where `ratio` leaves nothing to the second or the third."""
        if levels.kind != "flow":
            raise AccelError("RALU is for flow matching; this scheduler is not")
        one, two, three = self.shares
        first, second = (1 - end for end in self.ends)
        parts = [(one, first, 0), (two, second, 1), (three, 0.0, 2)]
        if self.ratio == 1:
            parts = [(one, first, 0), (two + three, 0.0, 2)]
        if self.ratio == 0:
            parts = [(one + two, second, 0), (three, 0.0, 2)]
        return self._staged(levels, parts)

    def _staged(self, levels: NoiseLevels, parts: list[tuple[float, float, int]]) -> list[Stage]:
        found: list[Stage] = []
        begin, share, start = 0, 0.0, 1.0
        for part, end, shift in parts:
            share += part
            stop = round(levels.steps * share)
            if stop <= begin:
                raise AccelError(f"RALU: {levels.steps} steps are too few for shares {self.shares}")
            sigmas = shifted(start, end, stop - begin, self.shifts[shift])
            found.append(Stage(sigmas, 1.0 if end == 0 else 0.5))
            begin = stop
            if end > 0:
                start = levels.noisier(end, self.jump, "the next stage")
        return found

    def cross(self, crossing: Crossing) -> tuple[Layout, Tensor]:
        """Split the chosen tokens, at the last boundary all that are left."""
        full = crossing.grid(1.0)
        layout = Layout.resized(full, full, self.positions)
        if crossing.after.scale < 1:
            layout = Layout.mixed(crossing.layout, self._chosen(crossing))
        return layout, crossing.repeat(layout)

    def _chosen(self, crossing: Crossing) -> Tensor:
        """Coarse tokens to split, (live,) of bool."""
        count = len(crossing.layout.pick)
        score = draw_noise(crossing.noisy, (1, count), crossing.run.generator)[0].float().cpu()
        if self.regions == "edges":
            score = edges_in(crossing, count) + 1e-3 * torch.sigmoid(score)
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[score.topk(int(self.ratio * count)).indices] = True
        return chosen


def shifted(start: float, end: float, steps: int, shift: float) -> Sigmas:
    """`steps` + 1 levels that are evenly spaced before the timestep shift."""
    first, last = (sigma / (shift - (shift - 1) * sigma) for sigma in (start, end))
    line = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    inner = (shift * line / (1 + (shift - 1) * line)).tolist()[1:-1]
    return (start, *inner, end)


def edges_in(crossing: Crossing, count: int) -> Tensor:
    """Edge pixels of the decoded clean estimate in each coarse token, (count,)."""
    assert crossing.layout.grid is not None  # the first stage is a grid
    _, rows, columns = crossing.layout.grid
    pictures = crossing.decoded(crossing.form.planes(crossing.clean, crossing.layout.grid))
    luma = torch.tensor([0.299, 0.587, 0.114]).to(pictures)
    gray = torch.einsum("c,bchw->bhw", luma, ((pictures + 1) / 2).clamp(0, 1) * 255)
    found = edge_pixels(gray.round().float()).sum(0)[None, None]
    blocks = functional.adaptive_avg_pool2d(found, (rows, columns))
    return blocks.flatten()[:count].cpu() * (found.numel() / count)


def edge_pixels(gray: Tensor) -> Tensor:
    """Canny's edges of (batch, height, width) in 0…255: 1.0 on edges."""
    x = functional.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=gray.device)
    gradient = functional.conv2d(x, torch.stack((sobel, sobel.T))[:, None])
    size = gradient.abs().sum(1)
    thin = size >= _neighbours(size, gradient)
    strong, weak = thin & (size > HIGH), thin & (size > LOW)
    edges = strong
    while True:  # weak pixels that touch an edge become edges
        grown = functional.max_pool2d(edges.float()[:, None], 3, 1, 1)[:, 0].bool() & weak
        if torch.equal(grown, edges):
            return edges.float()
        edges = grown


def _neighbours(size: Tensor, gradient: Tensor) -> Tensor:
    """The larger of each pixel's two neighbours along its gradient."""
    across, down = gradient[:, 0], gradient[:, 1]
    padded = functional.pad(size, (1, 1, 1, 1))
    height, width = size.shape[-2:]

    def pair(row: int, column: int) -> Tensor:
        one = padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
        two = padded[:, 1 - row : 1 - row + height, 1 - column : 1 - column + width]
        return torch.maximum(one, two)

    flat, steep = down.abs() < 0.4142 * across.abs(), down.abs() > 2.4142 * across.abs()
    diagonal = torch.where(across * down > 0, pair(1, 1), pair(1, -1))
    return torch.where(flat, pair(0, 1), torch.where(steep, pair(1, 0), diagonal))
