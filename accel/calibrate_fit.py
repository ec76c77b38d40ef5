"""From a profile to candidates: settings for a wanted cost, each with its predicted error."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from accel import registry
from accel.calibrate_profile import Profile
from accel.calibrate_replay import EARLY, Prediction, Replay, mean_prediction
from accel.calibrate_variants import SLOTS, Variant, combinations, fits, variants
from accel.method import AccelError, Method
from accel.optimal_steps import best_steps, forecast_costs, solver_strides
from accel.recipe import Recipe

KNOBS = {
    "magcache": ("threshold", 0.0, 2.0),
    "teacache": ("threshold", 0.0, 2.0),
    "firstblockcache": ("threshold", 0.0, 2.0),
    "easycache": ("threshold", 0.0, 2.0),
    "smoothcache": ("threshold", 0.0, 2.0),
    "blockcaching": ("threshold", 0.0, 4.0),
    "foresight": ("gamma", 0.0, 8.0),
    "dpcache": ("share", 1.0, 0.04),
    "fitcache": ("share", 1.0, 0.04),
    "bac": ("share", 1.0, 0.04),
    "ertacache": ("threshold", 0.0, 4.0),
    "unicp": ("threshold", 0.0, 2.0),
    "adacache": ("codebook", 0.0, 100.0),
    "linearag": ("share", 0.0, 1.0),
    "cfgcache": ("interval", 1, 40),
    "adaptiveguidance": ("threshold", 1.0, 0.5),
}
"""What `fit` turns: a setting, its value that saves nothing, and one that saves much; of a codebook
all bounds together, by that factor."""
_LAYERED = {"smoothcache", "blockcaching", "foresight", "bac", "unicp", "adacache"}
_GUIDANCE = ((3, 0.1), (5, 0.1), (10, 0.1), (5, 0.3), (10, 0.3), (20, 0.1))
_INTERVALS = (2, 3, 4, 5, 6, 8, 10, 12)
_SHARES = (0.5, 0.4, 0.3, 0.25, 0.2, 0.16, 0.14, 0.12, 0.1, 0.08, 0.06, 0.04)
_FINE = (0.38, 0.36, 0.34, 0.32, 0.28, 0.26, 0.24, 0.22, 0.18)
"""More shares for FitCache: a step more or less is a tenth of the speed-up at five times."""


@dataclass(frozen=True)
class Candidate:
    """Methods with all their tables, and what the replay predicts of them."""

    methods: tuple[Method, ...]
    prediction: Prediction

    @cached_property
    def key(self) -> str:
        """The methods as JSON: the same in another process."""
        return json.dumps([entry.model_dump() for entry in Recipe.of(self.methods).entries])


def replays(profile: Profile, layers: bool = False) -> list[Replay]:
    """One replay a recorded prompt."""
    return [Replay(each, layers) for each in profile.prompts]


def fit(profile: Profile, name: str, share: float, **settings: Any) -> Candidate:
    """Settings of method `name` that compute about `share` of the work, with measured tables.

    The method measures itself on the replayed profile and its knob (see `KNOBS`) is found by
    bisection; no run of the model is made. What a table needs beyond L2 norms is estimated from
    sketches: L1 errors by L2 ones. For `NABLA` the share is of the key blocks, by the recorded
    block maps, and no error is predicted (nan). Raises `AccelError` for a method without a knob.
    """
    key = name.lower()
    if key not in (*KNOBS, "nabla"):
        known = ", ".join((*KNOBS, "nabla"))
        raise AccelError(f"fit: {name} has no setting to turn; accepted: {known}")
    if not 0 < share <= 1:
        raise AccelError(f"fit: share={share!r} must be in (0, 1]")
    if key == "nabla":
        return _fit_nabla(profile, share, settings)
    knob, mild, strong = KNOBS[key]
    found, kind = replays(profile, key in _LAYERED), registry.method(key)
    best: Candidate | None = None
    for _ in range(12):
        middle = (mild + strong) / 2
        value: Any = round(middle) if isinstance(KNOBS[key][1], int) else middle
        if knob == "codebook":
            value = tuple((bound * middle, steps) for bound, steps in kind().entries)
        prediction = mean_prediction(found, kind(**{knob: value}, **settings))
        each = Candidate(prediction.settled, prediction)
        if best is None or _off(each, share) < _off(best, share):
            best = each
        if prediction.share > share:
            mild = middle
        else:
            strong = middle
    assert best is not None  # twelve were tried
    return best


def _fit_nabla(profile: Profile, share: float, settings: dict[str, Any]) -> Candidate:
    maps = profile.block_maps
    if not maps:
        raise AccelError(
            "fit: no block maps were recorded; give accel.profile variants=[NABLA(…)], and a model "
            "with as many tokens as NABLA(least=…)"
        )
    method: Method = registry.method("nabla")(**settings).fitted(maps, share)
    alone = mean_prediction(replays(profile))
    return Candidate((method,), replace(alone, share=share, error=float("nan"), errors=()))


def _off(candidate: Candidate, share: float) -> float:
    return abs(candidate.prediction.share - share)


def candidates(profile: Profile) -> list[Candidate]:
    """Schedules × forecasts × guidance policies × kernels × stages, predicted, cheapest first.

    Kernels and stages are those that saved time when they were probed. Schedules are the best
    steps for a line, for a held residual and for a fitted sum by the Gram matrix, and plain cycles;
    forecasts are the registry's linear ones and fitted sums.
    """
    found = replays(profile)
    guided = all(each.record.guided for each in found)
    policies = [(), *(((each,) for each in guidance_policies(profile)) if guided else ())]
    methods = ((cache, *policy) for cache in schedules(profile) for policy in policies)
    choices = list(combinations(variants(profile, found)))
    every = [
        Candidate((*each.methods, *(one.method for one in several)), _beside(each, several, found))
        for each in _predicted(found, (*policies, *methods))
        for several in choices
        if all(fits(one, each.methods) for one in several) and (each.methods or several)
    ]
    return sorted(every, key=lambda each: each.prediction.seconds)


def _beside(
    candidate: Candidate, several: Sequence[Variant], found: Sequence[Replay]
) -> Prediction:
    prediction = candidate.prediction
    for each in several:
        prediction = each.beside(prediction, found)
    return prediction


def predicted(profile: Profile, key: str) -> Candidate:
    """The candidate of a key, for methods that `candidates` does not list."""
    methods = Recipe.model_validate_json(f'{{"entries": {key}}}').methods
    return _of_methods(profile, replays(profile), methods)


def _of_methods(
    profile: Profile, found: Sequence[Replay], methods: tuple[Method, ...]
) -> Candidate:
    """Kernels and stages by their probes, the others by replays."""
    replayed, varied = split(methods)
    alone = Candidate(replayed, mean_prediction(found, *replayed))
    several = [each for each in variants(profile, found) if each.method in varied]
    return Candidate(methods, _beside(alone, several, found))


def split(methods: Iterable[Method]) -> tuple[tuple[Method, ...], tuple[Method, ...]]:
    """Methods that replays predict, and kernels and stages."""
    every = tuple(methods)
    replayed = tuple(each for each in every if each.slot not in SLOTS)
    return replayed, tuple(each for each in every if each.slot in SLOTS)


def _predicted(
    found: Sequence[Replay], several: Iterable[tuple[Method, ...]]
) -> Iterator[Candidate]:
    for methods in several:
        prediction = mean_prediction(found, *methods)
        if np.isfinite(prediction.error):
            yield Candidate(methods, prediction)


def guidance_policies(profile: Profile) -> list[Method]:
    """CFG-Cache at several intervals, guidance up to a share of the steps, and until agreement."""
    cfg, interval = registry.method("cfgcache"), registry.method("guidanceinterval")
    policies: list[Method] = [
        cfg(interval=every, start=start, low_gain=1.0, high_gain=1.0) for every, start in _GUIDANCE
    ]
    noise = profile.prompts[0].log_snr
    for share in (0.9, 0.75):
        edge = 2 * noise[int(share * len(noise))]
        policies.append(interval(highest=round(edge, 3)))
    agreement = float(np.median([each.agreement()[len(noise) // 2] for each in profile.prompts]))
    policies.append(registry.method("adaptiveguidance")(threshold=min(round(agreement, 5), 1.0)))
    return policies


def schedules(profile: Profile) -> list[Method]:
    """DPCache with the best steps for each share, plain cycles, each with several forecasts.

    Of the block chain, and of whole calls, which saves embeddings and head too. FitCache.
    """
    hold, newton = registry.approximator("holdresidual"), registry.approximator("newton")
    hicache, dpcache = registry.approximator("hicache"), registry.method("dpcache")
    sites = ("stack", "whole") if "stack/cond" in profile.prompts[0].values else ("whole",)
    found: list[Method] = []
    for site, line in itertools.product(sites, (True, False)):
        gram = np.sum([each.gram(site) for each in profile.prompts], axis=0)
        costs = forecast_costs(gram, line)
        for count in sorted({max(round(share * len(costs)), 2) for share in _SHARES}):
            steps = best_steps(costs, count, minimax=False)
            schedule = tuple(int(step in steps) for step in range(len(costs)))
            settings = {"share": count / len(costs), "schedule": schedule, "whole": site == "whole"}
            for reuse in (newton(1), hicache(2)) if line else (hold(),):
                found.append(dpcache(reuse=reuse, **settings))
    return [*found, *_fitted(profile), *_cycles()]


def _fitted(profile: Profile) -> list[Method]:
    """FitCache for each share, its weights fitted to all recorded prompts together."""
    first = profile.prompts[0]
    products = np.sum([prompt.products() for prompt in profile.prompts], axis=0)
    strides = solver_strides(first.log_snr, first.prediction)
    found = [
        registry.method("fitcache").fitted((*_SHARES, *_FINE), early, across, products, strides)
        for across in (False, True)[: 1 + first.guided]
        for early in EARLY
    ]
    return [each for several in found for each in several]


def _cycles() -> list[Method]:
    cycle, newton = registry.method("plaincycle"), registry.approximator("newton")
    forecasts = ((registry.approximator("holdresidual")(), 1), (newton(1), 3), (newton(2), 4))
    return [
        cycle(interval=interval, warmup=warmup, reuse=reuse, whole=whole)
        for whole in (False, True)
        for interval in _INTERVALS
        for reuse, warmup in forecasts
    ]


def refine(profile: Profile, candidate: Candidate, rounds: int = 40, seed: int = 0) -> Candidate:
    """Move single computed steps of a DPCache schedule while that lowers the predicted error."""
    cache = candidate.methods[0]
    schedule = getattr(cache, "schedule", None)
    if schedule is None or getattr(cache, "weights", None) is not None:  # fitted to its schedule
        return candidate
    found, random, best = replays(profile), np.random.default_rng(seed), candidate
    for _ in range(rounds):
        entries = list(getattr(best.methods[0], "schedule"))  # noqa: B009
        ones = [step for step in range(1, len(entries)) if entries[step]]
        step = int(random.choice(ones)) if ones else 0
        to = step + int(random.choice((-2, -1, 1, 2)))
        if not 0 < to < len(entries) or entries[to] or not step:
            continue
        entries[step], entries[to] = 0, 1
        moved = replace(cache, schedule=tuple(entries))  # type: ignore[type-var]
        methods = (moved, *candidate.methods[1:])
        changed = _of_methods(profile, found, methods)
        if changed.prediction.error < best.prediction.error:
            best = changed
    return best
