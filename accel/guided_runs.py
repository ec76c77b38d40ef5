"""Guided runs of a frozen denoiser, recorded: what adapters learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.chain import parameters
from accel.family import Family
from accel.geometry import prediction_kind

UNBATCHED = ("rotary", "img_ids", "txt_ids")


@dataclass
class Pool:
    """States of guided runs: `inputs` by argument name and the branches' predictions, all (n, …).

    `weight` is what an error of the prediction counts: as an error of the velocity α·ε − σ·x, which
    moves the picture alike at every noise level.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    cond: Tensor = field(default_factory=Tensor)
    uncond: Tensor = field(default_factory=Tensor)
    weight: Tensor = field(default_factory=Tensor)
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def change(self) -> Tensor:
        """What guidance changes in each state, (n,): the weighted mean square of cond − uncond."""
        return self.weight * (self.cond.float() - self.uncond).square().flatten(1).mean(1)


class Recorder:
    """A forward hook that gathers one guided run.

    With `lead`, which predicts from the conditional branch's arguments by name, the run goes where
    that leads: both branches get its prediction, so guidance between them changes nothing.
    """

    def __init__(
        self,
        module: Any,
        family: Family,
        lead: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        self.names, self.family, self.lead = parameters(module), family, lead
        self.states: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        self.waiting: tuple[dict[str, Any], Tensor, Tensor | None] | None = None
        self.leading = False

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The denoiser was called: one branch, or both in one batch."""
        if self.leading:
            return None
        inputs = flat(dict(zip(self.names, args, strict=False)) | kwargs)
        prediction = output[0]
        if self.family.guidance == "batched":
            batch, cond = len(prediction) // 2, 0 if self.family.cond_first else 1
            halves = prediction.chunk(2)
            chosen = slice(cond * batch, (cond + 1) * batch)
            rows = {name: cut(name, value, 2 * batch, chosen) for name, value in inputs.items()}
            self.states.append((rows, halves[cond], halves[1 - cond]))
            led = self._led(rows)
            return None if led is None else _instead(output, torch.cat((led, led)))
        if self.waiting is None:
            led = self._led(inputs)
            self.waiting = (inputs, prediction, led)
        else:
            known, cond_prediction, led = self.waiting
            self.states.append((known, cond_prediction, prediction))
            self.waiting = None
        return None if led is None else _instead(output, led)

    def _led(self, inputs: dict[str, Any]) -> Tensor | None:
        if self.lead is None:
            return None
        self.leading = True
        try:
            return self.lead(inputs)
        finally:
            self.leading = False


def _instead(output: Any, prediction: Tensor) -> Any:
    """A denoiser's output with another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(prediction)


def flat(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; what an argument holds by name is "argument.name"."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        inside = value if isinstance(value, dict) else None
        found |= {name: value} if inside is None else {f"{name}.{k}": v for k, v in inside.items()}
    return found


def nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `flat` took apart."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        argument, _, inside = name.partition(".")
        if inside:
            found.setdefault(argument, {})[inside] = value
        else:
            found[name] = value
    return found


def placed(value: Any, device: torch.device) -> Any:
    """An argument with its tensors on a device."""
    if isinstance(value, tuple | list):
        return type(value)(placed(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value


def cut(name: str, value: Any, batch: int, chosen: slice) -> Any:
    """An argument's rows, where it has a row for every sample."""
    return value[chosen] if _has_rows(name, value, batch) else value


def _has_rows(name: str, value: Any, batch: int) -> bool:
    shared = any(part in name for part in UNBATCHED)
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch and not shared


def velocity_weight(scheduler: Any, timesteps: Tensor) -> Tensor:
    """What an error of the prediction counts as one of the velocity: 1/ᾱ for noise, else 1."""
    if prediction_kind(scheduler) != "epsilon":
        return torch.ones(len(timesteps))
    kept: Tensor = scheduler.alphas_cumprod.cpu()[timesteps.long()]
    return 1 / kept.float().clamp(min=1e-3)


def gathered(states: list[tuple[dict[str, Any], Tensor, Tensor]], batch: int) -> Pool:
    """One call's states as a pool; scalar timesteps become one for each row."""
    first = states[0][0]
    rows = [name for name, value in first.items() if _has_rows(name, value, batch)]
    inputs = {name: torch.cat([state[0][name].cpu() for state in states]) for name in rows}
    times = [torch.as_tensor(state[0]["timestep"]).cpu().expand(batch) for state in states]
    inputs["timestep"] = torch.cat(times).float()
    return Pool(
        inputs=inputs,
        cond=torch.cat([state[1].cpu() for state in states]),
        uncond=torch.cat([state[2].cpu() for state in states]),
        fixed={
            name: placed(value, torch.device("cpu"))
            for name, value in first.items()
            if name not in inputs
        },
    )
