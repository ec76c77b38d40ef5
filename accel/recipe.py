"""Recipes: chosen methods with where they came from, as strict JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import accel
from accel import recipe_tensors, registry
from accel.method import AccelError, Method

FILE_NAME = "accel_recipe.json"
PUBLISHED = "published:"
_LIMIT = 1_000_000
_SAME_LEVEL = 0.1


_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class _Entry(BaseModel):
    model_config = _STRICT

    name: str
    settings: dict[str, Any] = {}


class Choice(BaseModel):
    """One point of a calibrated Pareto front: methods, and what they were measured to give.

    `speedup` is a median wall-clock ratio to the untouched pipeline, `psnr` the median over prompts
    in dB against the untouched run of the same seed.
    """

    model_config = _STRICT

    entries: tuple[_Entry, ...]
    speedup: float = Field(gt=0)
    psnr: float
    share_computed: float | None = Field(default=None, ge=0, le=1)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The settings objects."""
        return _methods(self.entries)

    @property
    def label(self) -> str:
        """The names of its methods."""
        return " + ".join(entry.name for entry in self.entries)


class Validity(BaseModel):
    """Where a recipe holds; what is left at its default is not checked.

    `scheduler` is a class name, `steps` the least and most sampling steps, `latents` the least and
    most latent values of one sample (all channels and frames). `levels` are
    the noise levels of the steps that a run makes, log(signal/noise): what spacing, shift and
    given sigmas come to. `change` is the guard's limit: half as much again as stand-ins were
    calibrated to differ from what their branch computed last.
    """

    model_config = _STRICT

    scheduler: str = ""
    steps: tuple[int, int] | None = None
    latents: tuple[int, int] | None = None
    levels: tuple[float, ...] = ()
    change: float | None = Field(default=None, gt=0)

    @field_validator("steps", "latents")
    @classmethod
    def _ordered(cls, span: tuple[int, int] | None) -> tuple[int, int] | None:
        if span is not None and span[0] > span[1]:
            raise ValueError("the least comes first, then the most")
        return span

    def refuses(
        self,
        scheduler: str | None = None,
        steps: int | None = None,
        latents: int | None = None,
        levels: Sequence[float] = (),
    ) -> str | None:
        """Why a run with what is known of it lies outside, or None."""
        if self.scheduler and scheduler is not None and scheduler != self.scheduler:
            return f"it was calibrated with {self.scheduler}, and this run has {scheduler}"
        for name, span, value in (("steps", self.steps, steps), ("latents", self.latents, latents)):
            if span is not None and value is not None and not span[0] <= value <= span[1]:
                return f"it holds for {span[0]} to {span[1]} {name}, and this run has {value}"
        for step, (own, here) in enumerate(zip(self.levels, levels, strict=False)):
            if abs(own - here) > _SAME_LEVEL:
                return (
                    f"it was calibrated at other noise levels: log(signal/noise) {own:.2f} at step "
                    f"{step}, and this run has {here:.2f}"
                )
        return None


