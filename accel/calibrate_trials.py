"""Real runs of candidates against the untouched pipeline; every run is on disk when it is done."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accel import calibrate_probe, generate, metrics
from accel.calibrate_fit import Candidate
from accel.calibrate_profile import Profile, profile, write_json
from accel.fingerprint import described, fingerprint, schedule
from accel.method import AccelError
from accel.patching import patched, stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_DB = 100.0
_STATE = "trials.json"


@dataclass(frozen=True)
class Trial:
    """One run of one candidate: dB against the untouched run, seconds of both, share computed."""

    prompt: int
    psnr: float
    seconds: float
    untouched_seconds: float
    share: float

    @property
    def speedup(self) -> float:
        """Of this pair of runs."""
        return self.untouched_seconds / self.seconds


class Trials:
    """All runs of a calibration. With a `folder` a killed one goes on where it was.

    `prompts[i]` runs with seed i. `generations`: what the runs so far cost, in untouched ones, also
    those of earlier processes.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        call: Mapping[str, Any],
        folder: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.pipe, self.prompts, self.call = pipe, list(prompts), dict(call)
        self.folder, self.say = folder, say
        self.found: dict[str, list[Trial]] = {}
        self.generations = 0.0
        self.begun: dict[str, int] = {}
        """Targets of this folder, with the number of candidates tried before each."""
        self.references: dict[int, tuple[NDArray[np.uint8], float]] = {}
        self.about = {
            "fingerprint": fingerprint(pipe),
            "prompts": self.prompts,
            "call": described(self.call),
            "scheduler": schedule(pipe),
        }
        self.merged: dict[str, float] = {}
        """Generations taken over from other folders."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / _STATE).exists():
                self.merge(folder)
            else:  # what the folder is of is known before anything lies in it
                self.save()

    def merge(self, folder: Path) -> None:
        """Take over the runs of a folder of the same model, prompts, call and scheduler."""
        file = folder / _STATE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            for name, value in self.about.items():
                if state.get(name) != value:
                    raise AccelError(
                        f"calibration {file}: of another {name}; use another folder, or this "
                        "pipeline with the same prompts, call and scheduler"
                    )
            spent = float(state["generations"])
            if folder == self.folder:
                self.generations, self.begun = spent, dict(state["begun"])
                self.merged = dict(state["merged"])
            else:
                place = str(folder.resolve())
                self.generations += max(spent - self.merged.get(place, 0.0), 0.0)
                self.merged[place] = spent
            self._take(state["trials"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AccelError(f"calibration {file}: cannot be read ({error})") from error

    def _take(self, trials: Mapping[str, Any]) -> None:
        """Runs of candidates on prompts that are not known yet."""
        for key, rows in trials.items():
            known = self.found.setdefault(key, [])
            fresh = [Trial(**row) for row in rows]
            known += [each for each in fresh if each.prompt not in {one.prompt for one in known}]

    def save(self) -> None:
        """Write what is known, in one piece, with the runs that another process wrote meanwhile."""
        if self.folder is None:
            return
        file = self.folder / _STATE
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._take(json.loads(file.read_text(encoding="utf-8"))["trials"])
        rows = {key: [vars(each) for each in found] for key, found in self.found.items()}
        counts = {"generations": self.generations, "begun": self.begun, "merged": self.merged}
        write_json(file, {**self.about, **counts, "trials": rows})

    def record(self, count: int) -> Profile:
        """Profile the first `count` prompts.

        Of one prompt alone the recorded run is the reference, in the seconds that recording left;
        such a run is 10 % slower than an untouched one all the same.
        """
        runs: dict[int, tuple[NDArray[np.uint8], float]] = {}

        def run(call: dict[str, Any], seed: int) -> None:
            runs[seed] = generate.make(self.pipe, call, seed)

        place = None if self.folder is None else self.folder / "profile"
        made = profile(
            self.pipe,
            self.prompts[:count],
            call=self.call,
            folder=place,
            variants=calibrate_probe.variants(),
            run=run,
        )
        for each in made.prompts:
            if each.seed in runs:
                picture, seconds = runs[each.seed]
                self.generations += seconds / each.seconds["run"]
                if len(self.prompts) == 1:
                    self.references[each.seed] = (picture, each.seconds["run"])
        self.save()
        return made

    def untouched(self, prompt: int) -> tuple[NDArray[np.uint8], float]:
        """The untouched picture and its seconds."""
        if prompt not in self.references:
            self.references[prompt] = self._make(prompt)
            self.generations += 1
        return self.references[prompt]

    def run(self, candidate: Candidate, prompt: int) -> Trial:
        """The trial of a candidate on a prompt; made only when it is not known."""
        known = self.found.setdefault(candidate.key, [])
        for each in known:
            if each.prompt == prompt:
                return each
        reference, seconds = self.untouched(prompt)
        call = self.call | {"prompt": self.prompts[prompt]}
        with patched(self.pipe, *candidate.methods):
            (array,), own = generate.render(self.pipe, call, [prompt])
            share = stats(self.pipe).share_computed
        decibels = 0.0  # of one that broke
        if np.isfinite(array).all():
            decibels = psnr(generate.pixels(array), reference)
        trial = Trial(prompt, decibels, own, seconds, share)
        self.generations += own / seconds
        known.append(trial)
        self.save()
        self.say(f"{label(candidate)}: {trial.psnr:.1f} dB, {trial.speedup:.2f}x")
        return trial

    def of(self, candidate: Candidate) -> list[Trial]:
        """Every trial of a candidate."""
        return self.found.get(candidate.key, [])

    def _make(self, prompt: int) -> tuple[NDArray[np.uint8], float]:
        call = self.call | {"prompt": self.prompts[prompt]}
        return generate.make(self.pipe, call, prompt)


def psnr(picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """dB, at most 100."""
    a, b = torch.from_numpy(picture) / 255, torch.from_numpy(reference) / 255
    return min(metrics.psnr(a, b), _MOST_DB)


def label(candidate: Candidate) -> str:
    """The methods by name, with the share they compute."""
    names = " + ".join(type(method).__name__ for method in candidate.methods)
    return f"{names} ({candidate.prediction.share:.0%} computed)"


def median(trials: Sequence[Trial], name: str) -> float:
    """The median of a field over trials."""
    return float(statistics.median(getattr(each, name) for each in trials))


class Deadline:
    """A budget of minutes; None never ends."""

    def __init__(self, minutes: float | None) -> None:
        self.ends = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        """Whether the time is spent."""
        return self.ends is not None and time.monotonic() > self.ends
