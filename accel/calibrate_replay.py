"""Replay: run any method on recorded sketches instead of a model.

The replay is a small module with the recorded blocks, each of which adds its recorded residual
sketch to what it receives. Real methods attach to it through the same `Denoiser` as to a model and
decide, reuse, extrapolate, leave branches out and measure themselves; in seconds instead of hours.
Sketches are linear, so what a method would have put in place of the true prediction is known. What
is ignored: errors of earlier steps do not change later steps' inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accel.calibrate_profile import PromptProfile
from accel.clock import StepClock
from accel.denoiser import Denoiser
from accel.family import Arguments, Family, Stack
from accel.guard import Guard
from accel.method import AccelError, Handle, Method
from accel.optimal_steps import solver_strides

if TYPE_CHECKING:
    from torch import Tensor

EARLY = (-1.0, 0.0, 1.0, 2.0, 3.0)
"""Errors of the beginning weigh e^early times those of the end; which is right differs by model."""
USUAL = 2
"""Which of them ranks best on all zoo models together."""


@dataclass(frozen=True)
class Prediction:
    """What a replay says of some methods.

    `error`: the largest drift of the latent along the run, ‖Σ strideₛ·errorₛ‖ of the guided
    predictions' errors, relative to the summed strides of the predictions themselves. Errors of the
    beginning weigh e times those of the end: what they change, later steps build on. `drifts`: the
    same for each weight of `EARLY`.
    `share`: blocks computed; `seconds`: of a run; `speedup`: over the untouched run; `settled`: the
    methods with everything they measured.
    """

    error: float
    share: float
    seconds: float
    speedup: float
    settled: tuple[Method, ...] = ()
    errors: tuple[float, ...] = ()
    """Of each prompt, where `error` is of several."""
    drifts: tuple[float, ...] = (0.0,) * len(EARLY)


class Replay:
    """One recorded prompt; `layers`: with attention and MLP layers inside the blocks."""

    def __init__(self, record: PromptProfile, layers: bool = False) -> None:
        self.record = record
        self.module = _Recorded(record, layers)
        self.clock = StepClock(prediction=record.prediction)
        self.denoiser = Denoiser("replay", self.module, _FAMILY, self.clock)
        self.clock.listeners.append(self.denoiser.begin)
        self.latents = record.values["latent/cond"].unsqueeze(1)
        self.guided = _guided(record, record.values["prediction/cond"])
        strides = torch.tensor(solver_strides(record.log_snr, record.prediction))
        places = torch.arange(record.steps) / record.steps
        fading = torch.exp(-torch.tensor(EARLY)[:, None] * places)
        self.weights = (strides * fading)[:, :, None]
        """(weights of `EARLY`, steps, 1)."""
        self.scales = (self.weights * self.guided).norm(dim=2).sum(1)

    def predict(self, *methods: Method) -> Prediction:
        """Replay the run with methods attached; self-measuring ones measure in a first pass.

        Raises `AccelError` as attaching to a model would.
        """
        if not methods:
            return Prediction(0.0, 1.0, self.record.seconds["run"], 1.0)
        handles: list[Handle] = []
        try:
            for method in methods:
                handles.append(method.attach(self.denoiser))
            if any(getattr(method, "unmeasured", False) for method in methods):
                self._run()
            guided = self._run()
            settled = tuple(
                handle.settled() if handle.settled is not None else method
                for method, handle in zip(methods, handles, strict=True)
            )
        finally:
            Handle.together(handles).remove()
        drift = (self.weights * (guided - self.guided)).cumsum(1).norm(dim=2)
        drifts = tuple((drift.amax(1) / self.scales).tolist())
        seconds = self._seconds()
        rows = self.denoiser.rows
        return Prediction(
            error=drifts[USUAL],
            share=sum(row.blocks_run for row in rows) / sum(row.blocks for row in rows),
            seconds=seconds,
            speedup=self.record.seconds["run"] / seconds,
            settled=settled,
            drifts=drifts,
        )

    def undecided(self, step: int) -> float:
        """How far the clean estimate before `step` is from the last one, as an error of that step.

        √2 times: another noise decides it otherwise, as far from what it was.
        """
        last, fading = self.record.steps - 1, math.exp(-EARLY[USUAL] * step / self.record.steps)
        apart = self._clean(max(step - 1, 0)) - self._clean(last)
        return math.sqrt(2) * fading * float(apart.norm() / self.scales[USUAL])

    def _clean(self, step: int) -> Tensor:
        """The sketch of the data that a step's guided prediction speaks of."""
        kind, ratio = self.record.prediction, math.exp(-self.record.log_snr[step])
        latent, output = self.latents[step][0], self.guided[step]
        if kind == "flow":
            return latent - ratio / (1 + ratio) * output
        signal = 1 / math.sqrt(1 + ratio**2)
        if kind == "epsilon":
            return latent / signal - ratio * output
        return output if kind == "sample" else signal * latent - ratio * signal * output

    def largest_change(self, *methods: Method) -> float:
        """The farthest that a stand-in is from what its branch computed last; see `Guard`."""
        self.denoiser.guard = watch = Guard(limit=math.inf)
        try:
            self.predict(*methods)
        finally:
            self.denoiser.guard = None
        return watch.largest

    @torch.no_grad()
    def _run(self) -> Tensor:
        """All steps; returns the guided predictions (steps, sketch)."""
        record, found = self.record, []
        self.clock.begin(list(record.timesteps), list(record.log_snr))
        for step in range(record.steps):
            predictions = []
            for branch in ("cond", "uncond")[: 1 + record.guided]:
                self.module.now = (step, branch)
                predictions.append(self.module(self.latents[step])[0][0])
            cond = predictions[0]
            found.append(cond.lerp(predictions[-1], 1 - record.guidance))
            self.clock.advance()
        self.clock.end()
        return torch.stack(found)

    def _seconds(self) -> float:
        """Of a run: what lies outside the chain stays, the chain by the blocks that ran."""
        spent, branches = self.record.seconds, 1 + self.record.guided
        calls = self.record.steps * branches
        stack, call = spent.get("stack", spent["call"]) / calls, spent["call"] / calls
        rest = spent["run"] - spent["call"]
        own = [row for row in self.denoiser.rows if row.called]
        return rest + sum(call - stack + stack * row.blocks_run / row.blocks for row in own)


