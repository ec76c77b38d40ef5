"""A scheduler that is stepped through stages: its own steps, on one stage's levels at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from accel.noise_levels import NoiseLevels
from accel.stages import Stage

if TYPE_CHECKING:
    from torch import Tensor

_HISTORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order")


def install(scheduler: Any, levels: NoiseLevels, stages: list[Stage]) -> None:
    """Put the timesteps and sigmas of all stages in the place of the scheduler's own."""
    starts = [sigma for each in stages for sigma in each.sigmas[:-1]]
    scheduler.timesteps = _timesteps(scheduler, levels, starts)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = _like(scheduler.sigmas, [*starts, stages[-1].sigmas[-1]])


def history(scheduler: Any) -> dict[str, Any]:
    """What a multistep solver remembers, copied."""
    names = (name for name in _HISTORY if hasattr(scheduler, name))
    return {name: copy.copy(getattr(scheduler, name)) for name in names}


def recall(scheduler: Any, history: dict[str, Any]) -> None:
    """Let the solver remember that, and nothing since."""
    for name, value in history.items():
        setattr(scheduler, name, copy.copy(value))


def _timesteps(scheduler: Any, levels: NoiseLevels, sigmas: list[float]) -> Tensor:
    values = [levels.timestep(sigma) for sigma in sigmas]
    whole = not scheduler.timesteps.is_floating_point()
    return _like(scheduler.timesteps, [round(value) for value in values] if whole else values)


def _like(old: Tensor, values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=old.dtype, device=old.device)


class _Gap(int):
    """Divides any number of training timesteps to itself: a DDIM step of this length."""

    def __rfloordiv__(self, _: int) -> int:
        return int(self)


@contextlib.contextmanager
def local(
    scheduler: Any, levels: NoiseLevels, stage: Stage, inside: int, step: int
) -> Iterator[None]:
    """During a step the scheduler knows the stage's own levels only, afterwards all again."""
    before = scheduler.timesteps
    scheduler.timesteps = _timesteps(scheduler, levels, list(stage.sigmas[:-1]))
    try:
        if not hasattr(scheduler, "sigmas"):
            with _leap(scheduler, levels, stage, inside):
                yield
            return
        sigmas, scheduler.sigmas = scheduler.sigmas, _like(scheduler.sigmas, [*stage.sigmas])
        scheduler._step_index = inside
        try:
            yield
        finally:
            scheduler.sigmas, scheduler._step_index = sigmas, step + 1
    finally:
        scheduler.timesteps = before


@contextlib.contextmanager
def _leap(scheduler: Any, levels: NoiseLevels, stage: Stage, inside: int) -> Iterator[None]:
    """DDIM finds the timestep after this one from the number of steps: say how far to go."""
    now, then = (_whole(levels, sigma) for sigma in stage.sigmas[inside : inside + 2])
    count, scheduler.num_inference_steps = scheduler.num_inference_steps, _Gap(now - then)
    try:
        yield
    finally:
        scheduler.num_inference_steps = count


def _whole(levels: NoiseLevels, sigma: float) -> int:
    return round(levels.timestep(sigma)) if sigma > 0 else -1
