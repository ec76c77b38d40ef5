"""Speed-up and quality of methods against the untouched pipeline, in one process.

Quality: every prompt once, seed = its line number, compared with the untouched result of the same
seed. Speed: on the first `repeats` prompts an untouched and a patched run follow each other, and
their ratio is taken pair by pair. Tables that a method needs are measured on a training prompt.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import accel
from accel import batch_items, generate, metrics, model_zoo, registry
from accel.method import AccelError
from accel.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME_STRIDE = 4
"""Feature distances of videos look at every fourth frame."""

NOTHING_SKIPPED = ("text", "tokens", "attention", "linear")
"""Slots of methods that make blocks cheaper and run them all."""


@dataclass(frozen=True)
class Plan:
    """What to measure; `methods` is "all" or names with commas, "a+b" for two together."""

    model: str
    methods: str = "all"
    prompts: Path | None = None
    num_prompts: int = 32
    steps: int = 50
    repeats: int = 5
    peers: bool = False
    recipe: Path | None = None
    """A recipe whose front is measured beside the methods."""


@dataclass(frozen=True)
class Candidate:
    """One row: a label, a way to switch it on, and a way to tell the share it computed."""

    label: str
    kind: str
    switch: Callable[[], AbstractContextManager[Any]]
    share: Callable[[], float]
    skips: bool = True
    """Whether it should leave out a part of the work, and fails when it does not."""


def settings_of(names: str) -> list[tuple[Any, ...]]:
    """The settings that a method wants tried, mild to strong; "a+b" pairs those of two methods."""
    each = [
        [make(**settings) for settings in make.trials]
        for make in map(registry.method, names.split("+"))
    ]
    return list(zip(*each, strict=False))


class Bench:
    """A loaded model, its prompts and the untouched results."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        if plan.methods != "all":
            for names in plan.methods.split(","):
                settings_of(names)  # a wrong name is said before anything runs
        self.front = _front(plan.recipe) if plan.recipe else ()
        self.prompts = _prompts(plan)
        job = generate.Job(model=plan.model, prompt=self.prompts[0], steps=plan.steps)
        self.pipe, self.call, _ = generate.load(job)
        self.measuring_prompt = _measuring_prompt(plan, self.prompts)
        generate.make(self.pipe, self.call, 0)
        say(f"untouched: {len(self.prompts)} prompts")
        self.untouched = [self.make(index)[0] for index in range(len(self.prompts))]

    def make(self, index: int) -> tuple[NDArray[np.uint8], float]:
        """Run prompt number `index` as the pipeline is now."""
        return generate.make(self.pipe, self.call | {"prompt": self.prompts[index]}, index)

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """One row of the table; a peer that raises, or skips nothing, is reported as failing."""
        row: dict[str, Any] = {"name": candidate.label, "kind": candidate.kind}
        try:
            with candidate.switch():
                made, shares = [], []
                for index in range(len(self.prompts)):
                    made.append(self.make(index)[0])
                    shares.append(candidate.share())
        except Exception as error:  # a peer may fail in any way, and the table must say so
            if candidate.kind != "peer":
                raise
            return row | {"failed": f"{type(error).__name__}: {error}"}
        share = statistics.median(shares)
        row |= {"share_computed": share, **self._quality(made)}
        if share > 0.999 and candidate.skips:
            return row | {"failed": "nothing was skipped"}
        return row | self._timing(candidate)

    def _quality(self, made: list[NDArray[np.uint8]]) -> dict[str, Any]:
        values: dict[str, list[float]] = {"psnr": [], "ssim_gaussian11": [], "feature_distance": []}
        for fast, slow in zip(made, self.untouched, strict=True):
            a, b = pictures(fast), pictures(slow)
            values["psnr"].append(min(metrics.psnr(a, b), 100.0))
            values["ssim_gaussian11"].append(metrics.ssim(a, b))
            stride = FRAME_STRIDE if len(a) > 1 else 1
            values["feature_distance"].append(metrics.feature_distance(a[::stride], b[::stride]))
        worse = {"psnr": 10, "ssim_gaussian11": 10, "feature_distance": 90}
        return {
            name: {
                "median": float(np.median(numbers)),
                "worst_decile": float(np.percentile(numbers, worse[name])),
            }
            for name, numbers in values.items()
        }

    def _timing(self, candidate: Candidate) -> dict[str, Any]:
        ratios, seconds = [], []
        with candidate.switch():
            self.make(0)
        for repeat in range(self.plan.repeats):
            index = repeat % len(self.prompts)
            slow = self.make(index)[1]
            with candidate.switch():
                fast = self.make(index)[1]
            ratios.append(slow / fast)
            seconds.append(fast)
        return {
            "speedup": statistics.median(ratios),
            "speedup_spread": [min(ratios), max(ratios)],
            "seconds": statistics.median(seconds),
        }

    def candidates(self) -> Iterator[Candidate]:
        """Our methods at all their settings."""
        names = (
            list(registry.METHODS) if self.plan.methods == "all" else self.plan.methods.split(",")
        )
        for name in names:
            for settings in settings_of(name):
                try:
                    yield self._ours(settings)
                except AccelError as error:
                    self.say(f"{' + '.join(map(_label, settings))}: {error}")
        for number, choice in enumerate(self.front):
            yield self._row(f"calibrated {number}: {choice.label}", choice.methods)

    def _ours(self, settings: tuple[Any, ...]) -> Candidate:
        call = self.call | {"prompt": self.measuring_prompt}
        recipe = generate.settle(
            self.pipe, Recipe.of(settings), lambda: generate.make(self.pipe, call, 0)
        )
        return self._row(" + ".join(map(_label, settings)), recipe.methods)

    def _row(self, label: str, methods: Sequence[Any]) -> Candidate:
        return Candidate(
            label,
            "accel",
            switch=lambda: accel.patched(self.pipe, *methods),
            share=lambda: accel.stats(self.pipe).share_computed,
            skips=any(method.slot not in NOTHING_SKIPPED for method in methods),
        )

    def overhead(self) -> dict[str, float]:
        """Cost of the hooks when nothing is reused: share of a run, and µs for a hooked block."""
        self.say("the cost of hooks that skip nothing (and say so):")
        every = accel.PlainCycle(interval=1)
        ratios = []
        for repeat in range(max(self.plan.repeats, 5)):
            index = repeat % len(self.prompts)
            slow = self.make(index)[1]
            with accel.patched(self.pipe, every):
                ratios.append(self.make(index)[1] / slow)
        return {"run": statistics.median(ratios) - 1, "microseconds_per_block": block_cost()}