class Recipe(BaseModel):
    """The methods of one model, in order, and the evidence for them.

    `model` is the denoiser's class name, `source` where settings come from that we did not measure;
    `measured` holds benchmark rows and may be empty. `front` holds the other choices of the
    calibration, from which `patch(pipe, speedup=…)` takes one. Outside of `valid_for`, an online
    method takes over.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    model: str = ""
    source: str = ""
    valid_for: Validity = Validity()
    entries: tuple[_Entry, ...]
    front: tuple[Choice, ...] = ()
    measured: tuple[dict[str, Any], ...] = ()
    tensors: dict[str, str] = {}
    """Safetensors files beside the recipe's own, with their SHA-256."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The settings objects; raises `AccelError` naming an unknown method or setting."""
        return _methods(self.entries)

    def choose(self, speedup: float | None = None, psnr: float | None = None) -> Choice:
        """The best point of the front with at least this speed-up, or at least this PSNR.

        When nothing reaches the bar, `AccelError` names the best there is.
        """
        if not self.front:
            raise AccelError("this recipe holds no front to choose from; run accel.calibrate")
        if speedup is not None:
            fast = [choice for choice in self.front if choice.speedup >= speedup]
            if fast:
                return max(fast, key=lambda choice: choice.psnr)
            best = max(choice.speedup for choice in self.front)
            raise AccelError(f"speedup={speedup:g} was not reached; the fastest is {best:.2f}")
        good = [choice for choice in self.front if choice.psnr >= (psnr or 0)]
        if good:
            return max(good, key=lambda choice: choice.speedup)
        best = max(choice.psnr for choice in self.front)
        raise AccelError(f"psnr={psnr:g} was not reached; the closest is {best:.1f} dB")

    @classmethod
    def of(
        cls, methods: tuple[Method, ...], model: str = "", valid_for: Validity | None = None
    ) -> Recipe:
        """The recipe of some settings objects."""
        entries = tuple(
            _Entry(name=type(method).__name__, settings=_settings(method)) for method in methods
        )
        return cls(model=model, valid_for=valid_for or Validity(), entries=entries)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a recipe file (UTF-8 JSON, at most 1 MB)."""
        file = Path(path)
        try:
            if file.stat().st_size > _LIMIT:
                raise AccelError(f"recipe {file}: larger than {_LIMIT} bytes")
            content = json.loads(
                file.read_text(encoding="utf-8-sig"),
                object_pairs_hook=_no_duplicates,
                parse_constant=_not_finite,
            )
        except OSError as error:
            raise AccelError(f"recipe {file}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise AccelError(f"recipe {file}: not UTF-8 JSON ({error})") from error
        return recipe_tensors.unpack(cls.read(content, str(file)), file)

    @classmethod
    def read(cls, source: Recipe | Mapping[str, Any] | str | Path, name: str = "recipe") -> Recipe:
        """A recipe from a recipe, a dict, a path or "published:NAME"; everything is checked."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, str) and source.startswith(PUBLISHED):
            return cls.read(published(source.removeprefix(PUBLISHED)), source)
        if isinstance(source, str | Path):
            return cls.load(source)
        try:
            recipe = cls.model_validate(source)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in item['loc']) or 'top level'}: {item['msg']}"
                for item in error.errors()
            )
            raise AccelError(f"{name}: {problems}") from error
        _ = recipe.methods, [choice.methods for choice in recipe.front]
        return recipe

    def save(self, path: str | Path) -> None:
        """Write the file in one piece: it is either whole or not there.

        Its folder is made, tensors that settings name are copied beside it. Raises `AccelError` for
        a setting that names a folder, and where nothing can be written.
        """
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = recipe_tensors.pack(self, file).model_dump_json(indent=2)
            part = file.with_name(f"{file.name}.{os.getpid()}.part")
            with part.open("w", encoding="utf-8") as out:
                out.write(_one_line_a_row(content) + "\n")
                out.flush()
                os.fsync(out.fileno())
            part.replace(file)
        except OSError as error:
            raise AccelError(f"recipe {file}: cannot be written ({error.strerror})") from error


def _one_line_a_row(text: str) -> str:
    """Indented JSON with lists of numbers in one line each."""
    rows = re.compile(r"\[\n[-+.,\deE\s]*\]")  # a line break never lies inside a string
    return rows.sub(lambda found: re.sub(r"\s+", " ", found[0]), text)


def published(name: str) -> dict[str, Any]:
    """The settings that a method's authors published for a model, such as "magcache/qwen-image"."""
    known = _published()
    if name not in known:
        raise AccelError(f"no published settings {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def published_names() -> list[str]:
    """Every name that `published` knows."""
    return sorted(_published())


def _published() -> dict[str, dict[str, Any]]:
    places = (Path(folder) / "pipelines" / "published.json" for folder in accel.__path__)
    file = next(place for place in places if place.is_file())
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _methods(entries: tuple[_Entry, ...]) -> tuple[Method, ...]:
    return tuple(_build(registry.method(entry.name), entry.settings) for entry in entries)


def _settings(value: Any) -> dict[str, Any]:
    """Fields that differ from their defaults; an approximator becomes {"name", …fields}."""
    settings: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        content = getattr(value, item.name)
        if content == item.default:
            continue
        if dataclasses.is_dataclass(content):
            content = {"name": type(content).__name__, **_settings(content)}
        settings[item.name] = content
    return settings


def _build(kind: Any, settings: Mapping[str, Any]) -> Any:
    """An object of a settings class from JSON values."""
    fields = {item.name for item in dataclasses.fields(kind)}
    unknown = sorted(set(settings) - fields)
    if unknown:
        raise AccelError(
            f"{kind.__name__} has no setting {', '.join(unknown)}; accepted: "
            f"{', '.join(sorted(fields)) or 'none'}"
        )
    values = {name: _value(content) for name, content in settings.items()}
    for item in dataclasses.fields(kind):
        forecast = dataclasses.is_dataclass(item.default) and item.name in values
        if forecast and not hasattr(values[item.name], "start"):
            known = ", ".join(place.split(":")[1] for place in registry.APPROXIMATORS.values())
            raise AccelError(
                f'{kind.__name__}: {item.name} must be {{"name": …}} with one of {known}; got '
                f"{values[item.name]!r}"
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise AccelError(f"{kind.__name__}: {error}") from error


def _value(content: Any) -> Any:
    if isinstance(content, list | tuple):
        return tuple(_value(item) for item in content)
    if isinstance(content, Mapping):
        if "name" in content:
            rest = {key: value for key, value in content.items() if key != "name"}
            return _build(registry.approximator(str(content["name"])), rest)
        return {str(key): _value(item) for key, item in content.items()}
    return content


def _not_finite(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = sorted({key for key in names if names.count(key) > 1})
        raise AccelError(f"recipe: duplicate keys {', '.join(twice)}")
    return found
