"""`accel.profile`: record untouched runs, one file a prompt; what all calibration starts from."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accel.calibrate_probe import Probe, key
from accel.calibrate_record import SKETCH, Record, Recorder
from accel.fingerprint import denoiser, described, fingerprint, schedule
from accel.method import AccelError, Method
from accel.patching import patched, untouched

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SUFFIX = ".profile.safetensors"
FORMAT = 2
"""1 held sketches of latents that did not fit those of predictions with other channels."""


@dataclass(frozen=True)
class PromptProfile:
    """One recorded run: `values` maps "site/branch" to (steps, …) (see `Record`).

    `seconds`: totals of the run, of the denoiser's calls and of the chain in them, without what
    recording took. `guidance` is the scale w of u + w·(c − u); `fingerprint` names the weights,
    `prediction` what the denoiser predicts (see `StepClock`), `made` the call and the scheduler,
    `schedule` the steps of the whole schedule, of which a run may make a part. `probes`: what
    calls that were made in other ways cost at most and erred in the median; `measured`: variants
    with what they measured in the run, as JSON (see `accel.calibrate_probe`).
    """

    fingerprint: str
    denoiser: str
    prompt: str
    seed: int
    guidance: float
    calls: int
    blocks: int
    latents: int
    scheduler: str
    prediction: str
    timesteps: tuple[float, ...]
    log_snr: tuple[float, ...]
    seconds: Mapping[str, float]
    values: Mapping[str, Tensor]
    probes: Mapping[str, Probe] = field(default_factory=dict)
    measured: tuple[str, ...] = ()
    made: str = ""
    schedule: int = 0

    @property
    def steps(self) -> int:
        """Sampling steps of the run."""
        return len(self.timesteps)

    @property
    def guided(self) -> bool:
        """Whether the run had an unconditional branch."""
        return "prediction/uncond" in self.values

    def gram(self, site: str = "stack", branch: str = "cond") -> NDArray[np.float64]:
        """Inner products of a site's outputs at all pairs of steps, (steps, steps), estimated.

        Site "whole": prediction minus latent, what methods with `whole=True` hold.
        """
        if site == "whole":
            values = self.values[f"prediction/{branch}"] - self.values[f"latent/{branch}"]
        else:
            values = self.values[f"{site}/{branch}"]
        wide = values.double()
        found: NDArray[np.float64] = (wide @ wide.T).numpy()
        return found

    def products(self) -> NDArray[np.float64]:
        """What `accel.optimal_steps.fitted_weights` takes; the conditional branch is the first."""
        latent = self.values["latent/cond"].double()
        branches = ("cond", "uncond")[: 1 + self.guided]
        residuals = [self.values[f"prediction/{each}"].double() - latent for each in branches]
        every = torch.cat((*residuals, latent))
        shape = (len(branches) + 1, self.steps) * 2
        found: NDArray[np.float64] = (every @ every.T).numpy().reshape(shape)
        return found

    def lagged_error(self, site: str, lag: int, branch: str = "cond") -> NDArray[np.float64]:
        """‖F(i) − F(i+lag)‖ / ‖F(i+lag)‖ for each step i, estimated, (steps − lag,)."""
        values = self.values[f"{site}/{branch}"].double()
        apart = (values[lag:] - values[:-lag]).norm(dim=1)
        found: NDArray[np.float64] = (apart / values[lag:].norm(dim=1).clamp(min=1e-12)).numpy()
        return found

    def agreement(self) -> NDArray[np.float64]:
        """Cosine of the conditional and unconditional predictions at each step, estimated."""
        pair = (self.values["prediction/cond"].double(), self.values["prediction/uncond"].double())
        found: NDArray[np.float64] = torch.nn.functional.cosine_similarity(*pair, dim=1).numpy()
        return found

    def save(self, file: Path) -> None:
        """Write the file in one piece: it is whole or not there."""
        from safetensors.torch import save_file

        about = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("values", "seconds")
        }
        text = json.dumps(
            {"sketch": SKETCH, "format": FORMAT, **about, "seconds": dict(self.seconds)}
        )
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        save_file(dict(self.values), part, metadata={"profile": text})
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> PromptProfile:
        """Read one file; raise `AccelError` when it is none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as content:
                about = json.loads((content.metadata() or {})["profile"])
                values = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            if (about.pop("sketch"), about.pop("format", 1)) != (SKETCH, FORMAT):
                raise AccelError(f"profile {file}: of another version of accel; record it again")
            for name in ("timesteps", "log_snr", "measured"):
                about[name] = tuple(about.get(name, ()))
            return cls(**about, values=values)
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise AccelError(f"profile {file}: cannot be read ({error})") from error


