"""What is expected of a candidate: its prediction, corrected by runs of candidates like it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from accel.calibrate_fit import Candidate
from accel.calibrate_trials import Trial

_NEAREST = 3
"""Runs that a prediction is corrected by."""
_UNKNOWN_OFFSET = 0.0
"""dB at a predicted error of 1 before any run; medians from −6 to 12 on the zoo."""


Runs = Sequence[tuple[Candidate, Trial]]


def psnr(candidate: Candidate, runs: Runs) -> float:
    """dB, by the predicted error and what the candidates most like it had beside theirs."""
    offsets = [trial.psnr - _decibels(each) for each, trial in _nearest(candidate, runs)]
    return _decibels(candidate) + (statistics.median(offsets) if offsets else _UNKNOWN_OFFSET)


def speedup(candidate: Candidate, runs: Runs) -> float:
    """The predicted speed-up, corrected by the runs of the candidates most like it."""
    near = _nearest(candidate, runs)
    ratios = [trial.speedup / each.prediction.speedup for each, trial in near]
    return candidate.prediction.speedup * (statistics.median(ratios) if ratios else 1.0)


def _nearest(candidate: Candidate, runs: Runs) -> list[tuple[Candidate, Trial]]:
    """Runs with the same kinds of methods first, then those of nearest predicted error."""
    here, kinds = _decibels(candidate), _kinds(candidate)

    def distance(run: tuple[Candidate, Trial]) -> tuple[bool, float]:
        return _kinds(run[0]) != kinds, abs(_decibels(run[0]) - here)

    return sorted(runs, key=distance)[:_NEAREST]


def _kinds(candidate: Candidate) -> list[Any]:
    """What errs in the same way: methods by name, and what a schedule was made for."""
    return [(type(each).__name__, getattr(each, "early", None)) for each in candidate.methods]


def _decibels(candidate: Candidate) -> float:
    return -20 * math.log10(max(candidate.prediction.error, 1e-9))