_FUSED = ("proj_mlp", "attn")


class _Layer(torch.nn.Module):
    """An attention or MLP layer that returns its recorded output."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values, self.value = values, torch.empty(0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.value


class _Block(torch.nn.Module):
    """Adds the recorded residual, corrected by what its layers were made to return."""

    def __init__(self, residuals: dict[str, Tensor]) -> None:
        super().__init__()
        self.residuals = residuals
        self.layers: list[tuple[str, float]] = []
        self.observed = torch.zeros(1)
        self.now = (0, "cond")

    def add_layer(self, name: str, values: dict[str, Tensor], gain: float) -> None:
        """A layer whose error enters the residual `gain` times."""
        if name == "proj_out":  # a fused layer is known by its three parts
            for part in _FUSED:
                self.add_module(part, torch.nn.Identity())
        self.add_module(name, _Layer(values))
        self.layers.append((name, gain))

    def forward(self, hidden_states: Tensor) -> Tensor:
        step, branch = self.now
        change = self.residuals[branch][step][None]
        for name, gain in self.layers:
            layer = getattr(self, name)
            layer.value = true = layer.values[branch][step][None]
            if name == "proj_out":
                for part in _FUSED:
                    getattr(self, part)(hidden_states)
            change = change + gain * (layer(hidden_states) - true)
        return hidden_states + change


class _Recorded(torch.nn.Module):
    """The recorded denoiser; hidden states are sketches of shape (1, sketch)."""

    def __init__(self, record: PromptProfile, layers: bool) -> None:
        super().__init__()
        self.now = (0, "cond")
        self.branches = ("cond", "uncond")[: 1 + record.guided]
        values = record.values
        self.prediction = self._of(values, "prediction")
        whole = "stack/cond" in values
        self.stack = self._of(values, "stack" if whole else "prediction")
        self.entry = self._of(values, "entry" if whole else "latent")
        self.gain = _gain(values) if whole else 1.0
        self.blocks = torch.nn.ModuleList(self._blocks(record, layers))
        self.observed = {branch: _path(values, branch) for branch in self.branches}

    def _of(self, values: Any, site: str) -> dict[str, Tensor]:
        return {branch: values[f"{site}/{branch}"] for branch in self.branches}

    def _blocks(self, record: PromptProfile, layers: bool) -> list[_Block]:
        values = record.values
        if "block.0/cond" not in values or "stack/cond" not in values:
            half = {branch: value / 2 for branch, value in self.stack.items()}
            return [_Block(half), _Block(half)]
        if not layers:
            first = self._of(values, "block.0")
            rest = {branch: self.stack[branch] - first[branch] for branch in self.branches}
            return [_Block(first), _Block(rest)]
        if any(f"block.{index}/cond" not in values for index in range(record.blocks)):
            raise AccelError(
                "fits of single layers need blocks that keep the size of their tokens, which a "
                "U-Net's do not; let the method measure itself in its first run"
            )
        blocks = [_Block(self._of(values, f"block.{index}")) for index in range(record.blocks)]
        for name in values:
            if name.startswith("layer.") and name.endswith("/cond"):
                site = name.removesuffix("/cond")
                _, index, _, child = site.split(".")
                blocks[int(index)].add_layer(child, self._of(values, site), 1.0)
        for block in blocks:
            _fit_gains(block)
        return blocks

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        step, branch = self.now
        hidden = self.entry[branch][step][None]
        for block in self.blocks:
            _stand(block, self.now, self.observed[branch][step])
            hidden = block(hidden)
        true = self.entry[branch][step] + self.stack[branch][step]
        return (self.prediction[branch][step] + self.gain * (hidden - true),)


def _stand(block: Any, now: tuple[int, str], observed: Tensor) -> None:
    """Tell a block where the run stands."""
    block.now, block.observed = now, observed


def _observe(block: Any, _: Arguments) -> Any:
    return block.observed


_FAMILY = Family("replay", (Stack("blocks"),), guidance="sequential", observer=_observe)


def _guided(record: PromptProfile, cond: Tensor) -> Tensor:
    if not record.guided:
        return cond
    return cond.lerp(record.values["prediction/uncond"], 1 - record.guidance)


def _gain(values: Any) -> float:
    """How much a change of the chain's output changes the prediction: the median over steps."""
    output = values["entry/cond"] + values["stack/cond"]
    prediction = values["prediction/cond"]
    ratios = prediction.diff(dim=0).norm(dim=1) / output.diff(dim=0).norm(dim=1).clamp(min=1e-12)
    return float(ratios.median())


