"""What a calibration found, written down: the recipe with its front and its evidence."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accel
from accel.calibrate_fit import Candidate, replays, split
from accel.calibrate_profile import Profile
from accel.calibrate_target import Target
from accel.calibrate_trials import Trials, label, median
from accel.method import AccelError
from accel.recipe import Choice, Recipe, Validity

MARGIN = 1.5
"""Of the guard's limit over what was seen."""


class UnreachableError(AccelError):
    """No candidate reached the target; `calibration` holds the best that was reached."""

    def __init__(self, message: str, calibration: Calibration) -> None:
        super().__init__(message)
        self.calibration = calibration


@dataclass(frozen=True)
class Calibration:
    """The chosen recipe (its `front` holds the other points) and the runs it cost."""

    recipe: Recipe
    generations: float
    """What the runs cost, in untouched ones."""

    @property
    def front(self) -> tuple[Choice, ...]:
        """The Pareto front that was measured on the validation prompts, fastest first."""
        return self.recipe.front

    def save(self, path: str | Path) -> None:
        """Write the recipe with its front and evidence."""
        self.recipe.save(path)

    def check(self, target: Target) -> None:
        """Raise `UnreachableError` when even the best point misses (speed may be 5 % short)."""
        front = self.front
        if target.speedup is not None:
            fastest = max(choice.speedup for choice in front)
            if fastest < 0.95 * target.speedup:
                at = f"speedup={target.speedup:g} was not reached; the fastest is {fastest:.2f}"
                raise UnreachableError(at, self)
        elif target.psnr is not None:
            whom = "the closest is"
            best = max(choice.psnr for choice in front)
            if not target.typical:
                whom = "of the closest, nine prompts in ten can be expected to keep"
                best = max(target.decibels(row["psnr_each"]) for row in self.recipe.measured)
            if best < target.psnr:
                at = f"psnr={target.psnr:g} was not reached; {whom} {best:.1f} dB"
                raise UnreachableError(at, self)


def written(
    profile: Profile,
    trials: Trials,
    validation: Sequence[int],
    chosen: Sequence[Candidate],
    best: Candidate,
) -> Recipe:
    """The recipe of the best candidate; its front are the chosen ones that no other beats."""
    rows = {each.key: _evidence(profile, trials, validation, each) for each in chosen}
    front = [
        Choice(
            entries=Recipe.of(each.methods).entries,
            speedup=rows[each.key]["speedup"],
            psnr=rows[each.key]["psnr"],
            share_computed=rows[each.key]["share_computed"],
        )
        for each in chosen
    ]
    kept = [one for one in front if not any(_beats(other, one) for other in front)]
    first = profile.prompts[0]
    validity = Validity(
        scheduler=first.scheduler,
        steps=(first.schedule,) * 2,
        latents=(first.latents,) * 2,
        levels=tuple(round(level, 4) for level in first.log_snr),
        change=_change(profile, chosen),
    )
    return Recipe(
        model=first.denoiser,
        source="accel.calibrate",
        valid_for=validity,
        entries=Recipe.of(best.methods).entries,
        front=tuple(sorted(kept, key=lambda each: -each.speedup)),
        measured=(rows[best.key], *(row for key, row in rows.items() if key != best.key)),
    )


def _change(profile: Profile, chosen: Sequence[Candidate]) -> float | None:
    """How far good stand-ins go, with a margin."""
    every = itertools.product(replays(profile), chosen)
    largest = max(replay.largest_change(*split(each.methods)[0]) for replay, each in every)
    return round(MARGIN * largest, 3) or None


def _evidence(
    profile: Profile, trials: Trials, validation: Sequence[int], candidate: Candidate
) -> dict[str, Any]:
    """What was measured on the validation prompts, or on all when there are none."""
    every = trials.of(candidate)
    rows = [each for each in every if each.prompt in validation] or every
    speeds = [each.speedup for each in rows]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {
        "methods": label(candidate),
        "fingerprint": profile.fingerprint,
        "speedup": median(rows, "speedup"),
        "speedup_spread": [min(speeds), max(speeds)],
        "psnr": median(rows, "psnr"),
        "psnr_each": [round(each.psnr, 2) for each in rows],
        "share_computed": median(rows, "share"),
        "prompts": len(rows),
        "validated": any(each.prompt in validation for each in rows),
        "predicted_error": candidate.prediction.error,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {trials.pipe.device}",
        "versions": {"accel": accel.__version__, **versions},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _beats(one: Choice, other: Choice) -> bool:
    better = one.speedup >= other.speedup and one.psnr >= other.psnr
    return better and (one.speedup, one.psnr) != (other.speedup, other.psnr)
