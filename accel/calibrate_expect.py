"""What is expected of a candidate: its prediction, corrected by runs of candidates like it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from accel.calibrate_fit import Candidate
from accel.calibrate_replay import EARLY, USUAL
from accel.calibrate_trials import Trial

_NEAREST = 3
"""Runs that a prediction is corrected by."""
_FEWEST = 4
"""Runs that tell something of weights."""
_UNBIASED = 2
"""Prompts that the bare prediction of a speed counts as."""
_UNKNOWN_OFFSET = 0.0
"""dB at a predicted error of 1 before any run; medians from −6 to 12 on the zoo."""


Runs = Sequence[tuple[Candidate, Trial]]


class Expected:
    """What is expected after some runs."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.weights: dict[Any, list[int]] = {}

    def early(self, candidate: Candidate) -> list[int]:
        """Weights of `EARLY`, those first that the runs of its kind, or else all, speak for.

        Whose predicted errors the measured PSNRs follow most closely, up to an offset.
        """
        kinds = _kinds(candidate)
        if kinds not in self.weights:
            own = [run for run in self.runs if _kinds(run[0]) == kinds]
            known = own if len(own) >= _FEWEST else self.runs

            def scatter(weight: int) -> float:
                if len(known) < _FEWEST:
                    return abs(weight - USUAL)
                offsets = [trial.psnr - decibels(each, weight) for each, trial in known]
                return statistics.pvariance(offsets)

            self.weights[kinds] = sorted(range(len(EARLY)), key=scatter)
        return self.weights[kinds]

    def psnr(self, candidate: Candidate, place: int = 0) -> float:
        """dB, by the predicted error and what the candidates most like it had beside theirs.

        `place`: with the weight of early errors that the runs speak for at this place.
        """
        weight = self.early(candidate)[place]
        near = _nearest(candidate, self.runs, weight)
        offsets = [trial.psnr - decibels(each, weight) for each, trial in near]
        offset = statistics.median(offsets) if offsets else _UNKNOWN_OFFSET
        return decibels(candidate, weight) + offset

    def speedup(self, candidate: Candidate) -> float:
        """The predicted speed-up, corrected by all runs of its kind, or else by all there are.

        By the median prompt: all runs of a prompt share the noise of its untouched run, which is
        more than what predictions are off by. So these count as `_UNBIASED` prompts too.
        """
        kinds = _kinds(candidate)
        prompts: dict[int, list[float]] = {}
        for each, trial in [run for run in self.runs if _kinds(run[0]) == kinds] or self.runs:
            ratio = trial.speedup / each.prediction.speedup
            prompts.setdefault(trial.prompt, []).append(ratio)
        ratios = [*map(statistics.median, prompts.values()), *[1.0] * _UNBIASED]
        return candidate.prediction.speedup * statistics.median(ratios)


def _nearest(candidate: Candidate, runs: Runs, weight: int) -> list[tuple[Candidate, Trial]]:
    """Runs with the same kinds of methods first, then those of nearest predicted error."""
    here, kinds = decibels(candidate, weight), _kinds(candidate)

    def distance(run: tuple[Candidate, Trial]) -> tuple[bool, float]:
        return _kinds(run[0]) != kinds, abs(decibels(run[0], weight) - here)

    return sorted(runs, key=distance)[:_NEAREST]


def _kinds(candidate: Candidate) -> tuple[tuple[str, bool], ...]:
    """What errs in the same way: methods by name, and whether they look across branches."""
    every = candidate.methods
    return tuple((type(each).__name__, getattr(each, "across", False)) for each in every)


def decibels(candidate: Candidate, weight: int) -> float:
    """The predicted error in dB, with the beginning's errors weighed by one of `EARLY`."""
    return -20 * math.log10(max(candidate.prediction.drifts[weight], 1e-9))
