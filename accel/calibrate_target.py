"""What a calibration is asked for, and how near a candidate comes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accel.choosing import QUALITIES
from accel.method import AccelError, is_number

_SPREAD = 1.645
"""Standard deviations below the mean that a wanted PSNR must hold at.

That is 95 % of prompts: nine of ten keep it also when the luckiest of several was chosen.
"""
_ENOUGH = 0.97
"""Of a wanted speed-up: what counts as reached, because pairs of runs differ by as much."""
_NEAR, _FASTER = 1.05, 30.0
"""Of a wanted speed-up: up to where it is near; and dB that each doubling beyond must be worth."""
_SPARE_DECIBELS, _SPARE_SPEED = 2.0, 0.02
"""What each further candidate has to spare: dB, or a share of the wanted speed."""
_USUAL_SPREAD, _USUAL_FREEDOM = 3.0, 4
"""dB between prompts, and how many prompts that is worth beside those at hand."""


@dataclass(frozen=True)
class Target:
    """What is wanted: at least `speedup`, or at least `psnr` dB.

    `typical`: that is meant of the median prompt, else of nine prompts in ten. `near`: a speed-up
    far above the wanted one left quality unused; for choosing what to run, not among results.
    """

    speedup: float | None = None
    psnr: float | None = None
    typical: bool = True
    near: bool = False

    @classmethod
    def of(cls, speedup: float | None, psnr: float | None, quality: str | None) -> Target:
        """From the arguments of `calibrate`; "balanced" when none is given."""
        if sum(each is not None for each in (speedup, psnr, quality)) > 1:
            raise AccelError("accel.calibrate: give one of speedup, psnr and quality")
        if quality is not None and quality not in QUALITIES:
            raise AccelError(f"quality={quality!r}; accepted: {', '.join(QUALITIES)}")
        if speedup is not None and not (is_number(speedup) and speedup > 1):
            raise AccelError(f"speedup={speedup!r}: a number above 1 is accepted")
        if psnr is not None and not (is_number(psnr) and psnr > 0):
            raise AccelError(f"psnr={psnr!r}: a number of dB above 0 is accepted")
        if speedup is None and psnr is None:
            return cls(psnr=QUALITIES[quality or "balanced"])
        return cls(speedup, psnr, typical=psnr is None)

    def decibels(self, values: Sequence[float]) -> float:
        """What counts of the PSNRs of several prompts, so that other prompts have as much.

        A median is lowered by its standard error: of few prompts it is often higher than of all.
        Nine of ten are above the prediction limit of a normal distribution with this mean and
        deviation, both of which are known the worse the fewer the values are (Student's t); the
        deviation is a mean of theirs and the usual one.
        """
        count = len(values)
        spread = statistics.stdev(values) if count > 1 else 0.0
        if self.typical:
            return statistics.median(values) - spread / math.sqrt(count)
        if count == 1:  # the most typical prompt
            return values[0] - _SPREAD * _USUAL_SPREAD
        freedom = _USUAL_FREEDOM + count - 1
        squares = _USUAL_FREEDOM * _USUAL_SPREAD**2 + (count - 1) * spread**2
        factor = student(_SPREAD, freedom) * math.sqrt(1 + 1 / count)
        return statistics.fmean(values) - factor * math.sqrt(squares / freedom)

    def safer(self, rank: int) -> Target:
        """The same with something to spare, more for each further of several candidates."""
        if self.psnr is not None:
            return replace(self, psnr=self.psnr + rank * _SPARE_DECIBELS)
        return replace(self, speedup=(self.speedup or 1.0) * (1 + rank * _SPARE_SPEED))

    def score(self, speedup: float, psnr: float) -> tuple[bool, float]:
        """Larger is better: reaching the target first, then what is free to choose."""
        if self.speedup is None:
            reached = psnr >= (self.psnr or 0)
            return (reached, speedup if reached else psnr)
        reached = speedup >= _ENOUGH * self.speedup
        if self.near:
            psnr -= _FASTER * max(math.log2(speedup / (_NEAR * self.speedup)), 0.0)
        return (reached, psnr if reached else -abs(math.log(speedup / self.speedup)))


def student(z: float, freedom: int) -> float:
    """The quantile of Student's t where the normal distribution's is z (Cornish and Fisher)."""
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + (z**3 + z) / (4 * freedom) + second
