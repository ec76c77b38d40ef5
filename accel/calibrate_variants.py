"""Kernels and stages as candidates: what a profile says of them, alone and beside caches.

A replay of sketches cannot run them. What they cost is known from probes (`accel.calibrate_probe`).
What a kernel errs is known from them too; what stages change is what the run had not decided yet
where its last stage begins, at most: it may be decided anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from accel import registry
from accel.calibrate_probe import key, size_key
from accel.calibrate_profile import Profile, PromptProfile
from accel.calibrate_replay import USUAL, Prediction, Replay, root_mean_square
from accel.method import AccelError, Method
from accel.noise_levels import NoiseLevels
from accel.recipe import Recipe

SLOTS = ("attention", "linear", "size")
"""What is predicted here and not by replays."""
_WORTH = 0.95
"""A variant that costs more than this share of a plain call is no candidate: probes are noisy."""


@dataclass(frozen=True)
class Variant:
    """`seconds`: of the denoiser's calls, over the plain ones'. `errors`: as of a `Prediction`."""

    method: Method
    seconds: float
    errors: tuple[float, ...]

    def beside(self, prediction: Prediction, replays: Sequence[Replay]) -> Prediction:
        """The prediction for methods, with this variant as well."""
        errors = tuple(map(math.hypot, prediction.errors, self.errors))
        own = root_mean_square(self.errors)
        drifts = tuple(math.hypot(each, own) for each in prediction.drifts)
        spent = [each.record.seconds for each in replays]
        outside = sum(each["run"] - each["call"] for each in spent) / len(spent)
        seconds = outside + self.seconds * (prediction.seconds - outside)
        return replace(
            prediction,
            error=drifts[USUAL],
            errors=errors,
            drifts=drifts,
            seconds=seconds,
            speedup=prediction.speedup * prediction.seconds / seconds,
        )


def variants(profile: Profile, replays: Sequence[Replay]) -> list[Variant]:
    """Those that were measured to save time on this machine."""
    found = [*_kernels(profile), *_stages(profile, replays)]
    return [each for each in found if each.seconds < _WORTH]


def combinations(several: Sequence[Variant]) -> Iterator[tuple[Variant, ...]]:
    """None, one, and several of different slots."""
    slots: dict[str, list[Variant]] = {}
    for each in several:
        slots.setdefault(each.method.slot, []).append(each)
    chosen: list[tuple[Variant, ...]] = [()]
    for options in slots.values():
        chosen += [(*before, each) for before in chosen for each in options]
    yield from chosen


def fits(variant: Variant, methods: Sequence[Method]) -> bool:
    """Stages begin anew at each size: what was fitted to the steps of a whole run does not hold."""
    tied = any(getattr(each, "schedule", None) is not None for each in methods)
    return variant.method.slot != "size" or not tied


def _kernels(profile: Profile) -> Iterator[Variant]:
    """Probed kernels; an "adaptive" plan costs and errs as the kernels that it names do."""
    probes, prompts = profile.probes, len(profile.prompts)
    for name, (seconds, error) in probes.items():
        if not name.startswith("size"):
            yield Variant(_method(name), seconds, (error,) * prompts)
    kind = registry.method("attention")
    for text in profile.measured:
        method = _method(text)
        named = [one for parts in (getattr(method, "plan", None) or {}).values() for one in parts]
        found = [probes.get(key(kind(kernel=one)), (1.0, 0.0)) for one in named]
        if found:
            seconds, error = np.mean(found, axis=0)
            yield Variant(method, float(seconds), (float(error),) * prompts)


def _method(text: str) -> Method:
    return Recipe.model_validate({"entries": [json.loads(text)]}).methods[0]


def _stages(profile: Profile, replays: Sequence[Replay]) -> Iterator[Variant]:
    progressive, bottleneck = registry.method("progressive"), registry.method("bottlenecksampling")
    levels = noise_levels(profile.prompts[0])
    for method in (progressive(shares=(0.3, 0.7)), progressive(), bottleneck()):
        try:
            stages = method.stages(levels)
            costs = [(len(each.sigmas) - 1) * _cost(profile, each.scale) for each in stages]
        except (AccelError, KeyError):  # too few steps, or a size that was not probed
            continue
        start = stages[-1].sigmas[0]
        step = next(place for place, sigma in enumerate(levels.sigmas) if sigma <= start)
        errors = tuple(each.undecided(step) for each in replays)
        yield Variant(method, sum(costs) / levels.steps, errors)


def _cost(profile: Profile, scale: float) -> float:
    return 1.0 if scale == 1 else profile.probes[size_key(scale)][0]


def noise_levels(record: PromptProfile) -> NoiseLevels:
    """The levels of a recorded run."""
    ratios = np.exp(-np.asarray(record.log_snr, dtype=np.float64))
    flow = record.prediction == "flow"
    sigmas = ratios / (1 + ratios) if flow else ratios
    kind, prediction = ("flow", "velocity") if flow else ("ve", record.prediction)
    return NoiseLevels(kind, prediction, (*sigmas.tolist(), 0.0), train=1000)  # type: ignore[arg-type]