@dataclass(frozen=True)
class Profile:
    """Recorded runs of one model with one schedule."""

    prompts: tuple[PromptProfile, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise AccelError("a profile needs at least one recorded prompt")
        first = self.prompts[0]
        for each in self.prompts[1:]:
            for name in ("fingerprint", "scheduler", "timesteps", "guidance", "latents"):
                if getattr(each, name) != getattr(first, name):
                    raise AccelError(
                        f"profiles of another {name} cannot be merged: {each.prompt!r} and "
                        f"{first.prompt!r} differ"
                    )

    @property
    def fingerprint(self) -> str:
        """Names the weights that were recorded."""
        return self.prompts[0].fingerprint

    @property
    def probes(self) -> dict[str, Probe]:
        """Of all prompts in which something was tried."""
        return {name: each for prompt in self.prompts for name, each in prompt.probes.items()}

    @property
    def block_maps(self) -> list[Tensor]:
        """Rows of layers' block-wise attention, (heads, rows, blocks) each, if it was looked at."""
        named = (item for prompt in self.prompts for item in prompt.values.items())
        return [each for name, steps in named if name.startswith("map/") for each in steps]

    @property
    def measured(self) -> tuple[str, ...]:
        """Variants with what they measured, as JSON."""
        return tuple(dict.fromkeys(each for prompt in self.prompts for each in prompt.measured))

    @classmethod
    def load(cls, *folders: str | Path) -> Profile:
        """All recorded prompts in one or more folders; the same prompt and seed counts once."""
        files = [file for folder in folders for file in sorted(Path(folder).glob("*" + SUFFIX))]
        if not files:
            raise AccelError(f"no profile in {', '.join(map(str, folders))}")
        found = {(each.prompt, each.seed): each for each in map(PromptProfile.load, files)}
        return cls(tuple(found.values()))

    def check(self, pipe: Any) -> None:
        """Raise `AccelError` unless the profile was recorded with this pipeline's weights."""
        found = fingerprint(pipe)
        if found != self.fingerprint:
            raise AccelError(
                f"this profile was recorded with another model: {self.fingerprint}, and the "
                f"pipeline has {found}; run accel.profile with this pipeline"
            )


def profile(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    folder: str | Path | None = None,
    variants: Sequence[Method] | None = None,
    run: Callable[[dict[str, Any], int], Any] | None = None,
) -> Profile:
    """Record one untouched run per prompt: what `accel.calibrate` and the fits start from.

    `call`: arguments of the pipeline's call. `seeds`: one a prompt, by default 0, 1, …. With a
    `folder` every prompt is written as it is done, and prompts that lie there are not run again;
    folders from several machines may be merged by copying or by `Profile.load(a, b)`; files of
    another model, call or scheduler are refused. `variants`:
    methods such as `Attention(…)` and `Linear(…)` that are tried on a few calls of the first
    prompt, as are smaller sizes; its block-wise attention is recorded if one of them reads it
    (`NABLA`). Those that measure themselves do so during the second. None: nothing is tried.
    `run(call, seed)` makes the run when given. Holds `SKETCH` numbers a site,
    step and branch. The pipeline is as before afterwards. Raises `AccelError` for no prompts, or
    files of another model.
    """
    texts = checked_prompts(prompts, call, ["generator"])
    numbers = [int(each) for each in seeds] if seeds is not None else list(range(len(texts)))
    if len(numbers) != len(texts):
        raise AccelError(f"accel.profile: {len(numbers)} seeds for {len(texts)} prompts")
    made_by = hashlib.sha256(json.dumps([described(call or {}), schedule(pipe)]).encode())
    known, place = fingerprint(pipe), Path(folder) if folder is not None else None
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (text, seed) in enumerate(zip(texts, numbers, strict=True)):
        file = place / _file_name(text, seed) if place is not None else None
        if file is not None and file.exists():
            each = PromptProfile.load(file)
            if each.fingerprint != known:
                raise AccelError(f"profile {file}: recorded with another model; use another folder")
            if each.made != made_by.hexdigest():
                raise AccelError(
                    f"profile {file}: recorded with another call or scheduler; use another folder"
                )
        else:
            tried = [each for each in variants or () if _measures_itself(each) == (number == 1)]
            probed = None if number or variants is None else tuple(tried)
            watching = tuple(tried) if number == 1 else ()
            made = dict(call or {}) | {"prompt": text}
            recorder = Recorder(Record(), probed)
            with untouched(pipe):
                each = _record(pipe, made, seed, known, recorder, watching, run)
            each = replace(each, made=made_by.hexdigest())
            if file is not None:
                each.save(file)
        found.append(each)
    return Profile(tuple(found))


def checked_prompts(
    prompts: Sequence[str] | str, call: Mapping[str, Any] | None, ours: Sequence[str]
) -> list[str]:
    """The prompts as a list; raises `AccelError` for none and for `ours` among the arguments."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise AccelError("give at least one prompt, none of them empty")
    given = sorted({*ours} & set(call or {}))
    if given:
        raise AccelError(f"call: {', '.join(given)}: set by accel itself and cannot be given")
    return texts


def _measures_itself(method: Method) -> bool:
    return bool(getattr(method, "unmeasured", False))


def _file_name(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()[:16] + SUFFIX


def _record(
    pipe: Any,
    call: dict[str, Any],
    seed: int,
    known: str,
    recorder: Recorder,
    watching: tuple[Method, ...],
    run: Callable[[dict[str, Any], int], Any] | None,
) -> PromptProfile:
    record = recorder.record
    began = time.perf_counter()
    with patched(pipe, recorder, *watching) as patch:
        if run is not None:
            run(call, seed)
        else:
            pipe(**call, generator=torch.Generator().manual_seed(seed))
        total = time.perf_counter() - began
        measured = patch.methods[1:]
    steps = len(record.values.get("prediction/cond", ()))
    if steps < 2:
        raise AccelError("accel.profile: the run made fewer than two denoiser steps")
    values = {
        name: torch.stack(rows).float().cpu().contiguous() for name, rows in record.values.items()
    }
    return PromptProfile(
        fingerprint=known,
        denoiser=type(denoiser(pipe)).__name__,
        prompt=call["prompt"],
        seed=seed,
        guidance=guidance_scale(pipe, call),
        calls=record.calls,
        blocks=sum(name.startswith("block.") and name.endswith("/cond") for name in values),
        latents=record.latents,
        scheduler=type(pipe.scheduler).__name__,
        prediction=record.prediction,
        timesteps=tuple(record.timesteps[record.start : record.start + steps]),
        log_snr=tuple(record.log_snr[record.start : record.start + steps]),
        seconds={**record.seconds, "run": total - record.seconds["recording"]},
        values=values,
        probes={
            name: (max(s for s, _ in seen), statistics.median(e for _, e in seen))
            for name, seen in record.probes.items()
        },
        measured=tuple(key(each) for each in measured),
        schedule=len(record.timesteps),
    )


def guidance_scale(pipe: Any, call: Mapping[str, Any]) -> float:
    """The scale w of u + w·(c − u) in a call; 1 when the pipeline takes none."""
    accepted = inspect.signature(pipe.__call__).parameters
    for name in ("true_cfg_scale", "guidance_scale"):
        if name in accepted:
            value = call.get(name, accepted[name].default)
            if isinstance(value, int | float):
                return float(value)
    return 1.0


def write_json(file: Path, content: Any) -> None:
    """Write JSON in one piece: the file is whole or as before."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
