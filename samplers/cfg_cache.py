"""CFG-Cache: the difference between the branches changes slowly; keep it, band by band."""

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
class CfgCache:
    """On most steps replace the unconditional prediction by the conditional one plus an old gap.

    Lv et al., "FasterCache", ICLR 2025, its CFG-Cache. On a full step d = u − c is split in the
    plane of rows and columns by a disc of radius ⌊min(rows, columns)/5⌋ around zero frequency. On
    the others û = c + low + high, after low ← `low_gain`·low while the step is in the first
    `switch` share of the run and high ← `high_gain`·high after it; gains compound until the next
    full step, as in the released code. Full steps: all in the first `start` share, then every
    `interval`-th. The FFT is taken of d alone, once a full step: the bands of c add up to c.
    Packed tokens are unpacked to pixels first.

    Static: rows of a batch are independent. Holds two tensors of the prediction's size.
    """

    slot: ClassVar[str] = "guidance"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 3},
        {},
        {"interval": 10, "start": 0.1, "low_gain": 1.0, "high_gain": 1.0},
    )

    interval: int = 5
    start: float = 0.33
    low_gain: float = 1.1
    high_gain: float = 1.1
    switch: float = 0.6

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        for field in ("start", "switch"):
            value = getattr(self, field)
            check(is_number(value) and 0 <= value <= 1, self, field, "a share between 0 and 1")
        for field in ("low_gain", "high_gain"):
            value = getattr(self, field)
            check(is_number(value) and value > 0, self, field, "a number > 0")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the guidance branches."""
        return guide(denoiser, lambda: _Bands(self), "CfgCache")


class _Bands:
    def __init__(self, settings: CfgCache) -> None:
        self.settings, self.skipped = settings, 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def begin(self, context: GuidanceContext) -> str:
        early = context.step < self.settings.start * context.total
        if early or self.low is None or self.skipped >= self.settings.interval - 1:
            return "full"
        return "cond"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        gap = (uncond - cond).float()
        self.low = context.tokens(_low_band(context.planes(gap)))
        self.high, self.skipped = gap - self.low, 0
        return uncond

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        assert self.low is not None and self.high is not None  # the first step is full
        self.skipped += 1
        if context.step < self.settings.switch * context.total:
            self.low = self.low * self.settings.low_gain
        else:
            self.high = self.high * self.settings.high_gain
        return (cond.float() + self.low + self.high).to(cond.dtype)


def _low_band(maps: Tensor) -> Tensor:
    """What lies inside the disc, of (…, rows, columns)."""
    rows, columns = maps.shape[-2:]
    vertical = torch.fft.fftfreq(rows, 1 / rows, device=maps.device)
    horizontal = torch.fft.rfftfreq(columns, 1 / columns, device=maps.device)
    radius = min(rows, columns) // 5
    inside = vertical[:, None] ** 2 + horizontal[None, :] ** 2 <= radius**2
    band: Tensor = torch.fft.irfft2(torch.fft.rfft2(maps) * inside, s=(rows, columns))
    return band