def block_cost(blocks: int = 40, rounds: int = 300) -> float:
    """Host µs that hooking adds to one block's call, on a stack of blocks that do nothing."""
    from accel.clock import StepClock
    from accel.denoiser import Denoiser
    from accel.family import Family, Stack

    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    class Stub(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return (hidden_states,)

    stub, clock, x = Stub(), StepClock(), torch.zeros(1, 2, 3)
    denoiser = Denoiser("stub", stub, Family("stub", (Stack("blocks"),)), clock)

    def seconds() -> float:
        clock.begin([0.0] * rounds)
        began = time.perf_counter()
        for _ in range(rounds):
            stub(x)
            clock.advance()
        return (time.perf_counter() - began) / rounds / blocks

    differences = []
    for _ in range(7):
        plain = seconds()
        handle = accel.PlainCycle(interval=1).attach(denoiser)
        differences.append(seconds() - plain)
        handle.remove()
    return statistics.median(differences) * 1e6


def run(
    plan: Plan, output: Path, command: str, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure everything in the plan and write the JSON; rows are written as they come."""
    bench = Bench(plan, say)
    result: dict[str, Any] = {
        "schema_version": 1,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "plan": {
            **dataclasses.asdict(plan),
            "prompts": str(plan.prompts) if plan.prompts else None,
            "recipe": str(plan.recipe) if plan.recipe else None,
        },
        "prompts": len(bench.prompts),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(bench.pipe.device),
        },
        "versions": {
            "accel": accel.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _versioned(plan)},
        },
        "overhead": bench.overhead(),
        "rows": [],
    }
    for candidate in bench.candidates():
        _measure_into(bench, candidate, result, output, say)
    if plan.peers:
        from accel.peers import candidates as peers

        for candidate in peers(bench):
            _measure_into(bench, candidate, result, output, say)
    return result


def _front(file: Path) -> tuple[Any, ...]:
    front = Recipe.load(file).front
    if not front:
        raise AccelError(f"{file} has no front; `accel calibrate` writes recipes that have one")
    return front


def _versioned(plan: Plan) -> list[str]:
    others = {"cache_dit": "cache-dit", "para_attn": "para-attn"} if plan.peers else {}
    found = [name for module, name in others.items() if importlib.util.find_spec(module)]
    return ["torch", "diffusers", *found]


def _measure_into(
    bench: Bench,
    candidate: Candidate,
    result: dict[str, Any],
    output: Path,
    say: Callable[[str], None],
) -> None:
    row = bench.measure(candidate)
    say(_line(row))
    result["rows"].append(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(output)


def table(result: dict[str, Any]) -> str:
    """The result as text, one line a row."""
    columns = {"speed-up": 9, "1/share": 9, "share": 8, "PSNR": 8, "p10": 7, "SSIM": 8, "feat": 8}
    head = " " * 58 + "".join(f"{name:>{width}}" for name, width in columns.items())
    return "\n".join([head, *(_line(row) for row in result["rows"])])


def _line(row: dict[str, Any]) -> str:
    name = f"{row['kind']}: {row['name']}"
    if "failed" in row:
        return f"{name:<58} failed: {row['failed']}"
    return (
        f"{name:<58}{row['speedup']:>8.2f}x{1 / max(row['share_computed'], 1e-9):>8.2f}x"
        f"{row['share_computed']:>8.1%}{row['psnr']['median']:>8.2f}{row['psnr']['worst_decile']:>7.1f}"
        f"{row['ssim_gaussian11']['median']:>8.4f}{row['feature_distance']['median']:>8.4f}"
    )


def _label(settings: Any) -> str:
    """The settings that differ from the defaults, without measured tables."""
    shown = [
        f"{item.name}={getattr(settings, item.name)!r}"
        for item in dataclasses.fields(settings)
        if getattr(settings, item.name) != item.default
        and item.name not in ("ratios", "polynomial", "domain")
    ]
    return f"{type(settings).__name__}({', '.join(shown)})"


def pictures(array: NDArray[np.uint8]) -> torch.Tensor:
    """A picture or the frames of a video as (n, 3, height, width) in [0, 1]."""
    flat = torch.from_numpy(array).reshape(-1, *array.shape[-3:])
    return flat.permute(0, 3, 1, 2).float() / 255


def _prompts(plan: Plan) -> list[str]:
    if plan.prompts is None and not plan.model.startswith("zoo:"):
        raise AccelError("bench: --prompts FILE is needed for models outside the zoo")
    file = plan.prompts or model_zoo.prompts(plan.model.removeprefix("zoo:"), "final")
    return batch_items.prompt_lines(file, plan.num_prompts)


def _measuring_prompt(plan: Plan, prompts: list[str]) -> str:
    if not plan.model.startswith("zoo:"):
        return prompts[0]
    file = model_zoo.prompts(plan.model.removeprefix("zoo:"), "train")
    return file.read_text(encoding="utf-8").splitlines()[0]
