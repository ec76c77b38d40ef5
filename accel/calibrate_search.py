"""`accel.calibrate`: from prompts and a wanted speed or quality to a recipe with its evidence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.calibrate_expect import Expected
from accel.calibrate_fit import Candidate, candidates, predicted, refine
from accel.calibrate_profile import Profile, checked_prompts
from accel.calibrate_replay import EARLY
from accel.calibrate_result import Calibration, written
from accel.calibrate_target import Target
from accel.calibrate_trials import Deadline, Trial, Trials
from accel.method import AccelError, is_number
from accel.patching import untouched

logger = logging.getLogger(__name__)

FIRST, LAST = 14, 4
"""Candidates that run on the recorded prompts, and those that are validated on others too."""
GUIDED = 8
"""Of the first ones, and for each further target in a folder: what the runs before suggest."""
SINGLE = 3.0
"""Generations that the search may cost where there is one prompt alone."""
DOUBT = (0, 1, 0, 2)
"""Guided runs in turn take what would be best with the likeliest weight of early errors, …"""
VALIDATION = 4


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    speedup: float | None = None,
    psnr: float | None = None,
    quality: str | None = None,
    budget: float | None = None,
    call: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    merge: Sequence[str | Path] = (),
    say: Callable[[str], None] = logger.info,
) -> Calibration:
    """Search methods for a pipeline and write down what they were measured to give.

    Up to three prompts are profiled; schedules × forecasts × guidance policies × kernels × stages
    are predicted on them (see `accel.calibrate_replay`, `accel.calibrate_variants`); the most
    promising are really run, on more prompts as they become fewer; the last are validated on up to
    four that took no part. Give `speedup` (at least), `psnr` (dB that nine of ten prompts keep) or
    `quality` ("lossless", "balanced", "fast": 45, 30, 25 dB of the median prompt; by default
    "balanced"). One prompt gives a first recipe at the cost of three generations, eight validate a
    front at that of twenty to forty. `budget`: minutes after which no new candidate is tried.

    `folder` keeps every run: a killed calibration goes on from there, and one for another target
    adds its points to the front. `shard` (i, n) makes only the first rung's runs i, i + n, … into
    its folder, and `merge` takes over other folders' runs. Raises `AccelError` for bad arguments or
    another model's folder, `UnreachableError` when nothing reaches the target.
    """
    texts = checked_prompts(prompts, call, ["generator", "output_type", "return_dict"])
    if budget is not None and not (is_number(budget) and budget >= 0):
        raise AccelError(f"budget={budget!r}: a number of minutes ≥ 0 is accepted")
    if shard is not None and not (0 <= shard[0] < shard[1]):
        raise AccelError(f"shard={shard!r}: (i, n) with 0 ≤ i < n is accepted")
    target = Target.of(speedup, psnr, quality)
    place = Path(folder) if folder is not None else None
    with untouched(pipe):
        trials = Trials(pipe, texts, call or {}, place, say)
        for other in merge:
            trials.merge(Path(other))
        return _Search(trials, target, Deadline(budget)).run(shard)


class _Search:
    def __init__(self, trials: Trials, target: Target, deadline: Deadline) -> None:
        self.trials, self.target, self.deadline = trials, target, deadline
        self.aim = replace(target, near=True)
        count = len(trials.prompts)
        held = min(VALIDATION, count // 2)
        self.tuning = list(range(min(3, count - held)))
        self.validation = list(range(count - held, count))
        self.profile: Profile = trials.record(len(self.tuning))
        self.profile.check(trials.pipe)
        self.all = candidates(self.profile)
        trials.say(f"{len(self.all)} candidates predicted from {len(self.tuning)} recorded runs")
        known = {each.key for each in self.all}
        self.enough = FIRST
        """Candidates that what is expected of others goes by, also when resumed."""
        self.all += [predicted(self.profile, key) for key in trials.found if key not in known]

    def run(self, shard: tuple[int, int] | None) -> Calibration:
        known = self.trials.begun.setdefault(repr(self.target), len(self._tried()))
        spread = self._spread(FIRST - GUIDED)
        if len(self.trials.prompts) == 1:
            spread = [self._most_promising(self.all)]
        if shard is not None:
            if shard[0] >= len(spread):
                raise AccelError(
                    f"shard {shard[0] + 1} of {shard[1]}: the first rung has {len(spread)} "
                    f"candidates, so at most {len(spread)} shards have something to do"
                )
            spread = spread[shard[0] :: shard[1]]
        for candidate in spread:
            if not self._enough():
                self._run(candidate, self.tuning)
        if shard is not None:
            return self._result(self._tried())
        self.enough = max(FIRST, known + GUIDED)
        self._guided_runs()
        calibration = self._result(self._finals())
        calibration.check(self.target)
        return calibration

    def _run(self, candidate: Candidate, prompts: Sequence[int]) -> None:
        for prompt in prompts:
            self.trials.run(candidate, prompt)

    def _finals(self) -> list[Candidate]:
        """The best, on the prompts that took no part."""
        if not self.validation:
            return self._tried()
        several = self._tried() if self._enough() else self.all
        for candidate in self._best(several, [self.tuning], LAST, self.aim):
            self._run(candidate, [*self.tuning, *self.validation])
        return [each for each in self._tried() if self._is_validated(each)]

    def _is_validated(self, candidate: Candidate) -> bool:
        """By this search, or by one for another target in the same folder."""
        seen = {each.prompt for each in self.trials.of(candidate)}
        return bool(self.validation) and {*self.validation} <= seen

    def _enough(self) -> bool:
        return self.deadline.over and bool(self._tried())

    def _best(
        self,
        several: Sequence[Candidate],
        groups: Sequence[list[int]],
        count: int,
        wanted: Target,
    ) -> list[Candidate]:
        """By the runs on groups of prompts, or by what is expected of candidates without.

        What is wanted must hold in each group. The first that is chosen reaches the target there;
        each further one has more to spare on other prompts.
        """
        left, chosen = {each.key: each for each in several}, list[Candidate]()
        known = [self._known(several, prompts) for prompts in groups]
        while left and len(chosen) < count:
            target = wanted.safer(len(chosen))

            def rank(key: str, target: Target = target) -> tuple[bool, float]:
                decibels = min(target.decibels(each[key][1]) for each in known)
                return target.score(known[-1][key][0], decibels)

            chosen.append(left.pop(max(left, key=rank)))
        return chosen

    def _known(
        self, several: Sequence[Candidate], prompts: list[int], doubt: int = 0
    ) -> dict[str, tuple[float, list[float]]]:
        """By key the speed-up that is expected, and each prompt's PSNR: measured, or expected.

        Expected by the first runs alone, so that later ones change no choice. `doubt`: of `DOUBT`.
        """
        first = self._first_runs()
        runs = first if prompts == self.tuning else self._runs(prompts)
        speeds, measured = Expected(runs), dict[str, list[float]]()
        for each, trial in runs:
            measured.setdefault(each.key, []).append(trial.psnr)
        qualities = [Expected([run for run in first if run[1].prompt == p]) for p in self.tuning]

        def decibels(each: Candidate) -> list[float]:
            seen = measured.get(each.key, [])
            whole = len(seen) == len(prompts)
            return seen if whole else [one.psnr(each, doubt) for one in qualities]

        return {each.key: (speeds.speedup(each), decibels(each)) for each in several}

    def _guided_runs(self) -> None:
        """Run what the predictions, corrected by all runs so far, say is best."""
        for each in self._tried():  # one was killed
            self._run(each, self.tuning)
        while len(self._tried()) < self.enough:
            left = [each for each in self.all if not self.trials.of(each)]
            if self.deadline.over or not left:
                return
            doubt = DOUBT[len(self._tried()) % len(DOUBT)]
            promising = self._most_promising(left, doubt)
            refined = refine(self.profile, promising)
            choice = promising if self.trials.of(refined) else refined
            speed = Expected(self._first_runs()).speedup(choice)
            cost = self.trials.generations + 1 / min(speed, choice.prediction.speedup)
            if len(self.trials.prompts) == 1 and cost > SINGLE:
                return
            self.all.append(choice)
            self._run(choice, self.tuning)

    def _spread(self, count: int) -> list[Candidate]:
        """From the cheapest to the best, each on the predicted front of another of `EARLY`."""
        fronts = [self._front(weight) for weight in range(len(EARLY))]
        found: dict[str, Candidate] = {}
        for index in range(count):
            front = fronts[index % len(fronts)]
            each = front[round(index * (len(front) - 1) / max(count - 1, 1))]
            found.setdefault(each.key, each)
        return list(found.values())

    def _front(self, weight: int) -> list[Candidate]:
        """What nothing cheaper is predicted to beat, cheapest first."""
        front: list[Candidate] = []
        for each in self.all:  # cheapest first
            if not front or each.prediction.drifts[weight] < front[-1].prediction.drifts[weight]:
                front.append(each)
        return front

    def _tried(self) -> list[Candidate]:
        keys: dict[str, Candidate] = {}
        for each in self.all:
            if self.trials.of(each):
                keys.setdefault(each.key, each)
        return list(keys.values())

    def _runs(self, prompts: Sequence[int]) -> list[tuple[Candidate, Trial]]:
        """Every run of some prompts, in the order in which they were made."""
        known = {each.key: each for each in self.all}
        found = self.trials.found.items()
        return [(known[key], one) for key, each in found for one in each if one.prompt in prompts]

    def _first_runs(self) -> list[tuple[Candidate, Trial]]:
        """Of the first candidates, on the recorded prompts."""
        keys = list(self.trials.found)[: self.enough]
        return [run for run in self._runs(self.tuning) if run[0].key in keys]

    def _most_promising(self, several: Sequence[Candidate], doubt: int = 0) -> Candidate:
        """By the predictions, corrected by what was run so far; `doubt`: of `DOUBT`."""
        known = self._known(several, self.tuning, doubt)

        def rank(candidate: Candidate) -> tuple[bool, float]:
            speed, decibels = known[candidate.key]
            return self.aim.score(speed, self.aim.decibels(decibels))

        return max(several, key=rank)

    def _result(self, chosen: Sequence[Candidate]) -> Calibration:
        validated = all(self._is_validated(each) for each in chosen)
        every = list(range(len(self.trials.prompts)))
        groups = [self.validation, every] if validated else [every]
        (best,) = self._best(chosen, groups, 1, self.target)
        recipe = written(self.profile, self.trials, self.validation, chosen, best)
        return Calibration(recipe, self.trials.generations)