def _path(values: Any, branch: str) -> Tensor:
    """One number a step whose relative changes are the recorded ones of the observer."""
    changes = values.get(f"observed/{branch}")
    if changes is None:
        return torch.ones(len(values[f"prediction/{branch}"]), 1)
    return torch.cat((torch.ones(1), torch.cumprod(1 + changes.flatten(), 0))).unsqueeze(1)


def _fit_gains(block: _Block) -> None:
    """The gates of a block's layers, one number each, by least squares over the recorded steps."""
    if not block.layers:
        return
    target = block.residuals["cond"].flatten()
    columns = [getattr(block, name).values["cond"].flatten() for name, _ in block.layers]
    gains = torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution.flatten()
    block.layers = [(name, float(g)) for (name, _), g in zip(block.layers, gains, strict=True)]


def mean_prediction(replays: Sequence[Replay], *methods: Method) -> Prediction:
    """Over several prompts: the root mean square error and mean cost; methods settled on the first.

    Tables are measured on the first prompt and used for all.
    """
    first = replays[0].predict(*methods)
    others = [replay.predict(*first.settled) for replay in replays[1:]]
    each = [first, *others]
    drifts = tuple(map(root_mean_square, zip(*(one.drifts for one in each), strict=True)))
    return Prediction(
        error=drifts[USUAL],
        share=sum(one.share for one in each) / len(each),
        seconds=sum(one.seconds for one in each) / len(each),
        speedup=sum(one.speedup for one in each) / len(each),
        settled=first.settled,
        errors=tuple(one.error for one in each),
        drifts=drifts,
    )


def root_mean_square(values: Sequence[float]) -> float:
    """√ of the mean of the squares."""
    return math.sqrt(sum(value**2 for value in values) / len(values))
